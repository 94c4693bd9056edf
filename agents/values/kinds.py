"""The kinds of value models: create them by name, or load them from a folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mbrl_text_env.agents.values.fitted import (
    FOLDER,
    MODELS,
    FittedValue,
    check_lengths,
    cut_prefixes,
    samples_of,
)
from mbrl_text_env.encoders import (
    Encoder,
    encode_texts,
    encoder_flops,
    encoder_flops_bound,
    multiplies_bfloat16,
    prefix_text,
)
from mbrl_text_env.fitting.heads import Head, LinePerLength, scaled_ridge
from mbrl_text_env.fitting.report import FitError, Samples
from mbrl_text_env.language_models.base import FeatureModel, LanguageModel, Tokenizer
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, Scores, reward_usage_bound, score_responses
from mbrl_text_env.rewards.evaluators.relevance import load_encoder
from mbrl_text_env.rewards.learning.features import token_table
from mbrl_text_env.types import FloatArray, Ledgers, TextState, Usage, check_positive
from mbrl_text_env.values import (
    LENGTHS,
    ValueEstimate,
    ValueModel,
    ValueModelError,
    check_value_fits,
)
from mbrl_text_env.world_model.dynamics import FOLDER as WORLD_FOLDER
from mbrl_text_env.world_model.dynamics import IncrementDynamics, load_dynamics
from mbrl_text_env.world_model.value import WorldModelValue

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

READY = ("prefix", "prefix-exact")
"""Names of value models that need no fit."""

FITTED = ("calibrated", "embedding", "hidden-state", "stacked", "token-embedding")
"""Names of value models to fit on records. `calibrated` is `prefix-exact` after a fit."""

WORLD_MODEL = "world-model"
"""Name of the value model for rewards on counts. It is fitted on records, scored or not."""

# Ridge penalty for inputs of variance 1.
_ALPHA = 10.0
# Scales the last input up against hundreds of embedding dimensions, which lowers its penalty.
_WEIGHT = 20.0


@dataclass(eq=False, repr=False)
class EmbeddingValue(FittedValue):
    """The article's quality predictor: ridge regression on the embedding of prompt and prefix.

    Source: "Model Based Reinforcement Learning: Tutorial & Examples" (Patronus AI); its embedding
    (all-MiniLM-L6-v2), text format, alpha and prefix ratio are the defaults. Deviation: predictions
    have a standard deviation, which the article does not have. It is that of the errors on held-out
    prompts in cross-validation, the same for every state.

    Args:
        encoder: Text encoder; MiniLM by default.
        alpha: Strength of the ridge penalty.
        prefix_ratio: Fraction of a response's words to fit on, above 0 and up to 1.

    Example:
        >>> value = EmbeddingValue(tokenizer).fit(read_records("records"))  # doctest: +SKIP
    """

    kind = "embedding"
    tokenizer: Tokenizer
    encoder: Encoder | None = None
    _: KW_ONLY
    alpha: float = 1.0
    prefix_ratio: float = 0.5

    def __post_init__(self) -> None:
        if not self.alpha > 0 or not 0 < self.prefix_ratio <= 1:
            raise ValueError(
                "Expected alpha above 0 and prefix_ratio above 0 and up to 1, got "
                f"{self.alpha} and {self.prefix_ratio}."
            )

    def inputs(self, states: Sequence[TextState], ledgers: Ledgers = None) -> FloatArray:
        """Embeddings of prompt and prefix, float64[B, d]."""
        return self._embedded(self._texts(states))

    def samples(self, records: Sequence[Record]) -> Samples:
        """The first `prefix_ratio` of each response's words."""
        texts = []
        for record in records:
            words = record.response.split()
            kept = words[: max(1, int(len(words) * self.prefix_ratio))]
            texts.append(prefix_text(record.prompt_text, " ".join(kept)))
        return samples_of(self._embedded(texts), records)

    def heads(self) -> Mapping[str, Head]:
        """A single ridge regression."""
        return {"ridge": Ridge(alpha=self.alpha)}

    def flops(self, states: Sequence[TextState]) -> FloatArray:
        """FLOPs of embedding each state, float64[B]; 0 if the encoder does not report them."""
        return encoder_flops(load_encoder(self.encoder, "value"), self._texts(states))

    def flops_bound(self) -> float:
        """Upper bound on the FLOPs for one state."""
        return encoder_flops_bound(load_encoder(self.encoder, "value"))

    def _embedded(self, texts: Sequence[str]) -> FloatArray:
        return encode_texts(load_encoder(self.encoder, "value"), texts).astype(np.float64)

    def _texts(self, states: Sequence[TextState]) -> list[str]:
        return [prefix_text(s.prompt.text, self.tokenizer.decode(s.response_ids)) for s in states]


@dataclass(eq=False, repr=False)
class HiddenStateValue(FittedValue):
    """Ridge regression on `language_model.features`, the last hidden state of the prefix.

    It needs no other model. After sampling from the same state, most of the prefix is in the
    language model's cache. Inputs are scaled to variance 1 before the penalty.

    Args:
        language_model: A language model with `features`.
        alphas: Penalties to choose from on held-out prompts.
        lengths: Prefix lengths in tokens to fit on, increasing.

    Example:
        >>> value = HiddenStateValue(embedded()).fit(read_records("records"))  # doctest: +SKIP
    """

    kind = "hidden_state"
    language_model: LanguageModel
    _: KW_ONLY
    alphas: Sequence[float] = (10.0, 100.0, 1000.0, 10000.0)
    lengths: Sequence[int] = LENGTHS

    def __post_init__(self) -> None:
        self.alphas, self.lengths = tuple(self.alphas), check_lengths(self.lengths)
        _check_penalties(self.alphas)

    def inputs(self, states: Sequence[TextState], ledgers: Ledgers = None) -> FloatArray:
        """Hidden states, float64[B, feature_size]; charged as language model calls."""
        if not isinstance(self.language_model, FeatureModel):
            raise ValueModelError(
                f"Expected a language model with `features`, got "
                f"{type(self.language_model).__name__}, which has none (servers return only text "
                "and probabilities). Use TransformersLM, or another value model, such as "
                "StackedValue."
            )
        return self.language_model.features(states, ledgers=ledgers).astype(np.float64)

    def heads(self) -> Mapping[str, Head]:
        """One ridge regression per penalty."""
        return {f"alpha={alpha:g}": scaled_ridge(alpha) for alpha in self.alphas}

    def usage_bound(self, state: TextState) -> Usage:
        """Upper bound on the usage charged for one prefix."""
        return self.language_model.usage_bound(len(state.prompt_ids) + len(state.response_ids), [])


def _check_penalties(alphas: Sequence[float]) -> None:
    if not alphas or not min(alphas) > 0:
        raise ValueError(f"alphas: expected numbers above 0, got {alphas}.")


class PrefixScoredValue(FittedValue):
    """A value model whose first input is the reward model's score of the prefix."""

    reward_model: Any
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self.lengths = check_lengths(self.lengths)
        self.reward_model = as_reward_model(self.reward_model)

    def final_scores(self, inputs: FloatArray) -> FloatArray:
        """The rewards of the texts as they are, float64[B]."""
        return inputs[:, 0]

    def usage_bound(self, state: TextState) -> Usage:
        """Upper bound on the usage charged for one prefix."""
        return reward_usage_bound(self.reward_model)

    def expected_usage(self, state: TextState) -> Usage:
        """Expected usage charged for this prefix."""
        usage: Usage = self.reward_model.usage(state.prompt, self._text(state))
        return usage

    def _text(self, state: TextState) -> str:
        return self.tokenizer.decode(state.response_ids)

    def _scores(self, states: Sequence[TextState], ledgers: Ledgers) -> Scores:
        prompts = [state.prompt for state in states]
        texts = [self._text(state) for state in states]
        return score_responses(self.reward_model, prompts, texts, ledgers=ledgers)


@dataclass(eq=False, repr=False)
class PrefixRewardValue(PrefixScoredValue):
    """The reward model's score of the prefix text, optionally calibrated on records.

    Without a fit, the mean is the score of the prefix and the standard deviation is 0. `fit` learns
    a line from prefix score to final score for each prefix length, and the standard deviation of
    the residuals. Prefixes of different lengths are then comparable.

    Args:
        lengths: Prefix lengths in tokens to calibrate on, increasing.

    Example:
        >>> value = PrefixRewardValue(SentimentReward(), lm)  # doctest: +SKIP
    """

    kind = "prefix_reward"
    reward_model: Any
    tokenizer: Tokenizer
    _: KW_ONLY
    lengths: Sequence[int] = LENGTHS

    @property
    def is_fitted(self) -> bool:
        """Always true: prefix scores need no fit."""
        return True

    def inputs(self, states: Sequence[TextState], ledgers: Ledgers = None) -> FloatArray:
        """Score and length of each prefix, float64[B, 2]."""
        scores = self._scores(states, ledgers).total
        return np.column_stack([scores, [float(len(s.response_ids)) for s in states]])

    def heads(self) -> Mapping[str, Head]:
        """A single head with one line per length."""
        return {"lines": LinePerLength()}

    def estimate(self, inputs: FloatArray, lengths: Sequence[int]) -> ValueEstimate:
        """Scores of the prefixes, calibrated after a fit."""
        if hasattr(self, "head_"):
            return super().estimate(inputs, lengths)
        return ValueEstimate(inputs[:, 0], np.zeros(len(inputs)))


class PrefixStatistics(TransformerMixin, BaseEstimator):
    """Regression inputs: the prefix's reward, reward parts and mean token log-probability.

    These are more informative for longer prefixes, so each column also appears multiplied by the
    fraction of the response written. Unknown log-probabilities are replaced by their mean.
    """

    numbers = ("logprob_",)

    def __init__(self, max_tokens: float) -> None:
        self.max_tokens = max_tokens

    def fit(self, inputs: FloatArray, scores: FloatArray | None = None) -> PrefixStatistics:
        """Set `logprob_`, the mean token log-probability of the prefixes that have one."""
        length, total, known = inputs[:, -3:].T
        has = (known > 0) & (length > 0)
        self.logprob_ = np.asarray((total[has] / length[has]).mean() if has.any() else 0.0)
        return self

    def transform(self, inputs: FloatArray) -> FloatArray:
        """Map `StackedValue.inputs`, float64[B, 4 + parts], to float64[B, k]."""
        length, total, known = inputs[:, -3:].T
        share = np.minimum(length / self.max_tokens, 1.0)
        total = np.where(known > 0, total, self.logprob_ * length)
        per_token = np.where(length > 0, total / np.maximum(length, 1.0), self.logprob_)
        columns = np.column_stack([inputs[:, :-3], per_token])
        return np.column_stack([columns, columns * share[:, None], share, total])


@dataclass(eq=False, repr=False)
class StackedValue(PrefixScoredValue):
    """Ridge regression on the prefix's reward, reward parts, position and log-probability.

    A prediction costs one reward call and nothing else. The value of an ended response is its
    reward.

    Args:
        lengths: Prefix lengths in tokens to fit on, increasing.
        max_response_tokens: Response length that positions are relative to. None uses the longest
            response of the records (`max_tokens_`).

    Attributes:
        part_names_: Names of the reward parts used: those that all records have.

    Example:
        >>> value = StackedValue(lm, SentimentReward()).fit(records)  # doctest: +SKIP
    """

    kind = "stacked"
    fitted_settings = ("part_names_", "max_tokens_")

    tokenizer: Tokenizer
    reward_model: Any
    _: KW_ONLY
    lengths: Sequence[int] = LENGTHS
    max_response_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(max_response_tokens=self.max_response_tokens)

    def inputs(self, states: Sequence[TextState], ledgers: Ledgers = None) -> FloatArray:
        """Reward, parts, length, log-probability and whether it is known: float64[B, 4 + parts]."""
        return self._columns(states, self._scores(states, ledgers))

    def samples(self, records: Sequence[Record]) -> Samples:
        """Prefixes of many lengths, with their scores."""
        states, owners = cut_prefixes(records, self.lengths)
        scores = self._scores(states, None)
        common = set.intersection(*(set(record.rewards) for record in records))
        self.part_names_ = [n for n in scores.parts if n in common - {records[0].reward_name}]
        longest = max(len(record.response_ids) for record in records)
        self.max_tokens_ = float(self.max_response_tokens or longest)
        lengths = [len(state.response_ids) for state in states]
        return samples_of(self._columns(states, scores), owners, lengths)

    def heads(self) -> Mapping[str, Head]:
        """A single ridge regression."""
        statistics = PrefixStatistics(self.max_tokens_)
        return {"ridge": make_pipeline(statistics, StandardScaler(), Ridge(alpha=_ALPHA))}

    def _columns(self, states: Sequence[TextState], scores: Scores) -> FloatArray:
        missing = [name for name in self.part_names_ if name not in scores.parts]
        if missing:
            raise ValueModelError(
                f"StackedValue was fitted with the reward's parts {self.part_names_}, but for "
                f"prompt {states[0].prompt.id!r} the reward gave {sorted(scores.parts)}. Predict "
                "with the reward that it was fitted with, or fit it again."
            )
        # None becomes NaN.
        likelihoods = np.asarray([state.logprob for state in states], dtype=np.float64)
        known = np.isfinite(likelihoods)
        rewards = scores.total, *(scores.parts[name] for name in self.part_names_)
        lengths = [float(len(state.response_ids)) for state in states]
        return np.column_stack([*rewards, lengths, np.where(known, likelihoods, 0.0), known])


class _Scaler(StandardScaler):
    """Scale inputs to variance 1, the last one to variance `_WEIGHT` squared."""

    numbers = ("mean_", "scale_")

    def fit(self, inputs: FloatArray, scores: Any = None, sample_weight: Any = None) -> _Scaler:
        super().fit(inputs, scores, sample_weight)
        self.scale_[-1] /= _WEIGHT
        return self


@dataclass(eq=False, repr=False)
class TokenEmbeddingValue(FittedValue):
    """Ridge regression on the response's token embeddings, without running a model.

    The inputs are the mean embedding and the coverage of the prompt: for each prompt token, the
    largest cosine similarity with a response token, averaged with weights that are larger for
    tokens in fewer of the records' prompts. The model is fitted on complete responses, so its
    standard deviation is too small for short prefixes.

    Sources: Joulin et al., "Bag of Tricks for Efficient Text Classification", 2017 (the mean);
    Khattab and Zaharia, "ColBERT", 2020 (largest similarities); Zhang et al., "BERTScore", 2020
    (weights by rarity). Deviation: the embeddings are the language model's input embeddings, not
    trained further; similarities use them minus their mean.

    Args:
        alphas: Penalties to choose from on held-out prompts.

    Example:
        >>> value = TokenEmbeddingValue(embedded()).fit(read_records("records"))  # doctest: +SKIP
    """

    kind = "token_embedding"
    fitted_settings = ("rarity_", "rarest_")
    language_model: Any
    _: KW_ONLY
    alphas: Sequence[float] = (100.0, 1000.0, 10000.0)

    def __post_init__(self) -> None:
        self.alphas = tuple(self.alphas)
        _check_penalties(self.alphas)

    def inputs(self, states: Sequence[TextState], ledgers: Ledgers = None) -> FloatArray:
        """Mean embedding and prompt coverage, float64[B, d + 1]; 0 for an empty response."""
        found = np.zeros((len(states), self._table().shape[1] + 1))
        for i, state in enumerate(states):
            if state.response_ids:
                rows = self._rows(state.response_ids)
                found[i, :-1] = rows.mean(axis=0)
                found[i, -1] = self._taken_up(state.prompt_ids, rows)
        return found

    def _taken_up(self, prompt_ids: Sequence[int], response: FloatArray) -> float:
        known = {token: self.rarity_.get(str(token), self.rarest_) for token in set(prompt_ids)}
        weights = {token: weight for token, weight in sorted(known.items()) if weight > 0}
        if not weights:
            return 0.0
        prompt, response = self._directions(self._rows([*weights])), self._directions(response)
        nearest = (prompt @ response.T).max(axis=1)
        return float(np.average(nearest, weights=[*weights.values()]))

    def _directions(self, rows: FloatArray) -> FloatArray:
        rows = rows - self._mean
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    def samples(self, records: Sequence[Record]) -> Samples:
        """Complete responses; also counts how rare the prompts' tokens are."""
        if missing := [r.prompt_id for r in records if r.response and not r.response_ids]:
            raise FitError(
                f"Record of prompt {missing[0]!r}: expected token ids of the response, got none. "
                "Collect the records with `mbrl-text collect`, which keeps them."
            )
        prompts = {record.prompt_id: set(record.prompt_ids) for record in records}
        counts = Counter(token for prompt in prompts.values() for token in prompt)
        self.rarest_ = math.log(len(prompts) + 1)
        self.rarity_ = {str(token): self.rarest_ - math.log(n + 1) for token, n in counts.items()}
        states = [record.prefix_state(len(record.response_ids)) for record in records]
        return samples_of(self.inputs(states), records)

    def heads(self) -> Mapping[str, Head]:
        """One ridge regression per penalty."""
        return {f"alpha={alpha:g}": make_pipeline(_Scaler(), Ridge(alpha)) for alpha in self.alphas}

    def flops(self, states: Sequence[TextState]) -> FloatArray:
        """FLOPs of the embedding sums and norms, similarities and the head, float64[B]."""
        return np.array([self._flops(len(s.prompt_ids), len(s.response_ids)) for s in states])

    def flops_bound(self) -> float:
        """FLOPs of a prompt and a response that each fill half of the context."""
        half = self.language_model.context_length / 2
        return self._flops(half, half)

    def _flops(self, prompt: float, response: float) -> float:
        size = self._table().shape[1]
        return size * (2.0 * prompt * response + 4.0 * (prompt + response) + 2.0)

    @cached_property
    def _mean(self) -> FloatArray:
        return self._table().double().mean(dim=0).cpu().numpy()

    def _rows(self, ids: Sequence[int]) -> FloatArray:
        return self._table()[list(ids)].double().cpu().numpy()

    def _table(self) -> Any:
        return token_table(self.language_model, ValueModelError)


def make_value(
    name: str,
    language_model: LanguageModel,
    reward_model: RewardLike,
    *,
    encoder: Encoder | None = None,
    max_response_tokens: int = 256,
    seed: int = 0,
) -> ValueModel:
    """Create a value model by name, with default settings.

    Args:
        name: A name in `READY`, or in `FITTED` or `WORLD_MODEL`, which need `fit(records)` first.
        encoder: Text encoder of the models that use one; None for MiniLM.
        seed: Seed of imagined futures.

    Example:
        >>> value = make_value("stacked", lm, SentimentReward()).fit(records)  # doctest: +SKIP
    """
    lm, reward = language_model, as_reward_model(reward_model)
    faster = reward.reduced("bfloat16") if name == "prefix" and multiplies_bfloat16() else reward
    kinds: Mapping[str, Callable[[], ValueModel]] = {
        "prefix": lambda: PrefixRewardValue(faster, lm),
        "prefix-exact": lambda: PrefixRewardValue(reward, lm),
        "calibrated": lambda: PrefixRewardValue(reward, lm),
        "embedding": lambda: EmbeddingValue(lm, encoder),
        "hidden-state": lambda: HiddenStateValue(lm),
        "stacked": lambda: StackedValue(lm, reward, max_response_tokens=max_response_tokens),
        "token-embedding": lambda: TokenEmbeddingValue(lm),
        WORLD_MODEL: lambda: WorldModelValue(IncrementDynamics(lm), reward, seed=seed),
    }
    if name not in kinds:
        raise ValueModelError(
            f"Unknown value model {name!r}. Expected one of {sorted(READY)}, or one that is fitted "
            f"on records: {sorted((*FITTED, WORLD_MODEL))}."
        )
    return kinds[name]()


def load_value(
    folder: str | Path,
    language_model: LanguageModel,
    reward_model: RewardLike,
    encoder: Encoder | None = None,
) -> FittedValue | WorldModelValue:
    """Load a value model of any kind, with the models that it was fitted with.

    A world model with the package's own features is a value model for any reward on counts.

    Raises:
        ValueModelError: The folder has no value model, a damaged one, another format, or one for
            another reward or language model.

    Example:
        >>> value = load_value("value", lm, reward)  # doctest: +SKIP
    """
    reward_model = as_reward_model(reward_model)
    if (Path(folder) / WORLD_FOLDER.config).is_file():
        return WorldModelValue(load_dynamics(folder, language_model), reward_model)
    with FOLDER.reading(folder) as (config, arrays):
        kind = FittedValue.KINDS.get(config["kind"])
        if kind is None:
            known = sorted(FittedValue.KINDS)
            raise ValueError(f"kind {config['kind']!r}, expected one of {known}")
        models = (language_model, language_model, reward_model, encoder)
        value = kind.read(config, arrays(), dict(zip(MODELS, models, strict=True)))
    check_value_fits(value, language_model, reward_model)
    return value

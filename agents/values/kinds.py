"""The kinds of value models, by their names, and out of folders."""

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
"""Names of value models that predict at once."""

FITTED = ("calibrated", "embedding", "hidden-state", "stacked", "token-embedding")
"""Names of those that are fitted on records first; `calibrated` is `prefix-exact` after a fit."""

WORLD_MODEL = "world-model"
"""Name of the value that is fitted on records, scored or not, and takes any reward on counts."""

# Penalty on inputs of variance 1.
_ALPHA = 10.0
# The last input beside hundreds of embedding dimensions: its penalty is smaller by the square.
_WEIGHT = 20.0


@dataclass(eq=False, repr=False)
class EmbeddingValue(FittedValue):
    """The article's quality predictor: ridge regression on the embedding of prompt and prefix.

    Source: "Model Based Reinforcement Learning: Tutorial & Examples" (Patronus AI); its embedding
    (all-MiniLM-L6-v2), text format, alpha and prefix ratio are the defaults. Deviation: the
    standard deviation of a prediction, which the article does not have, is that of the errors on
    prompts left out in cross-validation, the same for every state.

    Args:
        encoder: Embeds texts; by default MiniLM.
        alpha: Strength of the ridge penalty.
        prefix_ratio: Share of a response's words that it is fitted on, above 0 and up to 1.

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
        """float64[B, d]: the embedding of prompt and prefix."""
        return self._embedded(self._texts(states))

    def samples(self, records: Sequence[Record]) -> Samples:
        """The first half of each response's words."""
        texts = []
        for record in records:
            words = record.response.split()
            kept = words[: max(1, int(len(words) * self.prefix_ratio))]
            texts.append(prefix_text(record.prompt_text, " ".join(kept)))
        return samples_of(self._embedded(texts), records)

    def heads(self) -> Mapping[str, Head]:
        """One: ridge regression."""
        return {"ridge": Ridge(alpha=self.alpha)}

    def flops(self, states: Sequence[TextState]) -> FloatArray:
        """float64[B]: what embedding the states takes; 0 for encoders that do not say."""
        return encoder_flops(load_encoder(self.encoder, "value"), self._texts(states))

    def flops_bound(self) -> float:
        """The most that one state takes."""
        return encoder_flops_bound(load_encoder(self.encoder, "value"))

    def _embedded(self, texts: Sequence[str]) -> FloatArray:
        return encode_texts(load_encoder(self.encoder, "value"), texts).astype(np.float64)

    def _texts(self, states: Sequence[TextState]) -> list[str]:
        return [prefix_text(s.prompt.text, self.tokenizer.decode(s.response_ids)) for s in states]


@dataclass(eq=False, repr=False)
class HiddenStateValue(FittedValue):
    """Ridge regression on `language_model.features`, the last hidden state of the prefix.

    It needs no other model, and after sampling from the same state the language model has most of
    the prefix in its cache. The penalty is on inputs of variance 1.

    Args:
        language_model: One that has `features`.
        alphas: Strengths of the penalty, of which the best on prompts left out is taken.
        lengths: Prefix lengths in tokens that it is fitted on, increasing.

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
        """float64[B, feature_size]; charged as calls of the language model."""
        if not isinstance(self.language_model, FeatureModel):
            raise ValueModelError(
                f"Expected a language model with `features`, got "
                f"{type(self.language_model).__name__}, which has none (a server gives text and "
                "probabilities alone). Use TransformersLM, or another value model, such as "
                "StackedValue."
            )
        return self.language_model.features(states, ledgers=ledgers).astype(np.float64)

    def heads(self) -> Mapping[str, Head]:
        """Ridge regression with each of the penalties."""
        return {f"alpha={alpha:g}": scaled_ridge(alpha) for alpha in self.alphas}

    def usage_bound(self, state: TextState) -> Usage:
        """The most that reading one prefix is charged."""
        return self.language_model.usage_bound(len(state.prompt_ids) + len(state.response_ids), [])


def _check_penalties(alphas: Sequence[float]) -> None:
    if not alphas or not min(alphas) > 0:
        raise ValueError(f"alphas: expected numbers above 0, got {alphas}.")


class PrefixScoredValue(FittedValue):
    """Asks the reward model for the score of the prefix: its first input."""

    reward_model: Any
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self.lengths = check_lengths(self.lengths)
        self.reward_model = as_reward_model(self.reward_model)

    def final_scores(self, inputs: FloatArray) -> FloatArray:
        """The rewards of the texts as they are."""
        return inputs[:, 0]

    def usage_bound(self, state: TextState) -> Usage:
        """The most that one prefix is charged."""
        return reward_usage_bound(self.reward_model)

    def expected_usage(self, state: TextState) -> Usage:
        """What this prefix is charged."""
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
    """The reward model's score of the prefix's text, as it is or calibrated on records.

    Without a fit, the mean is the prefix's score and the standard deviation 0. `fit` calibrates it,
    with a line from score to final score for each prefix length and the standard deviation of what
    that leaves; prefixes of different lengths can then be compared.

    Args:
        lengths: Prefix lengths in tokens that it is calibrated on, increasing.

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
        """Always: the score of the prefix needs no records."""
        return True

    def inputs(self, states: Sequence[TextState], ledgers: Ledgers = None) -> FloatArray:
        """float64[B, 2]: the prefix's score and its length."""
        scores = self._scores(states, ledgers).total
        return np.column_stack([scores, [float(len(s.response_ids)) for s in states]])

    def heads(self) -> Mapping[str, Head]:
        """One: a line for each length."""
        return {"lines": LinePerLength()}

    def estimate(self, inputs: FloatArray, lengths: Sequence[int]) -> ValueEstimate:
        """The scores of the prefixes, calibrated where there was a fit."""
        if hasattr(self, "head_"):
            return super().estimate(inputs, lengths)
        return ValueEstimate(inputs[:, 0], np.zeros(len(inputs)))


class PrefixStatistics(TransformerMixin, BaseEstimator):
    """What a ridge sees: a prefix's reward, its parts and its log-probability a token.

    They tell more the less is to come: each column is there a second time, multiplied with the
    share of the response that is written. A log-probability that is not known is the mean's.
    """

    numbers = ("logprob_",)

    def __init__(self, max_tokens: float) -> None:
        self.max_tokens = max_tokens

    def fit(self, inputs: FloatArray, scores: FloatArray | None = None) -> PrefixStatistics:
        """Take `logprob_`, the mean a token of the log-probabilities that are known."""
        length, total, known = inputs[:, -3:].T
        has = (known > 0) & (length > 0)
        self.logprob_ = np.asarray((total[has] / length[has]).mean() if has.any() else 0.0)
        return self

    def transform(self, inputs: FloatArray) -> FloatArray:
        """float64[B, k] for `StackedValue.inputs`, float64[B, 4 + parts]."""
        length, total, known = inputs[:, -3:].T
        share = np.minimum(length / self.max_tokens, 1.0)
        total = np.where(known > 0, total, self.logprob_ * length)
        per_token = np.where(length > 0, total / np.maximum(length, 1.0), self.logprob_)
        columns = np.column_stack([inputs[:, :-3], per_token])
        return np.column_stack([columns, columns * share[:, None], share, total])


@dataclass(eq=False, repr=False)
class StackedValue(PrefixScoredValue):
    """Ridge regression on the prefix's reward, its parts, position and log-probability.

    A prediction takes one reward call and nothing else. A response that has ended is worth its
    reward.

    Args:
        lengths: Prefix lengths in tokens that it is fitted on, increasing.
        max_response_tokens: Tokens of a whole response, what positions are shares of; None for the
            longest response of the records, in `max_tokens_`.

    Attributes:
        part_names_: Parts of the reward that it sees: those that all records have.

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
        """float64[B, 4 + parts]: reward, parts, length, log-probability, whether it is known."""
        return self._columns(states, self._scores(states, ledgers))

    def samples(self, records: Sequence[Record]) -> Samples:
        """Prefixes of many lengths."""
        states, owners = cut_prefixes(records, self.lengths)
        scores = self._scores(states, None)
        common = set.intersection(*(set(record.rewards) for record in records))
        self.part_names_ = [n for n in scores.parts if n in common - {records[0].reward_name}]
        longest = max(len(record.response_ids) for record in records)
        self.max_tokens_ = float(self.max_response_tokens or longest)
        lengths = [len(state.response_ids) for state in states]
        return samples_of(self._columns(states, scores), owners, lengths)

    def heads(self) -> Mapping[str, Head]:
        """One: ridge regression."""
        statistics = PrefixStatistics(self.max_tokens_)
        return {"ridge": make_pipeline(statistics, StandardScaler(), Ridge(alpha=_ALPHA))}

    def _columns(self, states: Sequence[TextState], scores: Scores) -> FloatArray:
        missing = [name for name in self.part_names_ if name not in scores.parts]
        if missing:
            raise ValueModelError(
                f"StackedValue was fitted with the reward's parts {self.part_names_}, but for "
                f"prompt {states[0].prompt.id!r} the reward gave {sorted(scores.parts)}. Predict "
                "with the reward that it was fitted with, or fit it anew."
            )
        # None is read as NaN.
        likelihoods = np.asarray([state.logprob for state in states], dtype=np.float64)
        known = np.isfinite(likelihoods)
        rewards = scores.total, *(scores.parts[name] for name in self.part_names_)
        lengths = [float(len(state.response_ids)) for state in states]
        return np.column_stack([*rewards, lengths, np.where(known, likelihoods, 0.0), known])


class _Scaler(StandardScaler):
    """Inputs of variance 1; the last one of variance `_WEIGHT` squared."""

    numbers = ("mean_", "scale_")

    def fit(self, inputs: FloatArray, scores: Any = None, sample_weight: Any = None) -> _Scaler:
        super().fit(inputs, scores, sample_weight)
        self.scale_[-1] /= _WEIGHT
        return self


@dataclass(eq=False, repr=False)
class TokenEmbeddingValue(FittedValue):
    """Ridge regression on the response's token embeddings: no model is run.

    Inputs are their mean, and how much of the prompt the response takes up: the largest cosine
    similarity of each of the prompt's tokens with one of the response, in the mean over the
    prompt's tokens, weighted by how few of the records' prompts have the token. It is fitted on
    complete responses, so its standard deviation is too small for short prefixes.

    Sources: Joulin et al., "Bag of Tricks for Efficient Text Classification", 2017 (the mean);
    Khattab and Zaharia, "ColBERT", 2020 (largest similarities); Zhang et al., "BERTScore", 2020
    (weights by rarity). Deviation: the embeddings are the language model's input embeddings, less
    their mean for similarities, and stay as they are.

    Args:
        alphas: Strengths of the penalty, of which the best on prompts left out is taken.

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
        """float64[B, d + 1]: the mean embedding, and what is taken up; 0 for an empty response."""
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
        """The complete responses; how rare the tokens of prompts are is counted here."""
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
        """Ridge regression with each of the penalties."""
        return {f"alpha={alpha:g}": make_pipeline(_Scaler(), Ridge(alpha)) for alpha in self.alphas}

    def flops(self, states: Sequence[TextState]) -> FloatArray:
        """float64[B]: sums and norms of the embeddings, similarities, and the head's product."""
        return np.array([self._flops(len(s.prompt_ids), len(s.response_ids)) for s in states])

    def flops_bound(self) -> float:
        """A prompt and a response that fill the context, half and half."""
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
    """Make a value model of a kind, with the settings that its class has by default.

    Args:
        name: One of `READY`, or of `FITTED` or `WORLD_MODEL`, which `fit(records)` comes before.
        encoder: Embeds texts, where it does; None for MiniLM.
        seed: Of imagined futures.

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
            f"Unknown value model {name!r}. Expected one of {sorted(READY)}, or, fitted on "
            f"records, of {sorted((*FITTED, WORLD_MODEL))}."
        )
    return kinds[name]()


def load_value(
    folder: str | Path,
    language_model: LanguageModel,
    reward_model: RewardLike,
    encoder: Encoder | None = None,
) -> FittedValue | WorldModelValue:
    """Read a value model of any kind, for the models that it was fitted with.

    A world model, with the package's own features, is a value of any reward on counts.

    Raises:
        ValueModelError: The folder holds no value model, a damaged one, one of another format, or
            one of another reward or language model.

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

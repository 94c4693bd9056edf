"""The kinds of value models, by their names, and out of folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mbrl_text_env.agents.base import DEFAULT_PARAMS
from mbrl_text_env.agents.values.ensemble import EnsembleValue
from mbrl_text_env.agents.values.fitted import (
    FOLDER,
    FittedValue,
    Sources,
    check_lengths,
    cut_prefixes,
    samples_of,
    value_class,
)
from mbrl_text_env.agents.values.tokens import TokenEmbeddingValue
from mbrl_text_env.encoders import (
    Encoder,
    encode_texts,
    encoder_flops,
    encoder_flops_bound,
    multiplies_bfloat16,
    prefix_text,
)
from mbrl_text_env.fitting.heads import Head, LinePerLength, scaled_ridge
from mbrl_text_env.fitting.report import Samples
from mbrl_text_env.language_models.base import (
    FeatureModel,
    LanguageModel,
    SampleRequest,
    SamplingParams,
    Tokenizer,
    sample_requests,
    spawn_seed,
)
from mbrl_text_env.mdp import is_terminal, response_limit, transition
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, Scores, reward_usage_bound, score_responses
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

READY = ("prefix", "prefix-exact", "rollout")
"""Names of value models that predict at once."""

FITTED = ("calibrated", "embedding", "hidden-state", "stacked", "token-embedding", "ensemble")
"""Names of those that are fitted on records first; `calibrated` is `prefix-exact` after a fit."""

WORLD_MODEL = "world-model"
"""Name of the value that is fitted on records, scored or not, and takes any reward on counts."""

# Penalty on inputs of variance 1.
_ALPHA = 10.0
# Apart from the streams of an agent with the same seed: what it draws later is news.
_ROLLOUTS = 7


@dataclass(eq=False, repr=False)
class EmbeddingValue(FittedValue):
    """The article's quality predictor: ridge regression on the embedding of prompt and prefix.

    It is fitted on prefixes of scored responses, the first `prefix_ratio` of their words.

    Source: "Model Based Reinforcement Learning: Tutorial & Examples" (Patronus AI); its embedding
    (all-MiniLM-L6-v2), text format, alpha and prefix ratio are the defaults. Deviation: the
    standard deviation of a prediction, which the article does not have, is that of the errors on
    prompts left out in cross-validation, the same for every state.

    Args:
        encoder: Embeds texts; by default MiniLM.
        alpha: Strength of the ridge penalty.
        prefix_ratio: Share of a response's words that is kept, above 0 and up to 1.

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

    @property
    def coef_(self) -> FloatArray:
        """float64[d], fitted."""
        return np.asarray(self.head_.coef_)

    @property
    def intercept_(self) -> float:
        """What the embedding adds to."""
        return float(np.asarray(self.head_.intercept_).item())

    @property
    def std_(self) -> float:
        """Standard deviation of every prediction."""
        return float(self.spread_.stds[0])

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
        return encoder_flops(self._encoder(), self._texts(states))

    def flops_bound(self) -> float:
        """The most that one state takes."""
        return encoder_flops_bound(self._encoder())

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Tokenizer, encoder: Encoder | None = None) -> Self:
        """Read what `save` wrote; `load_value` reads every kind and checks what it belongs to."""
        with FOLDER.reading(folder) as (config, arrays):
            return cls.restored(config, arrays(), Sources(tokenizer, encoder=encoder))

    def _encoder(self) -> Any:
        if self.encoder is not None:
            return self.encoder
        from mbrl_text_env.language_models.registry import embedded_encoder

        return embedded_encoder()

    def _embedded(self, texts: Sequence[str]) -> FloatArray:
        return encode_texts(self._encoder(), texts).astype(np.float64)

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
        if not self.alphas or not min(self.alphas) > 0:
            raise ValueError(f"alphas: expected numbers above 0, got {self.alphas}.")

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

    It needs no records: without a fit, the mean is the prefix's score and the standard deviation 0.
    `fit` calibrates it, with a line from score to final score for each prefix length and the
    standard deviation of what that leaves; prefixes of different lengths can then be compared.
    Every call of it is a call of the reward model and is charged as one.

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

    @property
    def is_calibrated(self) -> bool:
        """Whether `fit` was called."""
        return hasattr(self, "head_")

    def inputs(self, states: Sequence[TextState], ledgers: Ledgers = None) -> FloatArray:
        """float64[B, 2]: the prefix's score and its length."""
        scores = self._scores(states, ledgers).total
        return np.column_stack([scores, [float(len(s.response_ids)) for s in states]])

    def heads(self) -> Mapping[str, Head]:
        """One: a line for each length."""
        return {"lines": LinePerLength()}

    def estimate(self, inputs: FloatArray, lengths: Sequence[int]) -> ValueEstimate:
        """The scores of the prefixes, calibrated where there was a fit."""
        if self.is_calibrated:
            return super().estimate(inputs, lengths)
        return ValueEstimate(inputs[:, 0], np.zeros(len(inputs)))


class PrefixStatistics(TransformerMixin, BaseEstimator):
    """From reward, parts, length, log-probability and whether that is known to a head's inputs.

    A prefix's reward and likelihood tell more the less is to come: each column is there a second
    time, multiplied with the share of the response that is written. Where the log-probability is
    not known, the mean a token (`logprob_`) is taken.
    """

    numbers = ("logprob_",)

    def __init__(self, max_tokens: float) -> None:
        self.max_tokens = max_tokens

    def fit(self, inputs: FloatArray, scores: FloatArray | None = None) -> PrefixStatistics:
        """Take the mean of the log-probabilities that are known."""
        length, total, known = inputs[:, -3:].T
        has = (known > 0) & (length > 0)
        self.logprob_ = np.asarray((total[has] / length[has]).mean() if has.any() else 0.0)
        return self

    def transform(self, inputs: FloatArray) -> FloatArray:
        """float64[B, k] for float64[B, 4 + parts]."""
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
    reward. A state without log-probability is given the mean.

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


@dataclass(eq=False, repr=False)
class RolloutValue(ValueModel):
    """The mean score of `n` continuations to the end, and the standard deviation of their scores.

    It needs no records, has no bias but that of the sampling parameters, and is expensive: n
    responses a state, charged to the language model and to the reward. A response that has ended is
    scored once.

    Args:
        n: Continuations of each state; of one alone the standard deviation is 0.

    Example:
        >>> from mbrl_text_env.language_models import NGramLM
        >>> from mbrl_text_env.types import initial
        >>> from mbrl_text_env.types import Prompt
        >>> lm = NGramLM("abc", seed=1)
        >>> reward = lambda prompt, response: float(response.count("a"))
        >>> value = RolloutValue(lm, reward, n=100, max_response_tokens=4)
        >>> bool(0 < value.predict([initial(Prompt.from_text("ab"), lm)]).mean[0] < 4)
        True
    """

    language_model: LanguageModel
    reward_model: Any
    _: KW_ONLY
    n: int = 4
    max_response_tokens: int = 256
    params: SamplingParams = DEFAULT_PARAMS
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(n=self.n, max_response_tokens=self.max_response_tokens)
        self.reward_model = as_reward_model(self.reward_model)

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        """Continue and score, uncharged; mean and standard deviation, each float64[B]."""
        return self.predict_with(states, None)

    def predict_with(self, states: Sequence[TextState], ledgers: Ledgers) -> ValueEstimate:
        """Continue and score, each state's continuations charged to its ledger."""
        rows = self._finished(states, ledgers)
        flat = [(i, state) for i, row in enumerate(rows) for state in row]
        scores = score_responses(
            self.reward_model,
            [state.prompt for _, state in flat],
            [self.language_model.decode(state.response_ids) for _, state in flat],
            ledgers=None if ledgers is None else [ledgers[i] for i, _ in flat],
        ).total
        parts = np.split(scores, np.cumsum([len(row) for row in rows])[:-1]) if rows else []
        stds = [part.std(ddof=1) if len(part) > 1 else 0.0 for part in parts]
        return ValueEstimate(np.asarray([part.mean() for part in parts], float), np.asarray(stds))

    def usage_bound(self, state: TextState) -> Usage:
        """The most that one state with as many tokens is charged."""
        room = self._room(state)
        reward = reward_usage_bound(self.reward_model)
        if room < 1:
            return reward
        prefix = len(state.prompt_ids) + len(state.response_ids)
        return self.language_model.usage_bound(prefix, [room] * self.n) + reward * self.n

    def expected_usage(self, state: TextState) -> Usage:
        """What is charged if no continuation stops before the limit, as many do not."""
        if not is_terminal(state):
            return self.usage_bound(state)
        return reward_usage_bound(self.reward_model)

    def _finished(self, states: Sequence[TextState], ledgers: Ledgers) -> list[list[TextState]]:
        """The continuations of each state; of one that has ended, itself."""
        rows = [[state] for state in states]
        open_ = [i for i, s in enumerate(states) if not is_terminal(s) and self._room(s) > 0]
        if not open_:
            return rows
        seed, rooms = spawn_seed(self.seed, _ROLLOUTS), {i: self._room(states[i]) for i in open_}
        drawn = sample_requests(
            self.language_model,
            [SampleRequest(states[i], self.n, rooms[i], seed, params=self.params) for i in open_],
            ledgers=None if ledgers is None else [ledgers[i] for i in open_],
        )
        for i, chunks in zip(open_, drawn, strict=True):
            limit = len(states[i].response_ids) + rooms[i]
            rows[i] = [transition(states[i], chunk, limit) for chunk in chunks]
        return rows

    def _room(self, state: TextState) -> int:
        limit = response_limit(state, self.language_model, self.max_response_tokens)
        return max(0, limit - len(state.response_ids))


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
        seed: Of rollouts and the bootstrap.

    Example:
        >>> value = make_value("stacked", lm, SentimentReward()).fit(records)  # doctest: +SKIP
    """
    lm, reward = language_model, as_reward_model(reward_model)
    faster = reward.reduced("bfloat16") if name == "prefix" and multiplies_bfloat16() else reward
    limit: dict[str, Any] = {"max_response_tokens": max_response_tokens}
    kinds: Mapping[str, Callable[[], ValueModel]] = {
        "prefix": lambda: PrefixRewardValue(faster, lm),
        "prefix-exact": lambda: PrefixRewardValue(reward, lm),
        "rollout": lambda: RolloutValue(lm, reward, seed=seed, **limit),
        "calibrated": lambda: PrefixRewardValue(reward, lm),
        "embedding": lambda: EmbeddingValue(lm, encoder),
        "hidden-state": lambda: HiddenStateValue(lm),
        "stacked": lambda: StackedValue(lm, reward, **limit),
        "token-embedding": lambda: TokenEmbeddingValue(lm),
        "ensemble": lambda: EnsembleValue(StackedValue(lm, reward, **limit), seed=seed),
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
        kind = value_class(config["kind"])
        value = kind.restored(config, arrays(), Sources(language_model, reward_model, encoder))
    check_value_fits(value, language_model, reward_model)
    return value

"""The value model that sees everything that is cheap: reward of the prefix, position, likelihood.

And, where it pays, an embedding of prompt and prefix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mbrl_text_env.agents.values.embedding import embed, encoder_of, prefix_texts
from mbrl_text_env.agents.values.fitted import FittedValue, Sources
from mbrl_text_env.agents.values.heads import (
    Arrays,
    BoostedHead,
    LinearHead,
    arrays_of,
    fit_boosting,
    fit_ridge,
    from_arrays,
)
from mbrl_text_env.agents.values.prefix_reward import prefix_reward_usage, score_prefixes
from mbrl_text_env.agents.values.prefixes import (
    LENGTHS,
    Samples,
    check_lengths,
    cut_prefixes,
    samples_of,
)
from mbrl_text_env.agents.values.validation import Fitter, held_out
from mbrl_text_env.encoders import Encoder, encoder_flops, encoder_flops_bound
from mbrl_text_env.language_models.base import Tokenizer
from mbrl_text_env.ledger import Ledger, Usage
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, Scores, reward_usage_bound
from mbrl_text_env.types import FloatArray, TextState
from mbrl_text_env.values import ValueModelError

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

LevelOne = Literal["auto", "ridge", "boosting"]
"""What the second level of a `StackedValue` is."""

# Inputs besides the parts of the reward and the embedding: reward, length, log-probability, and
# whether that is known.
_PLAIN = 4
# Penalty of the second level, on inputs of variance 1.
_ALPHA = 10.0


@dataclass(frozen=True)
class StackedHead:
    """Two levels: the embedding's own prediction is one input of the second.

    Args:
        second: Predicts from `features`.
        first: Predicts from the embedding; None without one.
        num_parts: Parts of the reward among the inputs.
        max_tokens: Tokens of a whole response, what positions are shares of.
        logprob: Log-probability a token (nats) that is taken where it is not known.
    """

    second: LinearHead | BoostedHead
    first: LinearHead | None
    num_parts: int
    max_tokens: float
    logprob: float

    def predict(self, inputs: FloatArray) -> FloatArray:
        """float64[B] for float64[B, d]."""
        guess = None
        if self.first is not None:
            guess = self.first.predict(inputs[:, _PLAIN + self.num_parts :])
        return self.second.predict(self.features(inputs, guess))

    def features(self, inputs: FloatArray, guess: FloatArray | None) -> FloatArray:
        """float64[B, k]: what the second level sees.

        A prefix's reward tells more the less is to come, and so does everything else: each column
        is there a second time, multiplied with the share of the response that is written.
        """
        rewards = inputs[:, : 1 + self.num_parts]
        length, total, known = inputs[:, 1 + self.num_parts : _PLAIN + self.num_parts].T
        share = np.minimum(length / self.max_tokens, 1.0)
        total = np.where(known > 0, total, self.logprob * length)
        per_token = np.where(length > 0, total / np.maximum(length, 1.0), self.logprob)
        columns = [*rewards.T, per_token, *([] if guess is None else [guess])]
        return np.column_stack([*columns, *(c * share for c in columns), share, total])


def fit_stacked(
    samples: Samples,
    second: Callable[[Samples], LinearHead | BoostedHead],
    *,
    alpha: float,
    num_parts: int,
    max_tokens: float,
) -> StackedHead:
    """Fit both levels; the second on what the first says of prompts that it has not seen.

    Source: Wolpert, "Stacked generalization", 1992. The parts of the data are made of whole
    prompts.
    """
    start = _PLAIN + num_parts
    length, total, known = samples.inputs[:, start - 3 : start].T
    has = (known > 0) & (length > 0)
    logprob = float((total[has] / length[has]).mean()) if has.any() else 0.0
    first, guess = None, None
    if samples.inputs.shape[1] > start:
        fit_first = functools.partial(fit_ridge, alpha=alpha)
        embedded = samples.columns(slice(start, None))
        first, unseen = fit_first(embedded), held_out(fit_first, embedded)
        # Of one prompt alone, nothing is known of how the first level does on others.
        guess = np.full(len(samples), samples.scores.mean()) if unseen is None else unseen.mean
    blank = StackedHead(LinearHead(np.zeros(0), np.zeros(1)), first, num_parts, max_tokens, logprob)
    features = blank.features(samples.inputs, guess)
    level = second(Samples(features, samples.scores, samples.lengths, samples.groups))
    return StackedHead(level, first, num_parts, max_tokens, logprob)


class StackedValue(FittedValue):
    """Stacks the prefix's reward, its parts, position, log-probability and, if asked, an embedding.

    Two levels: ridge regression on the embedding of prompt and prefix (MiniLM), of which the
    second level sees the prediction; and ridge regression or gradient boosting, whichever ranks
    better on prompts left out. Without the embedding there is only the second level, and a
    prediction takes one reward call and nothing else. A response that has ended is worth its
    reward. A state without log-probability is given the mean.

    Args:
        tokenizer: Decodes states; a language model will do.
        reward_model: Scores the prefixes; one call each, charged.
        encoder: Embeds texts; None for MiniLM.
        use_embedding: Whether there is a first level; an encoder call for each prefix.
        level_1: The second level, `"ridge"` or `"boosting"`; `"auto"` takes the better one.
        alpha: Penalty of the ridge regression on the embedding.
        lengths: Prefix lengths in tokens that it is fitted on.
        max_response_tokens: Tokens of a whole response, what positions are shares of; None for the
            longest response of the records.
        seed: Of the boosted trees.

    Attributes:
        part_names_: Parts of the reward that it sees: those that all records have.
        max_tokens_: See `max_response_tokens`.
        chosen_: The level_1 that was taken.
        report_: `FitReport` of the fit.

    Raises:
        ValueError: A number is out of range, or `level_1` is something else.

    Example:
        >>> value = StackedValue(lm, SentimentReward()).fit(records)  # doctest: +SKIP
        >>> value.report_.within_prompt  # doctest: +SKIP
        0.72
        >>> value.save("value")  # doctest: +SKIP
        >>> load_value("value", lm, SentimentReward())  # doctest: +SKIP
    """

    kind = "stacked"

    def __init__(
        self,
        tokenizer: Tokenizer,
        reward_model: RewardLike,
        encoder: Encoder | None = None,
        *,
        use_embedding: bool = False,
        level_1: LevelOne = "auto",
        alpha: float = 1.0,
        lengths: Sequence[int] = LENGTHS,
        max_response_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        if level_1 not in get_args(LevelOne):
            raise ValueError(f"level_1: expected one of {get_args(LevelOne)}, got {level_1!r}.")
        if not alpha > 0 or (max_response_tokens is not None and max_response_tokens < 1):
            raise ValueError(
                "Expected alpha above 0 and max_response_tokens of at least 1 or None, got "
                f"{alpha} and {max_response_tokens}."
            )
        check_lengths(lengths)
        self.tokenizer = tokenizer
        self.reward_model = as_reward_model(reward_model)
        self.encoder = encoder
        self.use_embedding = use_embedding
        self.level_1: LevelOne = level_1
        self.alpha = alpha
        self.lengths = tuple(lengths)
        self.max_response_tokens = max_response_tokens
        self.seed = seed

    def inputs(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger] | None = None
    ) -> FloatArray:
        """float64[B, 4 + parts + d]: reward, parts, length, log-probability, known, embedding."""
        scores = score_prefixes(self.reward_model, self.tokenizer, states, ledgers)
        return self._columns(states, scores)

    def samples(self, records: Sequence[Record]) -> Samples:
        """Prefixes of many lengths."""
        states, owners = cut_prefixes(records, self.lengths)
        scores = score_prefixes(self.reward_model, self.tokenizer, states, None)
        common = set.intersection(*(set(record.rewards) for record in records))
        self.part_names_ = [n for n in scores.parts if n in common - {records[0].reward_name}]
        longest = max(len(record.response_ids) for record in records)
        self.max_tokens_ = float(self.max_response_tokens or longest)
        inputs = self._columns(states, scores)
        return samples_of(inputs, owners, [len(state.response_ids) for state in states])

    def fitters(self, samples: Samples) -> Mapping[str, Fitter]:
        """Two levels, with either kind of the second."""
        seconds: dict[str, Callable[[Samples], LinearHead | BoostedHead]] = {
            "ridge": functools.partial(fit_ridge, alpha=_ALPHA, standardise=True),
            "boosting": functools.partial(fit_boosting, seed=self.seed),
        }
        return {
            name: functools.partial(
                fit_stacked,
                second=second,
                alpha=self.alpha,
                num_parts=len(self.part_names_),
                max_tokens=self.max_tokens_,
            )
            for name, second in seconds.items()
            if self.level_1 in ("auto", name)
        }

    def final_scores(self, inputs: FloatArray) -> FloatArray:
        """The rewards of the texts as they are."""
        return inputs[:, 0]

    def usage_bound(self, state: TextState) -> Usage:
        """The most that scoring one prefix is charged."""
        return reward_usage_bound(self.reward_model)

    def expected_usage(self, state: TextState) -> Usage:
        """What scoring this prefix is charged."""
        return prefix_reward_usage(self.reward_model, self.tokenizer, state)

    def flops(self, states: Sequence[TextState]) -> FloatArray:
        """float64[B]: what embedding the states takes; 0 without the embedding."""
        if not self.use_embedding:
            return np.zeros(len(states))
        return encoder_flops(encoder_of(self.encoder), prefix_texts(self.tokenizer, states))

    def flops_bound(self) -> float:
        """The most that one state takes."""
        return encoder_flops_bound(encoder_of(self.encoder)) if self.use_embedding else 0.0

    def settings(self) -> dict[str, Any]:
        """Constructor arguments, and what the fit found besides the heads."""
        return {
            "use_embedding": self.use_embedding,
            "level_1": self.level_1,
            "alpha": self.alpha,
            "lengths": list(self.lengths),
            "max_response_tokens": self.max_response_tokens,
            "seed": self.seed,
            "part_names": self.part_names_,
            "max_tokens": self.max_tokens_,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], sources: Sources) -> StackedValue:
        """See `FittedValue.from_settings`."""
        options = dict(settings)
        names, tokens = options.pop("part_names"), options.pop("max_tokens")
        value = cls(sources.tokenizer, sources.reward(), sources.encoder, **options)
        value.part_names_, value.max_tokens_ = list(names), float(tokens)
        return value

    def head_arrays(self, head: StackedHead) -> Arrays:
        """Both levels and the number between them, as arrays by name."""
        kind = "trees" if isinstance(head.second, BoostedHead) else "linear"
        arrays = {**arrays_of(head.second, kind), "logprob": np.asarray([head.logprob])}
        return arrays if head.first is None else {**arrays, **arrays_of(head.first, "embedding")}

    def read_head(self, arrays: Arrays) -> StackedHead:
        """Read `head_arrays`."""
        second: LinearHead | BoostedHead
        if "trees.roots" in arrays:
            second = from_arrays(BoostedHead, arrays, "trees")
        else:
            second = from_arrays(LinearHead, arrays, "linear")
        first = from_arrays(LinearHead, arrays, "embedding") if self.use_embedding else None
        logprob = float(arrays["logprob"][0])
        return StackedHead(second, first, len(self.part_names_), self.max_tokens_, logprob)

    def _columns(self, states: Sequence[TextState], scores: Scores) -> FloatArray:
        missing = [name for name in self.part_names_ if name not in scores.parts]
        if missing:
            raise ValueModelError(
                f"StackedValue was fitted with the reward's parts {self.part_names_}, but for "
                f"prompt {states[0].prompt.id!r} the reward gave {sorted(scores.parts)}. Predict "
                "with the reward that it was fitted with, or fit it anew."
            )
        known = np.asarray([_has_logprob(state) for state in states], dtype=np.float64)
        plain = [
            scores.total,
            *(scores.parts[name] for name in self.part_names_),
            np.asarray([float(len(state.response_ids)) for state in states]),
            np.asarray([s.logprob if _has_logprob(s) else 0.0 for s in states], dtype=np.float64),
            known,
        ]
        if not self.use_embedding:
            return np.column_stack(plain)
        return np.column_stack([*plain, embed(self.encoder, prefix_texts(self.tokenizer, states))])


def _has_logprob(state: TextState) -> bool:
    return state.logprob is not None and bool(np.isfinite(state.logprob))

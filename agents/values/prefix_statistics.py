"""The value model that sees what is cheap: reward of the prefix, position, and likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mbrl_text_env.agents.values.prefix_reward import PrefixScoredValue
from mbrl_text_env.agents.values.training_prefixes import cut_prefixes, samples_of
from mbrl_text_env.fitting.heads import Head
from mbrl_text_env.fitting.samples import Samples
from mbrl_text_env.language_models.base import Tokenizer
from mbrl_text_env.rewards.base import RewardLike, Scores
from mbrl_text_env.types import FloatArray, Ledger, TextState
from mbrl_text_env.values import LENGTHS, ValueModelError

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

# Penalty on inputs of variance 1.
_ALPHA = 10.0


class PrefixStatistics(TransformerMixin, BaseEstimator):
    """From reward, parts, length, log-probability and whether that is known to a head's inputs.

    A prefix's reward tells more the less is to come, and so does its likelihood: each column is
    there a second time, multiplied with the share of the response that is written.

    Args:
        max_tokens: Tokens of a whole response, what positions are shares of.

    Attributes:
        logprob_: Log-probability a token (nats) that is taken where it is not known: the mean.
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


class StackedValue(PrefixScoredValue):
    """Ridge regression on the prefix's reward, its parts, position and log-probability.

    A prediction takes one reward call and nothing else. A response that has ended is worth its
    reward. A state without log-probability is given the mean.

    Args:
        tokenizer: Decodes states; a language model will do.
        reward_model: Scores the prefixes; one call each, charged.
        lengths: Prefix lengths in tokens that it is fitted on.
        max_response_tokens: Tokens of a whole response, what positions are shares of; None for the
            longest response of the records.

    Attributes:
        part_names_: Parts of the reward that it sees: those that all records have.
        max_tokens_: See `max_response_tokens`.
        report_: `FitReport` of the fit.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> value = StackedValue(lm, SentimentReward()).fit(records)  # doctest: +SKIP
        >>> value.report_.within_prompt  # doctest: +SKIP
        0.72
        >>> value.save("value")  # doctest: +SKIP
        >>> load_value("value", lm, SentimentReward())  # doctest: +SKIP
    """

    kind = "stacked"
    fitted_settings = ("part_names_", "max_tokens_")

    def __init__(
        self,
        tokenizer: Tokenizer,
        reward_model: RewardLike,
        *,
        lengths: Sequence[int] = LENGTHS,
        max_response_tokens: int | None = None,
    ) -> None:
        if max_response_tokens is not None and max_response_tokens < 1:
            raise ValueError(
                f"Expected max_response_tokens of at least 1 or None, got {max_response_tokens}."
            )
        super().__init__(reward_model, tokenizer, lengths)
        self.max_response_tokens = max_response_tokens

    def inputs(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger] | None = None
    ) -> FloatArray:
        """float64[B, 4 + parts]: reward, parts, length, log-probability, and whether it is known.

        Raises:
            ValueModelError: The reward has other parts than that of the fit.
        """
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
        likelihoods = np.asarray(
            [np.nan if state.logprob is None else state.logprob for state in states], np.float64
        )
        known = np.isfinite(likelihoods)
        return np.column_stack(
            [
                *(scores.total, *(scores.parts[name] for name in self.part_names_)),
                np.asarray([float(len(state.response_ids)) for state in states]),
                *(np.where(known, likelihoods, 0.0), known),
            ]
        )

"""The reward model on the prefix: what a partial response would score if it ended here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mbrl_text_env.agents.values.fitted import FittedValue
from mbrl_text_env.agents.values.training_prefixes import check_lengths, cut_samples
from mbrl_text_env.fitting.heads import Head, LinePerLength
from mbrl_text_env.fitting.samples import Samples
from mbrl_text_env.language_models.base import Tokenizer
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import (
    RewardLike,
    Scores,
    reward_usage_bound,
    score_responses,
)
from mbrl_text_env.types import FloatArray, Ledger, TextState, Usage
from mbrl_text_env.values import LENGTHS, ValueEstimate

if TYPE_CHECKING:
    from mbrl_text_env.records import Record


class PrefixScoredValue(FittedValue):
    """A value model that asks the reward model for the score of the prefix: its first input.

    Args:
        reward_model: Scores the prefixes; one call each, charged.
        tokenizer: Decodes them; a language model will do.
        lengths: Prefix lengths in tokens that it is fitted on.
    """

    def __init__(
        self, reward_model: RewardLike, tokenizer: Tokenizer, lengths: Sequence[int]
    ) -> None:
        check_lengths(lengths)
        self.reward_model = as_reward_model(reward_model)
        self.tokenizer = tokenizer
        self.lengths = tuple(lengths)

    def samples(self, records: Sequence[Record]) -> Samples:
        """Prefixes of many lengths."""
        return cut_samples(self, records)

    def final_scores(self, inputs: FloatArray) -> FloatArray:
        """The rewards of the texts as they are."""
        return inputs[:, 0]

    def usage_bound(self, state: TextState) -> Usage:
        """The most that one prefix is charged."""
        return reward_usage_bound(self.reward_model)

    def expected_usage(self, state: TextState) -> Usage:
        """What this prefix is charged."""
        text = self.tokenizer.decode(state.response_ids)
        return self.reward_model.usage(state.prompt, text)

    def _scores(self, states: Sequence[TextState], ledgers: Sequence[Ledger] | None) -> Scores:
        return score_responses(
            self.reward_model,
            [state.prompt for state in states],
            [self.tokenizer.decode(state.response_ids) for state in states],
            ledgers=ledgers,
        )


class PrefixRewardValue(PrefixScoredValue):
    """The reward model's score of the prefix's text, as it is or calibrated on records.

    It needs no records: without a fit, the mean is the prefix's score and the standard deviation 0.
    `fit` calibrates it, with a line from score to final score for each prefix length and the
    standard deviation of what that leaves; prefixes of different lengths can then be compared.
    Every call of it is a call of the reward model and is charged as one.

    Args:
        reward_model: Scores the prefixes.
        tokenizer: Decodes them; a language model will do.
        lengths: Prefix lengths in tokens that it is calibrated on.

    Raises:
        ValueError: `lengths` are not positive and increasing.

    Example:
        >>> from mbrl_text_env.language_models import NGramLM
        >>> from mbrl_text_env.types import initial
        >>> from mbrl_text_env.rewards import as_reward_model
        >>> from mbrl_text_env.types import Prompt
        >>> lm = NGramLM("abc")
        >>> value = PrefixRewardValue(as_reward_model(lambda p, r: float(len(r))), lm)
        >>> value.predict([initial(Prompt.from_text("ab"), lm)]).mean
        array([0.])
    """

    kind = "prefix_reward"

    def __init__(
        self,
        reward_model: RewardLike,
        tokenizer: Tokenizer,
        *,
        lengths: Sequence[int] = LENGTHS,
    ) -> None:
        super().__init__(reward_model, tokenizer, lengths)

    @property
    def is_fitted(self) -> bool:
        """Always: the score of the prefix needs no records."""
        return True

    @property
    def is_calibrated(self) -> bool:
        """Whether `fit` was called."""
        return hasattr(self, "head_")

    def inputs(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger] | None = None
    ) -> FloatArray:
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

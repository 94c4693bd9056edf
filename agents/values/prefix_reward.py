"""The reward model on the prefix: what a partial response would score if it ended here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mbrl_text_env.language_models.base import Tokenizer
from mbrl_text_env.ledger import Ledger, Usage
from mbrl_text_env.rewards.base import RewardModel, reward_usage_bound, score_responses
from mbrl_text_env.types import TextState
from mbrl_text_env.values import ValueEstimate


class PrefixRewardValue:
    """The reward model's score of the prefix's text, with standard deviation 0.

    It needs no records. Every call of it is a call of the reward model and is charged as one.

    Args:
        reward_model: Scores the prefixes.
        tokenizer: Decodes them; a language model will do.

    Example:
        >>> from mbrl_text_env.language_models import NGramLM
        >>> from mbrl_text_env.mdp import initial
        >>> from mbrl_text_env.rewards import as_reward_model
        >>> from mbrl_text_env.types import Prompt
        >>> lm = NGramLM("abc")
        >>> value = PrefixRewardValue(as_reward_model(lambda p, r: float(len(r))), lm)
        >>> value.predict([initial(Prompt.from_text("ab"), lm)]).mean
        array([0.])
    """

    is_fitted = True

    def __init__(self, reward_model: RewardModel, tokenizer: Tokenizer) -> None:
        self.reward_model = reward_model
        self.tokenizer = tokenizer

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        """Score the prefixes, uncharged."""
        return self.predict_with(states, None)

    def predict_with(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger] | None
    ) -> ValueEstimate:
        """Score the prefixes, each charged to its ledger."""
        scores = score_responses(
            self.reward_model,
            [state.prompt for state in states],
            [self.tokenizer.decode(state.response_ids) for state in states],
            ledgers=ledgers,
        )
        return ValueEstimate(np.asarray(scores.total, dtype=np.float64), np.zeros(len(states)))

    def usage_bound(self, state: TextState) -> Usage:
        """The most that one prefix is charged."""
        return reward_usage_bound(self.reward_model)

    def expected_usage(self, state: TextState) -> Usage:
        """About what this prefix is charged."""
        flops = getattr(self.reward_model, "flops", None)
        if flops is None:
            return Usage(reward_calls=1)
        text = self.tokenizer.decode(state.response_ids)
        return Usage(reward_calls=1, reward_flops=float(flops([state.prompt], [text])[0]))

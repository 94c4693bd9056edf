"""A value model that finishes the response a few times and looks at what comes out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mbrl_text_env.agents.base import DEFAULT_PARAMS, check_positive
from mbrl_text_env.language_models.base import (
    LanguageModel,
    SampleRequest,
    SamplingParams,
    sample_requests,
    spawn_seed,
)
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, reward_usage_bound, score_responses
from mbrl_text_env.types import Ledger, TextState, Usage, is_terminal, response_limit, transition
from mbrl_text_env.values import ValueEstimate, ValueModel

# Apart from the streams of an agent with the same seed: what it draws later is news.
_ROLLOUTS = 7


class RolloutValue(ValueModel):
    """The mean score of `n` continuations to the end, and the standard deviation of their scores.

    It needs no records, has no bias but that of the sampling parameters, and is expensive: n
    responses a state, charged to the language model and to the reward. A response that has ended is
    scored once.

    Args:
        language_model: Continues.
        reward_model: Scores the complete responses.
        n: Continuations of each state. Of one alone the standard deviation is 0, for it says
            nothing of it.
        max_response_tokens: Token limit of a response.
        params: How the continuations are drawn.
        seed: They follow from it and the state.

    Raises:
        ValueError: A number is below 1.

    Example:
        >>> from mbrl_text_env.language_models import NGramLM
        >>> from mbrl_text_env.types import initial
        >>> from mbrl_text_env.rewards import as_reward_model
        >>> from mbrl_text_env.types import Prompt
        >>> lm = NGramLM("abc", seed=1)
        >>> reward = as_reward_model(lambda prompt, response: float(response.count("a")))
        >>> value = RolloutValue(lm, reward, n=100, max_response_tokens=4)
        >>> estimate = value.predict([initial(Prompt.from_text("ab"), lm)])
        >>> bool(0 < estimate.mean[0] < 4)
        True
    """

    def __init__(
        self,
        language_model: LanguageModel,
        reward_model: RewardLike,
        *,
        n: int = 4,
        max_response_tokens: int = 256,
        params: SamplingParams = DEFAULT_PARAMS,
        seed: int = 0,
    ) -> None:
        check_positive(n=n, max_response_tokens=max_response_tokens)
        self.language_model = language_model
        self.reward_model = as_reward_model(reward_model)
        self.n = n
        self.max_response_tokens = max_response_tokens
        self.params = params
        self.seed = seed

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        """Continue and score, uncharged; mean and standard deviation, each float64[B]."""
        return self.predict_with(states, None)

    def predict_with(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger] | None
    ) -> ValueEstimate:
        """Continue and score, each state's continuations charged to its ledger."""
        rows = self._finished(states, ledgers)
        flat = [(i, state) for i, row in enumerate(rows) for state in row]
        scores = score_responses(
            self.reward_model,
            [state.prompt for _, state in flat],
            [self.language_model.decode(state.response_ids) for _, state in flat],
            ledgers=None if ledgers is None else [ledgers[i] for i, _ in flat],
        ).total
        ends = np.cumsum([len(row) for row in rows])[:-1]
        parts = np.split(scores, ends) if rows else []
        return ValueEstimate(
            np.asarray([part.mean() for part in parts], dtype=np.float64),
            np.asarray([part.std(ddof=1) if len(part) > 1 else 0.0 for part in parts]),
        )

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

    def _finished(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger] | None
    ) -> list[list[TextState]]:
        """The continuations of each state; of one that has ended, itself."""
        rows = [[state] for state in states]
        open_ = [i for i, s in enumerate(states) if not is_terminal(s) and self._room(s) > 0]
        if not open_:
            return rows
        drawn = sample_requests(
            self.language_model,
            [
                SampleRequest(
                    states[i],
                    self.n,
                    self._room(states[i]),
                    spawn_seed(self.seed, _ROLLOUTS),
                    params=self.params,
                )
                for i in open_
            ],
            ledgers=None if ledgers is None else [ledgers[i] for i in open_],
        )
        for i, chunks in zip(open_, drawn, strict=True):
            limit = len(states[i].response_ids) + self._room(states[i])
            rows[i] = [transition(states[i], chunk, limit) for chunk in chunks]
        return rows

    def _room(self, state: TextState) -> int:
        limit = response_limit(state, self.language_model, self.max_response_tokens)
        return max(0, limit - len(state.response_ids))

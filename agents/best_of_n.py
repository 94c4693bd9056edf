"""Best-of-N: sample N complete responses and keep the one that the reward model likes most."""

from __future__ import annotations

from collections.abc import Sequence

from agents.base import (
    DEFAULT_PARAMS,
    Agent,
    Completion,
    affordable,
    best,
    check_positive,
    is_binding,
)
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams
from mbrl_text_env.ledger import Ledger, Usage
from mbrl_text_env.rewards.base import RewardModel, reward_usage_bound
from mbrl_text_env.types import TextState

# The article's number.
_N_WITHOUT_BUDGET = 4
# A cap on seconds is looked at between waves.
_MOST_A_WAVE = 16


class BestOfN(Agent):
    """Sample responses until there are N or the budget allows no more; keep the best.

    A response is only begun if it could be finished and scored at its longest. What short responses
    leave over is spent on more of them. Sample k of a prompt is the same whatever N is, so a larger
    budget never gives a lower score.

    Args:
        language_model: Proposes responses.
        reward_model: Scores them.
        n: N; None takes as many as the budget allows, or 4 (the article's number) without one.
        max_response_tokens: Token limit of a response.
        chunk_tokens: Most tokens of the chunk that `act` returns.
        params: How tokens are drawn; by default temperature 0.7, as in the article.

    Raises:
        ValueError: N or a limit is below 1.
    """

    name = "best-of-n"

    def __init__(
        self,
        language_model: LanguageModel,
        reward_model: RewardModel,
        *,
        n: int | None = None,
        max_response_tokens: int = 256,
        chunk_tokens: int = 16,
        params: SamplingParams = DEFAULT_PARAMS,
    ) -> None:
        super().__init__(
            language_model,
            reward_model,
            max_response_tokens=max_response_tokens,
            chunk_tokens=chunk_tokens,
            params=params,
        )
        if n is not None:
            check_positive(n=n)
        self.n = n

    def search(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger], seed: int
    ) -> list[Completion]:
        """Sample in waves, each as large as the budget allows for certain."""
        found: list[list[Completion]] = [[] for _ in states]
        while True:
            counts = [
                self._next_count(state, ledger, len(row))
                for state, ledger, row in zip(states, ledgers, found, strict=True)
            ]
            if not any(counts):
                return [best(row) for row in found]
            self._extend(found, states, ledgers, counts, seed)

    def _extend(
        self,
        found: list[list[Completion]],
        states: Sequence[TextState],
        ledgers: Sequence[Ledger],
        counts: Sequence[int],
        seed: int,
    ) -> None:
        wave: list[list[Completion]] = [[] for _ in states]
        # Number and index of the samples are one number a call, so equal ones go together.
        for count, first in sorted({(c, len(row)) for c, row in zip(counts, found, strict=True)}):
            if count:
                chosen = [i for i, c in enumerate(counts) if (c, len(found[i])) == (count, first)]
                drawn = self.complete(
                    [states[i] for i in chosen],
                    count,
                    [ledgers[i] for i in chosen],
                    seed,
                    first_sample=first,
                )
                for i, row in zip(chosen, drawn, strict=True):
                    wave[i] = row
        for i, row in enumerate(self.scored(wave, ledgers)):
            found[i].extend(row)

    def _next_count(self, state: TextState, ledger: Ledger, have: int) -> int:
        wanted = self.n
        if wanted is None and not is_binding(ledger.budget, self.samples_usage(state, 1)):
            wanted = _N_WITHOUT_BUDGET
        left = _MOST_A_WAVE if wanted is None else min(wanted - have, _MOST_A_WAVE)
        return affordable(ledger, lambda count: self.samples_usage(state, count), left)

    def samples_usage(self, state: TextState, count: int) -> Usage:
        """The most that `count` scored samples from `state` are charged."""
        prefix = len(state.prompt_ids) + len(state.response_ids)
        usage = self.language_model.usage(prefix, [self._room(state)] * count)
        return usage + reward_usage_bound(self.reward_model) * count

    def response_usage(self, state: TextState) -> Usage:
        """The most that one scored response from `state` is charged."""
        return self.samples_usage(state, 1)

"""Choices among the chunks that the candidate view offers: which are looked at, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mbrl_text_env.mdp import is_terminal, transition
from mbrl_text_env.rewards.base import reward_usage_bound
from mbrl_text_env.types import Budget, BudgetError, Chunk, Ledger, TextState, Usage

if TYPE_CHECKING:
    from mbrl_text_env.agents.base import Agent, Completion


@dataclass(frozen=True)
class Choice:
    """Which of several chunks to append, and what the choice cost.

    `completions` holds the complete response found behind each chunk; None where none was looked
    for, because the budget did not allow it or the agent does not need it.
    """

    index: int
    completions: tuple[Completion | None, ...]
    usage: Usage


class ChoicePlan:
    """One decision of `Agent.choose`."""

    def __init__(
        self, agent: Agent, state: TextState, candidates: Sequence[Chunk], budget: Budget | None
    ) -> None:
        if is_terminal(state) or not candidates:
            raise ValueError(
                f"choose, prompt {state.prompt.id!r}: expected a state that has not ended and at "
                f"least one candidate, got finish_reason {state.finish_reason!r} and "
                f"{len(candidates)} candidates."
            )
        self.agent, self.ledger = agent, Ledger(budget)
        limit = agent.response_limit(state)
        self.after = [transition(state, chunk, limit) for chunk in candidates]
        # Equal candidates are looked at once.
        self.first = [self.after.index(after) for after in self.after]
        means = [chunk.logprob / len(chunk) if chunk.logprobs else 0.0 for chunk in candidates]
        self.likely_first = sorted(sorted(set(self.first)), key=means.__getitem__, reverse=True)
        self.found: dict[int, Completion] = {}

    async def score_ended(self) -> None:
        """Score the candidates that end the response, as many as the budget allows."""
        bound = reward_usage_bound(self.agent.reward_model)
        ended: list[int] = []
        for i in self.likely_first:
            if is_terminal(self.after[i]) and self.ledger.affords(bound * (len(ended) + 1)):
                ended.append(i)
        # A state that has ended is its own completion.
        drawn = [await self.agent.complete(self.after[i], 1, self.ledger, 0) for i in ended]
        scored = await self.agent.scored([each for [each] in drawn], self.ledger)
        self.found.update(zip(ended, scored, strict=True))

    def shares(self) -> dict[int, Ledger]:
        """An equal share of what is left for each candidate whose response can be finished."""
        going = [i for i in self.likely_first if not is_terminal(self.after[i])]
        left = self.ledger.budget.after(self.ledger.usage)
        while going and left is not None:
            share = left.shared(len(going))
            if share is not None and all(
                Ledger(share).affords(self.agent.response_usage(self.after[i])) for i in going
            ):
                return {i: Ledger(share) for i in sorted(going)}
            going.pop()
        if not self.found:
            raise BudgetError(
                f"{self.ledger.budget} is too small for one response behind any of the "
                f"{len(self.after)} candidates of prompt {self.after[0].prompt.id!r}. Raise the "
                "budget or lower max_response_tokens."
            )
        return {}

    def choice(self) -> Choice:
        """The candidate with the best response behind it."""
        index = max(sorted(self.found), key=lambda i: self.found[i].known_score)
        return Choice(index, tuple(self.found.get(i) for i in self.first), self.ledger.usage)

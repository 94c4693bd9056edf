"""Agents that do not search: the language model's own answer, and random tokens."""

from __future__ import annotations

from collections.abc import Sequence

from mbrl_text_env.agents.base import Agent, Choice, Completion
from mbrl_text_env.language_models.base import stream
from mbrl_text_env.ledger import Budget, Ledger, Usage
from mbrl_text_env.mdp import ChunkRules, transition
from mbrl_text_env.types import Chunk, TextState


class Sampling(Agent):
    """One response from the language model: the baseline that every search has to beat.

    `params=SamplingParams(temperature=0)` is greedy decoding. The arguments are those of `Agent`;
    no reward model is needed.
    """

    name = "sampling"

    def search(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger], seed: int
    ) -> list[Completion]:
        """Sample once from each state."""
        return [row[0] for row in self.complete(states, 1, ledgers, seed)]

    def choose(
        self,
        states: Sequence[TextState],
        candidates: Sequence[Sequence[Chunk]],
        budget: Budget | None = None,
        *,
        seed: int = 0,
    ) -> list[Choice]:
        """Choose the first candidate, which is a sample from the language model like the others."""
        return [Choice(0, (None,) * len(row), Usage()) for row in candidates]


class RandomAgent(Agent):
    """Random tokens, uniform over the vocabulary: the least that any agent can do.

    It asks neither the language model for tokens nor the reward model for scores, so it spends
    nothing. The arguments are those of `Agent`.
    """

    name = "random"

    def search(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger], seed: int
    ) -> list[Completion]:
        """Draw tokens from each state until a stop token or the limit."""
        return [self._random(state, seed) for state in states]

    def choose(
        self,
        states: Sequence[TextState],
        candidates: Sequence[Sequence[Chunk]],
        budget: Budget | None = None,
        *,
        seed: int = 0,
    ) -> list[Choice]:
        """Choose each candidate with the same probability."""
        indices = [
            int(stream(seed, state, 0).integers(len(row)))
            for state, row in zip(states, candidates, strict=True)
        ]
        return [
            Choice(index, (None,) * len(row), Usage())
            for index, row in zip(indices, candidates, strict=True)
        ]

    def _random(self, state: TextState, seed: int) -> Completion:
        lm = self.language_model
        room = self._room(state)
        ids = stream(seed, state, 0).integers(lm.vocab_size, size=room).tolist()
        for length, token in enumerate(ids, start=1):
            if token in lm.stop_token_ids:
                ids = ids[:length]
                break
        chunk = ChunkRules(lm.vocab_size, lm.stop_token_ids, room).chunk(ids)
        return Completion(transition(state, chunk, self._limit(state)))

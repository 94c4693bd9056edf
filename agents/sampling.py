"""Agents that do not search: the language model's own answer, and random tokens."""

from __future__ import annotations

from collections.abc import Sequence

from mbrl_text_env.agents.base import Agent, Choice, Completion
from mbrl_text_env.language_models.base import stream
from mbrl_text_env.types import Budget, Chunk, ChunkRules, Ledger, TextState, Usage, transition


class Sampling(Agent):
    """One response from the language model: the baseline that every search has to beat.

    `params=SamplingParams(temperature=0)` is greedy decoding. The arguments are those of `Agent`;
    no reward model is needed.
    """

    name = "sampling"

    async def search(self, state: TextState, ledger: Ledger, seed: int) -> Completion:
        """Sample once."""
        [completion] = await self.complete(state, 1, ledger, seed)
        return completion

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

    async def search(self, state: TextState, ledger: Ledger, seed: int) -> Completion:
        """Draw tokens until a stop token or the limit."""
        lm, room = self.language_model, self._room(state)
        ids = stream(seed, state, 0).integers(lm.vocab_size, size=room).tolist()
        ended = [length for length, token in enumerate(ids, 1) if token in lm.stop_token_ids]
        ids = ids[: min(ended, default=room)]
        chunk = ChunkRules(lm.vocab_size, lm.stop_token_ids, room).chunk(ids)
        return Completion(transition(state, chunk, self._limit(state)))

    def choose(
        self,
        states: Sequence[TextState],
        candidates: Sequence[Sequence[Chunk]],
        budget: Budget | None = None,
        *,
        seed: int = 0,
    ) -> list[Choice]:
        """Choose each candidate with the same probability."""
        return [
            Choice(int(stream(seed, state, 0).integers(len(row))), (None,) * len(row), Usage())
            for state, row in zip(states, candidates, strict=True)
        ]

"""A search for rewards that cost as much as many tokens: a cheap value chooses, few are scored."""

from __future__ import annotations

from dataclasses import dataclass

from mbrl_text_env.agents.search import Expansion, Planner, Search, affordable, stand_in, value_of
from mbrl_text_env.rewards.base import reward_usage_bound
from mbrl_text_env.types import check_positive

# Candidates a stage: the value has to have a choice.
_FEWEST = 4


@dataclass(eq=False, kw_only=True)
class Screened(Planner):
    """Chunk by chunk, keep the candidate of highest value; of complete responses score the best.

    A round draws `candidates` chunks, goes on from the one of highest value until it ends, and asks
    the reward for the `finalists` that have the highest value among all complete responses that are
    not scored yet. It pays where the reward costs more than some ten tokens and the value next to
    nothing beside it, such as `token-embedding`. Budgets in tokens do not see what the reward
    costs: give one in FLOPs.

    Sources: Mudgal et al., "Controlled Decoding from Language Models", 2024 (blockwise best-of-K);
    Sun et al., "Fast Best-of-N Decoding via Speculative Rejection", 2024 (a cheap judgement of what
    is not worth its price). Deviation: the reward is never asked for a prefix.

    Args:
        value_model: Ranks partial and complete responses; without one this is best-of-N.
        candidates: Chunks drawn at a stage, as far as the budget allows; None for as many responses
            as cost what a call of the reward costs, and at least 4.
        finalists: Responses that are scored after a round; None for as many as cost what the
            round's candidates cost, and at least one.

    Example:
        >>> planner = Screened(lm, reward, value, finalists=1)  # doctest: +SKIP
    """

    name = "screened"

    candidates: int | None = None
    finalists: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(candidates=self.candidates, finalists=self.finalists)

    async def plan(self, search: Search) -> None:
        """One response of chosen chunks, and the scores of the finalists."""
        root, price = search.tree.root, self._price(search)
        count = self.candidates or max(_FEWEST, round(price))
        if search.value_model is None:
            await search.expand([Expansion(root, count)])
            return
        most = search.width(root, self.chunk_tokens, scored=False)
        count = count if most is None else min(count, most)
        beams = [root] if count else []
        while beams:
            [beam] = beams
            [row] = await search.expand([Expansion(beam, count, self.chunk_tokens, scored=False)])
            beams = search.ranked(row)[:1]
            for node in beams:
                node.note = f"kept: the highest value of {len(row)} candidates"
        # All of them where the reward costs nothing, or nothing can be drawn any more.
        finalists = max(1, int(count / price)) if count and price * count > 1e-9 else 1 << 20
        await self._score(search, self.finalists or finalists)

    async def _score(self, search: Search, most: int) -> None:
        """Ask the reward for the best of what is complete, as far as the budget allows."""
        nodes = search.tree.nodes
        waiting = [node for node in nodes if node.is_terminal and node.score is None]
        waiting.sort(key=value_of, reverse=True)
        each = reward_usage_bound(self.reward_model)
        most = affordable(search.ledger, lambda count: each * count, min(most, len(waiting)))
        await search.evaluate(waiting[:most])

    def _price(self, search: Search) -> float:
        """What a call of the reward costs beside drawing a response; 1 where that is not known."""
        state = search.tree.root.state
        drawing = search.drawing_usage(state).flops
        # Not the bound: of a model, that is of a text that fills its input.
        text = self.language_model.decode(stand_in(state, search.room(state)).response_ids)
        scoring = search.reward_model.usage(state.prompt, text).flops
        return scoring / drawing if drawing > 0 else 1.0

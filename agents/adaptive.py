"""A planner whose beams, candidates and chunks follow the budget and what the value can tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mbrl_text_env.agents.base import check_positive, check_target
from mbrl_text_env.agents.planner import Planner
from mbrl_text_env.agents.search import Expansion, Search, partial, shares
from mbrl_text_env.agents.tree import Node

# Candidates a stage where no budget says how many.
_NARROW = 8
# Values closer than this are the same.
_SAME = 1e-9


@dataclass(eq=False, kw_only=True)
class Adaptive(Planner):
    """Beam search that stays broad where the value cannot tell and narrows where it can.

    A stage draws as many candidate chunks as the budget allows to the end of the response. Of n
    candidates the best n / `candidates_per_beam` go on, and with them all whose value cannot be
    told from that of the last one kept: those within `margin` standard deviations of it, and equal
    ones in any case. So where the value says nothing, the search is as broad as best-of-N and loses
    nothing; where it says much, all candidates of the next stage follow the few best; and a larger
    budget means more beams, not only more candidates.

    Chunks are as short as pays: `shortest_chunk` tokens, or so many that what is spent on values is
    at most `value_share` of what is spent on text. After a stage whose candidates are all
    equal they are twice as long, up to `chunk_tokens`; after one that tells, short again.

    Partial responses are ranked by mean - `caution` x standard deviation. A partial response is
    given up when a complete one is known that is better than its mean by more than `caution` + 2
    standard deviations (only value models with an uncertainty can say so); what that saves is spent
    on the rest, and on further rounds. With a `target` the search ends at the first response that
    scores as much; so that it can, its rounds begin with a single response, and each has twice as
    many candidates a stage as the one before.

    With a value model that gives no standard deviation (`PrefixRewardValue` without a fit),
    `margin` and `caution` change nothing, nothing is given up, and only equal values are not told
    apart.

    Sources: Mudgal et al., "Controlled Decoding from Language Models", 2024 (blockwise choice);
    Snell et al., "Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model
    Parameters", 2024 (beam width by the budget); Kidambi et al., "MOReL: Model-Based Offline
    Reinforcement Learning", 2020 (pessimism by the model's uncertainty). The rule for what goes on
    is this project's: successive elimination (Even-Dar et al., "Action Elimination and Stopping
    Conditions", 2006) applied to the candidates of a stage.

    Args:
        candidates_per_beam: Candidates for each beam that goes on for certain.
        margin: Standard deviations within which values cannot be told apart; 0 or more.
        caution: k of mean - k x standard deviation; 0 or more.
        target: The score from which on a response is good enough; None spends the whole budget.
        value_share: Most FLOPs spent on values, as a share of those spent on text.
        shortest_chunk: Fewest tokens of a chunk; `chunk_tokens` is the most.

    The other arguments are those of every `Planner`.

    Example:
        >>> planner = Adaptive(lm, reward, value, target=1.0)  # doctest: +SKIP
        >>> [answer] = planner.generate("Praise the sea.", Budget(tokens=64))  # doctest: +SKIP
    """

    name = "adaptive"

    candidates_per_beam: int = 4
    margin: float = 0.1
    value_share: float = 0.5
    caution: float = 0.0
    target: float | None = None
    shortest_chunk: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            candidates_per_beam=self.candidates_per_beam, shortest_chunk=self.shortest_chunk
        )
        check_target(self.target)
        if not self.value_share > 0:
            raise ValueError(f"value_share: expected a number above 0, got {self.value_share}.")
        for name, number in (("margin", self.margin), ("caution", self.caution)):
            if not number >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {number}.")

    async def plan(self, search: Search) -> None:
        """One search from the root to the end of the responses."""
        beams = [search.tree.root]
        pays = math.ceil(search.value_tokens(search.tree.root) / self.value_share)
        shortest = max(self.shortest_chunk, pays)
        size = shortest = min(shortest, self.chunk_tokens)
        while beams and not search.has_reached(self.target):
            width = self._width(search, beams[0], size)
            drawn = await self._drawn(search, beams, width, size)
            beams = self._kept(search, drawn, max(1, width // self.candidates_per_beam))
            size = shortest if self._tells(drawn) else min(2 * size, self.chunk_tokens)

    def _width(self, search: Search, node: Node, size: int) -> int:
        """Candidates of a stage."""
        affordable = search.width(node, size)
        if affordable is None:
            return _NARROW
        return affordable if self.target is None else min(affordable, 1 << search.round)

    async def _drawn(
        self, search: Search, beams: Sequence[Node], width: int, size: int
    ) -> list[Node]:
        counts = shares(width, len(beams))
        rows = await search.expand(
            Expansion(beam, count, size) for beam, count in zip(beams, counts, strict=True) if count
        )
        return [node for row in rows for node in row]

    def _kept(self, search: Search, drawn: Sequence[Node], certain: int) -> list[Node]:
        """The best `certain` candidates, and those that cannot be told from the last of them."""
        ranked = sorted(self._hopeful(search, partial(drawn)), key=self._cautious, reverse=True)
        if not ranked:
            return []
        last = ranked[min(certain, len(ranked)) - 1]
        cut = self._cautious(last) - self.margin * last.std - _SAME
        kept = [node for node in ranked if self._cautious(node) >= cut]
        for rank, node in enumerate(kept, start=1):
            told = "" if rank <= certain else ", not to be told from those before"
            node.note = f"kept: number {rank} of {len(drawn)} candidates{told}"
        return kept

    def _hopeful(self, search: Search, nodes: Sequence[Node]) -> list[Node]:
        best = search.tree.best()
        if best is None or best.score is None:
            return list(nodes)
        return [
            node
            for node in nodes
            if node.value is None
            or node.std == 0
            or node.value + (self.caution + 2.0) * node.std >= best.score
        ]

    def _tells(self, drawn: Sequence[Node]) -> bool:
        """Whether the value tells some of the candidates apart."""
        worths = [self._cautious(node) for node in partial(drawn)]
        return bool(worths) and max(worths) - min(worths) > _SAME

    def _cautious(self, node: Node) -> float:
        return float("-inf") if node.value is None else node.value - self.caution * node.std

"""Beam search over chunks, with independent subtrees for diversity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mbrl_text_env.agents.base import check_positive
from mbrl_text_env.agents.planner import Planner
from mbrl_text_env.agents.search import Expansion, Search, shares
from mbrl_text_env.agents.tree import Node

# Candidates a stage where neither the caller nor a budget says how many.
_WITHOUT_BUDGET = 4


@dataclass(eq=False, kw_only=True)
class BeamSearch(Planner):
    """Stage by stage, draw candidate chunks after each beam and keep the best partial responses.

    With `beam_width=1` this is blockwise best-of-K. With `subtrees` above 1 the beams are divided
    among as many independent searches, so that one early favourite does not crowd out the rest.

    Sources: Mudgal et al., "Controlled Decoding from Language Models", 2024 (blockwise best-of-K);
    Snell et al., "Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model
    Parameters", 2024 (beam search with a value); Beeching et al., "Scaling test-time compute with
    open models", 2024 (diverse verifier tree search, `subtrees`). Deviations: chunks have a fixed
    number of tokens instead of ending with a line; responses that end leave the beam and are
    scored; the number of candidates follows from the budget that is left, at every stage anew.

    Args:
        value_model: Ranks partial ones; without one their order is that in which they were drawn,
            so that a beam search without a value model chooses among complete responses alone, and
            wastes what the others cost.
        beam_width: Partial responses that are kept at a stage, all subtrees together.
        candidates: Chunks drawn at a stage, all beams together; None as many as the budget allows
            to the end of the response, or 4 without one.
        subtrees: Independent searches, at most `beam_width`.

    The other arguments are those of every `Planner`.

    Example:
        >>> planner = BeamSearch(lm, reward, value, beam_width=2)  # doctest: +SKIP
        >>> [answer] = planner.generate("Praise the sea.", Budget(tokens=64))  # doctest: +SKIP
    """

    name = "beam"

    beam_width: int = 1
    candidates: int | None = None
    subtrees: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            beam_width=self.beam_width, subtrees=self.subtrees, candidates=self.candidates
        )
        if self.subtrees > self.beam_width:
            raise ValueError(
                f"subtrees: expected at most beam_width ({self.beam_width}), got {self.subtrees}."
            )

    async def plan(self, search: Search) -> None:
        """One beam search from the root."""
        await beam_search(
            search, self.chunk_tokens, self.beam_width, self.candidates, self.subtrees
        )


async def beam_search(
    search: Search,
    chunk_tokens: int,
    beam_width: int,
    candidates: int | None = None,
    subtrees: int = 1,
) -> None:
    """One beam search from the root of a search; see `BeamSearch` for the numbers."""
    # Of each subtree: its beams. At the start there is one, the root, and all share it.
    frontiers: list[list[Node]] = [[search.tree.root]] * subtrees
    widths = [len(range(i, beam_width, subtrees)) for i in range(subtrees)]
    while any(frontiers):
        beams = [node for frontier in frontiers for node in frontier]
        counts = shares(candidates or _affordable(search, beams[0], chunk_tokens), len(beams))
        wanted = [
            Expansion(node, count, chunk_tokens)
            for node, count in zip(beams, counts, strict=True)
            if count
        ]
        rows = iter(await search.expand(wanted))
        drawn = iter([next(rows) if count else [] for count in counts])
        frontiers = [
            _kept(search, [next(drawn) for _ in frontier], width)
            for frontier, width in zip(frontiers, widths, strict=True)
        ]


def _affordable(search: Search, node: Node, chunk_tokens: int) -> int:
    width = search.width(node, chunk_tokens)
    return _WITHOUT_BUDGET if width is None else width


def _kept(search: Search, rows: Sequence[Sequence[Node]], width: int) -> list[Node]:
    drawn = [node for row in rows for node in row]
    kept = search.ranked(drawn)[:width]
    for rank, node in enumerate(kept, start=1):
        node.note = f"kept: number {rank} of {len(drawn)} candidates"
    return kept

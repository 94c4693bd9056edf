"""Best-of-N: sample N complete responses and keep the one that the reward model likes most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mbrl_text_env.agents.base import check_positive, check_target
from mbrl_text_env.agents.driver import MOST_AT_ONCE
from mbrl_text_env.agents.planner import Planner
from mbrl_text_env.agents.search import Expansion, Search
from mbrl_text_env.agents.tree import Node
from mbrl_text_env.types import Budget, TextState
from mbrl_text_env.values import ValueModel

# The article's number.
_N_WITHOUT_BUDGET = 4
# A cap on seconds is looked at between waves.
_MOST_A_WAVE = 16


@dataclass(eq=False, kw_only=True)
class BestOfN(Planner):
    """Sample responses until there are N or the budget allows no more; keep the best.

    A response is only begun if it could be finished and scored at its longest. What short responses
    leave over is spent on more of them. Sample k of a prompt is the same whatever N is, so a larger
    budget never gives a lower score. A response that was drawn before is not scored again.

    With `keep` below 1 hopeless samples are pruned: all of them are drawn chunk by chunk, and after
    each chunk the share `keep` with the highest values goes on.

    With a `target` sampling ends with the wave in which a response scores as much. Waves begin with
    one response and double, so at most about as much is drawn again as was needed.

    Source of the pruning: Sun et al., "Fast Best-of-N Decoding via Speculative Rejection", 2024.
    Deviation: there a share is dropped whenever memory is full, here after every chunk.

    Args:
        value_model: Says which samples are hopeless; only used where `keep` is below 1.
        n: N; None takes as many as the budget allows, or 4 (the article's number) without one.
        keep: Share of the samples that goes on after each chunk, above 0 and up to 1.
        target: The score from which on a response is good enough; None draws all of them.

    The other arguments are those of every `Planner`; `chunk_tokens` lie between prunings.

    Raises:
        ValueError: There is pruning without a value model, or with a `target` (its samples are
            drawn together).
    """

    name = "best-of-n"

    n: int | None = None
    keep: float = 1.0
    target: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(n=self.n)
        check_target(self.target)
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep: expected a share above 0 and up to 1, got {self.keep}.")
        if self.keep < 1 and self.value_model is None:
            raise ValueError(
                f"keep={self.keep}: expected a value model that says which samples are hopeless, "
                "got none. Pass one, or keep=1.0."
            )
        if self.keep < 1 and self.target is not None:
            raise ValueError(
                f"Expected keep=1.0 with a target, got keep={self.keep}: samples that are pruned "
                "are drawn together, so there is nothing to end early."
            )

    async def plan(self, search: Search) -> None:
        """Sample one wave after the other, or one set of samples that is pruned."""
        root = search.tree.root
        wanted = self.n
        if wanted is None and not search.is_capped:
            wanted = _N_WITHOUT_BUDGET
        if self.keep < 1:
            await self._pruned(search, wanted)
            return
        while (wanted is None or root.samples < wanted) and not search.has_reached(self.target):
            most = _MOST_A_WAVE if self.target is None else min(max(1, root.samples), _MOST_A_WAVE)
            left = most if wanted is None else min(wanted - root.samples, most)
            drawn = root.samples
            await search.expand([Expansion(root, left)])
            if wanted is None or root.samples == drawn:
                return

    def values(self) -> ValueModel | None:
        """The value model, where there is pruning."""
        return self.value_model if self.keep < 1 else None

    def _most_at_once(self, state: TextState, budget: Budget) -> int:
        """Samples that are not pruned have nothing in common but the prompt."""
        return MOST_AT_ONCE if self.keep == 1 else super()._most_at_once(state, budget)

    async def _pruned(self, search: Search, wanted: int | None) -> None:
        root = search.tree.root
        if wanted is not None and root.samples >= wanted:
            return
        if search.is_capped:
            # More would be begun than can be finished.
            most = self._affordable(search)
            wanted = most if wanted is None else min(wanted, most)
        assert wanted is not None
        frontier = [root] * max(1, wanted)
        while frontier:
            rows = await search.expand(
                Expansion(node, count, self.chunk_tokens)
                for node, count in Counter(frontier).items()
            )
            drawn = [node for row in rows for node in row]
            frontier = _best_share(search, drawn, self.keep)

    def _affordable(self, search: Search) -> int:
        """How many samples can be begun if a share of them goes on after each chunk."""
        root = search.tree.root
        full = search.width(root, self.chunk_tokens) or 0
        stages = math.ceil(search.room(root) / self.chunk_tokens)
        shares = sum(self.keep**stage for stage in range(stages))
        return int(full * stages / shares)


def _best_share(search: Search, drawn: Sequence[Node], share: float) -> list[Node]:
    """The unfinished nodes that go on, as often as they were drawn."""
    ranked = search.ranked(drawn)
    open_nodes = [node for node in drawn if not node.is_terminal]
    # 0.28 x 25 is a little above 7 in floating point.
    kept = math.ceil(share * len(open_nodes) - 1e-9)
    return [node for best in ranked for node in open_nodes if node is best][:kept]

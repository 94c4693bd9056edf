"""Receding horizon: roll several chunks ahead, execute the first of the best plan, plan again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mbrl_text_env.agents.base import check_positive
from mbrl_text_env.agents.planner import Planner
from mbrl_text_env.agents.search import Expansion, Search
from mbrl_text_env.agents.tree import Node

_WITHOUT_BUDGET = 4


@dataclass(eq=False, kw_only=True)
class RecedingHorizon(Planner):
    """Model-predictive control over chunks.

    At each step, plans of `horizon` chunks are rolled out from the state reached so far. The plan
    of highest value at its end (a complete one: of highest score) is chosen, its first chunk is
    executed, and what is left of the plans that begin with this chunk competes with the plans that
    are rolled out next. Without a value model the horizon is the end of the response: the last
    chunk of a plan is the whole rest, and its score decides.

    Source: random-shooting model-predictive control, as in Nagabandi et al., "Neural Network
    Dynamics for Model-Based Deep Reinforcement Learning with Model-Free Fine-Tuning", 2018.
    Deviations: plans are drawn from the language model instead of uniformly; those that begin with
    the executed chunk are kept; the objective is the value at the horizon, for text has no reward
    before its end.

    Args:
        horizon: Chunks of a plan.
        plans: Plans rolled out at a step; None as many as the budget allows to the end of the
            response, or 4 without one.

    The other arguments are those of every `Planner`.
    """

    name = "receding-horizon"

    horizon: int = 2
    plans: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(horizon=self.horizon, plans=self.plans)

    async def plan(self, search: Search) -> None:
        """Plan and execute from the root until the response ends."""
        node = search.tree.root
        while not node.is_terminal:
            ends = await self._rolled_out(search, node)
            if not ends:
                return
            best = max(ends, key=_worth)
            step = _first_step(node, best)
            step.note = f"executed: {_worth(best):.4g} is the best at the end of {len(ends)} plans"
            node = step

    async def _rolled_out(self, search: Search, node: Node) -> list[Node]:
        """Ends of the plans from a node: new ones, and those that were there."""
        frontier = Counter({node: self._count(search, node)})
        for ahead in range(1, self.horizon + 1):
            rows = await search.expand(
                Expansion(stem, copies, self._tokens(search, ahead), valued=ahead == self.horizon)
                for stem, copies in frontier.items()
            )
            frontier = Counter(child for row in rows for child in row if not child.is_terminal)
            if not frontier:
                break
        return [end for end in _below(node) if end.worth is not None]

    def _tokens(self, search: Search, ahead: int) -> int | None:
        """Of a plan's chunk number `ahead`; None for all that is left."""
        is_last = ahead == self.horizon and search.value_model is None
        return None if is_last else self.chunk_tokens

    def _count(self, search: Search, node: Node) -> int:
        if self.plans is not None:
            return self.plans
        width = search.width(node, self.chunk_tokens)
        # Each of the chunks that are left is planned, and each plan has up to `horizon` of them.
        left = -(-search.room(node) // self.chunk_tokens)
        horizon = left if search.value_model is None else self.horizon
        mean_length = sum(min(horizon, k) for k in range(1, left + 1)) / left
        return _WITHOUT_BUDGET if width is None else max(1, int(width / mean_length))


def _first_step(node: Node, end: Node) -> Node:
    """The child of `node` on the way to `end`."""
    return next(step for step in end.path() if step.parent is node)


def _below(node: Node) -> list[Node]:
    """All nodes that follow a node."""
    found = list(node.children)
    for child in found:
        found.extend(child.children)
    return sorted(found, key=lambda each: each.index)


def _worth(node: Node) -> float:
    return float("-inf") if node.worth is None else node.worth

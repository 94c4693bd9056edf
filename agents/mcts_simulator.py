"""The simulations of Monte Carlo tree search: down the tree, one new chunk, and back up."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np

from mbrl_text_env.agents.mcts_policies import (
    Children,
    gumbel_interior_scores,
    puct_scores,
    widened,
)
from mbrl_text_env.agents.search import Expansion, Search, partial
from mbrl_text_env.agents.tree import Node
from mbrl_text_env.types import Chunk, FloatArray, transition

RootPolicy = Literal["puct", "gumbel"]
LeafValue = Literal["value", "rollout", "both"]
Backup = Literal["mean", "max"]


class SimulationOptions(Protocol):
    """What simulations need to know of `MCTS`, which says what each means."""

    root_policy: RootPolicy
    leaf_value: LeafValue
    rollout_weight: float
    backup: Backup
    c_puct: float
    widening: float
    widening_power: float
    batch_size: int
    chunk_tokens: int


class Simulator:
    """Runs simulations in one tree, and keeps what is under way apart from what is known.

    Args:
        options: How they go.
        search: The tree, and what draws and evaluates.

    Attributes:
        is_valued: Whether new partial responses are valued.
        rolls_out: Whether every simulation ends in a complete response.
        is_broke: Whether a chunk could not be afforded.
    """

    def __init__(self, options: SimulationOptions, search: Search) -> None:
        self.options, self.search = options, search
        self.is_valued = search.value_model is not None and options.leaf_value != "rollout"
        self.rolls_out = not self.is_valued or options.leaf_value == "both"
        self.is_broke = False
        self._under_way: Counter[Node] = Counter()
        self._drawing: Counter[Node] = Counter()

    async def run(self, node: Node, count: int) -> None:
        """Simulations from a node down, `batch_size` at a time."""
        while count > 0 and not self.is_broke:
            batch = min(count, self.options.batch_size)
            await self.complete(self.descend(node) for _ in range(batch))
            count -= batch

    def descend(self, node: Node) -> Node:
        """Go down from a node to one that draws a chunk; note that a simulation is under way."""
        while True:
            self._under_way[node] += 1
            open_children = partial(node.children)
            if not open_children or self._may_widen(node):
                self._drawing[node] += 1
                return node
            scores = self._scores(self.children(node, open_children))
            node = open_children[int(np.argmax(scores))]

    async def complete(self, stems: Iterable[Node]) -> None:
        """Draw a chunk from each of the nodes and back up what it leads to."""
        going = list(stems)
        while going and not self.is_broke:
            step = self._valued if self.is_valued else self._rolled_out
            going = await step(going)
        self._under_way.clear()
        self._drawing.clear()

    def children(self, node: Node, children: Sequence[Node]) -> Children:
        """What is known of some of a node's children, simulations under way counted as lost."""
        copies = np.array([child.copies for child in children], float)
        under_way = np.array([self._under_way[child] for child in children], float)
        own_visits = np.array([child.visits for child in children], float)
        totals = np.array([child.total for child in children])
        seen = own_visits > 0
        means = np.divide(totals, own_visits, where=seen, out=np.zeros(len(children)))
        lowest = min([*means[seen], *([node.mean] if node.visits else [])], default=0.0)
        visits = own_visits + under_way
        values = np.divide(
            totals + lowest * under_way, visits, where=visits > 0, out=np.zeros(len(children))
        )
        return Children(
            visits,
            values,
            copies / copies.sum(),
            node.visits + self._under_way[node],
            node.mean if node.visits else None,
            node.value,
        )

    def _may_widen(self, node: Node) -> bool:
        # The simulation that asks is under way already.
        visits = node.visits + self._under_way[node] - 1
        allowed = widened(visits, self.options.widening, self.options.widening_power)
        return node.samples + self._drawing[node] < allowed

    def _scores(self, children: Children) -> FloatArray:
        if self.options.root_policy == "puct":
            return puct_scores(children, self.options.c_puct)
        return gumbel_interior_scores(children)

    async def _valued(self, stems: Sequence[Node]) -> list[Node]:
        """Value a new chunk of each node; those that drew a known one go on from there."""
        rows = await self.search.expand(
            Expansion(stem, 1, self.options.chunk_tokens) for stem in stems
        )
        self._drawing.clear()
        self.is_broke = self.is_broke or not all(rows)
        leaves: list[Node] = []
        going: list[Node] = []
        for [child] in filter(None, rows):
            is_known = child.visits > 0 or child in leaves
            (going if is_known and not child.is_terminal else leaves).append(child)
        await self._back_up_leaves(leaves)
        # Only now, so that it sees the returns of this batch.
        return [self.descend(node) for node in going]

    async def _back_up_leaves(self, leaves: Sequence[Node]) -> None:
        open_leaves = partial(leaves) if self.rolls_out else []
        scores = dict(zip(open_leaves, await self._rollouts(open_leaves), strict=True))
        for leaf in leaves:
            worth, score = leaf.worth, scores.get(leaf)
            assert worth is not None
            if score is not None:
                weight = self.options.rollout_weight
                worth = (1 - weight) * worth + weight * score
            self._back_up(leaf, worth)

    async def _rollouts(self, leaves: Sequence[Node]) -> list[float | None]:
        """The score of a rollout from each leaf, its nodes visited; None where not affordable."""
        ends = await self._drawn_to_the_end(leaves) if leaves else []
        for leaf, end in zip(leaves, ends, strict=True):
            if end is not None:
                assert end.score is not None
                self._back_up(end, end.score, above=leaf)
        return [None if end is None else end.score for end in ends]

    async def _rolled_out(self, stems: Sequence[Node]) -> list[Node]:
        """A rollout from each node, scored and backed up."""
        for end in await self._drawn_to_the_end(stems):
            if end is not None:
                assert end.score is not None
                self._back_up(end, end.score)
        return []

    async def _drawn_to_the_end(self, nodes: Sequence[Node]) -> list[Node | None]:
        """A complete response drawn from each node, its chunks nodes of the tree."""
        # A stop text ends a chunk, but not a response.
        params = dataclasses.replace(self.search.params, stop=())
        rows = await self.search.expand(Expansion(n, 1, None, params, valued=False) for n in nodes)
        self.is_broke = self.is_broke or not all(rows)
        ends = in_chunks(
            self.search, [end for row in rows for end in row], self.options.chunk_tokens
        )
        remaining = iter(ends)
        return [next(remaining) if row else None for row in rows]

    def _back_up(self, node: Node, value: float, above: Node | None = None) -> None:
        """Add a return to a node and those before it, up to the root or to the one above."""
        for each in node.path():
            if each is above:
                return
            best = max(value, each.mean) if each.visits else value
            each.visits += 1
            each.total = each.visits * best if self.options.backup == "max" else each.total + value


def in_chunks(search: Search, ends: Sequence[Node], chunk_tokens: int) -> list[Node]:
    """Put nodes between complete responses that were drawn in one piece and where they began.

    A chunk of a longer draw is distributed as one drawn for itself, so it is a child like any
    other; beginnings that are there already are shared. (But for stop texts, which end a chunk that
    is drawn for itself, and nothing that is drawn to the end.)

    Args:
        search: Whose tree the responses are in.
        ends: Complete responses, each a child of the node that it was drawn from.
        chunk_tokens: Tokens of a chunk.

    Returns:
        The nodes of the same complete responses, now `chunk_tokens` or fewer from their parents.
    """
    nodes = search.tree.nodes
    pieces = [end for end in dict.fromkeys(ends) if len(_chunk(end)) > chunk_tokens]
    if not pieces:
        return list(ends)
    first = min(end.index for end in pieces)
    nodes[first:] = [node for node in nodes[first:] if node not in pieces]
    for index, node in enumerate(nodes[first:], start=first):
        node.index = index
    placed = {end: _add_path(search, end, chunk_tokens) for end in pieces}
    return [placed.get(end, end) for end in ends]


def _add_path(search: Search, end: Node, chunk_tokens: int) -> Node:
    """Take a node from its parent, and add what leads to it in chunks, as often as it was drawn."""
    parent, chunk = end.parent, _chunk(end)
    assert parent is not None
    parent.children.remove(end)
    parent.samples -= end.copies
    node = parent
    for _ in range(end.copies):
        node = parent
        for start in range(0, len(chunk), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            reason = chunk.finish_reason if start + chunk_tokens >= len(chunk) else None
            piece = Chunk(chunk.token_ids[part], chunk.logprobs[part], reason)
            node = search.tree.add(node, piece, transition(node.state, piece, search.limit))
    if node.score is None:
        node.score, node.parts = end.score, end.parts
    return node


def _chunk(node: Node) -> Chunk:
    assert node.chunk is not None
    return node.chunk

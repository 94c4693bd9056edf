"""Monte Carlo tree search over chunks: decisions, simulations and selection scores.

The scores follow the conventions of mctx (https://github.com/google-deepmind/mctx). Actions are
chunks sampled from a language model, so priors are sample frequencies, not the output of a policy
network (Hubert et al., "Learning and Planning in Complex Action Spaces", 2021).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mbrl_text_env.agents.search import Expansion, Planner, Search
from mbrl_text_env.agents.tree import Node, SearchTree, partial
from mbrl_text_env.language_models.base import spawn_seed, stream
from mbrl_text_env.mdp import transition
from mbrl_text_env.types import Chunk, FloatArray, TextState, check_positive, one_of

RootPolicy = Literal["puct", "gumbel"]
LeafValue = Literal["value", "rollout"]
Backup = Literal["mean", "max"]

# Trees kept for the next decisions: one per running episode.
_TREES_KEPT = 256
# Minimum fraction of the largest visit count for a mean to be trusted.
_ENOUGH = 0.25
# Separates the root's random numbers from those that sample chunks.
_ROOT_NOISE = 1
# Constants of mctx; the first is from MuZero's pseudocode.
_C_BASE = 19652.0
_MAXVISIT_INIT = 50.0
_VALUE_SCALE = 0.1
_EPSILON = 1e-8


class _Memory:
    """Trees of the last decisions. Copies of an agent share them; pickling drops them."""

    def __init__(self) -> None:
        self._trees: OrderedDict[tuple[int, TextState], SearchTree] = OrderedDict()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def keep(self, search: Search) -> None:
        """Store a search's tree."""
        key = search.seed, search.tree.root.state
        self._trees.pop(key, None)
        self._trees[key] = search.tree
        while len(self._trees) > _TREES_KEPT:
            self._trees.popitem(last=False)

    def recall(self, search: Search, chunk_tokens: int) -> None:
        """Copy the subtree below the search's state from the previous decision's tree."""
        state = search.tree.root.state
        for tokens in range(1, min(chunk_tokens, len(state.response_ids)) + 1):
            before = dataclasses.replace(state, response_ids=state.response_ids[:-tokens])
            tree = self._trees.get((search.seed, before))
            same = [node for node in tree.nodes if node.state == state] if tree else []
            going = [(search.tree.root, node) for node in same[:1]]
            while going:
                node, known = going.pop()
                for name in ("value", "std", "score", "parts", "visits", "total"):
                    setattr(node, name, getattr(known, name))
                for child in known.children:
                    copied = search.tree.add(node, child.step()[1], child.state)
                    copied.copies = child.copies
                    going.append((copied, child))
                node.samples = known.samples
            if same:
                return


@dataclass(eq=False, kw_only=True)
class MCTS(Planner):
    """Monte Carlo tree search over chunks, with PUCT or Gumbel root policies.

    A simulation descends from a node to one that may add a chunk (progressive widening: after n
    visits, up to `widening` x n ^ `widening_power` chunks). It samples a chunk and backs up the
    return, a score or an estimated value, to all ancestors. After the simulations of a decision,
    the search moves to the best child and keeps its subtree. It stops when the response has ended,
    or when a response that ends with the next chunk scores at least the best child's mean. Later
    rounds reuse the tree.

    Without a budget, each decision has `num_simulations` simulations. With a budget, a decision
    with k chunks to go uses 1/k of the rest; with rollouts at least `num_simulations`.

    Root policies:

    - `"puct"`: PUCT everywhere (Silver et al., "Mastering the Game of Go without Human Knowledge",
      2017; Schrittwieser et al., "Mastering Atari, Go, Chess and Shogi by Planning with a Learned
      Model", 2020). The search moves to the child with the highest mean, not the most visits as in
      these papers, among children with at least a quarter of the largest visit count.
    - `"gumbel"`: the root of a decision considers `max_considered` chunks by sequential halving
      with Gumbel noise; other nodes follow the improved policy (Danihelka et al., "Policy
      Improvement by Planning with Gumbel", 2022).

    A running simulation counts as a visit with no return (virtual loss: Chaslot et al., "Parallel
    Monte-Carlo Tree Search", 2008).

    Deviations, because chunks are samples and scores of responses are exact: priors are sample
    frequencies; there is no Dirichlet noise; an ended response is never visited again, and a node
    whose children have all ended samples another chunk. There is no discount.

    Args:
        value_model: Estimates the final reward of partial responses; None means rollouts.
        num_simulations: Simulations per decision without a budget.
        leaf_value: `"value"` uses the value model. `"rollout"` samples the response to its end,
            scores it, and adds its chunks to the tree.
        backup: A node's value is the `"mean"` of its returns, or the `"max"`.
        c_puct: Weight of PUCT's exploration bonus, above 0.
        widening: Chunks that a node can have after its first visit, above 0.
        widening_power: Growth of that number with the visit count, 0 to 1.
        max_considered: Maximum number of chunks that the `"gumbel"` root considers.
        batch_size: Concurrent simulations. More are faster for one prompt, but find a little less.
        reuse_tree: Whether `act` reuses the tree of the previous decision with the same seed, at
            no cost. The last 256 trees are kept.

    Example:
        >>> planner = MCTS(lm, reward, value, root_policy="gumbel")  # doctest: +SKIP
    """

    name = "mcts"

    num_simulations: int = 8
    root_policy: RootPolicy = "puct"
    leaf_value: LeafValue = "value"
    backup: Backup = "mean"
    c_puct: float = 1.25
    widening: float = 2.0
    widening_power: float = 0.5
    max_considered: int = 16
    batch_size: int = 2
    reuse_tree: bool = False
    _memory: _Memory = field(default_factory=_Memory, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("num_simulations", "max_considered", "batch_size")
        check_positive(**{name: getattr(self, name) for name in counts})
        choices = {"root_policy": RootPolicy, "leaf_value": LeafValue, "backup": Backup}
        for name, words in choices.items():
            one_of(name, getattr(self, name), words)
        if not 0.0 <= self.widening_power <= 1.0:
            raise ValueError(
                f"widening_power: expected a number from 0 to 1, got {self.widening_power}."
            )
        for name in ("c_puct", "widening"):
            if not 0 < (number := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {number}.")

    async def plan(self, search: Search) -> None:
        """Decide chunk by chunk until the response ends or the budget is exhausted."""
        if self.reuse_tree and search.round == 0:
            self._memory.recall(search, self.chunk_tokens)
        simulator = Simulator(self, search)
        node: Node | None = search.tree.root
        while node is not None and not simulator.is_broke:
            node = await self._decide(simulator, node)
        if self.reuse_tree:
            self._memory.keep(search)

    async def _decide(self, simulator: Simulator, node: Node) -> Node | None:
        """Simulate from a node and return the child to move to, or None."""
        count = self._simulations(simulator, node)
        if self.root_policy == "puct":
            await simulator.run(node, count)
            best = _robust(node)
        else:
            decision = GumbelDecision(self, simulator, node)
            await decision.simulate(count)
            best = decision.chosen()
        if best is None:
            return None
        # An ended child can be as good as the best child's mean.
        if any(end.is_terminal and end.mean >= best.mean for end in node.children):
            return None
        best.note = f"decided: {best.note}"
        return best

    def _simulations(self, simulator: Simulator, node: Node) -> int:
        """Number of simulations for the decision at a node."""
        search = simulator.search
        # With a value, a simulation costs one chunk, so a whole path pays for one simulation in
        # each decision left. With rollouts, each simulation costs a whole path.
        width = search.width(node, self.chunk_tokens if simulator.is_valued else None)
        if width is None:
            return self.num_simulations
        if simulator.is_valued:
            return max(1, width)
        decisions = math.ceil(search.room(node.state) / self.chunk_tokens)
        return max(self.num_simulations, width // decisions)


class GumbelDecision:
    """A decision at one node by Gumbel-top-k and sequential halving."""

    def __init__(self, planner: MCTS, simulator: Simulator, node: Node) -> None:
        self.planner, self.simulator, self.node = planner, simulator, node
        self.counts: Counter[Node] = Counter()
        self.considered: list[Node] = []
        self.perturbed: FloatArray = np.zeros(0)

    async def simulate(self, count: int) -> None:
        """Sample the considered children and run `count` simulations by the schedule."""
        known = set(partial(self.node.children))
        wanted = min(self.planner.max_considered, count)
        # Ended chunks are not visited again, so others replace them.
        new = max(0, wanted - sum(child.copies for child in known))
        await self.simulator.complete([self.node] * new)
        self.considered, self.perturbed = self._most_favoured(wanted)
        # Sampling a new child counts as its first visit, even if it was sampled twice.
        self.counts.update(child for child in self.considered if child not in known)
        await self._halve(count - new)

    def chosen(self) -> Node | None:
        """Return the considered child with the highest score among the most visited ones."""
        if not self.considered:
            return None
        most = max(self.counts[child] for child in self.considered)
        best = self.considered[int(np.argmax(self._scores(most)))]
        best.note = (
            f"the best of {len(self.considered)} considered, visited {best.visits} times, "
            f"mean {best.mean:.4g}"
        )
        return best

    def _most_favoured(self, count: int) -> tuple[list[Node], FloatArray]:
        children = partial(self.node.children)
        if not children:
            return [], np.zeros(0)
        seed = spawn_seed(self.simulator.search.seed, _ROOT_NOISE)
        rng = stream(seed, self.node.state, self.node.visits)
        noise = perturbed_log_priors([child.copies for child in children], rng)
        first = np.sort(np.argsort(-noise, kind="stable")[:count])
        return [children[i] for i in first], noise[first]

    async def _halve(self, count: int) -> None:
        """Visit the considered children by the schedule of sequential halving."""
        if not self.considered:
            return
        schedule = considered_visits(len(self.considered), count + self.counts.total())
        while self.counts.total() < len(schedule) and not self.simulator.is_broke:
            turn = schedule[self.counts.total()]
            # Stop at the end of this turn: the next one depends on its returns.
            left = schedule[self.counts.total() :].count(turn)
            stems = []
            for _ in range(min(left, self.planner.batch_size)):
                child = self.considered[int(np.argmax(self._scores(turn)))]
                self.counts[child] += 1
                stems.append(self.simulator.descend(child))
            await self.simulator.complete(stems)

    def _scores(self, turn: int) -> FloatArray:
        children = self.simulator.children(self.node, self.considered)
        counts = np.array([self.counts[child] for child in self.considered])
        return gumbel_root_scores(children, self.perturbed, counts, turn)


def _robust(node: Node) -> Node | None:
    """Return the non-terminal child with the highest mean among those visited enough."""
    children = partial(node.children)
    if not children:
        return None
    enough = _ENOUGH * max(child.visits for child in children)
    tried = [child for child in children if child.visits >= enough]
    best = max(tried, key=lambda child: (child.mean, child.visits))
    visits = sum(child.visits for child in node.children)
    best.note = (
        f"mean {best.mean:.4g}, highest of {len(tried)} children with enough visits; "
        f"{best.visits} of {visits} visits"
    )
    return best


class Simulator:
    """Runs simulations in one tree; `is_broke` is set once a chunk is not affordable."""

    def __init__(self, planner: MCTS, search: Search) -> None:
        self.planner, self.search = planner, search
        self.is_valued = search.value_model is not None and planner.leaf_value != "rollout"
        self.is_broke = False
        self._under_way: Counter[Node] = Counter()
        self._drawing: Counter[Node] = Counter()

    async def run(self, node: Node, count: int) -> None:
        """Run simulations from a node, `batch_size` at a time."""
        while count > 0 and not self.is_broke:
            batch = min(count, self.planner.batch_size)
            await self.complete(self.descend(node) for _ in range(batch))
            count -= batch

    def descend(self, node: Node) -> Node:
        """Descend to a node that samples a chunk, marking the path as under way."""
        while True:
            self._under_way[node] += 1
            open_children = partial(node.children)
            if not open_children or self._may_widen(node):
                self._drawing[node] += 1
                return node
            known = self.children(node, open_children)
            if self.planner.root_policy == "puct":
                scores = puct_scores(known, self.planner.c_puct)
            else:
                scores = gumbel_interior_scores(known)
            node = open_children[int(np.argmax(scores))]

    async def complete(self, stems: Iterable[Node]) -> None:
        """Sample a chunk from each node and back up its return."""
        going = list(stems)
        while going and not self.is_broke:
            step = self._valued if self.is_valued else self._rolled_out
            going = await step(going)
        self._under_way.clear()
        self._drawing.clear()

    def children(self, node: Node, children: Sequence[Node]) -> Children:
        """Statistics of some children; running simulations count as visits with no return."""
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
        # The visit count includes the simulation that asks.
        visits = node.visits + self._under_way[node] - 1
        allowed = widened(visits, self.planner.widening, self.planner.widening_power)
        return node.samples + self._drawing[node] < allowed

    async def _valued(self, stems: Sequence[Node]) -> list[Node]:
        """Value a new chunk of each node; return nodes to descend from after duplicates."""
        rows = await self.search.expand(
            Expansion(stem, 1, self.planner.chunk_tokens) for stem in stems
        )
        self._drawing.clear()
        self.is_broke = self.is_broke or not all(rows)
        leaves: list[Node] = []
        going: list[Node] = []
        for [child] in filter(None, rows):
            is_known = child.visits > 0 or child in leaves
            (going if is_known and not child.is_terminal else leaves).append(child)
        for leaf in leaves:
            self._back_up(leaf)
        # Descend after the backup, to use the returns of this batch.
        return [self.descend(node) for node in going]

    async def _rolled_out(self, stems: Sequence[Node]) -> list[Node]:
        """Roll out a response from each node and add its chunks to the tree."""
        # Sampled to the end, so `Search` ignores stop texts, which end chunks but not responses.
        rows = await self.search.expand(Expansion(node, valued=False) for node in stems)
        self.is_broke = self.is_broke or not all(rows)
        ends = [end for row in rows for end in row]
        for end in _in_chunks(self.search, ends, self.planner.chunk_tokens):
            self._back_up(end)
        return []

    def _back_up(self, leaf: Node) -> None:
        """Add a node's value to itself and its ancestors."""
        value = leaf.worth
        assert value is not None
        for each in leaf.path():
            best = max(value, each.mean) if each.visits else value
            each.visits += 1
            # Such that `Node.mean` equals the maximum.
            each.total = each.visits * best if self.planner.backup == "max" else each.total + value


def _in_chunks(search: Search, ends: Sequence[Node], size: int) -> list[Node]:
    """Insert nodes every `size` tokens between rolled-out responses and their start nodes.

    A chunk of a longer sample has the distribution of a separately sampled chunk (except for stop
    texts), so it is a normal child. Existing prefixes are shared.
    """
    nodes = search.tree.nodes
    pieces = [end for end in dict.fromkeys(ends) if len(end.step()[1]) > size]
    if not pieces:
        return list(ends)
    first = min(end.index for end in pieces)
    nodes[first:] = [node for node in nodes[first:] if node not in pieces]
    for index, node in enumerate(nodes[first:], start=first):
        node.index = index
    placed = {end: _add_path(search, end, size) for end in pieces}
    return [placed.get(end, end) for end in ends]


def _add_path(search: Search, end: Node, chunk_tokens: int) -> Node:
    """Detach a node from its parent and add its path in chunks, once for each copy."""
    parent, chunk = end.step()
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


@dataclass(frozen=True)
class Children:
    """Statistics of a node's n children, and the value model's estimate of the node (`raw_value`).

    `visits`, `values` (mean returns) and `prior` are float64[n]; `node_value` is the mean return.
    """

    visits: FloatArray
    values: FloatArray
    prior: FloatArray
    node_visits: float
    node_value: float | None = None
    raw_value: float | None = None


def puct_scores(children: Children, c_puct: float = 1.25) -> FloatArray:
    """PUCT scores: rescaled values, plus a bonus for high priors and low visit counts.

    `value + c x prior x sqrt(N) / (1 + n)` with visits N of the node and n of the child, and
    `c = c_puct + log((N + 19653) / 19652)`. Sources: Schrittwieser et al., 2020, appendix B; mctx,
    `muzero_action_selection`. Deviation: ties go to the first child, not to a random one.
    """
    visits = children.node_visits
    c = c_puct + math.log((visits + _C_BASE + 1) / _C_BASE)
    bonus = c * math.sqrt(visits) * children.prior / (1 + children.visits)
    return rescaled_values(children) + bonus


def rescaled_values(children: Children) -> FloatArray:
    """Values rescaled to [0, 1] by the minimum and maximum over the node and its children.

    A child without visits gets 0. Source: mctx, `qtransform_by_parent_and_siblings`.
    """
    seen = children.visits > 0
    known = list(children.values[seen])
    if children.node_value is not None:
        known.append(children.node_value)
    if not known:
        return np.zeros(len(children.visits))
    low, high = min(known), max(known)
    completed = np.where(seen, children.values, low)
    return np.asarray((completed - low) / max(high - low, _EPSILON))


def completed_values(children: Children) -> FloatArray:
    """Completed values, scaled to be added to logits.

    A child without visits gets the mixed value: the average of the node's own estimate (weight 1; 0
    if it has none) and the visited children's prior-weighted mean value (weight: the sum of their
    visits). The values are rescaled to [0, 1] and multiplied by (50 + the largest visit
    count) x 0.1. Source: Danihelka et al., 2022, section 3.4 and appendix D; mctx,
    `qtransform_completed_by_mix_value`.
    """
    seen = children.visits > 0
    values = np.where(seen, children.values, _mixed_value(children))
    low, high = values.min(), values.max()
    scale = _VALUE_SCALE * (_MAXVISIT_INIT + children.visits.max())
    return np.asarray(scale * (values - low) / max(high - low, _EPSILON))


def _mixed_value(children: Children) -> float:
    seen = children.visits > 0
    own = 0.0 if children.raw_value is None else children.raw_value
    if not seen.any():
        return own
    prior = np.maximum(children.prior[seen], np.finfo(float).tiny)
    weighted = float(np.average(children.values[seen], weights=prior))
    if children.raw_value is None:
        return weighted
    count = float(children.visits.sum())
    return (own + count * weighted) / (count + 1)


def gumbel_interior_scores(children: Children) -> FloatArray:
    """Difference between the improved policy and each child's share of the visits.

    `softmax(log prior + completed values) - n / (1 + sum of n)`. Source: Danihelka et al., 2022,
    section 5; mctx, `gumbel_muzero_interior_action_selection`.
    """
    logits = np.log(np.maximum(children.prior, np.finfo(float).tiny)) + completed_values(children)
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum() - children.visits / (1 + children.visits.sum()))


def gumbel_root_scores(
    children: Children, perturbed: FloatArray, counts: FloatArray, considered: int
) -> FloatArray:
    """Perturbed log-priors plus completed values; minus infinity unless `counts == considered`.

    `counts` are the visits within this decision. Source: Danihelka et al., 2022, algorithm 1; mctx,
    `score_considered`.
    """
    return np.where(counts == considered, perturbed + completed_values(children), -np.inf)


def considered_visits(num_considered: int, num_simulations: int) -> tuple[int, ...]:
    """Schedule of sequential halving: for each simulation, the visit count to consider.

    Each simulation visits the best child among those with exactly that many visits: first all
    children equally often, then the better half, and so on, down to two. Source: Karnin et al.,
    "Almost Optimal Exploration in Multi-Armed Bandits", 2013; mctx,
    `seq_halving.get_sequence_of_considered_visits`.

    Example:
        >>> considered_visits(4, 12)  # four children once, then two of them four times
        (0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4)
    """
    if num_considered < 2:
        return tuple(range(num_simulations))
    phases = math.ceil(math.log2(num_considered))
    going, visits = num_considered, 0
    schedule: list[int] = []
    while len(schedule) < num_simulations:
        for _ in range(max(1, int(num_simulations / (phases * going)))):
            schedule += [visits] * going
            visits += 1
        going = max(2, going // 2)
    return tuple(schedule[:num_simulations])


def perturbed_log_priors(copies: Sequence[int], rng: np.random.Generator) -> FloatArray:
    """Log-priors plus Gumbel noise, computed from samples of the chunks alone.

    In a Poisson process of draws (rate 1), a chunk with probability p(a) first arrives after an
    exponential time with rate p(a), whose logarithm is distributed as `-(log p(a) + g(a))`
    (Maddison et al., "A* Sampling", 2014). Samples alone therefore give exact Gumbel-top-k.
    `copies` has the number of draws of each chunk, at least 1; their order is drawn here.
    """
    order = rng.permutation(np.repeat(np.arange(len(copies)), copies))
    times = np.cumsum(rng.exponential(size=len(order)))
    _, first = np.unique(order, return_index=True)
    return np.asarray(-np.log(times[first]))


def widened(visits: float, factor: float, power: float) -> int:
    """Maximum number of chunks of a node: `ceil(factor x visits ^ power)`, at least 1.

    Source: Chaslot et al., "Progressive Strategies for Monte-Carlo Tree Search", 2008. The next
    action is sampled, as in Couëtoux et al., "Continuous Upper Confidence Trees", 2011.
    """
    return max(1, math.ceil(factor * visits**power))

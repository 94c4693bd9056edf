"""The one search under all planners: expand, evaluate, stay within the budget, finish.

A planner says which nodes get how many children of what length (`Expansion`); everything else is
here. So every planner keeps its budget, ends with a complete and scored response, and leaves a tree
that can be looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, replace

from mbrl_text_env.agents.base import affordable, is_binding
from mbrl_text_env.agents.driver import ask, ask_for_chunks
from mbrl_text_env.agents.tree import Node, SearchTree
from mbrl_text_env.language_models.base import LanguageModel, SampleRequest, SamplingParams
from mbrl_text_env.rewards.base import (
    RewardModel,
    reward_model_of,
    reward_usage_bound,
    score_responses,
)
from mbrl_text_env.types import Chunk, Ledger, TextState, Usage, response_limit, transition
from mbrl_text_env.values import (
    ValueModel,
    expected_value_usage,
    predict_values,
    value_usage_bound,
)


@dataclass(frozen=True)
class Expansion:
    """Children that a node is to get.

    Args:
        node: A node that has not ended.
        count: Chunks to draw, at least 1.
        tokens: Most tokens of a chunk; None draws to the end of the response.
        params: How they are drawn; None for the search's own.
        valued: Whether partial responses among them are valued.
    """

    node: Node
    count: int = 1
    tokens: int | None = None
    params: SamplingParams | None = None
    valued: bool = True


@dataclass(eq=False)
class Search:
    """One state's search: a tree, what evaluates its nodes, and the ledger that pays for it.

    Args:
        state: Where it starts; it has not ended.
        language_model: Draws chunks.
        reward_model: Scores complete responses.
        value_model: Estimates the final reward of partial ones; None leaves them without.
        ledger: Charged for everything.
        seed: All chunks follow from it, their node's tokens and their number.
        params: How chunks are drawn.
        max_response_tokens: Token limit of a response.

    Attributes:
        tree: What was found so far.
        drawn: Chunks drawn so far, repetitions included.
        round: Rounds of planning before this one.
        limit: Most tokens of a response to this prompt.
        is_capped: Whether the budget ends a search that goes on and on.
        is_short: Whether the budget did not allow all that was asked for in this round.

    Example:
        >>> async def greedy(search):  # two candidates a chunk, the better one is kept
        ...     frontier = [search.tree.root]
        ...     while frontier:
        ...         [row] = await search.expand([Expansion(frontier[0], 2, tokens=16)])
        ...         frontier = search.ranked(row)[:1]
    """

    state: InitVar[TextState]
    language_model: LanguageModel
    reward_model: RewardModel
    value_model: ValueModel | None
    _: KW_ONLY
    ledger: Ledger
    seed: int
    params: SamplingParams
    max_response_tokens: InitVar[int]

    def __post_init__(self, state: TextState, max_response_tokens: int) -> None:
        self.tree = SearchTree(state)
        self.reward_model = reward_model_of(self.reward_model)
        self.drawn = self.round = 0
        self.is_short = False
        self._scores: dict[tuple[int, ...], tuple[float, dict[str, float]]] = {}
        self.limit = response_limit(state, self.language_model, max_response_tokens)
        self.is_capped = is_binding(self.ledger.budget, self.finish_usage(self.tree.root))

    def room(self, node: Node) -> int:
        """Tokens that a node's response can still have; 0 where it has ended."""
        return 0 if node.is_terminal else max(0, self.limit - len(node.state.response_ids))

    async def expand(self, expansions: Iterable[Expansion]) -> list[list[Node]]:
        """Draw chunks, add what they lead to, score what is complete and value the rest.

        Where the budget does not allow all of it, every expansion gets fewer chunks, and then the
        last ones get none. As long as there is no complete response, what finishing one takes is
        kept back.

        Returns:
            The children drawn for each expansion, at most `count`; one that was drawn twice stands
            there twice.
        """
        wanted = list(expansions)
        counts = self._affordable_counts(wanted)
        self.is_short |= sum(counts) < sum(expansion.count for expansion in wanted)
        rows: list[list[Node]] = [[] for _ in wanted]
        places = [i for i, count in enumerate(counts) if count]
        if not places:
            return rows
        drawn = await self._chunks([(wanted[i], counts[i]) for i in places])
        for i, chunks in zip(places, drawn, strict=True):
            rows[i] = [self._added(wanted[i].node, chunk) for chunk in chunks]
        self.drawn += sum(map(len, rows))
        await self.evaluate(
            node
            for expansion, row in zip(wanted, rows, strict=True)
            for node in row
            if expansion.valued or node.is_terminal
        )
        return rows

    async def evaluate(self, nodes: Iterable[Node]) -> None:
        """Score the complete responses and value the partial ones that are not evaluated yet."""
        new = [node for node in dict.fromkeys(nodes) if node.worth is None]
        await self._score([node for node in new if node.is_terminal])
        unfinished = partial(new)
        if unfinished and self.value_model is not None:
            estimate = await ask(
                predict_values,
                self.value_model,
                states=[node.state for node in unfinished],
                ledgers=[self.ledger] * len(unfinished),
            )
            for i, node in enumerate(unfinished):
                node.value, node.std = float(estimate.mean[i]), float(estimate.std[i])

    def ranked(self, nodes: Iterable[Node]) -> list[Node]:
        """The partial responses among `nodes`, each once, those of highest value first."""
        return sorted(partial(nodes), key=_value, reverse=True)

    async def finish(self) -> Node:
        """Return the best complete response.

        If there is none, the best partial one is finished, and what the budget still allows is
        spent as best-of-N would: values may have cost more than it held, and left most of it.
        """
        root = self.tree.root
        if self.tree.best() is None:
            node = self._most_promising()
            [[chunk]] = await self._chunks([(Expansion(node), 1)])
            await self.evaluate([self._added(node, chunk)])
            rows: list[list[Node]] = [[node]]
            while any(rows) and (count := self.width(root, None)):
                rows = await self.expand([Expansion(root, count)])
        best = self.tree.best()
        assert best is not None
        best.note = "best complete response"
        self.tree.chosen = best
        return best

    def has_reached(self, target: float | None) -> bool:
        """Whether a complete response scores at least `target`; False where that is None."""
        best = self.tree.best()
        if target is None or best is None or best.score is None:
            return False
        return best.score >= target

    def width(self, node: Node, tokens: int | None, at_most: int = 4096) -> int | None:
        """About how many candidates a chunk the budget allows from a node to the end.

        None where no cap says: there is none, or only one on seconds.

        Args:
            node: Where the candidates start.
            tokens: Tokens of a chunk, each of which is evaluated; None for whole responses.
            at_most: The largest answer wanted.
        """
        path = self.path_usage(node, tokens)
        caps = vars(self.ledger.budget)
        counted = (name for name, amount in path.capped.items() if amount > 0 and name != "seconds")
        if not self.is_capped or all(caps[name] is None for name in counted):
            return None
        count = affordable(self.ledger, lambda count: path * count, at_most)
        self.is_short |= not count
        return count

    def path_usage(self, node: Node, tokens: int | None) -> Usage:
        """About what one response is charged that goes on from a node in chunks of `tokens`."""
        room, new = self.room(node), self._drawing_usage(node)
        lengths = range(tokens or room, room, tokens or room)
        if self.value_model is not None and lengths:
            # What a value takes grows about evenly with the length: the ends tell of all.
            half = len(lengths) // 2
            for at, count in ((0, len(lengths) - half), (-1, half)):
                state = _stand_in(node.state, lengths[at])
                new += expected_value_usage(self.value_model, state) * count
        complete = _stand_in(node.state, room)
        text = self.language_model.decode(complete.response_ids)
        return new + self.reward_model.usage(complete.prompt, text)

    def value_tokens(self, node: Node) -> float:
        """About what valuing a partial response after a node costs, in generated tokens.

        0 without a value model, or where one of the two says nothing of its FLOPs.
        """
        room, drawing = self.room(node), self._drawing_usage(node).flops
        if self.value_model is None or not drawing > 0:
            return 0.0
        halfway = _stand_in(node.state, room // 2)
        return expected_value_usage(self.value_model, halfway).flops * room / drawing

    def finish_usage(self, node: Node) -> Usage:
        """The most that finishing a node's response and scoring it is charged."""
        return self._finish_usage(node.state, self.room(node))

    async def _score(self, complete: Sequence[Node]) -> None:
        """Score complete responses; one that was reached before on another way is known."""
        by_ids: dict[tuple[int, ...], list[Node]] = {}
        for node in complete:
            by_ids.setdefault(node.state.response_ids, []).append(node)
        new = [ids for ids in by_ids if ids not in self._scores]
        if new:
            scores = await ask(
                score_responses,
                self.reward_model,
                prompts=[self.tree.root.state.prompt] * len(new),
                responses=[self.language_model.decode(ids) for ids in new],
                ledgers=[self.ledger] * len(new),
            )
            for i, ids in enumerate(new):
                self._scores[ids] = float(scores.total[i]), scores.parts_of(i)
        for ids, nodes in by_ids.items():
            for node in nodes:
                node.score, node.parts = self._scores[ids]

    async def _chunks(self, counted: Sequence[tuple[Expansion, int]]) -> list[list[Chunk]]:
        """Draw so many chunks for each; no chunk number of a node is asked for twice."""
        first = {expansion.node: expansion.node.samples for expansion, _ in counted}
        requests = []
        for expansion, count in counted:
            node, length, params = expansion.node, self._length(expansion), self._params(expansion)
            requests.append(
                SampleRequest(node.state, count, length, self.seed, first[node], params)
            )
            first[node] += count
        ledgers = [self.ledger] * len(requests)
        rows: list[list[Chunk]] = await ask_for_chunks(self.language_model, requests, ledgers)
        return rows

    def _added(self, node: Node, chunk: Chunk) -> Node:
        return self.tree.add(node, chunk, transition(node.state, chunk, self.limit))

    def _params(self, expansion: Expansion) -> SamplingParams:
        """How an expansion is drawn; a stop text ends a chunk, but nothing drawn to the end."""
        params = self.params if expansion.params is None else expansion.params
        return params if expansion.tokens is not None else replace(params, stop=())

    def _affordable_counts(self, wanted: Sequence[Expansion]) -> list[int]:
        def capped(cap: int) -> list[int]:
            return [min(expansion.count, cap) for expansion in wanted]

        def leading(number: int) -> list[int]:
            return [1 if i < number else 0 for i in range(len(wanted))]

        most = max((expansion.count for expansion in wanted), default=0)
        cap = affordable(self.ledger, lambda c: self._cost(wanted, capped(c)), most)
        if cap:
            return capped(cap)
        number = affordable(self.ledger, lambda n: self._cost(wanted, leading(n)), len(wanted))
        return leading(number)

    def _cost(self, wanted: Sequence[Expansion], counts: Sequence[int]) -> Usage:
        """The most that drawing and evaluating is charged, and finishing one response after it."""
        total, reserve = Usage(), None
        for expansion, count in zip(wanted, counts, strict=True):
            if not count:
                continue
            node, length = expansion.node, self._length(expansion)
            total += self.language_model.usage_bound(_size(node.state), [length] * count)
            total += self._evaluation_bound(expansion) * count
            left = self._finish_usage(_stand_in(node.state, length), self.room(node) - length)
            if reserve is None or left.generated_tokens < reserve.generated_tokens:
                reserve = left
        if reserve is None or self.tree.best() is not None:
            return total
        return total + reserve

    def _evaluation_bound(self, expansion: Expansion) -> Usage:
        """The most that evaluating one child is charged: a score if it ends, or else a value."""
        bound = reward_usage_bound(self.reward_model)
        length = self._length(expansion)
        if self.value_model is None or not expansion.valued or length == self.room(expansion.node):
            return bound
        # A stop text can end a chunk after its first token, and what is left to roll out is longer.
        lengths = (1, length) if self._params(expansion).stop else (length,)
        for tokens in lengths:
            after = _stand_in(expansion.node.state, tokens)
            bound = bound.maximum(value_usage_bound(self.value_model, after))
        return bound

    def _finish_usage(self, state: TextState, room: int) -> Usage:
        if room <= 0:
            return Usage()
        usage = self.language_model.usage_bound(_size(state), [room])
        return usage + reward_usage_bound(self.reward_model)

    def _drawing_usage(self, node: Node) -> Usage:
        """What drawing the rest of a response is charged, its prefix left out."""
        usage, prefix = self.language_model.usage_bound, _size(node.state)
        return usage(prefix, [self.room(node)]) - usage(prefix, [])

    def _length(self, expansion: Expansion) -> int:
        room = self.room(expansion.node)
        return room if expansion.tokens is None else min(expansion.tokens, room)

    def _most_promising(self) -> Node:
        """The partial response of highest value that can be finished within the budget."""
        nodes = [node for node in self.tree.nodes if not node.is_terminal]
        for node in sorted(nodes, key=lambda n: (_value(n), n.depth), reverse=True):
            if self.ledger.affords(self.finish_usage(node)):
                return node
        # Time has run out: the nearest end.
        return min(nodes, key=self.room)


def partial(nodes: Iterable[Node]) -> list[Node]:
    """The responses among `nodes` that have not ended, each once."""
    return [node for node in dict.fromkeys(nodes) if not node.is_terminal]


def shares(total: int, count: int) -> list[int]:
    """`total` in `count` parts that differ by at most 1, the larger ones first.

    Example:
        >>> shares(5, 3)
        [2, 2, 1]
    """
    each, more = divmod(total, count)
    return [each + (i < more) for i in range(count)]


def _value(node: Node) -> float:
    return float("-inf") if node.value is None else node.value


def _size(state: TextState) -> int:
    return len(state.prompt_ids) + len(state.response_ids)


def _stand_in(state: TextState, new_tokens: int) -> TextState:
    """A state with as many more tokens, for costs: the prompt's, for they decode to real text."""
    source = state.prompt_ids or (0,)
    repeats = -(-new_tokens // len(source))
    ids = (source * repeats)[:new_tokens]
    return TextState(state.prompt, state.prompt_ids, state.response_ids + ids)

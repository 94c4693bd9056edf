"""Planners: agents that search a tree of chunks from each state, in rounds.

A planner chooses which nodes to expand, with how many chunks of what length (`Expansion`). `Search`
samples and evaluates the chunks, enforces the budget, and returns a complete, scored response.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field, replace
from typing import Any

from mbrl_text_env.agents.base import Agent, Completion, Generation
from mbrl_text_env.agents.driver import MOST_AT_ONCE, ONE_AT_A_TIME, ask, ask_for_chunks
from mbrl_text_env.agents.tree import Node, SearchTree, partial
from mbrl_text_env.language_models.base import (
    Guard,
    LanguageModel,
    SampleRequest,
    SamplingParams,
    prefix_of,
)
from mbrl_text_env.mdp import is_terminal, response_limit, transition
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import (
    RewardError,
    RewardModel,
    Scores,
    check_bounds,
    reward_bounds,
    reward_model_of,
    reward_usage_bound,
    score_responses,
)
from mbrl_text_env.types import Budget, Chunk, Ledger, Prompt, TextState, Usage
from mbrl_text_env.values import (
    ValueModel,
    check_value_fits,
    expected_value_usage,
    predict_values,
    value_usage_bound,
)

# A search stops after this many consecutive chunks that add no new state, or this many times the
# chunks drawn before them. New states can be rare and still worth the cost.
_PATIENCE = 64
_PERSISTENCE = 8
# With fewer concurrent searches, batches would be too small, whatever the cache size.
_FEWEST_AT_ONCE = 8


@dataclass(frozen=True)
class Expansion:
    """A request to sample `count` chunks from a non-terminal node.

    If `scored` is false, complete responses are valued like partial ones, and the cost of one score
    is reserved. `Search.evaluate` scores them later.
    """

    node: Node
    count: int = 1
    tokens: int | None = None  # maximum chunk length; None samples to the end of the response
    params: SamplingParams | None = None  # None uses the search's own
    valued: bool = True  # whether to value partial responses
    scored: bool = True
    guard: Guard | None = None  # rejects texts while they are sampled


@dataclass(eq=False)
class Search:
    """A search from a non-terminal state: the tree, the models that evaluate it, and the ledger.

    Attributes:
        drawn: Chunks sampled so far, including repetitions.
        round: Completed planning rounds.
        limit: Maximum number of tokens in a response to this prompt.
        is_capped: Whether the budget ends a search that would otherwise run forever.
        is_short: Whether the budget did not allow everything requested in this round.
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
        self._scores: dict[str, tuple[float, dict[str, float]]] = {}
        self.limit = response_limit(state, self.language_model, max_response_tokens)
        self.is_capped = self.ledger.budget.ends(self.finish_usage(self.tree.root.state))

    def room(self, state: TextState) -> int:
        """Tokens left for a response from `state`; 0 if it has ended."""
        return 0 if is_terminal(state) else max(0, self.limit - len(state.response_ids))

    async def expand(self, expansions: Iterable[Expansion]) -> list[list[Node]]:
        """Sample chunks, add the new states, score complete responses and value partial ones.

        If the budget is too small, all expansions get fewer chunks; if it does not allow one each,
        the last expansions get none. The cost of finishing one response is reserved until there is
        a complete one. Returns the children per expansion; a chunk sampled twice appears twice.
        """
        wanted = list(expansions)
        counts = self._affordable_counts(wanted)
        self.is_short |= sum(counts) < sum(expansion.count for expansion in wanted)
        counted = list(zip(wanted, counts, strict=True))
        drawn = iter(
            await self._chunks([pair for pair in counted if pair[1]]) if any(counts) else ()
        )
        rows = [
            [self._added(expansion.node, chunk) for chunk in next(drawn)] if count else []
            for expansion, count in counted
        ]
        self.drawn += sum(map(len, rows))
        pairs = [(each, node) for each, row in zip(wanted, rows, strict=True) for node in row]
        due = [(each, node) for each, node in pairs if each.valued or node.is_terminal]
        for scored in (True, False):
            new = [node for each, node in due if each.scored == scored]
            await self.evaluate(new, scored=scored)
        return rows

    async def evaluate(self, nodes: Iterable[Node], *, scored: bool = True) -> None:
        """Score complete responses (if `scored`) and value all other nodes, each node once."""
        new = [node for node in dict.fromkeys(nodes) if node.score is None]
        await self._score([node for node in new if scored and node.is_terminal])
        unfinished = [node for node in new if node.worth is None]
        if unfinished and self.value_model is not None:
            estimate = await ask(
                predict_values,
                self.value_model,
                states=[node.state for node in unfinished],
                ledgers=[self.ledger] * len(unfinished),
            )
            for i, node in enumerate(unfinished):
                node.value, node.std = float(estimate.mean[i]), float(estimate.std[i])
                node.details = {name: rows[i].tolist() for name, rows in estimate.details.items()}

    def ranked(self, nodes: Iterable[Node]) -> list[Node]:
        """Return the distinct partial responses among `nodes`, highest value first."""
        return sorted(partial(nodes), key=value_of, reverse=True)

    async def finish(self) -> Node:
        """Return the best complete response; if there is none yet, finish the best partial one."""
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
        """Whether a complete response scores at least `target`; False if `target` is None."""
        best = self.tree.best()
        return target is not None and best is not None and (best.score or 0.0) >= target

    def width(self, node: Node, tokens: int | None, *, scored: bool = True) -> int | None:
        """Estimate how many candidates per chunk the budget allows until the end, at most 4096.

        Returns None if only seconds are capped, or nothing. Each chunk of `tokens` is evaluated;
        `tokens=None` means whole responses. If `scored` is false, one response in total is scored.
        """
        room, path = self.room(node.state), self.drawing_usage(node.state)
        lengths = range(tokens or room, room, tokens or room)
        if self.value_model is not None and lengths:
            # The cost of a value is about linear in the length, so two lengths are enough.
            half = len(lengths) // 2
            for at, count in ((0, len(lengths) - half), (-1, half)):
                state = stand_in(node.state, lengths[at])
                path += expected_value_usage(self.value_model, state) * count
        complete = stand_in(node.state, room)
        text = self.language_model.decode(complete.response_ids)
        once = self.reward_model.usage(complete.prompt, text)
        caps, whole = vars(self.ledger.budget), path + once
        if scored:
            path, once = whole, Usage()
        counted = (
            name for name, amount in whole.capped.items() if amount > 0 and name != "seconds"
        )
        if not self.is_capped or all(caps[name] is None for name in counted):
            return None
        count = affordable(self.ledger, lambda count: path * count + once * min(count, 1), 4096)
        self.is_short |= not count
        return count

    def value_tokens(self, node: Node) -> float:
        """Estimated cost of valuing a response after `node`, in generated tokens; 0 if unknown."""
        room, drawing = self.room(node.state), self.drawing_usage(node.state).flops
        if self.value_model is None or not drawing > 0:
            return 0.0
        halfway = stand_in(node.state, room // 2)
        return expected_value_usage(self.value_model, halfway).flops * room / drawing

    def finish_usage(self, state: TextState) -> Usage:
        """Upper bound on the usage charged to finish and score a response."""
        if not (room := self.room(state)):
            return Usage()
        usage = self.language_model.usage_bound(len(prefix_of(state)), [room])
        return usage + reward_usage_bound(self.reward_model)

    async def _score(self, complete: Sequence[Node]) -> None:
        """Score complete responses; a text is scored once."""
        texts = [self.language_model.decode(node.state.response_ids) for node in complete]
        new = [text for text in dict.fromkeys(texts) if text not in self._scores]
        if new:
            scores = await ask(
                score_responses,
                self.reward_model,
                prompts=[self.tree.root.state.prompt] * len(new),
                responses=new,
                ledgers=[self.ledger] * len(new),
            )
            self._known(new, scores)
        for node, text in zip(complete, texts, strict=True):
            node.score, node.parts = self._scores[text]

    def most_reachable(self) -> float:
        """Upper bound on the score of a response from the root; infinite if unknown."""
        root = self.tree.root.state
        text = self.language_model.decode(root.response_ids)
        return float(reward_bounds(self.reward_model, [root.prompt], [text])[0])

    def score_of(self, text: str) -> float | None:
        """Return the score of a response text. It is charged the first time.

        Returns None if the budget does not allow it in addition to one more response, and minus
        infinity if scoring fails.
        """
        prompt = self.tree.root.state.prompt
        if text not in self._scores:
            keep = self.finish_usage(self.tree.root.state)
            if not self.ledger.affords(self.reward_model.usage(prompt, text) + keep):
                return None
            try:
                # Guards call this from inside the language model, in any thread.
                with ONE_AT_A_TIME:
                    found = score_responses(
                        self.reward_model, [prompt], [text], ledgers=[self.ledger]
                    )
            except RewardError:
                return -math.inf
            self._known([text], found)
        return self._scores[text][0]

    def _known(self, texts: Sequence[str], scores: Scores) -> None:
        prompts = [self.tree.root.state.prompt] * len(texts)
        check_bounds(self.reward_model, prompts, texts, scores.total)
        for i, text in enumerate(texts):
            self._scores[text] = float(scores.total[i]), scores.parts_of(i)

    async def _chunks(self, counted: Sequence[tuple[Expansion, int]]) -> list[list[Chunk]]:
        """Sample chunks for each expansion; a sample index of a node is never reused."""
        first = {expansion.node: expansion.node.samples for expansion, _ in counted}
        requests = []
        for each, count in counted:
            state, length, start = each.node.state, self._length(each), first[each.node]
            params = self._params(each)
            requests.append(
                SampleRequest(state, count, length, self.seed, start, params, each.guard)
            )
            first[each.node] += count
        ledgers = [self.ledger] * len(requests)
        rows: list[list[Chunk]] = await ask_for_chunks(self.language_model, requests, ledgers)
        return rows

    async def append(self, node: Node, chunk: Chunk) -> Node:
        """Add a chunk that was not sampled; score it if it ends the response."""
        child = self._added(node, chunk)
        await self.evaluate([child] if child.is_terminal else [])
        return child

    def _added(self, node: Node, chunk: Chunk) -> Node:
        return self.tree.add(node, chunk, transition(node.state, chunk, self.limit))

    def _params(self, expansion: Expansion) -> SamplingParams:
        """Sampling parameters; stop texts end chunks, but not responses sampled to the end."""
        params = self.params if expansion.params is None else expansion.params
        return params if expansion.tokens is not None else replace(params, stop=())

    def _affordable_counts(self, wanted: Sequence[Expansion]) -> list[int]:
        def capped(cap: int) -> list[int]:
            return [min(expansion.count, cap) for expansion in wanted]

        def leading(number: int) -> list[int]:
            return [int(i < number) for i in range(len(wanted))]

        most = max((expansion.count for expansion in wanted), default=0)
        cap = affordable(self.ledger, lambda c: self._cost(wanted, capped(c)), most)
        if cap:
            return capped(cap)
        count = len(wanted)
        return leading(affordable(self.ledger, lambda n: self._cost(wanted, leading(n)), count))

    def _cost(self, wanted: Sequence[Expansion], counts: Sequence[int]) -> Usage:
        """Upper bound on sampling and evaluating, plus finishing one response afterwards."""
        total, ends = Usage(), []
        for expansion, count in zip(wanted, counts, strict=True):
            if count:
                state, length = expansion.node.state, self._length(expansion)
                prefix = len(prefix_of(state))
                total += self.language_model.usage_bound(prefix, [length] * count)
                total += self._evaluation_bound(expansion) * count
                ends.append(self.finish_usage(stand_in(state, length)))
                if not expansion.scored:
                    # At the end too: `evaluate` scores these separately.
                    ends[-1] = ends[-1].maximum(reward_usage_bound(self.reward_model))
        if not ends or self.tree.best() is not None:
            return total
        return total + min(ends, key=lambda usage: usage.generated_tokens)

    def _evaluation_bound(self, expansion: Expansion) -> Usage:
        """Upper bound on evaluating one child: a score if it ends the response, else a value."""
        bound, length = reward_usage_bound(self.reward_model), self._length(expansion)
        state = expansion.node.state
        if self.value_model is not None and not expansion.scored:
            bound = Usage()
        elif self.value_model is None or not expansion.valued or length == self.room(state):
            return bound
        # A stop text can end a chunk after one token, which leaves a longer rollout.
        for tokens in {length, 1} if self._params(expansion).stop else {length}:
            after = value_usage_bound(self.value_model, stand_in(state, tokens))
            bound = bound.maximum(after)
        return bound

    def drawing_usage(self, state: TextState) -> Usage:
        """Usage of sampling the rest of a response, without its prefix."""
        usage, prefix = self.language_model.usage_bound, len(prefix_of(state))
        return usage(prefix, [self.room(state)]) - usage(prefix, [])

    def _length(self, expansion: Expansion) -> int:
        room = self.room(expansion.node.state)
        return room if expansion.tokens is None else min(expansion.tokens, room)

    def _most_promising(self) -> Node:
        """Return the partial response of highest value that the budget allows to finish."""
        nodes = [node for node in self.tree.nodes if not node.is_terminal]
        for node in sorted(nodes, key=lambda n: (value_of(n), n.depth), reverse=True):
            if self.ledger.affords(self.finish_usage(node.state)):
                return node
        # No time left: take the node closest to its end.
        return min(nodes, key=lambda node: self.room(node.state))


@dataclass(eq=False)
class Planner(Agent):
    """Base class of agents that search a tree; a subclass implements `plan`, one search round.

    Without a budget there is one round. With a budget, rounds continue in the same tree until the
    rest of the budget is too small for another response, or many consecutive chunks (64, or 8 times
    those before) add no new state. The answer is the best of all scored complete responses, so a
    misleading value wastes samples but never discards a better response.

    All planners take the arguments of `Agent`, with a required reward model, and a `value_model`
    that estimates the final reward of partial responses. A number out of range is a ValueError.

    Example:
        >>> class Deepening(Planner):  # sample three one-token chunks, finish the best one
        ...     name = "deepening"
        ...     async def plan(self, search):
        ...         [row] = await search.expand([Expansion(search.tree.root, 3, tokens=1)])
        ...         await search.expand(Expansion(node) for node in search.ranked(row)[:1])
    """

    reward_model: Any = field()
    value_model: ValueModel | None = None
    _watched: dict[TextState, SearchTree] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        # Reject None: planning needs a reward.
        self.reward_model = as_reward_model(self.reward_model)
        super().__post_init__()
        check_value_fits(self.value_model, self.language_model, self.reward_model)

    @abstractmethod
    async def plan(self, search: Search) -> None:
        """Run one round; `search.expand` returns fewer children once the budget is exhausted."""

    async def search(self, state: TextState, ledger: Ledger, seed: int) -> Completion:
        """Plan in rounds; see `Agent.search`."""
        search = Search(
            state,
            self.language_model,
            self.reward_model,
            self.values(),
            ledger=ledger,
            seed=seed,
            params=self.params,
            max_response_tokens=self.max_response_tokens,
        )
        idle, going = 0, True
        while going:
            known, drawn = len(search.tree.nodes), search.drawn
            search.is_short = False
            await self.plan(search)
            search.round += 1
            if search.is_capped and search.is_short and len(search.tree.nodes) == known:
                await search.expand([Expansion(search.tree.root)])
            new = search.drawn - drawn
            idle = 0 if len(search.tree.nodes) > known else idle + new
            patience = max(_PATIENCE, _PERSISTENCE * (search.drawn - idle))
            going = search.is_capped and new > 0 and idle < patience
        found = await search.finish()
        if self._watched is not None:
            self._watched[state] = search.tree
        return Completion(found.state, found.logprobs(), found.score, found.parts)

    def explore(
        self, prompts: Sequence[Prompt], budget: Budget | None = None, *, seed: int = 0
    ) -> list[tuple[Generation, SearchTree]]:
        """Run `generate` for distinct prompts and also return each search tree."""
        watched = copy.copy(self)
        watched._watched = {}
        generations = watched.generate(prompts, budget, seed=seed)
        trees = {state.prompt.id: tree for state, tree in watched._watched.items()}
        if twice := len(prompts) - len(trees):
            raise ValueError(
                f"explore: expected distinct prompts, got {twice} of {len(prompts)} more than "
                "once. Remove the duplicates."
            )
        return [(generation, trees[generation.prompt.id]) for generation in generations]

    def response_usage(self, state: TextState) -> Usage:
        """Upper bound on the usage charged for one scored response from `state`."""
        return super().response_usage(state) + reward_usage_bound(self.reward_model)

    def values(self) -> ValueModel | None:
        """The value model for partial responses, or None."""
        return self.value_model

    def _most_at_once(self, state: TextState, budget: Budget) -> int:
        """Searches whose prefixes fit in the cache together; more would evict each other's."""
        kept = self.language_model.cache_tokens
        prefix = len(prefix_of(state))
        caps: list[float] = [] if budget.tokens is None else [budget.tokens]
        if budget.flops is not None:
            usage = self.language_model.usage_bound
            each = (usage(prefix, [1]) - usage(prefix, [])).flops
            caps += [budget.flops / each] if each > 0 else []
        if not kept or not caps:
            return MOST_AT_ONCE
        return max(_FEWEST_AT_ONCE, min(MOST_AT_ONCE, int(kept / (prefix + min(caps)))))


def affordable(ledger: Ledger, cost: Callable[[int], Usage], at_most: int) -> int:
    """The largest count in [0, `at_most`] that the ledger affords; `cost` must be increasing."""
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if ledger.affords(cost(middle)) else (low, middle - 1)
    return low


def check_target(target: float | None) -> None:
    """Raise a ValueError if the target is NaN."""
    if target is not None and math.isnan(target):
        raise ValueError("target: expected a score, or None to spend the whole budget, got nan.")


def value_of(node: Node) -> float:
    """The node's estimated value; minus infinity if it has none."""
    return float("-inf") if node.value is None else node.value


def stand_in(state: TextState, new_tokens: int) -> TextState:
    """A longer state to estimate costs with; it repeats the prompt, which decodes to real text."""
    source = state.prompt_ids or (0,)
    repeats = -(-new_tokens // len(source))
    ids = (source * repeats)[:new_tokens]
    return TextState(state.prompt, state.prompt_ids, state.response_ids + ids)

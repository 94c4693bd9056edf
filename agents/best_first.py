"""Best-first search over tokens: complete answers in the order of their probability, each once."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from mbrl_text_env.agents.driver import ask
from mbrl_text_env.agents.search import (
    Expansion,
    Planner,
    Search,
    affordable,
    check_target,
    partial,
)
from mbrl_text_env.agents.tree import Node, SearchTree
from mbrl_text_env.language_models.base import (
    LanguageModel,
    NextTokens,
    SamplingParams,
    finish_reason,
    prefix_of,
    spawn_seed,
    stream,
)
from mbrl_text_env.mdp import transition
from mbrl_text_env.rewards.base import reward_bounds, reward_usage_bound
from mbrl_text_env.types import Chunk, FloatArray, Ledger, TextState, Usage, check_positive
from mbrl_text_env.values import ValueModel

# Answers where neither a budget nor a target ends the search.
_WITHOUT_BUDGET = 4
# Twice what rounding moves a fraction such as 3 of 3.
_SAME = 1e-9
# Keeps the perturbations apart from what else is drawn with the seed.
_PERTURBATION = 1
_GREEDY = SamplingParams(temperature=0)
_EXPANSION = Usage(generated_tokens=1)


@dataclass(eq=False, kw_only=True)
class BestFirst(Planner):
    """Score complete answers in the order of their probability, each once, until one is right.

    The most probable prefix is expanded by its most probable next tokens, again and again; an
    answer that has ended is scored when no prefix is more probable. It suits short answers: of long
    ones there are too many prefixes. Probabilities are the language model's own, at temperature 1;
    `params` are not used. An expansion counts as one generated token. Where a budget allows no
    further one and nothing has ended yet, the deepest prefix that can be is finished greedily.

    Prefixes whose bound is below the target, or not above the best score, are not expanded. With
    `stochastic`, answers are a sample without replacement, for `expected_score`.

    Sources: Hart et al., "A Formal Basis for the Heuristic Determination of Minimum Cost Paths",
    1968 (without a heuristic); Kool et al., "Stochastic Beams and Where to Find Them", 2019.
    Deviation from the latter: a priority queue instead of a beam, so that the sample's size need
    not be known beforehand, as in Kool et al., "Ancestral Gumbel-Top-k Sampling", 2020.

    Args:
        n: Different answers that are scored; None takes as many as the budget allows, or 4.
        target: The score that is good enough; None is the most that the reward's bound allows, and
            no end of a stochastic search.
        candidates: Next tokens of a prefix that are looked at, the most probable ones.
        batch_size: Prefixes that are expanded in one call; some then needlessly.
        expansions: Prefixes that are expanded where no cap on tokens, FLOPs or seconds says.

    Raises:
        ValueError: The language model has no `next_tokens`, or a number is out of range.

    Example:
        >>> from mbrl_text_env.language_models import TableLM
        >>> from mbrl_text_env.types import Prompt
        >>> lm = TableLM("ab", {"": [0.1, 0.5, 0.4], "a": [0.3, 0.4, 0.3], "b": [0.9, 0.1, 0.0]})
        >>> planner = BestFirst(lm, lambda prompt, text: len(text), n=1, max_response_tokens=2)
        >>> planner.generate([Prompt.from_text("a")])[0].text
        'b'
    """

    name = "best-first"

    n: int | None = None
    target: float | None = None
    candidates: int = 64
    batch_size: int = 1
    expansions: int = 1024
    stochastic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.target)
        counts = ("n", "candidates", "batch_size", "expansions")
        check_positive(**{name: getattr(self, name) for name in counts})
        if self.stochastic not in (0, 1):
            raise ValueError(f"stochastic: expected 0 or 1, got {self.stochastic!r}.")
        own = getattr(self.language_model, "next_tokens", None)
        if own is None or getattr(own, "__func__", None) is LanguageModel.next_tokens:
            raise ValueError(
                f"{self.name}: expected a language model that gives its most probable next tokens "
                f"(`next_tokens`), such as `TransformersLM`, got "
                f"{type(self.language_model).__name__}. Use another agent."
            )

    async def plan(self, search: Search) -> None:
        """Score answers in order until one reaches the target or the budget allows no more."""
        if search.round:
            return
        frontier = _Frontier(search, bool(self.stochastic))
        target, each = math.inf, self._expansion_bound(search.tree.root.state)
        if not self._only_samples:
            most = search.most_reachable()
            target = most if self.target is None else min(self.target, most)
        left = math.inf if search.ledger.budget.ends(each) else self.expansions
        wanted = _WITHOUT_BUDGET if self.n is None and not search.is_capped else self.n
        texts: set[str] = set()
        while frontier.entries and len(texts) != wanted and not search.has_reached(target - _SAME):
            if frontier.begins_with_answer:
                entry = frontier.pop()
                if self._is_dead(search, frontier.state(entry), target):
                    continue
                if not search.ledger.affords(reward_usage_bound(search.reward_model)):
                    break
                node = frontier.node(entry)
                await search.evaluate([node])
                texts.add(self._text(node.state))
                continue
            entries = self._most_probable(search, frontier, target)
            count = int(min(left, self._affordable(search, frontier, entries)))
            for entry in entries[count:]:
                frontier.push(entry)
            if count:
                left -= count
                await self._expand(search, frontier, entries[:count])
            elif entries and not await self._finished(search):
                break
        await self._finished(search)

    def values(self) -> ValueModel | None:
        """None: nothing is valued."""
        return None

    def _most_probable(self, search: Search, frontier: _Frontier, target: float) -> list[_Entry]:
        """The next prefixes to expand: those that come before any answer, dead ones left out."""
        found: list[_Entry] = []
        while frontier.entries and not frontier.begins_with_answer:
            if len(found) == self.batch_size:
                break
            entry = frontier.pop()
            if not self._is_dead(search, frontier.state(entry), target):
                found.append(entry)
        return found

    async def _expand(self, search: Search, frontier: _Frontier, entries: Sequence[_Entry]) -> None:
        nodes = [frontier.node(entry) for entry in entries]
        found = await ask(
            _next_tokens,
            self.language_model,
            min(self.candidates, self.language_model.vocab_size),
            states=[node.state for node in nodes],
            ledgers=[search.ledger] * len(nodes),
        )
        for entry, node, tokens in zip(entries, nodes, found, strict=True):
            frontier.add(entry, node, tokens)

    async def _finished(self, search: Search) -> bool:
        """Finish the deepest prefix that can be where there is no answer; whether one was."""
        nodes = sorted(partial(search.tree.nodes), key=attrgetter("depth"), reverse=True)
        for node in nodes if search.tree.best() is None else ():
            [row] = await search.expand([Expansion(node, params=_GREEDY, valued=False)])
            if row:
                return True
        return False

    def _affordable(self, search: Search, frontier: _Frontier, entries: Sequence[_Entry]) -> int:
        """How many of the prefixes the budget allows to expand, with an answer after them."""
        bounds = [self._expansion_bound(frontier.state(entry)) for entry in entries]
        kept = Usage()
        if entries and search.tree.best() is None:
            parent = entries[0].parent or search.tree.root
            kept = search.finish_usage(parent.state)
        return affordable(
            search.ledger, lambda count: sum(bounds[:count], start=kept), len(entries)
        )

    def _expansion_bound(self, state: TextState) -> Usage:
        """The most that an expansion is charged: nothing of its prefix may be kept any more."""
        return self.language_model.usage_bound(len(prefix_of(state)), []) + _EXPANSION

    @property
    def _only_samples(self) -> bool:
        """Whether nothing is looked for: answers that are left out would bias an estimate."""
        return bool(self.stochastic) and self.target is None

    def _is_dead(self, search: Search, state: TextState, target: float) -> bool:
        """Whether nothing that begins so reaches the target, or is better than what is known."""
        if self._only_samples:
            return False
        best = search.tree.best()
        [bound] = reward_bounds(search.reward_model, [state.prompt], [self._text(state)])
        least = -math.inf if best is None else best.score or 0.0
        return bool(bound < target - _SAME or bound <= least)

    def _text(self, state: TextState) -> str:
        return self.language_model.decode(state.response_ids)


def expected_score(tree: SearchTree) -> float:
    """Estimate the mean score of the language model's answers from a search without replacement.

    It is unbiased where nothing but `n` ended the search of `BestFirst(..., stochastic=True, n=n)`
    or pruned it, and `candidates` is the size of the vocabulary.

    Source: Kool et al., 2019, equation 15 (after Duffield et al., 2007, and Vieira, 2017).

    Raises:
        ValueError: The tree has fewer than two answers, or they were not sampled.

    Example:
        >>> planner = BestFirst(lm, reward, stochastic=True, n=9)  # doctest: +SKIP
        >>> [(_, tree)] = planner.explore([prompt])  # doctest: +SKIP
        >>> expected_score(tree)  # doctest: +SKIP
    """
    found = [node for node in tree.complete() if node.perturbed is not None]
    if len(found) < 2:
        raise ValueError(
            f"expected_score: expected two sampled answers at least, got {len(found)}. Search with "
            "`BestFirst(..., stochastic=True, n=2)` or more."
        )
    found.sort(key=lambda node: node.perturbed or 0.0, reverse=True)
    kappa = found.pop().perturbed or 0.0
    logs = np.array([sum(node.logprobs()) for node in found])
    scores = np.array([node.score for node in found], dtype=np.float64)
    # P(Gumbel(log p) > kappa), exact where it is tiny.
    included = -np.expm1(-np.exp(logs - kappa))
    return float(np.sum(np.exp(logs) / included * scores))


class _Entry(NamedTuple):
    """A prefix that waits; the least comes first, of equals the one that came first."""

    rank: float  # minus the log-probability, perturbed or not
    number: int
    logprob: float  # from the root
    parent: Node | None
    token: int
    token_logprob: float


class _Frontier:
    """The prefixes that wait, as a priority queue; those that are taken become nodes."""

    def __init__(self, search: Search, stochastic: bool) -> None:
        self._search, self._seed = search, spawn_seed(search.seed, _PERTURBATION)
        self._stochastic, self._number = stochastic, 0
        root = search.tree.root.state
        rank = -float(stream(self._seed, root, 1).gumbel()) if stochastic else 0.0
        self.entries = [_Entry(rank, 0, 0.0, None, -1, 0.0)]

    @property
    def begins_with_answer(self) -> bool:
        """Whether the first entry has ended."""
        first, ends = self.entries[0], self._search.language_model.stop_token_ids
        if first.parent is None:
            return False
        length = len(first.parent.state.response_ids) + 1
        return first.token in ends or length >= self._search.limit

    def pop(self) -> _Entry:
        return heapq.heappop(self.entries)

    def push(self, entry: _Entry) -> None:
        heapq.heappush(self.entries, entry)

    def state(self, entry: _Entry) -> TextState:
        if entry.parent is None:
            return self._search.tree.root.state
        return transition(entry.parent.state, self._chunk(entry), self._search.limit)

    def node(self, entry: _Entry) -> Node:
        """The node of a prefix that is taken, which is new."""
        if entry.parent is None:
            return self._search.tree.root
        node = self._search.tree.add(entry.parent, self._chunk(entry), self.state(entry))
        if self._stochastic:
            node.perturbed = -entry.rank
        return node

    def add(self, entry: _Entry, node: Node, tokens: NextTokens) -> None:
        """Push what a prefix is expanded by."""
        own = np.array(tokens.logprobs, dtype=np.float64)
        logs = entry.logprob + own
        ranks = -(self._perturbed(entry, node, own) if self._stochastic else logs)
        for i, token in enumerate(tokens.token_ids):
            if logs[i] > -math.inf:
                self._number += 1
                rank, log = float(ranks[i]), float(logs[i])
                self.push(_Entry(rank, self._number, log, node, token, tokens.logprobs[i]))

    def _chunk(self, entry: _Entry) -> Chunk:
        assert entry.parent is not None
        ids = (entry.token,)
        reason = finish_reason(self._search.language_model, entry.parent.state, ids)
        return Chunk(ids, (entry.token_logprob,), reason)

    def _perturbed(self, entry: _Entry, node: Node, own: FloatArray) -> FloatArray:
        """Perturbed log-probabilities of the children; the largest of all is their parent's."""
        # Tokens that are no candidates take their share of the maximum: nothing else may.
        rest = max(0.0, 1.0 - float(np.exp(own).sum()))
        with np.errstate(divide="ignore"):
            locations = entry.logprob + np.append(own, np.log(rest))
        free = stream(self._seed, node.state, 0).gumbel(size=len(locations)) + locations
        return conditioned(free, -entry.rank)[:-1]


def conditioned(gumbels: FloatArray, highest: float) -> FloatArray:
    """Independent Gumbel variables whose largest is `highest` (Kool et al., 2019, B.3)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        gaps = highest - gumbels + np.log1p(-np.exp(gumbels - gumbels.max()))
    return np.asarray(highest - np.maximum(0.0, gaps) - np.log1p(np.exp(-np.abs(gaps))))


def _next_tokens(
    language_model: LanguageModel, k: int, states: Sequence[TextState], ledgers: Sequence[Ledger]
) -> list[NextTokens]:
    """The most probable next tokens; an expansion counts as a generated token."""
    found = language_model.next_tokens(states, k, ledgers=ledgers)
    for ledger in ledgers:
        ledger.charge(_EXPANSION)
    return found

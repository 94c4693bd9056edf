"""Best-first search over tokens: complete answers in order of decreasing probability, each once."""

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

# Number of answers if neither a budget nor a target ends the search.
_WITHOUT_BUDGET = 4
# Twice the rounding error of a fraction such as 3 of 3.
_SAME = 1e-9
# Separates the perturbations from other random streams of the seed.
_PERTURBATION = 1
_GREEDY = SamplingParams(temperature=0)
_EXPANSION = Usage(generated_tokens=1)


@dataclass(eq=False, kw_only=True)
class BestFirst(Planner):
    """Score complete answers in order of decreasing probability until one reaches the target.

    The most probable prefix is expanded with its most probable next tokens. An answer that has
    ended is scored once no prefix is more probable. This suits short answers; long ones have too
    many prefixes. Probabilities are the language model's at temperature 1; `params` is ignored. An
    expansion counts as one generated token. If the budget runs out before any answer has ended, the
    deepest prefix that the budget allows is finished greedily.

    A prefix is not expanded if its bound is below the target, or not above the best score. With
    `stochastic`, answers are sampled without replacement, for `expected_score`.

    Sources: Hart et al., "A Formal Basis for the Heuristic Determination of Minimum Cost Paths",
    1968 (without a heuristic); Kool et al., "Stochastic Beams and Where to Find Them", 2019.
    Deviation from the latter: a priority queue replaces the beam, so the sample size need not be
    known in advance, as in Kool et al., "Ancestral Gumbel-Top-k Sampling", 2020.

    Args:
        n: Number of distinct answers to score. None uses the budget, or 4 without one.
        target: Score at which the search ends. None is the maximum that the reward's bound allows;
            a stochastic search then has no target.
        candidates: Number of most probable next tokens to consider per prefix.
        batch_size: Prefixes to expand per call. Larger batches expand some needlessly.
        expansions: Prefixes to expand if the budget caps neither tokens, FLOPs nor seconds.

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
                f"{self.name}: expected a language model with most probable next tokens "
                f"(`next_tokens`), such as `TransformersLM`, got "
                f"{type(self.language_model).__name__}. Use another agent."
            )

    async def plan(self, search: Search) -> None:
        """Score answers in order until one reaches the target or the budget is exhausted."""
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
        """None: this planner uses no values."""
        return None

    def _most_probable(self, search: Search, frontier: _Frontier, target: float) -> list[_Entry]:
        """Return the next prefixes to expand, up to the next answer, without dead ones."""
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
        """If there is no answer, finish the deepest affordable prefix; return whether one was."""
        nodes = sorted(partial(search.tree.nodes), key=attrgetter("depth"), reverse=True)
        for node in nodes if search.tree.best() is None else ():
            [row] = await search.expand([Expansion(node, params=_GREEDY, valued=False)])
            if row:
                return True
        return False

    def _affordable(self, search: Search, frontier: _Frontier, entries: Sequence[_Entry]) -> int:
        """Number of prefixes that the budget allows to expand, with an answer afterwards."""
        bounds = [self._expansion_bound(frontier.state(entry)) for entry in entries]
        kept = Usage()
        if entries and search.tree.best() is None:
            parent = entries[0].parent or search.tree.root
            kept = search.finish_usage(parent.state)
        return affordable(
            search.ledger, lambda count: sum(bounds[:count], start=kept), len(entries)
        )

    def _expansion_bound(self, state: TextState) -> Usage:
        """Upper bound on the usage of an expansion, if no part of the prefix is cached."""
        return self.language_model.usage_bound(len(prefix_of(state)), []) + _EXPANSION

    @property
    def _only_samples(self) -> bool:
        """Whether to estimate a mean without a target; skipping answers would then add bias."""
        return bool(self.stochastic) and self.target is None

    def _is_dead(self, search: Search, state: TextState, target: float) -> bool:
        """Whether no completion of the prefix can reach the target or improve the best score."""
        if self._only_samples:
            return False
        best = search.tree.best()
        [bound] = reward_bounds(search.reward_model, [state.prompt], [self._text(state)])
        least = -math.inf if best is None else best.score or 0.0
        return bool(bound < target - _SAME or bound <= least)

    def _text(self, state: TextState) -> str:
        return self.language_model.decode(state.response_ids)


def expected_score(tree: SearchTree) -> float:
    """Estimate the language model's mean score from a search without replacement.

    The estimate is unbiased if `BestFirst(..., stochastic=True, n=n)` ended because of `n` alone,
    without pruning, and `candidates` equals the vocabulary size.

    Source: Kool et al., 2019, equation 15 (after Duffield et al., 2007, and Vieira, 2017).

    Raises:
        ValueError: The tree has fewer than two answers, or the search was not stochastic.

    Example:
        >>> planner = BestFirst(lm, reward, stochastic=True, n=9)  # doctest: +SKIP
        >>> [(_, tree)] = planner.explore([prompt])  # doctest: +SKIP
        >>> expected_score(tree)  # doctest: +SKIP
    """
    found = [node for node in tree.complete() if node.perturbed is not None]
    if len(found) < 2:
        raise ValueError(
            f"expected_score: expected at least two sampled answers, got {len(found)}. Search with "
            "`BestFirst(..., stochastic=True, n=2)` or more."
        )
    found.sort(key=lambda node: node.perturbed or 0.0, reverse=True)
    kappa = found.pop().perturbed or 0.0
    logs = np.array([sum(node.logprobs()) for node in found])
    scores = np.array([node.score for node in found], dtype=np.float64)
    # P(Gumbel(log p) > kappa), accurate for tiny values.
    included = -np.expm1(-np.exp(logs - kappa))
    return float(np.sum(np.exp(logs) / included * scores))


class _Entry(NamedTuple):
    """A queued prefix. The lowest rank comes first; ties go to the earlier number."""

    rank: float  # minus the log-probability, perturbed or not
    number: int
    logprob: float  # from the root
    parent: Node | None
    token: int
    token_logprob: float


class _Frontier:
    """Priority queue of prefixes; a prefix becomes a node when it is taken."""

    def __init__(self, search: Search, stochastic: bool) -> None:
        self._search, self._seed = search, spawn_seed(search.seed, _PERTURBATION)
        self._stochastic, self._number = stochastic, 0
        root = search.tree.root.state
        rank = -float(stream(self._seed, root, 1).gumbel()) if stochastic else 0.0
        self.entries = [_Entry(rank, 0, 0.0, None, -1, 0.0)]

    @property
    def begins_with_answer(self) -> bool:
        """Whether the first entry is a complete answer."""
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
        """Create the node of a prefix that was taken from the queue."""
        if entry.parent is None:
            return self._search.tree.root
        node = self._search.tree.add(entry.parent, self._chunk(entry), self.state(entry))
        if self._stochastic:
            node.perturbed = -entry.rank
        return node

    def add(self, entry: _Entry, node: Node, tokens: NextTokens) -> None:
        """Push the expansions of a prefix."""
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
        """Perturbed log-probabilities of the children; their maximum is that of the parent."""
        # Tokens outside the candidates also compete for the maximum.
        rest = max(0.0, 1.0 - float(np.exp(own).sum()))
        with np.errstate(divide="ignore"):
            locations = entry.logprob + np.append(own, np.log(rest))
        free = stream(self._seed, node.state, 0).gumbel(size=len(locations)) + locations
        return conditioned(free, -entry.rank)[:-1]


def conditioned(gumbels: FloatArray, highest: float) -> FloatArray:
    """Independent Gumbel variables conditioned on their maximum (Kool et al., 2019, B.3)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        gaps = highest - gumbels + np.log1p(-np.exp(gumbels - gumbels.max()))
    return np.asarray(highest - np.maximum(0.0, gaps) - np.log1p(np.exp(-np.abs(gaps))))


def _next_tokens(
    language_model: LanguageModel, k: int, states: Sequence[TextState], ledgers: Sequence[Ledger]
) -> list[NextTokens]:
    """Return the most probable next tokens; an expansion counts as one generated token."""
    found = language_model.next_tokens(states, k, ledgers=ledgers)
    for ledger in ledgers:
        ledger.charge(_EXPANSION)
    return found

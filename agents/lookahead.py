"""Searches that look ahead and then decide: lookahead with a value, and a receding horizon."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mbrl_text_env.agents.beam import beam_search
from mbrl_text_env.agents.sampling import BestOfN
from mbrl_text_env.agents.search import Expansion, Planner, Search
from mbrl_text_env.agents.tree import Node
from mbrl_text_env.language_models.base import SamplingParams, prefix_of
from mbrl_text_env.rewards.base import reward_usage_bound
from mbrl_text_env.types import Usage, check_positive
from mbrl_text_env.values import ValueModel, value_usage_bound

PARTIAL_PARAMS = SamplingParams(temperature=0.9)
# Plans a step of a receding horizon where nobody says how many.
_WITHOUT_BUDGET = 4


@dataclass(eq=False, kw_only=True)
class Lookahead(Planner):
    """Two-stage lookahead with a value model.

    A round samples `num_partials` partial responses of `prefix_tokens`, lets the value model judge
    them, continues each of the best `keep` of them `continuations` times to the end, and lets the
    reward model choose: with the defaults and responses of 256 tokens, as much as best-of-4. With
    `chunkwise` there are as many stages as chunks, as in `BeamSearch` with a beam of `keep`.

    Source: "Model Based Reinforcement Learning: Tutorial & Examples" (Patronus AI). As there, an
    agent whose value model is missing or not fitted falls back to best-of-N. Deviations: a partial
    response is continued from its token ids; one that has ended by itself is not continued; where a
    response is not longer than `prefix_tokens`, the prefix is a quarter of it (the article's
    share); under a budget, rounds are repeated, the last ones with fewer branches.

    Args:
        value_model: Judges partial responses; None or unfitted for best-of-N.
        keep: Partial responses that are continued, at most `num_partials`.
        partial_params: How partial responses are drawn; `params` is for all else.
    """

    name = "lookahead"

    num_partials: int = 4
    prefix_tokens: int = 64
    keep: int = 2
    continuations: int = 2
    chunkwise: bool = False
    partial_params: SamplingParams = PARTIAL_PARAMS

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("num_partials", "prefix_tokens", "keep", "continuations")
        check_positive(**{name: getattr(self, name) for name in counts})
        if self.keep > self.num_partials:
            raise ValueError(
                f"keep: expected at most num_partials ({self.num_partials}), got {self.keep}."
            )

    async def plan(self, search: Search) -> None:
        """One round: the largest that the budget allows for certain."""
        if search.value_model is None:
            count = None if search.is_capped else self.num_partials
            await BestOfN(self.language_model, self.reward_model, n=count).plan(search)
            return
        if self.chunkwise:
            candidates = None if search.is_capped else self.num_partials
            await beam_search(search, self.chunk_tokens, self.keep, candidates)
            return
        root = search.tree.root
        counts = self._affordable_round(search)
        if counts is None:
            # A response may still be affordable where a round is not.
            await search.expand([Expansion(root)])
            return
        partials, continuations = counts
        size = self._prefix_size(search)
        [row] = await search.expand([Expansion(root, partials, size, self.partial_params)])
        kept = search.ranked(row)[: min(self.keep, partials)]
        for node in kept:
            node.note = f"continued: value among the best {min(self.keep, partials)} of {len(row)}"
        await search.expand(Expansion(node, continuations) for node in kept)

    def values(self) -> ValueModel | None:
        """The value model, once it is fitted."""
        usable = self.value_model is not None and self.value_model.is_fitted
        return self.value_model if usable else None

    def _prefix_size(self, search: Search) -> int:
        room = search.room(search.tree.root.state)
        return self.prefix_tokens if self.prefix_tokens < room else max(1, room // 4)

    def _affordable_round(self, search: Search) -> tuple[int, int] | None:
        """Partial responses and continuations of the largest round that is affordable, or None."""
        for partials in range(self.num_partials, 0, -1):
            for continuations in range(self.continuations, 0, -1):
                if search.ledger.affords(self._round_usage(search, partials, continuations)):
                    return partials, continuations
        return None

    def _round_usage(self, search: Search, partials: int, continuations: int) -> Usage:
        """The most that a round is charged."""
        assert self.value_model is not None
        state, keep = search.tree.root.state, min(self.keep, partials)
        start, room = len(prefix_of(state)), search.room(state)
        size = min(self._prefix_size(search), room)
        usage = self.language_model.usage_bound
        # Where nothing is left to continue, the partial responses are complete.
        tails = [room - size] * continuations if room > size else []
        reward = reward_usage_bound(self.reward_model)
        value = reward.maximum(value_usage_bound(self.value_model, state))
        return (
            usage(start, [size] * partials)
            + value * partials
            + usage(start + size, tails) * (keep if tails else 0)
            + reward * (keep * continuations)
        )


@dataclass(eq=False, kw_only=True)
class RecedingHorizon(Planner):
    """Model-predictive control over chunks.

    At each step, plans of `horizon` chunks are rolled out from the state reached so far; of that
    with the highest value (or score) at its end the first chunk is executed. Without a value model
    the last chunk of a plan is the whole rest, and its score decides.

    Source: random-shooting model-predictive control, as in Nagabandi et al., "Neural Network
    Dynamics for Model-Based Deep Reinforcement Learning with Model-Free Fine-Tuning", 2018.
    Deviations: plans are drawn from the language model; those that begin with the executed chunk
    are kept; the objective is the value at the horizon.

    Args:
        horizon: Chunks of a plan.
        plans: Plans rolled out at a step; None as many as the budget allows to the end of the
            response, or 4 without one.
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
            node = next(step for step in best.path() if step.parent is node)
            node.note = f"executed: {_worth(best):.4g} is the best at the end of {len(ends)} plans"

    async def _rolled_out(self, search: Search, node: Node) -> list[Node]:
        """Ends of the plans from a node: new ones, and those that were there."""
        frontier = Counter({node: self._count(search, node)})
        for ahead in range(1, self.horizon + 1):
            is_last = ahead == self.horizon
            tokens = None if is_last and search.value_model is None else self.chunk_tokens
            rows = await search.expand(
                Expansion(stem, copies, tokens, valued=is_last) for stem, copies in frontier.items()
            )
            frontier = Counter(child for row in rows for child in row if not child.is_terminal)
            if not frontier:
                break
        below = (each for each in search.tree.nodes if node in each.path() and each is not node)
        return [end for end in below if end.worth is not None]

    def _count(self, search: Search, node: Node) -> int:
        if self.plans is not None:
            return self.plans
        width = search.width(node, self.chunk_tokens)
        # Each of the chunks that are left is planned, and each plan has up to `horizon` of them.
        left = -(-search.room(node.state) // self.chunk_tokens)
        horizon = left if search.value_model is None else self.horizon
        mean_length = sum(min(horizon, k) for k in range(1, left + 1)) / left
        return _WITHOUT_BUDGET if width is None else max(1, int(width / mean_length))


def _worth(node: Node) -> float:
    return float("-inf") if node.worth is None else node.worth

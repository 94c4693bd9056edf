"""Planners that look ahead before they decide: lookahead, receding horizon and screening."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mbrl_text_env.agents.beam import beam_search
from mbrl_text_env.agents.sampling import BestOfN
from mbrl_text_env.agents.search import Expansion, Planner, Search, affordable, stand_in, value_of
from mbrl_text_env.agents.tree import Node
from mbrl_text_env.language_models.base import SamplingParams, prefix_of
from mbrl_text_env.rewards.base import reward_usage_bound
from mbrl_text_env.types import Usage, check_positive
from mbrl_text_env.values import ValueModel, value_usage_bound

PARTIAL_PARAMS = SamplingParams(temperature=0.9)
# Plans per step of a receding horizon if neither the user nor a budget sets them.
_WITHOUT_BUDGET = 4
# Minimum candidates per stage of a screen, so that the value has a choice.
_FEWEST = 4


@dataclass(eq=False, kw_only=True)
class Lookahead(Planner):
    """Two-stage lookahead with a value model.

    A round samples `num_partials` partial responses of `prefix_tokens` tokens and ranks them with
    the value model. It continues each of the best `keep` to the end, `continuations` times; the
    reward model picks the best. With the defaults and 256-token responses, a round costs as much as
    best-of-4. With `chunkwise`, each chunk is a stage, as in `BeamSearch` with beam width `keep`.

    Source: "Model Based Reinforcement Learning: Tutorial & Examples" (Patronus AI). As there, a
    missing or unfitted value model means best-of-N. Deviations: continuations start from the token
    ids of the partial response; partial responses that have ended are not continued; if responses
    are not longer than `prefix_tokens`, the prefix is a quarter of them (the article's share);
    with a budget, rounds are repeated, the last ones with fewer branches.

    Args:
        value_model: Ranks partial responses; None or unfitted means best-of-N.
        keep: Number of partial responses to continue, at most `num_partials`.
        partial_params: Sampling parameters of partial responses; `params` applies to the rest.
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
        """Run the largest round that the budget is certain to allow."""
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
            # One response can be affordable even if no round is.
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
        """The value model, if it is fitted."""
        usable = self.value_model is not None and self.value_model.is_fitted
        return self.value_model if usable else None

    def _prefix_size(self, search: Search) -> int:
        room = search.room(search.tree.root.state)
        return self.prefix_tokens if self.prefix_tokens < room else max(1, room // 4)

    def _affordable_round(self, search: Search) -> tuple[int, int] | None:
        """Partial responses and continuations of the largest affordable round, or None."""
        for partials in range(self.num_partials, 0, -1):
            for continuations in range(self.continuations, 0, -1):
                if search.ledger.affords(self._round_usage(search, partials, continuations)):
                    return partials, continuations
        return None

    def _round_usage(self, search: Search, partials: int, continuations: int) -> Usage:
        """Upper bound on the usage charged for a round."""
        assert self.value_model is not None
        state, keep = search.tree.root.state, min(self.keep, partials)
        start, room = len(prefix_of(state)), search.room(state)
        size = min(self._prefix_size(search), room)
        usage = self.language_model.usage_bound
        # If there is nothing left to continue, the partial responses are complete.
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

    Each step rolls out plans of `horizon` chunks from the current state and executes the first
    chunk of the plan with the highest value (or score) at its end. Without a value model, the last
    chunk of a plan runs to the end of the response, and plans are ranked by score.

    Source: random-shooting model-predictive control, as in Nagabandi et al., "Neural Network
    Dynamics for Model-Based Deep Reinforcement Learning with Model-Free Fine-Tuning", 2018.
    Deviations: plans are sampled from the language model; plans that start with the executed chunk
    are kept for the next step; the objective is the value at the horizon.

    Args:
        horizon: Number of chunks in a plan.
        plans: Number of plans per step. None uses as many as the budget allows until the end of
            the response, or 4 without one.
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
            node.note = f"executed: final value {_worth(best):.4g}, best of {len(ends)} plans"

    async def _rolled_out(self, search: Search, node: Node) -> list[Node]:
        """Return the ends of all plans from a node, including those kept from earlier steps."""
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
        # All remaining chunks are planned, and each plan has up to `horizon` of them.
        left = -(-search.room(node.state) // self.chunk_tokens)
        horizon = left if search.value_model is None else self.horizon
        mean_length = sum(min(horizon, k) for k in range(1, left + 1)) / left
        return _WITHOUT_BUDGET if width is None else max(1, int(width / mean_length))


def _worth(node: Node) -> float:
    return float("-inf") if node.worth is None else node.worth


@dataclass(eq=False, kw_only=True)
class Screened(Planner):
    """Select chunks by value alone, then score only the most promising complete responses.

    A round samples `candidates` chunks per stage and continues from the one with the highest value
    until it ends. It then scores the `finalists` with the highest values among all unscored
    complete responses. This pays off if a reward call costs more than about ten tokens and the
    value is almost free in comparison, as `token-embedding` is. Token budgets do not include the
    cost of the reward: use a budget in FLOPs.

    Sources: Mudgal et al., "Controlled Decoding from Language Models", 2024 (blockwise best-of-K);
    Sun et al., "Fast Best-of-N Decoding via Speculative Rejection", 2024 (cheap rejection before
    the expensive step). Deviation: prefixes are never scored by the reward.

    Args:
        value_model: Ranks partial and complete responses. None means best-of-N.
        candidates: Chunks per stage, limited by the budget. None takes the price of a
            reward call divided by that of sampling a response, but at least 4.
        finalists: Responses to score after a round. None takes as many as cost the same as the
            round's candidates, but at least one.

    Example:
        >>> planner = Screened(lm, reward, value, finalists=1)  # doctest: +SKIP
    """

    name = "screened"

    candidates: int | None = None
    finalists: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(candidates=self.candidates, finalists=self.finalists)

    async def plan(self, search: Search) -> None:
        """Build one response chunk by chunk, then score the finalists."""
        root, price = search.tree.root, self._price(search)
        count = self.candidates or max(_FEWEST, round(price))
        if search.value_model is None:
            await search.expand([Expansion(root, count)])
            return
        most = search.width(root, self.chunk_tokens, scored=False)
        count = count if most is None else min(count, most)
        beams = [root] if count else []
        while beams:
            [beam] = beams
            [row] = await search.expand([Expansion(beam, count, self.chunk_tokens, scored=False)])
            beams = search.ranked(row)[:1]
            for node in beams:
                node.note = f"kept: highest value of {len(row)} candidates"
        # Score all of them if the reward is free or no more chunks are affordable.
        finalists = max(1, int(count / price)) if count and price * count > 1e-9 else 1 << 20
        await self._score(search, self.finalists or finalists)

    async def _score(self, search: Search, most: int) -> None:
        """Score the complete responses of highest value, up to `most`, within the budget."""
        nodes = search.tree.nodes
        waiting = [node for node in nodes if node.is_terminal and node.score is None]
        waiting.sort(key=value_of, reverse=True)
        each = reward_usage_bound(self.reward_model)
        most = affordable(search.ledger, lambda count: each * count, min(most, len(waiting)))
        await search.evaluate(waiting[:most])

    def _price(self, search: Search) -> float:
        """Cost of a reward call relative to sampling a response; 1 if unknown."""
        state = search.tree.root.state
        drawing = search.drawing_usage(state).flops
        # The expected usage. The bound of a model assumes a text that fills its context.
        text = self.language_model.decode(stand_in(state, search.room(state)).response_ids)
        scoring = search.reward_model.usage(state.prompt, text).flops
        return scoring / drawing if drawing > 0 else 1.0

"""Lookahead with a value: the article's two stages, and chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

from mbrl_text_env.agents.base import check_positive
from mbrl_text_env.agents.beam import beam_search
from mbrl_text_env.agents.best_of_n import BestOfN
from mbrl_text_env.agents.planner import Planner
from mbrl_text_env.agents.search import Expansion, Search
from mbrl_text_env.language_models.base import SamplingParams
from mbrl_text_env.rewards.base import reward_usage_bound
from mbrl_text_env.types import Ledger, TextState, Usage
from mbrl_text_env.values import ValueModel, value_usage_bound

PARTIAL_PARAMS = SamplingParams(temperature=0.9)


@dataclass(frozen=True)
class _Plan:
    """How many partial responses, how many of them are kept, and how often each is continued."""

    partials: int
    keep: int
    continuations: int


@dataclass(eq=False, kw_only=True)
class Lookahead(Planner):
    """Two-stage lookahead with a value model.

    A round samples `num_partials` partial responses of `prefix_tokens`, lets the value model judge
    them, continues each of the best `keep` of them `continuations` times to the end, and lets the
    reward model choose. With the defaults and responses of 256 tokens that is 4 x 64 + 2 x 2 x 192
    = 1,024 tokens and 4 reward calls, as much as best-of-4.

    With `chunkwise` the two stages become as many as there are chunks: at each, as many candidates
    are drawn as the budget allows to the end (`num_partials` without one), and the best `keep` of
    them go on (Mudgal et al., "Controlled Decoding from Language Models", 2024). That is
    `BeamSearch` with a beam of `keep`.

    Source: "Model Based Reinforcement Learning: Tutorial & Examples" (Patronus AI). As there, an
    agent whose value model is missing or not fitted falls back to best-of-N (of as many samples as
    the budget allows, or `num_partials` without one).
    Deviations: a partial response is continued from its token ids, not from its text encoded again;
    one that has ended by itself is not continued; where a response is not longer than
    `prefix_tokens`, the prefix is a quarter of it (the article's share); under a budget, rounds are
    repeated, the last ones with fewer branches, until the budget allows no further response.

    Args:
        value_model: Judges partial ones; None or unfitted for best-of-N.
        num_partials: Partial responses a round.
        prefix_tokens: Tokens of a partial response.
        keep: Partial responses that are continued, at most `num_partials`.
        continuations: Continuations of each.
        chunkwise: Whether to choose chunk by chunk instead of once.
        partial_params: How partial responses are drawn; `params` says how continuations are (and
            the fallback's responses).

    The other arguments are those of every `Planner`.
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
        check_positive(
            num_partials=self.num_partials,
            prefix_tokens=self.prefix_tokens,
            keep=self.keep,
            continuations=self.continuations,
        )
        if self.keep > self.num_partials:
            raise ValueError(
                f"keep: expected at most num_partials ({self.num_partials}), got {self.keep}."
            )

    async def plan(self, search: Search) -> None:
        """One round: the largest that the budget allows for certain."""
        if search.value_model is None:
            await self._fallback(search).plan(search)
            return
        if self.chunkwise:
            candidates = None if search.is_capped else self.num_partials
            await beam_search(search, self.chunk_tokens, self.keep, candidates)
            return
        plan = self._plan(search.tree.root.state, search.ledger)
        root = search.tree.root
        if plan is None:
            # A response may still be affordable where a round is not.
            await search.expand([Expansion(root)])
            return
        size = self._prefix_size(root.state)
        [row] = await search.expand([Expansion(root, plan.partials, size, self.partial_params)])
        kept = search.ranked(row)[: plan.keep]
        for node in kept:
            node.note = f"continued: value among the best {plan.keep} of {len(row)}"
        await search.expand(Expansion(node, plan.continuations) for node in kept)

    def values(self) -> ValueModel | None:
        """The value model, once it is fitted."""
        usable = self.value_model is not None and self.value_model.is_fitted
        return self.value_model if usable else None

    def _fallback(self, search: Search) -> BestOfN:
        return BestOfN(
            self.language_model,
            self.reward_model,
            n=None if search.is_capped else self.num_partials,
            max_response_tokens=self.max_response_tokens,
            params=self.params,
        )

    def _prefix_size(self, state: TextState) -> int:
        room = self._room(state)
        return self.prefix_tokens if self.prefix_tokens < room else max(1, room // 4)

    def _plan(self, state: TextState, ledger: Ledger) -> _Plan | None:
        """The largest round that the ledger affords for certain, or None."""
        for partials in range(self.num_partials, 0, -1):
            for continuations in range(self.continuations, 0, -1):
                plan = _Plan(partials, min(self.keep, partials), continuations)
                if ledger.affords(self._round_usage(state, plan)):
                    return plan
        return None

    def _round_usage(self, state: TextState, plan: _Plan) -> Usage:
        """The most that a round is charged."""
        assert self.value_model is not None
        start, room = len(state.prompt_ids) + len(state.response_ids), self._room(state)
        size = min(self._prefix_size(state), room)
        usage = self.language_model.usage_bound
        # Where nothing is left to continue, the partial responses are complete.
        tails = [room - size] * plan.continuations if room > size else []
        reward = reward_usage_bound(self.reward_model)
        value = reward.maximum(value_usage_bound(self.value_model, state))
        return (
            usage(start, [size] * plan.partials)
            + value * plan.partials
            + usage(start + size, tails) * (plan.keep if tails else 0)
            + reward * (plan.keep * plan.continuations)
        )

"""The article's lookahead: a learned value judges partial responses, the best are finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.base import DEFAULT_PARAMS, Agent, Completion, best, check_positive, is_binding
from agents.best_of_n import BestOfN
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams, spawn_seed
from mbrl_text_env.ledger import Ledger, Usage
from mbrl_text_env.mdp import is_terminal
from mbrl_text_env.rewards.base import RewardModel, reward_usage_bound
from mbrl_text_env.types import TextState
from mbrl_text_env.values import ValueModel, predict_values, value_usage_bound

PARTIAL_PARAMS = SamplingParams(temperature=0.9)


@dataclass(frozen=True)
class _Plan:
    """How many partial responses, how many of them are kept, and how often each is continued."""

    partials: int
    keep: int
    continuations: int


class Lookahead(Agent):
    """Two-stage lookahead with a value model.

    A round samples `num_partials` partial responses of `prefix_tokens`, lets the value model judge
    them, continues each of the best `keep` of them `continuations` times to the end, and lets the
    reward model choose. With the defaults and responses of 256 tokens that is 4 x 64 + 2 x 2 x 192
    = 1,024 tokens and 4 reward calls, as much as best-of-4.

    Source: "Model Based Reinforcement Learning: Tutorial & Examples" (Patronus AI). As there, an
    agent whose value model is missing or not fitted falls back to best-of-`num_partials`.
    Deviations: a partial response is continued from its token ids, not from its text encoded again;
    one that has ended by itself is not continued; where a response is not longer than
    `prefix_tokens`, the prefix is a quarter of it (the article's share); under a budget, rounds are
    repeated, the last ones with fewer branches, until the budget allows no further response.

    Args:
        language_model: Proposes tokens.
        reward_model: Scores complete responses.
        value_model: Judges partial ones; None or unfitted for best-of-`num_partials`.
        num_partials: Partial responses a round.
        prefix_tokens: Tokens of a partial response.
        keep: Partial responses that are continued, at most `num_partials`.
        continuations: Continuations of each.
        max_response_tokens: Token limit of a response.
        chunk_tokens: Most tokens of the chunk that `act` returns.
        params: How continuations are drawn (and the fallback's responses); temperature 0.7.
        partial_params: How partial responses are drawn; temperature 0.9.

    Raises:
        ValueError: A count is below 1, or `keep` is above `num_partials`.
    """

    name = "lookahead"

    def __init__(
        self,
        language_model: LanguageModel,
        reward_model: RewardModel,
        value_model: ValueModel | None = None,
        *,
        num_partials: int = 4,
        prefix_tokens: int = 64,
        keep: int = 2,
        continuations: int = 2,
        max_response_tokens: int = 256,
        chunk_tokens: int = 16,
        params: SamplingParams = DEFAULT_PARAMS,
        partial_params: SamplingParams = PARTIAL_PARAMS,
    ) -> None:
        super().__init__(
            language_model,
            reward_model,
            max_response_tokens=max_response_tokens,
            chunk_tokens=chunk_tokens,
            params=params,
        )
        check_positive(
            num_partials=num_partials,
            prefix_tokens=prefix_tokens,
            keep=keep,
            continuations=continuations,
        )
        if keep > num_partials:
            raise ValueError(f"keep: expected at most num_partials ({num_partials}), got {keep}.")
        self.value_model = value_model
        self.num_partials = num_partials
        self.prefix_tokens = prefix_tokens
        self.keep = keep
        self.continuations = continuations
        self.partial_params = partial_params

    def search(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger], seed: int
    ) -> list[Completion]:
        """Search in rounds; without a budget there is one."""
        value_model = self.value_model
        if value_model is None or not value_model.is_fitted:
            return self._fallback().search(states, ledgers, seed)
        found: list[list[Completion]] = [[] for _ in states]
        round_number = 0
        while True:
            plans = [
                self._plan(state, ledger)
                if not row or is_binding(ledger.budget, self.response_usage(state))
                else None
                for state, ledger, row in zip(states, ledgers, found, strict=True)
            ]
            if not any(plans):
                return [best(row) for row in found]
            for plan in dict.fromkeys(plan for plan in plans if plan is not None):
                chosen = [i for i, other in enumerate(plans) if other == plan]
                rows = self._round(
                    [states[i] for i in chosen],
                    [ledgers[i] for i in chosen],
                    plan,
                    value_model,
                    spawn_seed(seed, round_number),
                )
                for i, row in zip(chosen, rows, strict=True):
                    found[i].extend(row)
            round_number += 1

    def response_usage(self, state: TextState) -> Usage:
        """The most that one response from `state` is charged, its value and score included."""
        if self.value_model is None or not self.value_model.is_fitted:
            return self._fallback().response_usage(state)
        return self._round_usage(state, _Plan(1, 1, 1))

    def _fallback(self) -> BestOfN:
        assert self.reward_model is not None
        return BestOfN(
            self.language_model,
            self.reward_model,
            n=self.num_partials,
            max_response_tokens=self.max_response_tokens,
            params=self.params,
        )

    def _round(
        self,
        states: Sequence[TextState],
        ledgers: Sequence[Ledger],
        plan: _Plan,
        value_model: ValueModel,
        seed: int,
    ) -> list[list[Completion]]:
        """One round of the same plan for each state: scored completions by state."""
        partials = self._partials(states, ledgers, plan, seed)
        kept = self._kept(partials, ledgers, plan, value_model)
        owners = [i for i, row in enumerate(kept) for _ in row]
        stems = [stem for row in kept for stem in row]
        tails = self.complete(
            [stem.state for stem in stems],
            plan.continuations,
            [ledgers[i] for i in owners],
            spawn_seed(seed, 1),
        )
        rows: list[list[Completion]] = [[] for _ in states]
        for i, stem, row in zip(owners, stems, tails, strict=True):
            # A partial response that ended by itself is one completion, however often continued.
            row = row[:1] if is_terminal(stem.state) else row
            rows[i].extend(Completion(c.state, stem.logprobs + c.logprobs) for c in row)
        return self.scored(rows, ledgers)

    def _partials(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger], plan: _Plan, seed: int
    ) -> list[list[Completion]]:
        """Partial responses; `Completion` here, though most have not ended."""
        rows: list[list[Completion]] = [[] for _ in states]
        sizes = [self._prefix_size(state) for state in states]
        for size in dict.fromkeys(sizes):
            chosen = [i for i, other in enumerate(sizes) if other == size]
            drawn = self.language_model.sample(
                [states[i] for i in chosen],
                plan.partials,
                size,
                seeds=[spawn_seed(seed, 0)] * len(chosen),
                params=self.partial_params,
                ledgers=[ledgers[i] for i in chosen],
            )
            for i, chunks in zip(chosen, drawn, strict=True):
                rows[i] = [self._completion(states[i], chunk) for chunk in chunks]
        return rows

    def _kept(
        self,
        partials: Sequence[Sequence[Completion]],
        ledgers: Sequence[Ledger],
        plan: _Plan,
        value_model: ValueModel,
    ) -> list[list[Completion]]:
        """The partial responses of highest value, in one call of the value model."""
        means = predict_values(
            value_model,
            [partial.state for row in partials for partial in row],
            ledgers=[ledger for row, ledger in zip(partials, ledgers, strict=True) for _ in row],
        ).mean.reshape(len(partials), plan.partials)
        order = np.argsort(-means, axis=1, kind="stable")[:, : plan.keep]
        return [[row[k] for k in ranks] for row, ranks in zip(partials, order, strict=True)]

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
        usage = self.language_model.usage
        # Where nothing is left to continue, the partial responses are complete.
        tails = [room - size] * plan.continuations if room > size else []
        return (
            usage(start, [size] * plan.partials)
            + value_usage_bound(self.value_model) * plan.partials
            + usage(start + size, tails) * (plan.keep if tails else 0)
            + reward_usage_bound(self.reward_model) * (plan.keep * plan.continuations)
        )

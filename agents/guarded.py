"""Guarded search: what a reward's bound says is lost is never written."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from mbrl_text_env.agents.search import Expansion, Planner, Search, check_target
from mbrl_text_env.language_models.base import Guard
from mbrl_text_env.rewards.base import RewardError, reward_bounds, score_responses
from mbrl_text_env.types import TextState
from mbrl_text_env.values import ValueModel

# Responses where neither a budget nor a target ends the search.
_WITHOUT_BUDGET = 4
# Twice what rounding moves a fraction such as 3 of 3.
_SAME = 1e-9


@dataclass(eq=False, kw_only=True)
class Guarded(Planner):
    """Sample responses that can still reach the target, one after the other, until one does.

    While a response is drawn, a token after which the reward's bound is below the target is drawn
    again from the probable ones that may follow (`language_models.base.Guard`), and a response ends
    only where its score reaches the target. Where no probable token may follow, it is given up, and
    the next one starts at the root. It needs a reward with a `bound`, a language model that has
    `guards`, and no value model. The check of a text that may end is charged as a reward call;
    bounds are not.

    Sources: Lipkin et al., "Fast Controlled Generation from Language Models with Adaptive Weighted
    Rejection Sampling", 2025 (lazy checks); deviation: no weights, since the verifier decides, not
    a posterior. See `Guard` for the law of the tokens.

    Args:
        target: The score that is good enough; by default the most that the bound of an empty
            response allows, such as all of a prompt's constraints.
        floor: The least log-probability (nats) of a token in place of a refused one.
        candidates: How many of the most probable tokens are tried in place of a refused one.

    The other arguments are those of every `Planner`.

    Raises:
        ValueError: The language model has no guards, or the reward no bound for a prompt.

    Example:
        >>> planner = Guarded(lm, ConstraintsReward())  # doctest: +SKIP
    """

    name = "guarded"

    target: float | None = None
    floor: float = -7.0
    candidates: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.target)
        if not self.floor <= 0 or self.candidates < 1:
            raise ValueError(
                "Expected a floor (log-probability) of at most 0 and at least one candidate, got "
                f"floor={self.floor} and candidates={self.candidates}."
            )
        if not getattr(self.language_model, "guards", False):
            raise ValueError(
                f"{self.name}: expected a language model that watches a guard, such as "
                f"`TransformersLM`, got {type(self.language_model).__name__}. Use another agent."
            )

    async def plan(self, search: Search) -> None:
        """Draw guarded responses until one reaches the target or the budget allows no more."""
        root = search.tree.root
        target = self._target(search)
        guard = self._guard(search, target) if target < float("inf") else None
        while not search.has_reached(target - _SAME):
            [row] = await search.expand([Expansion(root, guard=guard, valued=False)])
            if search.is_capped or not row or root.samples >= _WITHOUT_BUDGET:
                return

    def values(self) -> ValueModel | None:
        """None: nothing is valued."""
        return None

    def _target(self, search: Search) -> float:
        prompt = search.tree.root.state.prompt
        [most] = reward_bounds(search.reward_model, [prompt], [""])
        if search.reward_model.is_bound_wrong:
            return float("inf") if self.target is None else self.target
        if self.target is None and most == float("inf"):
            raise ValueError(
                f"{self.name}: expected a reward whose `bound` says what a response to prompt "
                f"{prompt.id!r} can reach, got {search.reward_model.name!r}, which does not. Give "
                "a target, or use another agent."
            )
        if self.target is not None and self.target > most + _SAME:
            warnings.warn(
                f"{self.name}: expected a target of at most {most:g}, the most that "
                f"{search.reward_model.name!r} can give to a response to prompt {prompt.id!r}, got "
                f"{self.target:g}. The search ends at {most:g}; lower the target.",
                stacklevel=2,
            )
        return float(most if self.target is None else min(self.target, most))

    def _guard(self, search: Search, target: float) -> Guard:
        reward, ledger, root = search.reward_model, search.ledger, search.tree.root.state

        def reaches(state: TextState, text: str) -> bool:
            usage = reward.usage(state.prompt, text)
            if not ledger.affords(usage + search.finish_usage(root)):
                return True
            ledger.charge(usage)
            try:
                return score_responses(reward, [state.prompt], [text]).total[0] >= target - _SAME
            except RewardError:
                return False

        def allows(
            states: Sequence[TextState], texts: Sequence[str], ended: Sequence[bool]
        ) -> list[bool]:
            bounds = reward_bounds(reward, [state.prompt for state in states], texts)
            return [
                bool(bound >= target - _SAME) and (not ends or reaches(state, text))
                for bound, state, text, ends in zip(bounds, states, texts, ended, strict=True)
            ]

        return Guard(allows, self.floor, self.candidates)

"""Planners: agents that search a tree of chunks from each state, round after round."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mbrl_text_env.agents.base import Agent, Completion, Generation
from mbrl_text_env.agents.driver import MOST_AT_ONCE
from mbrl_text_env.agents.search import Expansion, Search
from mbrl_text_env.agents.tree import SearchTree
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import reward_usage_bound
from mbrl_text_env.types import Budget, Ledger, Prompt, TextState, Usage
from mbrl_text_env.values import ValueModel, check_value_fits

# Chunks that may be drawn one after the other and lead nowhere new before a search gives up: so
# many, or this many times those that were drawn before. What is new may be rare, and worth it.
_PATIENCE = 64
_PERSISTENCE = 8
# Fewer searches side by side would make batches too small, whatever the cache can hold.
_FEWEST_AT_ONCE = 8


@dataclass(eq=False)
class Planner(Agent):
    """An agent that searches a tree; a subclass implements `plan`, one round of its search.

    Without a budget there is one round. Under a budget, rounds are repeated until what is left does
    not afford another response, or many chunks in a row (64, or 8 times those before) lead only to
    states that are known; later rounds go on in the same tree, with chunks not drawn before. Where
    a round of the planner is too expensive and a response is not, plain samples spend the rest.
    The answer is always the best of all complete responses that were paid for, so a misleading
    value costs samples, never a better response that was seen.

    Args:
        reward_model: Scores complete responses; a planner needs one.
        value_model: Estimates the final reward of partial ones.

    All planners take these, `language_model`, `max_response_tokens`, `chunk_tokens` and `params` of
    `Agent`, and raise a ValueError where a number of theirs is out of range.

    Example:
        >>> class Deepening(Planner):  # three samples of one token, the best of them finished
        ...     name = "deepening"
        ...     async def plan(self, search):
        ...         [row] = await search.expand([Expansion(search.tree.root, 3, tokens=1)])
        ...         await search.expand(Expansion(node) for node in search.ranked(row)[:1])
    """

    reward_model: Any = field()
    value_model: ValueModel | None = None
    _watched: dict[TextState, SearchTree] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        # None is no reward to plan for.
        self.reward_model = as_reward_model(self.reward_model)
        super().__post_init__()
        check_value_fits(self.value_model, self.language_model, self.reward_model)

    @abstractmethod
    async def plan(self, search: Search) -> None:
        """Search for one round; `search.expand` returns fewer children when the budget ends."""

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
        """`generate`, with the tree behind each answer.

        Raises:
            ValueError: There are no prompts, or two of them are equal.
            BudgetError: The budget allows no complete response.

        Example:
            >>> [(answer, tree)] = planner.explore([prompt], Budget(tokens=400))  # doctest: +SKIP
            >>> json.dumps(tree.to_dict(planner.language_model))  # doctest: +SKIP
        """
        watched = copy.copy(self)
        watched._watched = {}
        generations = watched.generate(prompts, budget, seed=seed)
        trees = {state.prompt.id: tree for state, tree in watched._watched.items()}
        if len(trees) < len(prompts):
            raise ValueError(
                f"explore: expected different prompts, got {len(prompts) - len(trees)} of "
                f"{len(prompts)} more than once. Leave out the repetitions."
            )
        return [(generation, trees[generation.prompt.id]) for generation in generations]

    def response_usage(self, state: TextState) -> Usage:
        """The most that one scored response from `state` is charged."""
        return super().response_usage(state) + reward_usage_bound(self.reward_model)

    def values(self) -> ValueModel | None:
        """What values partial responses in a search; None where nothing does."""
        return self.value_model

    def _most_at_once(self, state: TextState, budget: Budget) -> int:
        """Searches side by side whose texts the language model's prefix cache can hold, about.

        With many more of them a search would find its own prefixes gone, and compute them again
        and again.
        """
        kept = getattr(self.language_model, "cache_tokens", 0)
        prefix = len(state.prompt_ids) + len(state.response_ids)
        caps: list[float] = [] if budget.tokens is None else [budget.tokens]
        if budget.flops is not None:
            usage = self.language_model.usage_bound
            each = (usage(prefix, [1]) - usage(prefix, [])).flops
            caps += [budget.flops / each] if each > 0 else []
        if not kept or not caps:
            return MOST_AT_ONCE
        return max(_FEWEST_AT_ONCE, min(MOST_AT_ONCE, int(kept / (prefix + min(caps)))))

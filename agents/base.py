"""The base class of agents: search for a complete response from any state, under a budget.

An agent implements the coroutine `search`; `agents.driver` runs many searches concurrently.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, TypeAlias

from mbrl_text_env.agents.driver import (
    MOST_AT_ONCE,
    Begin,
    Driver,
    ask,
    ask_for_chunks,
    run,
    run_async,
)
from mbrl_text_env.language_models.base import (
    LanguageModel,
    SampleRequest,
    SamplingParams,
    prefix_of,
)
from mbrl_text_env.mdp import initial, is_terminal, response_limit, transition
from mbrl_text_env.prompts import as_prompts
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import reward_usage_bound, score_responses
from mbrl_text_env.types import (
    Budget,
    BudgetError,
    Chunk,
    Ledger,
    Prompt,
    TextState,
    Usage,
    check_positive,
)

Prompts: TypeAlias = str | Prompt | Iterable[str | Prompt]
_Begun: TypeAlias = list[tuple[TextState, Ledger]]

# The article samples complete responses at this temperature.
DEFAULT_PARAMS = SamplingParams(temperature=0.7)


@dataclass(frozen=True)
class Completion:
    """A complete response.

    `logprobs` (nats) has one entry per token that the search added; it is empty if they are
    unknown. `score` and `parts` come from the reward model; `score` is None if not requested.
    """

    state: TextState
    logprobs: tuple[float, ...] = ()
    score: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What to do in a state: the first chunk of the completion found, and the compute used."""

    chunk: Chunk
    completion: Completion
    usage: Usage


@dataclass(frozen=True)
class Generation:
    """An agent's answer to a prompt: the completion, its decoded `text`, and the compute used."""

    prompt: Prompt
    completion: Completion
    text: str
    usage: Usage
    agent: str
    seed: int


@dataclass(frozen=True)
class Choice:
    """The index of the chunk to append, and the compute used to choose it.

    `completions` holds the complete response found after each chunk. An entry is None if there was
    no search, because the budget did not allow it or the agent does not need it.
    """

    index: int
    completions: tuple[Completion | None, ...]
    usage: Usage


@dataclass(eq=False)
class Agent(ABC):
    """Searches for the best complete response that its budget allows.

    A subclass sets `name` and implements `search`. A subclass with its own options is decorated
    with `@dataclass(eq=False, kw_only=True)`.

    Args:
        reward_model: Scores complete responses. Anything that `as_reward_model` accepts: a reward
            model, a function of two texts, or a name. None for agents that need no scores.
        max_response_tokens: Maximum number of tokens in a response.
        chunk_tokens: Maximum number of tokens in the chunk that `act` returns.
        params: Sampling parameters.

    Example:
        >>> class Greedy(Agent):
        ...     name = "greedy"
        ...     async def search(self, state, ledger, seed):
        ...         greedy = SamplingParams(temperature=0)
        ...         [completion] = await self.complete(state, 1, ledger, seed, params=greedy)
        ...         return completion
    """

    name: ClassVar[str] = ""

    language_model: LanguageModel
    reward_model: Any = None
    _: KW_ONLY
    max_response_tokens: int = 256
    chunk_tokens: int = 16
    params: SamplingParams = DEFAULT_PARAMS

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        signatures = {"search": "self, state, ledger, seed", "plan": "self, search"}
        for method, signature in signatures.items():
            own = vars(cls).get(method)
            if inspect.isfunction(own) and not inspect.iscoroutinefunction(own):
                raise TypeError(
                    f"{cls.__name__}.{method}: expected a coroutine, got a plain function. Write "
                    f"`async def {method}({signature})` and await calls for a single state: "
                    "`search.expand(...)`, `self.complete(state, ...)`, `self.scored(...)`."
                )

    def __post_init__(self) -> None:
        check_positive(max_response_tokens=self.max_response_tokens, chunk_tokens=self.chunk_tokens)
        if self.reward_model is not None:
            self.reward_model = as_reward_model(self.reward_model)

    @abstractmethod
    async def search(self, state: TextState, ledger: Ledger, seed: int) -> Completion:
        """Find a complete response from a state that has not ended.

        It can only await `complete`, `scored` and `ask`. The ledger has enough budget for one
        complete response. All randomness is derived from the seed, state and sample index.
        """

    def generate(
        self, prompts: Prompts, budget: Budget | None = None, *, seed: int = 0
    ) -> list[Generation]:
        """Answer prompts concurrently, with batched model calls.

        A string is treated as a user message. The budget applies to each prompt separately.

        Raises:
            BudgetError: The budget is too small for one complete response.
        """
        begun = self._begun(prompts, budget)
        return self._generations(begun, run(*self._searches(begun, seed)), seed)

    async def generate_async(
        self,
        prompts: Prompts,
        budget: Budget | None = None,
        *,
        seed: int = 0,
        driver: Driver | None = None,
    ) -> list[Generation]:
        """Async version of `generate`. It yields to the event loop and can be cancelled.

        Models other than language models run in a thread, one call at a time. Concurrent calls
        that share a `driver` are batched together, even if they start at different times.
        """
        begun = self._begun(prompts, budget)
        searches, most = self._searches(begun, seed)
        found = await (run_async(searches, most) if driver is None else driver.run(searches))
        return self._generations(begun, found, seed)

    def act(
        self, states: Sequence[TextState], budget: Budget | None = None, *, seed: int = 0
    ) -> list[Decision]:
        """Choose the next chunk for each state. The budget applies to each decision.

        Chunks have up to `chunk_tokens` tokens, which must not exceed the env's `max_chunk_tokens`.

        Raises:
            ValueError: A state has ended, or its response has reached the agent's token limit.
        """
        for state in states:
            if is_terminal(state):
                raise ValueError(
                    f"The response to prompt {state.prompt.id!r} has ended. Reset the environment."
                )
            if self._room(state) < 1:
                raise ValueError(
                    f"The response to prompt {state.prompt.id!r} has {len(state.response_ids)} "
                    f"tokens, but agent {self.name!r} allows at most {self.max_response_tokens}. "
                    "Create the agent with the environment's max_response_tokens."
                )
        begun = [(state, Ledger(budget)) for state in states]
        found = run(*self._searches(begun, seed))
        return [
            Decision(self._first_chunk(state, completion), completion, ledger.usage)
            for (state, ledger), completion in zip(begun, found, strict=True)
        ]

    def choose(
        self,
        states: Sequence[TextState],
        candidates: Sequence[Sequence[Chunk]],
        budget: Budget | None = None,
        *,
        seed: int = 0,
    ) -> list[Choice]:
        """Choose one of the candidate chunks of each state, as in the candidate-chunk environment.

        The agent searches for a complete response after each candidate, with an equal share of the
        decision's budget, and chooses the candidate with the best one (the first if tied). If the
        budget is too small for all candidates, it tries those with the highest mean token logprob.

        Raises:
            BudgetError: The budget is too small for a complete response after any candidate.
        """
        rows = zip(states, candidates, strict=True)
        plans = [_ChoicePlan(self, state, row, budget) for state, row in rows]
        run([plan.score_ended for plan in plans])
        searched = [(plan, i, ledger) for plan in plans for i, ledger in plan.shares().items()]
        begun = [(plan.after[i], ledger) for plan, i, ledger in searched]
        found = run(*self._searches(begun, seed))
        for (plan, i, ledger), completion in zip(searched, found, strict=True):
            plan.found[i] = completion
            plan.ledger.charge(ledger.usage)
        return [plan.choice() for plan in plans]

    async def complete(
        self,
        state: TextState,
        num_samples: int,
        ledger: Ledger,
        seed: int,
        *,
        first_sample: int = 0,
        params: SamplingParams | None = None,
    ) -> list[Completion]:
        """Sample complete responses without scores. An ended state is returned at no cost."""
        room = self._room(state)
        if room == 0:
            return [Completion(state)] * num_samples
        params = self.params if params is None else params
        request = SampleRequest(state, num_samples, room, seed, first_sample, params)
        [chunks] = await ask_for_chunks(self.language_model, [request], [ledger])
        limit = self.response_limit(state)
        return [Completion(transition(state, chunk, limit), chunk.logprobs) for chunk in chunks]

    async def scored(self, completions: Sequence[Completion], ledger: Ledger) -> list[Completion]:
        """Return the completions with scores. Raise a ValueError if there is no reward model."""
        if self.reward_model is None:
            raise ValueError(f"Agent {self.name!r} needs a reward model: pass `reward_model`.")
        if not completions:
            return []
        scores = await ask(
            score_responses,
            self.reward_model,
            prompts=[c.state.prompt for c in completions],
            responses=[self.language_model.decode(c.state.response_ids) for c in completions],
            ledgers=[ledger] * len(completions),
        )
        return [
            Completion(c.state, c.logprobs, float(scores.total[i]), scores.parts_of(i))
            for i, c in enumerate(completions)
        ]

    def check_budget(self, prompts: Sequence[Prompt], budget: Budget | None) -> None:
        """Raise a BudgetError if the budget is too small; skip prompts that the model rejects."""
        for prompt in prompts:
            try:
                state = initial(prompt, self.language_model)
            except ValueError:
                continue
            self._check_affords(state, Ledger(budget))

    def response_usage(self, state: TextState) -> Usage:
        """Upper bound on the usage charged for one complete response from `state`."""
        return self.language_model.usage_bound(len(prefix_of(state)), [self._room(state)])

    def response_limit(self, state: TextState) -> int:
        """Maximum number of tokens in a response to the state's prompt."""
        return response_limit(state, self.language_model, self.max_response_tokens)

    def _check_affords(self, state: TextState, ledger: Ledger) -> None:
        least = self.response_usage(state)
        if not ledger.affords(least):
            raise BudgetError(
                f"{ledger.budget} is too small for one response to prompt {state.prompt.id!r}, "
                f"which can use {least.generated_tokens} tokens, {least.flops:.3g} FLOPs and "
                f"{least.reward_calls} reward calls. Raise it or lower max_response_tokens."
            )

    def _begun(self, prompts: Prompts, budget: Budget | None) -> _Begun:
        prompts = as_prompts(prompts)
        if not prompts:
            raise ValueError("generate: expected at least one prompt, got none.")
        return [(initial(prompt, self.language_model), Ledger(budget)) for prompt in prompts]

    def _searches(self, begun: _Begun, seed: int) -> tuple[list[Begin[Completion]], int]:
        """The arguments of `run`."""
        for state, ledger in begun:
            self._check_affords(state, ledger)
        most = self._most_at_once(begun[0][0], begun[0][1].budget) if begun else 1
        return [partial(self.search, state, ledger, seed) for state, ledger in begun], most

    def _generations(
        self, begun: _Begun, found: Sequence[Completion], seed: int
    ) -> list[Generation]:
        texts = [self.language_model.decode(each.state.response_ids) for each in found]
        return [
            Generation(state.prompt, completion, text, ledger.usage, self.name, seed)
            for (state, ledger), completion, text in zip(begun, found, texts, strict=True)
        ]

    def _most_at_once(self, state: TextState, budget: Budget) -> int:
        """Maximum number of concurrent searches."""
        return MOST_AT_ONCE

    def _room(self, state: TextState) -> int:
        """Tokens left for the response; 0 if it has ended."""
        room = self.response_limit(state) - len(state.response_ids)
        return 0 if is_terminal(state) else max(0, room)

    def _first_chunk(self, state: TextState, completion: Completion) -> Chunk:
        added = completion.state.response_ids[len(state.response_ids) :]
        ids = added[: self.chunk_tokens]
        reason = completion.state.finish_reason if len(ids) == len(added) else None
        return Chunk(ids, completion.logprobs[: len(ids)], reason)


def best(completions: Sequence[Completion]) -> Completion:
    """Return the scored completion with the highest score; the first if tied."""
    return max(completions, key=attrgetter("score"))


class _ChoicePlan:
    """One decision of `Agent.choose`."""

    def __init__(
        self, agent: Agent, state: TextState, candidates: Sequence[Chunk], budget: Budget | None
    ) -> None:
        if is_terminal(state) or not candidates:
            raise ValueError(
                f"choose, prompt {state.prompt.id!r}: expected a state that has not ended and at "
                f"least one candidate, got finish_reason={state.finish_reason!r} and "
                f"{len(candidates)} candidates."
            )
        self.agent, self.ledger = agent, Ledger(budget)
        limit = agent.response_limit(state)
        self.after = [transition(state, chunk, limit) for chunk in candidates]
        # Duplicate candidates are searched once.
        self.first = [self.after.index(after) for after in self.after]
        means = [chunk.logprob / len(chunk) if chunk.logprobs else 0.0 for chunk in candidates]
        self.likely_first = sorted(sorted(set(self.first)), key=means.__getitem__, reverse=True)
        self.found: dict[int, Completion] = {}

    async def score_ended(self) -> None:
        """Score the candidates that end the response, as many as the budget allows."""
        bound = reward_usage_bound(self.agent.reward_model)
        ended: list[int] = []
        for i in self.likely_first:
            if is_terminal(self.after[i]) and self.ledger.affords(bound * (len(ended) + 1)):
                ended.append(i)
        # An ended state needs no sampling.
        drawn = [await self.agent.complete(self.after[i], 1, self.ledger, 0) for i in ended]
        scored = await self.agent.scored([each for [each] in drawn], self.ledger)
        self.found.update(zip(ended, scored, strict=True))

    def shares(self) -> dict[int, Ledger]:
        """Split the remaining budget equally among the candidates that can be completed."""
        going = [i for i in self.likely_first if not is_terminal(self.after[i])]
        left = self.ledger.budget.after(self.ledger.usage)
        while going and left is not None:
            share = left.shared(len(going))
            if share is not None and all(
                Ledger(share).affords(self.agent.response_usage(self.after[i])) for i in going
            ):
                return {i: Ledger(share) for i in sorted(going)}
            going.pop()
        if not self.found:
            raise BudgetError(
                f"{self.ledger.budget} is too small for one response after any of the "
                f"{len(self.after)} candidates of prompt {self.after[0].prompt.id!r}. Raise the "
                "budget or lower max_response_tokens."
            )
        return {}

    def choice(self) -> Choice:
        """Choose the candidate with the best response."""
        index = max(sorted(self.found), key=lambda i: self.found[i].score or 0.0)
        return Choice(index, tuple(self.found.get(i) for i in self.first), self.ledger.usage)

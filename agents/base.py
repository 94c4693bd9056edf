"""What an agent is: a search for a complete response, from any state, under a budget.

An agent implements `search`; `generate` and `act` follow from it. Everything an agent spends goes
through the ledgers that it is given.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, ClassVar

from mbrl_text_env.agents.driver import MOST_AT_ONCE, Begin, ask, ask_for_chunks, run, run_async
from mbrl_text_env.language_models.base import LanguageModel, SampleRequest, SamplingParams
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
    initial,
    is_terminal,
    response_limit,
    transition,
)

# The article draws complete responses at this temperature.
DEFAULT_PARAMS = SamplingParams(temperature=0.7)


@dataclass(frozen=True)
class Completion:
    """A complete response.

    Args:
        state: Terminal.
        logprobs: Log-probability (nats) under the language model of each token that the search
            added; empty where it is not known.
        score: The reward model's score, or None where it was not asked.
        parts: The score's parts by name.
    """

    state: TextState
    logprobs: tuple[float, ...] = ()
    score: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What to do in a state.

    Args:
        chunk: The chunk to append.
        completion: The complete response that the search settled on; `chunk` begins it.
        usage: What it cost.
    """

    chunk: Chunk
    completion: Completion
    usage: Usage


@dataclass(frozen=True)
class Choice:
    """Which of several chunks to append.

    Args:
        index: Of the chunk.
        completions: The complete response found behind each chunk; None where none was looked for,
            because the budget did not allow it or the agent does not need it.
        usage: What the choice cost.
    """

    index: int
    completions: tuple[Completion | None, ...]
    usage: Usage


@dataclass(frozen=True)
class Generation:
    """An agent's answer to a prompt: its completion, decoded as `text`, and what it cost."""

    prompt: Prompt
    completion: Completion
    text: str
    usage: Usage
    agent: str
    seed: int


@dataclass(eq=False)
class Agent(ABC):
    """Searches for the best complete response that its budget allows.

    A subclass gives itself a `name` and implements `search`, a coroutine. Several states are
    searched side by side: what the searches await of the models is answered in common batches
    (`agents.driver`). A subclass with options of its own is a `@dataclass(eq=False, kw_only=True)`.

    Args:
        language_model: Proposes tokens.
        reward_model: Scores complete responses: whatever `as_reward_model` takes, such as a reward
            model, a function of two texts, or a name; None for agents that ask for no score.
        max_response_tokens: Token limit of a response.
        chunk_tokens: Most tokens of the chunk that `act` returns.
        params: How tokens are drawn.

    Raises:
        ValueError: A limit is below 1.

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
                    f"`async def {method}({signature})` and await what it asks for: "
                    "`await search.expand(...)`, `await self.complete(state, ...)`, "
                    "`await self.scored(...)`, which take one state or its completions at a time."
                )

    def __post_init__(self) -> None:
        check_positive(max_response_tokens=self.max_response_tokens, chunk_tokens=self.chunk_tokens)
        if self.reward_model is not None:
            self.reward_model = as_reward_model(self.reward_model)

    @abstractmethod
    async def search(self, state: TextState, ledger: Ledger, seed: int) -> Completion:
        """Find a complete response from a state.

        It awaits `complete`, `scored` and `agents.driver.ask`, and nothing else.

        Args:
            state: It has not ended.
            ledger: Its budget allows at least one complete response.
            seed: All randomness follows from it, the state and the sample index.
        """

    def generate(
        self,
        prompts: str | Prompt | Iterable[str | Prompt],
        budget: Budget | None = None,
        *,
        seed: int = 0,
    ) -> list[Generation]:
        """Answer prompts, all of them side by side in common batches.

        Args:
            prompts: At least one. A text stands for the prompt of a user who says that, and one
                prompt alone for a list of one.
            budget: Hard caps for each prompt.
            seed: The answers follow from it.

        Raises:
            ValueError: There are no prompts, or something else is among them.
            BudgetError: The budget allows no complete response.
        """
        states, ledgers = self._begun(prompts, budget)
        completions = run(*self._searches(states, ledgers, seed))
        return self._generations(states, completions, ledgers, seed)

    async def generate_async(
        self,
        prompts: str | Prompt | Iterable[str | Prompt],
        budget: Budget | None = None,
        *,
        seed: int = 0,
    ) -> list[Generation]:
        """`generate` that awaits each batch, so that an event loop goes on meanwhile.

        Cancelling it ends the search. Language models are awaited where they can be
        (`sample_requests_async`); other calls are made in a thread, one at a time.

        Example:
            >>> answers = await asyncio.gather(  # doctest: +SKIP
            ...     agent.generate_async("Praise the sea."), agent.generate_async("Name a fruit.")
            ... )
        """
        states, ledgers = self._begun(prompts, budget)
        completions = await run_async(*self._searches(states, ledgers, seed))
        return self._generations(states, completions, ledgers, seed)

    def act(
        self, states: Sequence[TextState], budget: Budget | None = None, *, seed: int = 0
    ) -> list[Decision]:
        """Decide on the next chunk of each state, with a budget for each decision.

        The chunk has at most `chunk_tokens` tokens, so it is an action of an environment whose
        `max_chunk_tokens` is at least that.

        Raises:
            ValueError: A state has ended, or its response is as long as the agent's limit.
            BudgetError: The budget allows no complete response.
        """
        for state in states:
            if is_terminal(state):
                raise ValueError(
                    f"The response to prompt {state.prompt.id!r} has ended; there is nothing to "
                    "decide. Reset the environment."
                )
            if self._room(state) < 1:
                raise ValueError(
                    f"The response to prompt {state.prompt.id!r} has {len(state.response_ids)} "
                    f"tokens, and agent {self.name!r} writes at most {self.max_response_tokens}. "
                    "Make the agent with the environment's max_response_tokens."
                )
        ledgers = [Ledger(budget) for _ in states]
        completions = run(*self._searches(states, ledgers, seed))
        return [
            Decision(self._first_chunk(state, completion), completion, ledger.usage)
            for state, completion, ledger in zip(states, completions, ledgers, strict=True)
        ]

    def choose(
        self,
        states: Sequence[TextState],
        candidates: Sequence[Sequence[Chunk]],
        budget: Budget | None = None,
        *,
        seed: int = 0,
    ) -> list[Choice]:
        """Choose one of the chunks that each state offers, as in the candidate view.

        The budget of a decision is shared equally by the candidates: from the state behind each of
        them the agent searches for a complete response, and the chunk with the best one is chosen
        (the first of equals). Where the budget does not allow a response behind all of them, those
        with the highest log-probability a token are looked at.

        Args:
            states: States that have not ended.
            candidates: The chunks offered in each, at least one.
            budget: Hard caps for each decision.
            seed: The choices follow from it.

        Raises:
            ValueError: A state has ended, or one has no candidates.
            BudgetError: The budget allows no complete response behind any candidate.

        Example:
            >>> env = gym.make("mbrl_text_env/CandidateChunks-v0")  # doctest: +SKIP
            >>> state = env.unwrapped.get_state()  # doctest: +SKIP
            >>> candidates = env.get_wrapper_attr("candidates")  # doctest: +SKIP
            >>> [choice] = agent.choose([state], [candidates])  # doctest: +SKIP
            >>> env.step(choice.index)  # doctest: +SKIP
        """
        for state, row in zip(states, candidates, strict=True):
            if is_terminal(state) or not row:
                raise ValueError(
                    f"choose, prompt {state.prompt.id!r}: expected a state that has not ended and "
                    f"at least one candidate, got finish_reason {state.finish_reason!r} and "
                    f"{len(row)} candidates."
                )
        plans = [
            _ChoicePlan(state, row, budget, self)
            for state, row in zip(states, candidates, strict=True)
        ]
        run([plan.score_ended for plan in plans])
        searched = [(plan, i, ledger) for plan in plans for i, ledger in plan.shares().items()]
        behind, ledgers = [plan.after[i] for plan, i, _ in searched], [x for *_, x in searched]
        completions = run(*self._searches(behind, ledgers, seed))
        for (plan, i, ledger), completion in zip(searched, completions, strict=True):
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
        """Sample complete responses from a state, unscored.

        A state that has ended is its own completion, `num_samples` times over, and costs nothing.
        """
        room = self._room(state)
        if room == 0:
            return [Completion(state)] * num_samples
        params = self.params if params is None else params
        request = SampleRequest(state, num_samples, room, seed, first_sample, params)
        [chunks] = await ask_for_chunks(self.language_model, [request], [ledger])
        limit = self._limit(state)
        return [Completion(transition(state, chunk, limit), chunk.logprobs) for chunk in chunks]

    async def scored(self, completions: Sequence[Completion], ledger: Ledger) -> list[Completion]:
        """Completions with their scores.

        Raises:
            ValueError: The agent has no reward model.
        """
        if self.reward_model is None:
            raise ValueError(f"Agent {self.name!r} needs a reward model: pass one when making it.")
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
        """Make sure beforehand that a budget allows a complete response to each prompt.

        Prompts that the language model refuses are passed over; `generate` says what is wrong.

        Raises:
            BudgetError: It does not.
        """
        for prompt in prompts:
            try:
                state = initial(prompt, self.language_model)
            except ValueError:
                continue
            self._check_affords(state, Ledger(budget))

    def _check_affords(self, state: TextState, ledger: Ledger) -> None:
        least = self.response_usage(state)
        if not ledger.affords(least):
            raise BudgetError(
                f"{ledger.budget} is too small for one response to prompt "
                f"{state.prompt.id!r}: that can take {least.generated_tokens} tokens, "
                f"{least.flops:.3g} FLOPs and {least.reward_calls} reward calls. Raise the "
                "budget or lower max_response_tokens."
            )

    def _begun(
        self, prompts: str | Prompt | Iterable[str | Prompt], budget: Budget | None
    ) -> tuple[list[TextState], list[Ledger]]:
        prompts = as_prompts(prompts)
        if not prompts:
            raise ValueError("generate: expected at least one prompt, got none.")
        states = [initial(prompt, self.language_model) for prompt in prompts]
        return states, [Ledger(budget) for _ in prompts]

    def _searches(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger], seed: int
    ) -> tuple[list[Begin[Completion]], int]:
        """What `run` is called with."""
        for state, ledger in zip(states, ledgers, strict=True):
            self._check_affords(state, ledger)
        searches: list[Begin[Completion]] = [
            partial(self.search, state, ledger, seed)
            for state, ledger in zip(states, ledgers, strict=True)
        ]
        return searches, self._most_at_once(states[0], ledgers[0].budget) if states else 1

    def _generations(
        self,
        states: Sequence[TextState],
        completions: Sequence[Completion],
        ledgers: Sequence[Ledger],
        seed: int,
    ) -> list[Generation]:
        texts = [self.language_model.decode(found.state.response_ids) for found in completions]
        rows = zip(states, completions, texts, ledgers, strict=True)
        return [
            Generation(state.prompt, completion, text, ledger.usage, self.name, seed)
            for state, completion, text, ledger in rows
        ]

    def _most_at_once(self, state: TextState, budget: Budget) -> int:
        """Searches that are under way at a time."""
        return MOST_AT_ONCE

    def response_usage(self, state: TextState) -> Usage:
        """The most that one complete response from `state` is charged."""
        prefix = len(state.prompt_ids) + len(state.response_ids)
        return self.language_model.usage_bound(prefix, [self._room(state)])

    def _room(self, state: TextState) -> int:
        """Tokens that the response can still have; 0 where it has ended."""
        if is_terminal(state):
            return 0
        return max(0, self._limit(state) - len(state.response_ids))

    def _limit(self, state: TextState) -> int:
        return response_limit(state, self.language_model, self.max_response_tokens)

    def _first_chunk(self, state: TextState, completion: Completion) -> Chunk:
        start, end = len(state.response_ids), len(state.response_ids) + self.chunk_tokens
        ids = completion.state.response_ids[start:end]
        whole = end >= len(completion.state.response_ids)
        logprobs = completion.logprobs[: len(ids)]
        return Chunk(ids, logprobs, completion.state.finish_reason if whole else None)


class _ChoicePlan:
    """One decision of `Agent.choose`: which candidates are looked at, and with what."""

    def __init__(
        self, state: TextState, candidates: Sequence[Chunk], budget: Budget | None, agent: Agent
    ) -> None:
        self.state, self.agent, self.ledger = state, agent, Ledger(budget)
        self.after = [transition(state, chunk, agent._limit(state)) for chunk in candidates]
        # Equal candidates are looked at once.
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
        completions = [Completion(self.after[i]) for i in ended]
        scored = await self.agent.scored(completions, self.ledger)
        self.found.update(zip(ended, scored, strict=True))

    def shares(self) -> dict[int, Ledger]:
        """An equal share of what is left for each candidate whose response can be finished."""
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
                f"{self.ledger.budget} is too small for one response behind any of the "
                f"{len(self.after)} candidates of prompt {self.state.prompt.id!r}. Raise the "
                "budget or lower max_response_tokens."
            )
        return {}

    def choice(self) -> Choice:
        index = max(sorted(self.found), key=lambda i: _score(self.found[i]))
        completions = tuple(self.found.get(i) for i in self.first)
        return Choice(index, completions, self.ledger.usage)


def best(completions: Sequence[Completion]) -> Completion:
    """The completion with the highest score; the first of equals."""
    return max(completions, key=lambda completion: _score(completion))


def affordable(ledger: Ledger, cost: Callable[[int], Usage], at_most: int) -> int:
    """The largest count from 0 to `at_most` whose cost, which grows, the ledger affords."""
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if ledger.affords(cost(middle)) else (low, middle - 1)
    return low


def is_binding(budget: Budget, usage: Usage) -> bool:
    """Whether a search that goes on and on, at this cost a time, ever meets a cap.

    A cap on something that costs nothing here is none: without this test, such a search would not
    end.
    """
    return budget.seconds is not None or not Ledger(budget).affords(usage * 1_000_000)


def check_positive(**counts: int | None) -> None:
    """Raise a ValueError that names a count below 1; None is no count."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}.")


def check_target(target: float | None) -> None:
    """Raise a ValueError for a target that no score reaches because it is not a number."""
    if target is not None and math.isnan(target):
        raise ValueError("target: expected a score, or None to spend the whole budget, got nan.")


def _score(completion: Completion) -> float:
    if completion.score is None:
        raise ValueError("Expected scored completions; score them with `Agent.scored` first.")
    return completion.score

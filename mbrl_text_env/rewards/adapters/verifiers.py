"""The rubrics and reward functions of verifiers as reward models.

Source: `verifiers.Rubric` in versions 0.1 to 0.3 (0.4 has tasks with `@reward` methods, which need
a whole rollout, and no rubrics): functions that take by name what they need of `prompt`,
`completion`, `answer`, `info`, `state`, `task`, `parser` and the row's columns.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from mbrl_text_env.rewards.adapters.common import (
    accepted,
    awaited,
    callable_name,
    number,
    parameters,
    reference_answer,
    required,
    trl_completion,
    trl_prompt,
)
from mbrl_text_env.rewards.base import RewardError, Scores
from mbrl_text_env.types import FloatArray, Prompt


class VerifiersReward:
    """A rubric of verifiers as a reward model, called once a response.

    The state of a rollout has the prompt and the completion (messages for chats, texts for plain
    prompts), as `answer` the prompt's reference answer, as `info` the metadata of that name or all
    of them, and the metadata as the row's columns. The parts are the rubric's metrics. Functions
    and weights, groups of rubrics, async functions and parsers are run by verifiers itself. It
    makes a 0 of a function that raises or returns no number; here that is an error.

    A rubric with a function that requires `answer` applies to prompts that have one. Functions that
    score a group of rollouts against each other are refused: a score must not depend on the rest
    of the batch.

    Args:
        rubric: The rubric.
        name: By default the rubric's functions, with "+" between them.

    Raises:
        TypeError: The rubric scores groups.

    Example:
        >>> import verifiers as vf  # doctest: +SKIP
        >>> def correct(completion, answer):  # doctest: +SKIP
        ...     return float(answer in completion[-1]["content"])
        >>> reward = VerifiersReward(vf.Rubric(funcs=[correct]))  # doctest: +SKIP
    """

    def __init__(self, rubric: Any, name: str | None = None) -> None:
        self.rubric = rubric
        functions = rubric._get_reward_funcs()
        self.name = "+".join(map(callable_name, functions)) if name is None else name
        if any(map(rubric._is_group_func, functions)):
            raise TypeError(
                f"Expected a rubric that scores rollouts one by one, got {self.name!r}, which "
                "scores groups against each other. A reward model's score must not depend on the "
                "rest of the batch; use the functions that do not."
            )
        self._needs_answer = any("answer" in required(function) for function in functions)

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt has a reference answer, if the rubric requires one."""
        return not self._needs_answer or reference_answer(prompt) is not None

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B]."""
        return self.score_parts(prompts, responses).total

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Return the rubric's rewards, and its metrics as parts.

        Raises:
            RewardError: A function raised or returned no number, or the answer is missing.
        """
        states = [self._scored(*row) for row in zip(prompts, responses, strict=True)]
        total = [
            number(state["reward"], self.name, prompt, response)
            for state, prompt, response in zip(states, prompts, responses, strict=True)
        ]
        names = states[0]["metrics"] if states else ()
        parts = {name: np.array([float(s["metrics"][name]) for s in states]) for name in names}
        return Scores(np.array(total, dtype=np.float64), parts)

    def _scored(self, prompt: Prompt, response: str) -> dict[str, Any]:
        _check_answer(self, prompt)
        state = _rollout(prompt, response)
        errors: list[str] = []
        awaited(_recording(self.rubric, errors).score_rollout(state))
        if errors:
            raise RewardError(
                f"Reward model {self.name!r}: {errors[0]} for prompt {prompt.id!r}, response "
                f"{response[:80]!r}. Mend the function."
            )
        return state


class VerifiersFunctionReward:
    """A reward function of verifiers without a rubric, called once a response; see the rubric's.

    Args:
        function: `f(completion, ...) -> float`, which names what it needs of `prompt`,
            `completion`, `answer`, `info`, `state`, `task` and the metadata's keys. May be async.

    Attributes:
        name: The function's `__name__`.

    Raises:
        TypeError: It requires `parser`, which only a rubric has.

    Example:
        >>> def correct(completion, answer):
        ...     return float(answer in completion[-1]["content"])
        >>> prompt = Prompt.from_text("2 + 2?", metadata={"answer": "4"})
        >>> VerifiersFunctionReward(correct).score([prompt], ["It is 4."])
        array([1.])
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = callable_name(function)
        self._needs_answer = "answer" in required(function)
        if "parser" in required(function):
            raise TypeError(
                f"Reward function {self.name!r} needs a parser, which a rubric has. Pass "
                "verifiers.Rubric(funcs=[function], parser=...)."
            )

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt's metadata have what the function requires."""
        offered = {*_offered(_rollout(prompt, ""))}
        if self._needs_answer and reference_answer(prompt) is None:
            return False
        return required(self.function) <= offered

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B].

        Raises:
            RewardError: The function raised or returned no number, or something is missing.
        """
        return np.array(
            [self._score(*row) for row in zip(prompts, responses, strict=True)], dtype=np.float64
        )

    def _score(self, prompt: Prompt, response: str) -> float:
        _check_answer(self, prompt)
        offered = _offered(_rollout(prompt, response))
        try:
            value = awaited(self.function(**accepted(self.function, offered)))
        except Exception as error:
            raise RewardError(
                f"Reward model {self.name!r}: raised {type(error).__name__}: {error} for prompt "
                f"{prompt.id!r}, response {response[:80]!r}. Mend the function, or add what it "
                f"needs to the metadata, which have {sorted(prompt.metadata)}."
            ) from error
        return number(value, self.name, prompt, response)


def _check_answer(reward: Any, prompt: Prompt) -> None:
    if reward._needs_answer and reference_answer(prompt) is None:
        raise RewardError(
            f"Reward model {reward.name!r}, prompt {prompt.id!r}: expected a reference answer in "
            f"the metadata, got the keys {sorted(prompt.metadata)}. Add 'answer', or leave out the "
            "prompt."
        )


def _rollout(prompt: Prompt, response: str) -> dict[str, Any]:
    """The state of a rollout of one turn."""
    metadata = dict(prompt.metadata)
    said = trl_prompt(prompt)
    answer = reference_answer(prompt)
    return {
        "prompt": said,
        "completion": trl_completion(prompt, response),
        "answer": "" if answer is None else answer,
        "info": metadata.get("info", metadata),
        "task": metadata.get("task", "default"),
        "input": {**metadata, "prompt": said, "example_id": prompt.id},
        "trajectory": [],
        "metrics": {},
    }


def _offered(state: dict[str, Any]) -> dict[str, Any]:
    named = ("prompt", "completion", "answer", "info", "task")
    return {**state["input"], **{key: state[key] for key in named}, "state": state}


def _recording(rubric: Any, errors: list[str]) -> Any:
    """A copy of a rubric that notes the errors that verifiers would make zeros of."""
    recording = copy.copy(rubric)
    if hasattr(rubric, "rubrics"):
        recording.rubrics = [_recording(inner, errors) for inner in rubric.rubrics]
    recording.funcs = [_recorded(function, errors) for function in rubric.funcs]
    return recording


def _recorded(function: Callable[..., Any], errors: list[str]) -> Callable[..., Any]:
    name = callable_name(function)

    def checked(value: Any) -> Any:
        if isinstance(value, str):
            raise TypeError(f"expected a number, got {value!r}")
        return float(value)

    async def later(value: Awaitable[Any]) -> Any:
        try:
            return checked(await value)
        except Exception as error:
            errors.append(f"{name} raised {type(error).__name__}: {error}")
            raise

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            value = function(*args, **kwargs)
            return later(value) if inspect.isawaitable(value) else checked(value)
        except Exception as error:
            errors.append(f"{name} raised {type(error).__name__}: {error}")
            raise

    # verifiers looks at the signature, which is the function's.
    call.__signature__ = inspect.Signature(list(parameters(function).values()))  # type: ignore[attr-defined]
    return call

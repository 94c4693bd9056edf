"""The rubrics and reward functions of verifiers as reward models, and reward models as rubrics.

Source: `verifiers.Rubric` in version 0.3 (0.4 has tasks with `@reward` methods, which need
a whole rollout, and no rubrics): functions that take by name what they need of `prompt`,
`completion`, `answer`, `info`, `state`, `task`, `parser` and the row's columns.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mbrl_text_env.files import plain_values
from mbrl_text_env.rewards.adapters.common import (
    FunctionAdapter,
    accepted,
    adapted,
    as_prompt,
    awaited,
    callable_name,
    reference_answer,
    required,
    said,
    trl_completion,
    trl_prompt,
)
from mbrl_text_env.rewards.base import (
    RewardError,
    RewardLike,
    RewardModel,
    Scores,
    score_responses,
)
from mbrl_text_env.types import FloatArray, Prompt

_OFFERED = {"prompt", "completion", "info", "state", "task"}
"""What every function can ask for; `answer` and columns have to be in the prompt's metadata."""


_ADVICE = "Fix the function, or add what it needs to the prompt's metadata."


class TurnMessage(dict[str, Any]):
    """A message as verifiers passes it: both `message["content"]` and `message.content`."""

    def __getattr__(self, name: str) -> Any:
        """Return the value under a key."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class VerifiersReward(RewardModel):
    """A rubric of verifiers as a reward model.

    The state of a rollout has the prompt and the completion (messages for chats, texts for plain
    prompts), as `answer` the prompt's reference answer, as `info` the metadata of that name or all
    of them, the metadata as the row's columns, and a `trajectory` of one step. There is no client,
    model, token or timing. The parts are the rubric's metrics. A rubric's functions are
    called as verifiers calls them, with what `score_objects` offers, and weighted; the responses of
    a batch wait side by side. Where verifiers makes a 0 of a function that raises or returns no
    number, there is an error.

    A rubric applies to prompts whose metadata have what its functions require: `answer` (see
    `common.REFERENCE_KEYS`) and columns. Functions that score a group of rollouts against each
    other are refused: a score must not depend on the rest of the batch.

    Args:
        rubric: The rubric.
        name: By default the rubric's functions, with "+" between them.

    Raises:
        TypeError: The rubric scores groups, has no functions, or a `score_rollout` of its own.

    Example:
        >>> import verifiers as vf  # doctest: +SKIP
        >>> def correct(completion, answer):  # doctest: +SKIP
        ...     return float(answer in completion[-1]["content"])
        >>> reward = VerifiersReward(vf.Rubric(funcs=[correct]))  # doctest: +SKIP
    """

    def __init__(self, rubric: Any, name: str | None = None) -> None:
        self.rubric = rubric
        functions = [function for _, function, _ in _functions(rubric)]
        if not functions:
            raise TypeError(
                f"Expected a rubric with reward functions, got a {type(rubric).__name__} with "
                "none. Add them with `rubric.add_reward_func(function)` first."
            )
        self.name = "+".join(map(callable_name, functions)) if name is None else name
        if rubric.has_group_rewards:
            raise TypeError(
                f"Expected a rubric that scores rollouts one by one, got {self.name!r}, which "
                "scores groups against each other. A reward model's score must not depend on the "
                "rest of the batch; use the functions that do not."
            )
        own = type(rubric).score_rollout.__qualname__
        if own not in ("Rubric.score_rollout", "RubricGroup.score_rollout"):
            raise TypeError(
                f"Expected a rubric whose score is the weighted sum of its functions, got {own}. "
                "Write what it computes as a reward function."
            )

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt's metadata have what the rubric's functions require."""
        return not _missing(self._needs(), prompt)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B]."""
        return self.score_parts(prompts, responses).total

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Return the rubric's rewards, and the scores of its functions as parts.

        Raises:
            RewardError: A function raised or returned no number, or a prompt lacks something.
        """
        needs = self._needs()
        for prompt in prompts:
            _check_metadata(self.name, needs, prompt)

        async def all_scored() -> list[list[float]]:
            return await asyncio.gather(*map(self._scored, prompts, responses))

        rows = np.array(awaited(all_scored()), dtype=np.float64).reshape(len(prompts), -1)
        parts: dict[str, FloatArray] = {}
        total = np.zeros(len(prompts))
        for column, (_, function, weight) in zip(rows.T, _functions(self.rubric), strict=False):
            total += weight * column
            name = callable_name(function)
            parts[name] = parts.get(name, 0.0) + column
        return Scores(total, parts)

    async def _scored(self, prompt: Prompt, response: str) -> list[float]:
        """What each function says; they are called as `Rubric.score_rollout` calls them."""
        state = _rollout(prompt, response)
        scores = []
        for rubric, function, _ in _functions(self.rubric):
            try:
                value = function(**accepted(function, rubric.score_objects(state)))
                value = await value if inspect.isawaitable(value) else value
                if isinstance(value, str | bytes):
                    raise TypeError(f"expected a number, got {value!r}")
                scores.append(float(value))
            except Exception as error:
                raise RewardError(
                    f"Reward model {self.name!r}: {callable_name(function)} raised "
                    f"{type(error).__name__}: {error} for prompt {prompt.id!r}, response "
                    f"{response[:80]!r}. {_ADVICE}"
                ) from error
        return scores

    def _needs(self) -> set[str]:
        return set().union(*(_needs_of(*row[:2]) for row in _functions(self.rubric)))


class VerifiersFunctionReward(FunctionAdapter):
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

    advice = _ADVICE

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        if "parser" in required(function):
            raise TypeError(
                f"Reward function {self.name!r} needs a parser, which a rubric has. Pass "
                "verifiers.Rubric(funcs=[function], parser=...)."
            )

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt's metadata have what the function requires."""
        return not _missing(required(self.function) - _OFFERED, prompt)

    def values(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        """What the function returns for each response."""
        return [self._value(*row) for row in zip(prompts, responses, strict=True)]

    def _value(self, prompt: Prompt, response: str) -> Any:
        _check_metadata(self.name, required(self.function) - _OFFERED, prompt)
        state = _rollout(prompt, response)
        named = {key: state[key] for key in ("prompt", "completion", "answer", "info", "task")}
        keywords = accepted(self.function, {**state["input"], **named, "state": state})
        return self.called(prompt, response, lambda: self.function(**keywords))


def to_verifiers(reward_model: RewardLike) -> Any:
    """Return a reward model as a `verifiers.Rubric` with one function.

    The function reads the prompt, the assistant's messages of the completion, and as the prompt's
    metadata the row's `info`, its columns and its `answer`, which is also the "reference_answer".
    verifiers logs the error of a reward that fails or does not apply, and counts it as 0.

    Raises:
        ImportError: verifiers with rubrics (before 0.4) is not installed.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> rubric = to_verifiers(SentimentReward())  # doctest: +SKIP
        >>> environment = verifiers.SingleTurnEnv(dataset, rubric=rubric)  # doctest: +SKIP
    """
    try:
        from verifiers import Rubric
    except ImportError as error:
        raise ImportError(
            "to_verifiers needs a version of verifiers that has rubrics: "
            "pip install 'verifiers>=0.3,<0.4'."
        ) from error

    scorer = adapted(reward_model)
    name = scorer.name

    def function(
        prompt: Any, completion: Any, state: Any, answer: Any = None, info: Any = None
    ) -> float:
        row = {key: value for key, value in state["input"].items() if key != "prompt"}
        answer = plain_values(answer)
        none = answer is None or answer == ""
        truth = {} if none else {"answer": answer, "reference_answer": answer}
        asked = as_prompt(_content(prompt), {**row, **(info or {}), **truth})
        response = said(_content(completion))
        return float(score_responses(scorer, [asked], [response]).total[0])

    function.__name__ = name
    return Rubric(funcs=[function])


def _functions(rubric: Any) -> list[tuple[Any, Callable[..., Any], float]]:
    """The functions of a rubric, or of a group's, each with the rubric that calls it and weight."""
    if hasattr(rubric, "rubrics"):
        return [row for inner in rubric.rubrics for row in _functions(inner)]
    return [(rubric, *pair) for pair in zip(rubric.funcs, rubric.weights, strict=True)]


def _needs_of(rubric: Any, function: Callable[..., Any]) -> set[str]:
    # Providers offer names that are known only when they are called.
    if getattr(rubric, "score_object_providers", None):
        return required(function) & {"answer"}
    return required(function) - _OFFERED - set(rubric.class_objects)


def _missing(needs: set[str], prompt: Prompt) -> list[str]:
    has_answer = reference_answer(prompt) is not None
    return sorted(
        key
        for key in needs
        if not (has_answer if key == "answer" else prompt.metadata.get(key) is not None)
    )


def _check_metadata(name: str, needs: set[str], prompt: Prompt) -> None:
    if missing := _missing(needs, prompt):
        raise RewardError(
            f"Reward model {name!r}, prompt {prompt.id!r}: expected {missing} in the metadata, got "
            f"the keys {sorted(prompt.metadata)}. Add them, or leave out the prompt."
        )


def _rollout(prompt: Prompt, response: str) -> dict[str, Any]:
    """The state of a rollout of one turn."""
    metadata = {key: value for key, value in prompt.metadata.items() if value is not None}
    asked, completion = _messages(trl_prompt(prompt)), _messages(trl_completion(prompt, response))
    answer = reference_answer(prompt)
    step = {
        "prompt": asked, "completion": completion, "response": None, "tokens": None,
        "reward": None, "advantage": None, "is_truncated": False, "trajectory_id": prompt.id,
        "extras": {},
    }  # fmt: skip
    return {
        "prompt": asked,
        "completion": completion,
        "answer": "" if answer is None else answer,
        "info": metadata.get("info", metadata),
        "task": metadata.get("task", "default"),
        "input": {**metadata, "prompt": asked, "example_id": prompt.id},
        "example_id": prompt.id,
        "trajectory": [step],
        "is_completed": True,
        "is_truncated": False,
        "error": None,
        "metrics": {},
    }


def _messages(content: Any) -> Any:
    return content if isinstance(content, str) else [TurnMessage(each) for each in content]


def _content(messages: Any) -> Any:
    """Messages, or the text that verifiers keeps as one message of the role "text"."""
    if isinstance(messages, str) or [message["role"] for message in messages] != ["text"]:
        return messages
    return messages[0]["content"]

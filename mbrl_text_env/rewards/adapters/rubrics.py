"""The rubrics of verifiers and OpenEnv as reward models, and reward models as rubrics.

Sources: `verifiers.Rubric` in version 0.3 (0.4 has tasks with `@reward` methods, which need a whole
rollout, and no rubrics), whose functions take by name what they need of `prompt`, `completion`,
`answer`, `info`, `state`, `task`, `parser` and the row's columns; `openenv.core.rubrics.Rubric`
(RFC 004 of OpenEnv): `rubric(action, observation) -> float`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mbrl_text_env.files import plain_values
from mbrl_text_env.rewards.adapters.common import (
    AdaptedReward,
    FunctionAdapter,
    RewardFunction,
    accepted,
    as_prompt,
    awaited,
    callable_name,
    reference_answer,
    required,
    said,
    trl_completion,
    trl_prompt,
)
from mbrl_text_env.rewards.base import RewardError, RewardLike, Scores
from mbrl_text_env.types import FloatArray, Prompt

_OFFERED = {"prompt", "completion", "info", "state", "task"}
"""What every function can ask for; `answer` and columns have to be in the prompt's metadata."""


class TurnMessage(dict[str, Any]):
    """A message as verifiers passes it: both `message["content"]` and `message.content`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Verifiers(AdaptedReward):
    """A rubric or function of verifiers, which says in `needs` what metadata it requires."""

    advice = "Fix the function, or add what it needs to the prompt's metadata."

    def needs(self) -> set[str]:
        """Names of the answer and the columns that are required."""
        raise NotImplementedError

    def missing(self, prompt: Prompt) -> list[str]:
        """Those of `needs` that the prompt lacks; the answer may have another name."""
        given = {key for key, value in prompt.metadata.items() if value is not None}
        if reference_answer(prompt) is not None:
            given.add("answer")
        return sorted(self.needs() - given)


class VerifiersReward(_Verifiers):
    """A rubric of verifiers as a reward model.

    The state of a rollout has the prompt and the completion (messages for chats, texts for plain
    prompts), as `answer` the prompt's reference answer, as `info` the metadata of that name or all
    of them, the metadata as the row's columns, and a `trajectory` of one step. There is no client,
    model, token or timing. A rubric's functions, which are its parts, are called as verifiers calls
    them, and weighted; the responses of a batch wait side by side. Where verifiers makes a 0 of a
    function that raises or returns no number, there is an error. A rubric applies to prompts whose
    metadata have what its functions require: `answer` (see `common.REFERENCE_KEYS`) and columns.

    Raises:
        TypeError: The rubric scores a group of rollouts against each other, has no functions, or a
            `score_rollout` of its own.

    Example:
        >>> reward = VerifiersReward(verifiers.Rubric(funcs=[correct]))  # doctest: +SKIP
    """

    def __init__(self, rubric: Any, name: str | None = None) -> None:
        self.rubric = rubric
        functions = [function for _, function, _ in _functions(rubric)]
        if not functions:
            raise TypeError(
                f"Expected a rubric with reward functions, got a {type(rubric).__name__} with "
                "none. Add them with `rubric.add_reward_func(function)` first."
            )
        self.name = name or "+".join(map(callable_name, functions))
        if rubric.has_group_rewards:
            raise TypeError(
                f"Expected a rubric that scores rollouts one by one, got {self.name!r}, which "
                "scores groups against each other. Use the functions that do not."
            )
        own = type(rubric).score_rollout.__qualname__
        if own not in ("Rubric.score_rollout", "RubricGroup.score_rollout"):
            raise TypeError(
                f"Expected a rubric whose score is the weighted sum of its functions, got {own}. "
                "Write what it computes as a reward function."
            )

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B]."""
        return self.score_parts(prompts, responses).total

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Return the rubric's rewards, and the scores of its functions as parts."""
        self.check(prompts)

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

    def needs(self) -> set[str]:
        """What the rubric's functions require."""
        return set().union(*(_needs_of(*row[:2]) for row in _functions(self.rubric)))

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
                    f"{response[:80]!r}. {self.advice}"
                ) from error
        return scores


class VerifiersFunctionReward(_Verifiers, FunctionAdapter):
    """A reward function of verifiers without a rubric, called once a response; may be async.

    It names what it needs of `prompt`, `completion`, `answer`, `info`, `state`, `task` and the
    metadata's keys. One that requires `parser`, which only a rubric has, is a `TypeError`.

    Example:
        >>> def correct(completion, answer):
        ...     return float(answer in completion[-1]["content"])
        >>> prompt = Prompt.from_text("2 + 2?", metadata={"answer": "4"})
        >>> VerifiersFunctionReward(correct).score([prompt], ["It is 4."])
        array([1.])
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        if "parser" in required(function):
            raise TypeError(
                f"Reward function {self.name!r} needs a parser, which a rubric has. Pass "
                "verifiers.Rubric(funcs=[function], parser=...)."
            )

    def needs(self) -> set[str]:
        """What the function requires."""
        return required(self.function) - _OFFERED

    def value(self, prompt: Prompt, response: str) -> Any:
        """What the function returns."""
        state = _rollout(prompt, response)
        named = {key: state[key] for key in ("prompt", "completion", "answer", "info", "task")}
        keywords = accepted(self.function, {**state["input"], **named, "state": state})
        return self.called(prompt, response, lambda: self.function(**keywords))


def to_verifiers(reward_model: RewardLike) -> Any:
    """Return a reward model as a `verifiers.Rubric` with one function.

    The function reads the prompt, the assistant's messages of the completion, and as the prompt's
    metadata the row's `info`, its columns and its `answer`, which is also the "reference_answer".
    verifiers (before 0.4) logs the error of a reward that fails or does not apply, and counts it
    as 0.

    Example:
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

    scorer = RewardFunction(reward_model)

    def function(
        prompt: Any, completion: Any, state: Any, answer: Any = None, info: Any = None
    ) -> float:
        row = {key: value for key, value in state["input"].items() if key != "prompt"}
        answer = plain_values(answer)
        none = answer is None or answer == ""
        truth = {} if none else {"answer": answer, "reference_answer": answer}
        asked = as_prompt(_content(prompt), {**row, **(info or {}), **truth})
        return scorer.totals([asked], [said(_content(completion))])[0]

    function.__name__ = scorer.__name__
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


def _rollout(prompt: Prompt, response: str) -> dict[str, Any]:
    metadata = {key: value for key, value in prompt.metadata.items() if value is not None}
    asked, completion = _messages(trl_prompt(prompt)), _messages(trl_completion(prompt, response))
    answer = reference_answer(prompt)
    turn = {"prompt": asked, "completion": completion, "is_truncated": False}
    missing = dict.fromkeys(("response", "tokens", "reward", "advantage"))
    return {
        **turn,
        "answer": "" if answer is None else answer,
        "info": metadata.get("info", metadata),
        "task": metadata.get("task", "default"),
        "input": {**metadata, "prompt": asked, "example_id": prompt.id},
        "example_id": prompt.id,
        "trajectory": [{**turn, **missing, "trajectory_id": prompt.id, "extras": {}}],
        "is_completed": True,
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


class TextAction(str):
    """A response as OpenEnv's action: a text with `metadata`."""

    def __init__(self, response: str) -> None:
        self.metadata: Mapping[str, Any] = {}


class TextObservation(str):
    """A prompt as OpenEnv's observation: a text with `prompt`, `metadata`, `done` and `reward`."""

    def __new__(cls, prompt: Prompt) -> TextObservation:
        """Make the observation at the end of a response to a prompt."""
        return super().__new__(cls, prompt.text)

    def __init__(self, prompt: Prompt) -> None:
        self.prompt, self.metadata = prompt, dict(prompt.metadata)
        self.done, self.reward = True, None

    def __getnewargs__(self) -> tuple[Prompt]:  # type: ignore[override]
        return (self.prompt,)


class OpenEnvReward(AdaptedReward):
    """A rubric of OpenEnv as a reward model, called once a response.

    An episode is one step: the action is the response, the observation what is known at the end,
    with `done` True. Before each the rubric and those within it are reset, as by an environment, so
    that those which collect a trajectory start anew.

    Args:
        rubric: A rubric, called as `rubric(action, observation)`; may be async.
        convert: Makes action and observation of a prompt and a response, for rubrics that expect
            the types of their own environment; by default `TextAction` and `TextObservation`.
        name: By default the rubric's class.

    Example:
        >>> reward = OpenEnvReward(MyRubric())  # doctest: +SKIP
    """

    advice = (
        "Fix the rubric; if it expects the types of its environment, pass "
        "OpenEnvReward(rubric, convert=...)."
    )

    def __init__(
        self,
        rubric: Any,
        convert: Callable[[Prompt, str], tuple[Any, Any]] | None = None,
        name: str | None = None,
    ) -> None:
        self.rubric = rubric
        self.convert = convert
        self.name = name or type(rubric).__name__

    def value(self, prompt: Prompt, response: str) -> Any:
        """What the rubric says."""

        def episode() -> Any:
            for rubric in (self.rubric, *self.rubric.rubrics()):
                rubric.reset()
            if self.convert is not None:
                return self.rubric(*self.convert(prompt, response))
            return self.rubric(TextAction(response), TextObservation(prompt))

        return self.called(prompt, response, episode)


def to_openenv(
    reward_model: RewardLike, read: Callable[[Any, Any], tuple[Prompt, str]] | None = None
) -> Any:
    """Return a reward model as a `Rubric` of OpenEnv, which an environment calls when it steps.

    `read` makes prompt and response of an action and an observation. By default both are texts: the
    action is the response, the observation the prompt (a `TextObservation` has its metadata too).

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> rubric = to_openenv(SentimentReward())  # doctest: +SKIP
        >>> rubric("It was good.", "How was it?")  # doctest: +SKIP
        0.4404
    """
    try:
        from openenv.core.rubrics import Rubric
    except ImportError as error:
        raise ImportError("to_openenv needs OpenEnv: pip install openenv-core.") from error

    scorer = RewardFunction(reward_model)

    class RewardModelRubric(Rubric):
        def forward(self, action: Any, observation: Any) -> float:
            prompt, response = (read or _read)(action, observation)
            return scorer.totals([prompt], [response])[0]

    RewardModelRubric.__name__ = scorer.__name__
    return RewardModelRubric()


def _read(action: Any, observation: Any) -> tuple[Prompt, str]:
    if not isinstance(action, str) or not isinstance(observation, str):
        raise TypeError(
            f"Expected texts, got a {type(action).__name__} as action and a "
            f"{type(observation).__name__} as observation. Pass to_openenv(reward, read=...), a "
            "function that makes prompt and response of them."
        )
    prompt = getattr(observation, "prompt", None) or as_prompt(observation, {})
    return prompt, str(action)

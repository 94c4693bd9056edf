"""Functions as reward models, and reward models as functions of TRL.

TRL's trainers call a reward function with keywords only: `prompts`, `completions`,
`completion_ids`, one list for each further column of the data set, and `trainer_state`,
`log_extra` and `log_metric` (`GRPOTrainer._calculate_rewards`). `as_reward_model` makes that call
from prompts and responses, `to_trl` answers it with a reward model.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import numpy as np

from mbrl_text_env.rewards.base import (
    RewardError,
    RewardModel,
    applies_to,
    reward_name,
    score_responses,
)
from mbrl_text_env.types import FloatArray, Message, Prompt

_TEXT_COLUMNS = ("prompts", "completions", "completion_ids")
# What the trainer adds to every call; not columns of the data.
_TRAINER_KEYWORDS = ("trainer_state", "log_extra", "log_metric", "environments")


def as_reward_model(
    reward: RewardModel | Callable[..., Any],
    *,
    encode: Callable[[str], Sequence[int]] | None = None,
) -> RewardModel:
    """Return a reward model for whatever scores responses.

    Accepted are:

    - an object with a method `score`, which is returned as it is;
    - a reward function of TRL, recognised by a parameter `completions` or `completion_ids`: see
      `TRLFunctionReward`;
    - a function of two texts, `f(prompt, response) -> float`: see `FunctionReward`.

    Args:
        reward: One of these.
        encode: Token ids of a response's text, for TRL's functions that read `completion_ids`
            (usually for the length). Reward models see text only, so these are ids of the text
            encoded anew, with whatever tokenizer is passed; they may differ from the sampled ones.

    Raises:
        TypeError: It is none of these, or it needs `completion_ids` and there is no `encode`.

    Example:
        >>> def brevity(prompt, response):
        ...     return -len(response.split())
        >>> reward = as_reward_model(brevity)
        >>> reward.name, reward.score([Prompt.from_text("Hi")], ["Hello you"])
        ('brevity', array([-2.]))
    """
    if inspect.isclass(reward):
        raise TypeError(
            f"Expected a reward, got the class {reward.__name__}. Make an object of it: "
            f"{reward.__name__}(...)."
        )
    if hasattr(reward, "score"):
        return cast(RewardModel, reward)
    parameters = _parameters(reward)
    if any(name in parameters for name in ("completions", "completion_ids")):
        return TRLFunctionReward(reward, encode)
    if _takes_two_texts(parameters):
        return FunctionReward(reward)
    signature = f"({', '.join(map(str, parameters.values()))})" if parameters else ""
    raise TypeError(
        f"Expected a reward, got {type(reward).__name__} {_callable_name(reward)}{signature}. Pass "
        "an object with a method `score(prompts, responses) -> float64[B]`, a TRL reward function "
        "`f(prompts, completions, **kwargs) -> list[float | None]`, or a function of two texts "
        "`f(prompt, response) -> float`. For a name, call `mbrl_text_env.rewards.make`."
    )


class FunctionReward:
    """A function of two texts as a reward model, called once a response.

    Args:
        function: `f(prompt_text, response) -> float`. None, for a prompt that it does not apply to,
            is an error. Picklable if it is.

    Attributes:
        name: The function's `__name__`.

    Example:
        >>> reward = FunctionReward(lambda prompt, response: float(prompt in response))
        >>> reward.score([Prompt.from_text("Paris")], ["Paris, France"])
        array([1.])
    """

    def __init__(self, function: Callable[[str, str], float]) -> None:
        self.function = function
        self.name = _callable_name(function)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B].

        Raises:
            RewardError: The function raised or returned no number; the message names the prompt
                and the response.
        """
        return np.array([self._score(*row) for row in zip(prompts, responses, strict=True)])

    def _score(self, prompt: Prompt, response: str) -> float:
        try:
            value = self.function(prompt.text, response)
        except Exception as error:
            raise RewardError(
                f"Reward model {self.name!r}: raised {type(error).__name__}: {error} for prompt "
                f"{prompt.id!r}, response {response[:80]!r}. Mend the function."
            ) from error
        return _number(value, self.name, prompt, response)


class TRLFunctionReward:
    """A reward function of TRL as a reward model, called once a batch with keywords only.

    Passed are those of the following that the function names, or all if it takes `**kwargs`:

    - `prompts` and `completions`: strings for prompts of plain text; for chats lists of messages,
      `[{"role": "assistant", "content": response}]` being the completion. TRL does the same, by the
      format of the data set. A batch of both kinds makes two calls.
    - `completion_ids`: only with `encode`; see `as_reward_model`.
    - The prompts' metadata, each key a column with one value a prompt. A key that other prompts of
      the batch lack is None for them, as in a data set. A column that the function requires has to
      be in every prompt's metadata: the reward does not apply to other prompts.
    - `trainer_state` as None (there is no trainer), and `log_extra` and `log_metric`, which do
      nothing.

    Async functions are run to their end.

    Args:
        function: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`. None,
            for a prompt that it does not apply to, is an error. Picklable if it is.
        encode: Token ids of a response's text.

    Attributes:
        name: The function's `__name__`, which is TRL's key for its metrics.

    Raises:
        TypeError: It requires `completion_ids` and there is no `encode`.

    Example:
        >>> def mentions(completions, answer, **kwargs):
        ...     return [float(a in c[0]["content"]) for c, a in zip(completions, answer)]
        >>> prompt = Prompt.from_text("Capital of France?", metadata={"answer": "Paris"})
        >>> TRLFunctionReward(mentions).score([prompt], ["It is Paris."])
        array([1.])
    """

    def __init__(
        self,
        function: Callable[..., Any],
        encode: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        self.function = function
        self.encode = encode
        self.name = _callable_name(function)
        if encode is None and "completion_ids" in self._required():
            raise TypeError(
                f"Reward function {self.name!r} needs `completion_ids`, but a reward model sees "
                "text only. Pass as_reward_model(function, encode=...), with a function that gives "
                "the token ids of a text."
            )

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt's metadata has the columns that the function requires."""
        return not self._missing_columns(prompt)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B].

        Raises:
            RewardError: A prompt lacks a column, or the function returned None for it, something
                that is no number, or not one value a completion.
        """
        scores = np.zeros(len(responses))
        plain = [isinstance(prompt.content, str) for prompt in prompts]
        for kind in (True, False):
            rows = [i for i, is_plain in enumerate(plain) if is_plain is kind]
            if rows:
                scores[rows] = self._score_alike(
                    [prompts[i] for i in rows], [responses[i] for i in rows]
                )
        return scores

    def _score_alike(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Score prompts that are all chats, or all plain text."""
        for prompt in prompts:
            if missing := self._missing_columns(prompt):
                raise RewardError(
                    f"Reward model {self.name!r} requires {missing} in the metadata of a prompt; "
                    f"prompt {prompt.id!r} has {sorted(prompt.metadata)}. Add the metadata, or "
                    "leave out the prompts that it does not apply to."
                )
        values = list(_awaited(self.function(**self._keywords(prompts, responses))))
        if len(values) != len(responses):
            raise RewardError(
                f"Reward model {self.name!r}: expected {len(responses)} values, one a completion, "
                f"got {len(values)} for prompts from {prompts[0].id!r}, first response "
                f"{responses[0][:80]!r}. Change the function."
            )
        return [
            _number(value, self.name, prompt, response)
            for value, prompt, response in zip(values, prompts, responses, strict=True)
        ]

    def _keywords(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, Any]:
        keys = {key: None for prompt in prompts for key in prompt.metadata}
        offered: dict[str, Any] = {
            **{
                key: [prompt.metadata.get(key) for prompt in prompts]
                for key in keys
                if key not in _TEXT_COLUMNS
            },
            "trainer_state": None,
            "log_extra": _ignore,
            "log_metric": _ignore,
            "prompts": [_trl_prompt(prompt) for prompt in prompts],
            "completions": [_trl_completion(*row) for row in zip(prompts, responses, strict=True)],
        }
        if self.encode is not None:
            offered["completion_ids"] = [list(self.encode(response)) for response in responses]
        parameters = _parameters(self.function)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return offered
        return {name: value for name, value in offered.items() if name in parameters}

    def _missing_columns(self, prompt: Prompt) -> list[str]:
        known = {*_TEXT_COLUMNS, *_TRAINER_KEYWORDS, *prompt.metadata}
        return sorted(self._required() - known)

    def _required(self) -> set[str]:
        return {
            name
            for name, p in _parameters(self.function).items()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }


def to_trl(reward_model: RewardModel) -> TRLReward:
    """Return a reward model as a reward function of TRL.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> function = to_trl(SentimentReward())
        >>> function(prompts=["How was it?"], completions=["It was good."])
        [0.4404]
        >>> trainer = GRPOTrainer(model, reward_funcs=function, ...)  # doctest: +SKIP
    """
    return TRLReward(reward_model)


class TRLReward:
    """A reward model that TRL's trainers can call; see `to_trl`.

    The columns of the data set become the prompts' metadata, and a column `id` their ids. A row
    that the reward model does not apply to gives None, which TRL leaves out of its sum; a failure
    raises. Of a completion of several messages, the assistant's are scored, joined by line breaks.
    Picklable if the reward model is.

    Args:
        reward_model: The reward model.

    Attributes:
        __name__: Its name, which is TRL's key for its metrics.
    """

    def __init__(self, reward_model: RewardModel) -> None:
        self.reward_model = reward_model
        self.__name__ = reward_name(reward_model)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Score completions as `GRPOTrainer` asks for it.

        Args:
            prompts: B strings or lists of messages.
            completions: B strings or lists of messages.
            **columns: Lists of B values, and what the trainer adds.

        Raises:
            RewardError: The reward model failed.
        """
        dropped = (*_TEXT_COLUMNS, *_TRAINER_KEYWORDS)
        columns = {key: values for key, values in columns.items() if key not in dropped}
        converted = [
            _prompt(prompt, {key: values[i] for key, values in columns.items()})
            for i, prompt in enumerate(prompts)
        ]
        rows = [i for i, prompt in enumerate(converted) if applies_to(self.reward_model, prompt)]
        scores = score_responses(
            self.reward_model,
            [converted[i] for i in rows],
            [_response(completions[i]) for i in rows],
        )
        values: list[float | None] = [None] * len(converted)
        for place, i in enumerate(rows):
            values[i] = float(scores.total[place])
        return values


def _parameters(function: object) -> Mapping[str, inspect.Parameter]:
    """Parameters by name; none for what cannot be called, or does not tell."""
    try:
        return inspect.signature(function).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return {}


def _takes_two_texts(parameters: Mapping[str, inspect.Parameter]) -> bool:
    kinds = [p.kind for p in parameters.values() if p.default is p.empty]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [kind for kind in kinds if kind not in variable]
    return len(needed) == 2 and all(kind in positional for kind in needed)


def _callable_name(function: object) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _awaited(result: Any) -> Any:
    if not inspect.isawaitable(result):
        return result

    async def wait() -> Any:
        return await result

    # In a thread of its own: notebooks have an event loop running in the main one.
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(asyncio.run, wait()).result()


def _ignore(*args: Any) -> None:
    """Stand in for the trainer's log."""


def _number(value: Any, name: str, prompt: Prompt, response: str) -> float:
    if value is None:
        raise RewardError(
            f"Reward model {name!r} does not apply to prompt {prompt.id!r}: it returned None for "
            f"response {response[:80]!r}. Leave out the prompts that it does not apply to."
        )
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"Reward model {name!r}: expected a number for prompt {prompt.id!r}, response "
            f"{response[:80]!r}, got {value!r}. Change the function."
        ) from error


def _trl_prompt(prompt: Prompt) -> Any:
    if isinstance(prompt.content, str):
        return prompt.content
    return [{"role": message.role, "content": message.content} for message in prompt.content]


def _trl_completion(prompt: Prompt, response: str) -> Any:
    is_chat = not isinstance(prompt.content, str)
    return [{"role": "assistant", "content": response}] if is_chat else response


def _prompt(content: Any, metadata: dict[str, Any]) -> Prompt:
    if not isinstance(content, str):
        content = tuple(Message(message["role"], message["content"]) for message in content)
    prompt = Prompt("prompt", content, metadata)
    return replace(prompt, id=str(metadata.get("id") or prompt.text))


def _response(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    # Calls of tools have no content.
    return "\n".join(
        message["content"] or ""
        for message in completion
        if message.get("role", "assistant") == "assistant"
    )

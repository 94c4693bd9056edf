"""What the adapters share: looking at signatures, waiting for results, checking numbers."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np

from mbrl_text_env.files import plain_values
from mbrl_text_env.rewards.base import (
    RewardError,
    RewardLike,
    RewardModel,
    place_of,
    score_responses,
)
from mbrl_text_env.types import FloatArray, Message, Prompt

REFERENCE_KEYS = ("ground_truth", "reference_answer", "answer")
"""Where a prompt's metadata have the right answer; the first that is there counts.

verl's own data sets have it under "ground_truth" of "reward_model", which comes first of all.
"""

_DEPTH = ContextVar("depth", default=0)
"""How many async functions that score are waiting for each other here."""


def parameters(function: object) -> Mapping[str, inspect.Parameter]:
    """Parameters by name; none for what cannot be called, or does not tell."""
    try:
        return inspect.signature(function).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return {}


def required(function: object) -> set[str]:
    """Names of the parameters that have no default."""
    return {
        name
        for name, p in parameters(function).items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


def accepted(function: object, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those keywords that a function names, or all if it takes `**kwargs`."""
    named = parameters(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in named.values())
    return {name: value for name, value in offered.items() if takes_all or name in named}


def callable_name(function: object) -> str:
    """A function's name, or its class's where it has none."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def awaited(result: Any) -> Any:
    """A result, waited for if it has to be, also while an event loop runs (in notebooks)."""
    if not inspect.isawaitable(result):
        return result

    depth = _DEPTH.get()

    async def wait() -> Any:
        _DEPTH.set(depth + 1)
        return await result

    return asyncio.run_coroutine_threadsafe(wait(), _event_loop(os.getpid(), depth)).result()


@functools.cache
def _event_loop(process: int, depth: int) -> asyncio.AbstractEventLoop:
    """A loop that runs in a thread of its own, for ever.

    One loop for all calls, since clients of servers keep connections that belong to a loop. One a
    process, since a fork has no threads; and one a depth, since an async function may score with
    another, which its own loop could not run.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def number(value: Any, name: str, prompt: Prompt, response: str) -> float:
    """What a function returned for a response, as a number, which None and texts are not."""
    if value is None:
        raise RewardError(
            f"Reward model {name!r} does not apply to prompt {prompt.id!r}: it returned None for "
            f"response {response[:80]!r}. Leave out the prompts that it does not apply to."
        )
    try:
        if isinstance(value, str | bytes):
            raise TypeError("a text")
        return float(value)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"Reward model {name!r}: expected a number for prompt {prompt.id!r}, response "
            f"{response[:80]!r}, got {value!r}. Change the function."
        ) from error


def listed(
    result: Any, name: str, prompts: Sequence[Prompt], responses: Sequence[str]
) -> list[Any]:
    """What a batched function returned (a list, tensor or array), as a list of one a response."""
    plain = result if isinstance(result, Mapping) else plain_values(result)
    is_many = isinstance(plain, Iterable) and not isinstance(plain, str | bytes | Mapping)
    values = list(plain) if is_many else None
    if values is None or len(values) != len(responses):
        got = f"{plain!r:.80}" if values is None else len(values)
        rows = zip(prompts[:1], responses[:1], strict=True)
        first = [f" for prompts from {p.id!r}, first response {r[:80]!r}" for p, r in rows]
        raise RewardError(
            f"Reward model {name!r}: expected {len(responses)} values, one a completion, got "
            f"{got}{''.join(first)}. Change the function."
        )
    return values


def reference_answer(prompt: Prompt) -> Any:
    """The right answer in a prompt's metadata (see `REFERENCE_KEYS`); None where there is none."""
    nested = prompt.metadata.get("reward_model")
    found = [nested.get("ground_truth")] if isinstance(nested, Mapping) else []
    found += [prompt.metadata.get(key) for key in REFERENCE_KEYS]
    return next((value for value in found if value is not None), None)


def trl_prompt(prompt: Prompt) -> Any:
    """A prompt in the format of data sets: a text, or a list of messages."""
    if isinstance(prompt.content, str):
        return prompt.content
    return [{"role": message.role, "content": message.content} for message in prompt.content]


def said(completion: Any) -> str:
    """What the assistant said in a completion, a text or messages, which line breaks join."""
    if isinstance(completion, str):
        return str(completion)
    return "\n".join(
        # Calls of tools have no content.
        _content_text(message.get("content"))
        for message in plain_values(completion)
        if message.get("role", "assistant") == "assistant"
    )


def as_prompt(content: Any, metadata: Mapping[str, Any]) -> Prompt:
    """A prompt from a text or messages, and metadata; its id is the metadata's, or its text.

    Both may come from tables: see `plain_values`. A value that is None is not given.
    """
    content, metadata = plain_values(content), plain_values(metadata)
    if not isinstance(content, str):
        content = tuple(Message(m["role"], _content_text(m.get("content"))) for m in content)
    name = metadata.get("id")
    if name in (None, ""):
        prompt = Prompt("prompt", content, metadata)
        return replace(prompt, id=prompt.text)
    return Prompt(str(name), content, metadata)


def _content_text(content: Any) -> str:
    """A message's content: a text, nothing, or the texts among its parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content if part.get("type") == "text")


class AdaptedReward(RewardModel):
    """A function, which names the reward, as a reward model: a subclass gives `value` or `values`.

    It does not apply to prompts whose metadata lack what is required (`missing`).
    """

    advice = "Fix the function."
    """What an error says at its end."""
    answer_keys = ""
    """Where a missing answer may stand, for the error."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = callable_name(function)

    def missing(self, prompt: Prompt) -> list[str]:
        """What it requires of a prompt's metadata that they do not have."""
        return []

    def value(self, prompt: Prompt, response: str) -> Any:
        """What is said of a response, which becomes a checked number."""
        raise NotImplementedError

    def values(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[Any]:
        """What is said of each response; by default one at a time."""
        return [self.value(*row) for row in zip(prompts, responses, strict=True)]

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt's metadata have what is required."""
        return not self.missing(prompt)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B]; an error where one is no number names the prompt and the response."""
        for prompt in prompts:
            if missing := self.missing(prompt):
                raise RewardError(
                    f"Reward model {self.name!r}, prompt {prompt.id!r}: expected {missing} in the "
                    f"metadata{self.answer_keys}, got the keys {sorted(prompt.metadata)}. Add "
                    "them, or leave out the prompt."
                )
        rows = zip(self.values(prompts, responses), prompts, responses, strict=True)
        return np.array([number(v, self.name, p, r) for v, p, r in rows], dtype=np.float64)

    def called(self, prompt: Prompt, response: str, function: Callable[[], Any]) -> Any:
        """What a function says of one response; whatever it raises names prompt and response."""
        try:
            return awaited(function())
        except (KeyboardInterrupt, RewardError):
            raise
        except BaseException as error:
            raise RewardError(
                f"Reward model {self.name!r}: raised {type(error).__name__}: {error}"
                f"{place_of(error)} for prompt {prompt.id!r}, response {response[:80]!r}. "
                f"{self.advice}"
            ) from error


class RewardFunction:
    """A reward model, or whatever `as_reward_model` takes, as a function under its name."""

    def __init__(self, reward_model: RewardLike) -> None:
        # It imports what uses this.
        from mbrl_text_env.rewards.adapters import as_reward_model

        self.reward_model = as_reward_model(reward_model)
        self.__name__ = self.reward_model.name

    def totals(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """The scores as plain numbers."""
        return score_responses(self.reward_model, prompts, responses).total.tolist()

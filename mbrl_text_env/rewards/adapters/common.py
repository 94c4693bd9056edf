"""Helpers of the adapters: inspect signatures, await results, and check numbers."""

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
"""The metadata keys of a prompt's reference answer; the first one present is used.

verl's own datasets store it in metadata["reward_model"]["ground_truth"], which takes precedence.
"""

_DEPTH = ContextVar("depth", default=0)
"""The nesting depth of async functions that score."""


def parameters(function: object) -> Mapping[str, inspect.Parameter]:
    """Return the parameters by name; empty if there is no signature."""
    try:
        return inspect.signature(function).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return {}


def required(function: object) -> set[str]:
    """Return the names of the parameters without a default."""
    return {
        name
        for name, p in parameters(function).items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


def accepted(function: object, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords that a function accepts, which is all of them if it takes `**kwargs`."""
    named = parameters(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in named.values())
    return {name: value for name, value in offered.items() if takes_all or name in named}


def callable_name(function: object) -> str:
    """Return a function's name, or the name of its class if it has none."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def awaited(result: Any) -> Any:
    """Await a result if necessary, even while an event loop is running (as in notebooks)."""
    if not inspect.isawaitable(result):
        return result

    depth = _DEPTH.get()

    async def wait() -> Any:
        _DEPTH.set(depth + 1)
        return await result

    return asyncio.run_coroutine_threadsafe(wait(), _event_loop(os.getpid(), depth)).result()


@functools.cache
def _event_loop(process: int, depth: int) -> asyncio.AbstractEventLoop:
    """Return an event loop that runs forever in its own thread.

    All calls share a loop, because HTTP clients keep connections that belong to a loop. There is
    one loop per process, because a fork has no threads, and one per depth, because an async
    function can call another one, which a busy loop could not run.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def number(value: Any, name: str, prompt: Prompt, response: str) -> float:
    """Convert what a function returned for a response to a float; None and strings are errors."""
    if value is None:
        raise RewardError(
            f"Reward model {name!r} does not apply to prompt {prompt.id!r}: it returned None for "
            f"response {response[:80]!r}. Remove the prompts that it does not apply to."
        )
    try:
        if isinstance(value, str | bytes):
            raise TypeError("a string")
        return float(value)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"Reward model {name!r}: expected a number for prompt {prompt.id!r}, response "
            f"{response[:80]!r}, got {value!r}. Change the function."
        ) from error


def listed(
    result: Any, name: str, prompts: Sequence[Prompt], responses: Sequence[str]
) -> list[Any]:
    """Convert a batched function's result (list, tensor or array) to one value per response."""
    plain = result if isinstance(result, Mapping) else plain_values(result)
    is_many = isinstance(plain, Iterable) and not isinstance(plain, str | bytes | Mapping)
    values = list(plain) if is_many else None
    if values is None or len(values) != len(responses):
        got = f"{plain!r:.80}" if values is None else len(values)
        rows = zip(prompts[:1], responses[:1], strict=True)
        first = [f" for a batch starting at prompt {p.id!r}, response {r[:80]!r}" for p, r in rows]
        raise RewardError(
            f"Reward model {name!r}: expected {len(responses)} values, one per completion, got "
            f"{got}{''.join(first)}. Change the function."
        )
    return values


def reference_answer(prompt: Prompt) -> Any:
    """Return the reference answer in the metadata (see `REFERENCE_KEYS`), or None."""
    nested = prompt.metadata.get("reward_model")
    found = [nested.get("ground_truth")] if isinstance(nested, Mapping) else []
    found += [prompt.metadata.get(key) for key in REFERENCE_KEYS]
    return next((value for value in found if value is not None), None)


def trl_prompt(prompt: Prompt) -> Any:
    """Return a prompt in TRL's dataset format: a string or a list of messages."""
    if isinstance(prompt.content, str):
        return prompt.content
    return [{"role": message.role, "content": message.content} for message in prompt.content]


def said(completion: Any) -> str:
    """Return the assistant's text in a completion (a string or messages joined by line breaks)."""
    if isinstance(completion, str):
        return str(completion)
    return "\n".join(
        # Tool calls have no content.
        _content_text(message.get("content"))
        for message in plain_values(completion)
        if message.get("role", "assistant") == "assistant"
    )


def as_prompt(content: Any, metadata: Mapping[str, Any]) -> Prompt:
    """Make a prompt from content and metadata; its id is `metadata["id"]` or its text.

    Values from tables are converted with `plain_values`; None counts as missing.
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
    """Return the text of a message's content: a string, None, or a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content if part.get("type") == "text")


class AdaptedReward(RewardModel):
    """Base class of reward models from functions; a subclass implements `value` or `values`.

    The name is the function's. It does not apply to prompts without required metadata (`missing`).
    """

    advice = "Fix the function."
    """The last sentence of error messages."""
    answer_keys = ""
    """A note on the accepted keys of a missing answer, for the error message."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = callable_name(function)

    def missing(self, prompt: Prompt) -> list[str]:
        """Return the required metadata keys that a prompt lacks."""
        return []

    def value(self, prompt: Prompt, response: str) -> Any:
        """Return the score of one response; it is then checked and converted to a float."""
        raise NotImplementedError

    def values(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[Any]:
        """Return the scores of the responses; by default, call `value` for each."""
        return [self.value(*row) for row in zip(prompts, responses, strict=True)]

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether the prompt has the required metadata."""
        return not self.missing(prompt)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B]; the error for a value that is not a number names its prompt."""
        for prompt in prompts:
            if missing := self.missing(prompt):
                raise RewardError(
                    f"Reward model {self.name!r}, prompt {prompt.id!r}: expected {missing} in the "
                    f"metadata{self.answer_keys}, got the keys {sorted(prompt.metadata)}. Add "
                    "them, or remove the prompt."
                )
        rows = zip(self.values(prompts, responses), prompts, responses, strict=True)
        return np.array([number(v, self.name, p, r) for v, p, r in rows], dtype=np.float64)

    def called(self, prompt: Prompt, response: str, function: Callable[[], Any]) -> Any:
        """Call a function for one response; its errors name the prompt and the response."""
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
    """Base class of functions made from a reward model or anything `as_reward_model` accepts."""

    def __init__(self, reward_model: RewardLike) -> None:
        # Imported here to avoid a circular import.
        from mbrl_text_env.rewards.adapters import as_reward_model

        self.reward_model = as_reward_model(reward_model)
        self.__name__ = self.reward_model.name

    def totals(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the scores as a list of floats."""
        return score_responses(self.reward_model, prompts, responses).total.tolist()

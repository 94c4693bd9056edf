"""What the adapters share: looking at signatures, waiting for results, checking numbers."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.types import Message, Prompt

REFERENCE_KEYS = ("ground_truth", "reference_answer", "answer")
"""Where a prompt's metadata have the right answer; the first that is there counts.

verl's own data sets have it under "ground_truth" of "reward_model", which comes first of all.
"""


def parameters(function: object) -> Mapping[str, inspect.Parameter]:
    """Parameters by name; none for what cannot be called, or does not tell."""
    try:
        return inspect.signature(function).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return {}


def callable_name(function: object) -> str:
    """A function's name, or its class's where it has none."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def awaited(result: Any) -> Any:
    """A result, waited for if it has to be."""
    if not inspect.isawaitable(result):
        return result

    async def wait() -> Any:
        return await result

    # In a thread of its own: notebooks have an event loop running in the main one.
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(asyncio.run, wait()).result()


def number(value: Any, name: str, prompt: Prompt, response: str) -> float:
    """What a function returned for a response, as a number.

    Raises:
        RewardError: It is None or no number.
    """
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


def accepted(function: object, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those keywords that a function names, or all if it takes `**kwargs`."""
    named = parameters(function)
    if any(p.kind is p.VAR_KEYWORD for p in named.values()):
        return dict(offered)
    return {name: value for name, value in offered.items() if name in named}


def required(function: object) -> set[str]:
    """Names of the parameters that have no default."""
    return {
        name
        for name, p in parameters(function).items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


def reference_answer(prompt: Prompt) -> Any:
    """The right answer in a prompt's metadata (see `REFERENCE_KEYS`); None where there is none."""
    nested = prompt.metadata.get("reward_model")
    if isinstance(nested, Mapping) and nested.get("ground_truth") is not None:
        return nested["ground_truth"]
    found = (prompt.metadata.get(key) for key in REFERENCE_KEYS)
    return next((value for value in found if value is not None), None)


def check_count(
    values: Sequence[Any], name: str, prompts: Sequence[Prompt], responses: Sequence[str]
) -> None:
    """Refuse too few or too many values.

    Raises:
        RewardError: There is not one a response.
    """
    if len(values) != len(responses):
        first = f" for prompts from {prompts[0].id!r}, first response {responses[0][:80]!r}"
        raise RewardError(
            f"Reward model {name!r}: expected {len(responses)} values, one a completion, got "
            f"{len(values)}{first if responses else ''}. Change the function."
        )


def trl_prompt(prompt: Prompt) -> Any:
    """A prompt in the format of data sets: a text, or a list of messages."""
    if isinstance(prompt.content, str):
        return prompt.content
    return [{"role": message.role, "content": message.content} for message in prompt.content]


def trl_completion(prompt: Prompt, response: str) -> Any:
    """A response in the format of its prompt."""
    is_chat = not isinstance(prompt.content, str)
    return [{"role": "assistant", "content": response}] if is_chat else response


def as_prompt(content: Any, metadata: dict[str, Any]) -> Prompt:
    """A prompt from a text or messages; its id is the metadata's, or its text."""
    if not isinstance(content, str):
        content = tuple(Message(message["role"], message["content"]) for message in content)
    prompt = Prompt("prompt", content, metadata)
    return replace(prompt, id=str(metadata.get("id") or prompt.text))

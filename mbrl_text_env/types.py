"""The data of the decision process: frozen, picklable, and free of behaviour.

Shapes and units stand beside every field. Token ids are canonical: text is decoded from them for
people and reward models and is never encoded again to continue a prefix.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length"]
"""Why a response ended: a stop token (or stop string), or a token limit."""

Split = Literal["train", "validation", "test"]

FloatArray = npt.NDArray[np.float64]
"""float64[B]: one number a state, prompt or response."""

_ROLE = re.compile(r"[\w .-]+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Message:
    """One message of a chat.

    Args:
        role: A name that the chat template knows, such as `"system"`, `"user"` or `"assistant"`.
        content: Any text.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """What a response answers.

    Args:
        id: Name that is unique among the prompts of a run; random streams are derived from it.
        content: Chat messages, rendered with the tokenizer's chat template; or a plain string,
            which is encoded as it is and continued.
        metadata: What a reward model may need (reference answer, constraints, kind). JSON values.
        split: `"train"`, `"validation"`, `"test"`, or None where the data has no split.

    Raises:
        TypeError: The content is neither a string nor messages of strings.
        ValueError: The id or the content is empty, a role is no name, or a text (in id, content or
            metadata) has half a character: a surrogate of UTF-16 alone, which no file can hold.

    Example:
        >>> Prompt.from_text("Why is the sky blue?").text
        'Why is the sky blue?'
    """

    id: str
    content: str | tuple[Message, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    split: Split | None = None

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("A prompt needs an id; got an empty string. Give it a unique name.")
        self._check_content()
        texts = (self.id, self.text, self.metadata)
        for place, value in zip(("id", "text", "metadata"), texts, strict=True):
            half = _half_character(value)
            if half is not None:
                raise ValueError(
                    f"Prompt {self.id!r} has half a character in its {place}: {half!r}. Decode the "
                    "text with the encoding that it was written in, and cut it between characters."
                )
        if not self.text.strip():
            raise ValueError(
                f"Prompt {self.id!r} is empty: expected text or at least one message with text. "
                "Remove it or give it content."
            )

    @classmethod
    def from_text(
        cls,
        text: str,
        id: str | None = None,
        *,
        chat: bool = True,
        metadata: Mapping[str, Any] | None = None,
        split: Split | None = None,
    ) -> Prompt:
        """Make a prompt of one user message (`chat=True`) or of plain text to continue."""
        content = (Message("user", text),) if chat else text
        return cls(text if id is None else id, content, dict(metadata or {}), split)

    def _check_content(self) -> None:
        if isinstance(self.content, str):
            return
        if not isinstance(self.content, (tuple, list)) or not all(
            isinstance(m, Message) and isinstance(m.role, str) and isinstance(m.content, str)
            for m in self.content
        ):
            raise TypeError(
                f"Prompt {self.id!r}: expected a string, or a tuple of `Message(role, content)` "
                f"with two strings, got {self.content!r:.80}."
            )
        object.__setattr__(self, "content", tuple(self.content))
        for message in self.content:
            # A template writes roles as they are, among its control tokens.
            if not _ROLE.fullmatch(message.role):
                raise ValueError(
                    f"Prompt {self.id!r}: expected roles of letters, digits, '_', '-', '.' and "
                    f"spaces, such as 'user', got {message.role!r}. Change it."
                )

    @functools.cached_property
    def text(self) -> str:
        """The prompt as a person or a reward model reads it, without template marks."""
        if isinstance(self.content, str):
            return self.content
        if len(self.content) == 1:
            return self.content[0].content
        return "\n".join(f"{message.role}: {message.content}" for message in self.content)


def _half_character(value: Any) -> str | None:
    """The first surrogate in a text, or in the texts of JSON values; None where there is none."""
    if isinstance(value, str):
        found = None if value.isascii() else _SURROGATE.search(value)
        return found and found[0]
    if isinstance(value, Mapping):
        inner: Iterable[Any] = itertools.chain(value, value.values())
    elif isinstance(value, (list, tuple)):
        inner = value
    else:
        return None
    return next((half for half in map(_half_character, inner) if half is not None), None)


@dataclass(frozen=True)
class TextState:
    """A prompt and the prefix of its response: the whole Markov state.

    Restoring an environment, forking a search and caching a prefix need nothing else. Two states
    are equal when their tokens are, whatever chunks they were written in.

    Args:
        prompt: The prompt.
        prompt_ids: int[P], the prompt's token ids, chat template included.
        response_ids: int[T], the response's token ids so far, a final stop token included.
        finish_reason: None while the response can go on.
        chunk_ends: int[C], lengths of the response after each chunk. Only process rewards read it
            (one score a chunk); it does not take part in comparisons.
        logprob: Summed log-probability (nats) of the response under the language model itself, or
            None where it is not known. Only value models read it; not compared either.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    chunk_ends: tuple[int, ...] = field(default=(), compare=False)
    logprob: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Chunk:
    """Tokens to append to a response: an action.

    Args:
        token_ids: int[n], n at least 1. A stop token may only be the last.
        logprobs: float[n], the log-probability (nats) of each token under the language model
            itself, before temperature, top-p and top-k; empty where it is not known.
        finish_reason: `"stop"` if the chunk ends the response, `"length"` if the model's context is
            full, otherwise None.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None

    @property
    def logprob(self) -> float:
        """Summed log-probability in nats; NaN where it is not known."""
        return float(sum(self.logprobs)) if self.logprobs else float("nan")

    def __len__(self) -> int:
        return len(self.token_ids)

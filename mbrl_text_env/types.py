"""Frozen, picklable data types of the decision process, and the accounting of its costs.

Token ids are canonical: text is decoded from them for people and reward models, and is never
encoded again to continue a prefix.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import operator
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length"]
"""Why a response ended: a stop token (or stop string), or a token limit."""

Split = Literal["train", "validation", "test"]

FloatArray = npt.NDArray[np.float64]
"""float64[B]: one number for each state, prompt or response."""

_ROLE = re.compile(r"[\w .-]+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Message:
    """One chat message; `role` must be known to the chat template, such as `"user"`."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A prompt: chat messages, or plain text to continue.

    Args:
        id: Unique among the prompts of a run; random streams are derived from it.
        content: Chat messages, rendered with the tokenizer's chat template; or a plain string,
            which is encoded without a template.
        metadata: Data for reward models (reference answer, constraints, kind) as JSON values.

    Raises:
        TypeError: The content is neither a string nor messages of strings.
        ValueError: The id or the content is empty; a role is not a name; or the id, content or
            metadata has a lone UTF-16 surrogate, which cannot be written to a file.

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
        if not isinstance(self.content, str):
            object.__setattr__(self, "content", self._checked_messages())
        for place in ("id", "text", "metadata"):
            half = _half_character(getattr(self, place))
            if half is not None:
                raise ValueError(
                    f"Prompt {self.id!r} has half a character in its {place}: {half!r}. Decode the "
                    "text with the encoding that it was written in, and cut it between characters."
                )
        if not self.text.strip():
            raise ValueError(
                f"Prompt {self.id!r} is empty: expected text or at least one message with text."
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

    def _checked_messages(self) -> tuple[Message, ...]:
        found: Any = self.content
        if not isinstance(found, (tuple, list)) or not all(
            isinstance(m, Message) and isinstance(m.role, str) and isinstance(m.content, str)
            for m in found
        ):
            raise TypeError(
                f"Prompt {self.id!r}: expected a string, or a tuple of `Message(role, content)` "
                f"with two strings, got {found!r:.80}."
            )
        for message in found:
            # A template writes roles as they are, among its control tokens.
            if not _ROLE.fullmatch(message.role):
                raise ValueError(
                    f"Prompt {self.id!r}: expected roles of letters, digits, '_', '-', '.' and "
                    f"spaces, such as 'user', got {message.role!r}."
                )
        return tuple(found)

    @functools.cached_property
    def text(self) -> str:
        """The prompt as plain text, without the chat template."""
        if isinstance(self.content, str):
            return self.content
        if len(self.content) == 1:
            return self.content[0].content
        return "\n".join(f"{message.role}: {message.content}" for message in self.content)


def _half_character(value: Any) -> str | None:
    """The first lone surrogate in a text, or in the texts of JSON values."""
    if isinstance(value, str):
        found = None if value.isascii() else _SURROGATE.search(value)
        return found and found[0]
    inner: Iterable[Any] = value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, Mapping):
        inner = itertools.chain(value, value.values())
    return next(filter(None, map(_half_character, inner)), None)


@dataclass(frozen=True)
class TextState:
    """The Markov state: a prompt and the response so far.

    Equality does not depend on how the tokens are divided into chunks.

    Args:
        prompt: The prompt.
        prompt_ids: int[P], the prompt's token ids, including the chat template.
        response_ids: int[T], the response's token ids so far, including a final stop token.
        finish_reason: None until the response has ended.
        chunk_ends: int[C], length of the response after each chunk, for process rewards (one score
            per chunk).
        logprob: Sum of log-probabilities (nats) of the response under the language model itself,
            for value models; None if unknown.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    chunk_ends: tuple[int, ...] = field(default=(), compare=False)
    logprob: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Chunk:
    """An action: one or more tokens to append to a response, with a stop token only at the end.

    Args:
        logprobs: float[n], the log-probability (nats) of each token under the language model
            itself, before temperature, top-p and top-k; empty if unknown.
        finish_reason: `"stop"` if the chunk ends the response, `"length"` if the model's context is
            full, otherwise None.
        log_weight: Natural logarithm of its weight, set by a `Guard` with `weighted`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    log_weight: float = 0.0

    @property
    def logprob(self) -> float:
        """Sum of log-probabilities in nats; NaN if unknown."""
        return float(sum(self.logprobs)) if self.logprobs else float("nan")

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Usage:
    """Amounts of computation; usages can be added.

    FLOPs of a language model are 2 x parameters x tokens, plus attention. FLOPs of other models are
    included if the model reports them.
    """

    prompt_tokens: int = 0  # prefix tokens that a language model computed
    cached_tokens: int = 0  # prefix tokens taken from a cache
    generated_tokens: int = 0  # tokens sampled by a language model
    lm_calls: int = 0  # requests to a language model, one per state and call
    reward_calls: int = 0  # responses or prefixes scored by a reward model
    value_calls: int = 0  # states evaluated by a value model
    dynamics_calls: int = 0  # transitions predicted by a learned dynamics model
    lm_flops: float = 0.0
    reward_flops: float = 0.0
    value_flops: float = 0.0
    dynamics_flops: float = 0.0
    seconds: float = 0.0  # wall time; a batched call is split equally among its states

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(operator.add, vars(self).values(), vars(other).values()))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*map(operator.sub, vars(self).values(), vars(other).values()))

    def __mul__(self, count: int) -> Usage:
        return Usage(*(amount * count for amount in vars(self).values()))

    def maximum(self, other: Usage) -> Usage:
        """The elementwise maximum of two usages."""
        return Usage(*map(max, vars(self).values(), vars(other).values()))

    @property
    def flops(self) -> float:
        """Floating-point operations of all models in total."""
        return self.lm_flops + self.reward_flops + self.value_flops + self.dynamics_flops

    @property
    def capped(self) -> dict[str, int | float]:
        """The amounts that a `Budget` can cap, by name of the cap."""
        return {
            "tokens": self.generated_tokens,
            "flops": self.flops,
            "reward_calls": self.reward_calls,
            "seconds": self.seconds,
        }

    def as_dict(self) -> dict[str, int | float]:
        """All amounts by name, including `flops`, the total of all models."""
        return {**vars(self), "flops": self.flops}


class BudgetError(ValueError):
    """A budget that is too small for a complete response, or not positive."""


class BudgetExceededError(RuntimeError):
    """An agent spent more than its budget allows."""


@dataclass(frozen=True)
class Budget:
    """Hard caps on the computation for one prompt; None means no cap.

    Running calls are never interrupted: `seconds` is checked between calls and does not raise.

    Raises:
        BudgetError: A cap is not positive.
    """

    tokens: int | None = None  # generated
    flops: float | None = None  # of all models
    reward_calls: int | None = None  # responses or prefixes scored
    seconds: float | None = None  # of wall time

    def __post_init__(self) -> None:
        for name, cap in vars(self).items():
            if cap is not None and not cap > 0:
                raise BudgetError(
                    f"Budget({name}={cap!r}): expected a positive number, or None for no cap."
                )

    @property
    def is_capped(self) -> bool:
        """Whether any amount has a cap."""
        return any(cap is not None for cap in vars(self).values())

    def ends(self, each: Usage) -> bool:
        """Whether this budget ends a search that charges `each` repeatedly."""
        # A cap on an amount that the search never charges does not end it.
        return self.seconds is not None or not Ledger(self).affords(each * 1_000_000)

    def after(self, usage: Usage) -> Budget | None:
        """The remaining budget after `usage`; None if a cap is used up."""
        left = {
            name: None if cap is None else cap - usage.capped[name]
            for name, cap in vars(self).items()
        }
        return Budget(**left) if all(x is None or x > 0 for x in left.values()) else None

    def shared(self, count: int) -> Budget | None:
        """An equal share of the budget for each of `count`; None if a share is 0."""
        whole = ("tokens", "reward_calls")
        shares = {
            name: cap if cap is None else cap // count if name in whole else cap / count
            for name, cap in vars(self).items()
        }
        return None if 0 in shares.values() else Budget(**shares)


class Ledger:
    """The `budget` of one prompt (None for no caps) and its `usage` so far.

    Each model call is charged to the ledger of its prompt.

    Example:
        >>> ledger = Ledger(Budget(tokens=100))
        >>> ledger.charge(Usage(generated_tokens=96))
        >>> ledger.affords(Usage(generated_tokens=5))
        False
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = Budget() if budget is None else budget
        self.usage = Usage()

    def charge(self, usage: Usage) -> None:
        """Add `usage` to the amounts spent.

        Raises:
            BudgetExceededError: A cap other than seconds is exceeded. The charge is kept.
        """
        self.usage = self.usage + usage
        for name, amount, cap in self._passed(self.usage):
            if name != "seconds":
                raise BudgetExceededError(
                    f"Spent {amount:,.12g} {name} of a budget of {cap:,.12g}. An agent asks "
                    "`ledger.affords(...)` before it spends; this one did not, or asked for too "
                    "little."
                )

    def affords(self, usage: Usage) -> bool:
        """Whether `usage` can be spent without exceeding a cap."""
        return not self._passed(self.usage + usage)

    def _passed(self, usage: Usage) -> list[tuple[str, float, float]]:
        caps, amounts = vars(self.budget).items(), usage.capped
        # The last digits of a floating-point sum depend on the order of its terms.
        return [
            (name, amounts[name], cap)
            for name, cap in caps
            if cap is not None and amounts[name] > cap * (1 + 1e-12)
        ]


# Seconds charged by blocks nested in the one that is being timed.
_charged_inside: ContextVar[list[float] | None] = ContextVar("_charged_inside", default=None)


Ledgers = Sequence[Ledger] | None
"""One ledger for each item of a batch; None to charge nothing."""


@contextmanager
def timed(ledgers: Sequence[Ledger] | None) -> Iterator[None]:
    """Charge the wall time of a block to `ledgers` in equal parts.

    Time charged by a nested block is not charged again. Do not wait for other work in the block.
    """
    inside: list[float] = []
    outside = _charged_inside.get()
    token = _charged_inside.set(inside)
    start = time.perf_counter()
    try:
        yield
    finally:
        elapsed = time.perf_counter() - start
        _charged_inside.reset(token)
        if outside is not None:
            outside.append(elapsed if ledgers else sum(inside))
        for ledger in ledgers or ():
            ledger.charge(Usage(seconds=(elapsed - sum(inside)) / len(ledgers or ())))


def check_positive(**counts: int | None) -> None:
    """Raise a ValueError if a count is below 1; None is ignored."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}.")


def one_of(name: str, value: object, allowed: Any) -> None:
    """Raise a ValueError if `value` is not one of the values of a `Literal` or a list."""
    values = list(get_args(allowed) or allowed)
    if value not in values:
        raise ValueError(f"{name}: expected one of {values}, got {value!r}.")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint that lists known names similar to `name`, or an empty string."""
    near = dict.fromkeys(difflib.get_close_matches(name, list(known), cutoff=cutoff))
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""

"""What was spent, and what may be spent.

Every call of a language model, reward model, value model or dynamics model is charged to the ledger
of the prompt that it was made for. A budget is a hard cap: a charge beyond it is a bug in the agent
and raises.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """Amounts of computation; usages add up.

    Args:
        prompt_tokens: Prefix tokens that a language model had to compute.
        cached_tokens: Prefix tokens that were taken from a cache instead.
        generated_tokens: Tokens that a language model sampled.
        lm_calls: Requests to a language model (one a state and call).
        reward_calls: Responses or prefixes that a reward model scored.
        value_calls: States that a value model judged.
        dynamics_calls: Transitions that a learned dynamics model predicted.
        lm_flops: Floating-point operations of the language model (2 x parameters x tokens, plus
            attention).
        reward_flops: Those of the reward model, where it says what it takes.
        value_flops: Those of the value model.
        dynamics_flops: Those of the dynamics model.
        seconds: Wall time; a batched call is split equally among its states.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    lm_calls: int = 0
    reward_calls: int = 0
    value_calls: int = 0
    dynamics_calls: int = 0
    lm_flops: float = 0.0
    reward_flops: float = 0.0
    value_flops: float = 0.0
    dynamics_flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(operator.add, vars(self).values(), vars(other).values()))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*map(operator.sub, vars(self).values(), vars(other).values()))

    def __mul__(self, count: int) -> Usage:
        return Usage(*(amount * count for amount in vars(self).values()))

    def maximum(self, other: Usage) -> Usage:
        """The larger of each amount: the most that one of two things is charged."""
        return Usage(*map(max, vars(self).values(), vars(other).values()))

    @property
    def flops(self) -> float:
        """Floating-point operations of all models together."""
        return self.lm_flops + self.reward_flops + self.value_flops + self.dynamics_flops

    @property
    def capped(self) -> dict[str, int | float]:
        """The amounts that a `Budget` has caps for, by the cap's name."""
        return {
            "tokens": self.generated_tokens,
            "flops": self.flops,
            "reward_calls": self.reward_calls,
            "seconds": self.seconds,
        }

    def as_dict(self) -> dict[str, int | float]:
        """All amounts by name, `flops` (their sum) included."""
        return {**vars(self), "flops": self.flops}


class BudgetError(ValueError):
    """A budget that allows no complete response, or is not a positive number."""


class BudgetExceededError(RuntimeError):
    """An agent spent more than its budget allows."""


@dataclass(frozen=True)
class Budget:
    """Hard caps on the computation for one prompt; None means no cap.

    Args:
        tokens: Generated tokens.
        flops: Floating-point operations of all models.
        reward_calls: Responses or prefixes scored.
        seconds: Wall time. A call under way is never interrupted, so this cap is checked between
            calls and does not raise.

    Raises:
        BudgetError: A cap is not positive.

    Example:
        >>> Budget(tokens=400).tokens
        400
    """

    tokens: int | None = None
    flops: float | None = None
    reward_calls: int | None = None
    seconds: float | None = None

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

    def after(self, usage: Usage) -> Budget | None:
        """What is left of the caps when `usage` is spent; None where nothing is.

        Example:
            >>> Budget(tokens=400).after(Usage(generated_tokens=100))
            Budget(tokens=300, flops=None, reward_calls=None, seconds=None)
        """
        left = {
            name: None if cap is None else cap - usage.capped[name]
            for name, cap in vars(self).items()
        }
        return Budget(**left) if all(x is None or x > 0 for x in left.values()) else None

    def shared(self, count: int) -> Budget | None:
        """An equal share for each of `count`; None where one gets nothing.

        Example:
            >>> Budget(tokens=400).shared(3).tokens
            133
        """
        whole = ("tokens", "reward_calls")
        shares = {
            name: cap if cap is None else cap // count if name in whole else cap / count
            for name, cap in vars(self).items()
        }
        return None if 0 in shares.values() else Budget(**shares)


class Ledger:
    """The running account of one prompt.

    Args:
        budget: The caps; None for none.

    Attributes:
        budget: The caps.
        usage: What was spent so far.

    Example:
        >>> ledger = Ledger(Budget(tokens=100))
        >>> ledger.charge(Usage(generated_tokens=96))
        >>> ledger.affords(Usage(generated_tokens=5))
        False
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget if budget is not None else Budget()
        self.usage = Usage()

    def charge(self, usage: Usage) -> None:
        """Add what was spent.

        Raises:
            BudgetExceededError: A cap on tokens, FLOPs or reward calls is passed. The charge is
                kept, so that the account stays true.
        """
        self.usage = self.usage + usage
        fault = self._fault(self.usage, check_seconds=False)
        if fault is not None:
            raise BudgetExceededError(
                f"Spent {fault}. An agent asks `ledger.affords(...)` before it spends; this one "
                "did not, or asked for too little."
            )

    def affords(self, usage: Usage) -> bool:
        """Whether `usage` could be spent without passing a cap."""
        return self._fault(self.usage + usage, check_seconds=True) is None

    def remaining_tokens(self) -> float:
        """Generated tokens that are left; infinity without a cap."""
        cap = self.budget.tokens
        return float("inf") if cap is None else cap - self.usage.generated_tokens

    def _fault(self, usage: Usage, check_seconds: bool) -> str | None:
        for name, amount in usage.capped.items():
            cap = getattr(self.budget, name)
            if cap is None or (name == "seconds" and not check_seconds):
                continue
            # Sums of floating-point numbers differ in the last digits with their order.
            if amount > cap * (1 + 1e-12):
                return f"{amount:,.12g} {name} of a budget of {cap:,.12g}"
        return None


# Seconds that blocks inside the one that is being timed have charged.
_charged_inside: ContextVar[list[float] | None] = ContextVar("_charged_inside", default=None)


@contextmanager
def timed(ledgers: Sequence[Ledger] | None) -> Iterator[None]:
    """Charge the wall time of a block to `ledgers`, in equal parts.

    What a block inside it charges is not charged again. Do not await anything else's turn in it.
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

"""What was spent, and what may be spent.

Every call of a language model, reward model, value model or dynamics model is charged to the ledger
of the prompt that it was made for. A budget is a hard cap: a charge beyond it is a bug in the agent
and raises.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields


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
        return Usage(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)),
        )

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            *(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)),
        )

    def __mul__(self, count: int) -> Usage:
        return Usage(*(getattr(self, f.name) * count for f in fields(self)))

    def maximum(self, other: Usage) -> Usage:
        """The larger of each amount: the most that one of two things is charged."""
        return Usage(
            *(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)),
        )

    @property
    def flops(self) -> float:
        """Floating-point operations of all models together."""
        return self.lm_flops + self.reward_flops + self.value_flops + self.dynamics_flops

    def as_dict(self) -> dict[str, int | float]:
        """All amounts by name, `flops` (their sum) included."""
        amounts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**amounts, "flops": self.flops}


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
        for f in fields(self):
            cap = getattr(self, f.name)
            if cap is not None and not cap > 0:
                raise BudgetError(
                    f"Budget({f.name}={cap!r}): expected a positive number, or None for no cap."
                )

    @property
    def is_capped(self) -> bool:
        """Whether any amount has a cap."""
        return any(getattr(self, f.name) is not None for f in fields(self))

    def after(self, usage: Usage) -> Budget | None:
        """What is left of the caps when `usage` is spent; None where nothing is.

        Example:
            >>> Budget(tokens=400).after(Usage(generated_tokens=100))
            Budget(tokens=300, flops=None, reward_calls=None, seconds=None)
        """
        spent = {
            "tokens": usage.generated_tokens,
            "flops": usage.flops,
            "reward_calls": usage.reward_calls,
            "seconds": usage.seconds,
        }
        caps = {name: getattr(self, name) for name in spent}
        left = {n: None if cap is None else cap - spent[n] for n, cap in caps.items()}
        return Budget(**left) if all(x is None or x > 0 for x in left.values()) else None

    def shared(self, count: int) -> Budget | None:
        """An equal share for each of `count`; None where one gets nothing.

        Example:
            >>> Budget(tokens=400).shared(3).tokens
            133
        """
        whole = {name: getattr(self, name) for name in ("tokens", "reward_calls")}
        shares = {n: None if cap is None else cap // count for n, cap in whole.items()}
        if 0 in shares.values():
            return None
        real = {name: getattr(self, name) for name in ("flops", "seconds")}
        return Budget(**shares, **{n: c if c is None else c / count for n, c in real.items()})


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
        spent = {
            "tokens": usage.generated_tokens,
            "flops": usage.flops,
            "reward_calls": usage.reward_calls,
        }
        if check_seconds:
            spent["seconds"] = usage.seconds
        for name, amount in spent.items():
            cap = getattr(self.budget, name)
            # Sums of floating-point numbers differ in the last digits with their order.
            if cap is not None and amount > cap * (1 + 1e-12):
                return f"{amount:,.12g} {name} of a budget of {cap:,.12g}"
        return None


_thread = threading.local()


def note_waiting(seconds: float) -> None:
    """Take seconds for which this thread waited for others out of the blocks that it times."""
    _thread.waited = getattr(_thread, "waited", 0.0) + seconds


@contextmanager
def timed(ledgers: Sequence[Ledger] | None) -> Iterator[None]:
    """Charge the wall time of a block to `ledgers`, in equal parts."""
    start, waited = time.perf_counter(), getattr(_thread, "waited", 0.0)
    try:
        yield
    finally:
        elapsed = time.perf_counter() - start - (getattr(_thread, "waited", 0.0) - waited)
        if ledgers:
            # A block around this one does not charge the same seconds again.
            note_waiting(elapsed)
        share = elapsed / max(1, len(ledgers or ()))
        for ledger in ledgers or ():
            ledger.charge(Usage(seconds=share))

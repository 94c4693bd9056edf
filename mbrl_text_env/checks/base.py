"""What the checkers share: how a fault is reported, and how calls are counted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mbrl_text_env.rewards.base import ObjectReward

_MOST_SHOWN = 300


class CheckError(AssertionError):
    """A contract is broken; the message says what was expected, what came and what to change."""


def expect(condition: object, subject: str, expected: str, got: object, change: str) -> None:
    """Report a fault unless `condition` holds.

    Args:
        condition: True where the contract is kept.
        subject: What was looked at.
        expected: What the contract says.
        got: What came instead; shown by its `repr`, texts as they are.
        change: What to do about it, as a sentence.
    """
    if not condition:
        raise CheckError(f"{subject}: expected {expected}, got {_shown(got)}. {change}")


def expect_error(
    kind: type[Exception], call: Callable[[], object], subject: str, case: str, change: str
) -> None:
    """Report a fault unless `call` raises an error of `kind`."""
    try:
        result = call()
    except kind:
        return
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise CheckError(
            f"{subject}: expected {kind.__name__} for {case}, got {_shown(got)}. {change}"
        ) from error
    raise CheckError(
        f"{subject}: expected {kind.__name__} for {case}, got no error but {_shown(result)}. "
        f"{change}"
    )


def expect_methods(thing: object, names: tuple[str, ...], subject: str, change: str) -> None:
    """Report a fault unless a thing has all attributes of a protocol."""
    missing = [name for name in names if not hasattr(thing, name)]
    expect(
        not missing,
        subject,
        f"an object with {', '.join(names)}",
        f"a {type(thing).__name__} without {', '.join(missing)}",
        change,
    )


@contextmanager
def counted(thing: object, counters: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    """Call `counters[name](result, *args, **kwargs)` after each call of `thing`'s method `name`.

    Methods that the thing does not have are left out. A method that calls another one of them is
    counted once. The counting ends with the block.

    Raises:
        CheckError: The thing's attributes cannot be set.
    """
    # It is put over the methods, not around the object: other holders of the object count too.
    thing = thing.reward if isinstance(thing, ObjectReward) else thing
    before = dict(getattr(thing, "__dict__", {}))
    busy = False

    def over(method: Callable[..., Any], counter: Callable[..., None]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if busy:
                return method(*args, **kwargs)
            busy = True
            try:
                result = method(*args, **kwargs)
            finally:
                busy = False
            counter(result, *args, **kwargs)
            return result

        return call

    present = [name for name in counters if hasattr(thing, name)]
    try:
        for name in present:
            object.__setattr__(thing, name, over(getattr(thing, name), counters[name]))
    except AttributeError as error:
        raise CheckError(
            f"{type(thing).__name__}: expected an object whose method {name!r} can be replaced for "
            f"the time of the check, so that its calls are counted, got {error}. Remove its "
            "__slots__, or check a subclass without them."
        ) from error
    try:
        yield
    finally:
        for name in present:
            if name in before:
                object.__setattr__(thing, name, before[name])
            else:
                object.__delattr__(thing, name)


def _shown(got: object) -> str:
    text = got if isinstance(got, str) else repr(got)
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."

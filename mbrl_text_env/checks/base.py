"""Shared code of the checkers: report faults, and count calls."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from mbrl_text_env.rewards.base import ObjectReward

_MOST_SHOWN = 300


class CheckError(AssertionError):
    """An interface is not implemented correctly; the message says what to change."""


def rules(table: str) -> dict[str, str]:
    """Parse rules, one per line: name | place | what is expected | what to change.

    Indented lines continue the line before. A check fills in the fields in braces. `{got}` is the
    value found; by default it follows what is expected.
    """
    found = {}
    for line in re.sub(r"\n +", " ", table.strip()).split("\n"):
        name, where, expected, change = (part.strip() for part in line.split("|"))
        came = "" if "{got}" in expected else ", got {got}"
        found[name] = f"{where}: expected {expected}{came}. {change}".removesuffix(". ")
    return found


class Trial:
    """An object under check: `subject` starts its messages, `rules` are the rules by name."""

    rules: ClassVar[Mapping[str, str]]
    subject: str

    def expect(self, rule: str, holds: object, got: object, **facts: object) -> None:
        """Raise the fault of a rule unless it holds."""
        if not holds:
            raise self.fault(rule, got, **facts)

    def fault(self, rule: str, got: object, **facts: object) -> CheckError:
        """The error for a broken rule; strings are shown without quotes."""
        text = got if isinstance(got, str) else repr(got)
        if len(text) > _MOST_SHOWN:
            text = text[: _MOST_SHOWN - 3] + "..."
        return CheckError(f"{self.subject}, {self.rules[rule].format(got=text, **facts)}")

    def expect_attributes(self, thing: object, *names: str) -> None:
        """Raise the fault "attributes" unless the object has all of them."""
        missing = [name for name in names if not hasattr(thing, name)]
        got = f"a {type(thing).__name__} without {', '.join(missing)}"
        self.expect("attributes", not missing, got, names=", ".join(names))

    def expect_error(
        self, rule: str, kind: type[Exception], call: Callable[[], object], case: str
    ) -> None:
        """Raise the fault of a rule unless `call` raises an error of `kind`."""
        cause = None
        try:
            got = f"no error but {call()!r}"
        except kind:
            return
        except Exception as error:
            got, cause = f"{type(error).__name__}: {error}", error
        raise self.fault(rule, got, error=kind.__name__, case=case) from cause

    def pickled(self, thing: Any) -> Any:
        """Copy an object with pickle; raises the fault "pickle" if that fails."""
        try:
            return pickle.loads(pickle.dumps(thing))  # noqa: S301, it was made here
        except Exception as error:
            raise self.fault("pickle", f"{type(error).__name__}: {error}") from error

    def called(self, place: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a method that must not fail or change its arguments."""
        before, failure, result = copy.deepcopy(args), None, None
        try:
            result = function(*args)
        except Exception as error:
            failure = error
        # First, because it can be the reason why the call failed.
        self.expect("arguments", args == before, "changed ones", place=place)
        if failure is not None:
            got = f"{type(failure).__name__}: {failure}".rstrip(". ")
            raise self.fault("failure", got, place=place, size=len(args[-1])) from failure
        return result


@contextmanager
def counted(thing: object, counters: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    """Call `counters[name](result, *args, **kwargs)` after each call of `thing`'s method `name`.

    Methods that the object does not have are skipped. If one of them calls another, only the outer
    call is counted. Counting ends with the block.

    Raises:
        CheckError: The object's attributes cannot be set.
    """
    # Replaces methods instead of wrapping the object, so that all references to it count.
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
            f"{type(thing).__name__}: expected a method {name!r} that can be replaced to count its "
            f"calls, got {error}. Remove __slots__, or check a subclass without them."
        ) from error
    try:
        yield
    finally:
        for name in present:
            object.__delattr__(thing, name)
            if name in before:
                object.__setattr__(thing, name, before[name])

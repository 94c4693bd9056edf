"""What the checkers share: how a fault is reported, and how calls are counted."""

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
    """A contract is broken; the message says what was expected, what came and what to change."""


def rules(table: str) -> dict[str, str]:
    """A contract, a rule a line: its name, where it holds, what is expected, and what to change.

    Lines that are indented go on with the one before. In braces is what a check fills in; what came
    is `{got}`, and stands behind what is expected.
    """
    found = {}
    for line in re.sub(r"\n +", " ", table.strip()).split("\n"):
        name, where, expected, change = (part.strip() for part in line.split("|"))
        came = "" if "{got}" in expected else ", got {got}"
        found[name] = f"{where}: expected {expected}{came}. {change}".removesuffix(". ")
    return found


class Trial:
    """Something under check: `subject` is how messages begin, `rules` the contract by name."""

    rules: ClassVar[Mapping[str, str]]
    subject: str

    def expect(self, rule: str, holds: object, got: object, **facts: object) -> None:
        """Report a fault against a rule unless it holds."""
        if not holds:
            raise self.fault(rule, got, **facts)

    def fault(self, rule: str, got: object, **facts: object) -> CheckError:
        """The error that says how a rule is broken; texts are shown as they are."""
        text = got if isinstance(got, str) else repr(got)
        if len(text) > _MOST_SHOWN:
            text = text[: _MOST_SHOWN - 3] + "..."
        return CheckError(f"{self.subject}, {self.rules[rule].format(got=text, **facts)}")

    def expect_attributes(self, thing: object, *names: str) -> None:
        """Report a fault against the rule "attributes" unless a thing has all of them."""
        missing = [name for name in names if not hasattr(thing, name)]
        got = f"a {type(thing).__name__} without {', '.join(missing)}"
        self.expect("attributes", not missing, got, names=", ".join(names))

    def expect_error(
        self, rule: str, kind: type[Exception], call: Callable[[], object], case: str
    ) -> None:
        """Report a fault unless `call` raises an error of `kind`."""
        cause = None
        try:
            got = f"no error but {call()!r}"
        except kind:
            return
        except Exception as error:
            got, cause = f"{type(error).__name__}: {error}", error
        raise self.fault(rule, got, error=kind.__name__, case=case) from cause

    def pickled(self, thing: Any) -> Any:
        """A copy by way of a pickle; a fault against the rule "pickle" where there is none."""
        try:
            return pickle.loads(pickle.dumps(thing))  # noqa: S301, it was made here
        except Exception as error:
            raise self.fault("pickle", f"{type(error).__name__}: {error}") from error

    def called(self, place: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a method that has to leave its arguments as they are, and may not fail."""
        before, failure, result = copy.deepcopy(args), None, None
        try:
            result = function(*args)
        except Exception as error:
            failure = error
        # First, for it may be why the call failed.
        self.expect("arguments", args == before, "changed ones", place=place)
        if failure is not None:
            got = f"{type(failure).__name__}: {failure}".rstrip(". ")
            raise self.fault("failure", got, place=place, size=len(args[-1])) from failure
        return result


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
            f"{type(thing).__name__}: expected that its method {name!r} can be replaced, to count "
            f"its calls, got {error}. Remove __slots__, or check a subclass without them."
        ) from error
    try:
        yield
    finally:
        for name in present:
            object.__delattr__(thing, name)
            if name in before:
                object.__setattr__(thing, name, before[name])

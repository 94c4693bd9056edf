"""The registry of this package's rewards; each reward is registered in its own file."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class RewardEntry:
    """A named reward; `factory` takes no arguments, or the text after the colon of the name.

    `argument` is a placeholder for that text, such as "FOLDER", or None if the name takes no text.
    """

    factory: Callable[..., Any]
    description: str
    argument: str | None = None


NAMED: dict[str, RewardEntry] = {}


def named(name: str, *, argument: str | None = None, **options: Any) -> Callable[[T], T]:
    """Register a reward class of this package for `rewards.make` and the command line.

    The first line of its docstring is its description. If `argument` is set, the text after the
    colon in "name:text" is passed to the class. `options` are always passed. User code calls
    `rewards.register` instead, and other packages declare an entry point.
    """

    def note(factory: T) -> T:
        made = functools.partial(factory, **options)
        NAMED[name] = RewardEntry(made, first_line(factory), argument)
        return factory

    return note


def first_line(factory: Callable[..., Any]) -> str:
    """Return the first line of the docstring, or the name if there is no docstring."""
    text = inspect.getdoc(factory) or str(getattr(factory, "__name__", type(factory).__name__))
    return text.partition("\n")[0]

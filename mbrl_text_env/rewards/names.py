"""The names of this package's rewards: each is given in the file of its reward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class RewardEntry:
    """A reward that has a name; `factory` is called without arguments or with `argument`'s value.

    `argument` says what stands after the colon of the name, such as "FOLDER"; None for nothing.
    """

    factory: Callable[..., Any]
    description: str
    argument: str | None = None


NAMED: dict[str, RewardEntry] = {}


def named(name: str, *, argument: str | None = None, **options: Any) -> Callable[[T], T]:
    """Name a reward class of this package, for `rewards.make` and the command line.

    The first line of its docstring describes it. What stands after a colon behind the name, such as
    a folder, is passed to the class if there is an `argument`, which says what it is; so are the
    options. Rewards of a program are named by `rewards.register`, those of other packages by an
    entry point.
    """

    def note(factory: T) -> T:
        made = functools.partial(factory, **options)
        NAMED[name] = RewardEntry(made, first_line(factory), argument)
        return factory

    return note


def first_line(factory: Callable[..., Any]) -> str:
    """The first line of a docstring, or the name where there is none."""
    text = inspect.getdoc(factory) or str(getattr(factory, "__name__", type(factory).__name__))
    return text.partition("\n")[0]

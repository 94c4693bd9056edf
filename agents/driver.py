"""One driver for many searches: what they wait for is answered in common batches, on one thread.

A search is a coroutine. It goes on until it awaits a model call (`ask`); when all searches wait,
the calls of one function are merged into one, whose results are shared out. Searches that end make
room for others. A chunk depends on its seed and state alone, so the results are those of one search
after the other.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Hashable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import closing
from typing import Any, TypeAlias, TypeVar

from mbrl_text_env.language_models.base import LanguageModel, SampleRequest, sample_requests
from mbrl_text_env.types import Chunk, Ledger, Usage

T = TypeVar("T")
Begin: TypeAlias = Callable[[], Coroutine[Any, Any, T]]
"""Begins a search."""

# Searches that wait cost little; how many sequences are decoded together is the engine's affair.
MOST_AT_ONCE = 256
# Reward and value models need not be safe for several threads.
_ONE_AT_A_TIME = threading.Lock()


@dataclasses.dataclass(eq=False)
class Call:
    """A batched call that a search awaits; made by `ask`, which says what the arguments are."""

    function: Callable[..., Any]
    common: tuple[Any, ...]
    columns: Mapping[str, Sequence[Any]]
    ledgers: Sequence[Ledger] | None
    may_repeat: bool
    awaited: Callable[..., Awaitable[Any]] | None
    result: Any = None
    error: Exception | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __await__(self) -> Generator[Call, None, Any]:
        yield self
        if self.error is not None:
            raise self.error
        return self.result

    @property
    def key(self) -> Hashable:
        """Calls with the same key are merged."""
        common = tuple(map(_comparable, self.common))
        return _comparable(self.function), common, tuple(self.columns), self.ledgers is None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments by name."""
        ledgers = {} if self.ledgers is None else {"ledgers": self.ledgers}
        return {**self.columns, **ledgers}

    def make(self) -> None:
        """Call the function."""
        try:
            self.result = self.function(*self.common, **self.arguments)
        except Exception as error:
            self.error = error

    async def make_in_loop(self) -> None:
        """Call the function so that the event loop goes on meanwhile."""
        if self.awaited is None:
            await asyncio.to_thread(self._make_alone)
            return
        try:
            self.result = await self.awaited(*self.common, **self.arguments)
        except Exception as error:
            self.error = error

    def _make_alone(self) -> None:
        with _ONE_AT_A_TIME:
            self.make()


def ask(
    function: Callable[..., Any],
    *common: Any,
    ledgers: Sequence[Ledger] | None = None,
    may_repeat: bool = True,
    awaited: Callable[..., Awaitable[Any]] | None = None,
    **columns: Sequence[Any],
) -> Call:
    """A call to await in a search: `function(*common, **columns, ledgers=ledgers)`.

    Calls of the same function with equal `common` arguments are answered together, their columns
    joined. So whatever is batched can be asked, a model of a new kind too.

    Args:
        function: Gives one result an item: a sequence, or a dataclass or mapping of sequences. Its
            time is charged by itself (`ledger.timed`), as the doors of the models do.
        *common: Arguments that only calls which agree in them share, such as the model.
        ledgers: One an item; None where the function takes none.
        may_repeat: Whether a merged call that fails, and has charged nothing but time, is made
            again for each search alone, so that an error is that search's and names its prompt.
        awaited: What `generate_async` awaits in place of the function; by default the function is
            called in a thread, one such call at a time.
        **columns: Arguments with one entry an item.

    Example:
        >>> async def search(texts):
        ...     return await ask(len_of_each, texts=texts)
        >>> def len_of_each(texts):  # called once, with three texts
        ...     return [len(text) for text in texts]
        >>> run([lambda: search(["a", "bb"]), lambda: search(["ccc"])])
        [[1, 2], [3]]
    """
    return Call(function, common, columns, ledgers, may_repeat, awaited)


def ask_for_chunks(
    language_model: LanguageModel, requests: Sequence[SampleRequest], ledgers: Sequence[Ledger]
) -> Call:
    """A call of `sample_requests`; one that failed may have charged, and is not made again."""
    return ask(
        sample_requests,
        language_model,
        requests=requests,
        ledgers=ledgers,
        may_repeat=False,
        awaited=_sample_in_loop,
    )


def run(searches: Sequence[Begin[T]], most_at_once: int = MOST_AT_ONCE) -> list[T]:
    """Run searches side by side and return their results in order.

    There is no event loop in it, so it also works inside one that is running.

    Args:
        searches: Each begins a coroutine that awaits nothing but calls (`ask`).
        most_at_once: Searches that are under way at a time.

    Raises:
        BaseException: What the first search (by its place in the list) of those that failed at the
            same time raised; the others are given up.
    """
    results: list[Any] = [None] * len(searches)
    with closing(_calls(searches, most_at_once, results)) as calls:
        for call in calls:
            call.make()
    return results


async def run_async(searches: Sequence[Begin[T]], most_at_once: int = MOST_AT_ONCE) -> list[T]:
    """`run` that awaits each batch. Cancelling it ends the searches; a batch under way in a thread
    goes on to its end, and nothing is made of it.
    """
    results: list[Any] = [None] * len(searches)
    with closing(_calls(searches, most_at_once, results)) as calls:
        for call in calls:
            await call.make_in_loop()
    return results


def _calls(
    searches: Sequence[Begin[T]], most_at_once: int, results: list[Any]
) -> Generator[Call, None, None]:
    """Advance searches, and yield the merged calls to make; put what they return into `results`."""
    waiting = iter(list(enumerate(searches)))
    active: dict[int, Coroutine[Any, Any, T]] = {}
    try:
        while True:
            for place, begin in itertools.islice(waiting, most_at_once - len(active)):
                active[place] = begin()
            if not active:
                return
            for group in _advanced(active, results):
                yield from _answered(group)
    finally:
        for search in active.values():
            search.close()


def _advanced(active: dict[int, Coroutine[Any, Any, T]], results: list[Any]) -> list[list[Call]]:
    """Advance every search until it waits or ends; what they wait for, by what can be merged."""
    groups: dict[Hashable, list[Call]] = {}
    errors = []
    for place, search in list(active.items()):
        try:
            call = search.send(None)
            if not isinstance(call, Call):
                raise TypeError(
                    f"A search awaited {type(call).__name__}. It can only wait for models: await "
                    "`search.expand(...)`, `self.scored(...)`, or `agents.driver.ask(...)`."
                )
            groups.setdefault(call.key, []).append(call)
        except StopIteration as ended:
            results[place] = ended.value
            del active[place]
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return list(groups.values())


def _answered(calls: list[Call]) -> Iterator[Call]:
    """The calls to make for a group that can be merged: one, or each by itself where that fails."""
    merged = calls[0] if len(calls) == 1 else _merged(calls)
    before = [ledger.usage for ledger in merged.ledgers or ()]
    yield merged
    if len(calls) == 1:
        # As it came: the doors check the length.
        return
    if merged.error is None:
        try:
            _share_out(merged, calls)
            return
        except Exception as error:
            merged.error = error
    spent = [ledger.usage - old for ledger, old in zip(merged.ledgers or (), before, strict=True)]
    if merged.may_repeat and all(dataclasses.replace(u, seconds=0.0) == Usage() for u in spent):
        yield from calls
        return
    for call in calls:
        call.error = merged.error


def _merged(calls: Sequence[Call]) -> Call:
    columns = {name: [x for call in calls for x in call.columns[name]] for name in calls[0].columns}
    ledgers = None
    if calls[0].ledgers is not None:
        ledgers = [ledger for call in calls for ledger in call.ledgers or ()]
    return dataclasses.replace(calls[0], columns=columns, ledgers=ledgers)


def _share_out(merged: Call, calls: Sequence[Call]) -> None:
    found, ends = _size(merged.result), list(itertools.accumulate(map(len, calls)))
    if found != ends[-1]:
        name = getattr(merged.function, "__name__", type(merged.function).__name__)
        raise ValueError(f"{name}: expected {ends[-1]} results, got {found}.")
    for call, start, end in zip(calls, [0, *ends], ends, strict=False):
        call.result = _part(merged.result, slice(start, end))


def _size(results: Any) -> int:
    while dataclasses.is_dataclass(results):
        results = getattr(results, dataclasses.fields(results)[0].name)
    return len(next(iter(results.values())) if isinstance(results, Mapping) else results)


def _part(results: Any, part: slice) -> Any:
    if dataclasses.is_dataclass(results) and not isinstance(results, type):
        names = [field.name for field in dataclasses.fields(results)]
        values = {name: _part(getattr(results, name), part) for name in names}
        return dataclasses.replace(results, **values)
    if isinstance(results, Mapping):
        return {name: _part(values, part) for name, values in results.items()}
    return results[part]


def _comparable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


async def _sample_in_loop(
    language_model: LanguageModel,
    requests: Sequence[SampleRequest],
    ledgers: Sequence[Ledger],
) -> list[list[Chunk]]:
    own = getattr(language_model, "sample_requests_async", None)
    if own is None:
        return await asyncio.to_thread(sample_requests, language_model, requests, ledgers=ledgers)
    chunks: list[list[Chunk]] = await own(requests, ledgers=ledgers)
    return chunks

"""The driver of searches: many coroutines on one thread, with merged model calls.

A search runs until it awaits a model call (`ask`). When all searches wait, calls of the same
function are merged into one batch. A chunk depends only on its seed and state, so the results equal
those of running the searches one after the other.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from mbrl_text_env.language_models.base import LanguageModel, SampleRequest, watches_guards
from mbrl_text_env.language_models.guarding import sample_requests, sample_requests_async
from mbrl_text_env.types import Chunk, Ledger, Usage, check_positive

T = TypeVar("T")
Begin: TypeAlias = Callable[[], Coroutine[Any, Any, T]]
"""Starts a search."""
Running: TypeAlias = Coroutine[Any, Any, None] | Generator[Any, None, None]
"""A started search, which stores its own result."""
Take: TypeAlias = Callable[[int], Iterable[Running]]
"""Starts up to that many next searches; fewer, or none, if no more are waiting."""

# Waiting searches are cheap; the engine limits the sequences that are decoded together.
MOST_AT_ONCE = 256
# Reward and value models need not be thread-safe.
ONE_AT_A_TIME = threading.RLock()


@dataclass(eq=False)
class Call:
    """A batched call that a search awaits; created by `ask`, which documents the arguments."""

    function: Callable[..., Any]
    common: tuple[Any, ...]
    columns: Mapping[str, Sequence[Any]]
    ledgers: Sequence[Ledger] | None
    # Awaited by an event loop instead; None runs the function in a thread.
    awaited: Callable[..., Coroutine[Any, Any, Any]] | None = None
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
        common = tuple(map(_comparable, (self.function, *self.common)))
        return common, tuple(self.columns), self.ledgers is None

    def make(self) -> None:
        """Call the function."""
        try:
            self.result = self._called(self.function)
        except Exception as error:
            self.error = error

    async def make_in_loop(self) -> None:
        """Call the function without blocking the event loop."""
        if self.awaited is None:
            return await asyncio.to_thread(self._make_alone)
        try:
            self.result = await self._called(self.awaited)
        except Exception as error:
            self.error = error

    def _called(self, function: Callable[..., Any]) -> Any:
        ledgers = {} if self.ledgers is None else {"ledgers": self.ledgers}
        return function(*self.common, **self.columns, **ledgers)

    def _make_alone(self) -> None:
        with ONE_AT_A_TIME:
            self.make()


def ask(
    function: Callable[..., Any],
    *common: Any,
    ledgers: Sequence[Ledger] | None = None,
    **columns: Sequence[Any],
) -> Call:
    """Create a call that a search can await: `function(*common, **columns, ledgers=ledgers)`.

    Calls of the same function with equal `common` arguments, such as the model, are merged by
    concatenating their columns. If a merged call fails and has charged nothing, each is retried.

    Args:
        function: Returns one result per item: a sequence, or a dataclass or mapping of sequences.
            It charges its own time (`ledger.timed`), as the model functions do.
        **columns: Arguments with one entry per item, like `ledgers`.

    Example:
        >>> async def search(texts):
        ...     return await ask(lengths, texts=texts)
        >>> def lengths(texts):  # called once, with three texts
        ...     return [len(text) for text in texts]
        >>> run([lambda: search(["a", "bb"]), lambda: search(["ccc"])])
        [[1, 2], [3]]
    """
    return Call(function, common, columns, ledgers)


def ask_for_chunks(
    language_model: LanguageModel, requests: Sequence[SampleRequest], ledgers: Sequence[Ledger]
) -> Call:
    """Create a call of `sample_requests`, which is not retried: a failure may have charged."""
    columns, awaited = {"requests": requests}, _chunks_async
    return Call(sample_requests, (language_model,), columns, ledgers, awaited)


async def _chunks_async(
    language_model: LanguageModel, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger]
) -> list[list[Chunk]]:
    """`sample_requests_async`; with guards, which call rewards, it runs under the rewards' lock."""
    if not watches_guards(language_model) or all(r.guard is None for r in requests):
        return await sample_requests_async(language_model, requests, ledgers=ledgers)

    def alone() -> list[list[Chunk]]:
        with ONE_AT_A_TIME:
            return sample_requests(language_model, requests, ledgers=ledgers)

    return await asyncio.to_thread(alone)


def run(searches: Sequence[Begin[T]], most_at_once: int = MOST_AT_ONCE) -> list[T]:
    """Run searches concurrently, at most `most_at_once`, and return their results in order.

    Searches can only await calls (`ask`). No event loop is used, so this works inside one, too.

    Raises:
        BaseException: The error of a failed search; if several fail at the same time, that of the
            first in the list. All other searches are closed.
    """
    take, results = _kept(searches)
    with closing(_calls(take, most_at_once)) as calls:
        for call in calls:
            call.make()
    return results


async def run_async(searches: Sequence[Begin[T]], most_at_once: int = MOST_AT_ONCE) -> list[T]:
    """Async `run`. If cancelled, it lets a batch in a thread finish and drops the result."""
    take, results = _kept(searches)
    await _drive(take, most_at_once)
    return results


async def _drive(take: Take, most_at_once: int) -> None:
    with closing(_calls(take, most_at_once)) as calls:
        for call in calls:
            await call.make_in_loop()


def _kept(searches: Sequence[Begin[T]]) -> tuple[Take, list[T]]:
    """The searches, and the list that they store their results in."""
    results: list[Any] = [None] * len(searches)

    async def keep(place: int, begin: Begin[T]) -> None:
        results[place] = await begin()

    waiting = itertools.starmap(keep, enumerate(searches))
    return lambda count: itertools.islice(waiting, count), results


def _calls(take: Take, most_at_once: int) -> Generator[Call, None, None]:
    """Advance searches and yield the merged calls."""
    active: list[Running] = []
    try:
        while True:
            active += take(most_at_once - len(active))
            if not active:
                return
            for group in _advanced(active):
                yield from _answered(group)
    finally:
        for search in active:
            search.close()


def _advanced(active: list[Running]) -> list[list[Call]]:
    """Advance every search until it waits or ends; return the calls, grouped by key."""
    groups: dict[Hashable, list[Call]] = {}
    errors = []
    for search in list(active):
        try:
            call = search.send(None)
            if not isinstance(call, Call):
                wrong = TypeError(
                    f"A search awaited {type(call).__name__}. It can only await model calls: "
                    "`search.expand(...)`, `self.scored(...)`, or `agents.driver.ask(...)`."
                )
                search.throw(wrong)
                raise wrong
            groups.setdefault(call.key, []).append(call)
        except StopIteration:
            active.remove(search)
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return list(groups.values())


def _answered(calls: list[Call]) -> Iterable[Call]:
    """Yield the calls for a group: the merged one, or each separately if that fails."""
    if len(calls) == 1:
        # Unmerged: the model functions check the length.
        yield from calls
        return
    merged = _merged(calls)
    before = [ledger.usage for ledger in merged.ledgers or ()]
    yield merged
    try:
        if merged.error is None:
            _share_out(merged, calls)
            return
    except Exception as error:
        merged.error = error
    spent = [ledger.usage - old for ledger, old in zip(merged.ledgers or (), before, strict=True)]
    is_free = all(dataclasses.replace(usage, seconds=0.0) == Usage() for usage in spent)
    if is_free and merged.function is not sample_requests:
        # Call each separately, so that the error reaches its own search and names its prompt.
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
    while isinstance(results, Mapping) or dataclasses.is_dataclass(results):
        columns = results if isinstance(results, Mapping) else vars(results)
        results = next(iter(columns.values()))
    return len(results)


def _part(results: Any, part: slice) -> Any:
    if isinstance(results, Mapping):
        return {name: _part(values, part) for name, values in results.items()}
    if dataclasses.is_dataclass(results) and not isinstance(results, type):
        return dataclasses.replace(results, **_part(vars(results), part))
    return results[part]


def _comparable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


class Driver:
    """Runs the searches of concurrent `Agent.generate_async` calls together, as in a server.

    New searches join at the next batch. An error is raised only in the call whose search failed. If
    a call is cancelled, its search ends before its next model call; the current batch is finished.
    A driver belongs to one event loop.

    Args:
        most_at_once: Maximum number of concurrent searches; further ones wait.

    Attributes:
        searches: Number of searches that have started and not ended.

    Example:
        >>> async def answer(texts):  # separate calls, merged batches
        ...     driver = Driver()
        ...     calls = [agent.generate_async(text, budget, driver=driver) for text in texts]
        ...     return await asyncio.gather(*calls)
    """

    def __init__(self, most_at_once: int = MOST_AT_ONCE) -> None:
        check_positive(most_at_once=most_at_once)
        self.most_at_once = most_at_once
        self.searches = 0
        self._waiting: deque[tuple[Begin[Any], asyncio.Future[Any]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def run(self, searches: Sequence[Begin[T]]) -> list[T]:
        """Return the results of the searches, in order; see `run_async`."""
        futures = [asyncio.get_running_loop().create_future() for _ in searches]
        self._waiting += zip(searches, futures, strict=True)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(_drive(self._take, self.most_at_once))
        try:
            return await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()

    def _take(self, count: int) -> list[Running]:
        count = min(count, len(self._waiting))
        return [self._search(*self._waiting.popleft()) for _ in range(count)]

    def _search(self, begin: Begin[T], future: asyncio.Future[T]) -> Generator[Any, None, None]:
        """Advance a search while its caller waits; errors go to the caller's future."""
        search = begin()
        self.searches += 1
        try:
            while not future.done():
                yield search.send(None)
        except StopIteration as ended:
            future.set_result(ended.value)
        except Exception as error:
            future.set_exception(error)
        finally:
            self.searches -= 1
            search.close()
            future.cancel()

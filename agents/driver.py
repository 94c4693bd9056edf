"""Searches that begin while others run, in common batches with them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from mbrl_text_env.agents.base import MOST_AT_ONCE, Begin, Running, check_positive, drive

T = TypeVar("T")


class Driver:
    """Runs the searches of many calls of `Agent.generate_async` side by side: what a server needs.

    A search joins the others at their next batch. What one raises is raised for its own call, and
    one whose call is cancelled ends before it asks for anything more; the batch under way is
    finished. It belongs to one event loop.

    Args:
        most_at_once: Searches that are under way at a time; further ones wait.

    Attributes:
        searches: How many have begun and not ended.

    Example:
        >>> async def answer(texts):  # each text a call of its own, in common batches
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
        """Return what the searches return, in order; see `run_async`."""
        futures = [asyncio.get_running_loop().create_future() for _ in searches]
        self._waiting += zip(searches, futures, strict=True)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(drive(self._take, self.most_at_once))
        try:
            return await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()

    def _take(self, count: int) -> list[Running]:
        count = min(count, len(self._waiting))
        return [self._search(*self._waiting.popleft()) for _ in range(count)]

    def _search(self, begin: Begin[T], future: asyncio.Future[T]) -> Generator[Any, None, None]:
        """Advance a search as long as somebody waits for it; nothing that it raises gets out."""
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

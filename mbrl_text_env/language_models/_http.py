"""Requests to a fleet of servers: least-loaded first, retried, and never counted on one alone.

What a request means is not known here; see `server.ServerLM`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
import numpy as np

T = TypeVar("T")

_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 2.0
_CONNECT_SECONDS = 5.0
# Busy, restarting, or loading its model: no fault of the request's.
_NOT_READY = frozenset({429, 502, 503, 504})
# Gave up waiting, another request was in the way, or too early: the next attempt may pass.
_PASSING = frozenset({408, 409, 425})
_SHOWN_CHARACTERS = 400


class ServerError(RuntimeError):
    """A server that refuses a request, or answers what it should not."""


class ServerConfigError(ServerError, ValueError):
    """A client that cannot be made as asked."""


class ServerUnavailableError(ServerError):
    """No server answered for as long as one was waited for."""


class UnsupportedByServerError(ServerError, NotImplementedError):
    """Something that a server cannot do."""


class MalformedAnswerError(ServerError):
    """An answer that is not what the protocol says."""


class RefusedError(ServerError):
    """A request that a server will never answer, with its status and reason."""

    def __init__(self, message: str, status: int, reason: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class TransientError(Exception):
    """A failure that may pass.

    Args:
        reason: What happened.
        is_counted: Whether the request itself may be the cause, so that it is given up after a few
            attempts. A server that is down or busy is waited for instead.
        pause: Seconds that the server asks for.
    """

    def __init__(self, reason: str, *, is_counted: bool, pause: float | None = None) -> None:
        super().__init__(reason)
        self.is_counted = is_counted
        self.pause = pause


@dataclass(frozen=True)
class Patience:
    """How long to wait for what.

    Args:
        timeout: Seconds for one whole answer.
        max_wait: Seconds to go on while no server answers anything.
        max_attempts: Times that a request is sent which the servers fail to answer.
    """

    timeout: float
    max_wait: float
    max_attempts: int


class Endpoint:
    """One server of a fleet.

    Args:
        url: Its address, without `/v1`.

    Attributes:
        in_flight: Requests being answered.
        served: Requests answered so far.
        failures: In a row.
        aside_until: It is left alone until then.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.in_flight = 0
        self.served = 0
        self.failures = 0
        self.aside_until = 0.0

    def room(self, max_concurrency: int) -> int:
        """Requests that it may be given now; after a failure one, to see whether it is back."""
        return (1 if self.failures else max_concurrency) - self.in_flight


class KeyFromEnvironment(httpx.Auth):
    """Sends an API key that is read anew each time and kept nowhere.

    Args:
        variable: The environment variable's name.
    """

    def __init__(self, variable: str) -> None:
        self.variable = variable

    def key(self) -> str:
        """The key, or an empty string.

        Raises:
            ServerError: It cannot be sent in a header.
        """
        key = os.environ.get(self.variable, "").strip()
        if not (key.isascii() and (key == "" or key.isprintable())):
            # Sent on, it would be quoted in the HTTP library's error.
            raise ServerError(
                f"The environment variable {self.variable} holds characters that no API key has "
                "(line breaks or letters outside ASCII). Set it again."
            )
        return key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Add the header; called by httpx."""
        key = self.key()
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        yield request

    def scrub(self, text: str) -> str:
        """`text` without the key, should a server have quoted it."""
        key = os.environ.get(self.variable, "").strip()
        return text.replace(key, "***") if key else text


class Fleet:
    """Servers of the same model.

    All coroutines have to run on one event loop.

    Args:
        urls: Their addresses.
        max_concurrency: Most requests to one of them at a time.
        patience: How long to wait for what.
        key: The API key.
    """

    def __init__(
        self, urls: Sequence[str], max_concurrency: int, patience: Patience, key: KeyFromEnvironment
    ) -> None:
        self.endpoints = [Endpoint(url) for url in urls]
        self._max_concurrency = max_concurrency
        self._patience = patience
        self._key = key
        self._room = asyncio.Semaphore(max_concurrency * len(urls))
        self._changed = asyncio.Condition()
        self._last_answer = -float("inf")
        self._last_failure = "none"
        # Only pauses depend on it, and two clients must not come back at the same moment.
        self._jitter = np.random.default_rng()
        self._client = httpx.AsyncClient(
            auth=key,
            timeout=httpx.Timeout(
                patience.timeout, connect=min(_CONNECT_SECONDS, patience.timeout), pool=None
            ),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            # A key must not follow a redirect to somebody else.
            follow_redirects=False,
            # Reading the certificates takes longer than a request, and plain http needs none.
            verify=any(url.startswith("https:") for url in urls),
            # A proxy cannot reach this machine's own loopback.
            trust_env=not all(_is_loopback(url) for url in urls),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def run(self, job: Callable[[Endpoint], Awaitable[T]]) -> T:
        """The result of a job at the server with the least to do, or at the next one.

        Args:
            job: Asks a server; where that raises `TransientError`, it is called again.

        Raises:
            ServerUnavailableError: None answered for `max_wait` seconds.
            ServerError: They answered, but not this job.
        """
        began, attempts = time.monotonic(), 0
        async with self._room:
            while True:
                endpoint = await self._acquire(began)
                try:
                    result = await job(endpoint)
                except TransientError as error:
                    attempts += error.is_counted
                    self._failed(endpoint, error)
                    self._check_attempts(attempts)
                else:
                    self._answered(endpoint)
                    return result
                finally:
                    endpoint.in_flight -= 1
                    async with self._changed:
                        self._changed.notify_all()

    async def call(self, endpoint: Endpoint, method: str, path: str, body: Any = None) -> Any:
        """What a server answers to one request, read from JSON.

        Raises:
            TransientError: It may answer later, or another one may.
            RefusedError: It refuses the request (4xx).
            ServerError: The key is refused, or it points somewhere else.
            MalformedAnswerError: The answer is no JSON.
        """
        try:
            # httpx limits the pauses between bytes; this limits the whole answer.
            async with asyncio.timeout(self._patience.timeout):
                response = await self._client.request(method, endpoint.url + path, json=body)
        except httpx.ConnectTimeout:
            raise TransientError("no connection in time", is_counted=False) from None
        except httpx.ConnectError as error:
            raise TransientError(
                f"no connection ({self._key.scrub(str(error))})", is_counted=False
            ) from None
        except (httpx.TimeoutException, TimeoutError):
            raise TransientError(
                f"no answer within {self._patience.timeout:g} s", is_counted=True
            ) from None
        except httpx.RequestError as error:
            raise TransientError(
                f"the connection broke, or the answer cannot be decoded "
                f"({self._key.scrub(str(error))})",
                is_counted=True,
            ) from None
        self._check_status(endpoint, response, response.status_code)
        data = self._parsed(endpoint.url + path, response)
        if isinstance(data, dict) and data.get("error"):
            # Gateways answer 200 and put the status of the server behind them into the body.
            said = data["error"]
            code = said.get("code") if isinstance(said, dict) else None
            self._check_status(endpoint, response, code if isinstance(code, int) else 500)
        return data

    def _parsed(self, address: str, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError:
            shown = self._key.scrub(response.text)[:_SHOWN_CHARACTERS]
        if not shown.strip() or shown.lstrip().startswith(("{", "[")):
            raise TransientError(f"an answer that was cut off: {shown!r}", is_counted=True)
        raise MalformedAnswerError(
            f"{address}: expected JSON, got {shown!r}. Is this the address of an "
            "OpenAI-compatible server?"
        )

    def _check_status(self, endpoint: Endpoint, response: httpx.Response, status: int) -> None:
        if status < 300:
            return
        if status < 400:
            target = self._key.scrub(shown_url(response.headers.get("location", "")))
            raise ServerError(
                f"{endpoint.url} redirects to {target!r}. Redirects are not followed, since the "
                "API key would go along; pass the address that it points to."
            )
        reason = self._key.scrub(_reason(response))[:_SHOWN_CHARACTERS]
        if status >= 500 or status in _NOT_READY | _PASSING:
            raise TransientError(
                f"status {status}: {reason}",
                is_counted=status not in _NOT_READY,
                pause=_retry_after(response),
            )
        if status in {401, 403}:
            raise ServerError(
                f"{endpoint.url} refuses the API key (status {status}: {reason}). It is read from "
                f"the environment variable {self._key.variable}."
            )
        raise RefusedError(
            f"{endpoint.url} refuses the request (status {status}): {reason}", status, reason
        )

    async def _acquire(self, began: float) -> Endpoint:
        while True:
            now = time.monotonic()
            ready = [e for e in self.endpoints if e.aside_until <= now]
            free = [e for e in ready if e.room(self._max_concurrency) > 0]
            if free:
                chosen = min(free, key=lambda e: (e.in_flight, e.served))
                chosen.in_flight += 1
                return chosen
            pauses = [e.aside_until - now for e in self.endpoints if e not in ready]
            if not ready:
                self._check_patience(began, now + min(pauses))
            await self._wait(min(pauses, default=None))

    async def _wait(self, seconds: float | None) -> None:
        """Until something changes, or for some seconds."""
        async with self._changed:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), seconds)

    def _answered(self, endpoint: Endpoint) -> None:
        endpoint.served += 1
        endpoint.failures, endpoint.aside_until = 0, 0.0
        self._last_answer = time.monotonic()

    def _failed(self, endpoint: Endpoint, error: TransientError) -> None:
        self._last_failure = f"{endpoint.url}: {error}"
        now = time.monotonic()
        if endpoint.aside_until > now and error.pause is None:
            return  # One of many requests that were lost together.
        endpoint.failures += 1
        doubled = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(endpoint.failures - 1, 16))
        pause = doubled * self._jitter.uniform(0.5, 1.0) if error.pause is None else error.pause
        endpoint.aside_until = max(endpoint.aside_until, now + pause)

    def _check_patience(self, began: float, wake: float) -> None:
        """Raise where the next attempt would come too late."""
        if wake <= max(began, self._last_answer) + self._patience.max_wait:
            return
        urls = ", ".join(endpoint.url for endpoint in self.endpoints)
        raise ServerUnavailableError(
            f"No server answers: {urls}. The last failure was {self._last_failure}. They were "
            f"waited for up to max_wait={self._patience.max_wait:g} s. Start the server again, or "
            "wait longer; a comparison that is run again goes on where it stopped."
        )

    def _check_attempts(self, attempts: int) -> None:
        if attempts < self._patience.max_attempts:
            return
        raise ServerError(
            f"A request failed {attempts} times although a server was there. The last failure was "
            f"{self._last_failure}. Look into the server's log, or allow more time (timeout)."
        )


class LoopThread:
    """An event loop in a thread of its own, so that any thread and any notebook may call.

    Args:
        name: The thread's.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()
        self.pid = os.getpid()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end; an interrupt of the caller cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel what is under way, run a last coroutine, and stop.

        Args:
            last: Makes it.
        """
        # A thread does not outlive a fork, and the loop's pipe belongs to the parent.
        if self.pid != os.getpid() or not self._thread.is_alive():
            return

        async def finish() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            try:
                await asyncio.gather(*others, return_exceptions=True)
                await last()
            finally:
                self._loop.stop()

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: self._loop.create_task(finish()))
        # The collector may have brought us here from the loop itself.
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=_CONNECT_SECONDS)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()


async def gather(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; where one fails, the others are cancelled and waited for."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def checked_url(url: str) -> str:
    """A server's address without a trailing `/v1`.

    Raises:
        ServerConfigError: It is no plain http or https address.
    """
    try:
        parsed = httpx.URL(url.strip())
    except (httpx.InvalidURL, AttributeError):
        parsed = httpx.URL("")
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ServerConfigError(
            f"base_urls: expected addresses such as 'http://127.0.0.1:8000', got {url!r}."
        )
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ServerConfigError(
            f"base_urls: expected an address without name, password and query, got one at "
            f"{parsed.host!r}. API keys are read from the environment (api_key_env)."
        )
    return str(parsed).rstrip("/").removesuffix("/v1").rstrip("/")


def shown_url(url: str) -> str:
    """An address as it may be shown: without name, password and query."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return "an address that cannot be read"
    return str(parsed.copy_with(username=None, password=None, query=None))


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reason(response: httpx.Response) -> str:
    """What an error answer says, in the words of the server."""
    try:
        data = response.json()
    except ValueError:
        return response.text.strip() or response.reason_phrase
    for field in ("error", "message", "detail"):
        if isinstance(data, dict) and data.get(field):
            data = data[field]
    return data if isinstance(data, str) else str(data)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks for, given as a number or as a date."""
    text = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None

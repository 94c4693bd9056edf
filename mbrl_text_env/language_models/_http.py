"""Send requests to servers with retries, and validate answers; `_engines` interprets them.

Readers of answers raise a `ValueError` that names the expected and the actual content, or a
`TransientError` if a retry can help.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar, get_args

import httpx
import tenacity

from mbrl_text_env.language_models.hf_tokenizer import HFTokenizer

T = TypeVar("T")
Mode = Literal["auto", "completions", "chat"]
Kind = Literal["llamacpp", "openai", "sglang", "tgi", "vllm"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 2.0
_CONNECT_SECONDS = 5.0
# Busy, restarting, or loading the model: not caused by the request.
_NOT_READY = frozenset({429, 502, 503, 504})
# Timeout, conflict or too early: the next attempt may succeed.
_PASSING = frozenset({408, 409, 425})
_SHOWN_CHARACTERS = 400
# Log-probabilities are rounded: that of a certain token can be slightly above 0.
_ROUNDING = 1e-6


class ServerError(RuntimeError):
    """A server rejects a request or gives an invalid answer."""


class ServerConfigError(ServerError, ValueError):
    """A client cannot be created with these arguments."""


class ServerUnavailableError(ServerError):
    """No server answered within the waiting time."""


class UnsupportedByServerError(ServerError, NotImplementedError):
    """A server does not support something."""


class MalformedAnswerError(ServerError):
    """An answer does not follow the protocol."""


class RefusedError(ServerError):
    """A server rejects a request for good, with a status and a reason."""

    def __init__(self, message: str, status: int, reason: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class TransientError(Exception):
    """A failure that may be temporary; `pause` is the server's requested delay in seconds.

    It is counted if the request itself may be the cause; after a few attempts, the request fails. A
    server that is down or busy is waited for instead.
    """

    def __init__(self, reason: str, *, is_counted: bool = True, pause: float | None = None) -> None:
        super().__init__(reason)
        self.is_counted, self.pause = is_counted, pause


@dataclass(frozen=True)
class Options:
    """Validated connection options; for the fields see `server.ServerLM`."""

    urls: Sequence[str]
    tokenizer: HFTokenizer
    model: str | None
    engine: str | None
    mode: Mode
    max_concurrency: int
    timeout: float
    max_wait: float
    max_attempts: int
    api_key_env: str
    num_parameters: int | None
    prefix_cache: bool

    def __post_init__(self) -> None:
        urls = [_checked_url(u) for u in ([self.urls] if isinstance(self.urls, str) else self.urls)]
        if not urls or len(set(urls)) < len(urls):
            raise ServerConfigError(f"base_urls: expected distinct addresses, got {urls}.")
        object.__setattr__(self, "urls", urls)
        if self.mode not in get_args(Mode):
            raise ServerConfigError(f"mode: expected one of {get_args(Mode)}, got {self.mode!r}.")
        if self.engine not in (None, *get_args(Kind)):
            raise ServerConfigError(
                f"engine: expected one of {get_args(Kind)}, got {self.engine!r}."
            )
        for name in ("max_concurrency", "max_attempts", "num_parameters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ServerConfigError(f"{name}: expected at least 1, got {value}.")
        if not self.timeout > 0 or not self.max_wait >= 0:
            raise ServerConfigError(
                "Expected timeout above 0 and max_wait of at least 0, got "
                f"{self.timeout} and {self.max_wait}."
            )

    def key(self) -> str:
        """The API key, read from the environment each time and never stored."""
        return os.environ.get(self.api_key_env, "").strip()

    def scrub(self, text: object) -> str:
        """Remove the key from a text, in case a server quotes it."""
        key = self.key()
        return str(text).replace(key, "***") if key else str(text)

    def authorize(self, request: httpx.Request) -> httpx.Request:
        """Add the key to a request."""
        if key := self.key():
            if not (key.isascii() and key.isprintable()):
                # If it were sent, the HTTP library's error would quote it.
                raise ServerError(
                    f"The environment variable {self.api_key_env} has characters that are not "
                    "allowed in an API key (line breaks or letters outside ASCII). Set it again."
                )
            request.headers["Authorization"] = f"Bearer {key}"
        return request


@dataclass
class _Endpoint:
    url: str
    slots: asyncio.Semaphore
    in_flight: int = 0
    served: int = 0
    aside_until: float = 0.0


class Transport:
    """Connections to servers of the same model, in a thread with its own event loop.

    It can be used from any thread or notebook; `run` and `call` are coroutines of its loop.
    """

    def __init__(self, options: Options) -> None:
        self._options, self._last_answer, self.pid = options, -float("inf"), os.getpid()
        self._endpoints = [
            _Endpoint(url, asyncio.Semaphore(options.max_concurrency)) for url in options.urls
        ]
        timeout = options.timeout
        self._client = httpx.AsyncClient(
            auth=options.authorize,
            timeout=httpx.Timeout(timeout, connect=min(_CONNECT_SECONDS, timeout), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            # A redirect must not pass the key on to another server.
            follow_redirects=False,
            # Loading the certificates takes longer than a request, and plain http needs none.
            verify=any(url.startswith("https:") for url in options.urls),
            # A proxy cannot reach this machine's loopback.
            trust_env=not all(_is_loopback(url) for url in options.urls),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="ServerLM", daemon=True)
        self._thread.start()

    @property
    def served(self) -> dict[str, int]:
        """Number of requests that each server has answered."""
        return {endpoint.url: endpoint.served for endpoint in self._endpoints}

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the loop; cancelling its future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel running requests, and close the connections."""
        # A thread does not survive a fork, and the loop's pipe belongs to the parent.
        if self.pid != os.getpid():
            return
        with contextlib.suppress(RuntimeError):  # Already closed.
            self._loop.call_soon_threadsafe(self._loop.stop)
        # The garbage collector can call this from the loop's own thread.
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=_CONNECT_SECONDS)

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        await _cancel(asyncio.all_tasks() - {asyncio.current_task()})
        await self._client.aclose()

    async def run(self, job: Callable[[str], Awaitable[T]]) -> T:
        """Run a job at the server with the fewest requests; retry it after a `TransientError`.

        Raises:
            ServerUnavailableError: No server answered for `max_wait` seconds.
            ServerError: Servers answered, but not this job.
        """
        began, counted, options = time.monotonic(), 0, self._options
        backoff = tenacity.wait_random_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE)
        endpoint = self._endpoints[0]

        def wait(state: tenacity.RetryCallState) -> float:
            """Set the server aside; only wait if all servers are set aside."""
            now, pause = time.monotonic(), _error(state).pause
            pause = backoff(state) if pause is None else pause
            endpoint.aside_until = max(endpoint.aside_until, now + pause)
            return max(0.0, min(e.aside_until for e in self._endpoints) - now)

        def stop(state: tenacity.RetryCallState) -> bool:
            nonlocal counted
            counted += _error(state).is_counted
            failure = f"The last failure was {endpoint.url}: {_error(state)}."
            if counted >= options.max_attempts:
                raise ServerError(
                    f"A request failed {counted} times although a server was available. {failure} "
                    "Check the server's log, or allow more time (timeout)."
                ) from None
            wake = time.monotonic() + state.upcoming_sleep
            if state.upcoming_sleep and wake > max(began, self._last_answer) + options.max_wait:
                raise ServerUnavailableError(
                    f"No server answers: {', '.join(options.urls)}. {failure} Waited "
                    f"up to max_wait={options.max_wait:g} s. Restart the server, or wait "
                    "longer; a comparison resumes where it stopped when it is run again."
                ) from None
            return False

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TransientError), wait=wait, stop=stop
        )
        async for attempt in retrying:
            with attempt:
                now = time.monotonic()
                ready = [e for e in self._endpoints if e.aside_until <= now] or self._endpoints
                endpoint = min(ready, key=lambda e: (e.in_flight, e.served))
                endpoint.in_flight += 1
                try:
                    async with endpoint.slots:
                        result = await job(endpoint.url)
                finally:
                    endpoint.in_flight -= 1
                endpoint.served += 1
                endpoint.aside_until, self._last_answer = 0.0, time.monotonic()
        return result

    async def call(self, url: str, path: str, body: Any = None) -> Any:
        """Return a server's JSON answer to one request; without a body it is a GET.

        Raises:
            TransientError: This or another server may answer later.
            RefusedError: The server rejects the request (4xx).
            ServerError: The key is rejected, or the server redirects.
            MalformedAnswerError: The answer is not JSON.
        """
        scrub, timeout = self._options.scrub, self._options.timeout
        method = "GET" if body is None else "POST"
        try:
            # httpx limits the time between bytes; this limits the time of the whole answer.
            async with asyncio.timeout(timeout):
                response = await self._client.request(method, url + path, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            reason = f"no connection ({scrub(error) or 'in time'})"
            raise TransientError(reason, is_counted=False) from None
        except (httpx.TimeoutException, TimeoutError):
            raise TransientError(f"no answer within {timeout:g} s") from None
        except httpx.RequestError as error:
            reason = f"the connection broke, or the answer cannot be decoded ({error})"
            raise TransientError(scrub(reason)) from None
        self._check_status(url, response, response.status_code)
        try:
            data = response.json()
        except ValueError:
            shown = scrub(response.text)[:_SHOWN_CHARACTERS]
            if not shown.strip() or shown.lstrip().startswith(("{", "[")):
                raise TransientError(f"a truncated answer: {shown!r}") from None
            raise MalformedAnswerError(
                f"{url}{path}: expected JSON, got {shown!r}. Is this the address of an "
                "OpenAI-compatible server?"
            ) from None
        if isinstance(data, dict) and (said := data.get("error")):
            # Gateways can answer 200 with the status of the server behind them in the body.
            code = said.get("code") if isinstance(said, dict) else None
            self._check_status(url, response, code if isinstance(code, int) else 500)
        return data

    def _check_status(self, url: str, response: httpx.Response, status: int) -> None:
        if status < 300:
            return
        options = self._options
        if status < 400:
            target = options.scrub(_shown_url(response.headers.get("location", "")))
            raise ServerError(
                f"{url} redirects to {target!r}. Redirects are not followed, because the "
                "API key would be sent too; pass the target address."
            )
        reason = options.scrub(_reason(response))[:_SHOWN_CHARACTERS]
        said = f"status {status}: {reason}"
        if status >= 500 or status in _NOT_READY | _PASSING:
            is_counted = status not in _NOT_READY
            raise TransientError(said, is_counted=is_counted, pause=_retry_after(response))
        if status in {401, 403}:
            raise ServerError(
                f"{url} rejects the API key ({said}). It is read from the environment variable "
                f"{options.api_key_env}."
            )
        raise RefusedError(f"{url} rejects the request ({said})", status, reason)


async def gather(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results in order; if one fails, cancel the others and wait for them."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Iterable[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _error(state: tenacity.RetryCallState) -> TransientError:
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, TransientError)
    return error


def _checked_url(url: str) -> str:
    """Check a server's address, and remove a trailing `/v1`."""
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
            f"base_urls: expected an address without user name, password and query, got one at "
            f"{parsed.host!r}. API keys are read from the environment (api_key_env)."
        )
    return str(parsed).rstrip("/").removesuffix("/v1").rstrip("/")


def _shown_url(url: str) -> str:
    """An address without user name, password and query."""
    try:
        return str(httpx.URL(url).copy_with(username=None, password=None, query=None))
    except httpx.InvalidURL:
        return "an invalid address"


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reason(response: httpx.Response) -> str:
    """The server's own words in an error answer."""
    try:
        data = response.json()
    except ValueError:
        return response.text.strip() or response.reason_phrase
    for field in ("error", "message", "detail"):
        if isinstance(data, dict) and data.get(field):
            data = data[field]
    return str(data)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds to wait as requested by the server, from a number or a date."""
    text = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        with contextlib.suppress(ValueError, TypeError):
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


@dataclass(frozen=True)
class Answer:
    """A server's sample; None marks missing data. `matched` is the stop that ended it."""

    token_ids: list[int] | None
    logprobs: list[float] | None
    text: str
    reason: str | None
    matched: int | str | None


@dataclass(frozen=True)
class Bill:
    """Token counts that a server reports for a request; None if it does not.

    Prompt tokens count once for all samples; `cached` of them were not computed.
    """

    prompt: int | None = None
    cached: int | None = None
    generated: int | None = None


def read_model(data: Any, wanted: str | None) -> tuple[str, str, int | None, int | None]:
    """Owner, name, context and parameters of a model in `/v1/models`, or of the only one listed."""
    entries = list_in(data, "data")
    names = [str(field_of(entry, "id")) for entry in entries]
    if not names:
        raise ValueError("expected at least one model, got none")
    if wanted is None and len(names) > 1:
        raise ValueError(f"expected one model, got {names}; choose one of them with model=")
    entry = entries[names.index(wanted) if wanted in names else 0]
    meta = entry.get("meta") or {}
    return (
        str(entry.get("owned_by") or "").lower(),
        names[0] if wanted is None else wanted,
        _count(entry.get("max_model_len") or meta.get("n_ctx")) or None,
        _count(meta.get("n_params")) or None,
    )


def bill_of(usage: dict[str, Any]) -> Bill:
    """Token counts from a server's `usage`."""
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens", usage.get("cached_tokens"))
    counts = (usage.get("prompt_tokens"), cached, usage.get("completion_tokens"))
    return Bill(*map(_count, counts))


def openai_answer(choice: dict[str, Any]) -> Answer:
    """Read a completion or chat sample; ids and log-probabilities in the new or old format."""
    logs = choice.get("logprobs") or {}
    tokens = found = None
    if logs.get("content") is not None:
        entries = list_in(logs, "content")
        tokens = [e["id"] if "id" in e else _placeholder(e.get("token")) for e in entries]
        found = [field_of(entry, "logprob") for entry in entries]
    elif logs.get("token_logprobs") is not None:
        tokens = [_placeholder(token) for token in logs.get("tokens") or []]
        found = list_in(logs, "token_logprobs")
    if tokens is not None and (None in tokens or len(tokens) != len(found or ())):
        tokens = None
    ids, matched = choice.get("token_ids"), choice.get("stop_reason")
    return checked_answer(
        tokens if ids is None else ids,
        found,
        choice["message"].get("content") if choice.get("message") else choice.get("text"),
        choice.get("finish_reason"),
        choice.get("matched_stop") if matched is None else matched,
    )


def read_next_tokens(data: Any) -> dict[int, float] | None:
    """Log-probabilities of the possible first tokens; None if their ids are missing."""
    [choice] = choices_of(data, 1)
    logs = choice.get("logprobs") or {}
    if logs.get("content"):
        entries = list_in(logs["content"][0], "top_logprobs")
        found = {e["id"]: field_of(e, "logprob") for e in entries if "id" in e}
    else:
        first = (logs.get("top_logprobs") or [None])[0] or {}
        found = {_placeholder(token): logprob for token, logprob in first.items()}
    if not found or None in found:
        return None
    return dict(zip(found, checked_logprobs(list(found.values())), strict=True))


def checked_answer(
    ids: Any, logprobs: list[Any] | None, text: Any, reason: Any, matched: Any
) -> Answer:
    """Validate a server's sample."""
    # Ends caused by a server's own failure; a retry may succeed.
    if reason in ("abort", "error"):
        raise TransientError(f"the server gave up (finish_reason {reason!r})")
    if ids is None and not isinstance(text, str):
        raise ValueError(f"expected token ids or text, got {text!r}")
    if ids is not None:
        if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
            raise ValueError(f"expected token ids, got {str(ids)[:200]}")
        if logprobs is not None and len(logprobs) != len(ids):
            raise ValueError(
                f"expected one log-probability per token ({len(ids)}), got {len(logprobs)}"
            )
    checked = None if logprobs is None else checked_logprobs(logprobs)
    return Answer(ids, checked, text if isinstance(text, str) else "", reason, matched)


def checked_logprobs(values: Sequence[Any]) -> list[float]:
    """Validate log-probabilities; NaN and -inf are errors."""
    for value in values:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and -math.inf < value <= _ROUNDING):
            raise ValueError(f"expected a finite log-probability of at most 0, got {value!r}")
    return [float(value) for value in values]


def choices_of(data: Any, count: int) -> list[dict[str, Any]]:
    """The samples of an answer, ordered by index."""
    choices = list_in(data, "choices")
    if not choices:
        raise TransientError("an answer without choices")
    if len(choices) != count or not all(isinstance(choice, dict) for choice in choices):
        expected = "one choice" if count == 1 else f"{count} choices"
        raise ValueError(f"expected {expected}, got {len(choices)}")
    return sorted(choices, key=lambda choice: choice.get("index") or 0)


def field_of(data: Any, name: str) -> Any:
    """Return a required field."""
    if not isinstance(data, dict) or name not in data:
        raise ValueError(f"expected the field {name!r}, got {str(data)[:200]}")
    return data[name]


def list_in(data: Any, name: str) -> list[Any]:
    """Return a required list."""
    value = field_of(data, name)
    if not isinstance(value, list):
        raise ValueError(f"expected a list for {name}, got {str(value)[:200]}")
    return value


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _placeholder(token: Any) -> int | None:
    """The id in `token_id:123`, which is how vLLM writes tokens as ids."""
    prefix, _, digits = str(token).rpartition(":")
    return int(digits) if prefix == "token_id" and digits.isdecimal() else None

"""An OpenAI-compatible server that finds its answers by search: `create_app`.

Requests share one `Driver`, so that their model calls are batched.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import hmac
import json
import logging
import math
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

import prometheus_client as prometheus
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage

from mbrl_text_env.agents.base import Agent, Generation
from mbrl_text_env.agents.driver import Driver
from mbrl_text_env.benchmarks.serve import Limits, ServeError
from mbrl_text_env.language_models.base import PromptTooLongError, spawn_seed
from mbrl_text_env.mdp import initial
from mbrl_text_env.rewards.base import (
    RewardError,
    RewardModel,
    Scores,
    reward_bounds,
    reward_name,
    score_responses,
)
from mbrl_text_env.rewards.composite.combinators import Wrapper
from mbrl_text_env.types import Budget, BudgetError, FloatArray, Message, Prompt, Usage

T = TypeVar("T")

_LOG = logging.getLogger("uvicorn.error")
# Status for a client that has disconnected, as in nginx.
_GONE = 499
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models")
_WORD = re.compile(r"\s*\S+|\s+")


class Refusal(Exception):  # noqa: N818 it becomes an answer
    """An error response in OpenAI's format."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": param, "code": code}
        # OpenAI's clients retry unless told not to.
        again = "true" if status == 429 else "false"
        headers = {"x-should-retry": again} | {k.replace("_", "-"): v for k, v in headers.items()}
        self.response = JSONResponse({"error": error}, status, headers)


class _Body(BaseModel):
    """A JSON body; empty parameters such as `"tools": []` are dropped, unknown ones rejected."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_off(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # Keep 0, which equals False.
        return {k: v for k, v in data.items() if v not in (None, [], {}) and v is not False}


_StopText = Annotated[str, Field(min_length=1)]
_Zero = Annotated[float, Field(ge=0, le=0)]


class _Parameters(_Body):
    model: str
    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: _StopText | Annotated[list[_StopText], Field(max_length=4)] = []
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] = {}
    # Accepted, if they have no effect.
    frequency_penalty: _Zero = 0
    presence_penalty: _Zero = 0
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop sequences."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class _Text(_Body):
    type: Literal["text"]
    text: str


class _ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Text]
    name: Any = None

    def message(self) -> Message:
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message("system" if self.role == "developer" else self.role, text)


class ChatRequest(_Parameters):
    """A request of `/v1/chat/completions`."""

    messages: list[_ChatMessage] = Field(min_length=1)


class CompletionRequest(_Parameters):
    """A request of `/v1/completions`."""

    prompt: str | list[str]


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop sequence."""
    return text[: min((text.find(each) for each in stop if each in text), default=len(text))]


class _Cut(Wrapper):
    """Score responses as they are sent, cut at stop sequences."""

    def __init__(self, reward: RewardModel, stop: tuple[str, ...]) -> None:
        super().__init__(reward)
        self.stop = stop

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Return the scores and parts, each float64[B]."""
        return score_responses(self.reward, prompts, [_cut(r, self.stop) for r in responses])

    def bound(self, prompts: Sequence[Prompt], prefixes: Sequence[str]) -> FloatArray:
        """Return float64[B], the bounds of the cut prefixes."""
        return reward_bounds(self.reward, prompts, [_cut(p, self.stop) for p in prefixes])


class _Metrics:
    """The metrics of `/metrics`, in their own registry."""

    def __init__(self, service: _Service) -> None:
        self.registry = prometheus.CollectorRegistry()
        own: dict[str, Any] = {"namespace": "mbrl_text", "registry": self.registry}
        self.requests = prometheus.Counter(
            "requests", "Requests by path and status.", ["path", "status"], **own
        )
        self.seconds = prometheus.Histogram(
            "request_seconds", "Seconds a request took.", ["path"], **own
        )
        self.spent = prometheus.Counter("spent", "Usage of finished searches.", ["kind"], **own)
        self.score = prometheus.Summary("score", "Scores of answers.", **own)
        gauges: dict[str, Callable[[], float]] = {
            "running_requests": lambda: service.running,
            "waiting_requests": lambda: service.waiting,
            "running_searches": lambda: service.driver.searches,
        }
        for gauge, value in gauges.items():
            text = gauge.replace("_", " ").capitalize()
            prometheus.Gauge(gauge, f"{text}.", **own).set_function(value)

    def add(self, generations: Sequence[Generation]) -> None:
        """Add the usage and scores of generations."""
        for generation in generations:
            for kind, amount in generation.usage.as_dict().items():
                self.spent.labels(kind).inc(amount)
            if generation.completion.score is not None:
                self.score.observe(generation.completion.score)


class _Door:
    """Check key and size of a request before it is read, and count responses."""

    def __init__(self, app: ASGIApp, service: _Service, api_key: str | None) -> None:
        self.app, self.service, self.key = app, service, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        metrics, start = self.service.metrics, time.perf_counter()
        # Clients must not create metric labels.
        path = scope["path"] if scope["path"] in _PATHS else "other"

        async def counted(message: ASGIMessage) -> None:
            if message["type"] == "http.response.start":
                metrics.requests.labels(path, message["status"]).inc()
                metrics.seconds.labels(path).observe(time.perf_counter() - start)
            await send(message)

        try:
            self._check(scope["method"], Headers(scope=scope))
        except Refusal as refusal:
            await refusal.response(scope, receive, counted)
        else:
            await self.app(scope, receive, counted)

    def _check(self, method: str, headers: Headers) -> None:
        given = headers.get("authorization", "").encode("latin-1")
        if self.key is not None and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            message = "Expected the server's key. Send `Authorization: Bearer KEY`."
            raise Refusal(401, message, code="invalid_api_key")
        length, most = headers.get("content-length", ""), self.service.limits.max_request_bytes
        if method == "POST" and not length.isdigit():
            raise Refusal(411, "Expected a Content-Length header.", code="length_required")
        if method == "POST" and int(length) > most:
            message = f"Expected at most {most} bytes, got {length}."
            raise Refusal(413, message, code="request_too_large")


@dataclass(eq=False)
class _Service:
    """Searches for answers, within limits."""

    agents: Mapping[str, Agent]
    budget: Budget
    limits: Limits

    def __post_init__(self) -> None:
        self.driver = Driver()
        self.running = self.waiting = 0
        self.metrics = _Metrics(self)
        self._places = asyncio.Semaphore(self.limits.max_running)
        # Requests with the same stop sequences share reward calls.
        self._rewards = lru_cache(maxsize=64)(_Cut)

    async def answer(self, body: _Parameters, prompts: Sequence[Prompt]) -> list[Generation]:
        """`body.n` answers per prompt, grouped by prompt; or a `Refusal`."""
        agent = self._agent(body)
        if len(prompts) * body.n > self.limits.max_choices:
            message = f"Expected at most {self.limits.max_choices} choices in a request, got "
            message += f"{len(prompts) * body.n}. Ask for fewer."
            raise Refusal(400, message, code="too_many_choices", param="n")
        for prompt in prompts:
            self._check_prompt(agent, prompt)
        try:
            async with asyncio.timeout(self.limits.request_timeout), self._place():
                found = await self._generate(agent, body, prompts)
        except TimeoutError:
            message = f"No answer within {self.limits.request_timeout:g} seconds: the search was "
            message += "stopped. Ask for fewer choices or tokens, or raise --request-timeout."
            raise Refusal(504, message, code="timeout") from None
        self.metrics.add(found)
        return found

    async def _generate(
        self, agent: Agent, body: _Parameters, prompts: Sequence[Prompt]
    ) -> list[Generation]:
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        # The first seed is that of a request with n = 1.
        seeds = [seed if k == 0 else spawn_seed(seed, k) for k in range(body.n)]
        asked = [(prompt, each) for prompt in prompts for each in seeds]
        searches = [
            agent.generate_async([p], self.budget, seed=s, driver=self.driver) for p, s in asked
        ]
        try:
            return [found for [found] in await _all(searches)]
        except BudgetError as error:
            raise Refusal(400, str(error), code="budget_too_small") from error
        except RewardError as error:
            name = reward_name(agent.reward_model)
            _LOG.exception("Reward %r failed", name)
            message = f"The reward {name!r} failed on this request: it raised, timed out, or "
            message += "returned a value that is not finite. See the server's log."
            raise Refusal(500, message, code="reward_failed") from error
        except Exception as error:
            _LOG.exception("A search failed")
            message = f"The search failed ({type(error).__name__}). See the server's log."
            raise Refusal(500, message, code="search_failed") from error

    def _agent(self, body: _Parameters) -> Agent:
        """The requested agent, with the request's sampling parameters."""
        if body.model not in self.agents:
            message = f"Expected one of {list(self.agents)}, got {body.model!r}."
            raise Refusal(404, message, code="model_not_found", param="model")
        agent = copy.copy(self.agents[body.model])
        tokens, most = body.max_completion_tokens or body.max_tokens, agent.max_response_tokens
        if tokens is not None and tokens > most:
            message = f"Expected at most {most} tokens, got {tokens}. Lower it, or raise the "
            message += "server's --max-response-tokens."
            raise Refusal(400, message, code="max_tokens_too_large", param="max_tokens")
        drawn: dict[str, Any] = {"temperature": body.temperature, "top_p": body.top_p}
        agent.params = replace(agent.params, **{k: v for k, v in drawn.items() if v is not None})
        agent.max_response_tokens = tokens or most
        if body.stops and agent.reward_model is not None:
            agent.reward_model = self._rewards(agent.reward_model, body.stops)
        return agent

    def _check_prompt(self, agent: Agent, prompt: Prompt) -> None:
        try:
            length = len(initial(prompt, agent.language_model).prompt_ids)
        except PromptTooLongError as error:
            raise Refusal(400, str(error), code="context_length_exceeded") from error
        except ValueError as error:
            raise Refusal(400, str(error), code="invalid_prompt") from error
        most = self.limits.max_prompt_tokens or math.inf
        if length > most:
            message = f"Expected a prompt of at most {most} tokens, got {length}. Shorten it."
            raise Refusal(400, message, code="context_length_exceeded")

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """Wait for a free place; a `Refusal` if too many requests wait."""
        if self._places.locked() and self.waiting >= self.limits.max_waiting:
            message = (
                f"Busy: {self.running} requests are running and {self.waiting} wait. Try later."
            )
            raise Refusal(429, message, code="rate_limit_exceeded", retry_after="1")
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()


def _head(kind: str, body: _Parameters) -> dict[str, Any]:
    """The common fields of a response and its chunks."""
    created = {"object": kind, "created": int(time.time()), "model": body.model}
    return {"id": f"{kind.split('.')[0]}-{uuid.uuid4().hex}", **created}


def _answer(found: Sequence[Generation], body: _Parameters) -> Response:
    """The response in OpenAI's format, whole or as an event stream, with scores."""
    texts = [_cut(each.text, body.stops) for each in found]
    ends = [
        {
            "finish_reason": "stop" if text != each.text else each.completion.state.finish_reason,
            "score": each.completion.score,
            "score_parts": each.completion.parts,
        }
        for text, each in zip(texts, found, strict=True)
    ]
    scores = [each.completion.score for each in found if each.completion.score is not None]
    headers = {"x-score": ", ".join(map(str, scores))} if scores else {}
    about = {"usage": _usage(found, body.n), "seed": found[0].seed}
    if body.stream:
        events = _events(texts, ends, about, body)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    is_chat = isinstance(body, ChatRequest)
    whole = [
        {"message": {"role": "assistant", "content": text}}
        if is_chat
        else {"text": text, "logprobs": None}
        for text in texts
    ]
    choices = [
        {"index": i, **content, **end}
        for i, (content, end) in enumerate(zip(whole, ends, strict=True))
    ]
    head = _head("chat.completion" if is_chat else "text_completion", body)
    return JSONResponse({**head, "choices": choices, **about}, 200, headers)


def _piece(text: str, is_first: bool, body: _Parameters) -> dict[str, Any]:
    if not isinstance(body, ChatRequest):
        return {"text": text, "logprobs": None}
    content = {"content": text} if text or is_first else {}
    return {"delta": {"role": "assistant", **content} if is_first else content}


def _events(
    texts: Sequence[str],
    ends: Sequence[dict[str, Any]],
    about: dict[str, Any],
    body: _Parameters,
) -> Iterator[str]:
    is_chat = isinstance(body, ChatRequest)
    head = _head("chat.completion.chunk" if is_chat else "text_completion", body)
    going = {"finish_reason": None}
    chunks: list[dict[str, Any]] = []
    for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
        # The start and the end of a choice are separate events.
        pieces = [("", going), *((word, going) for word in _WORD.findall(text)), ("", end)]
        chunks += [
            {"choices": [{"index": i, **_piece(piece, k == 0, body), **more}]}
            for k, (piece, more) in enumerate(pieces)
        ]
    if body.stream_options.get("include_usage"):
        chunks.append({"choices": [], **about})
    for chunk in chunks:
        yield f"data: {json.dumps({**head, **chunk})}\n\n"
    yield "data: [DONE]\n\n"


def _usage(found: Sequence[Generation], n: int) -> dict[str, Any]:
    """Token counts in OpenAI's format, and the usage of the search."""
    prompt = sum(len(each.completion.state.prompt_ids) for each in found[::n])
    answer = sum(len(each.completion.state.response_ids) for each in found)
    counts = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return {**counts, "search": sum((each.usage for each in found), Usage()).as_dict()}


def _prompts(contents: Sequence[str | tuple[Message, ...]]) -> list[Prompt]:
    """Make prompts with ids that are digests of their contents."""
    try:
        return [
            Prompt(hashlib.sha256(repr(each).encode()).hexdigest()[:16], each) for each in contents
        ]
    except ValueError as error:
        raise Refusal(400, str(error), code="invalid_prompt") from error


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all; if one fails or this is cancelled, cancel all."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _unless_gone(
    request: Request,
    searching: Coroutine[Any, Any, list[Generation]],
    body: _Parameters,
) -> Response:
    """Respond, or cancel the search if the client disconnects."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    search, going = asyncio.create_task(searching), asyncio.create_task(gone())
    try:
        await asyncio.wait([search, going], return_when=asyncio.FIRST_COMPLETED)
        return _answer(search.result(), body) if search.done() else Response(status_code=_GONE)
    finally:
        search.cancel()
        going.cancel()


async def _error(request: Request, error: Any) -> Response:
    """The response to an error, in OpenAI's format."""
    if isinstance(error, Refusal):
        response: Response = error.response
        return response
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"] if part != "body") or None
        is_extra = first["type"] == "extra_forbidden"
        message = "Not supported. Leave it out." if is_extra else f"{first['msg']}."
        code = "unsupported_parameter" if is_extra else "invalid_value"
        return Refusal(400, f"{param or 'body'}: {message}", code=code, param=param).response
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}."
        return Refusal(error.status_code, message, code="not_found").response
    # Starlette raises it again, which logs it.
    message = f"The server failed ({type(error).__name__}). See its log."
    return Refusal(500, message, code="internal_error").response


def create_app(
    agents: Mapping[str, Agent],
    budget: Budget,
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    plain_prompts: bool = False,
) -> FastAPI:
    """Create the server, an ASGI application; `mbrl-text serve` runs it with uvicorn.

    Args:
        agents: Agents by the name that clients send as `model`.
        budget: Budget of the search per answer.
        limits: Limits on requests; None for the defaults.
        api_key: Key that clients send, as with OpenAI; None allows everyone.
        plain_prompts: Whether to write chats as plain text, for models without a chat template.

    Raises:
        ServeError: There is no agent.

    Example:
        >>> app = create_app({"adaptive": agent}, Budget(tokens=1024))
        >>> uvicorn.run(app, port=8000)  # doctest: +SKIP
    """
    if not agents:
        raise ServeError("agents: expected at least one, got none.")
    app = FastAPI(title="mbrl-text", docs_url=None, redoc_url=None)
    service = _Service(agents, budget, limits or Limits())
    app.add_middleware(_Door, service=service, api_key=api_key)
    for kind in (Refusal, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _error)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        messages = tuple(each.message() for each in body.messages)
        text = "\n\n".join(message.content for message in messages)
        prompts = _prompts([text if plain_prompts else messages])
        return await _unless_gone(request, service.answer(body, prompts), body)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        return await _unless_gone(request, service.answer(body, _prompts(texts)), body)

    @app.get("/v1/models")
    async def models() -> Any:
        entries = [{"id": name, "object": "model", "owned_by": "mbrl-text"} for name in agents]
        return {"object": "list", "data": [{**entry, "created": 0} for entry in entries]}

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        text = prometheus.generate_latest(service.metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    app.state.service = service
    return app

"""A server in this process, for what a real one cannot be made to do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mbrl_text_env.language_models import embedded_tokenizer


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What is answered: JSON, or text as it is."""

    content: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class FakeServer:
    """Answers with `reply(request)` and keeps what it was sent.

    Attributes:
        requests: All but those for the models.
        most_at_once: Most requests being answered at the same time.
    """

    def __init__(self, reply: Callable[[Request], Reply], models: Any = None) -> None:
        self.reply = reply
        self.models = MODELS if models is None else models
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[FakeServer]:
        thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()

    def bodies(self, path: str = "/v1/completions") -> list[dict[str, Any]]:
        return [request.body for request in self.requests if request.path == path]

    def answer(self, request: Request) -> Reply:
        if request.path == "/v1/models":
            return self.models if isinstance(self.models, Reply) else Reply(self.models)
        with self._lock:
            self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            return self.reply(request)
        finally:
            with self._lock:
                self._now -= 1

    def _handler(server) -> type[BaseHTTPRequestHandler]:  # noqa: N805 `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._respond({})

            def do_POST(self) -> None:
                self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _respond(self, body: dict[str, Any]) -> None:
                reply = server.answer(Request(self.path, dict(self.headers.items()), body))
                text = (
                    reply.content if isinstance(reply.content, str) else json.dumps(reply.content)
                )
                data = text.encode()
                try:
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # The client may have gone.
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def models(engine: str = "vllm", name: str = "team/tiny", **meta: Any) -> dict[str, Any]:
    return {"data": [{"id": name, "owned_by": engine, "max_model_len": 4096, "meta": meta}]}


MODELS = models(n_params=1000)


def sampled_ids(body: dict[str, Any], count: int | None = None, sample: int = 0) -> list[int]:
    """Ordinary tokens that depend on the seed of a sample alone, which is the request's plus k."""
    first = (body.get("seed", 0) + sample) % 1000 + 1000
    return [first + i for i in range(body["max_tokens"] if count is None else count)]


def vllm(request: Request, **changes: Any) -> Reply:
    """A good answer of vLLM's to a request for completions, with `n` samples."""
    given = changes.pop("ids", None)
    samples = [
        given or sampled_ids(request.body, sample=k) for k in range(request.body.get("n", 1))
    ]
    choices = [
        {
            "index": k,
            "text": embedded_tokenizer().decode(ids),
            "token_ids": ids,
            "logprobs": {
                "tokens": [f"token_id:{i}" for i in ids],
                "token_logprobs": [-(i % 7) / 8 for i in ids],
            },
            "finish_reason": "length",
            "stop_reason": None,
            **changes,
        }
        for k, ids in enumerate(samples)
    ]
    usage = {
        "prompt_tokens": len(request.body["prompt"]),
        "completion_tokens": sum(map(len, samples)),
    }
    return Reply({"choices": choices, "usage": usage})

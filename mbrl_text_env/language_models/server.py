"""A language model behind OpenAI-compatible servers (vLLM, SGLang, llama.cpp, TGI).

Token ids are sent, and token ids and log-probabilities are received, if the server supports them.
If a server cannot provide something, the client warns once and lists it in `ServerLM.losses`.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import warnings
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mbrl_text_env.language_models import base
from mbrl_text_env.language_models._engines import Ask, Call, Drawn, Engine, look
from mbrl_text_env.language_models._http import (
    Bill,
    Mode,
    Options,
    ServerConfigError,
    ServerError,
    TransientError,
    Transport,
    gather,
)
from mbrl_text_env.language_models.base import LanguageModel, NextTokens, SampleRequest
from mbrl_text_env.language_models.hf_tokenizer import HFTokenizer, Tokenized
from mbrl_text_env.types import Chunk, Ledger, TextState, Usage, timed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Drawing = tuple[list[Drawn], list[Bill]]
Judged = tuple[tuple[float, ...], list[Bill]]

# llama.cpp takes 32-bit seeds; some are reserved for the samples of one request.
_SEEDS = 2**30
# OpenAI allows up to 128 samples per request.
_MOST_SAMPLES = 128


class ServerLM(Tokenized, LanguageModel):
    """A language model behind one or more OpenAI-compatible servers.

    Samples depend on the server's arithmetic: engines round differently in other batches and after
    cached prefixes. `docs/language_models.md` lists what each engine supports and how it is seeded.
    If a server cannot provide something, the client warns once and lists it in `losses`.

    Requests are retried with exponential backoff after a failed connection and after answers that
    are late, truncated, or a transient error (408, 409, 425, 429 and 5xx, also inside a 200). Other
    servers take over from one that fails. A request counts once, however often it is sent. The API
    key is read from the environment for each request and appears in no message.

    Args:
        base_urls: Addresses of servers of the same model, such as `"http://127.0.0.1:8000"`. Each
            request goes to the server with the fewest requests in flight.
        tokenizer: The model's tokenizer: loaded, a Hub name, or a folder.
        model: The model's name on the servers; by default the only one that they list.
        engine: `"vllm"`, `"sglang"`, `"llamacpp"`, `"tgi"` or `"openai"`. By default it is what the
            servers report, or detected from what they reject.
        name: Name in reports; by default the last part of the model's name.
        mode: `"completions"`, `"chat"`, or `"auto"` for chat only if there are no completions.
        max_concurrency: Maximum number of concurrent requests per server.
        timeout: Maximum seconds for a whole answer.
        max_wait: Maximum seconds to retry while no server answers.
        max_attempts: Maximum number of times to send a request that servers fail to answer.
        api_key_env: Name of the environment variable with the API key, if there is one.
        num_parameters: Number of model parameters, for estimating FLOPs; by default as reported by
            the server (llama.cpp does). If it is unknown, budgets in FLOPs are rejected.
        context_length: Maximum tokens of prompt and response; by default the minimum of what the
            servers and the tokenizer report.
        prefix_cache: Whether the server may reuse prefixes. llama.cpp rounds differently after a
            reused prefix; without reuse and with `max_concurrency=1`, the same call gives the same
            chunks. Other engines have their own switches for this.

    Raises:
        ServerUnavailableError: No server answers.
        ServerError: A server does not report its model, or the servers have different models.

    Example:
        >>> from mbrl_text_env.language_models import ServerLM, embedded_tokenizer
        >>> urls = ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
        >>> lm = ServerLM(urls, tokenizer=embedded_tokenizer())  # doctest: +SKIP
    """

    def __init__(
        self,
        base_urls: str | Sequence[str],
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | HFTokenizer,
        model: str | None = None,
        engine: str | None = None,
        name: str | None = None,
        mode: Mode = "auto",
        max_concurrency: int = 16,
        timeout: float = 300.0,
        max_wait: float = 60.0,
        max_attempts: int = 8,
        api_key_env: str = "OPENAI_API_KEY",
        num_parameters: int | None = None,
        context_length: int | None = None,
        prefix_cache: bool = True,
    ) -> None:
        local = tokenizer if isinstance(tokenizer, HFTokenizer) else HFTokenizer(tokenizer)
        self._options = Options(
            base_urls, local, model, engine, mode, max_concurrency, timeout, max_wait,
            max_attempts, api_key_env, num_parameters, prefix_cache,
        )  # fmt: skip
        self.base_urls, self.model, self._tokenizer = self._options.urls, model, local
        self._engines: dict[str, Engine] = {}
        self._losses: list[str] = []
        self._told = 0
        self._lock = threading.Lock()
        self._transport: Transport | None = None
        try:
            self._run(self._look_at_all())
        except BaseException:
            self.close()
            raise
        found = list(self._engines.values())
        said = [e.num_parameters for e in found if e.num_parameters]
        self.num_parameters = num_parameters or next(iter(said), None)
        self.name = name or _short(model or found[0].model) or "server"
        limits = [e.context_length for e in found if e.context_length]
        self.vocab_size, self.stop_token_ids = local.vocab_size, local.stop_token_ids
        self.context_length = context_length or min([local.context_length, *limits])

    def __repr__(self) -> str:
        return f"ServerLM({self.base_urls!r}, name={self.name!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Connections are not pickled; another process opens its own.
        return {**self.__dict__, "_transport": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def identity(self) -> dict[str, Any]:
        """What distinguishes this model: its names, addresses and tokenizer."""
        return {
            "name": self.name,
            "model": self.model,
            "urls": list(self.base_urls),
            "tokenizer": self._tokenizer.identity(),
        }

    @property
    def counts_flops(self) -> bool:
        """Whether the number of parameters is known."""
        return self.num_parameters is not None

    @property
    def losses(self) -> tuple[str, ...]:
        """Descriptions of what the servers could not provide so far."""
        return tuple(self._losses)

    @property
    def served(self) -> dict[str, int]:
        """Number of requests that each server has answered since the connections were opened."""
        return self._transport.served if self._transport else {}

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        with self._lock:
            transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def sample_requests(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> list[list[Chunk]]:
        """Sample chunks concurrently; see `LanguageModel.sample_requests`.

        Raises:
            ServerError: A server rejects a request, fails, does not answer, or answers invalidly.
        """
        cut = self._fitted(requests, ledgers)
        with timed(ledgers):
            rows = self._run(gather(map(self._draw, cut)))
        return self._settled(requests, rows, ledgers)

    async def sample_requests_async(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> list[list[Chunk]]:
        """Async `sample_requests`, without blocking the event loop or a thread."""
        cut = self._fitted(requests, ledgers)
        began = time.perf_counter()
        try:
            future = self._started().submit(gather(map(self._draw, cut)))
            rows = await asyncio.wrap_future(future)
        finally:
            self._tell()
        for ledger in ledgers or ():
            ledger.charge(Usage(seconds=(time.perf_counter() - began) / len(requests)))
        return self._settled(requests, rows, ledgers)

    def logprobs(
        self,
        states: Sequence[TextState],
        chunks: Sequence[Chunk],
        *,
        ledgers: Sequence[Ledger] | None = None,
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of given chunks; see `LanguageModel.logprobs`.

        Raises:
            UnsupportedByServerError: The server cannot score given tokens.
        """
        base.check_judging_arguments(states, chunks)
        self._check_budgets(ledgers)

        def ask(state: TextState, chunk: Chunk) -> Coroutine[Any, Any, Judged]:
            return self._at_one(lambda e, call: e.judge(call, state, chunk))

        with timed(ledgers):
            judged = self._run(gather(map(ask, states, chunks)))
        self._charge_read(ledgers, states, [len(chunk) - 1 for chunk in chunks], judged)
        return [logprobs for logprobs, _ in judged]

    @property
    def most_next_tokens(self) -> int:
        """The largest k for `next_tokens` that every server supports."""
        return min(engine.most_next_tokens for engine in self._engines.values())

    def next_tokens(
        self, states: Sequence[TextState], k: int, *, ledgers: Sequence[Ledger] | None = None
    ) -> list[NextTokens]:
        """The most probable next tokens; see `LanguageModel.next_tokens`. Generates one token each.

        Raises:
            UnsupportedByServerError: The server does not return them with their ids.
        """
        base.check_next_tokens(states, k, self.most_next_tokens)
        self._check_budgets(ledgers)

        def ask(state: TextState) -> Coroutine[Any, Any, tuple[NextTokens, list[Bill]]]:
            prompt = list(base.prefix_of(state))
            return self._at_one(lambda e, call: e.next_tokens(call, prompt, k))

        with timed(ledgers):
            found = self._run(gather(map(ask, states)))
        self._charge_read(ledgers, states, [0] * len(states), found, new=1)
        return [next_tokens for next_tokens, _ in found]

    def usage_bound(self, prefix_tokens: int, new_tokens: Sequence[int]) -> Usage:
        """2 x parameters for each token of the chunks, and for the prefix of each chunk.

        Attention is not included, because servers do not report the model's shape.
        """
        return self._usage(prefix_tokens * max(1, len(new_tokens)), 0, sum(new_tokens))

    def _usage(self, computed: int, cached: int, new: int) -> Usage:
        return Usage(
            prompt_tokens=computed,
            cached_tokens=cached,
            generated_tokens=new,
            lm_calls=1,
            lm_flops=2.0 * (self.num_parameters or 0) * (computed + new),
        )

    def _charge_read(
        self,
        ledgers: Sequence[Ledger] | None,
        states: Sequence[TextState],
        more: Sequence[int],
        found: Sequence[tuple[Any, list[Bill]]],
        new: int = 0,
    ) -> None:
        """Charge the prefix tokens processed for each state, and `more` tokens after it."""
        usages = []
        for state, beyond, (_, bills) in zip(states, more, found, strict=True):
            length = len(base.prefix_of(state)) + beyond
            computed, _ = _prefix_bill(bills, length, length)
            usages.append(self._usage(computed, length - computed, new))
        base.charge(ledgers, usages)

    def _fitted(
        self, requests: Sequence[SampleRequest], ledgers: Sequence[Ledger] | None
    ) -> list[SampleRequest]:
        base.check_requests(requests)
        self._check_budgets(ledgers)
        rooms = [base.room_after(r.state, self.context_length) for r in requests]
        return [
            replace(r, max_new_tokens=min(r.max_new_tokens, room))
            for r, room in zip(requests, rooms, strict=True)
        ]

    def _check_budgets(self, ledgers: Sequence[Ledger] | None) -> None:
        if not self.counts_flops and any(ledger.budget.flops for ledger in ledgers or ()):
            raise ServerConfigError(
                f"A budget in FLOPs needs the number of parameters of {self.name!r}, which the "
                "server does not report. Pass num_parameters= (--num-parameters), or a budget in "
                "tokens."
            )

    def _settled(
        self,
        requests: Sequence[SampleRequest],
        rows: Sequence[Drawing],
        ledgers: Sequence[Ledger] | None,
    ) -> list[list[Chunk]]:
        usages = []
        for request, (row, bills) in zip(requests, rows, strict=True):
            prefix = len(base.prefix_of(request.state))
            computed, cached = _prefix_bill(bills, prefix, prefix * len(row))
            new = sum(drawn.generated for drawn in row)
            usages.append(self._usage(computed, max(cached, prefix - computed), new))
        base.charge(ledgers, usages)
        return [
            [
                Chunk(
                    tuple(d.ids), tuple(d.logprobs or ()), base.finish_reason(self, r.state, d.ids)
                )
                for d in row
            ]
            for r, (row, _) in zip(requests, rows, strict=True)
        ]

    async def _draw(self, request: SampleRequest) -> Drawing:
        """Sample the chunks of a request, in one server request if it supports several samples."""
        last = request.first_sample + request.num_samples
        # Greedy samples are identical, and vLLM rejects several of them.
        draws_many = all(engine.draws_many for engine in self._engines.values())
        size = _MOST_SAMPLES if draws_many and request.params.temperature else 1
        bills: list[Bill] = []

        async def ask(chunks: list[Drawn], seed: int) -> None:
            question = Ask(request, chunks, seed)
            bills.append(await self._at_one(lambda e, call: e.complete(call, question)))

        async def draw(first: int) -> list[Drawn]:
            chunks = [Drawn() for _ in range(first, min(first + size, last))]
            if size > 1:
                # The engine adds the sample index to the seed: sample k uses the base seed plus k.
                common = base.stream(request.seed, request.state, -1).integers(_SEEDS)
                await ask(chunks, int(common) + first)
            for k, drawn in enumerate(chunks, start=first):
                generator = base.stream(request.seed, request.state, k)
                while not drawn.is_done:
                    await ask([drawn], int(generator.integers(_SEEDS)))
            return chunks

        parts = await gather(draw(first) for first in range(request.first_sample, last, size))
        return [drawn for part in parts for drawn in part], bills

    async def _at_one(self, ask: Callable[[Engine, Call], Awaitable[T]]) -> T:
        transport = self._transport
        if transport is None:
            raise asyncio.CancelledError  # Closed in the meantime.

        async def job(url: str) -> T:
            return await ask(await self._look(url, transport.call), transport.call)

        return await transport.run(job)

    async def _look(self, url: str, call: Call) -> Engine:
        if url in self._engines:
            return self._engines[url]
        engine = await look(call, url, self._options, self._losses)
        ours = _short(engine.model)
        for other in self._engines.values():
            theirs = _short(other.model)
            if self.model is None and None not in (ours, theirs) and ours != theirs:
                raise ServerError(
                    f"{other.url} serves {theirs!r} and {url} serves {ours!r}. All servers must "
                    "serve one model; pass model= if only its names differ."
                )
        return self._engines.setdefault(url, engine)

    async def _look_at_all(self) -> None:
        """Query the models of all available servers, at least one."""

        async def others(engine: Engine, call: Call) -> None:
            for url in self.base_urls:
                with suppress(TransientError):  # Queried when it is available again.
                    await self._look(url, call)

        await self._at_one(others)

    def _tell(self) -> None:
        """Warn about new losses, from the caller's thread."""
        with self._lock:
            new, self._told = self._losses[self._told :], len(self._losses)
        for text in new:
            warnings.warn(text, stacklevel=5)

    def _run(self, job: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop and wait for it; an interrupt cancels it."""
        future = self._started().submit(job)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            self._tell()

    def _started(self) -> Transport:
        with self._lock:
            if self._transport is None or self._transport.pid != os.getpid():
                self._transport = Transport(self._options)
                weakref.finalize(self, self._transport.close)
            return self._transport


def _short(model: str | None) -> str | None:
    return None if model is None else model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def _prefix_bill(bills: Sequence[Bill], once: int, most: int) -> tuple[int, int]:
    """Computed and cached prompt tokens, as billed; `once` if they are not reported."""
    counts = [(bill.prompt, bill.cached or 0) for bill in bills if bill.prompt is not None]
    if not counts or len(counts) < len(bills):
        return once, 0
    # A chunk that was sampled in parts may have had its prefix computed again.
    computed = min(most, sum(prompt - min(prompt, cached) for prompt, cached in counts))
    return computed, sum(min(prompt, cached) for prompt, cached in counts)

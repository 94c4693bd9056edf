"""A client of OpenAI-compatible servers (vLLM, SGLang, llama.cpp, TGI), as a language model.

Token ids go in, token ids and log-probabilities come out, wherever the server can. What a server
cannot give is said once as a warning and kept in `ServerLM.losses`; it is never made up.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from mbrl_text_env.language_models._client import Client, Group, Mode, short_name
from mbrl_text_env.language_models._engines import ENGINES, Bill
from mbrl_text_env.language_models._http import (
    Fleet,
    KeyFromEnvironment,
    LoopThread,
    MalformedAnswerError,
    ServerConfigError,
    ServerError,
    ServerUnavailableError,
    UnsupportedByServerError,
    checked_urls,
    gather,
)
from mbrl_text_env.language_models.base import (
    LanguageModel,
    SampleRequest,
    charge,
    check_judging_arguments,
    check_requests,
    finish_reason,
    prefix_of,
    room_after,
)
from mbrl_text_env.language_models.hf_tokenizer import HFTokenizer, check_room
from mbrl_text_env.types import Chunk, Ledger, Prompt, TextState, Usage, timed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "MalformedAnswerError",
    "ServerConfigError",
    "ServerError",
    "ServerLM",
    "ServerUnavailableError",
    "UnsupportedByServerError",
]

T = TypeVar("T")


class ServerLM(LanguageModel):
    """A language model behind one or more OpenAI-compatible servers.

    Which sample comes is up to the server's arithmetic: engines round differently in different
    batches and after reused prefixes. `docs/language_models.md` says what each engine gives and how
    it is seeded. What a server cannot give is warned of once, and listed in `losses`.

    Requests are retried with growing pauses when a connection fails, and when an answer is late,
    cut off, or an error that may pass (408, 409, 425, 429 and 5xx, also inside a 200). A server
    that fails is left aside while others take over. A request counts once, however often it was
    sent. The API key is read from the environment whenever it is sent, and stands in no message.

    Args:
        base_urls: Addresses of servers of the same model, such as `"http://127.0.0.1:8000"`; each
            request goes to the one with the fewest requests in flight.
        tokenizer: The model's tokenizer: loaded, a name on the Hub, or a folder.
        model: Name that the servers know the model by; by default the only one that they list.
        engine: `"vllm"`, `"sglang"`, `"llamacpp"`, `"tgi"` or `"openai"`; by default what the
            servers say, or found out by what they refuse.
        name: What reports call it; by default the last part of the model's name.
        mode: `"completions"`, `"chat"`, or `"auto"` for chat only where there are no completions.
        max_concurrency: Most requests to one server at a time.
        timeout: Seconds for one whole answer, whatever the server sends meanwhile.
        max_wait: Seconds to go on trying while no server answers.
        max_attempts: Times that a request is sent which the servers fail to answer.
        api_key_env: Name of the environment variable that holds the API key, if there is one.
        num_parameters: Of the model, from which FLOPs are estimated; by default as the server says
            (llama.cpp does). Where it is not known, budgets in FLOPs are refused.
        context_length: Most tokens of prompt and response; by default the least of what servers and
            tokenizer say.
        prefix_cache: Whether the server may reuse prefixes. llama.cpp rounds a reused one
            differently; without reuse and with `max_concurrency=1` the same call gives the same
            chunks. Other engines have their own switches for this.

    Raises:
        ServerUnavailableError: No server answers.
        ServerError: A server refuses to say what it serves, or they serve different models.

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
        self.base_urls = checked_urls(base_urls)
        if mode not in get_args(Mode):
            raise ServerConfigError(f"mode: expected one of {get_args(Mode)}, got {mode!r}.")
        if engine is not None and engine not in ENGINES:
            raise ServerConfigError(f"engine: expected one of {sorted(ENGINES)}, got {engine!r}.")
        if min(max_concurrency, max_attempts, 1 if num_parameters is None else num_parameters) < 1:
            raise ServerConfigError(
                "Expected max_concurrency, max_attempts and num_parameters of at least 1, got "
                f"{max_concurrency}, {max_attempts} and {num_parameters}."
            )
        if not timeout > 0 or not max_wait >= 0:
            raise ServerConfigError(
                f"Expected a timeout above 0 and a max_wait from 0 up, got {timeout}, {max_wait}."
            )
        self.model = model
        self._patience = (max_concurrency, timeout, max_wait, max_attempts)
        local = tokenizer if isinstance(tokenizer, HFTokenizer) else HFTokenizer(tokenizer)
        self._tokenizer, self._key = local, KeyFromEnvironment(api_key_env)
        self._client = Client(self.base_urls, local, model, engine, mode, self._key, prefix_cache)
        self._told = 0
        self._lock = threading.Lock()
        self._running: LoopThread | None = None
        try:
            found = self._run(self._client.describe_all)
        except BaseException:
            self.close()
            raise
        said = [served.num_parameters for served in found if served.num_parameters]
        self.num_parameters = num_parameters or next(iter(said), None)
        self.name = name or short_name(model or found[0].model) or "server"
        limits = [served.context_length for served in found if served.context_length]
        self.vocab_size, self.stop_token_ids = local.vocab_size, local.stop_token_ids
        self.context_length = context_length or min([local.context_length, *limits])

    def __repr__(self) -> str:
        return f"ServerLM({self.base_urls!r}, name={self.name!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ServerLM:
        # A shared client: environments and agents that are copied go on using this one.
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Connections stay behind; another process makes its own.
        return {**self.__dict__, "_running": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def identity(self) -> dict[str, Any]:
        """What tells this model from others: its names, addresses and tokenizer."""
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
        """What the servers could not give so far, in words."""
        return tuple(self._client.losses)

    @property
    def served(self) -> dict[str, int]:
        """Requests that each server has answered since the connections were made."""
        return self._client.fleet.served if self._running else {}

    def close(self) -> None:
        """Close the connections; the next call makes new ones."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            running.close()

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt; see `HFTokenizer.encode_prompt`."""
        ids = self._tokenizer.encode_prompt(prompt)
        check_room(prompt, len(ids), self.context_length)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._tokenizer.decode(token_ids)

    def sample_requests(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> list[list[Chunk]]:
        """Draw chunks, all at once; see `LanguageModel.sample_requests`.

        Raises:
            ServerError: A server refuses, fails, does not answer, or answers what it should not.
        """
        cut = self._fitted(requests, ledgers)
        with timed(ledgers):
            groups = self._run(lambda: gather(map(self._client.draw, cut)))
        return self._settled(requests, groups, ledgers)

    async def sample_requests_async(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> list[list[Chunk]]:
        """See `sample_requests`; other coroutines go on meanwhile, and no thread waits."""
        cut = self._fitted(requests, ledgers)
        began = time.perf_counter()
        try:
            future = self._started().submit(gather(map(self._client.draw, cut)))
            groups = await asyncio.wrap_future(future)
        finally:
            self._tell()
        for ledger in ledgers or ():
            ledger.charge(Usage(seconds=(time.perf_counter() - began) / len(requests)))
        return self._settled(requests, groups, ledgers)

    def logprobs(
        self,
        states: Sequence[TextState],
        chunks: Sequence[Chunk],
        *,
        ledgers: Sequence[Ledger] | None = None,
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of given chunks; see `LanguageModel.logprobs`.

        Raises:
            UnsupportedByServerError: The server cannot judge given tokens.
        """
        check_judging_arguments(states, chunks)
        self._check_budgets(ledgers)
        pairs = list(zip(states, chunks, strict=True))
        with timed(ledgers):
            judged = self._run(lambda: gather(self._client.judge(s, c) for s, c in pairs))
        lengths = [len(prefix_of(state)) + len(chunk) - 1 for state, chunk in pairs]
        computed = [_prefix_bill(b, n, n)[0] for (_, b), n in zip(judged, lengths, strict=True)]
        rows = zip(computed, lengths, strict=True)
        charge(ledgers, (self._usage(new, length - new, 0) for new, length in rows))
        return [logprobs for logprobs, _ in judged]

    def usage_bound(self, prefix_tokens: int, new_tokens: Sequence[int]) -> Usage:
        """2 x parameters for each token of the chunks, and of the prefix for each of them.

        Attention is left out, since servers do not say what their models look like.
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

    def _fitted(
        self, requests: Sequence[SampleRequest], ledgers: Sequence[Ledger] | None
    ) -> list[SampleRequest]:
        """The requests, as long as the context allows; checked."""
        check_requests(requests)
        self._check_budgets(ledgers)
        rooms = [room_after(r.state, self.context_length) for r in requests]
        return [
            replace(r, max_new_tokens=min(r.max_new_tokens, room))
            for r, room in zip(requests, rooms, strict=True)
        ]

    def _check_budgets(self, ledgers: Sequence[Ledger] | None) -> None:
        if not self.counts_flops and any(ledger.budget.flops for ledger in ledgers or ()):
            raise ServerConfigError(
                f"A budget in FLOPs needs the number of parameters of {self.name!r}, which the "
                "server does not say. Pass num_parameters= (--num-parameters), or a budget in "
                "tokens."
            )

    def _settled(
        self,
        requests: Sequence[SampleRequest],
        groups: Sequence[Sequence[Group]],
        ledgers: Sequence[Ledger] | None,
    ) -> list[list[Chunk]]:
        """The chunks of all requests, charged to their ledgers."""
        rows, usages = [], []
        for request, row in zip(requests, groups, strict=True):
            drawn = [chunk for group in row for chunk in group.chunks]
            bills = [bill for group in row for bill in group.bills]
            prefix = len(prefix_of(request.state))
            computed, cached = _prefix_bill(bills, prefix, prefix * len(drawn))
            new = sum(chunk.generated for chunk in drawn)
            usages.append(self._usage(computed, max(cached, prefix - computed), new))
            reasons = [finish_reason(self, request.state, chunk.ids) for chunk in drawn]
            rows.append(
                [
                    Chunk(tuple(chunk.ids), tuple(chunk.logprobs or ()), reason)
                    for chunk, reason in zip(drawn, reasons, strict=True)
                ]
            )
        charge(ledgers, usages)
        return rows

    def _tell(self) -> None:
        """Warn of new losses, from the caller's thread."""
        with self._lock:
            new, self._told = self._client.losses[self._told :], len(self._client.losses)
        for text in new:
            warnings.warn(text, stacklevel=5)

    def _run(self, job: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine in the event loop and wait for it; an interrupt cancels it."""
        future = self._started().submit(job())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            self._tell()

    def _started(self) -> LoopThread:
        with self._lock:
            if self._running is None or self._running.pid != os.getpid():
                fleet = Fleet(self.base_urls, self._key, *self._patience)
                self._client.fleet = fleet
                self._running = LoopThread(fleet.close)
                weakref.finalize(self, self._running.close)
            return self._running


def _prefix_bill(bills: Sequence[Bill], once: int, most: int) -> tuple[int, int]:
    """Prompt tokens that were computed and cached, as billed; `once` where that is not said."""
    counts = [(bill.prompt, bill.cached or 0) for bill in bills if bill.prompt is not None]
    if not counts or len(counts) < len(bills):
        return once, 0
    # A chunk that was sampled in parts may have had its prefix computed again.
    computed = min(most, sum(prompt - min(prompt, cached) for prompt, cached in counts))
    return computed, sum(min(prompt, cached) for prompt, cached in counts)

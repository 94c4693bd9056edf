"""A client of OpenAI-compatible servers (vLLM, SGLang, llama.cpp, TGI), as a language model.

Token ids go in, token ids and log-probabilities come out, wherever the server can. What a server
cannot give is said once as a warning and kept in `ServerLM.losses`; it is never made up.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mbrl_text_env.language_models._answers import Served
from mbrl_text_env.language_models._client import Client, Drawn, Mode, Task, prefix_of, short_name
from mbrl_text_env.language_models._http import (
    Fleet,
    KeyFromEnvironment,
    LoopThread,
    MalformedAnswerError,
    Patience,
    ServerConfigError,
    ServerError,
    ServerUnavailableError,
    UnsupportedByServerError,
    checked_url,
    gather,
)
from mbrl_text_env.language_models.base import (
    PromptTooLongError,
    RequestSampler,
    SampleRequest,
    check_sample_arguments,
    check_unfinished,
    stream,
)
from mbrl_text_env.language_models.hf_tokenizer import HFTokenizer, check_room
from mbrl_text_env.ledger import Ledger, Usage, timed
from mbrl_text_env.types import Chunk, FinishReason, Prompt, TextState

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


class ServerLM(RequestSampler):
    """A language model behind one or more OpenAI-compatible servers.

    Each chunk is one request with a seed of its own, so it does not depend on the batch around it
    beyond what the server's arithmetic makes of it: engines round differently in different batches
    and after reused prefixes, and the same call may then sample other tokens (see `prefix_cache`).

    What the engines give:

    - vLLM: token ids and log-probabilities, in and out; `logprobs` of given chunks. Leave its
      `--logprobs-mode` at raw log-probabilities.
    - llama.cpp: token ids and log-probabilities, in and out; `logprobs` of given chunks with one
      request a token.
    - SGLang: token ids in and out, through its own `/generate`. Log-probabilities of samples at
      temperatures other than 0 and 1 are those after the temperature and are left out. Seeds count
      only where it was started with `--enable-deterministic-inference`.
    - Others: what their answers contain. Without token ids, text is encoded anew; a prompt of token
      ids that is refused is sent as text (TGI); parameters beyond OpenAI's that are refused are
      left out, and then the server's own sampling defaults apply.
    - Chat (`mode="chat"`, or a server without completions, such as a hosted API): the server
      applies its own template, the prompt has to be a chat, a response is continued through an
      assistant message where the engine is known to do that (its text is encoded anew), and
      `logprobs` of given chunks are refused.

    Every loss is warned of once, and listed in `losses`.

    Requests are retried with growing pauses when a connection fails, and when an answer is late,
    cut off, or an error that may pass (408, 409, 425, 429 and 5xx, also inside a 200). A server
    that fails is left aside while others take over. A request counts once, however often it was
    sent. The API key is read from the environment whenever it is sent, and stands in no message.

    Args:
        base_urls: Addresses of servers of the same model, such as `"http://127.0.0.1:8000"`; each
            request goes to the one with the fewest requests in flight.
        tokenizer: The model's tokenizer: loaded, a name on the Hub, or a folder.
        model: Name that the servers know the model by; by default the only one that they list.
        name: What reports call it; by default the last part of the model's name.
        mode: `"completions"`, `"chat"`, or `"auto"` for chat only where there are no completions.
        max_concurrency: Most requests to one server at a time.
        timeout: Seconds for one whole answer, whatever the server sends meanwhile.
        max_wait: Seconds to go on trying while no server answers.
        max_attempts: Times that a request is sent which the servers fail to answer.
        api_key_env: Name of the environment variable that holds the API key, if there is one.
        num_parameters: Of the model; FLOPs are estimated from it. By default as the server says
            (llama.cpp does).
        context_length: Most tokens of prompt and response; by default the least of what servers and
            tokenizer say.
        prefix_cache: Whether the server may reuse prefixes that it computed before. llama.cpp
            rounds a reused prefix differently; without reuse and with `max_concurrency=1` the same
            call gives the same chunks, but every prefix is computed anew. Other engines have their
            own switches for this.

    Raises:
        ServerUnavailableError: No server answers.
        ServerError: A server refuses to say what it serves, or they serve different models.
        ServerConfigError: An option is outside its range, or the number of parameters is not known.

    Example:
        >>> from mbrl_text_env.language_models import ServerLM, embedded_tokenizer
        >>> lm = ServerLM(  # doctest: +SKIP
        ...     ["http://127.0.0.1:8000", "http://127.0.0.1:8001"], tokenizer=embedded_tokenizer()
        ... )
    """

    def __init__(
        self,
        base_urls: str | Sequence[str],
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | HFTokenizer,
        model: str | None = None,
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
        self.base_urls = _checked_urls(base_urls)
        _check_options(mode, max_concurrency, timeout, max_wait, max_attempts)
        self.model = model
        self.mode = mode
        self.max_concurrency = max_concurrency
        self._patience = Patience(timeout, max_wait, max_attempts)
        self._key = KeyFromEnvironment(api_key_env)
        self._tokenizer = (
            tokenizer if isinstance(tokenizer, HFTokenizer) else HFTokenizer(tokenizer)
        )
        self._client = Client(self.base_urls, self._tokenizer, model, mode, self._key, prefix_cache)
        self._told = 0
        self._lock = threading.Lock()
        self._running: tuple[LoopThread, Fleet] | None = None
        try:
            found = self._run(self._client.describe_all)
            self.num_parameters = _parameters(num_parameters, found)
        except BaseException:
            self.close()
            raise
        self.name = name or short_name(model or found[0].model) or "server"
        limits = [served.context_length for served in found if served.context_length]
        self.vocab_size = self._tokenizer.vocab_size
        self.stop_token_ids = self._tokenizer.stop_token_ids
        self.context_length = context_length or min([self._tokenizer.context_length, *limits])

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
    def losses(self) -> tuple[str, ...]:
        """What the servers could not give so far, in words."""
        return tuple(self._client.losses)

    @property
    def served(self) -> dict[str, int]:
        """Requests that each server has answered since the connections were made."""
        running = self._running
        return {e.url: e.served for e in running[1].endpoints} if running else {}

    def close(self) -> None:
        """Close the connections; the next call makes new ones."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            running[0].close(running[1].close)

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
        """Draw chunks, all at once; see `RequestSampler.sample_requests`.

        Raises:
            ValueError: See `LanguageModel.sample`.
            ServerError: A server refuses, fails, or answers what it should not.
            ServerUnavailableError: No server answers.
        """
        for r in requests:
            check_sample_arguments([r.state], r.num_samples, r.max_new_tokens, [r.seed])
        tasks = [
            [self._task(r, r.first_sample + k) for k in range(r.num_samples)] for r in requests
        ]
        with timed(ledgers):
            flat = [task for row in tasks for task in row]
            found = iter(self._run(lambda fleet: gather(self._client.draw(fleet, t) for t in flat)))
            rows = [[next(found) for _ in row] for row in tasks]
        for request, row, ledger in zip(requests, rows, ledgers or (), strict=ledgers is not None):
            ledger.charge(self._spent(len(prefix_of(request.state)), row))
        return [
            [self._chunk(request.state, drawn) for drawn in row]
            for request, row in zip(requests, rows, strict=True)
        ]

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
            ServerError: See `sample_requests`.
        """
        check_unfinished(states)
        if len(chunks) != len(states):
            raise ValueError(f"Expected one chunk a state ({len(states)}), got {len(chunks)}.")
        pairs = list(zip(states, chunks, strict=True))
        with timed(ledgers):
            judged = self._run(
                lambda fleet: gather(self._client.judge(fleet, s, c) for s, c in pairs)
            )
        for (state, chunk), drawn, ledger in zip(
            pairs, judged, ledgers or (), strict=ledgers is not None
        ):
            length = len(prefix_of(state)) + len(chunk) - 1
            computed = length if drawn.computed is None else min(drawn.computed, length)
            ledger.charge(self._usage(computed, length - computed, 0))
        return [tuple(drawn.logprobs or ()) for drawn in judged]

    def usage(self, prefix_tokens: int, new_tokens: Sequence[int]) -> Usage:
        """2 x parameters for each token of the prefix and of the chunks.

        Attention is left out, since servers do not say what their models look like. A server need
        not share a prefix among the samples of a state; then each of them computes it.

        Args:
            prefix_tokens: Tokens of the state's prompt and response, none of them cached.
            new_tokens: Length of each chunk sampled after it.
        """
        return self._usage(prefix_tokens * max(1, len(new_tokens)), 0, sum(new_tokens))

    def _usage(self, computed: int, cached: int, new: int) -> Usage:
        return Usage(
            prompt_tokens=computed,
            cached_tokens=cached,
            generated_tokens=new,
            lm_calls=1,
            lm_flops=2.0 * self.num_parameters * (computed + new),
        )

    def _spent(self, prefix: int, row: Sequence[Drawn]) -> Usage:
        """What a state's chunks took; its prefix counts once where the server does not say."""
        new = sum(drawn.generated for drawn in row)
        counts = [drawn.computed for drawn in row if drawn.computed is not None]
        if len(counts) < len(row):
            return self._usage(prefix, 0, new)
        # A chunk that was sampled in parts may have had its prefix computed again.
        computed = min(sum(counts), prefix * len(row))
        return self._usage(computed, max(sum(d.cached for d in row), prefix - computed), new)

    def _task(self, request: SampleRequest, k: int) -> Task:
        prefix = len(prefix_of(request.state))
        room = self.context_length - prefix
        if room < 1:
            raise PromptTooLongError(
                f"Prompt {request.state.prompt.id!r} and its response have {prefix} tokens and "
                f"fill the model's context of {self.context_length}."
            )
        generator = stream(request.seed, request.state, k)
        return Task(request.state, min(request.max_new_tokens, room), request.params, generator)

    def _chunk(self, state: TextState, drawn: Drawn) -> Chunk:
        reason: FinishReason | None = None
        if drawn.ids[-1] in self.stop_token_ids:
            reason = "stop"
        elif len(prefix_of(state)) + len(drawn.ids) >= self.context_length:
            reason = "length"
        return Chunk(tuple(drawn.ids), tuple(drawn.logprobs or ()), reason)

    def _tell(self) -> None:
        """Warn of new losses, from the caller's thread."""
        with self._lock:
            new, self._told = self._client.losses[self._told :], len(self._client.losses)
        for text in new:
            warnings.warn(text, stacklevel=5)

    def _run(self, job: Callable[[Fleet], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine of the event loop's and wait for it."""
        with self._lock:
            if self._running is None or self._running[0].pid != os.getpid():
                self._running = self._start()
            loop, fleet = self._running
        try:
            return loop.run(job(fleet))
        finally:
            self._tell()

    def _start(self) -> tuple[LoopThread, Fleet]:
        loop = LoopThread("ServerLM")
        fleet = Fleet(self.base_urls, self.max_concurrency, self._patience, self._key)
        weakref.finalize(self, loop.close, fleet.close)
        return loop, fleet


def _checked_urls(base_urls: str | Sequence[str]) -> list[str]:
    urls = [checked_url(u) for u in ([base_urls] if isinstance(base_urls, str) else base_urls)]
    if not urls or len(set(urls)) < len(urls):
        raise ServerConfigError(f"base_urls: expected one or more different addresses, got {urls}.")
    return urls


def _check_options(
    mode: str, max_concurrency: int, timeout: float, max_wait: float, max_attempts: int
) -> None:
    if mode not in {"auto", "completions", "chat"}:
        raise ServerConfigError(f"mode: expected 'auto', 'completions' or 'chat', got {mode!r}.")
    for name, value in (("max_concurrency", max_concurrency), ("max_attempts", max_attempts)):
        if value < 1:
            raise ServerConfigError(f"{name}: expected at least 1, got {value}.")
    if not timeout > 0 or not max_wait >= 0:
        raise ServerConfigError(
            f"Expected a timeout above 0 and a max_wait from 0 up, got {timeout} and {max_wait}."
        )


def _parameters(given: int | None, found: Sequence[Served]) -> int:
    number = given or next((s.num_parameters for s in found if s.num_parameters), None)
    if number is None or number < 1:
        raise ServerConfigError(
            "The server does not say how many parameters its model has, and the FLOPs that a "
            f"ledger counts follow from it: pass num_parameters=, at least 1 (got {given!r})."
        )
    return number

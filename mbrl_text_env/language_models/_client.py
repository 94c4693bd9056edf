"""What a server is asked for, and what its answers mean; runs on the event loop of `server`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mbrl_text_env.language_models import _engines
from mbrl_text_env.language_models._engines import (
    CHATS,
    COMPLETIONS,
    DIALECTS,
    SGLANG,
    Answer,
    Bill,
    Dialect,
    Served,
)
from mbrl_text_env.language_models._http import (
    Fleet,
    KeyFromEnvironment,
    MalformedAnswerError,
    RefusedError,
    ServerError,
    TransientError,
    UnsupportedByServerError,
    gather,
)
from mbrl_text_env.language_models.base import SampleRequest, has_stop_text, prefix_of, stream
from mbrl_text_env.language_models.hf_tokenizer import HFTokenizer
from mbrl_text_env.types import Chunk, Prompt, TextState

T = TypeVar("T")
Mode = Literal["auto", "completions", "chat"]
Judged = tuple[tuple[float, ...], list[Bill]]

# llama.cpp takes 32 bits; room is left for the samples of one request.
_SEEDS = 2**30
# OpenAI draws up to 128 samples at once.
_MOST_SAMPLES = 128
_MALFORMED = (ValueError, TypeError, AttributeError, IndexError, KeyError)
_NO_ROUTE = frozenset({404, 405})
_BAD_REQUEST = frozenset({400, 422})


@dataclass
class Drawn:
    """A chunk as far as it has come; `generated` counts tokens after a stop string too."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = field(default_factory=list)
    generated: int = 0
    is_done: bool = False


@dataclass
class Group:
    """Chunks of one state that are drawn by the same requests, and what those were billed."""

    chunks: list[Drawn]
    bills: list[Bill] = field(default_factory=list)


@dataclass
class Client:
    """Asks servers for tokens, and remembers what each of them can and could not give (`losses`).

    For its arguments see `server.ServerLM`.
    """

    urls: Sequence[str]
    tokenizer: HFTokenizer
    model: str | None
    engine: str | None
    mode: Mode
    key: KeyFromEnvironment
    prefix_cache: bool
    losses: list[str] = field(default_factory=list)
    fleet: Fleet = field(init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "fleet"}

    def __post_init__(self) -> None:
        self.stops = sorted(self.tokenizer.stop_token_ids)
        self.servers = {url: _Server(url, self) for url in self.urls}

    async def draw(self, request: SampleRequest) -> list[Group]:
        """The chunks of a request: in one request where the servers draw several samples."""
        first, last = request.first_sample, request.first_sample + request.num_samples
        engines = [server.served.how for server in self.servers.values() if server.served]
        # Greedy samples are all alike, and vLLM refuses to draw several.
        is_many = request.params.temperature and all(engine.draws_many for engine in engines)
        size = _MOST_SAMPLES if is_many else 1
        parts = (range(k, min(k + size, last)) for k in range(first, last, size))
        return await gather(self._draw_group(request, part, size > 1) for part in parts)

    async def _draw_group(self, request: SampleRequest, samples: range, seeded: bool) -> Group:
        group = Group([Drawn() for _ in samples])
        if seeded:
            # The engine adds the sample's place: sample k has the seed of all plus k.
            common = stream(request.seed, request.state, -1).integers(_SEEDS)
            await self._extend(request, group, group.chunks, int(common) + samples.start)
        for drawn, k in zip(group.chunks, samples, strict=True):
            generator = stream(request.seed, request.state, k)
            while not drawn.is_done:
                seed = int(generator.integers(_SEEDS))
                await self._extend(request, group, [drawn], seed)
        return group

    async def _extend(
        self, request: SampleRequest, group: Group, chunks: list[Drawn], seed: int
    ) -> None:
        """Ask once for what follows; several chunks are at their beginning."""
        ids, count = chunks[0].ids, len(chunks)
        limit = request.max_new_tokens - len(ids)

        async def job(url: str) -> tuple[_Server, list[Answer], Bill]:
            server = self.servers[url]
            data = await server.complete(request, ids, limit, seed, count)
            return server, *server.read(lambda: _engines.read_answers(data, count))

        server, answers, bill = await self.fleet.run(job)
        for drawn, answer in zip(chunks, answers, strict=True):
            server.add(drawn, answer, request, limit, bill if count == 1 else Bill())
        group.bills.append(bill)

    async def judge(self, state: TextState, chunk: Chunk) -> Judged:
        """The log-probabilities of a given chunk, and what was billed."""
        return await self.fleet.run(lambda url: self.servers[url].judge(state, chunk))

    async def describe_all(self) -> list[Served]:
        """What the servers say that are there, at least one."""
        found = [await self.fleet.run(lambda url: self.servers[url].describe())]
        for server in self.servers.values():
            if server.served is None:
                try:
                    found.append(await server.describe())
                except TransientError:
                    continue  # It is asked when it is back.
        return found


@dataclass
class _Server:
    """One of the servers, and what was learned of it: its model, whether it has chats alone, its
    dialect, and whether its text was compared with the local tokenizer's.
    """

    url: str
    client: Client
    served: Served | None = None
    is_chat: bool = False
    dialect: int | None = None
    is_compared: bool = False

    async def describe(self) -> Served:
        """What it says about its model; asked once."""
        if self.served is not None:
            return self.served
        model, engine, path = self.client.model, self.client.engine, "/v1/models"
        served = Served(model, engine or "")
        try:
            data = await self.client.fleet.call(self.url, "GET", path)
            served = self.read(lambda: _engines.read_served(data, model, engine), path)
        except RefusedError as error:
            if error.status not in _NO_ROUTE:
                raise
        for other in self.client.servers.values():
            ours = short_name(served.model)
            theirs = short_name(other.served.model) if other.served else None
            if model is None and None not in (ours, theirs) and ours != theirs:
                raise ServerError(
                    f"{other.url} serves {theirs!r} and {self.url} serves {ours!r}. A fleet has to "
                    "serve one model; pass model= if they only call it differently."
                )
        self.served = served
        return served

    async def complete(
        self,
        request: SampleRequest,
        ids: Sequence[int],
        limit: int,
        seed: int,
        count: int,
    ) -> Any:
        """What it answers when asked for up to `limit` tokens after `ids`."""
        served, params, client = await self.describe(), request.params, self.client
        prompt = [*prefix_of(request.state), *ids]

        def body(path: str, dialect: Dialect) -> dict[str, Any]:
            if path == SGLANG:
                kept = seed if dialect.extras else None
                return _engines.sglang_body(prompt, limit, params, client.stops, kept)
            shared = _engines.completion_body(
                served, dialect, params, client.stops, client.prefix_cache
            ) | {"max_tokens": limit, "seed": seed}
            if params.top_k and "top_k" not in shared:
                raise UnsupportedByServerError(
                    f"{self.url} refuses parameters beyond OpenAI's, so it cannot sample with "
                    f"top_k={params.top_k}. Use top_k=0, or another server."
                )
            if count > 1:
                shared["n"] = count
            if path == COMPLETIONS:
                shared["prompt"] = prompt if dialect.ids else self._whole_text(prompt)
                return shared | ({"logprobs": 1} if dialect.logprobs else {})
            shared |= self._chat(served, request.state, ids)
            return shared | ({"logprobs": True, "top_logprobs": 1} if dialect.logprobs else {})

        if served.engine == "sglang" and not (client.mode == "chat" or self.is_chat):
            self._lose(
                f"{self.url} is SGLang: seeds count only where it was started with "
                "--enable-deterministic-inference."
            )
            return await self._adapt(SGLANG, body)
        if client.mode != "chat" and not self.is_chat:
            try:
                return await self._adapt(COMPLETIONS, body)
            except RefusedError as error:
                # An unknown model is a 404 too, and no reason to talk differently.
                missing = error.status in _NO_ROUTE and "model" not in error.reason.lower()
                if client.mode != "auto" or not missing:
                    raise
            self.is_chat = True
        return await self._adapt(CHATS, body)

    def _chat(self, served: Served, state: TextState, ids: Sequence[int]) -> dict[str, Any]:
        """A chat's messages; a response that has begun is a message to go on with."""
        self._lose(
            f"{self.url} is asked for chats: it applies its own template, and the tokens of a "
            "response that is continued are those that it makes of the text."
        )
        messages = _messages(state.prompt, self.url)
        text = self.client.tokenizer.decode([*state.response_ids, *ids])
        if not text:
            return {"messages": messages}
        if not served.how.continues:
            raise UnsupportedByServerError(
                f"{self.url} is asked for chats and is not known to continue a response (engine "
                f"{served.engine!r}). Use an agent that samples whole responses (best-of-n), or a "
                "server with /v1/completions."
            )
        messages.append({"role": "assistant", "content": text})
        going_on = {"continue_final_message": True, "add_generation_prompt": False}
        return {"messages": messages, **going_on}

    async def _adapt(self, path: str, body: Callable[[str, Dialect], dict[str, Any]]) -> Any:
        """The answer in the first dialect that is not refused, from then on in it."""
        served = await self.describe()
        last = {SGLANG: 2, CHATS: 3}.get(path, len(DIALECTS))
        first = min(served.how.first, last - 1)
        refusal: RefusedError | None = None
        for number in range(first, last) if self.dialect is None else [self.dialect]:
            dialect = DIALECTS[number]
            try:
                data = await self.client.fleet.call(self.url, "POST", path, body(path, dialect))
            except RefusedError as error:
                refusal = refusal or error
                if error.status not in _BAD_REQUEST:
                    raise
                continue
            self.dialect = number
            if not dialect.extras and path != SGLANG:
                self._lose(
                    f"{self.url} refuses parameters beyond OpenAI's: its own sampling defaults "
                    "apply (top-k, min-p, penalties), and token ids cannot be asked for."
                )
            if not dialect.ids:
                self._lose(f"{self.url} takes no token ids: prompts are sent as text.")
            return data
        assert refusal is not None
        raise refusal

    def add(
        self, drawn: Drawn, answer: Answer, request: SampleRequest, limit: int, bill: Bill
    ) -> None:
        """Add what was sampled to a chunk."""
        ids, logprobs = self._tokens(answer, limit)
        # SGLang's log-probabilities are those after the temperature.
        is_sglang = self.served is not None and self.served.engine == "sglang"
        if logprobs is None or (is_sglang and request.params.temperature not in (0.0, 1.0)):
            logprobs = None
            self._lose(
                f"{self.url} does not give the model's own log-probabilities: they are left out."
            )
        drawn.generated += len(ids)
        kept, is_done = self._cut(drawn.ids, ids, request)
        ids, logprobs = ids[:kept], None if logprobs is None else logprobs[:kept]
        if not is_done and len(ids) < limit:
            extra, is_done = self._after_early_end(answer, ids, bill)
            ids, drawn.generated = [*ids, *extra], drawn.generated + len(extra)
            if extra and logprobs is not None:
                logprobs = None
                self._lose(
                    f"{self.url} gives no log-probability of the token that ends a response: "
                    "chunks with such a token have none."
                )
        if drawn.logprobs is not None:
            drawn.logprobs = None if logprobs is None else [*drawn.logprobs, *logprobs]
        drawn.ids += ids
        drawn.is_done = is_done or len(drawn.ids) >= request.max_new_tokens
        if not ids:
            raise MalformedAnswerError(f"{self.url}: expected at least one token, got none.")

    def _tokens(self, answer: Answer, limit: int) -> tuple[list[int], list[float] | None]:
        """The sampled ids, and their log-probabilities where those are known."""
        tokenizer = self.client.tokenizer
        if answer.token_ids is None:
            self._lose(
                f"{self.url} gives no token ids: its text is encoded anew, and the tokens may "
                "differ from those that were sampled."
            )
            return tokenizer.encode_text(answer.text)[:limit], None
        ids = list(answer.token_ids)
        if len(ids) > limit or not all(i < tokenizer.vocab_size for i in ids):
            raise MalformedAnswerError(
                f"{self.url}: expected at most {limit} token ids below {tokenizer.vocab_size}, "
                f"got {ids}. Is the tokenizer that of the server's model?"
            )
        theirs, ours = answer.text.strip(), tokenizer.decode(ids).strip()
        # A character whose bytes are not all there yet is shown differently.
        if not self.is_compared and theirs and "\ufffd" not in theirs + ours:
            self.is_compared = True
            # A chat's answer may begin with the message that it continues.
            if ours not in theirs:
                self._lose(
                    f"{self.url} reads its tokens as {theirs[:80]!r}, and the tokenizer as "
                    f"{ours[:80]!r}: it does not seem to be that of the server's model."
                )
        return ids, None if answer.logprobs is None else list(answer.logprobs)

    def _cut(
        self, before: Sequence[int], ids: Sequence[int], request: SampleRequest
    ) -> tuple[int, bool]:
        """How many ids are left after the first stop, and whether there was one."""
        for i, token in enumerate(ids, start=1):
            chunk = [*before, *ids[:i]]
            is_stop = token in self.client.stops
            if is_stop or has_stop_text(self.client.tokenizer, chunk, request.params):
                return i, True
        return len(ids), False

    def _after_early_end(
        self, answer: Answer, ids: Sequence[int], bill: Bill
    ) -> tuple[list[int], bool]:
        """What has to be added to fewer tokens than were asked for, and whether that is the end."""
        stops = self.client.stops
        if answer.reason != "stop":
            if answer.token_ids is None and ids:
                return [], True  # Encoded anew, they may be fewer than were sampled.
            raise ServerError(
                f"{self.url} ended after {len(ids)} tokens (finish_reason {answer.reason!r}) "
                "without a stop token. If its context is shorter than the model's, pass "
                "context_length=; a cap on tokens has to be lifted."
            )
        if isinstance(answer.matched, int):
            is_listed = bool(ids) and ids[-1] == answer.matched
            return [] if is_listed else [answer.matched], answer.matched in stops
        # A token of the server's that ends no response here: the chunk goes on after it.
        if answer.token_ids is not None and ids and bill.generated == len(ids):
            return [], False
        if not stops:
            raise ServerError(
                f"{self.url} ended a response, but the tokenizer has no stop token. Pass "
                "HFTokenizer(..., stop_token_ids=[...])."
            )
        eos = self.client.tokenizer.tokenizer.eos_token_id
        return [eos if eos in stops else stops[0]], True

    async def judge(self, state: TextState, chunk: Chunk) -> Judged:
        """The log-probabilities of a given chunk, and what was billed."""
        served, ids = await self.describe(), chunk.token_ids
        prompt = [*prefix_of(state), *ids]
        if self.client.mode == "chat" or self.is_chat:
            raise self._cannot_judge("it is asked for chats")
        if served.how.judging == "forced":
            return await self._judge_by_forcing(served, prompt, len(ids))
        path, body = _engines.judging_body(served, prompt, len(ids))
        try:
            data = await self.client.fleet.call(self.url, "POST", path, body)
        except RefusedError as error:
            raise self._cannot_judge(error.reason) from error
        found = self.read(lambda: _engines.read_judged(served, data, len(prompt), ids), path)
        if found is None:
            raise self._cannot_judge("it does not echo a prompt with its log-probabilities")
        return found, []

    async def _judge_by_forcing(self, served: Served, prompt: list[int], count: int) -> Judged:
        """One request for each of the last tokens, in which that token is forced.

        llama.cpp gives no log-probabilities of a prompt, but those of a sampled token before any
        bias. Its cache makes each request a pass over one token.
        """
        found: list[float] = []
        bills = []
        start = len(prompt) - count
        for i in range(start, len(prompt)):
            token = prompt[i]
            # From the second token on it is this request's own prefix that is reused.
            reuses = self.client.prefix_cache or i > start
            body = _engines.forcing_body(served, prompt[:i], token, reuses)
            data = await self.client.fleet.call(self.url, "POST", COMPLETIONS, body)
            [answer], bill = self.read(functools.partial(_engines.read_answers, data))
            if answer.token_ids != (token,) or answer.logprobs is None:
                raise MalformedAnswerError(
                    f"{self.url}: expected token {token}, which was forced, with its "
                    f"log-probability; got {answer.token_ids} and {answer.logprobs}."
                )
            found += answer.logprobs
            bills.append(bill)
        return tuple(found), bills

    def read(self, read: Callable[[], T], path: str = COMPLETIONS) -> T:
        """What a reader makes of an answer, its errors told as the server's."""
        try:
            return read()
        except _engines.AbortedError as error:
            raise TransientError(str(error), is_counted=True) from None
        except _MALFORMED as error:
            reason = self.client.key.scrub(f"{type(error).__name__}: {error}")
            raise MalformedAnswerError(f"{self.url}{path}: {reason}.") from None

    def _whole_text(self, ids: Sequence[int]) -> str:
        """Text with its special tokens, for servers that take no ids."""
        text: str = self.client.tokenizer.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _cannot_judge(self, reason: str) -> UnsupportedByServerError:
        return UnsupportedByServerError(
            f"{self.url} cannot give the log-probabilities of given tokens ({reason}). Use vLLM, "
            "SGLang or llama.cpp, or an agent that does without."
        )

    def _lose(self, text: str) -> None:
        if text not in self.client.losses:
            self.client.losses.append(text)


def _messages(prompt: Prompt, url: str) -> list[dict[str, str]]:
    if isinstance(prompt.content, str):
        raise UnsupportedByServerError(
            f"{url} is asked for chats, and prompt {prompt.id!r} is plain text. Load prompts as "
            "chats, or use a server with /v1/completions."
        )
    return [{"role": m.role, "content": m.content} for m in prompt.content]


def short_name(model: str | None) -> str | None:
    """The last part of a model's name or path."""
    return None if model is None else model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")

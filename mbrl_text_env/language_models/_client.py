"""What a server is asked for, and what its answers mean; runs on the event loop of `server`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mbrl_text_env.language_models import _engines
from mbrl_text_env.language_models._engines import DIALECTS, Answer, Bill, Dialect, Served
from mbrl_text_env.language_models._http import (
    Endpoint,
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
class _Known:
    """What was learned about a server: its model, whether it has chats alone, its dialect, and
    whether its text was compared with the local tokenizer's."""

    served: Served | None = None
    is_chat: bool = False
    dialect: int | None = None
    is_read: bool = False


class Client:
    """Asks servers for tokens, and remembers what each of them can and could not give (`losses`).

    For its arguments see `server.ServerLM`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        tokenizer: HFTokenizer,
        model: str | None,
        engine: str | None,
        mode: Mode,
        key: KeyFromEnvironment,
        prefix_cache: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = sorted(tokenizer.stop_token_ids)
        self._model, self._engine, self._mode = model, engine, mode
        self._key = key
        self._prefix_cache = prefix_cache
        self._known = {url: _Known() for url in urls}
        self.losses: list[str] = []

    async def draw(self, fleet: Fleet, request: SampleRequest) -> list[Group]:
        """The chunks of a request: in one request where the servers draw several samples."""
        first, last = request.first_sample, request.first_sample + request.num_samples
        size = 1
        engines = [known.served.how for known in self._known.values() if known.served]
        # Greedy samples are all alike, and vLLM refuses to draw several.
        if request.params.temperature and all(engine.draws_many for engine in engines):
            size = _MOST_SAMPLES
        seeded = size > 1
        parts = (range(k, min(k + size, last)) for k in range(first, last, size))
        return await gather(self._draw_group(fleet, request, part, seeded) for part in parts)

    async def _draw_group(
        self, fleet: Fleet, request: SampleRequest, samples: range, seeded: bool
    ) -> Group:
        group = Group([Drawn() for _ in samples])
        streams = [stream(request.seed, request.state, k) for k in samples]
        if seeded:
            # The engine adds the sample's place: sample k has the seed of all plus k.
            common = stream(request.seed, request.state, -1).integers(_SEEDS)
            await self._extend(fleet, request, group, group.chunks, int(common) + samples.start)
        for drawn, generator in zip(group.chunks, streams, strict=True):
            while not drawn.is_done:
                seed = int(generator.integers(_SEEDS))
                await self._extend(fleet, request, group, [drawn], seed)
        return group

    async def _extend(
        self, fleet: Fleet, request: SampleRequest, group: Group, chunks: list[Drawn], seed: int
    ) -> None:
        """Ask once for what follows; several chunks are at their beginning."""
        limit = request.max_new_tokens - len(chunks[0].ids)

        async def ask(endpoint: Endpoint) -> tuple[str, list[Answer], Bill]:
            data = await self._ask(
                fleet, endpoint, request, chunks[0].ids, limit, seed, len(chunks)
            )
            answers, bill = self._read(
                endpoint.url, lambda: _engines.read_answers(data, len(chunks))
            )
            return endpoint.url, answers, bill

        url, answers, bill = await fleet.run(ask)
        for drawn, answer in zip(chunks, answers, strict=True):
            self._add(drawn, answer, request, limit, bill if len(chunks) == 1 else Bill(), url)
        group.bills.append(bill)

    async def _ask(
        self,
        fleet: Fleet,
        endpoint: Endpoint,
        request: SampleRequest,
        ids: Sequence[int],
        limit: int,
        seed: int,
        count: int,
    ) -> Any:
        """What a server answers that is asked for up to `limit` tokens after `ids`."""
        known, served = self._known[endpoint.url], await self._describe(fleet, endpoint)
        prompt = [*prefix_of(request.state), *ids]

        def body(path: str, dialect: Dialect) -> dict[str, Any]:
            if path == "/generate":
                kept = seed if dialect.extras else None
                return _engines.sglang_body(prompt, limit, request.params, self._stops, kept)
            shared = _engines.completion_body(
                served, dialect, request.params, self._stops, self._prefix_cache
            ) | {"max_tokens": limit, "seed": seed}
            if request.params.top_k and "top_k" not in shared:
                raise UnsupportedByServerError(
                    f"{endpoint.url} refuses parameters beyond OpenAI's, so it cannot sample with "
                    f"top_k={request.params.top_k}. Use top_k=0, or another server."
                )
            if count > 1:
                shared["n"] = count
            if path == "/v1/completions":
                shared["prompt"] = prompt if dialect.ids else self._whole_text(prompt)
                return shared | ({"logprobs": 1} if dialect.logprobs else {})
            shared |= self._chat(endpoint.url, served, request.state, ids)
            return shared | ({"logprobs": True, "top_logprobs": 1} if dialect.logprobs else {})

        if self._mode == "chat" or known.is_chat:
            return await self._adapt(fleet, endpoint, "/v1/chat/completions", body)
        if served.engine == "sglang":
            self._lose(
                f"{endpoint.url} is SGLang: seeds count only where it was started with "
                "--enable-deterministic-inference."
            )
            return await self._adapt(fleet, endpoint, "/generate", body)
        try:
            return await self._adapt(fleet, endpoint, "/v1/completions", body)
        except RefusedError as error:
            # An unknown model is a 404 too, and no reason to talk differently.
            missing = error.status in _NO_ROUTE and "model" not in error.reason.lower()
            if self._mode != "auto" or not missing:
                raise
        known.is_chat = True
        return await self._adapt(fleet, endpoint, "/v1/chat/completions", body)

    def _chat(
        self, url: str, served: Served, state: TextState, ids: Sequence[int]
    ) -> dict[str, Any]:
        """A chat's messages; a response that has begun is a message to go on with."""
        self._lose(
            f"{url} is asked for chats: it applies its own template, and the tokens of a "
            "response that is continued are those that it makes of the text."
        )
        messages = _messages(state.prompt, url)
        text = self._tokenizer.decode([*state.response_ids, *ids])
        if not text:
            return {"messages": messages}
        if not served.how.continues:
            raise UnsupportedByServerError(
                f"{url} is asked for chats and is not known to continue a response (engine "
                f"{served.engine!r}). Use an agent that samples whole responses (best-of-n), or a "
                "server with /v1/completions."
            )
        messages.append({"role": "assistant", "content": text})
        going_on = {"continue_final_message": True, "add_generation_prompt": False}
        return {"messages": messages, **going_on}

    async def _adapt(
        self,
        fleet: Fleet,
        endpoint: Endpoint,
        path: str,
        body: Callable[[str, Dialect], dict[str, Any]],
    ) -> Any:
        """The answer in the first dialect that the server does not refuse, from then on in it."""
        known, served = self._known[endpoint.url], await self._describe(fleet, endpoint)
        last = {"/generate": 2, "/v1/chat/completions": 3}.get(path, len(DIALECTS))
        first = min(served.how.first, last - 1)
        numbers = range(first, last) if known.dialect is None else [known.dialect]
        refusal: RefusedError | None = None
        for number in numbers:
            dialect = DIALECTS[number]
            try:
                data = await fleet.call(endpoint, "POST", path, body(path, dialect))
            except RefusedError as error:
                refusal = refusal or error
                if error.status not in _BAD_REQUEST:
                    raise
                continue
            known.dialect = number
            if not dialect.extras and path != "/generate":
                self._lose(
                    f"{endpoint.url} refuses parameters beyond OpenAI's: its own sampling defaults "
                    "apply (top-k, min-p, penalties), and token ids cannot be asked for."
                )
            if not dialect.ids:
                self._lose(f"{endpoint.url} takes no token ids: prompts are sent as text.")
            return data
        assert refusal is not None
        raise refusal

    def _add(
        self,
        drawn: Drawn,
        answer: Answer,
        request: SampleRequest,
        limit: int,
        bill: Bill,
        url: str,
    ) -> None:
        """Add what a server sampled."""
        ids, logprobs = self._tokens(answer, limit, url)
        if logprobs is None or self._are_shaped(request, url):
            logprobs = None
            self._lose(f"{url} does not give the model's own log-probabilities: they are left out.")
        drawn.generated += len(ids)
        kept, is_done = self._cut(drawn.ids, ids, request)
        ids, logprobs = ids[:kept], None if logprobs is None else logprobs[:kept]
        if not is_done and len(ids) < limit:
            extra, is_done = self._after_early_end(answer, ids, bill, url)
            ids, drawn.generated = [*ids, *extra], drawn.generated + len(extra)
            if extra and logprobs is not None:
                logprobs = None
                self._lose(
                    f"{url} gives no log-probability of the token that ends a response: chunks "
                    "with such a token have none."
                )
        if drawn.logprobs is not None:
            drawn.logprobs = None if logprobs is None else [*drawn.logprobs, *logprobs]
        drawn.ids += ids
        drawn.is_done = is_done or len(drawn.ids) >= request.max_new_tokens
        if not ids:
            raise MalformedAnswerError(f"{url}: expected at least one token, got none.")

    def _are_shaped(self, request: SampleRequest, url: str) -> bool:
        """Whether log-probabilities are those after the temperature, as SGLang gives them."""
        served = self._known[url].served
        is_sglang = served is not None and served.engine == "sglang"
        return is_sglang and request.params.temperature not in (0.0, 1.0)

    def _tokens(self, answer: Answer, limit: int, url: str) -> tuple[list[int], list[float] | None]:
        """The sampled ids, and their log-probabilities where those are known."""
        if answer.token_ids is None:
            self._lose(
                f"{url} gives no token ids: its text is encoded anew, and the tokens may differ "
                "from those that were sampled."
            )
            return self._tokenizer.encode_text(answer.text)[:limit], None
        ids = list(answer.token_ids)
        if len(ids) > limit or not all(i < self._tokenizer.vocab_size for i in ids):
            raise MalformedAnswerError(
                f"{url}: expected at most {limit} token ids below {self._tokenizer.vocab_size}, "
                f"got {ids}. Is the tokenizer that of the server's model?"
            )
        theirs, ours = answer.text.strip(), self._tokenizer.decode(ids).strip()
        # A character whose bytes are not all there yet is shown differently.
        if not self._known[url].is_read and theirs and "\ufffd" not in theirs + ours:
            self._known[url].is_read = True
            # A chat's answer may begin with the message that it continues.
            if ours not in theirs:
                self._lose(
                    f"{url} reads its tokens as {theirs[:80]!r}, and the tokenizer as "
                    f"{ours[:80]!r}: it does not seem to be that of the server's model."
                )
        return ids, None if answer.logprobs is None else list(answer.logprobs)

    def _cut(
        self, before: Sequence[int], ids: Sequence[int], request: SampleRequest
    ) -> tuple[int, bool]:
        """How many ids are left after the first stop, and whether there was one."""
        for i, token in enumerate(ids):
            chunk = [*before, *ids[: i + 1]]
            if token in self._stops or has_stop_text(self._tokenizer, chunk, request.params):
                return i + 1, True
        return len(ids), False

    def _after_early_end(
        self, answer: Answer, ids: Sequence[int], bill: Bill, url: str
    ) -> tuple[list[int], bool]:
        """What has to be added to fewer tokens than were asked for, and whether that is the end."""
        if answer.reason != "stop":
            if answer.token_ids is None and ids:
                return [], True  # Encoded anew, they may be fewer than were sampled.
            raise ServerError(
                f"{url} ended after {len(ids)} tokens (finish_reason {answer.reason!r}) without a "
                "stop token. If its context is shorter than the model's, pass context_length=; a "
                "cap on tokens has to be lifted."
            )
        if isinstance(answer.matched, int):
            is_listed = bool(ids) and ids[-1] == answer.matched
            return [] if is_listed else [answer.matched], answer.matched in self._stops
        # A token of the server's that ends no response here: the chunk goes on after it.
        if answer.token_ids is not None and ids and bill.generated == len(ids):
            return [], False
        eos = self._tokenizer.tokenizer.eos_token_id
        if not self._stops:
            raise ServerError(
                f"{url} ended a response, but the tokenizer has no stop token. Pass "
                "HFTokenizer(..., stop_token_ids=[...])."
            )
        return [eos if eos in self._stops else self._stops[0]], True

    async def judge(
        self, fleet: Fleet, state: TextState, chunk: Chunk
    ) -> tuple[tuple[float, ...], list[Bill]]:
        """The log-probabilities of a given chunk, and what was billed."""
        prompt, ids = [*prefix_of(state), *chunk.token_ids], chunk.token_ids

        async def ask(endpoint: Endpoint) -> tuple[tuple[float, ...], list[Bill]]:
            served, url = await self._describe(fleet, endpoint), endpoint.url
            if self._mode == "chat" or self._known[url].is_chat:
                raise _cannot_judge(url, "it is asked for chats")
            if served.how.judging == "forced":
                return await self._judge_by_forcing(fleet, endpoint, served, state, chunk)
            path, body = _engines.judging_body(served, prompt, len(ids))
            try:
                data = await fleet.call(endpoint, "POST", path, body)
            except RefusedError as error:
                raise _cannot_judge(url, error.reason) from error
            found = self._read(
                url, lambda: _engines.read_judged(served, data, len(prompt), ids), path
            )
            if found is None:
                raise _cannot_judge(url, "it does not echo a prompt with its log-probabilities")
            return found, []

        return await fleet.run(ask)

    async def _judge_by_forcing(
        self, fleet: Fleet, endpoint: Endpoint, served: Served, state: TextState, chunk: Chunk
    ) -> tuple[tuple[float, ...], list[Bill]]:
        """One request a token, in which that token is forced.

        llama.cpp gives no log-probabilities of a prompt, but those of a sampled token before any
        bias. Its cache makes each request a pass over one token.
        """
        found: list[float] = []
        bills = []
        for i, token in enumerate(chunk.token_ids):
            prompt = [*prefix_of(state), *chunk.token_ids[:i]]
            # From the second token on it is this request's own prefix that is reused.
            body = _engines.forcing_body(served, prompt, token, self._prefix_cache or i > 0)
            data = await fleet.call(endpoint, "POST", "/v1/completions", body)
            [answer], bill = self._read(
                endpoint.url, functools.partial(_engines.read_answers, data)
            )
            if answer.token_ids != (token,) or answer.logprobs is None:
                raise MalformedAnswerError(
                    f"{endpoint.url}: expected token {token}, which was forced, with its "
                    f"log-probability; got {answer.token_ids} and {answer.logprobs}."
                )
            found += answer.logprobs
            bills.append(bill)
        return tuple(found), bills

    async def describe_all(self, fleet: Fleet) -> list[Served]:
        """What the servers say that are there, at least one."""
        describe = functools.partial(self._describe, fleet)
        found = [await fleet.run(describe)]
        for endpoint in fleet.endpoints:
            if self._known[endpoint.url].served is None:
                try:
                    found.append(await describe(endpoint))
                except TransientError:
                    continue  # It is asked when it is back.
        return found

    async def _describe(self, fleet: Fleet, endpoint: Endpoint) -> Served:
        """What a server says about its model; asked once."""
        known = self._known[endpoint.url]
        if known.served is None:
            path = "/v1/models"
            try:
                data = await fleet.call(endpoint, "GET", path)
                read = functools.partial(_engines.read_served, data, self._model, self._engine)
                known.served = self._checked(endpoint.url, self._read(endpoint.url, read, path))
            except RefusedError as error:
                if error.status not in _NO_ROUTE:
                    raise
                known.served = Served(self._model, self._engine or "")
        return known.served

    def _checked(self, url: str, served: Served) -> Served:
        for other, known in self._known.items():
            if known.served is None or self._model is not None:
                continue
            names = short_name(known.served.model), short_name(served.model)
            if None not in names and names[0] != names[1]:
                raise ServerError(
                    f"{other} serves {names[0]!r} and {url} serves {names[1]!r}. A fleet has to "
                    "serve one model; pass model= if they only call it differently."
                )
        return served

    def _read(self, url: str, read: Callable[[], T], path: str = "/v1/completions") -> T:
        try:
            return read()
        except _engines.AbortedError as error:
            raise TransientError(str(error), is_counted=True) from None
        except _MALFORMED as error:
            reason = self._key.scrub(f"{type(error).__name__}: {error}")
            raise MalformedAnswerError(f"{url}{path}: {reason}.") from None

    def _whole_text(self, ids: Sequence[int]) -> str:
        """Text with its special tokens, for servers that take no ids."""
        text: str = self._tokenizer.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _lose(self, text: str) -> None:
        if text not in self.losses:
            self.losses.append(text)


def _messages(prompt: Prompt, url: str) -> list[dict[str, str]]:
    if isinstance(prompt.content, str):
        raise UnsupportedByServerError(
            f"{url} is asked for chats, and prompt {prompt.id!r} is plain text. Load prompts as "
            "chats, or use a server with /v1/completions."
        )
    return [{"role": m.role, "content": m.content} for m in prompt.content]


def _cannot_judge(url: str, reason: str) -> UnsupportedByServerError:
    return UnsupportedByServerError(
        f"{url} cannot give the log-probabilities of given tokens ({reason}). Use vLLM, SGLang or "
        "llama.cpp, or an agent that does without."
    )


def short_name(model: str | None) -> str | None:
    """The last part of a model's name or path."""
    return None if model is None else model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")

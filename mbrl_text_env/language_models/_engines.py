"""Requests in the format of OpenAI's completions, and the differences between engines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from mbrl_text_env.language_models import _http as http
from mbrl_text_env.language_models._http import (
    Answer,
    Bill,
    MalformedAnswerError,
    Options,
    RefusedError,
    ServerError,
    UnsupportedByServerError,
)
from mbrl_text_env.language_models.base import NextTokens, SampleRequest, has_stop_text, prefix_of
from mbrl_text_env.types import Chunk, TextState

T = TypeVar("T")
Call = Callable[..., Awaitable[Any]]
"""`Transport.call`."""

MODELS, COMPLETIONS, CHATS = "/v1/models", "/v1/completions", "/v1/chat/completions"
_NO_ROUTE = frozenset({404, 405})
_BAD_REQUEST = frozenset({400, 422})
# Exceeds every logit: a token with this bias is sampled with certainty.
_FORCED = 1e6
# Disables the servers' default changes to the distribution. For example, llama.cpp keeps the 40
# most probable tokens.
_NEUTRAL: dict[str, Any] = {
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,
    "dry_multiplier": 0.0,
    "xtc_probability": 0.0,
    "dynatemp_range": 0.0,
    "mirostat": 0,
    "samplers": ["temperature", "top_k", "top_p"],
    "post_sampling_probs": False,
}


@dataclass(frozen=True)
class Dialect:
    """Optional parts of a server's requests: non-OpenAI parameters, log-probabilities, ids."""

    extras: bool = True
    logprobs: bool = True
    ids: bool = True


# Tried in this order until one is accepted; chats take no ids.
_DIALECTS = (
    Dialect(),
    Dialect(extras=False),
    Dialect(extras=False, logprobs=False),
    Dialect(extras=False, ids=False),
    Dialect(extras=False, logprobs=False, ids=False),
)
_LAST = {COMPLETIONS: 4, CHATS: 2, "/generate": 1}


@dataclass
class Drawn:
    """A chunk so far; `generated` also counts tokens after a stop string."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = field(default_factory=list)
    generated: int = 0
    is_done: bool = False


@dataclass(frozen=True)
class Ask:
    """One or more unfinished chunks of a request that are continued together."""

    request: SampleRequest
    chunks: Sequence[Drawn]
    seed: int

    @property
    def prompt(self) -> list[int]:
        """All tokens so far."""
        return [*prefix_of(self.request.state), *self.chunks[0].ids]

    @property
    def limit(self) -> int:
        """Maximum number of tokens to sample."""
        return self.request.max_new_tokens - len(self.chunks[0].ids)


@dataclass
class Engine:
    """A server of an unknown kind; subclasses are the known kinds.

    `losses` is shared by all servers. An instance learns whether its server only supports chats,
    which dialect it accepts, and whether its tokenizer was compared with the local one.
    """

    url: str
    options: Options
    losses: list[str]
    kind: str = ""
    model: str | None = None
    context_length: int | None = None
    num_parameters: int | None = None
    is_chat: bool = False
    dialect: int | None = None
    is_compared: bool = False

    path: ClassVar[str] = COMPLETIONS
    draws_many: ClassVar[bool] = False
    """Whether one request can sample several times, seeded with `seed + i` or at random."""
    all_tokens: ClassVar[int | None] = None
    """The `top_k` that keeps all tokens; None if that is the default."""
    keeps_stop: ClassVar[bool] = False
    """Whether tokens of a stop string can be kept; otherwise it is searched for locally."""
    continues: ClassVar[bool] = False
    """Whether the server can continue an assistant message instead of answering it."""
    first: ClassVar[int] = 0
    """Index of the first dialect to try."""
    has_own_logprobs: ClassVar[bool] = True
    """Whether log-probabilities are the model's own, before the temperature."""
    most_next_tokens: ClassVar[int] = 5
    """How many most probable next tokens the server returns by default."""

    def __post_init__(self) -> None:
        self.is_chat = self.options.mode == "chat"
        self.stops = sorted(self.options.tokenizer.stop_token_ids)

    async def complete(self, call: Call, ask: Ask) -> Bill:
        """Extend chunks, using the first dialect that the server accepts."""
        path = CHATS if self.is_chat else self.path
        last = _LAST[path]
        numbers = range(min(self.first, last), last + 1) if self.dialect is None else [self.dialect]
        refusals = []
        for number in numbers:
            dialect = _DIALECTS[number]
            try:
                data = await call(self.url, path, self.body(path, ask, dialect))
            except RefusedError as error:
                # An unknown model is also a 404, but not a reason to use another endpoint.
                missing = error.status in _NO_ROUTE and "model" not in error.reason.lower()
                if missing and path != CHATS and self.options.mode == "auto":
                    self.is_chat = True
                    return await self.complete(call, ask)
                refusals.append(error)
                if error.status not in _BAD_REQUEST:
                    raise
                continue
            self.dialect = number
            if not dialect.extras and path in (COMPLETIONS, CHATS):
                self.lose(
                    "rejects parameters beyond OpenAI's: its own sampling defaults apply (top-k, "
                    "min-p, penalties), and token ids cannot be requested."
                )
            if not dialect.ids:
                self.lose("takes no token ids: prompts are sent as text.")
            answers, bill = self.checked(path, self.read, data, len(ask.chunks))
            alone = bill if len(answers) == 1 else Bill()
            for drawn, answer in zip(ask.chunks, answers, strict=True):
                self.extend(drawn, answer, ask.request, alone)
            return bill
        raise refusals[0]

    def body(self, path: str, ask: Ask, dialect: Dialect) -> dict[str, Any]:
        """The request body."""
        params = ask.request.params
        body: dict[str, Any] = {
            **self._named(),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": ask.limit,
            "seed": ask.seed,
        }
        if dialect.extras:
            body |= {
                **_NEUTRAL,
                "cache_prompt": self.options.prefix_cache,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "stop_token_ids": self.stops,
            }
            if params.top_k or self.all_tokens is not None:
                body["top_k"] = params.top_k or self.all_tokens
            if params.stop and self.keeps_stop:
                body |= {"stop": list(params.stop), "include_stop_str_in_output": True}
        elif params.top_k:
            raise UnsupportedByServerError(
                f"{self.url} rejects parameters beyond OpenAI's, so it cannot sample with "
                f"top_k={params.top_k}. Use top_k=0, or another server."
            )
        if len(ask.chunks) > 1:
            body["n"] = len(ask.chunks)
        if path == CHATS:
            logs: dict[str, Any] = {"logprobs": True, "top_logprobs": 1}
            body |= self._chat(ask)
        else:
            logs = {"logprobs": 1}
            body["prompt"] = ask.prompt if dialect.ids else self._whole_text(ask.prompt)
        return body | (logs if dialect.logprobs else {})

    def read(self, data: Any, count: int) -> tuple[list[Answer], Bill]:
        """Read the answers and the bill."""
        answers = [http.openai_answer(choice) for choice in http.choices_of(data, count)]
        return answers, http.bill_of(data.get("usage") or {})

    def judging_body(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Request body for the log-probabilities of a prompt's last `count` tokens."""
        asked = {"max_tokens": 0, "echo": True, "logprobs": 1}
        return {"prompt": prompt, "temperature": 0.0, **self._named(), **asked}

    def read_judged(self, data: Any, length: int, ids: Sequence[int]) -> list[float] | None:
        """Log-probabilities of `ids`, the end of a prompt; None if they are not echoed."""
        [choice] = http.choices_of(data, 1)
        found = (choice.get("logprobs") or {}).get("token_logprobs")
        if found is None or len(found) != length:
            return None
        return http.checked_logprobs(found[-len(ids) :])

    async def judge(
        self, call: Call, state: TextState, chunk: Chunk
    ) -> tuple[tuple[float, ...], list[Bill]]:
        """The log-probabilities of a given chunk, and the bills."""
        if self.is_chat:
            raise self._cannot("judge", "only its chat endpoint is used")
        ids = list(chunk.token_ids)
        found, bills = await self.judged(call, [*prefix_of(state), *ids], ids)
        return tuple(found), bills

    async def judged(
        self, call: Call, prompt: list[int], ids: list[int]
    ) -> tuple[list[float], list[Bill]]:
        """The log-probabilities of `ids`, the end of a prompt, and the bills."""
        try:
            data = await call(self.url, self.path, self.judging_body(prompt, len(ids)))
        except RefusedError as error:
            raise self._cannot("judge", error.reason) from error
        found = self.checked(self.path, self.read_judged, data, len(prompt), ids)
        if found is None:
            raise self._cannot("judge", "it does not echo a prompt with its log-probabilities")
        return found, []

    async def next_tokens(
        self, call: Call, prompt: list[int], k: int
    ) -> tuple[NextTokens, list[Bill]]:
        """The k most probable next tokens of a prompt, and the bills."""
        if self.is_chat or self.path != COMPLETIONS or self.first:
            raise self._cannot("rank", "it is not known to take and return token ids")
        asked = {"max_tokens": 1, "temperature": 0.0, "logprobs": k}
        body = {**_NEUTRAL, **self._named(), "prompt": prompt, **asked}
        body |= {"return_tokens_as_token_ids": True, "cache_prompt": self.options.prefix_cache}
        try:
            data = await call(self.url, self.path, body)
        except RefusedError as error:
            raise self._cannot("rank", error.reason) from error
        found = self.checked(self.path, http.read_next_tokens, data)
        if found is None:
            raise self._cannot("rank", "it does not return their ids")
        best = sorted(found.items(), key=lambda pair: -pair[1])[:k]
        ids, logprobs = zip(*best, strict=True)
        return NextTokens(ids, logprobs), [http.bill_of(data.get("usage") or {})]

    def _cannot(self, what: Literal["rank", "judge"], reason: str) -> UnsupportedByServerError:
        lacks, use = {
            "rank": ("most probable next tokens", "vLLM or llama.cpp"),
            "judge": ("log-probabilities of given tokens", "vLLM, SGLang or llama.cpp"),
        }[what]
        return UnsupportedByServerError(
            f"{self.url} does not return the {lacks} ({reason}). Use {use}, or an agent that does "
            "without."
        )

    def extend(self, drawn: Drawn, answer: Answer, request: SampleRequest, bill: Bill) -> None:
        """Append the sampled tokens to a chunk."""
        params, limit = request.params, request.max_new_tokens - len(drawn.ids)
        ids, logprobs = self._tokens(answer, limit)
        if logprobs is None or not (self.has_own_logprobs or params.temperature in (0.0, 1.0)):
            logprobs = None
            self.lose("does not return the model's own log-probabilities: they are omitted.")
        drawn.generated += len(ids)
        for i, token in enumerate(ids, start=1):
            chunk = drawn.ids + ids[:i]
            if token in self.stops or has_stop_text(self.options.tokenizer, chunk, params):
                ids, drawn.is_done = ids[:i], True
                break
        logprobs = None if logprobs is None else logprobs[: len(ids)]
        if not drawn.is_done and len(ids) < limit:
            extra, drawn.is_done = self._after_early_end(answer, ids, bill)
            ids, drawn.generated = ids + extra, drawn.generated + len(extra)
            if extra and logprobs is not None:
                logprobs = None
                self.lose(
                    "returns no log-probability of the token that ends a response: chunks with "
                    "such a token have none."
                )
        if not ids:
            raise MalformedAnswerError(f"{self.url}: expected at least one token, got none.")
        if logprobs is None or drawn.logprobs is None:
            drawn.logprobs = None
        else:
            drawn.logprobs += logprobs
        drawn.ids += ids
        drawn.is_done = drawn.is_done or len(ids) >= limit

    def _tokens(self, answer: Answer, limit: int) -> tuple[list[int], list[float] | None]:
        """The sampled ids, and their log-probabilities if known."""
        tokenizer, ids = self.options.tokenizer, answer.token_ids
        if ids is None:
            self.lose(
                "returns no token ids: its text is encoded locally, and the tokens may differ "
                "from those that were sampled."
            )
            return list(tokenizer.encode_text(answer.text)[:limit]), None
        if len(ids) > limit or not all(i < tokenizer.vocab_size for i in ids):
            raise MalformedAnswerError(
                f"{self.url}: expected at most {limit} token ids below {tokenizer.vocab_size}, "
                f"got {ids}. Is the tokenizer that of the server's model?"
            )
        theirs, ours = answer.text.strip(), tokenizer.decode(ids).strip()
        # An incomplete character is displayed differently.
        if not self.is_compared and theirs and "\ufffd" not in theirs + ours:
            self.is_compared = True
            # A chat's answer can start with the message that it continues.
            if ours not in theirs:
                self.lose(
                    f"reads its tokens as {theirs[:80]!r}, but the tokenizer as {ours[:80]!r}: it "
                    "does not seem to be that of the server's model."
                )
        return ids, answer.logprobs

    def _after_early_end(
        self, answer: Answer, ids: list[int], bill: Bill
    ) -> tuple[list[int], bool]:
        """Tokens to add if the server returned too few, and whether the chunk has ended."""
        stops = self.stops
        if answer.reason != "stop":
            if answer.token_ids is None and ids:
                return [], True  # Encoded locally, they can be fewer than were sampled.
            raise ServerError(
                f"{self.url} ended after {len(ids)} tokens (finish_reason {answer.reason!r}) "
                "without a stop token. If its context is shorter than the model's, pass "
                "context_length=; otherwise remove the server's limit on tokens."
            )
        if isinstance(answer.matched, int):
            is_listed = ids[-1:] == [answer.matched]
            return [] if is_listed else [answer.matched], answer.matched in stops
        # The server's token does not end responses here: the chunk continues after it.
        if answer.token_ids is not None and ids and bill.generated == len(ids):
            return [], False
        if not stops:
            raise ServerError(
                f"{self.url} ended a response, but the tokenizer has no stop token. Pass "
                "HFTokenizer(..., stop_token_ids=[...])."
            )
        eos = self.options.tokenizer.tokenizer.eos_token_id
        return [eos if eos in stops else stops[0]], True

    def _chat(self, ask: Ask) -> dict[str, Any]:
        """Body for a chat; a started response is sent as a message to continue."""
        self.lose(
            "is used through its chat endpoint: it applies its own template, and encodes the text "
            "of a continued response again."
        )
        state = ask.request.state
        prompt = state.prompt
        if isinstance(prompt.content, str):
            raise UnsupportedByServerError(
                f"{self.url} only has chats, but prompt {prompt.id!r} is plain text. Load "
                "prompts as chats, or use a server with /v1/completions."
            )
        messages = [{"role": m.role, "content": m.content} for m in prompt.content]
        text = self.options.tokenizer.decode([*state.response_ids, *ask.chunks[0].ids])
        if not text:
            return {"messages": messages}
        if not self.continues:
            raise UnsupportedByServerError(
                f"{self.url} only has chats and is not known to continue a response (engine "
                f"{self.kind!r}). Use an agent that samples whole responses (best-of-n), or a "
                "server with /v1/completions."
            )
        messages.append({"role": "assistant", "content": text})
        going_on = {"continue_final_message": True, "add_generation_prompt": False}
        return {"messages": messages, **going_on}

    def _whole_text(self, ids: list[int]) -> str:
        text: str = self.options.tokenizer.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _named(self) -> dict[str, Any]:
        return {} if self.model is None else {"model": self.model}

    def lose(self, text: str) -> None:
        """Record a feature that this server does not provide."""
        if (text := f"{self.url} {text}") not in self.losses:
            self.losses.append(text)

    def checked(self, path: str, read: Callable[..., T], *data: Any) -> T:
        """Apply a reader to an answer; its errors become the server's."""
        try:
            return read(*data)
        except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            reason = self.options.scrub(f"{type(error).__name__}: {error}")
            raise MalformedAnswerError(f"{self.url}{path}: {reason}.") from None


class VLLM(Engine):
    """Supports everything, including log-probabilities of a prompt."""

    draws_many, all_tokens, keeps_stop, continues = True, -1, True, True
    most_next_tokens = 20  # More need a server with `--max-logprobs`.

    def judging_body(self, prompt: list[int], count: int) -> dict[str, Any]:
        asked = {"max_tokens": 1, "prompt_logprobs": 1}
        return {"prompt": prompt, "temperature": 0.0, **self._named(), **asked}

    def read_judged(self, data: Any, length: int, ids: Sequence[int]) -> list[float]:
        [choice] = http.choices_of(data, 1)
        rows = http.list_in(choice, "prompt_logprobs")
        if len(rows) <= len(ids):
            raise ValueError(f"expected more than {len(ids)} prompt_logprobs, got {len(rows)}")
        pairs = zip(ids, rows[-len(ids) :], strict=True)
        return http.checked_logprobs(
            [http.field_of(http.field_of(row, str(token)), "logprob") for token, row in pairs]
        )


class SGLang(Engine):
    """Has its own request format."""

    path, continues, has_own_logprobs = "/generate", True, False

    def body(self, path: str, ask: Ask, dialect: Dialect) -> dict[str, Any]:
        if path == CHATS:
            return super().body(path, ask, dialect)
        self.lose("is SGLang: seeds only apply with --enable-deterministic-inference.")
        params = ask.request.params
        sampling: dict[str, Any] = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": 0.0,
            "max_new_tokens": ask.limit,
            "stop_token_ids": self.stops,
        }
        if dialect.extras:
            sampling["sampling_seed"] = ask.seed
        if params.stop:
            sampling |= {"stop": list(params.stop), "no_stop_trim": True}
        return {"input_ids": ask.prompt, "sampling_params": sampling, "return_logprob": True}

    def read(self, data: Any, count: int) -> tuple[list[Answer], Bill]:
        if not isinstance(data, dict) or "meta_info" not in data:
            return super().read(data, count)
        meta = data["meta_info"]
        finish, triples = meta.get("finish_reason") or {}, meta.get("output_token_logprobs")
        logprobs = None if triples is None else [triple[0] for triple in triples]
        ids, end = http.field_of(data, "output_ids"), (finish.get("type"), finish.get("matched"))
        return [http.checked_answer(ids, logprobs, data.get("text"), *end)], http.bill_of(meta)

    def judging_body(self, prompt: list[int], count: int) -> dict[str, Any]:
        sampling = {"temperature": 0.0, "max_new_tokens": 0}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        return {**body, "logprob_start_len": len(prompt) - count - 1}

    def read_judged(self, data: Any, length: int, ids: Sequence[int]) -> list[float]:
        last = http.list_in(http.field_of(data, "meta_info"), "input_token_logprobs")[-len(ids) :]
        if [triple[1] for triple in last] != ids:
            raise ValueError(f"expected log-probabilities that end with those of {ids}, got {last}")
        return http.checked_logprobs([triple[0] for triple in last])


class LlamaCpp(Engine):
    """Returns no log-probabilities of a prompt, but those of a sampled token before any bias."""

    all_tokens, continues, most_next_tokens = 0, True, 1000

    async def judged(
        self, call: Call, prompt: list[int], ids: list[int]
    ) -> tuple[list[float], list[Bill]]:
        """Force each token in its own request; with the cache, each needs a pass over one token."""
        found: list[float] = []
        bills = []
        for i, token in enumerate(ids, start=len(prompt) - len(ids)):
            body = {
                **_NEUTRAL,
                # From the second token on, the reused prefix is this request's own.
                "cache_prompt": self.options.prefix_cache or bool(found),
                "prompt": prompt[:i],
                "model": self.model,
                "max_tokens": 1,
                "temperature": 0.0,
                "logprobs": 1,
                "logit_bias": [[token, _FORCED]],
            }
            data = await call(self.url, self.path, body)
            [answer], bill = self.checked(self.path, self.read, data, 1)
            if answer.token_ids != [token] or answer.logprobs is None:
                raise MalformedAnswerError(
                    f"{self.url}: expected token {token}, which was forced, with its "
                    f"log-probability; got {answer.token_ids} and {answer.logprobs}."
                )
            found += answer.logprobs
            bills.append(bill)
        return found, bills


class TGI(Engine):
    """Takes text only."""

    first = 3


class OpenAI(Engine):
    """Takes only OpenAI's parameters."""

    draws_many, first = True, 1


_ENGINES: dict[str, type[Engine]] = {
    "vllm": VLLM,
    "sglang": SGLang,
    "llamacpp": LlamaCpp,
    "tgi": TGI,
    "openai": OpenAI,
}
"""Engines by the owner that servers report for their models, or by `engine=`."""


async def look(call: Call, url: str, options: Options, losses: list[str]) -> Engine:
    """Detect the engine at an address from its model list."""
    owner, model, context_length, num_parameters = "", options.model, None, None
    try:
        data = await call(url, MODELS)
        found = Engine(url, options, losses).checked(MODELS, http.read_model, data, model)
        owner, model, context_length, num_parameters = found
    except RefusedError as error:
        if error.status not in _NO_ROUTE:
            raise
    kind = options.engine or owner
    engine = _ENGINES.get(kind, Engine)
    return engine(url, options, losses, kind, model, context_length, num_parameters)

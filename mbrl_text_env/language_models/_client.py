"""What a server is asked for, and what its answers mean; runs on the event loop of `server`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from mbrl_text_env.language_models import _answers
from mbrl_text_env.language_models._answers import Answer, Served
from mbrl_text_env.language_models._http import (
    Endpoint,
    Fleet,
    KeyFromEnvironment,
    MalformedAnswerError,
    RefusedError,
    ServerError,
    TransientError,
    UnsupportedByServerError,
)
from mbrl_text_env.language_models.base import SamplingParams, has_stop_text
from mbrl_text_env.language_models.hf_tokenizer import HFTokenizer
from mbrl_text_env.types import Chunk, Prompt, TextState

T = TypeVar("T")
Mode = Literal["auto", "completions", "chat"]

# llama.cpp takes 32 bits.
_SEEDS = 2**31 - 1
# Above every logit: a token with this bias is drawn for certain.
_FORCED = 1e6
_MALFORMED = (ValueError, TypeError, AttributeError, IndexError, KeyError)
_NO_ROUTE = frozenset({404, 405})
_BAD_REQUEST = frozenset({400, 422})
# Engines that go on with an assistant message instead of answering it.
_CONTINUES_MESSAGES = frozenset({"llamacpp", "vllm", "sglang"})
# Whatever else a server does to the distribution by default is switched off. llama.cpp keeps the 40
# most probable tokens, for instance.
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
class _Dialect:
    """What a server's requests may contain.

    Args:
        extras: Parameters beyond OpenAI's.
        logprobs: The parameter that asks for log-probabilities.
        ids: A prompt of token ids.
    """

    extras: bool = True
    logprobs: bool = True
    ids: bool = True


# Tried in this order until one is not refused.
_COMPLETION_DIALECTS = (
    _Dialect(),
    _Dialect(extras=False),
    _Dialect(extras=False, logprobs=False),
    _Dialect(extras=False, ids=False),
    _Dialect(extras=False, logprobs=False, ids=False),
)
_CHAT_DIALECTS = _COMPLETION_DIALECTS[:3]
_SGLANG_DIALECTS = _COMPLETION_DIALECTS[:2]


@dataclass
class _Known:
    """What was learned about a server.

    Args:
        served: What it says about its model; None as long as it was not asked.
        is_chat: Whether it has no completions.
        dialect: Number of the first dialect that it did not refuse.
        is_read: Whether its text was compared with the local tokenizer's.
    """

    served: Served | None = None
    is_chat: bool = False
    dialect: int | None = None
    is_read: bool = False


@dataclass(frozen=True)
class Task:
    """One chunk to be sampled.

    Args:
        state: What it follows.
        limit: Most tokens.
        params: How they are drawn.
        generator: Gives the seeds that the server is sent.
    """

    state: TextState
    limit: int
    params: SamplingParams
    generator: np.random.Generator


@dataclass
class Drawn:
    """A chunk as far as it has come.

    Args:
        ids: Its tokens.
        logprobs: One a token; None as soon as one of them is not known.
        generated: Tokens that the server sampled, those after a stop string included.
        computed: Prefix tokens that the server computed; None where it does not say.
        cached: Prefix tokens that it had.
        is_done: Whether nothing is to follow.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = field(default_factory=list)
    generated: int = 0
    computed: int | None = 0
    cached: int = 0
    is_done: bool = False

    def countprefix_of(self, length: int, cached: int | None) -> None:
        """Add a request's prefix."""
        if cached is None or self.computed is None:
            self.computed, self.cached = None, 0
            return
        self.computed += length - min(cached, length)
        self.cached += min(cached, length)


class Client:
    """Asks servers for tokens, and remembers what each of them can.

    Args:
        urls: The servers.
        tokenizer: That of their model.
        model: Name to ask for; None for the only one that they list.
        mode: Completions, chats, or whatever there is.
        key: The API key, to keep it out of messages.
        prefix_cache: Whether a server may reuse prefixes; only llama.cpp can be told.

    Attributes:
        losses: What the servers could not give so far.
    """

    def __init__(
        self,
        urls: Sequence[str],
        tokenizer: HFTokenizer,
        model: str | None,
        mode: Mode,
        key: KeyFromEnvironment,
        prefix_cache: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._mode = mode
        self._key = key
        self._prefix_cache = prefix_cache
        self._known = {url: _Known() for url in urls}
        self.losses: list[str] = []

    async def draw(self, fleet: Fleet, task: Task) -> Drawn:
        """One chunk, in as many requests as it takes."""
        drawn = Drawn()
        while not drawn.is_done:
            seed = int(task.generator.integers(_SEEDS))
            prefix = len(prefix_of(task.state)) + len(drawn.ids)

            async def ask(endpoint: Endpoint, seed: int = seed) -> tuple[str, Answer]:
                return endpoint.url, await self._ask(fleet, endpoint, task, drawn.ids, seed)

            url, answer = await fleet.run(ask)
            self._extend(drawn, answer, task, url)
            drawn.countprefix_of(prefix, answer.cached_tokens)
        return drawn

    async def _ask(
        self, fleet: Fleet, endpoint: Endpoint, task: Task, ids: Sequence[int], seed: int
    ) -> Answer:
        """Up to the task's limit of tokens after the ids drawn so far."""
        known = self._known[endpoint.url]
        served = await self._describe(fleet, endpoint)
        if self._mode == "chat" or known.is_chat:
            return await self._ask_chat(fleet, endpoint, task, ids, seed)
        if served.engine == "sglang":
            return await self._ask_sglang(fleet, endpoint, task, ids, seed)
        try:
            return await self._ask_completions(fleet, endpoint, task, ids, seed)
        except RefusedError as error:
            # An unknown model is a 404 too, and no reason to talk differently.
            missing = error.status in _NO_ROUTE and "model" not in error.reason.lower()
            if self._mode != "auto" or not missing:
                raise
        known.is_chat = True
        return await self._ask_chat(fleet, endpoint, task, ids, seed)

    async def _ask_completions(
        self, fleet: Fleet, endpoint: Endpoint, task: Task, ids: Sequence[int], seed: int
    ) -> Answer:
        served = await self._describe(fleet, endpoint)
        prompt = [*prefix_of(task.state), *ids]

        def body(dialect: _Dialect) -> dict[str, Any]:
            request = self._body(endpoint.url, served, dialect, task, len(ids), seed)
            request["prompt"] = prompt if dialect.ids else self._whole_text(prompt)
            if dialect.logprobs:
                request["logprobs"] = 1
            return request

        path = "/v1/completions"
        dialect, data = await self._adapt(fleet, endpoint, path, _COMPLETION_DIALECTS, body)
        self._note(endpoint.url, dialect)
        return self._read(endpoint.url, path, lambda: _answers.completion(data))

    async def _ask_chat(
        self, fleet: Fleet, endpoint: Endpoint, task: Task, ids: Sequence[int], seed: int
    ) -> Answer:
        served = await self._describe(fleet, endpoint)
        text = self._tokenizer.decode([*task.state.response_ids, *ids])
        messages = _messages(task.state.prompt, endpoint.url)
        self._lose(
            f"{endpoint.url} is asked for chats: it applies its own template, and the tokens of a "
            "response that is continued are those that it makes of the text."
        )
        if text:
            _check_continues(endpoint.url, served)
            messages.append({"role": "assistant", "content": text})

        def body(dialect: _Dialect) -> dict[str, Any]:
            request = self._body(endpoint.url, served, dialect, task, len(ids), seed)
            request["messages"] = messages
            if dialect.logprobs:
                request |= {"logprobs": True, "top_logprobs": 1}
            if text:
                request |= {"continue_final_message": True, "add_generation_prompt": False}
            return request

        path = "/v1/chat/completions"
        dialect, data = await self._adapt(fleet, endpoint, path, _CHAT_DIALECTS, body)
        self._note(endpoint.url, dialect)
        return self._read(endpoint.url, path, lambda: _answers.chat(data))

    async def _ask_sglang(
        self, fleet: Fleet, endpoint: Endpoint, task: Task, ids: Sequence[int], seed: int
    ) -> Answer:
        params = task.params
        self._lose(
            f"{endpoint.url} is SGLang: seeds count only where it was started with "
            "--enable-deterministic-inference."
        )

        def body(dialect: _Dialect) -> dict[str, Any]:
            sampling = {
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k or -1,
                "min_p": 0.0,
                "max_new_tokens": task.limit - len(ids),
                "stop_token_ids": sorted(self._tokenizer.stop_token_ids),
            }
            if dialect.extras:
                sampling["sampling_seed"] = seed
            if params.stop:
                sampling |= {"stop": list(params.stop), "no_stop_trim": True}
            prompt = [*prefix_of(task.state), *ids]
            return {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}

        _, data = await self._adapt(fleet, endpoint, "/generate", _SGLANG_DIALECTS, body)
        answer = self._read(endpoint.url, "/generate", lambda: _answers.sglang(data))
        if params.temperature in (0.0, 1.0):
            return answer
        return _without_logprobs(answer)

    def _body(
        self, url: str, served: Served, dialect: _Dialect, task: Task, drawn: int, seed: int
    ) -> dict[str, Any]:
        """What completions and chats are asked for alike."""
        params = task.params
        body: dict[str, Any] = {
            "max_tokens": task.limit - drawn,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
        }
        model = self._model or served.model
        if model is not None:
            body["model"] = model
        if dialect.extras:
            body |= self._extras(served, params)
        elif params.top_k:
            raise UnsupportedByServerError(
                f"{url} refuses parameters beyond OpenAI's, so it cannot sample with top_k="
                f"{params.top_k}. Use top_k=0, or another server."
            )
        return body

    def _extras(self, served: Served, params: SamplingParams) -> dict[str, Any]:
        extras = {
            **_NEUTRAL,
            "cache_prompt": self._prefix_cache,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stop_token_ids": sorted(self._tokenizer.stop_token_ids),
        }
        # "All tokens" is 0 for llama.cpp and -1 for vLLM; elsewhere it is the default.
        off = {"llamacpp": 0, "vllm": -1}.get(served.engine)
        if params.top_k or off is not None:
            extras["top_k"] = params.top_k or off
        # Others cut the tokens of a stop string off; there it is looked for here alone.
        if params.stop and served.engine == "vllm":
            extras |= {"stop": list(params.stop), "include_stop_str_in_output": True}
        return extras

    async def _adapt(
        self,
        fleet: Fleet,
        endpoint: Endpoint,
        path: str,
        dialects: Sequence[_Dialect],
        body: Callable[[_Dialect], dict[str, Any]],
    ) -> tuple[_Dialect, Any]:
        """The answer in the first dialect that the server does not refuse, from then on in it."""
        known = self._known[endpoint.url]
        numbers = range(len(dialects)) if known.dialect is None else [known.dialect]
        refusal: RefusedError | None = None
        for number in numbers:
            try:
                data = await fleet.call(endpoint, "POST", path, body(dialects[number]))
            except RefusedError as error:
                refusal = refusal or error
                if error.status not in _BAD_REQUEST:
                    raise
                continue
            known.dialect = number
            return dialects[number], data
        assert refusal is not None
        raise refusal

    def _note(self, url: str, dialect: _Dialect) -> None:
        """Say what a dialect leaves out."""
        if not dialect.extras:
            self._lose(
                f"{url} refuses parameters beyond OpenAI's: its own sampling defaults apply "
                "(top-k, min-p, penalties), and token ids cannot be asked for."
            )
        if not dialect.ids:
            self._lose(f"{url} takes no token ids: prompts are sent as text.")

    def _extend(self, drawn: Drawn, answer: Answer, task: Task, url: str) -> None:
        """Add what a server sampled."""
        limit = task.limit - len(drawn.ids)
        ids, logprobs = self._tokens(answer, limit, url)
        if logprobs is None:
            self._lose(f"{url} does not give the model's own log-probabilities: they are left out.")
        drawn.generated += len(ids)
        kept, is_done = self._cut(drawn.ids, ids, task.params)
        ids = ids[:kept]
        logprobs = None if logprobs is None else logprobs[:kept]
        if not is_done and len(ids) < limit:
            extra, is_done = self._after_early_end(answer, ids, url)
            ids, drawn.generated = [*ids, *extra], drawn.generated + len(extra)
            if extra and logprobs is not None:
                logprobs = None
                self._lose(
                    f"{url} gives no log-probability of the token that ends a response: chunks "
                    "with such a token have none."
                )
        known = drawn.logprobs is not None and logprobs is not None
        drawn.logprobs = [*(drawn.logprobs or ()), *(logprobs or ())] if known else None
        drawn.ids += ids
        drawn.is_done = is_done or len(drawn.ids) >= task.limit
        if not ids:
            raise MalformedAnswerError(f"{url}: expected at least one token, got none.")

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
        self._compare_text(answer, ids, url)
        return ids, None if answer.logprobs is None else list(answer.logprobs)

    def _compare_text(self, answer: Answer, ids: Sequence[int], url: str) -> None:
        """Notice a tokenizer that is not the server's."""
        theirs, ours = answer.text.strip(), self._tokenizer.decode(ids).strip()
        known = self._known[url]
        # A character whose bytes are not all there yet is shown differently.
        if known.is_read or not theirs or "\ufffd" in theirs + ours:
            return
        known.is_read = True
        # A chat's answer may begin with the message that it continues.
        if ours not in theirs:
            self._lose(
                f"{url} reads its tokens as {theirs[:80]!r}, and the tokenizer as {ours[:80]!r}: "
                "it does not seem to be that of the server's model."
            )

    def _cut(
        self, before: Sequence[int], ids: Sequence[int], params: SamplingParams
    ) -> tuple[int, bool]:
        """How many ids are left after the first stop, and whether there was one."""
        for i, token in enumerate(ids):
            if token in self._tokenizer.stop_token_ids:
                return i + 1, True
            if has_stop_text(self._tokenizer, [*before, *ids[: i + 1]], params):
                return i + 1, True
        return len(ids), False

    def _after_early_end(
        self, answer: Answer, ids: Sequence[int], url: str
    ) -> tuple[list[int], bool]:
        """What has to be added to fewer tokens than were asked for, and whether that is the end."""
        is_text = answer.token_ids is None
        if answer.reason != "stop":
            if is_text and ids:
                return [], True  # Encoded anew, they may be fewer than were sampled.
            raise ServerError(
                f"{url} ended after {len(ids)} tokens (finish_reason {answer.reason!r}) without a "
                "stop token. If its context is shorter than the model's, pass context_length=; a "
                "cap on tokens has to be lifted."
            )
        matched = answer.matched
        if isinstance(matched, int):
            is_listed = bool(ids) and ids[-1] == matched
            return [] if is_listed else [matched], matched in self._tokenizer.stop_token_ids
        # A token of the server's that ends no response here: the chunk goes on after it.
        if not is_text and ids and answer.generated_tokens == len(ids):
            return [], False
        return [self._stop_token(url)], True

    def _stop_token(self, url: str) -> int:
        eos = self._tokenizer.tokenizer.eos_token_id
        if eos in self._tokenizer.stop_token_ids:
            return int(eos)
        if not self._tokenizer.stop_token_ids:
            raise ServerError(
                f"{url} ended a response, but the tokenizer has no stop token. Pass "
                "HFTokenizer(..., stop_token_ids=[...])."
            )
        return min(self._tokenizer.stop_token_ids)

    async def judge(self, fleet: Fleet, state: TextState, chunk: Chunk) -> Drawn:
        """The log-probabilities of a given chunk."""

        async def ask(endpoint: Endpoint) -> Drawn:
            served = await self._describe(fleet, endpoint)
            if self._mode == "chat" or self._known[endpoint.url].is_chat:
                raise _cannot_judge(endpoint.url, "it is asked for chats")
            if served.engine == "llamacpp":
                return await self._judge_by_forcing(fleet, endpoint, state, chunk)
            return await self._judge_at_once(fleet, endpoint, state, chunk)

        return await fleet.run(ask)

    async def _judge_at_once(
        self, fleet: Fleet, endpoint: Endpoint, state: TextState, chunk: Chunk
    ) -> Drawn:
        served = await self._describe(fleet, endpoint)
        prompt = [*prefix_of(state), *chunk.token_ids]
        ids, url = chunk.token_ids, endpoint.url
        found: tuple[float, ...] | None
        if served.engine == "sglang":
            body = _sglang_judging(prompt, len(prompt) - len(ids) - 1)
            data = await fleet.call(endpoint, "POST", "/generate", body)
            found = self._read(url, "/generate", lambda: _answers.sglang_logprobs(data, ids))
        else:
            path = "/v1/completions"
            is_vllm = served.engine == "vllm"
            body = _judging(self._model or served.model, prompt, is_vllm)
            try:
                data = await fleet.call(endpoint, "POST", path, body)
            except RefusedError as error:
                raise _cannot_judge(url, error.reason) from error
            if is_vllm:
                found = self._read(url, path, lambda: _answers.prompt_logprobs(data, ids))
            else:
                found = self._read(
                    url, path, lambda: _answers.echoed_logprobs(data, len(prompt), len(ids))
                )
        if found is None:
            raise _cannot_judge(url, "it does not echo a prompt with its log-probabilities")
        return Drawn(logprobs=list(found), computed=None)

    async def _judge_by_forcing(
        self, fleet: Fleet, endpoint: Endpoint, state: TextState, chunk: Chunk
    ) -> Drawn:
        """One request a token, in which that token is forced.

        llama.cpp gives no log-probabilities of a prompt, but those of a sampled token before any
        bias. Its cache makes each request a pass over one token.
        """
        served = await self._describe(fleet, endpoint)
        judged = Drawn()
        for i, token in enumerate(chunk.token_ids):
            prompt = [*prefix_of(state), *chunk.token_ids[:i]]
            body = {
                **_NEUTRAL,
                # From the second token on it is this request's own prefix that is reused.
                "cache_prompt": self._prefix_cache or i > 0,
                "prompt": prompt,
                "max_tokens": 1,
                "temperature": 0.0,
                "logprobs": 1,
                "logit_bias": [[token, _FORCED]],
                "model": self._model or served.model,
            }
            data = await fleet.call(endpoint, "POST", "/v1/completions", body)
            answer = self._read(
                endpoint.url, "/v1/completions", functools.partial(_answers.completion, data)
            )
            if answer.token_ids != (token,) or answer.logprobs is None:
                raise MalformedAnswerError(
                    f"{endpoint.url}: expected token {token}, which was forced, with its "
                    f"log-probability; got {answer.token_ids} and {answer.logprobs}."
                )
            assert judged.logprobs is not None
            judged.logprobs += answer.logprobs
            judged.countprefix_of(len(prompt), answer.cached_tokens)
        return judged

    async def describe_all(self, fleet: Fleet) -> list[Served]:
        """What the servers say that are there, at least one."""

        async def describe(endpoint: Endpoint) -> Served:
            return await self._describe(fleet, endpoint)

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
            except RefusedError as error:
                if error.status not in _NO_ROUTE:
                    raise
                served = Served()
            else:
                served = self._read(endpoint.url, path, lambda: _answers.served(data, self._model))
            self._check_same(endpoint.url, served)
            known.served = served
        return known.served

    def _check_same(self, url: str, served: Served) -> None:
        for other, known in self._known.items():
            if known.served is None or self._model is not None:
                continue
            names = short_name(known.served.model), short_name(served.model)
            if None not in names and names[0] != names[1]:
                raise ServerError(
                    f"{other} serves {names[0]!r} and {url} serves {names[1]!r}. A fleet has to "
                    "serve one model; pass model= if they only call it differently."
                )

    def _read(self, url: str, path: str, read: Callable[[], T]) -> T:
        try:
            return read()
        except _answers.AbortedError as error:
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


def _check_continues(url: str, served: Served) -> None:
    if served.engine not in _CONTINUES_MESSAGES:
        raise UnsupportedByServerError(
            f"{url} is asked for chats and is not known to continue a response (engine "
            f"{served.engine!r}; {sorted(_CONTINUES_MESSAGES)} do). Use an agent that samples "
            "whole responses (best-of-n), or a server with /v1/completions."
        )


def _without_logprobs(answer: Answer) -> Answer:
    return dataclasses.replace(answer, logprobs=None)


def _cannot_judge(url: str, reason: str) -> UnsupportedByServerError:
    return UnsupportedByServerError(
        f"{url} cannot give the log-probabilities of given tokens ({reason}). Use vLLM, SGLang or "
        "llama.cpp, or an agent that does without."
    )


def _judging(model: str | None, prompt: list[int], is_vllm: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": prompt, "temperature": 0.0}
    if model is not None:
        body["model"] = model
    if is_vllm:
        return {**body, "max_tokens": 1, "prompt_logprobs": 1}
    return {**body, "max_tokens": 0, "echo": True, "logprobs": 1}


def _sglang_judging(prompt: list[int], start: int) -> dict[str, Any]:
    return {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": start,
    }


def short_name(model: str | None) -> str | None:
    """The last part of a model's name or path."""
    return None if model is None else model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def prefix_of(state: TextState) -> tuple[int, ...]:
    """All tokens of a state."""
    return state.prompt_ids + state.response_ids

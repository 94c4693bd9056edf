"""What servers are asked and what they answer: OpenAI's completions, and how engines differ.

Readers raise `ValueError` with what was expected and what came, or `AbortedError` where asking
again may help.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mbrl_text_env.language_models.base import SamplingParams

COMPLETIONS, CHATS, SGLANG = "/v1/completions", "/v1/chat/completions", "/generate"
# Log-probabilities are rounded: a certain token may come out a hair above 0.
_ROUNDING = 1e-6
# Above every logit: a token with this bias is drawn for certain.
_FORCED = 1e6
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
class Engine:
    """How an engine differs from OpenAI's completions.

    Args:
        draws_many: Whether one request draws several samples, from `seed + i` or from chance.
        all_tokens: The `top_k` that keeps all tokens; None where that is the default.
        keeps_stop: Whether tokens of a stop string can be kept; elsewhere it is looked for here.
        continues: Whether it goes on with an assistant message instead of answering it.
        judging: How it gives log-probabilities of given tokens.
        first: Number of the first dialect that it may know.
    """

    draws_many: bool = False
    all_tokens: int | None = None
    keeps_stop: bool = False
    continues: bool = False
    judging: Literal["prompt", "forced", "native", "echo"] = "echo"
    first: int = 0


ENGINES = {
    "vllm": Engine(True, -1, True, True, "prompt"),
    "sglang": Engine(continues=True, judging="native"),
    "llamacpp": Engine(all_tokens=0, continues=True, judging="forced"),
    "tgi": Engine(first=3),
    "openai": Engine(draws_many=True, first=1),
}
"""By the name that servers give as the owner of their models, or that `engine=` gives."""


@dataclass(frozen=True)
class Dialect:
    """What a server's requests may contain: parameters beyond OpenAI's, log-probabilities, ids."""

    extras: bool = True
    logprobs: bool = True
    ids: bool = True


# Tried in this order until one is not refused.
DIALECTS = (
    Dialect(),
    Dialect(extras=False),
    Dialect(extras=False, logprobs=False),
    Dialect(extras=False, ids=False),
    Dialect(extras=False, logprobs=False, ids=False),
)


class AbortedError(Exception):
    """An answer that was given up by the server; the next attempt may pass."""


@dataclass(frozen=True)
class Served:
    """What a server says about its model, such as its context in tokens; None where it does not."""

    model: str | None = None
    engine: str = ""
    context_length: int | None = None
    num_parameters: int | None = None

    @property
    def how(self) -> Engine:
        """How its engine is asked."""
        return ENGINES.get(self.engine, Engine())


@dataclass(frozen=True)
class Answer:
    """A sample of a server's, None where it does not say; `matched` is the stop that ended it."""

    token_ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    text: str
    reason: str | None
    matched: int | str | None


@dataclass(frozen=True)
class Bill:
    """Tokens that a server counts for a request, None where it does not.

    Those of the prompt count once for all samples; `cached` are those of them not computed.
    """

    prompt: int | None = None
    cached: int | None = None
    generated: int | None = None


def completion_body(
    served: Served,
    dialect: Dialect,
    params: SamplingParams,
    stop_ids: Sequence[int],
    prefix_cache: bool,
) -> dict[str, Any]:
    """What completions and chats are asked for alike."""
    body: dict[str, Any] = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    } | _named(served)
    if not dialect.extras:
        return body
    body |= {
        **_NEUTRAL,
        "cache_prompt": prefix_cache,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stop_token_ids": list(stop_ids),
    }
    if params.top_k or served.how.all_tokens is not None:
        body["top_k"] = params.top_k or served.how.all_tokens
    if params.stop and served.how.keeps_stop:
        body |= {"stop": list(params.stop), "include_stop_str_in_output": True}
    return body


def sglang_body(
    prompt: list[int], limit: int, params: SamplingParams, stop_ids: Sequence[int], seed: int | None
) -> dict[str, Any]:
    """What SGLang's `/generate` is asked for."""
    sampling = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "min_p": 0.0,
        "max_new_tokens": limit,
        "stop_token_ids": list(stop_ids),
    }
    if seed is not None:
        sampling["sampling_seed"] = seed
    if params.stop:
        sampling |= {"stop": list(params.stop), "no_stop_trim": True}
    return {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}


def judging_body(served: Served, prompt: list[int], count: int) -> tuple[str, dict[str, Any]]:
    """Path and body that ask for the log-probabilities of a prompt's last `count` tokens."""
    if served.how.judging == "native":
        sampling = {"temperature": 0.0, "max_new_tokens": 0}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        return SGLANG, {**body, "logprob_start_len": len(prompt) - count - 1}
    body = {"prompt": prompt, "temperature": 0.0, **_named(served)}
    if served.how.judging == "prompt":
        return COMPLETIONS, {**body, "max_tokens": 1, "prompt_logprobs": 1}
    return COMPLETIONS, {**body, "max_tokens": 0, "echo": True, "logprobs": 1}


def forcing_body(
    served: Served, prompt: list[int], token: int, prefix_cache: bool
) -> dict[str, Any]:
    """What makes llama.cpp sample a token and say how probable it was."""
    forced = {"max_tokens": 1, "temperature": 0.0, "logprobs": 1, "logit_bias": [[token, _FORCED]]}
    own = {"cache_prompt": prefix_cache, "prompt": prompt, "model": served.model}
    return {**_NEUTRAL, **own, **forced}


def _named(served: Served) -> dict[str, Any]:
    return {} if served.model is None else {"model": served.model}


def read_served(data: Any, wanted: str | None, engine: str | None) -> Served:
    """What `/v1/models` says of a model, or of the only one there."""
    entries = _list(data, "data")
    names = [str(_field(entry, "id")) for entry in entries]
    if not names:
        raise ValueError("expected at least one model, got none")
    if wanted is None and len(names) > 1:
        raise ValueError(f"expected one model, got {names}; choose one of them with model=")
    entry = entries[names.index(wanted) if wanted in names else 0]
    meta = entry.get("meta") or {}
    return Served(
        names[0] if wanted is None else wanted,
        engine or str(entry.get("owned_by") or "").lower(),
        _count(entry.get("max_model_len") or meta.get("n_ctx")) or None,
        _count(meta.get("n_params")) or None,
    )


def read_answers(data: Any, count: int = 1) -> tuple[list[Answer], Bill]:
    """The answers of completions, of chats, or of SGLang's `/generate`, and what is billed."""
    if isinstance(data, dict) and "meta_info" in data:
        usage = data["meta_info"]
        answers = [_sglang_answer(data)]
    else:
        answers = [_openai_answer(choice) for choice in _choices(data, count)]
        usage = data.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens", usage.get("cached_tokens"))
    counts = (usage.get("prompt_tokens"), cached, usage.get("completion_tokens"))
    return answers, Bill(*map(_count, counts))


def read_judged(
    served: Served, data: Any, length: int, ids: Sequence[int]
) -> tuple[float, ...] | None:
    """The log-probabilities of the last tokens of a prompt; None where they are not echoed."""
    if served.how.judging == "native":
        last = _list(_field(data, "meta_info"), "input_token_logprobs")[-len(ids) :]
        if [triple[1] for triple in last] != list(ids):
            raise ValueError(f"expected log-probabilities that end with those of {ids}, got {last}")
        return _logprobs([triple[0] for triple in last])
    [choice] = _choices(data, 1)
    if served.how.judging == "prompt":
        rows = _list(choice, "prompt_logprobs")
        if len(rows) <= len(ids):
            raise ValueError(f"expected more than {len(ids)} prompt_logprobs, got {len(rows)}")
        pairs = zip(ids, rows[-len(ids) :], strict=True)
        return _logprobs([_field(_field(row, str(token)), "logprob") for token, row in pairs])
    found = (choice.get("logprobs") or {}).get("token_logprobs")
    return None if found is None or len(found) != length else _logprobs(found[-len(ids) :])


def _sglang_answer(data: dict[str, Any]) -> Answer:
    meta = data["meta_info"]
    finish, triples = meta.get("finish_reason") or {}, meta.get("output_token_logprobs")
    logprobs = None if triples is None else [triple[0] for triple in triples]
    ids, (reason, matched) = _field(data, "output_ids"), map(finish.get, ("type", "matched"))
    return _answer(ids, logprobs, data.get("text"), reason, matched)


def _openai_answer(choice: dict[str, Any]) -> Answer:
    logs = choice.get("logprobs") or {}
    tokens: list[Any] | None = None
    found: list[Any] | None = None
    # Ids and log-probabilities are listed in the new form or in the old one.
    if logs.get("content") is not None:
        entries = _list(logs, "content")
        tokens = [e["id"] if "id" in e else _placeholder(e.get("token")) for e in entries]
        found = [_field(entry, "logprob") for entry in entries]
    elif logs.get("token_logprobs") is not None:
        tokens = [_placeholder(token) for token in logs.get("tokens") or []]
        found = _list(logs, "token_logprobs")
    if tokens is not None and (None in tokens or len(tokens) != len(found or ())):
        tokens = None
    ids, matched = choice.get("token_ids"), choice.get("stop_reason")
    return _answer(
        tokens if ids is None else ids,
        found,
        (choice.get("message") or choice).get("content" if "message" in choice else "text"),
        choice.get("finish_reason"),
        choice.get("matched_stop") if matched is None else matched,
    )


def _placeholder(token: Any) -> int | None:
    """The id in `token_id:123`, as vLLM writes a token when asked for ids."""
    prefix, _, digits = str(token).rpartition(":")
    return int(digits) if prefix == "token_id" and digits.isdecimal() else None


def _answer(ids: Any, logprobs: list[Any] | None, text: Any, reason: Any, matched: Any) -> Answer:
    # Ends that a server's own trouble made; the same request may be answered the next time.
    if reason in ("abort", "error"):
        raise AbortedError(f"the server gave up (finish_reason {reason!r})")
    if ids is None and not isinstance(text, str):
        raise ValueError(f"expected token ids or text, got {text!r}")
    if ids is not None:
        if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
            raise ValueError(f"expected token ids, got {str(ids)[:200]}")
        if logprobs is not None and len(logprobs) != len(ids):
            raise ValueError(
                f"expected one log-probability a token ({len(ids)}), got {len(logprobs)}"
            )
    checked = None if logprobs is None else _logprobs(logprobs)
    text = text if isinstance(text, str) else ""
    return Answer(None if ids is None else tuple(ids), checked, text, reason, matched)


def _logprobs(values: Sequence[Any]) -> tuple[float, ...]:
    for value in values:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # NaN and -inf are no log-probabilities either.
        if not (is_number and -math.inf < value <= _ROUNDING):
            raise ValueError(f"expected a finite log-probability of at most 0, got {value!r}")
    return tuple(float(value) for value in values)


def _choices(data: Any, count: int) -> list[dict[str, Any]]:
    choices = _list(data, "choices")
    if not choices:
        raise AbortedError("an answer without choices")
    if len(choices) != count or not all(isinstance(choice, dict) for choice in choices):
        expected = "one choice" if count == 1 else f"{count} choices"
        raise ValueError(f"expected {expected}, got {len(choices)}")
    return sorted(choices, key=lambda choice: choice.get("index") or 0)


def _field(data: Any, name: str) -> Any:
    if not isinstance(data, dict) or name not in data:
        raise ValueError(f"expected the field {name!r}, got {str(data)[:200]}")
    return data[name]


def _list(data: Any, name: str) -> list[Any]:
    value = _field(data, name)
    if not isinstance(value, list):
        raise ValueError(f"expected a list for {name}, got {str(value)[:200]}")
    return value


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None

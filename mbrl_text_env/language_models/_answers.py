"""What servers answer, read into one form: OpenAI's with each engine's additions, and SGLang's.

Every function raises `ValueError` with what was expected and what came (the caller adds where
from), or `AbortedError` where asking again may help.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Ends that a server's own trouble made; the same request may be answered the next time.
_ABORTED = frozenset({"abort", "error"})
# Log-probabilities are rounded: a certain token may come out a hair above 0.
_ROUNDING = 1e-6


class AbortedError(Exception):
    """An answer that was given up by the server; the next attempt may pass."""


@dataclass(frozen=True)
class Served:
    """What a server says about its model.

    Args:
        model: Name to ask for it by; None where it does not say.
        engine: `"vllm"`, `"sglang"`, `"llamacpp"`, another owner, or an empty string.
        context_length: Most tokens of prompt and response together.
        num_parameters: Of the model.
    """

    model: str | None = None
    engine: str = ""
    context_length: int | None = None
    num_parameters: int | None = None


@dataclass(frozen=True)
class Answer:
    """Tokens that a server sampled.

    Args:
        token_ids: None where it gives text alone.
        logprobs: float[n], one (nats) a token; None where they are not given.
        text: The text.
        reason: Why it ended: `"stop"`, `"length"`, or a word of the server's own.
        matched: The stop token's id or the stop string that ended it, where that is said.
        cached_tokens: Prefix tokens that the server did not have to compute, where it says so.
        generated_tokens: Tokens that it counts, where it does.
    """

    token_ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    text: str
    reason: str | None
    matched: int | str | None
    cached_tokens: int | None
    generated_tokens: int | None


def served(data: Any, wanted: str | None) -> Served:
    """What `/v1/models` says of a model, or of the only one there."""
    entries = _list(_field(data, "data", "the list of models"), "the list of models")
    names = [str(_field(entry, "id", "a model")) for entry in entries]
    if not names:
        raise ValueError("expected at least one model, got none")
    if wanted is None and len(names) > 1:
        raise ValueError(f"expected one model, got {names}; choose one of them with model=")
    entry = entries[names.index(wanted) if wanted in names else 0]
    meta = entry.get("meta") or {}
    return Served(
        model=names[0] if wanted is None else wanted,
        engine=str(entry.get("owned_by") or "").lower(),
        context_length=_positive(entry.get("max_model_len") or meta.get("n_ctx")),
        num_parameters=_positive(meta.get("n_params")),
    )


def completion(data: Any) -> Answer:
    """The answer of `/v1/completions`."""
    choice = _choice(data)
    return _openai_answer(data, choice, choice.get("text"))


def chat(data: Any) -> Answer:
    """The answer of `/v1/chat/completions`."""
    choice = _choice(data)
    message = _field(choice, "message", "the choice")
    return _openai_answer(data, choice, message.get("content") if message else None)


def sglang(data: Any) -> Answer:
    """The answer of SGLang's `/generate`."""
    meta = _field(data, "meta_info", "the answer")
    finish = meta.get("finish_reason") or {}
    triples = meta.get("output_token_logprobs")
    ids = _field(data, "output_ids", "the answer")
    logprobs = None if triples is None else [triple[0] for triple in _list(triples, "logprobs")]
    return _answer(
        ids,
        logprobs,
        text=data.get("text"),
        reason=finish.get("type"),
        matched=finish.get("matched"),
        cached_tokens=meta.get("cached_tokens"),
        generated_tokens=meta.get("completion_tokens"),
    )


def sglang_logprobs(data: Any, ids: Sequence[int]) -> tuple[float, ...]:
    """The log-probabilities of a prompt's last tokens."""
    meta = _field(data, "meta_info", "the answer")
    triples = _list(_field(meta, "input_token_logprobs", "meta_info"), "input_token_logprobs")
    last = triples[len(triples) - len(ids) :] if len(triples) >= len(ids) else []
    if [triple[1] for triple in last] != list(ids):
        raise ValueError(f"expected log-probabilities that end with those of {ids}, got {last}")
    return _logprobs([triple[0] for triple in last])


def prompt_logprobs(data: Any, ids: Sequence[int]) -> tuple[float, ...]:
    """The log-probabilities of a prompt's last tokens, as vLLM's `prompt_logprobs` gives them."""
    rows = _list(_field(_choice(data), "prompt_logprobs", "the choice"), "prompt_logprobs")
    if len(rows) <= len(ids):
        raise ValueError(f"expected more than {len(ids)} prompt_logprobs, got {len(rows)}")
    found = []
    for token, row in zip(ids, rows[len(rows) - len(ids) :], strict=True):
        entry = _field(row, str(token), "prompt_logprobs")
        found.append(_field(entry, "logprob", "prompt_logprobs"))
    return _logprobs(found)


def echoed_logprobs(data: Any, length: int, count: int) -> tuple[float, ...] | None:
    """The log-probabilities of the last `count` of `length` prompt tokens that were echoed.

    Returns:
        None where the server does not echo them.
    """
    logs = _choice(data).get("logprobs") or {}
    found = logs.get("token_logprobs")
    if found is None or len(found) != length:
        return None
    return _logprobs(found[length - count :])


def _openai_answer(data: Any, choice: dict[str, Any], text: Any) -> Answer:
    usage = data.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    listed, logprobs = _listed(choice.get("logprobs") or {})
    ids = choice.get("token_ids")
    matched = choice.get("stop_reason")
    return _answer(
        listed if ids is None else ids,
        logprobs,
        text=text,
        reason=choice.get("finish_reason"),
        matched=choice.get("matched_stop") if matched is None else matched,
        cached_tokens=details.get("cached_tokens"),
        generated_tokens=usage.get("completion_tokens"),
    )


def _listed(logs: dict[str, Any]) -> tuple[list[Any] | None, list[Any] | None]:
    """Ids and log-probabilities as they are listed with `logprobs`, in the old form or the new."""
    if logs.get("content") is not None:
        entries = _list(logs["content"], "logprobs")
        tokens = [
            entry["id"] if "id" in entry else _placeholder(entry.get("token")) for entry in entries
        ]
        found = [_field(entry, "logprob", "logprobs") for entry in entries]
    elif logs.get("token_logprobs") is not None:
        tokens = [_placeholder(token) for token in logs.get("tokens") or []]
        found = _list(logs["token_logprobs"], "token_logprobs")
    else:
        return None, None
    return (None if None in tokens or len(tokens) != len(found) else tokens), found


def _placeholder(token: Any) -> int | None:
    """The id in `token_id:123`, as vLLM writes a token when asked for ids."""
    prefix, _, digits = str(token).rpartition(":")
    return int(digits) if prefix == "token_id" and digits.isdecimal() else None


def _answer(
    ids: Any,
    logprobs: list[Any] | None,
    *,
    text: Any,
    reason: Any,
    matched: Any,
    cached_tokens: Any,
    generated_tokens: Any,
) -> Answer:
    if reason in _ABORTED:
        raise AbortedError(f"the server gave up (finish_reason {reason!r})")
    if ids is not None:
        ids = tuple(_list(ids, "token ids"))
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"expected token ids, got {ids}")
        if logprobs is not None and len(logprobs) != len(ids):
            raise ValueError(
                f"expected one log-probability a token ({len(ids)}), got {len(logprobs)}"
            )
    elif not isinstance(text, str):
        raise ValueError(f"expected token ids or text, got {text!r}")
    return Answer(
        token_ids=ids,
        logprobs=None if logprobs is None else _logprobs(logprobs),
        text=text if isinstance(text, str) else "",
        reason=reason,
        matched=matched,
        cached_tokens=_count(cached_tokens),
        generated_tokens=_count(generated_tokens),
    )


def _logprobs(values: Sequence[Any]) -> tuple[float, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"expected a log-probability, got {value!r}")
        if not (math.isfinite(value) and value <= _ROUNDING):
            raise ValueError(f"expected a finite log-probability of at most 0, got {value!r}")
    return tuple(float(value) for value in values)


def _choice(data: Any) -> dict[str, Any]:
    choices = _list(_field(data, "choices", "the answer"), "choices")
    if not choices:
        raise AbortedError("an answer without choices")
    if len(choices) != 1 or not isinstance(choices[0], dict):
        raise ValueError(f"expected one choice, got {len(choices)}")
    return choices[0]


def _field(data: Any, name: str, where: str) -> Any:
    if not isinstance(data, dict) or name not in data:
        raise ValueError(f"expected the field {name!r} in {where}, got {str(data)[:200]}")
    return data[name]


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list for {what}, got {str(value)[:200]}")
    return value


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None

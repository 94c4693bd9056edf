"""What servers answer, checked.

Readers raise `ValueError` with what was expected and what came, or `TransientError` where asking
again may help.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mbrl_text_env.language_models._http import TransientError

# Log-probabilities are rounded: a certain token may come out a hair above 0.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Answer:
    """A sample of a server's, None where it does not say; `matched` is the stop that ended it."""

    token_ids: list[int] | None
    logprobs: list[float] | None
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


def read_model(data: Any, wanted: str | None) -> tuple[str, str, int | None, int | None]:
    """Owner, name, context and parameters of a model in `/v1/models`, or of the only one there."""
    entries = list_in(data, "data")
    names = [str(field_of(entry, "id")) for entry in entries]
    if not names:
        raise ValueError("expected at least one model, got none")
    if wanted is None and len(names) > 1:
        raise ValueError(f"expected one model, got {names}; choose one of them with model=")
    entry = entries[names.index(wanted) if wanted in names else 0]
    meta = entry.get("meta") or {}
    return (
        str(entry.get("owned_by") or "").lower(),
        names[0] if wanted is None else wanted,
        _count(entry.get("max_model_len") or meta.get("n_ctx")) or None,
        _count(meta.get("n_params")) or None,
    )


def bill_of(usage: dict[str, Any]) -> Bill:
    """What a server counts for a request."""
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens", usage.get("cached_tokens"))
    counts = (usage.get("prompt_tokens"), cached, usage.get("completion_tokens"))
    return Bill(*map(_count, counts))


def openai_answer(choice: dict[str, Any]) -> Answer:
    """The sample of a completion or a chat; ids and log-probabilities in the new or old form."""
    logs = choice.get("logprobs") or {}
    tokens = found = None
    if logs.get("content") is not None:
        entries = list_in(logs, "content")
        tokens = [e["id"] if "id" in e else _placeholder(e.get("token")) for e in entries]
        found = [field_of(entry, "logprob") for entry in entries]
    elif logs.get("token_logprobs") is not None:
        tokens = [_placeholder(token) for token in logs.get("tokens") or []]
        found = list_in(logs, "token_logprobs")
    if tokens is not None and (None in tokens or len(tokens) != len(found or ())):
        tokens = None
    ids, matched = choice.get("token_ids"), choice.get("stop_reason")
    return checked_answer(
        tokens if ids is None else ids,
        found,
        choice["message"].get("content") if choice.get("message") else choice.get("text"),
        choice.get("finish_reason"),
        choice.get("matched_stop") if matched is None else matched,
    )


def read_next_tokens(data: Any) -> dict[int, float] | None:
    """Log-probabilities of the tokens that may come first; None where their ids are not said."""
    [choice] = choices_of(data, 1)
    logs = choice.get("logprobs") or {}
    if logs.get("content"):
        entries = list_in(logs["content"][0], "top_logprobs")
        found = {e["id"]: field_of(e, "logprob") for e in entries if "id" in e}
    else:
        first = (logs.get("top_logprobs") or [None])[0] or {}
        found = {_placeholder(token): logprob for token, logprob in first.items()}
    if not found or None in found:
        return None
    return dict(zip(found, checked_logprobs(list(found.values())), strict=True))


def checked_answer(
    ids: Any, logprobs: list[Any] | None, text: Any, reason: Any, matched: Any
) -> Answer:
    """A sample, from what a server says."""
    # Ends that a server's own trouble made; the same request may be answered the next time.
    if reason in ("abort", "error"):
        raise TransientError(f"the server gave up (finish_reason {reason!r})")
    if ids is None and not isinstance(text, str):
        raise ValueError(f"expected token ids or text, got {text!r}")
    if ids is not None:
        if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
            raise ValueError(f"expected token ids, got {str(ids)[:200]}")
        if logprobs is not None and len(logprobs) != len(ids):
            raise ValueError(
                f"expected one log-probability a token ({len(ids)}), got {len(logprobs)}"
            )
    checked = None if logprobs is None else checked_logprobs(logprobs)
    return Answer(ids, checked, text if isinstance(text, str) else "", reason, matched)


def checked_logprobs(values: Sequence[Any]) -> list[float]:
    """Log-probabilities, of which NaN and -inf are none."""
    for value in values:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and -math.inf < value <= _ROUNDING):
            raise ValueError(f"expected a finite log-probability of at most 0, got {value!r}")
    return [float(value) for value in values]


def choices_of(data: Any, count: int) -> list[dict[str, Any]]:
    """The samples of an answer in the order of their numbers."""
    choices = list_in(data, "choices")
    if not choices:
        raise TransientError("an answer without choices")
    if len(choices) != count or not all(isinstance(choice, dict) for choice in choices):
        expected = "one choice" if count == 1 else f"{count} choices"
        raise ValueError(f"expected {expected}, got {len(choices)}")
    return sorted(choices, key=lambda choice: choice.get("index") or 0)


def field_of(data: Any, name: str) -> Any:
    """A field that has to be there."""
    if not isinstance(data, dict) or name not in data:
        raise ValueError(f"expected the field {name!r}, got {str(data)[:200]}")
    return data[name]


def list_in(data: Any, name: str) -> list[Any]:
    """A field that has to be a list."""
    value = field_of(data, name)
    if not isinstance(value, list):
        raise ValueError(f"expected a list for {name}, got {str(value)[:200]}")
    return value


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _placeholder(token: Any) -> int | None:
    """The id in `token_id:123`, as vLLM writes a token when asked for ids."""
    prefix, _, digits = str(token).rpartition(":")
    return int(digits) if prefix == "token_id" and digits.isdecimal() else None

"""Rows of tables, tensors and lines of JSON as plain Python values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def plain_values(value: Any) -> Any:
    """A value of a table (Arrow, pandas, NumPy) or a tensor, as plain Python.

    Arrays become lists and their scalars numbers. Of a dict, keys whose value is missing (None, NaN
    or pandas' NA) are left out: tables give every row the keys of all rows. What is none of these
    comes back as it is.

    Example:
        >>> plain_values({"answer": np.int64(4), "hint": None, "tests": np.array(["a", "b"])})
        {'answer': 4, 'tests': ['a', 'b']}
    """
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    # Arrays, tensors and pandas' columns; Arrow's arrays; Arrow's scalars.
    for listing in ("tolist", "to_pylist", "as_py"):
        if hasattr(value, listing):
            return plain_values(getattr(value, listing)())
    if isinstance(value, Mapping):
        rows = ((key, plain_values(inner)) for key, inner in value.items())
        return {key: inner for key, inner in rows if not _is_missing(inner)}
    if isinstance(value, (list, tuple)):
        return [plain_values(inner) for inner in value]
    return value


def _is_missing(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def strict_json_object(
    place: str, text: str, example: str, error: type[Exception]
) -> dict[str, Any]:
    """An object of JSON that every reader takes alike.

    Refused are NaN and infinities, numbers beyond float64, keys that come twice, and halves of
    characters.

    Raises:
        error: It is none; the message begins with `place`.
    """
    try:
        fields = json.loads(
            text,
            parse_constant=refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_repeats,
        )
        # JSON can escape halves of characters, which no tokenizer and no file takes.
        json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as reason:
        raise error(
            f"{place}: expected one JSON object, got {shortened(text)} ({reason}). Fix the line."
        ) from reason
    if not isinstance(fields, dict):
        raise error(
            f"{place}: expected an object such as {example}, got {shortened(text)}. Fix the line."
        )
    return fields


def refuse_constant(name: str) -> Any:
    """For `json.loads(parse_constant=...)`: NaN and infinities are not JSON."""
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is larger than any float64")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name!r} stands there twice")
        fields[name] = value
    return fields


def shortened(text: str, width: int = 80) -> str:
    """A text cut to a width, for messages."""
    return text if len(text) <= width else text[: width - 3] + "..."

"""Dataclasses of figures as files of JSON, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from mbrl_text_env.files import write_text


def write_json(path: Path, values: Any) -> None:
    """Write a file of JSON as a whole."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))


def to_json(values: Any) -> dict[str, Any]:
    """A dataclass as JSON values; text for the numbers that JSON does not have."""
    found: dict[str, Any] = _plain(asdict(values))
    return found


def from_json(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Read `to_json`: lists become tuples, objects the dataclasses that the fields name."""
    hints = get_type_hints(kind)
    return kind(**{name: _read(hints[name], value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read(hint: Any, value: Any) -> Any:
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if isinstance(value, list):
        [item, *_] = get_args(options[0]) or (Any,)
        return tuple(_read(item, each) for each in value)
    for option in options:
        if isinstance(value, Mapping) and isinstance(option, type) and is_dataclass(option):
            return from_json(option, value)
        if isinstance(value, str) and option is float:
            return float(value)
    return value

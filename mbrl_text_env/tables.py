"""Rows of tables and tensors as plain Python values, which JSON can hold."""

from __future__ import annotations

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

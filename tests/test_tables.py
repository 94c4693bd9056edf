"""Rows of tables and tensors as plain values."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from mbrl_text_env.files import plain_values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(4), 4),
        (np.float32(0.5), 0.5),
        (np.str_("a"), "a"),
        (np.bool_(True), True),
        (np.array(["4", "four"], dtype=object), ["4", "four"]),
        (np.array(3), 3),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor(0.5), 0.5),
        (pd.Series(["a", "b"], index=[7, 9]), ["a", "b"]),
        (pa.array([{"a": 1, "b": None}]), [{"a": 1}]),
        (pa.scalar("a"), "a"),
        (({"a": (np.int8(1), None)},), [{"a": [1, None]}]),
        ({"a": None, "b": {"c": None}, "d": float("nan"), "e": pd.NA, "f": pd.NaT}, {"b": {}}),
        ("text", "text"),
        (None, None),
    ],
)
def test_they_are_what_json_can_hold(value, expected):
    found = plain_values(value)
    assert found == expected
    assert json.loads(json.dumps(found)) == expected


def test_what_is_no_table_stays():
    value = object()
    assert plain_values({"a": value}) == {"a": value}

"""What the checkers share."""

import pytest

from mbrl_text_env.checks.base import counted


def test_calls_are_counted_once_and_own_attributes_come_back():
    class Model:
        def __init__(self):
            self.outer = lambda x: self.inner(x) + 1

        def inner(self, x):
            return x

    model, seen = Model(), []
    outer = model.outer
    counters = {name: lambda result, x: seen.append((result, x)) for name in ("outer", "inner")}
    with counted(model, {**counters, "missing": print}):
        assert (model.outer(1), model.inner(5)) == (2, 5)
        with pytest.raises(TypeError):
            model.outer("text")
    assert seen == [(2, 1), (5, 5)]
    assert model.outer is outer
    assert "inner" not in vars(model)

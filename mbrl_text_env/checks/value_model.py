"""The checker of value models."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from mbrl_text_env.checks.base import CheckError, expect, expect_methods
from mbrl_text_env.types import Ledger, TextState, Usage
from mbrl_text_env.values import (
    ValueEstimate,
    expected_value_usage,
    predict_values,
    value_usage_bound,
)

# Sums of floating-point numbers of one batch and of another.
_ROUNDING = 1e-9


def check_value_model(
    value_model: Any, states: Sequence[TextState], *, tolerance: float = 1e-5
) -> None:
    """Check that a value model keeps the contract of `values.ValueModel`.

    Checked are that it is fitted; one finite mean and one finite standard deviation of at least 0
    for each state, the same in every call, whatever the order and the rest of the batch; the empty
    batch; that ledgers change nothing and are each charged what their state takes, never more than
    the bound that a planner sets aside; and that it comes back from a pickle as it was.

    Args:
        value_model: A value model that can predict.
        states: At least two, of the prompts, tokenizer and reward that it is meant for. Prefixes of
            different lengths, an empty one among them, are where faults show.
        tolerance: Most that a prediction may differ with the batch, relative to the largest, or
            absolute below 1.

    Raises:
        CheckError: The contract is broken.
        ValueError: There are fewer than two states.

    Example:
        >>> from mbrl_text_env.types import initial
        >>> prompts = [Prompt.from_text("Hi"), Prompt.from_text("Why?")]  # doctest: +SKIP
        >>> check_value_model(value, [initial(p, lm) for p in prompts])  # doctest: +SKIP
    """
    if len(states) < 2:
        raise ValueError(f"states: expected at least 2, got {len(states)}.")
    name = f"Value model {type(value_model).__name__}"
    expect_methods(value_model, ("predict",), name, "Add it; see `values.ValueModel`.")
    fitted = getattr(value_model, "is_fitted", True)
    change = "Fit it, or load a fitted one, before it is checked."
    expect(fitted is True, f"{name}, is_fitted", "True", fitted, change)
    # The first state comes a second time: what is asked twice in a batch is answered the same.
    trial = _Trial(value_model, name, [*states, states[0]], tolerance)
    estimate = trial.predict(trial.states)
    trial.compare(estimate, trial.predict(trial.states), "the same in a second call")
    backwards = trial.predict(trial.states[::-1])
    turned = ValueEstimate(backwards.mean[::-1], backwards.std[::-1])
    trial.compare(estimate, turned, "values in the order of the states")
    singles = [trial.predict([state]) for state in trial.states]
    alone = ValueEstimate(*np.concatenate([[s.mean, s.std] for s in singles], axis=1))
    trial.compare(
        estimate, alone, "the value that each state has alone, whatever else is in its batch"
    )
    trial.predict([])
    _check_charges(trial, estimate)
    _check_pickle(trial, estimate)


class _Trial:
    """A value model with the states that it is tried on."""

    def __init__(self, model: Any, name: str, states: list[TextState], tolerance: float) -> None:
        self.model, self.name, self.states, self.tolerance = model, name, states, tolerance

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        """Predict, with everything about the form of the answer checked."""
        subject, count = f"{self.name}, predict", len(states)
        estimate = self.called(self.model.predict, subject, states)
        # An array has a `mean` and a `std` too, but they are methods.
        parts = [getattr(estimate, label, None) for label in ("mean", "std")]
        expect(
            all(part is not None and not callable(part) for part in parts),
            subject,
            "a `values.ValueEstimate`",
            estimate,
            "Return one, with a mean and a standard deviation.",
        )
        mean, std = map(np.asarray, parts)
        for label, values in (("mean", mean), ("std", std)):
            expect(
                values.shape == (count,) and values.dtype.kind == "f",
                f"{subject}, {label}",
                f"float64[{count}], one for each state",
                f"{values.dtype}{list(values.shape)}",
                "Return arrays of floats in the order of the states.",
            )
            change = "Decide what such a state is worth."
            expect(
                np.isfinite(values).all(), f"{subject}, {label}", "finite numbers", values, change
            )
        change = "Return 0 where nothing is uncertain."
        expect(
            (std >= 0).all(), f"{subject}, std", "standard deviations of at least 0", std, change
        )
        return ValueEstimate(mean, std)

    def called(
        self, function: Callable[..., Any], subject: str, states: Sequence[TextState]
    ) -> Any:
        """Call the model; an error of its own is a fault, and so is a changed list."""
        given, failure, estimate = list(states), None, None
        try:
            estimate = function(given)
        except Exception as error:
            failure = error
        # First, for it may be why the call failed.
        expect(
            given == list(states),
            subject,
            "that the list of states is left as it is",
            "a changed list",
            "Work on a copy: planners go on using the list that they pass.",
        )
        if failure is not None:
            reason = f"{type(failure).__name__}: {failure}".rstrip(". ")
            raise CheckError(
                f"{subject}: expected values of {len(states)} states, got {reason}. Every state of "
                "a prompt that the model is meant for has a value, an empty batch too."
            ) from failure
        return estimate

    def compare(self, one: ValueEstimate, other: ValueEstimate, expected: str) -> None:
        """Report a fault unless two estimates agree."""
        for label, a, b in (("mean", one.mean, other.mean), ("std", one.std, other.std)):
            most = self.tolerance * max(1.0, float(np.abs(a).max()))
            for i in np.flatnonzero(np.abs(a - b) > most):
                raise CheckError(
                    f"{self.name}, predict, {label}: expected {expected}, got {a[i]:g} and "
                    f"{b[i]:g} for a prefix of prompt {self.states[i].prompt.id!r}. A value is a "
                    "function of its state alone: draw random numbers from a seed and the state, "
                    "keep nothing between calls, and mask the padding."
                )


def _check_charges(trial: _Trial, estimate: ValueEstimate) -> None:
    model, states = trial.model, trial.states
    ledgers = [Ledger() for _ in states]
    subject = f"{trial.name}, ledgers"
    charged = trial.called(
        lambda some: predict_values(model, some, ledgers=ledgers), subject, states
    )
    trial.compare(estimate, charged, "the same values with ledgers as without")
    for state, ledger in zip(states, ledgers, strict=True):
        bound = value_usage_bound(model, state)
        _check_amounts(subject, state, ledger.usage, bound)
        expected = expected_value_usage(model, state)
        _check_amounts(f"{trial.name}, expected_usage", state, expected, bound)


def _check_amounts(subject: str, state: TextState, usage: Usage, bound: Usage) -> None:
    expect(
        usage.value_calls == 1,
        subject,
        "one value call a state",
        usage,
        "`values.predict_values` counts it; `predict_with` charges other models' calls alone.",
    )
    for f in fields(Usage):
        # What is read from a cache costs nothing, and nobody can say beforehand how long it takes.
        if f.name in ("seconds", "cached_tokens"):
            continue
        amount, most = getattr(usage, f.name), getattr(bound, f.name)
        expect(
            0 <= amount <= most * (1 + _ROUNDING),
            f"{subject}, {f.name}",
            f"0 to {most:g}, the bound for a prefix of {len(state.response_ids)} tokens",
            f"{amount:g}",
            "Budgets rely on `usage_bound` and `flops_bound` being the most that is charged.",
        )


def _check_pickle(trial: _Trial, estimate: ValueEstimate) -> None:
    subject = f"{trial.name}, pickle"
    try:
        again = pickle.loads(pickle.dumps(trial.model))  # noqa: S301, it was made here
    except Exception as error:
        raise CheckError(
            f"{subject}: expected an object that can be pickled, got {type(error).__name__}: "
            f"{error}. Environments in other processes need it: drop what cannot be copied in "
            "`__getstate__`, and define the class in a module."
        ) from error
    copied = _Trial(again, trial.name, trial.states, trial.tolerance)
    copied.compare(estimate, copied.predict(trial.states), "the same values from a pickled copy")

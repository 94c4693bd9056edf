"""The interface of value models: the expected final reward of a prefix, with uncertainty."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mbrl_text_env.rewards.base import reward_name
from mbrl_text_env.types import FloatArray, Ledgers, TextState, Usage, timed

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Default prefix lengths, in tokens, for fitting and checking value models."""


class ValueModelError(RuntimeError):
    """A value model is not fitted, or returned missing or non-finite values."""


@dataclass(frozen=True)
class ValueEstimate:
    """The expected final reward of prefixes and its standard deviation, each float64[B].

    A subclass can add arrays of B rows; a search records them in its tree (`Node.details`).
    """

    mean: FloatArray
    std: FloatArray

    @property
    def details(self) -> dict[str, Any]:
        """The arrays that a subclass adds, by name."""
        return {name: rows for name, rows in vars(self).items() if name not in ("mean", "std")}


class ValueModel(ABC):
    """Predicts the final reward of a prefix; everything except `predict` has a default.

    Any object with `predict` can be used as a value model. If it has other attributes or methods
    of this class, they are used too.

    Attributes:
        reward_name_: The reward whose scores it predicts; None if unknown.
        language_model_name_: The language model that wrote the responses; None if unknown.
        lengths: Prefix lengths, in tokens, that it supports.

    Example:
        >>> class Length(ValueModel):
        ...     def predict(self, states):
        ...         sizes = np.array([float(len(state.response_ids)) for state in states])
        ...         return ValueEstimate(sizes, np.ones(len(states)))
    """

    reward_name_: str | None = None
    language_model_name_: str | None = None
    lengths: Sequence[int] = LENGTHS

    @property
    def is_fitted(self) -> bool:
        """Whether `predict` can be called."""
        return True

    @abstractmethod
    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        """Mean and standard deviation, each float64[len(states)]; charges nothing."""

    def predict_with(self, states: Sequence[TextState], ledgers: Ledgers) -> ValueEstimate:
        """Like `predict`, but charge calls of other models to the ledgers (one per state)."""
        return self.predict(states)

    def flops(self, states: Sequence[TextState]) -> FloatArray:
        """Floating-point operations of the model itself, float64[B]."""
        return np.zeros(len(states))

    def flops_bound(self) -> float:
        """An upper bound on `flops` for one state."""
        return 0.0

    def usage_bound(self, state: TextState) -> Usage:
        """An upper bound on the cost of other models' calls for a state of this length."""
        return Usage()

    def expected_usage(self, state: TextState) -> Usage:
        """The expected cost of other models' calls for the state."""
        return self.usage_bound(state)


class _Adapted(ValueModel):
    """Wraps an object that is not a `ValueModel`; its attributes replace the defaults."""

    def __init__(self, model: Any) -> None:
        self.model = model
        for name in vars(ValueModel):
            found = None if name.startswith("_") else getattr(model, name, None)
            if found is not None and name != "is_fitted":
                setattr(self, name, found)

    @property
    def is_fitted(self) -> bool:
        return bool(getattr(self.model, "is_fitted", True))

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        raise ValueModelError(
            f"Expected a value model, an object with `predict(states)`, got "
            f"{type(self.model).__name__}. Subclass `mbrl_text_env.values.ValueModel`."
        )


def as_value_model(value_model: Any) -> ValueModel:
    """Return a `ValueModel` as is, or wrap another object with `predict`."""
    return value_model if isinstance(value_model, ValueModel) else _Adapted(value_model)


def predict_values(
    value_model: ValueModel, states: Sequence[TextState], *, ledgers: Ledgers = None
) -> ValueEstimate:
    """Predict values and charge the ledgers (one per state).

    Raises:
        ValueModelError: The model is not fitted, or a value is missing or not finite.
    """
    name, model = type(value_model).__name__, as_value_model(value_model)
    if not model.is_fitted:
        raise ValueModelError(f"{name} is not fitted. Call fit(records), or load a saved one.")
    with timed(ledgers):
        try:
            estimate = model.predict_with(states, ledgers)
        except SystemExit as left:
            raise ValueModelError(
                f"{name}: predicting for prompt {states[0].prompt.id!r} left the program "
                f"(SystemExit: {left})."
            ) from left
    mean, std = np.asarray(estimate.mean, float), np.asarray(estimate.std, float)
    for label, values in (("mean", mean), ("std", std)):
        if values.shape != (len(states),) or not np.isfinite(values).all():
            raise ValueModelError(
                f"{name}: expected a finite {label} for each of {len(states)} states, got shape "
                f"{values.shape} with {int((~np.isfinite(values)).sum())} that are not finite."
            )
    if (std < 0).any():
        raise ValueModelError(f"{name}: expected standard deviations of at least 0, got {std}.")
    if ledgers is not None:
        for ledger, amount in zip(ledgers, np.asarray(model.flops(states), float), strict=True):
            ledger.charge(Usage(value_calls=1, value_flops=float(amount)))
    if isinstance(estimate, ValueEstimate):
        return replace(estimate, mean=mean, std=std)
    return ValueEstimate(mean, std)


def value_usage_bound(value_model: ValueModel, state: TextState) -> Usage:
    """An upper bound on the cost of predicting `state`, or another state of its length."""
    model = as_value_model(value_model)
    return Usage(value_calls=1, value_flops=float(model.flops_bound())) + model.usage_bound(state)


def expected_value_usage(value_model: ValueModel, state: TextState) -> Usage:
    """The expected cost of predicting `state`, for planning a search."""
    model = as_value_model(value_model)
    own = Usage(value_calls=1, value_flops=float(model.flops([state])[0]))
    return own + model.expected_usage(state)


def check_value_fits(value_model: Any, language_model: Any, reward_model: object) -> None:
    """Raise a ValueModelError if the value model was fitted for another reward or language model.

    A `reward_name_` or `language_model_name_` of None is not checked.
    """
    model = as_value_model(value_model)
    # A tokenizer alone has no name, and nothing to compare.
    found = {
        "reward": (model.reward_name_, reward_name(reward_model)),
        "language_model": (model.language_model_name_, getattr(language_model, "name", None)),
    }
    for part, (expected, got) in found.items():
        if expected is not None and got is not None and expected != got:
            raise ValueModelError(
                f"{type(value_model).__name__} was fitted for the {part.replace('_', ' ')} "
                f"{expected!r}, got {got!r}. Use that one; or re-score or collect records with "
                f"this one and fit anew; or set `{part}_name_` to None, if it is to be used all "
                "the same."
            )

"""The value model's contract: the expected final reward of a prefix, with its uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mbrl_text_env.ledger import Ledger, Usage, timed
from mbrl_text_env.rewards.base import reward_name
from mbrl_text_env.types import FloatArray, TextState


class ValueModelError(RuntimeError):
    """A value model is not fitted, or returned something else than finite values."""


@dataclass(frozen=True)
class ValueEstimate:
    """The expected final reward of each prefix, with its uncertainty.

    Args:
        mean: float64[B].
        std: float64[B], standard deviation of the final reward around `mean`.
    """

    mean: FloatArray
    std: FloatArray


@runtime_checkable
class ValueModel(Protocol):
    """Predicts the final reward of a prefix.

    Optional, for a model whose own computation is to be counted: `flops(states) -> float64[B]` and
    `flops_bound() -> float`, the most that one state can take. For a model that asks other models
    (a reward model, a language model): `predict_with(states, ledgers) -> ValueEstimate`, which
    charges what it asks for to the ledgers (one a state, or None), `usage_bound(state) -> Usage`,
    the most that one state is charged for that, and `expected_usage(state) -> Usage`, about what.
    A model that learns also has `fit(records)`.
    """

    @property
    def is_fitted(self) -> bool:
        """Whether `predict` can be called."""
        ...

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        """Mean and standard deviation, each float64[len(states)]."""
        ...


def predict_values(
    value_model: ValueModel,
    states: Sequence[TextState],
    *,
    ledgers: Sequence[Ledger] | None = None,
) -> ValueEstimate:
    """Predict, check the values, and charge the ledgers (one a state).

    Raises:
        ValueModelError: The model is not fitted, or did not return one finite mean and one finite
            standard deviation of at least 0 for each state.
    """
    name = type(value_model).__name__
    if not value_model.is_fitted:
        raise ValueModelError(f"{name} is not fitted. Call fit(records), or load a saved one.")
    asks_others = getattr(value_model, "predict_with", None)
    with timed(ledgers):
        try:
            if asks_others is not None:
                estimate = asks_others(states, ledgers)
            else:
                estimate = value_model.predict(states)
        except SystemExit as left:
            raise ValueModelError(
                f"{name}: predicting for prompt {states[0].prompt.id!r} left the program "
                f"(SystemExit: {left}). A value model returns numbers or raises an error."
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
        for ledger, amount in zip(ledgers, _flops(value_model, states), strict=True):
            ledger.charge(Usage(value_calls=1, value_flops=float(amount)))
    return ValueEstimate(mean, std)


def value_usage_bound(value_model: ValueModel, state: TextState) -> Usage:
    """The most that predicting `state`, or one with as many tokens, is charged."""
    own: Callable[[], float] | None = getattr(value_model, "flops_bound", None)
    asked: Callable[[TextState], Usage] | None = getattr(value_model, "usage_bound", None)
    usage = Usage(value_calls=1, value_flops=0.0 if own is None else float(own()))
    return usage if asked is None else usage + asked(state)


def expected_value_usage(value_model: ValueModel, state: TextState) -> Usage:
    """About what predicting `state` is charged: for plans, where a bound would be too careful."""
    asked: Callable[[TextState], Usage] | None = getattr(value_model, "expected_usage", None)
    usage = Usage(value_calls=1, value_flops=float(_flops(value_model, [state])[0]))
    return usage if asked is None else usage + asked(state)


def _flops(value_model: Any, states: Sequence[TextState]) -> FloatArray:
    function = getattr(value_model, "flops", None)
    return np.zeros(len(states)) if function is None else np.asarray(function(states), float)


def check_value_fits(value_model: object, language_model: object, reward_model: object) -> None:
    """Refuse a value model that was fitted on scores or responses of other models.

    What a value model was fitted on it says as `reward_name_` and `language_model_name_`; one that
    lacks these, or has None there, passes: its author has to know.

    Raises:
        ValueModelError: It belongs to another reward model or another language model.

    Example:
        >>> check_value_fits(value, lm, SentimentReward())  # doctest: +SKIP
    """
    for label, attribute, got, change in (
        ("reward model", "reward_name_", reward_name(reward_model), "re-score the records"),
        ("language model", "language_model_name_", _name(language_model), "collect records"),
    ):
        expected = getattr(value_model, attribute, None)
        if expected is not None and got is not None and expected != got:
            raise ValueModelError(
                f"{type(value_model).__name__} was fitted for the {label} {expected!r}, got "
                f"{got!r}: it would predict something else. Use that {label}, or {change} with "
                f"this one and fit a value model anew; or set `{attribute}` to None, if it is to "
                "be used all the same."
            )


def _name(model: object) -> str | None:
    """A tokenizer alone has no name, and nothing to compare."""
    return getattr(model, "name", None)

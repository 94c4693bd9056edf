"""How good a value model is on prompts that it was not fitted on.

Rows of one prompt are never divided: responses to a prompt resemble each other, and a model that
has seen some of them would seem better than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from mbrl_text_env.agents.values.prefixes import IntArray, Samples
from mbrl_text_env.types import FloatArray

_FOLDS = 5
# Rows that a standard deviation, or a line, is estimated from; lengths with fewer are pooled.
_LEAST_ROWS = 20
_TINY = 1e-12


class Head(Protocol):
    """The cheap last part of a value model: from its inputs to the mean."""

    def predict(self, inputs: FloatArray) -> FloatArray:
        """float64[B] for float64[B, d]."""
        ...


Fitter = Callable[[Samples], Head]
"""Fits a head; calls no paid model."""


@dataclass(frozen=True)
class LengthReport:
    """The part of a `FitReport` for prefixes of one length.

    Args:
        length: Tokens of the prefixes.
        num_prefixes: Prefixes of that length.
        correlation, within_prompt, std: As in `FitReport`.
    """

    length: int
    num_prefixes: int
    correlation: float
    within_prompt: float
    std: float


@dataclass(frozen=True)
class FitReport:
    """How well a value model predicts responses to prompts that it was not fitted on.

    Args:
        num_records: Records used.
        num_prompts: Different prompts among them.
        correlation: Pearson correlation of prediction and final reward over all prefixes.
        within_prompt: The same after the mean of each prompt's prefixes of one length is taken off
            both: what a choice among partial responses to one prompt can use. NaN where no prompt
            has two different scores.
        std: Root mean square of the prediction's error.
        num_prefixes: Prefixes used.
        within_one_std: Share of the errors that are within one predicted standard deviation; 0.68
            if they are normal and the standard deviation is right.
        within_two_std: The same for two; 0.95.
        z_std: Root mean square of the errors in units of the predicted standard deviation; 1 if
            that is right, above 1 if it is too small.
        by_length: The same figures for each prefix length; empty where prefixes are not cut by
            tokens.

    All figures are NaN, and `std` is that of the scores, where there is only one prompt.
    """

    num_records: int
    num_prompts: int
    correlation: float
    within_prompt: float
    std: float
    num_prefixes: int = 0
    within_one_std: float = float("nan")
    within_two_std: float = float("nan")
    z_std: float = float("nan")
    by_length: tuple[LengthReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values; None for NaN, which JSON does not have."""
        plain = _without_nan(asdict(self))
        return {**plain, "by_length": [_without_nan(row) for row in plain["by_length"]]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FitReport:
        """Read `to_dict`.

        Raises:
            KeyError, TypeError: It is something else.
        """
        rows = tuple(LengthReport(**_with_nan(row)) for row in values["by_length"])
        return cls(**{**_with_nan(values), "by_length": rows})

    def __eq__(self, other: object) -> bool:
        # Two reports that lack the same figure are equal, though NaN is not.
        return isinstance(other, FitReport) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.num_records, self.num_prompts, self.num_prefixes))


@dataclass(frozen=True)
class Spread:
    """A standard deviation that depends on the prefix's length.

    Args:
        knots: float64[K], lengths in tokens, increasing.
        stds: float64[K]; in between it is interpolated, outside it is that of the nearest.
    """

    knots: FloatArray
    stds: FloatArray

    @classmethod
    def fit(cls, errors: FloatArray, lengths: IntArray) -> Spread:
        """Root mean square of errors by length."""
        bins = length_bins(lengths)
        return cls(
            np.asarray([lengths[rows].mean() for rows in bins], dtype=np.float64),
            np.asarray([root_mean_square(errors[rows]) for rows in bins]),
        )

    def at(self, lengths: Any) -> FloatArray:
        """float64[B] for int[B]."""
        return np.interp(np.asarray(lengths, dtype=np.float64), self.knots, self.stds)


@dataclass(frozen=True)
class HeldOut:
    """Predictions for each prompt from heads that were fitted on others.

    Args:
        mean: float64[N].
        folds: int64[N], the part of the data in which each row was left out.
    """

    mean: FloatArray
    folds: IntArray


def held_out(fitter: Fitter, samples: Samples) -> HeldOut | None:
    """Predict each prompt's rows from the other prompts'; None where there is only one prompt."""
    from sklearn.model_selection import GroupKFold

    if samples.num_prompts < 2:
        return None
    mean, folds = np.zeros(len(samples)), np.zeros(len(samples), dtype=np.int64)
    splits = GroupKFold(n_splits=min(_FOLDS, samples.num_prompts))
    for fold, (rest, left_out) in enumerate(splits.split(samples.inputs, groups=samples.groups)):
        head = fitter(samples.rows(rest))
        mean[left_out] = head.predict(samples.inputs[left_out])
        folds[left_out] = fold
    return HeldOut(mean, folds)


def choose(fitters: Mapping[str, Fitter], samples: Samples) -> tuple[str, HeldOut | None]:
    """The name of the fitter that ranks best within prompts left out, and its predictions.

    Search chooses among partial responses to one prompt, so the correlation within a prompt
    decides, where there is one; otherwise the squared error. It decides too where all are further
    off than the mean score would be: what they then rank by is chance. The first of equals is
    taken.
    """
    found = {name: held_out(fitter, samples) for name, fitter in fitters.items()}

    def merit(name: str) -> tuple[bool, float, float]:
        guess = found[name]
        if guess is None:
            return False, 0.0, 0.0
        within = within_prompt(guess.mean, samples)
        error = root_mean_square(guess.mean - samples.scores)
        if error > np.std(samples.scores):
            return False, -error, 0.0
        return True, (-1.0 if np.isnan(within) else within), -error

    best = max(fitters, key=merit)
    return best, found[best]


def cross_spread(guess: HeldOut, samples: Samples) -> FloatArray:
    """float64[N]: the standard deviation of each row by the errors of the other parts' rows."""
    errors = guess.mean - samples.scores
    stds = np.zeros(len(samples))
    for fold in np.unique(guess.folds):
        own = guess.folds == fold
        stds[own] = Spread.fit(errors[~own], samples.lengths[~own]).at(samples.lengths[own])
    return stds


def report(
    mean: FloatArray | None, std: FloatArray | None, samples: Samples, num_records: int
) -> FitReport:
    """Compare held-out predictions with the scores; None where there could be none."""
    sizes = num_records, samples.num_prompts
    if mean is None or std is None:
        nan = float("nan")
        return FitReport(*sizes, nan, nan, float(np.std(samples.scores)), len(samples))
    errors = mean - samples.scores
    # A standard deviation of 0 with an error of 0 is right.
    z = np.abs(errors) / np.maximum(std, _TINY)
    return FitReport(
        *sizes,
        correlation(mean, samples.scores),
        within_prompt(mean, samples),
        root_mean_square(errors),
        len(samples),
        float((z <= 1).mean()),
        float((z <= 2).mean()),
        root_mean_square(z),
        _by_length(mean, samples),
    )


def _by_length(mean: FloatArray, samples: Samples) -> tuple[LengthReport, ...]:
    if not samples.lengths.any():
        return ()
    rows = []
    for length in np.unique(samples.lengths):
        which = samples.lengths == length
        some, guess = samples.rows(which), mean[which]
        rows.append(
            LengthReport(
                int(length),
                len(some),
                correlation(guess, some.scores),
                within_prompt(guess, some),
                root_mean_square(guess - some.scores),
            )
        )
    return tuple(rows)


def within_prompt(mean: FloatArray, samples: Samples) -> float:
    """Correlation after each prompt's and length's mean is taken off; NaN where nothing is left."""
    cells = np.stack([samples.groups, samples.lengths])
    _, index = np.unique(cells, axis=1, return_inverse=True)
    index = index.reshape(-1)  # NumPy 2.0 gave it another shape
    counts = np.bincount(index)
    centred = []
    for values in (mean, samples.scores):
        rest = values - (np.bincount(index, values) / counts)[index]
        # What rounding leaves of equal values is nothing.
        centred.append(np.where(np.abs(rest) <= _TINY * np.abs(values).max(), 0.0, rest))
    return correlation(*centred)


def correlation(a: FloatArray, b: FloatArray) -> float:
    """Pearson correlation; NaN where one of the two does not vary."""
    if len(a) < 2 or any(np.ptp(v) <= _TINY * np.abs(v).max() for v in (a, b)):
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def root_mean_square(values: FloatArray) -> float:
    """The root of the mean of the squares."""
    return float(np.sqrt(np.mean(np.square(values))))


def length_bins(lengths: IntArray, least: int = _LEAST_ROWS) -> list[IntArray]:
    """Row indices by length, neighbouring lengths together where one has too few rows."""
    order = np.argsort(lengths, kind="stable")
    bins: list[IntArray] = []
    for length in np.unique(lengths):
        rows = order[lengths[order] == length]
        if bins and len(bins[-1]) < least:
            bins[-1] = np.concatenate([bins[-1], rows])
        else:
            bins.append(rows)
    if len(bins) > 1 and len(bins[-1]) < least:
        last = bins.pop()
        bins[-1] = np.concatenate([bins[-1], last])
    return bins


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and np.isnan(v) else v for name, v in values.items()}


def _with_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float("nan") if v is None else v for name, v in values.items()}

"""Regression heads that scikit-learn does not provide, and the selection of the best head.

A head is a scikit-learn estimator with `fit(inputs, scores)` and `predict(inputs)`. It does not
call other models, so it can be fitted many times on features that were computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mbrl_text_env.fitting.report import IntArray, Samples, root_mean_square, within_prompt
from mbrl_text_env.types import FloatArray

Head = Any
"""A scikit-learn estimator or `Pipeline`."""

_FOLDS = 5
# Minimum rows to estimate a standard deviation or a line; lengths with fewer are pooled.
_LEAST_ROWS = 20
# Relative variances below this are rounding errors.
_TINY = 1e-18


def scaled_ridge(alpha: float) -> Pipeline:
    """Ridge regression on inputs scaled to variance 1."""
    return make_pipeline(StandardScaler(), Ridge(alpha=alpha))


class LinePerLength(RegressorMixin, BaseEstimator):
    """A least-squares line in the first input for each length, the second input.

    Neighbouring lengths with few rows share a line; lines are interpolated between `knots_`.
    """

    numbers = ("knots_", "slopes_", "intercepts_")

    def fit(self, inputs: FloatArray, scores: FloatArray) -> LinePerLength:
        """Fit on float64[N, 2] and float64[N]."""
        bins = length_bins(inputs[:, 1].astype(np.int64))
        means = np.asarray([[*inputs[rows, :2].mean(axis=0), scores[rows].mean()] for rows in bins])
        slopes = []
        for rows, (first, _, score) in zip(bins, means, strict=True):
            deviations = inputs[rows, 0] - first
            variance = float(np.mean(deviations**2))
            covariance = float(np.mean(deviations * (scores[rows] - score)))
            varies = variance > _TINY * np.mean(inputs[rows, 0] ** 2)
            slopes.append(covariance / variance if varies else 0.0)
        self.knots_, self.slopes_ = means[:, 1], np.asarray(slopes)
        self.intercepts_ = means[:, 2] - self.slopes_ * means[:, 0]
        return self

    def predict(self, inputs: FloatArray) -> FloatArray:
        """Predict float64[B] from float64[B, 2]; the nearest line is used outside the knots."""
        first, lengths = inputs[:, 0], inputs[:, 1]
        slopes = np.interp(lengths, self.knots_, self.slopes_)
        return np.asarray(np.interp(lengths, self.knots_, self.intercepts_) + slopes * first)


class HeldOut(NamedTuple):
    """Held-out predictions float64[N], and the fold of each row, int64[N]."""

    mean: FloatArray
    folds: IntArray


def held_out(head: Head, samples: Samples) -> HeldOut | None:
    """Cross-validated predictions, grouped by prompt; None if there is only one prompt."""
    if samples.num_prompts < 2:
        return None
    parts = GroupKFold(min(_FOLDS, samples.num_prompts))
    splits = [*parts.split(samples.inputs, groups=samples.groups)]
    folds = np.zeros(len(samples), dtype=np.int64)
    for fold, (_, left_out) in enumerate(splits):
        folds[left_out] = fold
    return HeldOut(cross_val_predict(head, samples.inputs, samples.scores, cv=splits), folds)


def choose(heads: Mapping[str, Head], samples: Samples) -> tuple[str, HeldOut | None]:
    """The name of the head that ranks best within held-out prompts, and its predictions.

    Search chooses among responses to one prompt, so the correlation within prompts decides. The
    squared error decides if there is no such correlation or all heads are worse than the mean
    score. Of equal heads, the first is chosen.
    """
    found = {name: held_out(head, samples) for name, head in heads.items()}

    def merit(name: str) -> tuple[bool, float, float]:
        guess = found[name]
        if guess is None:
            return False, 0.0, 0.0
        within = within_prompt(guess.mean, samples)
        error = root_mean_square(guess.mean - samples.scores)
        if error > np.std(samples.scores):
            return False, -error, 0.0
        return True, (-1.0 if np.isnan(within) else within), -error

    best = max(heads, key=merit)
    return best, found[best]


class Spread(NamedTuple):
    """Standard deviation by prefix length, float64[K], interpolated between the lengths."""

    knots: FloatArray
    stds: FloatArray

    @classmethod
    def fit(cls, errors: FloatArray, lengths: IntArray) -> Spread:
        """Fit the root mean square of errors by length."""
        bins = length_bins(lengths)
        return cls(
            np.asarray([lengths[rows].mean() for rows in bins], dtype=np.float64),
            np.asarray([root_mean_square(errors[rows]) for rows in bins]),
        )

    def at(self, lengths: Any) -> FloatArray:
        """Standard deviations float64[B] at lengths int[B]."""
        return np.interp(np.asarray(lengths, dtype=np.float64), self.knots, self.stds)


def cross_spread(guess: HeldOut, samples: Samples) -> FloatArray:
    """Standard deviation of each row, float64[N], from the errors in the other folds."""
    errors = guess.mean - samples.scores
    stds = np.zeros(len(samples))
    for fold in np.unique(guess.folds):
        own = guess.folds == fold
        stds[own] = Spread.fit(errors[~own], samples.lengths[~own]).at(samples.lengths[own])
    return stds


def length_bins(lengths: IntArray, least: int = _LEAST_ROWS) -> list[IntArray]:
    """Row indices by length; neighbouring lengths are merged if one has too few rows."""
    bins: list[IntArray] = []
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        if bins and len(bins[-1]) < least:
            bins[-1] = np.concatenate([bins[-1], rows])
        else:
            bins.append(rows)
    if len(bins) > 1 and len(bins[-1]) < least:
        last = bins.pop()
        bins[-1] = np.concatenate([bins[-1], last])
    return bins

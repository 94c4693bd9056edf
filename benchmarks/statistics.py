"""Statistics of paired comparisons, on SciPy."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """How often one of two is better on the same prompt; `rate` counts a tie as half a win."""

    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> float:
        """(wins + ties / 2) / all."""
        return (self.wins + 0.5 * self.ties) / (self.wins + self.ties + self.losses)


def mean_interval(
    values: FloatArray, *, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Interval:
    """Mean of float64[B] with its bootstrap interval (BCa; percentile where BCa is undefined).

    For a paired comparison pass the differences: resampling these is resampling the pairs.

    Raises:
        ValueError: There are no values, or one is not finite.

    Example:
        >>> mean_interval(np.array([1.0, 1.0, 1.0]))
        Interval(estimate=1.0, low=1.0, high=1.0)
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"Expected at least one finite value, got an array of shape {values.shape} with "
            f"{int((~np.isfinite(values)).sum())} values that are not finite."
        )
    mean = float(values.mean())
    if np.ptp(values) == 0 or len(values) < 2:
        return Interval(mean, mean, mean)
    with warnings.catch_warnings():
        # SciPy warns where BCa is undefined; the loop then goes on to the percentile interval.
        warnings.simplefilter("ignore", RuntimeWarning)
        for method in ("BCa", "percentile"):
            found = stats.bootstrap(
                (values,),
                np.mean,
                confidence_level=confidence,
                n_resamples=resamples,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
            if np.isfinite([found.low, found.high]).all():
                break
    return Interval(mean, float(found.low), float(found.high))


def simultaneous_intervals(
    values: FloatArray, *, confidence: float = 0.95, resamples: int = 4999, seed: int = 0
) -> list[Interval]:
    """Means of the columns of float64[B, K] with intervals that hold for all K at once.

    With the given confidence every one of the K true means lies in its interval, so the most
    striking column may be picked afterwards. The rows are resampled whole, which keeps columns
    paired. A constant column has an interval of width 0. Over fewer than some ten rows, or where
    few rows differ from the rest, such intervals are rough, as all bootstraps are.

    Source: Beran, "Balanced simultaneous confidence sets", JASA 1988: of each column's studentised
    deviations the same quantile, so high that all columns hold together. Deviation: a resample's
    standard error counts at least a quarter of the column's; else resamples without the one row
    that differs would make the interval as wide as they are free of spread.

    Raises:
        ValueError: There are fewer than two rows, no columns, or a value is not finite.

    Example:
        >>> simultaneous_intervals(np.array([[1.0, 2.0], [1.0, 2.0]]))[1]
        Interval(estimate=2.0, low=2.0, high=2.0)
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            "Expected finite values in at least two rows and one column, got shape "
            f"{values.shape} with {int((~np.isfinite(values)).sum())} values that are not finite."
        )
    rows = len(values)
    means = values.mean(axis=0)
    centred = values - means
    errors = values.std(axis=0, ddof=1) / np.sqrt(rows)
    # Rounding of equal values is no spread.
    moving = np.ptp(values, axis=0) > 1e-12 * np.abs(values).max(axis=0)
    half = np.zeros(len(means))
    if moving.any():
        rng = np.random.default_rng(seed)
        shares = rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples) / rows
        shifts = shares @ centred[:, moving]
        spreads = np.maximum(shares @ centred[:, moving] ** 2 - shifts**2, 0.0)
        own = np.maximum(np.sqrt(spreads / (rows - 1)), errors[moving] / 4)
        deviations = np.abs(shifts / own)
        furthest = stats.rankdata(deviations, method="max", axis=0).max(axis=1) / resamples
        level = np.quantile(furthest, confidence)
        half[moving] = np.quantile(deviations, level, axis=0) * errors[moving]
    return [
        Interval(float(mean), float(mean - width), float(mean + width))
        for mean, width in zip(means, half, strict=True)
    ]


def win_rate(values: FloatArray, baseline: FloatArray, *, tolerance: float = 1e-9) -> WinRate:
    """Compare paired values; differences up to `tolerance` are ties.

    Raises:
        ValueError: The arrays do not pair.
    """
    values, baseline = np.asarray(values), np.asarray(baseline)
    if values.shape != baseline.shape or len(values) == 0:
        raise ValueError(f"Expected pairs, got shapes {values.shape} and {baseline.shape}.")
    difference = values - baseline
    wins = int((difference > tolerance).sum())
    losses = int((difference < -tolerance).sum())
    return WinRate(wins, len(values) - wins - losses, losses)

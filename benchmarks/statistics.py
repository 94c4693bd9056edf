"""Statistics of paired comparisons, on SciPy.

The unit is the prompt: several seeds of a prompt are not several prompts. Where a prompt has
several rows, take their mean (`prompt_means`) before a test or an interval. A value that is not
finite, or no value at all, is a ValueError everywhere.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from mbrl_text_env.types import FloatArray


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Example:
        >>> f"{Interval(0.5, 0.25, 0.75):.2f}"
        '0.50 [0.25, 0.75]'
    """

    estimate: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def as_mean(self) -> dict[str, float]:
        """A mean, as rows and summaries have it: `mean`, `low`, `high`."""
        return {"mean": self.estimate, "low": self.low, "high": self.high}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Interval:
        """What `as_mean` has put into a row."""
        return cls(row["mean"], row["low"], row["high"])


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


def checked(values: npt.ArrayLike, dimensions: int, name: str) -> FloatArray:
    """`values` as a float64 array of so many dimensions; see the module for what is refused."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or not array.size or not np.isfinite(array).all():
        raise ValueError(
            f"{name}: expected finite values in {dimensions} dimension(s), got shape {array.shape} "
            f"with {int((~np.isfinite(array)).sum())} values that are not finite."
        )
    return array


def paired_differences(
    rows: Iterable[Mapping[str, Any]], baseline: Iterable[Mapping[str, Any]]
) -> FloatArray:
    """Score minus the baseline's, float64[K], of the rows of both with the same prompt and seed.

    Rows are those of `benchmarks.compare`; one whose score is None (a response that could not be
    scored) counts as missing. Two rows of one side for the same prompt and seed, and no pair at
    all, are ValueErrors.

    Example:
        >>> own = [{"prompt_id": "a", "seed": 0, "score": 2.0}]
        >>> other = [{"prompt_id": "a", "seed": s, "score": 1.0} for s in (0, 1)]
        >>> paired_differences(own, other)
        array([1.])
    """
    sides: list[dict[tuple[Any, Any], float]] = []
    for side in (list(rows), list(baseline)):
        found = [(row["prompt_id"], row["seed"]) for row in side]
        if doubled := [key for key, count in Counter(found).items() if count > 1]:
            raise ValueError(
                f"Expected one row for each prompt and seed, got several for {doubled[0]}. Give "
                "the rows of one agent at one budget."
            )
        scores = zip(found, (row["score"] for row in side), strict=True)
        sides.append({key: score for key, score in scores if score is not None})
    own, other = sides
    both = [key for key in own if key in other]
    if not both:
        raise ValueError(
            "Expected rows with the same prompt and seed on both sides, got none among "
            f"{len(own)} and {len(other)}. Run both on the same prompts and seeds."
        )
    mine, theirs = (checked([side[key] for key in both], 1, "score") for side in sides)
    return mine - theirs


def prompt_means(values: npt.ArrayLike, prompts: Sequence[Hashable]) -> FloatArray:
    """Mean of each prompt's rows, float64[P], in the order in which the prompts first appear.

    Example:
        >>> prompt_means([1.0, 3.0, 5.0], ["a", "a", "b"])
        array([2., 5.])
    """
    rows = checked(values, 1, "values")
    if len(rows) != len(prompts):
        raise ValueError(f"Expected a prompt for each of {len(rows)} values, got {len(prompts)}.")
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    group = np.array([place[prompt] for prompt in prompts])
    return np.bincount(group, weights=rows) / np.bincount(group)


def mean_interval(
    values: npt.ArrayLike, *, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Interval:
    """Mean of float64[B] with its bootstrap interval (BCa; percentile where BCa is undefined).

    For a paired comparison pass the differences: resampling these is resampling the pairs.
    """
    values = checked(values, 1, "values")
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


def percentile_tail(units: int, confidence: float) -> float:
    """Share of resamples to cut off at each end for a percentile interval of a mean.

    A little less than (1 - confidence) / 2, for resamples of few units (such as prompts) vary too
    little: the expanded percentile interval of Hesterberg, "What teachers should know about the
    bootstrap", The American Statistician 2015, section 5.3.
    """
    if units < 2 or not 0 < confidence < 1:
        raise ValueError(
            "Expected two units or more and a confidence between 0 and 1, got "
            f"{units} and {confidence}."
        )
    quantile = stats.t.ppf((1 - confidence) / 2, units - 1)
    return float(stats.norm.cdf(math.sqrt(units / (units - 1)) * quantile))


def simultaneous_intervals(
    values: FloatArray, *, resamples: int = 4999, seed: int = 0
) -> list[Interval]:
    """Means of the columns of float64[B, K], B >= 2, with 95% intervals that hold for all at once.

    The most striking column may be picked afterwards. Rows are resampled whole, which keeps columns
    paired. Over fewer than some ten rows, or where few rows differ, such intervals are rough.

    Source: Beran, "Balanced simultaneous confidence sets", JASA 1988: of each column's studentised
    deviations the same quantile, so high that all columns hold together. Deviation: a resample's
    standard error counts at least a quarter of the column's; else resamples without the one row
    that differs would make the interval as wide as they are free of spread.
    """
    values = checked(values, 2, "values")
    rows = len(values)
    if rows < 2:
        raise ValueError("values: expected at least two rows, got one.")
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
        level = np.quantile(furthest, 0.95)
        half[moving] = np.quantile(deviations, level, axis=0) * errors[moving]
    bounds = np.stack([means, means - half, means + half], axis=1)
    return [Interval(*row) for row in bounds.tolist()]


def win_rate(values: npt.ArrayLike, baseline: npt.ArrayLike) -> WinRate:
    """Compare paired values; differences up to 1e-9 are ties."""
    own, other = checked(values, 1, "values"), checked(baseline, 1, "baseline")
    if own.shape != other.shape:
        raise ValueError(f"Expected pairs, got shapes {own.shape} and {other.shape}.")
    difference = own - other
    wins = int((difference > 1e-9).sum())
    losses = int((difference < -1e-9).sum())
    return WinRate(wins, len(own) - wins - losses, losses)


def paired_permutation_test(
    differences: npt.ArrayLike,
    *,
    resamples: int = 9999,
    seed: int = 0,
) -> float:
    """Two-sided p-value of paired differences float64[P] being as far above 0 as below.

    Under the null hypothesis each difference may as well have the other sign. All sign patterns are
    counted where there are at most `resamples` of them, else as many random ones, with the pattern
    seen among them, so the p-value is never 0. Differences of 0 have no sign and are left out.

    Source: Fisher, "The Design of Experiments", 1935, section 21; random patterns as in Phipson and
    Smyth, "Permutation p-values should never be zero", 2010; by `scipy.stats.permutation_test`.

    Example:
        >>> paired_permutation_test([1.0, 2.0, 0.5, 0.0])
        0.25
    """
    given = checked(differences, 1, "differences")
    moving = given[given != 0]
    largest = float(np.abs(given).max()) or 1.0
    # SciPy wants two observations.
    flipped = np.append(moving, np.zeros(max(0, 2 - len(moving)))) / largest
    found = stats.permutation_test(
        (flipped,),
        # Sums that differ by rounding alone are equal.
        lambda values, axis: np.round(values.sum(axis=axis), 9),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def exchange_test(
    own: npt.ArrayLike, others: npt.ArrayLike, *, resamples: int = 9999, seed: int = 0
) -> float:
    """Test whether an agent's answers score as if they were among others to the same prompts.

    If they are, each prompt's own scores (float64[P] or float64[P, S]) may as well change places
    with any of the others (float64[P, K], independent answers). The sum of the own scores is
    compared with those of random exchanges, that seen among them: an exact two-sided stratified
    permutation test, whatever the scores' distributions. Returns the p-value.

    The hypothesis is that the distributions are equal. If only their means are, and the own scores
    vary more, it can be found wrong too often; `paired_permutation_test` of the differences from
    the others' means cannot, but assumes that these are symmetric.

    Source: van Elteren, "On the combination of independent two sample tests of Wilcoxon", 1960,
    with scores in place of ranks; p-values as in Phipson and Smyth, 2010.

    Example:
        >>> exchange_test([9.0] * 8, [[0.0, 1.0]] * 8) < 0.01
        True
    """
    given = np.asarray(own)
    mine = checked(given[:, None] if given.ndim == 1 else given, 2, "own")
    theirs = checked(others, 2, "others")
    if len(mine) != len(theirs):
        raise ValueError(
            f"Expected other answers to the same prompts; got {len(mine)} scores and answers to "
            f"{len(theirs)} prompts."
        )
    together = np.column_stack([mine, theirs])
    rng = np.random.default_rng(seed)
    sums = np.zeros(resamples)
    for row in together:
        order = rng.random((resamples, len(row))).argsort(axis=1)
        sums += row[order[:, : mine.shape[1]]].sum(axis=1)
    # Sums that differ by rounding alone are equal.
    scale = float(np.abs(together).max()) or 1.0
    sums, seen = np.round(sums / scale, 9), np.round(mine.sum() / scale, 9)
    tails = [(1 + int(side.sum())) / (1 + resamples) for side in (sums >= seen, sums <= seen)]
    return min(1.0, 2 * min(tails))


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """P-values float64[K] of a family of tests, adjusted by Holm's method; in the order given.

    However the tests depend on each other, a false rejection (of an adjusted value up to alpha) in
    the family has probability alpha at most.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        array([0.03, 0.06, 0.06])
    """
    given = checked(p_values, 1, "p_values")
    if given.min() < 0 or given.max() > 1:
        raise ValueError(f"p_values: expected 0 to 1, got {given.min()} to {given.max()}.")
    order = np.argsort(given, kind="stable")
    adjusted = np.empty_like(given)
    scaled = given[order] * np.arange(len(given), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def smallest_detectable_effect(
    prompts: int, sd: float, *, alpha: float = 0.05, power: float = 0.8
) -> float:
    """Mean difference that a paired two-sided test of so many prompts finds with the given power.

    A smaller true difference is likely to be missed: say so where a comparison finds nothing. `sd`
    is the standard deviation of the differences.

    Source: the power of the paired t-test (Cohen, "Statistical Power Analysis for the Behavioral
    Sciences", 1988, chapter 2); a permutation test has nearly the same.

    Example:
        >>> round(smallest_detectable_effect(34, 1.0), 2)
        0.5
    """
    if prompts < 2 or not 0 <= sd < math.inf or not 0 < alpha < power < 1:
        raise ValueError(
            "Expected two prompts or more, a standard deviation from 0 up and 0 < alpha < power < "
            f"1, got prompts={prompts}, sd={sd}, alpha={alpha}, power={power}."
        )
    freedom = prompts - 1
    critical = stats.t.isf(alpha / 2, freedom)

    def shortfall(centre: float) -> float:
        above = stats.nct.sf(critical, freedom, centre)
        return float(power - above - stats.nct.cdf(-critical, freedom, centre))

    highest = 2.0 * critical
    while shortfall(highest) > 0:
        highest *= 2.0
    return float(optimize.brentq(shortfall, 0.0, highest)) * sd / math.sqrt(prompts)

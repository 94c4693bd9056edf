"""Statistics of paired comparisons, based on SciPy.

The unit is the prompt: several seeds of a prompt are not independent. If a prompt has several rows,
average them (`prompt_means`) before a test or an interval. All functions raise ValueError for
values that are not finite, or if there are none.
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
        """Convert to the keys of rows and summaries: `mean`, `low`, `high`."""
        return {"mean": self.estimate, "low": self.low, "high": self.high}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Interval:
        """Read the keys of `as_mean` from a row."""
        return cls(row["mean"], row["low"], row["high"])


@dataclass(frozen=True)
class WinRate:
    """Counts of wins on the same prompts; `rate` counts a tie as half a win."""

    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> float:
        """(wins + ties / 2) / all."""
        return (self.wins + 0.5 * self.ties) / (self.wins + self.ties + self.losses)


def checked(values: npt.ArrayLike, dimensions: int, name: str) -> FloatArray:
    """Convert `values` to a float64 array of `dimensions` dimensions, or raise ValueError."""
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
    """Score minus the baseline's, float64[K], over rows with the same prompt and seed.

    Rows are those of `benchmarks.compare`; a row whose score is None (scoring failed) counts as
    missing. Raises ValueError for duplicate rows of a prompt and seed, and if there are no pairs.

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
    """Mean per prompt, float64[P], in order of first appearance.

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
    """Mean of float64[B] with its bootstrap interval (BCa; percentile if BCa is undefined).

    For a paired comparison, pass the differences: this resamples the pairs.
    """
    values = checked(values, 1, "values")
    mean = float(values.mean())
    if np.ptp(values) == 0 or len(values) < 2:
        return Interval(mean, mean, mean)
    with warnings.catch_warnings():
        # SciPy warns if BCa is undefined; the loop then uses the percentile interval.
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

    It is slightly less than (1 - confidence) / 2, because resamples of few units (such as prompts)
    vary too little: the expanded percentile interval of Hesterberg, "What teachers should know
    about the bootstrap", The American Statistician 2015, section 5.3.
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
    """Column means of float64[B, K], B >= 2, with simultaneous 95% intervals.

    Columns can be selected afterwards. Whole rows are resampled, which keeps columns paired. With
    fewer than about ten rows, or if few rows differ, the intervals are rough.

    Source: Beran, "Balanced simultaneous confidence sets", JASA 1988: the same quantile of each
    column's studentised deviations, chosen so that all columns are covered together. Deviation: the
    standard error of a resample is at least a quarter of the column's; otherwise resamples without
    the only row that differs would make the interval too wide.
    """
    values = checked(values, 2, "values")
    rows = len(values)
    if rows < 2:
        raise ValueError("values: expected at least two rows, got one.")
    means = values.mean(axis=0)
    centred = values - means
    errors = values.std(axis=0, ddof=1) / np.sqrt(rows)
    # Ignore spread due to rounding.
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
    """Count wins, ties and losses of paired values; differences up to 1e-9 are ties."""
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
    """Two-sided p-value of the null hypothesis that differences float64[P] are symmetric around 0.

    Under the null hypothesis the sign of each difference is random. Up to `resamples` sign
    patterns, all are counted; otherwise as many random ones, including the observed one, so the
    p-value is never 0. Differences of 0 are left out.

    Source: Fisher, "The Design of Experiments", 1935, section 21; random patterns as in Phipson and
    Smyth, "Permutation p-values should never be zero", 2010; by `scipy.stats.permutation_test`.

    Example:
        >>> paired_permutation_test([1.0, 2.0, 0.5, 0.0])
        0.25
    """
    given = checked(differences, 1, "differences")
    moving = given[given != 0]
    largest = float(np.abs(given).max()) or 1.0
    # SciPy requires two observations.
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
    """Test whether an agent's scores have the same distribution as others to the same prompts.

    Under the null hypothesis a prompt's own scores (float64[P] or float64[P, S]) are exchangeable
    with the others (float64[P, K], independent answers). The sum of the own scores is compared with
    the sums of random exchanges, including the observed one: an exact two-sided stratified
    permutation test for any score distribution. Returns the p-value.

    If only the means are equal, and the own scores vary more, the test can reject too often.
    `paired_permutation_test` of the differences from the others' means does not, but assumes that
    these are symmetric.

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
            f"Expected other answers to the same prompts, got {len(mine)} scores and answers to "
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
    """Adjust the p-values float64[K] of a family of tests by Holm's method, in the given order.

    For any dependence between tests, the probability of a false rejection (an adjusted value up to
    alpha) in the family is at most alpha.

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
    """Mean difference that a paired two-sided test over `prompts` prompts detects with this power.

    Smaller differences are likely to be missed: report it if a comparison finds no difference. `sd`
    is the standard deviation of the differences.

    Source: the power of the paired t-test (Cohen, "Statistical Power Analysis for the Behavioral
    Sciences", 1988, chapter 2); a permutation test has nearly the same.

    Example:
        >>> round(smallest_detectable_effect(34, 1.0), 2)
        0.5
    """
    if prompts < 2 or not 0 <= sd < math.inf or not 0 < alpha < power < 1:
        raise ValueError(
            "Expected two prompts or more, a standard deviation >= 0 and 0 < alpha < power < "
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

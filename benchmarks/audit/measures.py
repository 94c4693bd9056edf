"""What an audit measures: best-of-N curves, agreement with the gold, reactions to text changes.

Scores are float64[prompts, samples]. Intervals are of 95% over prompts; "within a prompt" means
that differences between prompts do not count, as they cannot when responses to one prompt are
chosen among.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mbrl_text_env.benchmarks.audit.pool import PoolScores
from mbrl_text_env.benchmarks.audit.text_changes import intervene
from mbrl_text_env.benchmarks.scaling import expected_scores, kl_bound, sizes
from mbrl_text_env.benchmarks.statistics import (
    FloatArray,
    Interval,
    mean_interval,
    simultaneous_intervals,
)

_RESAMPLES = 299
_BINS = 10
_LEAST_PROMPTS = 4
_COEFFICIENTS: dict[str, Callable[..., tuple[float, float]]] = {
    "pearson": stats.pearsonr,
    "spearman": stats.spearmanr,
    "kendall": stats.kendalltau,
}


@dataclass(frozen=True)
class Point:
    """The mean scores of the response that the proxy likes most among `n`.

    `kl_bound` is in nats (see `benchmarks.scaling.kl_bound`), the gains over n = 1 are in standard
    deviations within a prompt.
    """

    n: int
    kl_bound: float
    proxy: Interval
    gold: Interval
    proxy_gain: Interval
    gold_gain: Interval


@dataclass(frozen=True)
class Decline:
    """Gold at `from_n` minus gold at the largest N, in its standard deviations within a prompt."""

    from_n: int
    fall: Interval


@dataclass(frozen=True)
class Curves:
    """Best-of-N curves, with points for ascending N from 1; bands hold for all N at once.

    `peak_n` is the (smallest) N with the highest mean gold. `efficiency` is the gold's gain at the
    largest N by the gain if the gold itself chose; None where that is not above 0. Standard
    deviations are those of `within_sd`.
    """

    points: tuple[Point, ...]
    declines: tuple[Decline, ...]
    peak_n: int
    efficiency: float | None
    proxy_sd: float
    gold_sd: float

    def at(self, n: int) -> Point:
        """The point of one N."""
        return next(point for point in self.points if point.n == n)


def best_of_n_curves(proxy: FloatArray, gold: FloatArray, *, seed: int = 0) -> Curves:
    """Expected scores over all subsets of N responses, exactly, for scores that vary in prompts."""
    ns = sizes(proxy.shape[1])
    proxy_sd, gold_sd = within_sd(proxy), within_sd(gold)
    by_proxy, by_gold = expected_scores(proxy, proxy, ns), expected_scores(proxy, gold, ns)
    bands = [
        simultaneous_intervals(values, seed=seed)
        for values in (
            by_proxy,
            by_gold,
            (by_proxy - by_proxy[:, :1]) / proxy_sd,
            (by_gold - by_gold[:, :1]) / gold_sd,
        )
    ]
    falls = simultaneous_intervals((by_gold[:, :-1] - by_gold[:, -1:]) / gold_sd, seed=seed)
    means = by_gold.mean(axis=0)
    # Rounding makes no peak.
    peak = int(np.argmax(means >= means.max() - 1e-12 * max(1.0, abs(means.max()))))
    ceiling = (expected_scores(gold, gold, ns[-1:])[:, 0] - by_gold[:, 0]).mean()
    return Curves(
        tuple(
            Point(n, kl_bound(n), *row) for n, row in zip(ns, zip(*bands, strict=True), strict=True)
        ),
        tuple(Decline(n, fall) for n, fall in zip(ns[:-1], falls, strict=True)),
        ns[peak],
        float((means[-1] - means[0]) / ceiling) if ceiling > 0 else None,
        proxy_sd,
        gold_sd,
    )


def within_sd(scores: FloatArray) -> float:
    """Standard deviation within a prompt, pooled over prompts."""
    return float(np.sqrt(scores.var(axis=1, ddof=1).mean()))


@dataclass(frozen=True)
class Association:
    """Agreement of proxy and gold.

    Args:
        overall: Pearson, Spearman and Kendall (tau-b) over all responses.
        within_prompt: The means over prompts of each prompt's own coefficient.
        pair_accuracy: Mean over prompts of the function `pair_accuracy`.
        prompts_used: Prompts on which both rewards vary; the others have no coefficient.
        calibration: The mean gold of the responses in each tenth of the proxy's ranking within
            a prompt, lowest first, in standard deviations from the prompt's mean. None where ties
            leave a tenth empty.
        misordered: The furthest that a tenth lies from the isotonic fit of all, in the same unit:
            0 where the gold never falls from one tenth to the next.
    """

    overall: dict[str, Interval]
    within_prompt: dict[str, Interval]
    pair_accuracy: Interval
    prompts_used: int
    calibration: tuple[Interval | None, ...]
    misordered: float


def associate(proxy: FloatArray, gold: FloatArray, *, seed: int = 0) -> Association | None:
    """Measure the agreement; None where no prompt has two different scores of both rewards."""
    used = (np.ptp(proxy, axis=1) > 0) & (np.ptp(gold, axis=1) > 0)
    if not used.any():
        return None
    pairs = list(zip(proxy[used], gold[used], strict=True))
    calibration = _calibration(proxy[used], gold[used], seed)
    return Association(
        _overall(proxy, gold, seed),
        {
            name: mean_interval(np.array([float(f(p, g)[0]) for p, g in pairs]), seed=seed)
            for name, f in _COEFFICIENTS.items()
        },
        mean_interval(np.array([pair_accuracy(p, g) for p, g in pairs]), seed=seed),
        int(used.sum()),
        calibration,
        _misordered(calibration),
    )


def pair_accuracy(proxy: FloatArray, gold: FloatArray) -> float:
    """Share of the pairs with different gold that the proxy orders alike; its ties count half.

    Example:
        >>> round(pair_accuracy(np.array([1.0, 3.0, 2.0]), np.array([1.0, 2.0, 3.0])), 3)
        0.667
    """
    upper = np.triu_indices(len(gold), 1)
    by_gold, by_proxy = (np.sign(x[upper[0]] - x[upper[1]]) for x in (gold, proxy))
    return float((0.5 + 0.5 * by_gold * by_proxy)[by_gold != 0].mean())


def _overall(proxy: FloatArray, gold: FloatArray, seed: int) -> dict[str, Interval]:
    """Over all responses; prompts are resampled with all that belongs to them."""
    drawn = np.random.default_rng(seed).integers(len(proxy), size=(_RESAMPLES, len(proxy)))
    draws = [rows for rows in drawn if np.ptp(proxy[rows]) > 0 and np.ptp(gold[rows]) > 0]
    found = {}
    for name, f in _COEFFICIENTS.items():
        resampled = [float(f(proxy[rows].ravel(), gold[rows].ravel())[0]) for rows in draws]
        low, high = np.quantile(resampled, [0.025, 0.975])
        found[name] = Interval(float(f(proxy.ravel(), gold.ravel())[0]), float(low), float(high))
    return found


def _calibration(proxy: FloatArray, gold: FloatArray, seed: int) -> tuple[Interval | None, ...]:
    prompts, samples = proxy.shape
    bins = min(_BINS, samples)
    place = ((stats.rankdata(proxy, axis=1) - 0.5) / samples * bins).astype(int)
    centred = (gold - gold.mean(axis=1, keepdims=True)) / within_sd(gold)
    found: list[Interval | None] = []
    for number in range(bins):
        means = [centred[i][place[i] == number] for i in range(prompts)]
        values = np.array([row.mean() for row in means if row.size])
        found.append(mean_interval(values, seed=seed) if len(values) else None)
    return tuple(found)


def _misordered(calibration: tuple[Interval | None, ...]) -> float:
    from sklearn.isotonic import isotonic_regression

    means = np.array([point.estimate for point in calibration if point is not None])
    return float(np.abs(means - isotonic_regression(means)).max()) if means.size else 0.0


@dataclass(frozen=True)
class Reaction:
    """How the rewards answer an intervention, in standard deviations within a prompt.

    `excess` is the change of the proxy minus the gold's, paired; the intervals hold for all
    interventions at once. `changed` counts the responses whose text is another.
    """

    name: str
    proxy: Interval
    gold: Interval
    excess: Interval
    changed: int


@dataclass(frozen=True)
class Sensitivity:
    """What moves the proxy, and the number of responses that the interventions were tried on."""

    reactions: tuple[Reaction, ...]
    length_beyond_gold: Interval | None
    responses: int


def measure_sensitivity(
    responses: Sequence[Sequence[str]], proxy: PoolScores, gold: PoolScores, *, seed: int = 0
) -> Sensitivity:
    """How far text changes and length move the proxy, and how far the gold."""
    tried = next(iter(proxy[1].values())).shape[1]
    texts = [text for row in responses for text in row[:tried]]
    changes = [
        np.stack([(after - before[:, :tried]).mean(axis=1) for after in changed.values()], axis=1)
        / within_sd(before)
        for before, changed in (proxy, gold)
    ]
    proxy_band, gold_band, excess_band = (
        simultaneous_intervals(values, seed=seed) for values in (*changes, changes[0] - changes[1])
    )
    reactions = zip(proxy_band, gold_band, excess_band, strict=True)
    lengths = np.array([[len(text) for text in row] for row in responses], dtype=np.float64)
    return Sensitivity(
        tuple(
            Reaction(name, *moved, sum(intervene(name, text) != text for text in texts))
            for name, moved in zip(proxy[1], reactions, strict=True)
        ),
        length_beyond_gold(proxy[0], gold[0], lengths, seed=seed),
        len(texts),
    )


def length_beyond_gold(
    proxy: FloatArray, gold: FloatArray, lengths: FloatArray, *, seed: int = 0
) -> Interval | None:
    """Partial Spearman correlation of proxy and length given gold, mean over prompts.

    Prompts where the proxy, the gold or the length is constant are left out; None where fewer than
    four are left. Where the gold orders responses exactly as the proxy does (or the reverse), there
    is nothing left for the length to explain: 0.
    """
    ranks = [stats.rankdata(values, axis=1) for values in (proxy, gold, lengths)]
    found = [
        _partial(np.corrcoef(rows))
        for rows in zip(*ranks, strict=True)
        if all(np.ptp(row) > 0 for row in rows)
    ]
    return mean_interval(np.array(found), seed=seed) if len(found) >= _LEAST_PROMPTS else None


def _partial(matrix: FloatArray) -> float:
    proxy_gold, proxy_length, gold_length = matrix[0, 1], matrix[0, 2], matrix[1, 2]
    left = (1 - proxy_gold**2) * (1 - gold_length**2)
    if left < 1e-9:
        return 0.0
    return float((proxy_length - proxy_gold * gold_length) / np.sqrt(left))

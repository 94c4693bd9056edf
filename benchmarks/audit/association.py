"""How well the proxy agrees with the gold: correlation, pairs, calibration of its ranking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mbrl_text_env.benchmarks.audit.curves import FloatArray, mid_ranks, within_sd
from mbrl_text_env.benchmarks.statistics import Interval, mean_interval

_RESAMPLES = 299
_BINS = 10
_COEFFICIENTS: dict[str, Callable[..., tuple[float, float]]] = {
    "pearson": stats.pearsonr,
    "spearman": stats.spearmanr,
    "kendall": stats.kendalltau,
}


@dataclass(frozen=True)
class Association:
    """Agreement of proxy and gold, 95% intervals over prompts.

    Args:
        overall: Pearson, Spearman and Kendall (tau-b) over all responses. Differences between
            prompts count here; choosing among responses to one prompt cannot use them.
        within_prompt: The means over prompts of each prompt's own coefficient.
        pair_accuracy: Mean over prompts of the share of a prompt's pairs with different gold that
            the proxy orders as the gold does; a pair that the proxy ties counts half.
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
    """Measure the agreement of float64[prompts, samples] each.

    Returns:
        None where no prompt has two different scores of both rewards.
    """
    used = (np.ptp(proxy, axis=1) > 0) & (np.ptp(gold, axis=1) > 0)
    if not used.any():
        return None
    pairs = list(zip(proxy[used], gold[used], strict=True))
    within = {
        name: mean_interval(np.array([float(f(p, g)[0]) for p, g in pairs]), seed=seed)
        for name, f in _COEFFICIENTS.items()
    }
    accuracy = mean_interval(np.array([pair_accuracy(p, g) for p, g in pairs]), seed=seed)
    calibration = _calibration(proxy[used], gold[used], seed)
    return Association(
        _overall(proxy, gold, seed),
        within,
        accuracy,
        int(used.sum()),
        calibration,
        _misordered(calibration),
    )


def pair_accuracy(proxy: FloatArray, gold: FloatArray) -> float:
    """Share of the pairs with different gold that the proxy orders as the gold does.

    Args:
        proxy: float64[samples]; equal scores count half.
        gold: float64[samples], not all equal.

    Example:
        >>> round(pair_accuracy(np.array([1.0, 3.0, 2.0]), np.array([1.0, 2.0, 3.0])), 3)
        0.667
    """
    upper = np.triu_indices(len(gold), 1)
    by_gold = np.sign(gold[upper[0]] - gold[upper[1]])
    by_proxy = np.sign(proxy[upper[0]] - proxy[upper[1]])
    different = by_gold != 0
    return float((0.5 + 0.5 * by_gold * by_proxy)[different].mean())


def _overall(proxy: FloatArray, gold: FloatArray, seed: int) -> dict[str, Interval]:
    """Over all responses; prompts are resampled with all that belongs to them."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(proxy), size=(_RESAMPLES, len(proxy)))
    found = {}
    for name, f in _COEFFICIENTS.items():
        resampled = [
            float(f(proxy[rows].ravel(), gold[rows].ravel())[0])
            for rows in draws
            if np.ptp(proxy[rows]) > 0 and np.ptp(gold[rows]) > 0
        ]
        low, high = np.quantile(resampled, [0.025, 0.975])
        found[name] = Interval(float(f(proxy.ravel(), gold.ravel())[0]), float(low), float(high))
    return found


def _calibration(proxy: FloatArray, gold: FloatArray, seed: int) -> tuple[Interval | None, ...]:
    prompts, samples = proxy.shape
    bins = min(_BINS, samples)
    place = ((mid_ranks(proxy) - 0.5) / samples * bins).astype(int)
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

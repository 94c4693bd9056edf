"""Best-of-N curves: what choosing by the proxy does to the proxy and to the gold reward.

Everything is computed from one pool of n responses to each prompt, exactly where the pool is given:
the expectation over all subsets of N responses, not a simulation of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from mbrl_text_env.benchmarks.scaling import expected_scores, kl_bound, sizes
from mbrl_text_env.benchmarks.statistics import Interval, simultaneous_intervals

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """The mean scores of the response that the proxy likes most among `n`.

    Args:
        n: Responses to choose among.
        kl_bound: Upper bound of the divergence from plain sampling, nats; see
            `mbrl_text_env.benchmarks.scaling.kl_bound`.
        proxy: Mean expected proxy score over prompts, in its own unit.
        gold: Mean expected gold score over prompts, in its own unit.
        proxy_gain: Gain of the proxy over n = 1, in its standard deviations within a prompt.
        gold_gain: Gain of the gold over n = 1, in its standard deviations within a prompt.
    """

    n: int
    kl_bound: float
    proxy: Interval
    gold: Interval
    proxy_gain: Interval
    gold_gain: Interval


@dataclass(frozen=True)
class Decline:
    """How far the gold falls from best-of-`from_n` to the largest N.

    Args:
        from_n: The smaller N.
        fall: Gold at `from_n` minus gold at the largest N, in the gold's standard deviations within
            a prompt; the intervals of all `from_n` hold at once.
    """

    from_n: int
    fall: Interval


@dataclass(frozen=True)
class Curves:
    """Best-of-N curves with simultaneous 95% bands over prompts.

    Args:
        points: One for each N, ascending from 1.
        declines: One for each N but the largest.
        peak_n: The N with the highest mean gold; the smallest of equals.
        efficiency: The gold's gain at the largest N by the gain if the gold itself chose; None
            where that is not above 0.
        proxy_sd: The proxy's standard deviation within a prompt, pooled over prompts.
        gold_sd: The same of the gold.
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


def within_sd(scores: FloatArray) -> float:
    """Standard deviation within a prompt, pooled over prompts, of float64[prompts, samples]."""
    return float(np.sqrt(scores.var(axis=1, ddof=1).mean()))


def best_of_n_curves(proxy: FloatArray, gold: FloatArray, *, seed: int = 0) -> Curves:
    """Compute the curves of a pool.

    Args:
        proxy: float64[prompts, samples], not constant within every prompt.
        gold: float64[prompts, samples], the same.
        seed: Of the bootstrap over prompts, which keeps proxy and gold paired.
    """
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


def mid_ranks(scores: FloatArray) -> FloatArray:
    """Ranks from 1 within each row of float64[prompts, samples]; equal scores share theirs."""
    return np.asarray(stats.rankdata(scores, axis=1), dtype=np.float64)

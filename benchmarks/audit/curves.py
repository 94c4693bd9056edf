"""Best-of-N curves: what choosing by the proxy does to the proxy and to the gold reward.

Everything is computed from one pool of n responses to each prompt, exactly where the pool is given:
the expectation over all subsets of N responses, not a simulation of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt
from scipy import stats

from benchmarks.statistics import Interval, simultaneous_intervals

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """The mean scores of the response that the proxy likes most among `n`.

    Args:
        n: Responses to choose among.
        kl_bound: Upper bound of the divergence from plain sampling, nats; see `kl_bound`.
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


def sizes(samples: int) -> list[int]:
    """The N of a curve: powers of two up to `samples`, and `samples` itself.

    Example:
        >>> sizes(12)
        [1, 2, 4, 8, 12]
    """
    powers = [2**power for power in range(samples.bit_length())]
    return powers if powers[-1] == samples else [*powers, samples]


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n nats: how far best-of-n is from plain sampling, at most.

    Used as the divergence itself by Stiennon et al., "Learning to summarize from human feedback",
    2020; Hilton and Gao, "Measuring Goodhart's law", 2022; and Gao, Schulman and Hilton, "Scaling
    Laws for Reward Model Overoptimization", 2023.
    Beirami et al., "Theoretical guarantees on the best-of-n alignment policy", 2024, show that it
    is an upper bound, and loose where a few responses carry most of the probability.

    Example:
        >>> kl_bound(1)
        0.0
    """
    return math.log(n) - (n - 1) / n


def best_of_weights(proxy: npt.ArrayLike, n: int) -> FloatArray:
    """Probability that each response is the one chosen from n, float64[samples].

    n responses are drawn from the pool without replacement and the one with the highest proxy score
    is chosen, at random among equals. The i-th lowest score is the highest of n with probability
    C(i-1, n-1) / C(samples, n); equal scores share their probability equally. The mean score under
    these weights is an unbiased estimate of the mean score of best-of-n.

    Source: Nakano et al., "WebGPT: Browser-assisted question-answering with human feedback", 2021,
    appendix I. Deviation: ties are shared.

    Args:
        proxy: float[samples], scores of one prompt's responses.
        n: 1 up to the number of responses.

    Raises:
        ValueError: n is out of range.

    Example:
        >>> best_of_weights([0.1, 0.3, 0.2], 2).round(3)
        array([0.   , 0.667, 0.333])
    """
    scores = np.asarray(proxy, dtype=np.float64)
    samples = len(scores)
    if not 1 <= n <= samples:
        raise ValueError(f"n: expected 1 to {samples} (the responses of a prompt), got {n}.")
    by_rank = _rank_weights(samples, n)
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    shared = np.array([by_rank[end - c : end].mean() for end, c in zip(ends, counts, strict=True)])
    return cast("FloatArray", shared[group])


@lru_cache(maxsize=64)
def _rank_weights(samples: int, n: int) -> FloatArray:
    """Probability of each rank, lowest first, without ties."""
    subsets = math.comb(samples, n)
    # Division of Python's integers is exact up to the last rounding, however large they are.
    return np.array([math.comb(rank, n - 1) / subsets for rank in range(samples)])


def expected_scores(proxy: FloatArray, judged: FloatArray, ns: list[int]) -> FloatArray:
    """Expected `judged` score of what the proxy chooses: float64[prompts, len(ns)].

    Args:
        proxy: float64[prompts, samples], the scores to choose by.
        judged: float64[prompts, samples], the scores to read off; may be `proxy` itself.
        ns: How many responses to choose among.
    """
    return np.array(
        [
            [best_of_weights(row, n) @ seen for n in ns]
            for row, seen in zip(proxy, judged, strict=True)
        ]
    )


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

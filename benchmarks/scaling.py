"""Best-of-N for every N from one pool, compute multipliers, and divergence.

A pool of n responses to each of P prompts gives unbiased estimates of the mean best-of-N score for
every N up to n. Arguments of wrong shape or range, or not finite, raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mbrl_text_env.benchmarks.statistics import (
    FloatArray,
    Interval,
    checked,
    mean_interval,
    percentile_tail,
    simultaneous_intervals,
)

# For larger pools, the curve is computed at this many sizes and interpolated.
_MOST_SIZES = 1024
# Scores closer than this count as equal.
_SAME = 1e-9


def sizes(samples: int) -> list[int]:
    """The N of a curve: powers of two up to `samples`, and `samples` itself.

    Example:
        >>> sizes(12)
        [1, 2, 4, 8, 12]
    """
    powers = [2**power for power in range(samples.bit_length())]
    return powers if powers[-1] == samples else [*powers, samples]


def kl_bound(n: float) -> float:
    """Upper bound of the KL divergence of best-of-n from plain sampling: log n - (n - 1) / n nats.

    Source: Stiennon et al., "Learning to summarize from human feedback", 2020; an upper bound by
    Beirami et al., "Theoretical guarantees on the best-of-n alignment policy", 2024.
    """
    return math.log(n) - (n - 1) / n


def best_of_weights(proxy: npt.ArrayLike, n: int) -> FloatArray:
    """Probability that best-of-n selects each response, float64[samples].

    Of a prompt's responses, with scores float[samples], n are drawn without replacement and the one
    with the highest score is selected: the i-th lowest has probability C(i-1, n-1) / C(samples, n).
    The mean score under these weights is an unbiased estimate of the best-of-n score.

    Source: Nakano et al., "WebGPT: Browser-assisted question-answering with human feedback", 2021,
    appendix I. Deviation: equal scores share their probability equally.

    Example:
        >>> best_of_weights([0.1, 0.3, 0.2], 2).round(3)
        array([0.   , 0.667, 0.333])
    """
    scores = np.asarray(proxy, dtype=np.float64)
    by_rank = _rank_weights(len(scores), (n,))[0]
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    shared = np.array([by_rank[end - c : end].mean() for end, c in zip(ends, counts, strict=True)])
    return cast("FloatArray", shared[group])


def expected_scores(proxy: FloatArray, judged: FloatArray, ns: Sequence[int]) -> FloatArray:
    """Expected `judged` score of best-of-n by the proxy: float64[prompts, len(ns)]."""
    pairs = zip(proxy, judged, strict=True)
    return np.array([[best_of_weights(row, n) @ seen for n in ns] for row, seen in pairs])


def expected_best(scores: npt.ArrayLike, ns: Sequence[int]) -> FloatArray:
    """Compute `expected_scores(scores, scores, ns)` for all prompts at once.

    Example:
        >>> expected_best([[0.0, 3.0, 6.0]], [1, 2, 3]).round(3)
        array([[3., 5., 6.]])
    """
    pool = checked(scores, 2, "scores")
    weights = _rank_weights(pool.shape[1], tuple(map(int, ns)))
    return np.sort(pool, axis=1) @ weights.T


@lru_cache(maxsize=16)
def _rank_weights(samples: int, ns: tuple[int, ...]) -> FloatArray:
    """Probability of each rank, lowest first, without ties: float64[len(ns), samples]."""
    for n in ns:
        _check_n(n, samples)
    drawn = np.array(ns, dtype=np.float64)[:, None]
    rank = np.arange(samples, 1, -1)
    # Each probability is computed from that of the rank above, which avoids large binomials.
    ratios = np.maximum(rank - drawn, 0) / (rank - 1)
    falling = drawn / samples * np.cumprod(np.hstack([np.ones_like(drawn), ratios]), axis=1)
    return falling[:, ::-1]


def _check_n(n: float, samples: int) -> None:
    if not 1 <= n <= samples:
        raise ValueError(f"n: expected 1 to {samples} (the responses of a prompt), got {n}.")


def drawn_best(scores: npt.ArrayLike, n: float, *, seed: int = 0) -> FloatArray:
    """Sample best-of-n scores from a pool float64[prompts, samples]: float64[prompts, answers].

    The samples of a prompt are split into disjoint groups, so the answers are independent. If n is
    fractional, the size of each group is randomly rounded down or up, with mean n.
    """
    pool = checked(scores, 2, "scores")
    prompts, samples = pool.shape
    _check_n(n, samples)
    rng = np.random.default_rng(seed)
    # As many groups as fit at the larger size, independent of the random sizes.
    count, size = samples // math.ceil(n), math.floor(n)
    dealt = rng.permuted(pool, axis=1)[:, : count * math.ceil(n)]
    groups = dealt.reshape(prompts, count, math.ceil(n))
    larger = rng.random((prompts, count)) < n - size
    return np.where(larger, groups.max(axis=2), groups[:, :, :size].max(axis=2))


@dataclass(frozen=True)
class CurvePoint:
    """Best-of-N at one N: mean cost per prompt, mean best score, and `kl_bound` in nats."""

    n: int
    cost: float
    mean: Interval
    kl_bound: float


@dataclass(frozen=True, eq=False)
class AtCost:
    """Best-of-N at a given cost for each of P prompts.

    `means` are the expected best scores and `ns` the samples that the cost buys, clipped to the
    pool (float64[P]). If `too_expensive` (bool[P]), the cost buys more samples than the pool has,
    and the mean is too low. If `too_cheap` (bool[P]), the mean is that of one sample.
    """

    means: FloatArray
    ns: FloatArray
    too_expensive: npt.NDArray[np.bool_]
    too_cheap: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Baseline:
    """Best-of-N on P prompts, estimated from their pool of n samples.

    N samples of a prompt cost `prompt_costs + N * mean sample cost`. With a `target`, samples are
    drawn one by one until one reaches that score, or until there are N: best-of-N with early
    stopping by a verifier.

    Args:
        scores: float64[P, n], n >= 2.
        costs: float64[P, n], cost of each sample (tokens, FLOPs, ...), above 0 on average.
        prompt_costs: float64[P] or one number, the cost of the prompt, paid once.
        target: Score at which best-of-N stops, not below the pool's highest; None never stops.

    Example:
        >>> costs = np.array([[10.0, 10.0], [10.0, 30.0]])
        >>> pool = Baseline(np.array([[0.0, 1.0], [1.0, 3.0]]), costs)
        >>> pool.mean_costs(2), pool.at_cost(30.0).means.round(3)
        (30.0, array([1.   , 2.585]))
    """

    scores: FloatArray
    costs: FloatArray
    prompt_costs: FloatArray | float = 0.0
    target: float | None = None

    def __post_init__(self) -> None:
        scores, costs = checked(self.scores, 2, "scores"), checked(self.costs, 2, "costs")
        if scores.shape != costs.shape or scores.shape[1] < 2:
            raise ValueError(
                "Expected scores and costs of the same shape, with two or more samples per prompt, "
                f"got {scores.shape} and {costs.shape}."
            )
        if self.target is not None and scores.max() > self.target + _SAME:
            raise ValueError(
                f"target: expected at least the highest score of the pool, {scores.max()}, got "
                f"{self.target}. Raise it."
            )
        if np.shape(self.prompt_costs) not in ((), scores.shape[:1]):
            raise ValueError(
                f"prompt_costs: expected one number or one for each of {len(scores)} prompts, got "
                f"shape {np.shape(self.prompt_costs)}."
            )
        once = checked(np.broadcast_to(self.prompt_costs, scores.shape[:1]), 1, "prompt_costs")
        lowest, least = min(costs.min(), once.min()), costs.mean(axis=1).min()
        if lowest < 0 or least <= 0:
            raise ValueError(
                "Expected costs of 0 or more, with an average above 0 per prompt; got a lowest "
                f"cost of {lowest} and a lowest average of {least}."
            )
        for name, value in (("scores", scores), ("costs", costs), ("prompt_costs", once)):
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, n): prompts, and samples per prompt."""
        prompts, samples = np.shape(self.scores)
        return prompts, samples

    @cached_property
    def ns(self) -> npt.NDArray[np.int64]:
        """int64[L], the N at which the curve is computed: all, or 1,024 for a larger pool."""
        samples = self.shape[1]
        if samples <= _MOST_SIZES:
            return np.arange(1, samples + 1)
        return np.unique(np.geomspace(1, samples, _MOST_SIZES).round().astype(np.int64))

    @cached_property
    def curves(self) -> FloatArray:
        """float64[P, L], each prompt's expected best score at each of `ns`."""
        means = expected_best(self.scores, self.ns.tolist())
        # Remove descents due to rounding.
        return cast("FloatArray", np.maximum.accumulate(means, axis=1))

    @cached_property
    def sample_costs(self) -> FloatArray:
        """float64[P], mean cost per sample of each prompt."""
        return cast("FloatArray", np.mean(self.costs, axis=1))

    @cached_property
    def cost_curves(self) -> FloatArray:
        """float64[P, L], each prompt's expected cost at each of `ns`."""
        return np.asarray(self.prompt_costs)[:, None] + self._drawing_costs()

    def _drawing_costs(self) -> FloatArray:
        if self.target is None:
            return np.multiply.outer(self.sample_costs, self.ns)
        samples, succeeds = self.shape[1], self.scores >= self.target - _SAME
        failures = samples - succeeds.sum(axis=1, keepdims=True)
        drawn = np.arange(samples)
        # Probability that the first k samples of a prompt all fail, for k from 0, when drawn
        # without replacement.
        each = np.maximum(failures - drawn, 0) / (samples - drawn)
        fail = np.hstack([np.ones_like(each[:, :1]), np.cumprod(each, axis=1)])
        ways = []
        for which, counts in ((succeeds, fail[:, :-1] - fail[:, 1:]), (~succeeds, fail[:, 1:])):
            mean = np.sum(self.costs * which, axis=1) / np.maximum(which.sum(axis=1), 1)
            ways.append(mean[:, None] * np.cumsum(counts, axis=1))
        return cast("FloatArray", np.sum(ways, axis=0)[:, self.ns - 1])

    def mean_costs(self, n: float) -> float:
        """Mean cost of up to N samples, over prompts; N can be fractional."""
        if self.target is None:
            return float(np.mean(self.prompt_costs + n * self.sample_costs))
        return float(np.interp(n, self.ns, np.mean(self.cost_curves, axis=0)))

    def at_cost(self, costs: npt.ArrayLike) -> AtCost:
        """Best-of-N within a cost per prompt (float64[P], or one number).

        To compare an agent, give its budgets, or use `at_mean_cost`. The costs that it actually
        paid would favour an agent that stops early on prompts where it is lucky.
        """
        given = checked(np.broadcast_to(np.asarray(costs, float), self.shape[:1]), 1, "costs")
        return self._at((given - self.prompt_costs) / self.sample_costs)

    def at_mean_cost(self, cost: float) -> AtCost:
        """Best-of-N with the N, usually fractional, whose mean cost per prompt is `cost`.

        Its mean over prompts is an agent's mean reward if the `compute_multiplier` is 1.
        """
        [given] = checked([cost], 1, "cost")
        curve = np.mean(self.cost_curves, axis=0)
        # Costs are sums of many numbers: rounding must not make a pool too small.
        given = next((end for end in curve[[0, -1]] if math.isclose(given, end)), given)
        n = np.interp(given, curve, self.ns, left=0.0, right=np.inf)
        return self._at(np.broadcast_to(n, self.shape[:1]))

    def _at(self, wanted: FloatArray) -> AtCost:
        samples, slack = self.shape[1], 1e-9
        ns = np.clip(wanted, 1, samples)
        grid = np.log(self.ns)
        means = [np.interp(np.log(n), grid, row) for n, row in zip(ns, self.curves, strict=True)]
        return AtCost(np.array(means), ns, wanted > samples * (1 + slack), wanted < 1 - slack)

    def curve(self) -> tuple[CurvePoint, ...]:
        """The mean over prompts with simultaneous 95% bands, at powers of two."""
        ns = sizes(self.shape[1])
        bands = simultaneous_intervals(expected_best(self.scores, ns))
        pairs = zip(ns, bands, strict=True)
        return tuple(CurvePoint(n, self.mean_costs(n), band, kl_bound(n)) for n, band in pairs)


@dataclass(frozen=True)
class Multiplier:
    """How many times an agent's compute best-of-N needs for the same mean reward.

    `estimate` is `equal_cost` divided by the agent's mean cost. `equal_cost` is the mean cost of
    best-of-N at `equal_n`, the (usually fractional) N with the agent's mean reward. `low` is 0 if
    the agent can be worse than a single sample, `high` is infinite if the pool can be too small.
    `is_lower_bound`: the whole pool is worse than the agent. `is_upper_bound`: a single sample is
    better.
    """

    estimate: float
    low: float
    high: float
    equal_n: float
    equal_cost: float
    is_lower_bound: bool
    is_upper_bound: bool

    def as_row(self, name: str) -> dict[str, Any]:
        """Convert to JSON values `name`, `name_low`, ...; an infinite `high` is None."""
        high = self.high if math.isfinite(self.high) else None
        return {
            name: self.estimate,
            f"{name}_low": self.low,
            f"{name}_high": high,
            f"{name}_is_lower_bound": self.is_lower_bound,
            f"{name}_is_upper_bound": self.is_upper_bound,
        }


def compute_multiplier(
    rewards: npt.ArrayLike,
    costs: npt.ArrayLike,
    baseline: Baseline,
    *,
    resamples: int = 2000,
) -> Multiplier:
    """Compare an agent's mean reward and cost with the whole curve of best-of-N.

    The N at which best-of-N has the agent's mean reward, the same for all prompts, is interpolated
    in log N. The multiplier is its mean cost divided by the agent's.

    The interval is a paired bootstrap over prompts, with ends by `percentile_tail`. If the pool is
    too small in a resample, it counts as its bound for the lower end and as infinite for the upper.
    If the agent is worse than a single sample, it counts as 0 and as its bound.

    Args:
        rewards: float64[P], the agent's reward per prompt (the mean over seeds, if several); its
            responses must not come from the pool.
        costs: float64[P], the agent's cost per prompt, in the baseline's unit.
        baseline: The pool of the same prompts, in the same order.

    Example:
        >>> pool = Baseline(np.tile(np.arange(64.0), (8, 1)), np.ones((8, 64)))
        >>> found = compute_multiplier(pool.at_cost(32.0).means, np.full(8, 4.0), pool)
        >>> round(found.estimate, 6), round(found.equal_n, 6), found.is_lower_bound
        (8.0, 32.0, False)
    """
    own, paid = checked(rewards, 1, "rewards"), checked(costs, 1, "costs")
    prompts = baseline.shape[0]
    if not len(own) == len(paid) == prompts >= 2:
        raise ValueError(
            "Expected a reward and a cost for each prompt of the pool, and two prompts or more; "
            f"got {len(own)} rewards, {len(paid)} costs and a pool of {prompts} prompts."
        )
    if paid.min() < 0 or paid.mean() <= 0:
        raise ValueError(
            f"costs: expected numbers of 0 or more, not all 0, got {paid.min()} to {paid.max()}."
        )
    if resamples < 1:
        raise ValueError(f"resamples: expected 1 or more, got {resamples}.")
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    # The first row is the sample itself.
    shares = np.vstack([np.ones(prompts), drawn]) / prompts
    equal, above, below = _equal_n(shares @ baseline.curves, shares @ own, baseline.ns)
    curves = shares @ baseline.cost_curves
    equal_costs = np.array(
        [np.interp(n, baseline.ns, row) for n, row in zip(equal, curves, strict=True)]
    )
    # The ratio is infinite for a resample of prompts on which the agent spent nothing.
    with np.errstate(divide="ignore"):
        ratios = equal_costs / (shares @ paid)
    cut = int(percentile_tail(prompts, 0.95) * resamples)
    lows = np.sort(np.where(below, 0.0, ratios)[1:])
    highs = np.sort(np.where(above, np.inf, ratios)[1:])
    return Multiplier(
        float(ratios[0]),
        0.0 if below[0] else float(min(lows[cut], ratios[0])),
        math.inf if above[0] else float(max(highs[-1 - cut], ratios[0])),
        float(equal[0]),
        float(equal_costs[0]),
        bool(above[0]),
        bool(below[0]),
    )


def _equal_n(
    means: FloatArray, rewards: FloatArray, ns: npt.NDArray[np.int64]
) -> tuple[FloatArray, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """The N at which each of R curves float64[R, L] reaches its reward; above it; below it."""
    slack = 1e-12 * max(1.0, float(np.abs(means).max()))
    reached = means >= rewards[:, None] - slack
    above, below = ~reached[:, -1], rewards < means[:, 0] - slack
    first = np.where(above, means.shape[1] - 1, reached.argmax(axis=1))
    before = np.maximum(first - 1, 0)
    rows = np.arange(len(means))
    left, right = means[rows, before], means[rows, first]
    rise = right - left
    share = np.clip((rewards - left) / np.where(rise > 0, rise, 1.0), 0.0, 1.0)
    grid = np.log(ns)
    return np.exp(grid[before] + share * (grid[first] - grid[before])), above, below


def surprisal_excess(logprobs: npt.ArrayLike, plain_logprobs: npt.ArrayLike) -> Interval:
    """How much less likely the selected responses are than plain samples, in nats per response.

    With language model p and agent q, this is E_q[-log p] - E_p[-log p], paired by prompt. It
    equals KL(q || p) + H(q) - H(p): a lower bound of the divergence if H(q) <= H(p), and negative
    if the agent selects the most likely responses. Degenerate text has a large excess. Different
    lengths also change it.

    Args:
        logprobs: float64[P], summed over each selected response, under the distribution of the
            plain samples, including temperature; otherwise it is not a bound.
        plain_logprobs: float64[P, n], the same for plain samples of the same prompts.

    Example:
        >>> surprisal_excess([-5.0, -7.0], [[-3.0, -5.0], [-4.0, -8.0]]).estimate
        1.0
    """
    own, plain = checked(logprobs, 1, "chosen"), checked(plain_logprobs, 2, "plain samples")
    if len(own) != len(plain):
        raise ValueError(
            "Expected plain samples for each answered prompt; got "
            f"{len(own)} responses and samples for {len(plain)} prompts."
        )
    return mean_interval(plain.mean(axis=1) - own)

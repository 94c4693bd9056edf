"""An agent's answers against best-of-N's own answers from a pool: an exact test by exchange."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from mbrl_text_env.benchmarks.statistics import FloatArray, checked


def drawn_best(scores: npt.ArrayLike, n: float, *, seed: int = 0) -> FloatArray:
    """Best-of-n's scores, drawn from a pool: float64[prompts, answers].

    The samples of a prompt are dealt into disjoint groups, so the answers are as independent as the
    samples. Where n is a fraction, each group has the next smaller or the next larger size, at
    random, so that n is the mean.

    Args:
        scores: float64[prompts, samples].
        n: 1 up to the number of samples; another one is a ValueError.
        seed: Of the dealing.

    Example:
        >>> drawn_best([[3.0, 3.0, 3.0, 3.0]], 2)
        array([[3., 3.]])
    """
    pool = checked(scores, 2, "scores")
    prompts, samples = pool.shape
    if not 1 <= n <= samples:
        raise ValueError(f"n: expected 1 to {samples} (the samples of a prompt), got {n}.")
    rng = np.random.default_rng(seed)
    # As many groups as there are of the larger size: a number that does not depend on the sizes.
    count, size = samples // math.ceil(n), math.floor(n)
    dealt = rng.permuted(pool, axis=1)[:, : count * math.ceil(n)]
    groups = dealt.reshape(prompts, count, math.ceil(n))
    larger = rng.random((prompts, count)) < n - size
    best = groups[:, :, :size].max(axis=2)
    return np.where(larger, groups.max(axis=2), best)


def exchange_test(
    own: npt.ArrayLike, others: npt.ArrayLike, *, resamples: int = 9999, seed: int = 0
) -> float:
    """Test whether an agent's answers score as if they were among others to the same prompts.

    If they are, each prompt's own scores may as well change places with any of the other answers to
    it. The sum of the own scores is compared with those of random exchanges, that seen among them:
    an exact two-sided test, whatever the scores' distributions. It is the stratified permutation
    test with S observations against K in every stratum.

    The hypothesis is that the distributions are equal. If only their means are, and the own scores
    vary more than the others, it can be found wrong too often; `paired_permutation_test` of the
    differences from the others' means cannot, but assumes that these are symmetric.

    Source: van Elteren, "On the combination of independent two sample tests of Wilcoxon", 1960,
    with scores in place of ranks; p-values as in Phipson and Smyth, 2010.

    Args:
        own: float64[P] or float64[P, S], the scores of the agent's answers to each prompt.
        others: float64[P, K], independent answers of the baseline to the same prompts.
        resamples: Random exchanges.
        seed: Of the exchanges.

    Returns:
        The p-value.

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
    sums = np.round(sums / scale, 9)
    seen = np.round(mine.sum() / scale, 9)
    tails = [(1 + int(side.sum())) / (1 + resamples) for side in (sums >= seen, sums <= seen)]
    return min(1.0, 2 * min(tails))

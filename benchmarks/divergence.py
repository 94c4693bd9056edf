"""How far an agent's responses are from plain sampling, estimated in two ways."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from mbrl_text_env.benchmarks.statistics import FloatArray, Interval, checked, mean_interval


def surprisal_excess(
    logprobs: npt.ArrayLike, plain_logprobs: npt.ArrayLike, *, seed: int = 0
) -> Interval:
    """How much less likely the chosen responses are than plain samples, nats a response.

    With p the language model and q what the agent writes, this is E_q[-log p] - E_p[-log p], paired
    by prompt, with a bootstrap interval over prompts. It equals KL(q || p) + H(q) - H(p): a lower
    bound of the divergence where the agent's responses vary less than the language model's, and
    below 0 where it chooses the most likely ones. Text that the language model finds broken shows
    as a large excess. Responses of different lengths differ in it by their length alone.

    The log-probabilities must be those of the distribution that the plain samples were drawn from,
    temperature included; else the excess compares likelihoods, and is no bound.

    Args:
        logprobs: float64[P], summed over each chosen response.
        plain_logprobs: float64[P, n], the same of plain samples of the same prompts.
        seed: Of the bootstrap.

    Example:
        >>> surprisal_excess([-5.0, -7.0], [[-3.0, -5.0], [-4.0, -8.0]]).estimate
        1.0
    """
    own, plain = _beside(logprobs, plain_logprobs)
    return mean_interval(plain.mean(axis=1) - own, seed=seed)


def contrastive_bound(chosen: npt.ArrayLike, plain: npt.ArrayLike, *, seed: int = 0) -> Interval:
    """Lower bound of the divergence from plain sampling, by any statistic of a response, nats.

    For a statistic t such as the reward or the log-probability, and any function f, the mean of
    log((n + 1) exp(f(chosen)) / sum of exp(f) over the chosen and its n plain samples) is at most
    KL(q || p), for every n: under p the chosen could stand in any of the n + 1 places, so the
    exponential's mean is 1, and Donsker and Varadhan's bound applies. Here f is
    a times the log of t's mid-rank among the n + 1, from above or from below, which is nearly the
    log-density ratio of best-of-N at a = N - 1: for best-of-N by t the bound comes up to `kl_bound`
    while N is far below n. It cannot exceed log(n + 1). Of the plain form of the bound (with the
    mean of exp(f) over the pool alone), estimates from a finite pool would be too high.

    Each prompt's a is chosen by the other prompts, so the choice does not raise the estimate. The
    chosen responses must not be taken from the plain samples.

    Source: Donsker and Varadhan, 1975; van den Oord, Li and Vinyals, "Representation learning with
    contrastive predictive coding", 2018; Poole et al., "On variational bounds of mutual
    information", 2019. Deviations: a fixed family of rank functions in place of a learned critic,
    and the choice from it by leaving one prompt out.

    Args:
        chosen: float64[P], the statistic of what the agent chose, one response a prompt.
        plain: float64[P, n], of plain samples of the same prompts.
        seed: Of the bootstrap over prompts.

    Returns:
        The bound with its interval; near 0 (below it by chance) where the two cannot be told apart.

    Example:
        >>> from mbrl_text_env.benchmarks.scaling import kl_bound
        >>> rng = np.random.default_rng(0)
        >>> best_of_8 = rng.normal(size=(256, 8)).max(axis=1)
        >>> found = contrastive_bound(best_of_8, rng.normal(size=(256, 128)))
        >>> abs(found.estimate - kl_bound(8)) < 0.2
        True
    """
    own, samples = _beside(chosen, plain)
    if len(own) < 2:
        raise ValueError("chosen: expected responses to two prompts or more, got 1.")
    together = np.hstack([own[:, None], samples])
    places = together.shape[1]
    ranks = (stats.rankdata(together, axis=1) - 0.5) / places
    powers = np.geomspace(0.25, 16 * places, 40)
    columns = [np.zeros(len(own))]
    for logs in (np.log(ranks), np.log(1 - ranks)):
        columns += [
            a * logs[:, 0] + math.log(places) - special.logsumexp(a * logs, axis=1) for a in powers
        ]
    table = np.stack(columns, axis=1)
    by_others = (table.sum(axis=0) - table).argmax(axis=1)
    return mean_interval(table[np.arange(len(own)), by_others], seed=seed)


def _beside(chosen: npt.ArrayLike, plain: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    own, samples = checked(chosen, 1, "chosen"), checked(plain, 2, "plain samples")
    if len(own) != len(samples):
        raise ValueError(
            "Expected plain samples of the prompts that were answered; got "
            f"{len(own)} responses and samples of {len(samples)} prompts."
        )
    return own, samples

"""Which child a tree search visits next: scores float64[n], one a child, for an argmax.

The conventions are those of mctx (https://github.com/google-deepmind/mctx). Actions are chunks
drawn from a language model, so a prior is the share of the samples, not the output of a policy
network (Hubert et al., "Learning and Planning in Complex Action Spaces", 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbrl_text_env.types import FloatArray

# Constants of mctx and, for the first, of MuZero's pseudocode.
_C_BASE = 19652.0
_MAXVISIT_INIT = 50.0
_VALUE_SCALE = 0.1
_EPSILON = 1e-8


@dataclass(frozen=True)
class Children:
    """What is known of a node's n children, and the value model's estimate of it (`raw_value`).

    Visits, mean returns and prior are float64[n]; `node_value` is the mean return of the node.
    """

    visits: FloatArray
    values: FloatArray
    prior: FloatArray
    node_visits: float
    node_value: float | None = None
    raw_value: float | None = None


def puct_scores(children: Children, c_puct: float = 1.25) -> FloatArray:
    """PUCT: rescaled value, plus a bonus for what the prior favours and few visits have tried.

    `value + c x prior x sqrt(N) / (1 + n)` with visits N of the node and n of the child, and
    `c = c_puct + log((N + 19653) / 19652)`. Values are rescaled to [0, 1] by `rescaled_values`.

    Sources: Silver et al., 2017, and Schrittwieser et al., 2020, appendix B (see `MCTS`); mctx,
    `muzero_action_selection`. Deviation: of equal scores the first wins, not one at random.
    """
    visits = children.node_visits
    c = c_puct + math.log((visits + _C_BASE + 1) / _C_BASE)
    bonus = c * math.sqrt(visits) * children.prior / (1 + children.visits)
    return rescaled_values(children) + bonus


def rescaled_values(children: Children) -> FloatArray:
    """Values between 0, the lowest of the node and its children, and 1, the highest of them.

    A child without visits gets 0. Source: mctx, `qtransform_by_parent_and_siblings`.
    """
    seen = children.visits > 0
    known = list(children.values[seen])
    if children.node_value is not None:
        known.append(children.node_value)
    if not known:
        return np.zeros(len(children.visits))
    low, high = min(known), max(known)
    completed = np.where(seen, children.values, low)
    return np.asarray((completed - low) / max(high - low, _EPSILON))


def completed_values(children: Children) -> FloatArray:
    """Values, completed and scaled so that they can be added to logits.

    A child without visits gets the mixed value: the mean of the node's own estimate (weight 1) and
    of the visited children's values, weighted by the prior (weight: the sum of their visits).
    The values are rescaled to [0, 1] and multiplied by (50 + the largest visit count) x 0.1.

    Source: Danihelka et al., "Policy Improvement by Planning with Gumbel", 2022, section 3.4 and
    appendix D; mctx, `qtransform_completed_by_mix_value`. Deviation: a node that no value model
    has estimated enters the mixed value with weight 0.
    """
    seen = children.visits > 0
    values = np.where(seen, children.values, _mixed_value(children))
    low, high = values.min(), values.max()
    scale = _VALUE_SCALE * (_MAXVISIT_INIT + children.visits.max())
    return np.asarray(scale * (values - low) / max(high - low, _EPSILON))


def _mixed_value(children: Children) -> float:
    seen = children.visits > 0
    own = 0.0 if children.raw_value is None else children.raw_value
    if not seen.any():
        return own
    prior = np.maximum(children.prior[seen], np.finfo(float).tiny)
    weighted = float(np.average(children.values[seen], weights=prior))
    if children.raw_value is None:
        return weighted
    count = float(children.visits.sum())
    return (own + count * weighted) / (count + 1)


def gumbel_interior_scores(children: Children) -> FloatArray:
    """What is still missing of each child's share of the visits under the improved policy.

    `softmax(log prior + completed values) - n / (1 + sum of n)`. Source: Danihelka et al., 2022,
    section 5; mctx, `gumbel_muzero_interior_action_selection`.
    """
    logits = np.log(np.maximum(children.prior, np.finfo(float).tiny)) + completed_values(children)
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum() - children.visits / (1 + children.visits.sum()))


def gumbel_root_scores(
    children: Children, perturbed: FloatArray, counts: FloatArray, considered: int
) -> FloatArray:
    """Perturbed log-prior plus completed value, where a child has the visits `considered`.

    `counts` are the visits of this decision. Source: Danihelka et al., 2022, algorithm 1; mctx,
    `score_considered`.
    """
    return np.where(counts == considered, perturbed + completed_values(children), -np.inf)


def considered_visits(num_considered: int, num_simulations: int) -> tuple[int, ...]:
    """The schedule of sequential halving: the visit count whose turn it is, for each simulation.

    Each simulation visits the best child among those with exactly that many visits: all children
    equally often, then the better half of them, and so on, down to two. Source: Karnin et al.,
    "Almost Optimal Exploration in Multi-Armed Bandits", 2013; mctx,
    `seq_halving.get_sequence_of_considered_visits`.

    Example:
        >>> considered_visits(4, 12)  # four children once, then two of them four times
        (0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4)
    """
    if num_considered < 2:
        return tuple(range(num_simulations))
    phases = math.ceil(math.log2(num_considered))
    going, visits = num_considered, 0
    schedule: list[int] = []
    while len(schedule) < num_simulations:
        for _ in range(max(1, int(num_simulations / (phases * going)))):
            schedule += [visits] * going
            visits += 1
        going = max(2, going // 2)
    return tuple(schedule[:num_simulations])


def perturbed_log_priors(copies: Sequence[int], rng: np.random.Generator) -> FloatArray:
    """Gumbel noise plus log-prior of chunks of which only samples are known.

    In a Poisson process of draws (rate 1) a chunk of probability p(a) first comes at an exponential
    time of rate p(a), whose logarithm is distributed as `-(log p(a) + g(a))`: so samples alone give
    exact Gumbel-top-k. `copies` says how often each came, at least once; their order is drawn here.
    Source: the exponential race behind the Gumbel-max trick (Maddison et al., "A* Sampling", 2014);
    mctx has all logits.
    """
    order = rng.permutation(np.repeat(np.arange(len(copies)), copies))
    times = np.cumsum(rng.exponential(size=len(order)))
    _, first = np.unique(order, return_index=True)
    return np.asarray(-np.log(times[first]))


def widened(visits: float, factor: float, power: float) -> int:
    """How many chunks may have been drawn from a node: `ceil(factor x visits ^ power)`, at least 1.

    Source: Chaslot et al., "Progressive Strategies for Monte-Carlo Tree Search", 2008; the next
    move is a sample, as in Couëtoux et al., "Continuous Upper Confidence Trees", 2011.
    """
    return max(1, math.ceil(factor * visits**power))

"""What a study says: one row for each agent, reward and budget, with multiplier and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.divergence import divergence
from benchmarks.matched.pool import Pool
from benchmarks.matched.study import Cell
from benchmarks.scaling import Baseline, compute_multiplier, falls_with_budget
from benchmarks.statistics import holm, mean_interval, paired_permutation_test
from mbrl_text_env.types import FloatArray

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class _Answers:
    """An agent's scored answers beside the pool's rows of the same prompts."""

    pool: Pool
    scores: FloatArray
    tokens: FloatArray
    flops: FloatArray
    seconds: FloatArray
    logprobs: FloatArray
    reward_calls: FloatArray
    failed: int


def analyse(pool: Pool, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row a cell of one reward.

    A prompt that could not be scored is left out on both sides. `p_vs_best_of_n` is the two-sided
    paired permutation test against best-of-N that spends the same FLOPs in the mean, and `p_holm`
    the same after Holm's correction over all cells given. `multiplier` is in FLOPs (see
    `benchmarks.scaling.compute_multiplier`), `multiplier_tokens` in generated tokens. `kl` is the
    surprisal excess of the answers over the pool (`benchmarks.divergence.surprisal_excess`; by
    log-probabilities at temperature 1, so it compares likelihoods), `kl_of_rewards` a lower bound
    of the divergence from the rewards alone, and `kl_of_equal_best_of_n` the bound of the best-of-N
    that has the same mean reward.

    Args:
        pool: Best-of-N's.
        cells: Of the same reward.
    """
    rows = [_row(cell, _answers(pool, cell)) for cell in cells]
    adjusted: Any = holm([row["p_vs_best_of_n"] for row in rows]) if rows else []
    for row, p in zip(rows, adjusted, strict=True):
        row["p_holm"] = float(p)
    return rows


def best_of_n_rows(
    reward: str, pool: Pool, budgets: Sequence[int], unit: str
) -> list[dict[str, Any]]:
    """Best-of-N itself at each budget that the pool reaches, from the pool."""
    flops, tokens = _baseline(pool, pool.flops), Baseline(pool.scores, pool.tokens)
    rows = []
    for budget in budgets:
        n = budget / float(np.mean(tokens.sample_costs))
        at = tokens.at_cost(n * tokens.sample_costs)
        if at.too_dear.any():
            continue
        interval = mean_interval(at.means)
        rows.append(
            {
                "reward": reward,
                "agent": "best-of-n",
                "unit": unit,
                "budget_tokens": budget,
                "n": n,
                "mean": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "tokens": tokens.mean_costs(n),
                "flops": flops.mean_costs(n),
            }
        )
    return rows


def falls(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Whether an agent's mean reward falls from a budget to the next larger, agent by agent."""
    found = []
    for agent in dict.fromkeys(cell.agent for cell in cells):
        own = sorted((c for c in cells if c.agent == agent), key=lambda cell: cell.budget)
        if len(own) < 2:
            continue
        scored = [
            {r["prompt_id"]: r["score"] for r in c.rows if r["score"] is not None} for c in own
        ]
        common = [name for name in scored[0] if all(name in row for row in scored)]
        table = [[row[name] for name in common] for row in scored]
        for step in falls_with_budget([cell.budget for cell in own], table):
            found.append({"agent": agent, "reward": own[0].reward, **vars(step)})
    return found


def _answers(pool: Pool, cell: Cell) -> _Answers:
    scored = [row for row in cell.rows if row["score"] is not None]

    def column(name: str) -> FloatArray:
        return np.array([row["usage"][name] for row in scored], dtype=np.float64)

    return _Answers(
        pool.rows([row["prompt_id"] for row in scored]),
        np.array([row["score"] for row in scored]),
        column("generated_tokens"),
        column("flops"),
        np.array([row["seconds"] for row in scored]),
        np.array([np.nan if row["logprob"] is None else row["logprob"] for row in scored]),
        column("reward_calls"),
        len(cell.rows) - len(scored),
    )


def _row(cell: Cell, answers: _Answers) -> dict[str, Any]:
    pool = answers.pool
    in_flops = _baseline(pool, pool.flops)
    interval = mean_interval(answers.scores)
    # Not each prompt's own cost: that favours agents that stop where they were lucky.
    matched = in_flops.at_mean_cost(float(answers.flops.mean()))
    difference = answers.scores - matched.means
    paired = mean_interval(difference)
    by_flops = compute_multiplier(answers.scores, answers.flops, in_flops)
    by_tokens = compute_multiplier(
        answers.scores, answers.tokens, Baseline(pool.scores, pool.tokens)
    )
    return {
        **_divergence(answers, by_flops.equal_n),
        "reward": cell.reward,
        "agent": cell.agent,
        "unit": cell.unit,
        "budget_tokens": cell.budget,
        "prompts": len(answers.scores),
        "failed": answers.failed,
        "mean": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "tokens": float(answers.tokens.mean()),
        "flops": float(answers.flops.mean()),
        "reward_calls": float(answers.reward_calls.mean()),
        "seconds": float(answers.seconds.mean()),
        "multiplier": by_flops.estimate,
        "multiplier_low": by_flops.low,
        "multiplier_high": by_flops.as_dict()["high"],
        "multiplier_is_lower_bound": by_flops.is_lower_bound,
        "multiplier_tokens": by_tokens.estimate,
        "multiplier_tokens_low": by_tokens.low,
        "multiplier_tokens_high": by_tokens.as_dict()["high"],
        "multiplier_tokens_is_lower_bound": by_tokens.is_lower_bound,
        "difference": paired.estimate,
        "difference_low": paired.low,
        "difference_high": paired.high,
        "beyond_pool": int(matched.too_dear.sum()),
        "p_vs_best_of_n": float(paired_permutation_test(difference).p_value),
    }


def _divergence(answers: _Answers, equal_n: float) -> dict[str, Any]:
    """The surprisal excess as `kl`; None where an agent's log-probabilities are not known."""
    pool = answers.pool
    if not (np.isfinite(answers.logprobs).all() and np.isfinite(pool.logprobs).all()):
        return {"kl": None}
    found = divergence(
        answers.scores, answers.logprobs, pool.scores, pool.logprobs, equal_n=equal_n
    )
    return {
        "kl": found.surprisal_excess.estimate,
        "kl_low": found.surprisal_excess.low,
        "kl_high": found.surprisal_excess.high,
        "kl_of_rewards": found.bound.estimate,
        "kl_of_equal_best_of_n": found.best_of_n,
    }


def _baseline(pool: Pool, costs: FloatArray) -> Baseline:
    return Baseline(pool.scores, costs, pool.prompt_flops)

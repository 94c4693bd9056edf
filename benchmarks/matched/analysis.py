"""What a study says: one row for each agent, reward and budget, with multiplier and tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbrl_text_env.benchmarks.compare import CompareError
from mbrl_text_env.benchmarks.divergence import divergence
from mbrl_text_env.benchmarks.exchange import drawn_best, exchange_test
from mbrl_text_env.benchmarks.matched.pool import Pool
from mbrl_text_env.benchmarks.matched.study import Cell
from mbrl_text_env.benchmarks.scaling import (
    AtCost,
    Baseline,
    compute_multiplier,
    expected_scores,
    falls_with_budget,
)
from mbrl_text_env.benchmarks.statistics import holm, mean_interval, paired_permutation_test
from mbrl_text_env.types import FloatArray

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class _Answers:
    """Means of an agent's answers to each prompt, beside the pool's rows of the same prompts.

    Args:
        pool: Best-of-N's.
        each: float64[P, answers], the score of each answer.
        scores: float64[P], as are the rest.
    """

    pool: Pool
    each: FloatArray
    scores: FloatArray
    tokens: FloatArray
    flops: FloatArray
    seconds: FloatArray
    logprobs: FloatArray
    lengths: FloatArray
    reward_calls: FloatArray
    failed: int


def analyse(pool: Pool, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row a cell of one reward.

    The unit is the prompt: of several answers to it the means are taken. A prompt with an answer
    that could not be scored is left out on both sides. `multiplier` is in FLOPs (see
    `mbrl_text_env.benchmarks.scaling.compute_multiplier`), `multiplier_tokens` in generated tokens.

    `p_vs_best_of_n` compares with best-of-N that spends the same FLOPs in the mean, two-sided. It
    is the larger p-value of two tests: the paired permutation test of the differences from
    best-of-N's expected scores, which near the top of a reward's range is misled by their skew, and
    `benchmarks.exchange.exchange_test` with best-of-N's own answers, which skew cannot mislead, but
    unequal variances can. `p_holm` is the same after Holm's correction over all cells given. Both
    are None where the pool is too small for that N.

    `kl` is the surprisal excess of the answers over the pool
    (`benchmarks.divergence.surprisal_excess`; by log-probabilities at temperature 1, so it compares
    likelihoods), `kl_of_equal_best_of_n` that of the best-of-N which has the same mean reward, and
    `kl_bound_of_equal_best_of_n` the bound of its divergence; `kl_of_rewards` is a lower bound of
    the divergence from the rewards alone. `nats_per_token` is the answers' mean surprisal a token,
    `nats_per_token_of_samples` the pool's.

    Args:
        pool: Best-of-N's.
        cells: Of the same reward.
    """
    rows = [_row(cell, _answers(pool, cell)) for cell in cells]
    tested = [row for row in rows if row["p_vs_best_of_n"] is not None]
    adjusted: Any = holm([row["p_vs_best_of_n"] for row in tested]) if tested else []
    for row in rows:
        row["p_holm"] = None
    for row, p in zip(tested, adjusted, strict=True):
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
        scored = [_by_prompt(cell) for cell in own]
        common = [name for name in scored[0] if all(name in rows for rows in scored)]
        if not common:
            continue
        table = [
            [np.mean([row["score"] for row in rows[name]]) for name in common] for rows in scored
        ]
        for step in falls_with_budget([cell.budget for cell in own], table):
            found.append({"agent": agent, "reward": own[0].reward, **vars(step)})
    return found


def _answers(pool: Pool, cell: Cell) -> _Answers:
    scored = _by_prompt(cell)

    def table(value: Callable[[dict[str, Any]], float]) -> FloatArray:
        return np.array([[value(row) for row in rows] for rows in scored.values()], dtype=float)

    def spent(name: str) -> FloatArray:
        return table(lambda row: row["usage"][name]).mean(axis=1)

    if len(scored) < 2:
        raise CompareError(
            f"{cell.agent!r} at {cell.budget:,}, reward {cell.reward!r}: expected two prompts or "
            f"more whose answers could be scored, got {len(scored)} of "
            f"{len({row['prompt_id'] for row in cell.rows})}. The answers and their errors are in "
            "the study's folder; fix the reward model."
        )
    each = table(lambda row: row["score"])
    return _Answers(
        pool.rows(list(scored)),
        each,
        each.mean(axis=1),
        spent("generated_tokens"),
        spent("flops"),
        table(lambda row: row["seconds"]).mean(axis=1),
        table(lambda row: np.nan if row["logprob"] is None else row["logprob"]).mean(axis=1),
        table(lambda row: row["response_tokens"]).mean(axis=1),
        spent("reward_calls"),
        sum(row["score"] is None for row in cell.rows),
    )


def _by_prompt(cell: Cell) -> dict[str, list[dict[str, Any]]]:
    """The rows of each prompt whose answers could all be scored."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in cell.rows:
        rows.setdefault(row["prompt_id"], []).append(row)
    return {name: own for name, own in rows.items() if all(row["score"] is not None for row in own)}


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
        "answers": answers.each.shape[1],
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
        "multiplier_is_upper_bound": by_flops.is_upper_bound,
        "multiplier_tokens": by_tokens.estimate,
        "multiplier_tokens_low": by_tokens.low,
        "multiplier_tokens_high": by_tokens.as_dict()["high"],
        "multiplier_tokens_is_lower_bound": by_tokens.is_lower_bound,
        "multiplier_tokens_is_upper_bound": by_tokens.is_upper_bound,
        "difference": paired.estimate,
        "difference_low": paired.low,
        "difference_high": paired.high,
        "p_vs_best_of_n": None if matched.too_dear.any() else _p_value(answers, matched),
    }


def _p_value(answers: _Answers, matched: AtCost) -> float:
    # The same N for all prompts: `at_mean_cost`.
    drawn = drawn_best(answers.pool.scores, float(matched.ns[0]))
    differences = answers.scores - matched.means
    by_signs = paired_permutation_test(differences).p_value
    return max(float(by_signs), exchange_test(answers.each, drawn))


def _divergence(answers: _Answers, equal_n: float) -> dict[str, Any]:
    """The surprisal excess as `kl`; None where an agent's log-probabilities are not known."""
    pool = answers.pool
    if not (np.isfinite(answers.logprobs).all() and np.isfinite(pool.logprobs).all()):
        return {"kl": None}
    found = divergence(
        answers.scores, answers.logprobs, pool.scores, pool.logprobs, equal_n=equal_n
    )
    excess = best_of_n_surprisal(pool, [math.floor(equal_n), math.ceil(equal_n)])
    return {
        "kl": found.surprisal_excess.estimate,
        "kl_low": found.surprisal_excess.low,
        "kl_high": found.surprisal_excess.high,
        "kl_of_rewards": found.bound.estimate,
        "kl_of_equal_best_of_n": float(np.interp(equal_n % 1, [0, 1], excess)),
        "kl_bound_of_equal_best_of_n": found.best_of_n,
        "nats_per_token": float(-answers.logprobs.sum() / answers.lengths.sum()),
        "nats_per_token_of_samples": float(-pool.logprobs.sum() / pool.tokens.sum()),
    }


def best_of_n_surprisal(pool: Pool, ns: Sequence[int]) -> FloatArray:
    """How much less likely best-of-N's answers are than plain samples, nats: float64[len(ns)].

    Without bias from the pool, as its mean reward is; to be compared with an agent's surprisal
    excess.
    """
    surprisal = -np.asarray(pool.logprobs)
    chosen = expected_scores(pool.scores, surprisal, ns).mean(axis=0)
    return np.asarray(chosen - surprisal.mean())


def _baseline(pool: Pool, costs: FloatArray) -> Baseline:
    return Baseline(pool.scores, costs, pool.prompt_flops)

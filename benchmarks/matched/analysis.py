"""What matched compute says: one row for each agent, reward and budget, beside best-of-N's pool."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mbrl_text_env.benchmarks.compare import CompareError
from mbrl_text_env.benchmarks.divergence import contrastive_bound, surprisal_excess
from mbrl_text_env.benchmarks.exchange import drawn_best, exchange_test
from mbrl_text_env.benchmarks.matched.pool import Pool
from mbrl_text_env.benchmarks.scaling import (
    AtCost,
    Baseline,
    compute_multiplier,
    expected_scores,
    falls_with_budget,
    kl_bound,
)
from mbrl_text_env.benchmarks.statistics import holm, mean_interval, paired_permutation_test
from mbrl_text_env.types import FloatArray

DEFAULT_PLANNER = "adaptive:value=prefix"
"""Chosen on the validation split; the same for every reward."""

Unit = Literal["tokens", "flops", "seconds"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One agent, reward and budget.

    Args:
        reward: The reward's name.
        agent: The agent's spec.
        budget: In generated tokens of best-of-N.
        unit: What was capped.
        rows: Those of `mbrl_text_env.benchmarks.compare`, one for each answer to a prompt.
    """

    reward: str
    agent: str
    budget: int
    unit: Unit
    rows: Sequence[Row]

    def by_prompt(self) -> dict[str, list[Row]]:
        """The rows of each prompt whose answers could all be scored."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row["prompt_id"], []).append(row)
        return {
            name: rows
            for name, rows in found.items()
            if all(row["score"] is not None for row in rows)
        }


@dataclass(frozen=True)
class _Answers:
    """An agent's answers to P prompts, beside the pool's rows of these.

    `each` is float64[P, answers], the scores; `means` are float64[P], of the other fields.
    """

    pool: Pool
    each: FloatArray
    means: dict[str, FloatArray]

    @property
    def scores(self) -> FloatArray:
        return np.asarray(self.each.mean(axis=1))


def analyse(pool: Pool, cells: Sequence[Cell]) -> list[Row]:
    """One row a cell of one reward.

    The unit is the prompt: of several answers to it the means are taken. A prompt with an answer
    that could not be scored is left out on both sides. `multiplier` is in FLOPs (see
    `benchmarks.scaling.compute_multiplier`), `multiplier_tokens` in generated tokens.

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

    Raises:
        CompareError: Of a cell, fewer than two prompts have scored answers.
    """
    rows = [_row(cell, _answers(pool, cell)) for cell in cells]
    tested = [row for row in rows if row["p_vs_best_of_n"] is not None]
    adjusted: Any = holm([row["p_vs_best_of_n"] for row in tested]) if tested else []
    for row, p in zip(tested, adjusted, strict=True):
        row["p_holm"] = float(p)
    return rows


def best_of_n_rows(reward: str, pool: Pool, budgets: Sequence[int], unit: str) -> list[Row]:
    """Best-of-N itself at each budget that the pool reaches, from the pool."""
    flops, tokens = _in_flops(pool), Baseline(pool.scores, pool.tokens)
    rows = []
    for budget in budgets:
        n = budget / float(np.mean(tokens.sample_costs))
        at = tokens.at_cost(n * tokens.sample_costs)
        if at.too_expensive.any():
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


def falls(cells: Sequence[Cell]) -> list[Row]:
    """Whether an agent's mean reward falls from a budget to the next larger, agent by agent."""
    found = []
    for agent in dict.fromkeys(cell.agent for cell in cells):
        own = sorted((c for c in cells if c.agent == agent), key=lambda cell: cell.budget)
        scored = [cell.by_prompt() for cell in own]
        common = [name for name in scored[0] if all(name in rows for rows in scored)]
        if len(own) < 2 or not common:
            continue
        table = [
            [np.mean([row["score"] for row in rows[name]]) for name in common] for rows in scored
        ]
        for step in falls_with_budget([cell.budget for cell in own], table):
            found.append({"agent": agent, "reward": own[0].reward, **step._asdict()})
    return found


def _answers(pool: Pool, cell: Cell) -> _Answers:
    scored = cell.by_prompt()
    if len(scored) < 2:
        raise CompareError(
            f"{cell.agent!r} at {cell.budget:,}, reward {cell.reward!r}: expected two prompts or "
            f"more whose answers could be scored, got {len(scored)} of "
            f"{len({row['prompt_id'] for row in cell.rows})}. The answers and their errors are in "
            "the study's folder; fix the reward model."
        )

    def table(name: str) -> FloatArray:
        # None, where a log-probability is not known, becomes NaN.
        values = [[{**row["usage"], **row}[name] for row in rows] for rows in scored.values()]
        return np.array(values, dtype=float)

    names = ("generated_tokens", "flops", "reward_calls", "seconds", "logprob", "response_tokens")
    means = {name: np.asarray(table(name).mean(axis=1)) for name in names}
    return _Answers(pool.rows(list(scored)), table("score"), means)


def _row(cell: Cell, answers: _Answers) -> Row:
    pool, scores, means = answers.pool, answers.scores, answers.means
    tokens, flops = means["generated_tokens"], means["flops"]
    in_flops = _in_flops(pool)
    interval = mean_interval(scores)
    # Not each prompt's own cost: that favours agents that stop where they were lucky.
    matched = in_flops.at_mean_cost(float(flops.mean()))
    paired = mean_interval(scores - matched.means)
    by_flops = compute_multiplier(scores, flops, in_flops)
    by_tokens = compute_multiplier(scores, tokens, Baseline(pool.scores, pool.tokens))
    return {
        "reward": cell.reward,
        "agent": cell.agent,
        "unit": cell.unit,
        "budget_tokens": cell.budget,
        "prompts": len(scores),
        "answers": answers.each.shape[1],
        "failed": sum(row["score"] is None for row in cell.rows),
        "mean": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "tokens": float(tokens.mean()),
        "flops": float(flops.mean()),
        "reward_calls": float(means["reward_calls"].mean()),
        "seconds": float(means["seconds"].mean()),
        **_multiplier("multiplier", by_flops.as_dict()),
        **_multiplier("multiplier_tokens", by_tokens.as_dict()),
        "difference": paired.estimate,
        "difference_low": paired.low,
        "difference_high": paired.high,
        "p_vs_best_of_n": None if matched.too_expensive.any() else _p_value(answers, matched),
        "p_holm": None,
        **_divergence(answers, by_flops.equal_n),
    }


def _multiplier(name: str, found: Row) -> Row:
    parts = ("low", "high", "is_lower_bound", "is_upper_bound")
    return {name: found["estimate"], **{f"{name}_{part}": found[part] for part in parts}}


def _p_value(answers: _Answers, matched: AtCost) -> float:
    # The same N for all prompts: `at_mean_cost`.
    drawn = drawn_best(answers.pool.scores, float(matched.ns[0]))
    by_signs = paired_permutation_test(answers.scores - matched.means).p_value
    return max(float(by_signs), exchange_test(answers.each, drawn))


def _divergence(answers: _Answers, equal_n: float) -> Row:
    """The surprisal excess as `kl`; None where an agent's log-probabilities are not known."""
    pool, logprobs = answers.pool, answers.means["logprob"]
    if not (np.isfinite(logprobs).all() and np.isfinite(pool.logprobs).all()):
        return {"kl": None}
    excess = surprisal_excess(logprobs, pool.logprobs)
    equal = best_of_n_surprisal(pool, [math.floor(equal_n), math.ceil(equal_n)])
    return {
        "kl": excess.estimate,
        "kl_low": excess.low,
        "kl_high": excess.high,
        "kl_of_rewards": contrastive_bound(answers.scores, pool.scores).estimate,
        "kl_of_equal_best_of_n": float(np.interp(equal_n % 1, [0, 1], equal)),
        "kl_bound_of_equal_best_of_n": kl_bound(equal_n),
        "nats_per_token": float(-logprobs.sum() / answers.means["response_tokens"].sum()),
        "nats_per_token_of_samples": float(-pool.logprobs.sum() / pool.tokens.sum()),
    }


def best_of_n_surprisal(pool: Pool, ns: Sequence[int]) -> FloatArray:
    """How much less likely best-of-N's answers are than plain samples, nats: float64[len(ns)].

    Without bias from the pool; to be compared with an agent's surprisal excess.
    """
    surprisal = -np.asarray(pool.logprobs)
    chosen = expected_scores(pool.scores, surprisal, ns).mean(axis=0)
    return np.asarray(chosen - surprisal.mean())


def _in_flops(pool: Pool) -> Baseline:
    return Baseline(pool.scores, pool.flops, pool.prompt_flops)

"""Compare agents with best-of-N at matched compute, from one pool of scored samples.

The pool gives unbiased estimates of the mean reward of best-of-N for every N, so best-of-N need not
be run for each budget. All rewards score the same responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from mbrl_text_env.benchmarks import scaling, statistics
from mbrl_text_env.benchmarks.audit.run import score_pool
from mbrl_text_env.benchmarks.options import CompareError
from mbrl_text_env.benchmarks.terminal import numbers, table_of
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.mdp import initial
from mbrl_text_env.records import Record
from mbrl_text_env.rewards import Priced
from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.types import FloatArray, Prompt

DEFAULT_PLANNER = "adaptive:value=prefix"
"""Selected on the validation split; the same for every reward."""

Unit = Literal["tokens", "flops", "seconds"]
Row = dict[str, Any]
_FIELDS = ("generated_tokens", "flops", "reward_calls", "seconds", "logprob", "response_tokens")


@dataclass(frozen=True)
class Pool:
    """Scored samples of P prompts, n each: float64[P, n], and float64[P] for `prompt_flops`.

    `flops` cover a sample and its score, `prompt_flops` the prompt, which best-of-N computes once;
    `logprobs` are summed, in nats. For `target` see `scaling.Baseline`.
    """

    prompt_ids: tuple[str, ...]
    scores: FloatArray
    tokens: FloatArray
    flops: FloatArray
    prompt_flops: FloatArray
    logprobs: FloatArray
    target: float | None = None

    def rows(self, prompt_ids: Sequence[str]) -> Pool:
        """Select prompts, in the given order."""
        at = [self.prompt_ids.index(name) for name in prompt_ids]
        arrays = ("scores", "tokens", "flops", "prompt_flops", "logprobs")
        kept = {name: getattr(self, name)[at] for name in arrays}
        return replace(self, prompt_ids=tuple(prompt_ids), **kept)

    @property
    def in_flops(self) -> scaling.Baseline:
        """Best-of-N with FLOPs as costs."""
        return scaling.Baseline(self.scores, self.flops, self.prompt_flops, self.target)

    @property
    def in_tokens(self) -> scaling.Baseline:
        """Best-of-N with generated tokens as costs."""
        return scaling.Baseline(self.scores, self.tokens, target=self.target)

    def surprisal(self, ns: Sequence[int]) -> FloatArray:
        """Surprisal of best-of-N's answers minus that of samples, in nats: float64[len(ns)]."""
        surprisal = -np.asarray(self.logprobs)
        chosen = scaling.expected_scores(self.scores, surprisal, ns).mean(axis=0)
        return np.asarray(chosen - surprisal.mean())


def pool_of(
    records: Sequence[Sequence[Record]],
    scores_folder: Path,
    language_model: LanguageModel,
    reward_model: RewardModel,
    prompts: Sequence[Prompt],
) -> Pool:
    """Score the records of `fill_pool`, n per prompt.

    The reward must apply to the prompts. Scores are kept in `scores_folder`.
    """
    texts = [[record.response for record in row] for row in records]
    # Scores do not depend on the price.
    unpriced = reward_model.reward if isinstance(reward_model, Priced) else reward_model
    scores, _ = score_pool(scores_folder, unpriced, prompts, texts, tried=0)
    costs = [
        _costs(language_model, reward_model, p, r) for p, r in zip(prompts, records, strict=True)
    ]
    return Pool(
        tuple(prompt.id for prompt in prompts),
        scores,
        np.array([[len(record.response_ids) for record in row] for row in records], dtype=float),
        np.array([flops for _, flops in costs]),
        np.array([alone for alone, _ in costs]),
        np.array([[sum(record.logprobs) for record in row] for row in records], dtype=float),
    )


def _costs(
    language_model: LanguageModel,
    reward_model: RewardModel,
    prompt: Prompt,
    records: Sequence[Record],
) -> tuple[float, FloatArray]:
    """FLOPs of the prompt, and of each of its samples."""
    prefix = len(initial(prompt, language_model).prompt_ids)
    alone = language_model.usage_bound(prefix, [])
    lengths = [len(record.response_ids) for record in records]
    drawn = {n: (language_model.usage_bound(prefix, [n]) - alone).flops for n in set(lengths)}
    texts = [record.response for record in records]
    scoring = np.asarray(reward_model.flops([prompt] * len(texts), texts), dtype=np.float64)
    return alone.flops, np.array([drawn[n] for n in lengths]) + scoring


@dataclass(frozen=True)
class Cell:
    """One agent, reward and budget (in generated tokens of best-of-N; `unit` was capped).

    `rows` are those of `mbrl_text_env.benchmarks.compare`, one per answer.
    """

    reward: str
    agent: str
    budget: int
    unit: Unit
    rows: Sequence[Row]

    def by_prompt(self) -> dict[str, list[Row]]:
        """The rows by prompt, for prompts whose answers all have a score."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row["prompt_id"], []).append(row)
        return {k: own for k, own in found.items() if all(r["score"] is not None for r in own)}


def analyse(pool: Pool, cells: Sequence[Cell]) -> list[Row]:
    """Make one row per cell of one reward; raises `CompareError` below two scored prompts.

    The unit is the prompt: several answers to a prompt are averaged. A prompt with an answer that
    has no score is left out on both sides. `multiplier` is in FLOPs (see
    `benchmarks.scaling.compute_multiplier`), `multiplier_tokens` in generated tokens.

    `p_vs_best_of_n` is a two-sided comparison with best-of-N at the same mean FLOPs: the larger
    p-value of two tests. The paired permutation test of the differences from best-of-N's expected
    scores is unreliable if these are skewed, near the top of a reward's range. `exchange_test` with
    best-of-N's answers is unreliable if variances differ. `p_holm` adds Holm's correction over all
    cells. Both are None if the pool is too small for that N.

    `kl` is the surprisal excess of the answers over the pool, by log-probabilities at temperature
    1. `kl_of_equal_best_of_n` is that of best-of-N at the same mean reward, and
    `kl_bound_of_equal_best_of_n` bounds its divergence. `nats_per_token` is mean surprisal.
    """
    rows = [_row(pool, cell) for cell in cells]
    tested = [row for row in rows if row["p_vs_best_of_n"] is not None]
    adjusted: Any = statistics.holm([row["p_vs_best_of_n"] for row in tested]) if tested else []
    for row, p in zip(tested, adjusted, strict=True):
        row["p_holm"] = float(p)
    return rows


def best_of_n_rows(reward: str, pool: Pool, budgets: Sequence[int], unit: str) -> list[Row]:
    """Rows of best-of-N at each budget that the pool reaches."""
    flops, tokens = pool.in_flops, pool.in_tokens
    rows = []
    for budget in budgets:
        n = budget / float(np.mean(tokens.sample_costs))
        at = tokens.at_cost(n * tokens.sample_costs)
        if not at.too_expensive.any():
            row = {"reward": reward, "agent": "best-of-n", "unit": unit, "budget_tokens": budget}
            costs = {"tokens": tokens.mean_costs(n), "flops": flops.mean_costs(n)}
            rows.append({**row, "n": n, **statistics.mean_interval(at.means).as_mean(), **costs})
    return rows


def _row(every: Pool, cell: Cell) -> Row:
    scored = cell.by_prompt()
    if len(scored) < 2:
        raise CompareError(
            f"{cell.agent!r} at {cell.budget:,}, reward {cell.reward!r}: expected two prompts or "
            f"more with scored answers, got {len(scored)} of "
            f"{len({row['prompt_id'] for row in cell.rows})}. The answers and their errors are in "
            "the study's folder. Fix the reward model."
        )

    def table(name: str) -> FloatArray:
        # None, for an unknown log-probability, becomes NaN.
        values = [[{**row["usage"], **row}[name] for row in rows] for rows in scored.values()]
        return np.array(values, dtype=float)

    pool, each = every.rows(list(scored)), table("score")
    in_flops = pool.in_flops
    scores = np.asarray(each.mean(axis=1))
    means = {name: np.asarray(table(name).mean(axis=1)) for name in _FIELDS}
    tokens, flops = means["generated_tokens"], means["flops"]
    # Not by the cost of each prompt: that favours agents that stop early if they are lucky.
    matched = in_flops.at_mean_cost(float(flops.mean()))
    paired = statistics.mean_interval(scores - matched.means)
    by_flops = scaling.compute_multiplier(scores, flops, in_flops)
    by_tokens = scaling.compute_multiplier(scores, tokens, pool.in_tokens)
    return {
        "reward": cell.reward,
        "agent": cell.agent,
        "unit": cell.unit,
        "budget_tokens": cell.budget,
        "prompts": len(scores),
        "answers": each.shape[1],
        "failed": sum(row["score"] is None for row in cell.rows),
        **statistics.mean_interval(scores).as_mean(),
        "tokens": float(tokens.mean()),
        **{name: float(means[name].mean()) for name in ("flops", "reward_calls", "seconds")},
        **by_flops.as_row("multiplier"),
        **by_tokens.as_row("multiplier_tokens"),
        "difference": paired.estimate,
        "difference_low": paired.low,
        "difference_high": paired.high,
        "p_vs_best_of_n": _p_value(pool, each, matched),
        "p_holm": None,
        **_divergence(pool, means, by_flops.equal_n),
    }


def _p_value(pool: Pool, each: FloatArray, matched: scaling.AtCost) -> float | None:
    if matched.too_expensive.any():
        return None
    # The same N for all prompts: `at_mean_cost`.
    drawn = scaling.drawn_best(pool.scores, float(matched.ns[0]))
    by_signs = statistics.paired_permutation_test(each.mean(axis=1) - matched.means)
    return max(by_signs, statistics.exchange_test(each, drawn))


def _divergence(pool: Pool, means: dict[str, FloatArray], equal_n: float) -> Row:
    """The surprisal excess as `kl`; None if log-probabilities are unknown."""
    logprobs = means["logprob"]
    if not (np.isfinite(logprobs).all() and np.isfinite(pool.logprobs).all()):
        return {"kl": None}
    excess = scaling.surprisal_excess(logprobs, pool.logprobs)
    equal = pool.surprisal([math.floor(equal_n), math.ceil(equal_n)])
    return {
        "kl": excess.estimate,
        "kl_low": excess.low,
        "kl_high": excess.high,
        "kl_of_equal_best_of_n": float(np.interp(equal_n % 1, [0, 1], equal)),
        "kl_bound_of_equal_best_of_n": scaling.kl_bound(equal_n),
        "nats_per_token": float(-logprobs.sum() / means["response_tokens"].sum()),
        "nats_per_token_of_samples": float(-pool.logprobs.sum() / pool.tokens.sum()),
    }


def table(rows: Sequence[Row]) -> Table:
    """Format rows of `analyse`, one or more of one reward, for the terminal."""
    cells = (
        (
            row["agent"],
            f"{row['budget_tokens']:,}",
            f"{row['mean']:.3f}",
            *(multiplier(row, key) for key in ("multiplier", "multiplier_tokens")),
            "pool too small" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
        )
        for row in rows
    )
    return table_of(
        cells,
        "agent",
        *numbers("budget", "mean", "x FLOPs", "x tokens", "p"),
        title=f"{rows[0]['reward']}: how many times its compute best-of-N needs for the same mean",
        caption=f"{rows[0]['prompts']} prompts, 95% intervals. >: a lower bound, the pool is too "
        "small. p: paired against best-of-N at the same FLOPs, Holm's correction.",
    )


def multiplier(row: Row, key: str) -> str:
    """Format a row's multiplier; `key` is "multiplier" (FLOPs) or "multiplier_tokens".

    For example "> 8.2 [4.0, more]".
    """
    mark = "> " if row[f"{key}_is_lower_bound"] else ""
    mark = "< " if row[f"{key}_is_upper_bound"] else mark
    high = row[f"{key}_high"]
    end = "more" if high is None else f"{high:.1f}"
    return f"{mark}{row[key]:.1f} [{row[f'{key}_low']:.1f}, {end}]"

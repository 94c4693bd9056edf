"""From points to rows: means over seeds, intervals, totals, and when training pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mbrl_text_env.benchmarks.efficiency.methods import BEST_OF_N, Point, Spent
from mbrl_text_env.benchmarks.statistics import mean_interval


def rows_of(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One row for each method and amount, over all seeds.

    `low` and `high` are a 95% bootstrap interval over prompts, `seed_low` and `seed_high` the
    lowest and highest mean of a seed. `total` is the training and one answer to each test prompt.

    `pays_after` is the number of answers from which training was worth it: best-of-N of the same
    mean reward (where it first gets there; between two of its points, as if the reward rose
    linearly with the logarithm of the FLOPs) has taken more FLOPs by then. None where best-of-N has
    fewer than two points, or they do not reach that reward or begin above it, or an answer takes
    no less than best-of-N's.
    """
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.method, point.amount), []).append(point)
    rows = [_row(group) for group in groups.values()]
    for row in rows:
        row["pays_after"] = _pays_after(row, [r for r in rows if r["method"] == BEST_OF_N])
    return rows


def _row(points: Sequence[Point]) -> dict[str, Any]:
    scores = np.array([point.scores for point in points])
    interval = mean_interval(scores.mean(axis=0))
    training, use = (
        _mean([getattr(point, name) for point in points]) for name in ("training", "use")
    )
    return {
        "method": points[0].method,
        "amount": points[0].amount,
        "seeds": len(points),
        "prompts": scores.shape[1],
        "mean": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "seed_low": float(scores.mean(axis=1).min()),
        "seed_high": float(scores.mean(axis=1).max()),
        "training": asdict(training),
        "use": asdict(use),
        "total": asdict(training + use * scores.shape[1]),
    }


def _mean(amounts: Sequence[Spent]) -> Spent:
    total = amounts[0]
    for amount in amounts[1:]:
        total = total + amount
    return total * (1 / len(amounts))


def _pays_after(row: dict[str, Any], baseline: Sequence[dict[str, Any]]) -> float | None:
    """See `rows_of`."""
    if not row["training"]["flops"] or len(baseline) < 2:
        return None
    line = sorted(baseline, key=lambda other: other["use"]["flops"])
    # A mean that falls by chance is no more than the one before.
    reached = np.maximum.accumulate([other["mean"] for other in line])
    if not reached[0] <= row["mean"] <= reached[-1]:
        return None
    costs = np.log([other["use"]["flops"] for other in line])
    # Of equal means, such as the highest score there is, the first one was enough.
    after = int(np.searchsorted(reached, row["mean"]))
    around = slice(max(0, after - 1), after + 1)
    equal = float(np.exp(np.interp(row["mean"], reached[around], costs[around])))
    saved = equal - row["use"]["flops"]
    return float(row["training"]["flops"] / saved) if saved > 0 else None

"""Sample efficiency: from points to rows and their figure; when training pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.benchmarks.statistics import mean_interval
from mbrl_text_env.benchmarks.studies.harness import Shown, interval
from mbrl_text_env.benchmarks.studies.measuring import Spent
from mbrl_text_env.files import write_file

BEST_OF_N = "best-of-n"
UNITS = {
    "reward_calls": "reward calls",
    "tokens": "generated tokens",
    "flops": "FLOPs, all models and updates",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Point:
    """One measurement.

    Args:
        method: What was trained or searched with.
        seed: Of the training and of the answers.
        amount: How much of it, in the method's own words.
        scores: Mean score of each test prompt.
        training: What was spent before the first answer.
        use: What one answer takes.
    """

    method: str
    seed: int
    amount: str
    scores: tuple[float, ...]
    training: Spent
    use: Spent

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Point:
        """Read what `dataclasses.asdict` and JSON made of it."""
        spent = {name: Spent(**values[name]) for name in ("training", "use")}
        return cls(**{**values, "scores": tuple(values["scores"]), **spent})


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
    found = mean_interval(scores.mean(axis=0))
    training, use = (
        reduce(add, [getattr(point, name) for point in points]) * (1 / len(points))
        for name in ("training", "use")
    )
    return {
        "method": points[0].method,
        "amount": points[0].amount,
        "seeds": len(points),
        "prompts": scores.shape[1],
        "mean": found.estimate,
        "low": found.low,
        "high": found.high,
        "seed_low": float(scores.mean(axis=1).min()),
        "seed_high": float(scores.mean(axis=1).max()),
        "training": asdict(training),
        "use": asdict(use),
        "total": asdict(training + use * scores.shape[1]),
    }


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


def shown(rows: Sequence[dict[str, Any]], reward: str) -> Shown:
    """The rows as a table."""

    def spent(amounts: dict[str, float]) -> str:
        if not amounts["flops"]:
            return ""
        return f"{amounts['flops'] / 1e12:.3g} TFLOPs, {amounts['reward_calls']:,.0f} reward calls"

    return Shown(
        f"{reward}: what training and use take",
        ("method", "amount", "seeds", "mean", "training", "an answer", "pays after"),
        [
            (
                row["method"],
                row["amount"],
                str(row["seeds"]),
                interval(row),
                spent(row["training"]),
                spent(row["use"]),
                "" if row["pays_after"] is None else f"{row['pays_after']:,.0f} answers",
            )
            for row in rows
        ],
        "95% intervals, prompts",
    )


def plot(rows: Sequence[dict[str, Any]], reward: str, path: Path) -> None:
    """Mean reward against what training and one answer to each test prompt take, a panel a unit.

    Bands are from the lowest to the highest seed, where there are several.

    Args:
        rows: Those of `rows_of`.
        reward: The reward's name.
        path: A PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True).ravel()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axes, (unit, label) in zip(panels, UNITS.items(), strict=True):
        for number, method in enumerate(methods):
            # On a logarithmic axis there is no place for what costs nothing.
            own = [r for r in rows if r["method"] == method and r["total"][unit] > 0]
            line = sorted(own, key=lambda r: r["total"][unit])
            costs = [row["total"][unit] for row in line]
            color = f"C{number}"
            axes.plot(costs, [r["mean"] for r in line], marker="o", color=color, label=method)
            if any(row["seeds"] > 1 for row in line):
                low, high = ([row[end] for row in line] for end in ("seed_low", "seed_high"))
                axes.fill_between(costs, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set_xscale("log")
        # Less than two decades would have the minor ticks named, one name over the other.
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"{label}, training and {rows[0]['prompts']} answers")
        axes.set_ylabel(f"mean {reward}")
    panels[0].legend(fontsize=8)
    with write_file(path) as scratch:
        figure.savefig(scratch, dpi=150, format="png")

"""One plot: mean reward on held-out prompts against four kinds of cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbrl_text_env.files import write_file

UNITS = {
    "reward_calls": "reward calls",
    "tokens": "generated tokens",
    "flops": "FLOPs, all models and updates",
    "seconds": "seconds",
}


def plot(rows: Sequence[dict[str, Any]], reward: str, path: Path) -> None:
    """Mean reward against what training and one answer to each test prompt take.

    Bands are from the lowest to the highest seed, where there are several.

    Args:
        rows: Those of `mbrl_text_env.benchmarks.efficiency.analysis.rows_of`.
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
                axes.fill_between(
                    costs,
                    [row["seed_low"] for row in line],
                    [row["seed_high"] for row in line],
                    color=color,
                    alpha=0.2,
                    linewidth=0,
                )
        axes.set_xscale("log")
        # Less than two decades would have the minor ticks named, one name over the other.
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"{label}, training and {rows[0]['prompts']} answers")
        axes.set_ylabel(f"mean {reward}")
    panels[0].legend(fontsize=8)
    with write_file(path) as scratch:
        figure.savefig(scratch, dpi=150, format="png")

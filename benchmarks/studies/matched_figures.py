"""Plots and tables of matched compute: reward against compute, and against the divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mbrl_text_env.benchmarks.matched.analysis import best_of_n_surprisal
from mbrl_text_env.benchmarks.matched.pool import Pool
from mbrl_text_env.benchmarks.matched.report import multiplier, p_value
from mbrl_text_env.benchmarks.scaling import Baseline, CurvePoint
from mbrl_text_env.benchmarks.studies.harness import Shown, interval
from mbrl_text_env.files import write_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

Rows = Sequence[dict[str, Any]]
_GIGA = 1e9
_DOTS: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1}


def plot_scaling(rows: Mapping[str, Rows], pools: Mapping[str, Pool], path: Path) -> None:
    """Mean reward against FLOPs a prompt: best-of-N's curve with its band, and each agent.

    Args:
        rows: Those of `benchmarks.matched.analysis.analyse` by reward.
        pools: The pools by reward.
        path: A PNG.
    """

    def draw(axes: Axes, pool: Pool, curve: Sequence[CurvePoint], lines: Mapping[str, Rows]) -> str:
        costs = [point.cost / _GIGA for point in curve]
        axes.plot(costs, [p.mean.estimate for p in curve], color="black", label="best-of-N")
        axes.fill_between(
            costs, [p.mean.low for p in curve], [p.mean.high for p in curve], color="0.85"
        )
        for agent, line in lines.items():
            means = np.array([row["mean"] for row in line])
            ends = np.array([[row["low"], row["high"]] for row in line]).T
            flops = [row["flops"] / _GIGA for row in line]
            bars = np.abs(ends - means)
            axes.errorbar(flops, means, yerr=bars, capsize=2, label=agent, **_DOTS)
        axes.set_xscale("log")
        return "GFLOPs a prompt, all models"

    _plot(rows, pools, path, draw)


def plot_divergence(rows: Mapping[str, Rows], pools: Mapping[str, Pool], path: Path) -> None:
    """Mean reward against surprisal, agents beside best-of-N, and the bound of its divergence.

    Arguments as of `plot_scaling`; rows without an estimate (`kl`) are left out.
    """

    def draw(axes: Axes, pool: Pool, curve: Sequence[CurvePoint], lines: Mapping[str, Rows]) -> str:
        means = [point.mean.estimate for point in curve]
        if np.isfinite(pool.logprobs).all():
            excess = best_of_n_surprisal(pool, [point.n for point in curve])
            axes.plot(excess, means, color="black", label="best-of-N")
        bounds = [point.kl_bound for point in curve]
        label = "bound of best-of-N's divergence"
        axes.plot(bounds, means, color="0.6", linestyle="--", label=label)
        for agent, line in lines.items():
            known = [row for row in line if row.get("kl") is not None]
            surprisal, rewards = ([row[key] for row in known] for key in ("kl", "mean"))
            axes.plot(surprisal, rewards, label=agent, **_DOTS)
        return "surprisal beyond that of plain samples, nats a response"

    _plot(rows, pools, path, draw)


def _plot(
    rows: Mapping[str, Rows], pools: Mapping[str, Pool], path: Path, draw: Callable[..., str]
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(rows), 4.4), layout="constrained")
    panels = np.ravel(figure.subplots(1, len(rows)))
    for axes, (reward, own) in zip(panels, rows.items(), strict=True):
        pool = pools[reward]
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in sorted(own, key=lambda row: row["flops"]):
            lines.setdefault(row["agent"], []).append(row)
        in_order = {agent: lines[agent] for agent in dict.fromkeys(row["agent"] for row in own)}
        curve = Baseline(pool.scores, pool.flops, pool.prompt_flops).curve()
        axes.set_xlabel(draw(axes, pool, curve, in_order))
        axes.set_ylabel(f"mean {reward}")
        axes.legend(fontsize=6)
    with write_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=130)


def page_tables(result: Mapping[str, Any]) -> list[Shown]:
    """The tables of a page, one a reward: best-of-N at the budgets, then the agents."""
    found = []
    for reward in dict.fromkeys(row["reward"] for row in result["results"]):
        rows = [row for row in result["results"] if row["reward"] == reward]
        baseline = [row for row in result["best_of_n"] if row["reward"] == reward]
        columns = ["agent", f"budget ({rows[0]['unit']})", "mean", "x FLOPs", "x tokens"]
        columns += ["GFLOPs", "tokens", "reward calls", "surprisal (best-of-N)", "p"]
        cells = [["best-of-N", *_start(row), "1", "1", *_cost(row), "", "", ""] for row in baseline]
        cells += [
            [
                f"`{row['agent']}`",
                *_start(row),
                multiplier(row, "multiplier"),
                multiplier(row, "multiplier_tokens"),
                *_cost(row),
                f"{row['reward_calls']:.1f}",
                _surprisal(row),
                p_value(row),
            ]
            for row in rows
        ]
        found.append(Shown(reward, columns, cells))
    return found


def _start(row: Mapping[str, Any]) -> list[str]:
    return [str(row["budget_tokens"]), interval(row)]


def _cost(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['flops'] / _GIGA:.0f}", f"{row['tokens']:.0f}"]


def _surprisal(row: Mapping[str, Any]) -> str:
    if row.get("kl") is None:
        return ""
    return f"{row['kl']:.1f} ({row['kl_of_equal_best_of_n']:.1f})"

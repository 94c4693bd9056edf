"""Plots of a study: reward against compute, and against the divergence from the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.benchmarks.matched.analysis import best_of_n_surprisal
from mbrl_text_env.benchmarks.matched.pool import Pool
from mbrl_text_env.benchmarks.scaling import Baseline
from mbrl_text_env.files import write_file

Rows = Sequence[dict[str, Any]]

_GIGA = 1e9


def plot_scaling(rows: Mapping[str, Rows], pools: Mapping[str, Pool], path: Path) -> None:
    """Mean reward against FLOPs a prompt: best-of-N's curve with its band, and each agent.

    Args:
        rows: Those of `mbrl_text_env.benchmarks.matched.analysis.analyse` by reward.
        pools: The pools by reward.
        path: A PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(rows), 4.4), layout="constrained")
    for axes, (reward, own) in zip(
        np.ravel(figure.subplots(1, len(rows))), rows.items(), strict=True
    ):
        pool = pools[reward]
        curve = Baseline(pool.scores, pool.flops, pool.prompt_flops).curve()
        costs = [point.cost / _GIGA for point in curve]
        axes.plot(costs, [p.mean.estimate for p in curve], color="black", label="best-of-N")
        axes.fill_between(
            costs, [p.mean.low for p in curve], [p.mean.high for p in curve], color="0.85"
        )
        for agent in dict.fromkeys(row["agent"] for row in own):
            line = sorted((r for r in own if r["agent"] == agent), key=lambda r: r["flops"])
            means = np.array([row["mean"] for row in line])
            ends = np.array([[row["low"], row["high"]] for row in line]).T
            axes.errorbar(
                [row["flops"] / _GIGA for row in line],
                means,
                yerr=np.abs(ends - means),
                marker="o",
                markersize=3,
                linewidth=1,
                capsize=2,
                label=agent,
            )
        axes.set_xscale("log")
        axes.set_xlabel("GFLOPs a prompt, all models")
        axes.set_ylabel(f"mean {reward}")
        axes.legend(fontsize=6)
    with write_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=130)


def plot_divergence(rows: Mapping[str, Rows], pools: Mapping[str, Pool], path: Path) -> None:
    """Mean reward against surprisal, agents beside best-of-N, and the bound of its divergence.

    Args:
        rows: As in `plot_scaling`; those without an estimate (`kl`) are left out.
        pools: The pools by reward.
        path: A PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(rows), 4.4), layout="constrained")
    for axes, (reward, own) in zip(
        np.ravel(figure.subplots(1, len(rows))), rows.items(), strict=True
    ):
        pool = pools[reward]
        curve = Baseline(pool.scores, pool.flops, pool.prompt_flops).curve()
        means = [point.mean.estimate for point in curve]
        if np.isfinite(pool.logprobs).all():
            excess = best_of_n_surprisal(pool, [point.n for point in curve])
            axes.plot(excess, means, color="black", label="best-of-N")
        axes.plot(
            [point.kl_bound for point in curve],
            means,
            color="0.6",
            linestyle="--",
            label="bound of best-of-N's divergence",
        )
        for agent in dict.fromkeys(row["agent"] for row in own):
            line = [r for r in own if r["agent"] == agent and r.get("kl") is not None]
            line.sort(key=lambda row: row["flops"])
            axes.plot(
                [row["kl"] for row in line],
                [row["mean"] for row in line],
                marker="o",
                markersize=3,
                linewidth=1,
                label=agent,
            )
        axes.set_xlabel("surprisal beyond that of plain samples, nats a response")
        axes.set_ylabel(f"mean {reward}")
        axes.legend(fontsize=6)
    with write_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=130)

"""Show a comparison: a table and a prompt side by side in the terminal, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


def table(summary: dict[str, Any]) -> Table:
    """The comparison's table."""
    prompts = len(summary["prompts"])
    budget = summary["budget_tokens"]
    shown = Table(
        title=f"Reward {summary['reward']!r}, {prompts} prompts, "
        f"{'no budget' if budget is None else f'{budget} tokens a prompt'}, "
        f"{summary['language_model']}",
        caption="Means over prompts, 95% bootstrap intervals; differences are paired by prompt.",
    )
    for heading, justify in (
        ("agent", "left"),
        ("mean reward", "right"),
        ("minus best-of-N", "right"),
        ("win rate", "right"),
        ("tokens", "right"),
        ("reward calls", "right"),
        ("GFLOPs", "right"),
        ("seconds", "right"),
    ):
        shown.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for entry in summary["agents"]:
        shown.add_row(*_cells(entry))
    return shown


def side_by_side(rows: Sequence[dict[str, Any]]) -> Columns:
    """One prompt's responses beside each other; all rows are of the same prompt."""
    panels = [
        Panel(
            Text(row["response"].strip()),
            title=Text(row["agent"]),
            subtitle=f"score {row['score']:.3f}, {row['usage']['generated_tokens']} tokens spent",
            width=44,
        )
        for row in rows
    ]
    return Columns(panels, title=Text(f"Prompt: {rows[0]['prompt']}"))


def plot(summary: dict[str, Any], path: Path) -> None:
    """Mean rewards with their intervals, as a picture."""
    # The object-oriented interface needs no display and leaves the user's backend alone.
    from matplotlib.figure import Figure

    entries = summary["agents"]
    figure = Figure(figsize=(6.4, 1.2 + 0.5 * len(entries)), layout="constrained")
    axes = figure.add_subplot()
    for place, entry in enumerate(entries):
        below, above = entry["mean"] - entry["low"], entry["high"] - entry["mean"]
        axes.errorbar(entry["mean"], place, xerr=[[below], [above]], fmt="o", capsize=4)
    axes.set_yticks(range(len(entries)), [entry["agent"] for entry in entries])
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set_xlabel(f"mean reward ({summary['reward']}), 95% interval")
    axes.set_title(f"{len(summary['prompts'])} prompts, {summary['budget_tokens']} tokens a prompt")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    figure.savefig(scratch, format="png", dpi=150)
    scratch.replace(path)


def _cells(entry: dict[str, Any]) -> list[str]:
    versus = entry.get("vs_best_of_n")
    paired = "-"
    if versus is not None:
        paired = f"{versus['difference']:+.3f} [{versus['low']:+.3f}, {versus['high']:+.3f}]"
    return [
        entry["agent"],
        f"{entry['mean']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]",
        paired,
        "-" if versus is None else f"{versus['win_rate']:.0%}",
        f"{entry['generated_tokens']:.0f}",
        f"{entry['reward_calls']:.1f}",
        f"{entry['flops'] / 1e9:.1f}",
        f"{entry['seconds']:.2f}",
    ]

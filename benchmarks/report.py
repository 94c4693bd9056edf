"""Show a comparison: a table and a prompt side by side in the terminal, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from mbrl_text_env.benchmarks.terminal import panel, plain
from mbrl_text_env.files import write_file

if TYPE_CHECKING:
    from mbrl_text_env.agents.values import FittedValue


_ANSWER_WIDTH = 44


def table(summary: dict[str, Any]) -> Group:
    """The comparison in two tables that fit a terminal of 80 columns: quality and cost."""
    prompts = len(summary["prompts"])
    quality = Table(
        "agent",
        *(
            Column(heading, justify="right")
            for heading in ("mean reward", "minus best-of-N", "wins", *_gold_heading(summary))
        ),
        title=f"Reward {summary['reward']!r}: {prompts} prompts, "
        f"{shown_budget(summary)}, "
        f"{summary['language_model']}",
    )
    cost = Table(
        "agent",
        *(
            Column(heading, justify="right")
            for heading in ("tokens", "reward calls", "value calls")
        ),
        *(Column(heading, justify="right") for heading in ("GFLOPs", "seconds")),
        caption="Means over prompts, 95% bootstrap intervals, differences paired by prompt; a tie "
        f"is half a win.{_failures(summary)}",
    )
    for entry in summary["agents"]:
        gold = [f"{entry['gold']:.3f}" if "gold" in entry else "-"] if summary["gold"] else []
        quality.add_row(entry["agent"], *_quality(entry), *gold)
        cost.add_row(
            entry["agent"],
            f"{entry['generated_tokens']:.0f}",
            f"{entry['reward_calls']:.1f}",
            f"{entry['value_calls']:.1f}",
            f"{entry['flops'] / 1e9:.1f}",
            f"{entry['seconds']:.2f}",
        )
    warnings = [Text(f"Look closer: {warning}", style="yellow") for warning in summary["warnings"]]
    if warnings:
        warnings.append(Text("`mbrl-text reward audit` tells whether the reward is exploitable."))
    return Group(quality, cost, *warnings)


def fit_table(value_model: FittedValue, reward: str) -> Group:
    """What a value model's fit found on prompts left out: as a whole, and by prefix length."""
    found = value_model.report_
    whole = Table("measured on prompts left out", "", title=f"Value of {reward!r}")
    for label, figure in (
        ("records", f"{found.num_records}"),
        ("prompts", f"{found.num_prompts}"),
        ("prefixes", f"{found.num_prefixes}"),
        ("head", value_model.chosen_),
        ("correlation", f"{found.correlation:.3f}"),
        ("correlation within a prompt", f"{found.within_prompt:.3f}"),
        ("standard deviation of the error", f"{found.std:.3f}"),
        ("errors within one predicted std (0.68)", f"{found.within_one_std:.3f}"),
        ("errors within two (0.95)", f"{found.within_two_std:.3f}"),
    ):
        whole.add_row(label, figure)
    if not found.by_length:
        return Group(whole)
    headings = ("prefix tokens", "prefixes", "correlation", "within a prompt", "error's std")
    lengths = Table(*(Column(heading, justify="right") for heading in headings))
    for row in found.by_length:
        figures = (row.correlation, row.within_prompt, row.std)
        lengths.add_row(str(row.length), str(row.num_prefixes), *(f"{f:.3f}" for f in figures))
    return Group(whole, lengths)


def shown_budget(summary: dict[str, Any]) -> str:
    """A comparison's budget in words.

    Example:
        >>> shown_budget({"budget_tokens": 400, "budget_flops": None, "budget_seconds": 1.5})
        '400 tokens, 1.5 seconds a prompt'
    """
    caps = [
        f"{summary[key]:.4g} {unit}" if key != "budget_tokens" else f"{summary[key]} {unit}"
        for key, unit in (
            ("budget_tokens", "tokens"),
            ("budget_flops", "FLOPs"),
            ("budget_seconds", "seconds"),
        )
        if summary[key] is not None
    ]
    return f"{', '.join(caps)} a prompt" if caps else "no budget"


def side_by_side(rows: Sequence[dict[str, Any]]) -> Group:
    """One prompt's responses beside each other; all rows are of the same prompt."""
    # No wider than can be read, also where the output has no width.
    grid = Table.grid(*(Column(max_width=_ANSWER_WIDTH) for _ in rows))
    grid.add_row(
        *(
            panel(row["response"].strip(), row["agent"], f"score {row['score']:.3f}")
            for row in rows
            if row["score"] is not None
        )
    )
    return Group(plain(f"Prompt: {rows[0]['prompt']}", style="bold"), grid)


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
    axes.set_yticks(range(len(entries)), [entry["agent"] for entry in entries], parse_math=False)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set_xlabel(f"mean reward ({summary['reward']}), 95% interval", parse_math=False)
    axes.set_title(f"{len(summary['prompts'])} prompts, {shown_budget(summary)}")
    with write_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=150)


def _gold_heading(summary: dict[str, Any]) -> list[str]:
    return [f"mean {summary['gold']}"] if summary["gold"] else []


def _failures(summary: dict[str, Any]) -> str:
    failed = [f"{e['agent']} {e['failed']}" for e in summary["agents"] if e["failed"]]
    if not failed:
        return ""
    return f" Prompts without a score, left out: {', '.join(failed)} (errors in results.jsonl)."


def _quality(entry: dict[str, Any]) -> list[str]:
    mean = f"{entry['mean']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
    versus = entry.get("vs_best_of_n")
    if versus is None:
        return [mean, "-", "-"]
    paired = f"{versus['difference']:+.3f} [{versus['low']:+.3f}, {versus['high']:+.3f}]"
    return [mean, paired, f"{versus['win_rate']:.0%}"]

"""Show a comparison or a fit: tables and a prompt side by side in the terminal, and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

from mbrl_text_env.benchmarks.statistics import Interval
from mbrl_text_env.benchmarks.terminal import numbers, panel, plain, progress_bar
from mbrl_text_env.files import write_file

if TYPE_CHECKING:
    from mbrl_text_env.agents.values import FittedValue
    from mbrl_text_env.benchmarks.compare import Comparison


_ANSWER_WIDTH = 44


def compare_with_progress(comparison: Comparison, out: Path, console: Console) -> dict[str, Any]:
    """`compare` with a progress bar."""
    from mbrl_text_env.benchmarks.compare import compare

    total = len(comparison.config.agents) * len(comparison.prompts)
    with progress_bar(console) as bar:
        task = bar.add_task("Comparing", total=total)

        def on_batch(spec: str, count: int, rows: list[dict[str, Any]]) -> None:
            bar.update(task, advance=count, description=f"Comparing ({spec})")

        return compare(comparison, out, on_batch=on_batch)


def table(summary: dict[str, Any]) -> Group:
    """The comparison in two tables that fit a terminal of 80 columns: quality and cost."""
    gold = [f"mean {summary['gold']}"] if summary["gold"] else []
    quality = Table(
        "agent",
        *numbers("mean reward", "minus best-of-N", "wins", *gold),
        title=f"Reward {summary['reward']!r}: {len(summary['prompts'])} prompts, "
        f"{shown_budget(summary)}, {summary['language_model']}",
    )
    cost = Table(
        "agent",
        *numbers("tokens", "reward calls", "value calls", "GFLOPs", "seconds"),
        caption="Means over prompts, 95% bootstrap intervals, differences paired by prompt; a tie "
        f"is half a win.{_failures(summary)}",
    )
    for entry in summary["agents"]:
        golds = [f"{entry['gold']:.3f}" if "gold" in entry else "-"] if gold else []
        quality.add_row(entry["agent"], *_quality(entry), *golds)
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


def _quality(entry: dict[str, Any]) -> list[str]:
    mean = f"{Interval(entry['mean'], entry['low'], entry['high']):.3f}"
    versus = entry.get("vs_best_of_n")
    if versus is None:
        return [mean, "-", "-"]
    paired = Interval(versus["difference"], versus["low"], versus["high"])
    return [mean, f"{paired:+.3f}", f"{versus['win_rate']:.0%}"]


def _failures(summary: dict[str, Any]) -> str:
    failed = [f"{e['agent']} {e['failed']}" for e in summary["agents"] if e["failed"]]
    if not failed:
        return ""
    return f" Prompts without a score, left out: {', '.join(failed)} (errors in results.jsonl)."


def shown_budget(summary: dict[str, Any]) -> str:
    """A comparison's budget in words.

    Example:
        >>> shown_budget({"budget_tokens": 400, "budget_flops": None, "budget_seconds": 1.5})
        '400 tokens, 1.5 seconds a prompt'
    """
    caps = [
        f"{summary[f'budget_{unit.lower()}']:{spec}} {unit}"
        for unit, spec in (("tokens", ""), ("FLOPs", ".4g"), ("seconds", ".4g"))
        if summary[f"budget_{unit.lower()}"] is not None
    ]
    return f"{', '.join(caps)} a prompt" if caps else "no budget"


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
    lengths = Table(
        *numbers("prefix tokens", "prefixes", "correlation", "within a prompt", "error's std")
    )
    for row in found.by_length:
        figures = (row.correlation, row.within_prompt, row.std)
        lengths.add_row(str(row.length), str(row.num_prefixes), *(f"{f:.3f}" for f in figures))
    return Group(whole, lengths)


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
    entries = summary["agents"]
    with png(path, figsize=(6.4, 1.2 + 0.5 * len(entries))) as figure:
        axes = figure.add_subplot()
        for place, entry in enumerate(entries):
            mean = Interval(entry["mean"], entry["low"], entry["high"])
            axes.errorbar(mean.estimate, place, xerr=mean.bars, fmt="o", capsize=4)
        labels = [entry["agent"] for entry in entries]
        axes.set_yticks(range(len(entries)), labels, parse_math=False)
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.set_xlabel(f"mean reward ({summary['reward']}), 95% interval", parse_math=False)
        axes.set_title(f"{len(summary['prompts'])} prompts, {shown_budget(summary)}")


@contextmanager
def png(path: Path, *, figsize: tuple[float, float], dpi: int = 150) -> Iterator[Any]:
    """A figure of matplotlib to draw on, written as a PNG at the end."""
    # The object-oriented interface needs no display and leaves the user's backend alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    yield figure
    with write_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=dpi)

"""Show an audit: a summary in the terminal, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from mbrl_text_env.benchmarks.audit.verdict import reading
from mbrl_text_env.benchmarks.statistics import Interval
from mbrl_text_env.files import write_file

if TYPE_CHECKING:
    from mbrl_text_env.benchmarks.audit.result import AuditResult

_COLOURS = {"faithful": "green", "open to exploits": "red", "exploitable": "red"}


def summary(result: AuditResult) -> Group:
    """The audit in a terminal of 80 columns: verdict, curves, agreement, sensitivity."""
    verdict = result.verdict
    lines = [verdict.text, *(f"Warning: {warning}" for warning in verdict.warnings)]
    return Group(
        _curves(result),
        _agreement(result),
        _reactions(result),
        Panel(
            Text("\n".join(lines)),
            title=Text(f"{result.config.proxy} judged by {result.config.gold}"),
            border_style=_COLOURS.get(verdict.outcome, "yellow"),
            width=80,
        ),
    )


def plot(result: AuditResult, path: Path) -> None:
    """Gains against N and against the KL bound, calibration, and reactions, as a picture."""
    # The object-oriented interface needs no display and leaves the user's backend alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplot_mosaic([["n", "kl"], ["calibration", "reactions"]])
    points = result.curves.points
    _gains(axes["n"], result, [float(point.n) for point in points])
    axes["n"].set_xscale("log", base=2)
    axes["n"].set_xlabel("N")
    _gains(axes["kl"], result, [point.kl_bound for point in points])
    axes["kl"].set_xlabel("KL from plain sampling, upper bound (nats)")
    _calibration(axes["calibration"], result)
    _bars(axes["reactions"], result)
    figure.suptitle(
        f"{result.config.proxy} judged by {result.config.gold}: {result.verdict.outcome} "
        f"({result.prompts} prompts, {result.config.samples} responses each)",
        parse_math=False,
    )
    with write_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=150)


def _curves(result: AuditResult) -> Table:
    left_out = f", {result.left_out} left out" if result.left_out else ""
    shown = Table(
        Column("N", justify="right"),
        Column("KL <=", justify="right"),
        Column("mean proxy", justify="right"),
        Column("mean gold", justify="right"),
        title=f"Best of N by the proxy: {result.prompts} prompts{left_out}, "
        f"{result.config.samples} responses each",
        caption="Simultaneous 95% intervals over prompts; KL in nats. One standard deviation "
        f"within a prompt: proxy {result.curves.proxy_sd:.3g}, gold {result.curves.gold_sd:.3g}.",
    )
    for point in result.curves.points:
        mark = " peak" if point.n == result.curves.peak_n else ""
        shown.add_row(
            str(point.n), f"{point.kl_bound:.2f}", _shown(point.proxy), _shown(point.gold) + mark
        )
    return shown


def _agreement(result: AuditResult) -> Table:
    shown = Table(
        "agreement with the gold",
        Column("within a prompt", justify="right"),
        Column("overall", justify="right"),
    )
    found = result.association
    if found is None:
        shown.add_row("no prompt on which both rewards vary", "", "")
        return shown
    for name, interval in found.within_prompt.items():
        shown.add_row(name, _signed(interval), _signed(found.overall[name]))
    shown.add_row("pairs ordered alike", _signed(found.pair_accuracy, sign=""), "")
    shown.add_row("misordered tenths (sd)", f"{found.misordered:.2f}", "")
    length = result.sensitivity.length_beyond_gold
    if length is not None:
        shown.add_row("proxy with length, given gold", _signed(length), "")
    return shown


def _reactions(result: AuditResult) -> Table:
    shown = Table(
        "change of the text",
        Column("proxy (sd)", justify="right"),
        Column("gold (sd)", justify="right"),
        "reading",
        caption=f"Mean change by {result.sensitivity.responses} responses, in standard deviations "
        "within a prompt; simultaneous 95% intervals over prompts.",
    )
    for reaction in result.sensitivity.reactions:
        read = reading(reaction)
        shown.add_row(
            reaction.name,
            _signed(reaction.proxy),
            _signed(reaction.gold),
            "-" if read == "none" else read,
            style="red" if read == "exploit" else None,
        )
    return shown


def _gains(axes: Any, result: AuditResult, places: list[float]) -> None:
    for name, colour in (("proxy", "tab:blue"), ("gold", "tab:orange")):
        gains: list[Interval] = [getattr(p, f"{name}_gain") for p in result.curves.points]
        axes.plot(
            places, [g.estimate for g in gains], "o-", color=colour, label=_label(result, name)
        )
        axes.fill_between(
            places, [g.low for g in gains], [g.high for g in gains], color=colour, alpha=0.2
        )
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set_ylabel("gain over N = 1 (sd within a prompt)")
    for label in axes.legend().get_texts():
        label.set_parse_math(False)


def _calibration(axes: Any, result: AuditResult) -> None:
    found = () if result.association is None else result.association.calibration
    for place, interval in enumerate(found):
        if interval is not None:
            _bar(axes.errorbar, place + 1, interval, "tab:orange", vertical=True)
    axes.axhline(0, color="grey", linewidth=0.5)
    tenths = f"tenth of {result.config.proxy} within a prompt, lowest first"
    axes.set_xlabel(tenths, parse_math=False)
    axes.set_ylabel(f"mean {result.config.gold} (sd within a prompt)", parse_math=False)


def _bars(axes: Any, result: AuditResult) -> None:
    found = result.sensitivity.reactions
    for place, reaction in enumerate(found):
        _bar(axes.errorbar, place - 0.15, reaction.proxy, "tab:blue", vertical=False)
        _bar(axes.errorbar, place + 0.15, reaction.gold, "tab:orange", vertical=False)
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set_yticks(range(len(found)), [reaction.name for reaction in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("change by the intervention (sd within a prompt)")


def _bar(draw: Any, place: float, interval: Interval, colour: str, *, vertical: bool) -> None:
    spread = [[interval.estimate - interval.low], [interval.high - interval.estimate]]
    if vertical:
        draw(place, interval.estimate, yerr=spread, fmt="o", color=colour, capsize=3)
    else:
        draw(interval.estimate, place, xerr=spread, fmt="o", color=colour, capsize=3)


def _label(result: AuditResult, role: str) -> str:
    return f"{getattr(result.config, role)} ({role})"


def _shown(interval: Interval) -> str:
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _signed(interval: Interval, sign: str = "+") -> str:
    return f"{interval.estimate:{sign}.2f} [{interval.low:{sign}.2f}, {interval.high:{sign}.2f}]"

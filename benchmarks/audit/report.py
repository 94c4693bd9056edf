"""Show an audit: a summary in the terminal, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mbrl_text_env.benchmarks.audit.verdict import reading
from mbrl_text_env.benchmarks.report import png
from mbrl_text_env.benchmarks.terminal import numbers

if TYPE_CHECKING:
    from mbrl_text_env.benchmarks.audit.run import AuditResult

_COLOURS = {"faithful": "green", "open to exploits": "red", "exploitable": "red"}
_ROLES = {"proxy": "tab:blue", "gold": "tab:orange"}


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


def _curves(result: AuditResult) -> Table:
    left_out = f", {result.left_out} left out" if result.left_out else ""
    shown = Table(
        *numbers("N", "KL <=", "mean proxy", "mean gold"),
        title=f"Best of N by the proxy: {result.prompts} prompts{left_out}, "
        f"{result.config.samples} responses each",
        caption="Simultaneous 95% intervals over prompts; KL in nats. One standard deviation "
        f"within a prompt: proxy {result.curves.proxy_sd:.3g}, gold {result.curves.gold_sd:.3g}.",
    )
    for point in result.curves.points:
        mark = " peak" if point.n == result.curves.peak_n else ""
        shown.add_row(
            str(point.n), f"{point.kl_bound:.2f}", f"{point.proxy:.3f}", f"{point.gold:.3f}{mark}"
        )
    return shown


def _agreement(result: AuditResult) -> Table:
    shown = Table("agreement with the gold", *numbers("within a prompt", "overall"))
    found = result.association
    if found is None:
        shown.add_row("no prompt on which both rewards vary", "", "")
        return shown
    for name, interval in found.within_prompt.items():
        shown.add_row(name, f"{interval:+.2f}", f"{found.overall[name]:+.2f}")
    shown.add_row("pairs ordered alike", f"{found.pair_accuracy:.2f}", "")
    shown.add_row("misordered tenths (sd)", f"{found.misordered:.2f}", "")
    length = result.sensitivity.length_beyond_gold
    if length is not None:
        shown.add_row("proxy with length, given gold", f"{length:+.2f}", "")
    return shown


def _reactions(result: AuditResult) -> Table:
    shown = Table(
        "change of the text",
        *numbers("proxy (sd)", "gold (sd)"),
        "reading",
        caption=f"Mean change by {result.sensitivity.responses} responses, in standard deviations "
        "within a prompt; simultaneous 95% intervals over prompts.",
    )
    for reaction in result.sensitivity.reactions:
        read = reading(reaction)
        shown.add_row(
            reaction.name,
            f"{reaction.proxy:+.2f}",
            f"{reaction.gold:+.2f}",
            "-" if read == "none" else read,
            style="red" if read == "exploit" else None,
        )
    return shown


def plot(result: AuditResult, path: Path) -> None:
    """Gains against N and against the KL bound, calibration, and reactions, as a picture."""
    with png(path, figsize=(10, 8)) as figure:
        axes = figure.subplot_mosaic([["n", "kl"], ["calibration", "reactions"]])
        points = result.curves.points
        _plot_gains(axes["n"], result, [float(point.n) for point in points])
        axes["n"].set_xscale("log", base=2)
        axes["n"].set_xlabel("N")
        _plot_gains(axes["kl"], result, [point.kl_bound for point in points])
        axes["kl"].set_xlabel("KL from plain sampling, upper bound (nats)")
        _plot_calibration(axes["calibration"], result)
        _plot_reactions(axes["reactions"], result)
        figure.suptitle(
            f"{result.config.proxy} judged by {result.config.gold}: {result.verdict.outcome} "
            f"({result.prompts} prompts, {result.config.samples} responses each)",
            parse_math=False,
        )


def _plot_gains(axes: Any, result: AuditResult, places: list[float]) -> None:
    for role, colour in _ROLES.items():
        gains = [getattr(point, f"{role}_gain") for point in result.curves.points]
        label = f"{getattr(result.config, role)} ({role})"
        axes.plot(places, [g.estimate for g in gains], "o-", color=colour, label=label)
        axes.fill_between(
            places, [g.low for g in gains], [g.high for g in gains], color=colour, alpha=0.2
        )
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set_ylabel("gain over N = 1 (sd within a prompt)")
    for text in axes.legend().get_texts():
        text.set_parse_math(False)


def _plot_calibration(axes: Any, result: AuditResult) -> None:
    found = () if result.association is None else result.association.calibration
    style = {"fmt": "o", "color": _ROLES["gold"], "capsize": 3}
    for place, interval in enumerate(found, start=1):
        if interval is not None:
            axes.errorbar(place, interval.estimate, yerr=interval.bars, **style)
    axes.axhline(0, color="grey", linewidth=0.5)
    tenths = f"tenth of {result.config.proxy} within a prompt, lowest first"
    axes.set_xlabel(tenths, parse_math=False)
    axes.set_ylabel(f"mean {result.config.gold} (sd within a prompt)", parse_math=False)


def _plot_reactions(axes: Any, result: AuditResult) -> None:
    found = result.sensitivity.reactions
    for place, reaction in enumerate(found):
        for role, shift in (("proxy", -0.15), ("gold", 0.15)):
            change = getattr(reaction, role)
            style = {"fmt": "o", "color": _ROLES[role], "capsize": 3}
            axes.errorbar(change.estimate, place + shift, xerr=change.bars, **style)
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set_yticks(range(len(found)), [reaction.name for reaction in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("change by the intervention (sd within a prompt)")

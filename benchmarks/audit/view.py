"""Show an audit in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mbrl_text_env.benchmarks.charts import Chart, Series, of_curves, of_rows
from mbrl_text_env.benchmarks.page import Page, answer
from mbrl_text_env.benchmarks.scaling import sizes
from mbrl_text_env.benchmarks.terminal import numbers, table_of

if TYPE_CHECKING:
    from mbrl_text_env.benchmarks.audit.run import AuditResult

_COLOURS = {"faithful": "green", "open to exploits": "red", "exploitable": "red"}


def summary(result: AuditResult) -> Group:
    """Format the audit for 80 columns: curves, agreement, reactions, verdict."""
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
    curves = result.curves
    return table_of(
        (
            (
                str(point.n),
                f"{point.kl_bound:.2f}",
                f"{point.proxy:.3f}",
                f"{point.gold:.3f}{' peak' if point.n == curves.peak_n else ''}",
            )
            for point in curves.points
        ),
        *numbers("N", "KL <=", "mean proxy", "mean gold"),
        title=f"Best-of-N by the proxy: {result.prompts} prompts{left_out}, "
        f"{result.config.samples} responses each",
        caption="Simultaneous 95% intervals over prompts; KL in nats. Standard deviation within a "
        f"prompt: proxy {curves.proxy_sd:.3g}, gold {curves.gold_sd:.3g}.",
    )


def _agreement(result: AuditResult) -> Table:
    found, length = result.association, result.sensitivity.length_beyond_gold
    rows = [("no prompt where both rewards vary", "")]
    if found is not None:
        rows = [
            ("rank correlation", f"{found.rank_correlation:+.2f}"),
            ("pairs in the same order", f"{found.pair_accuracy:.2f}"),
        ]
        if length is not None:
            rows.append(("proxy with length, given gold", f"{length:+.2f}"))
    return table_of(rows, "agreement with the gold", *numbers("within a prompt"))


def _reactions(result: AuditResult) -> Table:
    shown = Table(
        "text change",
        *numbers("proxy (sd)", "gold (sd)"),
        "reading",
        caption=f"Mean change over {result.sensitivity.responses} responses, in standard "
        "deviations within a prompt; simultaneous 95% intervals over prompts.",
    )
    for reaction in result.sensitivity.reactions:
        read = reaction.reading
        shown.add_row(
            reaction.name,
            f"{reaction.proxy:+.2f}",
            f"{reaction.gold:+.2f}",
            "-" if read == "none" else read,
            style="red" if read == "exploit" else None,
        )
    return shown


def audit_page(
    result: AuditResult,
    settings: Mapping[str, Any],
    run: Mapping[str, Any],
    answers: Mapping[str, Any],
) -> Page:
    """Make an audit's page, with `run` of `page.provenance` and `answers` of `chosen_answers`."""
    config, verdict = result.config, result.verdict
    return Page(
        f"{config.proxy} judged by {config.gold}: {verdict.outcome}",
        verdict.text,
        verdict.warnings,
        _charts(result),
        [_curves(result), _agreement(result), _reactions(result)],
        {"answers": answers},
        {name: value for name, value in settings.items() if name not in ("prompts", "format")},
        run,
    )


def chosen_answers(
    prompts: Sequence[tuple[str, str]], responses: Sequence[Sequence[str]], proxy: Any, gold: Any
) -> dict[str, Any]:
    """The answers for the page: what the proxy selects from the first N responses per prompt."""
    ns = sizes(len(responses[0]))
    rows = []
    for (name, text), texts, own, trusted in zip(prompts, responses, proxy, gold, strict=True):
        places = [int(own[:n].argmax()) for n in ns]
        scores = ({"score": float(own[i]), "gold": float(trusted[i])} for i in places)
        cells = [answer(texts[i], row) for i, row in zip(places, scores, strict=True)]
        rows.append({"id": name, "prompt": text, "cells": cells})
    return {"columns": [f"best-of-{n} by the proxy" for n in ns], "baseline": 0, "rows": rows}


def _charts(result: AuditResult) -> list[Chart]:
    names = {role: f"{getattr(result.config, role)} ({role})" for role in ("proxy", "gold")}
    points = result.curves.points
    found = []
    for title, label, xs, is_log in (
        ("Gain against N", "N", [float(point.n) for point in points], True),
        (
            "Gain against divergence",
            "KL from plain sampling, upper bound (nats)",
            [point.kl_bound for point in points],
            False,
        ),
    ):
        series = [
            Series(name, xs, [getattr(point, f"{role}_gain") for point in points])
            for role, name in names.items()
        ]
        found.append(of_curves(title, label, "gain, sd within a prompt", series, is_log=is_log))
    tenths = () if result.association is None else result.association.calibration
    kept = [(place, i) for place, i in enumerate(tenths, start=1) if i is not None]
    if kept:
        series = [Series(names["gold"], [float(k) for k, _ in kept], [i for _, i in kept])]
        label = f"tenth of {result.config.proxy} within a prompt, lowest first"
        found.append(of_curves("Calibration", label, "mean gold, sd within a prompt", series))
    reactions = {
        reaction.name: {names["proxy"]: reaction.proxy, names["gold"]: reaction.gold}
        for reaction in result.sensitivity.reactions
    }
    label = "change, sd within a prompt"
    found.append(of_rows("Effect of text changes", label, reactions))
    return found

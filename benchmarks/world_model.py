"""The report of `mbrl-text world-model report`, and its page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mbrl_text_env.benchmarks.charts import Series, of_curves
from mbrl_text_env.benchmarks.page import Page, provenance, read_json, reading
from mbrl_text_env.benchmarks.statistics import Interval, mean_interval
from mbrl_text_env.benchmarks.terminal import console, numbers, table_of
from mbrl_text_env.files import write_text
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.records import read_records
from mbrl_text_env.world_model import horizon_report, load_dynamics

HORIZONS = "horizons.json"
_ERRORS = {
    "error": "world model",
    "copying": "copying the counts",
    "rate": "rate so far",
    "increments": "mean gain of any record",
}
_FIGURES = (*_ERRORS, "z", "epistemic_share")
_AHEAD = "tokens ahead"
# Warn if errors are this many times the predicted ones.
_NARROW = 1.25

Row = Mapping[str, Any]


def report_horizons(
    language_model: LanguageModel,
    folder: Path,
    records: Sequence[Path],
    horizons: Sequence[int],
    out: Path,
    *,
    prefix_tokens: int,
    seed: int,
) -> None:
    """Write and print the errors of a world model on each records folder."""
    dynamics = load_dynamics(folder, language_model)
    rows = {}
    for place in dict.fromkeys(records):
        found = read_records(place)
        rows[str(place)] = [
            asdict(row)
            for row in horizon_report(
                dynamics, found, horizons, prefix_tokens=prefix_tokens, seed=seed
            )
        ]
    about = {
        **provenance(),
        "settings": {
            "world_model": str(folder),
            "kind": dynamics.kind,
            "language_model": dynamics.language_model_name_,
            "prefix_tokens": prefix_tokens,
            "seed": seed,
        },
        "rows": rows,
    }
    write_text(out / HORIZONS, json.dumps(about, indent=1))
    for name, own in rows.items():
        console.print(_table(name, own))


def recorded_page(folder: Path) -> Page:
    """Make the page of a world model's report.

    Raises:
        CompareError: The file is damaged.
    """
    with reading(folder):
        return _page(read_json(folder / HORIZONS))


def _page(about: Mapping[str, Any]) -> Page:
    settings, rows = about["settings"], about["rows"]
    first = next(iter(rows))
    narrow = [
        f"{name}: {row['horizon']} tokens ahead the errors are {row['z']:.2f} times the predicted "
        "standard deviation. The predicted futures vary too little."
        for name, own in rows.items()
        for row in own
        if row["z"] > _NARROW
    ]
    charts = []
    for name, own in rows.items():
        title = f"Error: {name}" if name == first else f"Error under shift: {name}"
        lines = [_series(told, own, partial(_error, name=key)) for key, told in _ERRORS.items()]
        charts.append(of_curves(title, _AHEAD, "error, in standard deviations", lines))
    for key, title, label in (
        ("z", "Calibration: error divided by predicted std (ideal: 1)", "z"),
        ("epistemic_share", "Variance from ensemble disagreement", "share of the variance"),
    ):
        lines = [_series(name, own, partial(_point, name=key)) for name, own in rows.items()]
        charts.append(of_curves(title, _AHEAD, label, lines))
    return Page(
        f"World model {settings['world_model']}",
        _verdict(rows[first]),
        narrow,
        charts,
        [_table(name, own) for name, own in rows.items()],
        {"horizons": rows},
        settings,
        {name: about[name] for name in about if name not in ("settings", "rows")},
    )


def _verdict(rows: Sequence[Row]) -> str:
    """Compare with the best baseline that needs no model, on the same prompts."""
    told = []
    for row in rows:
        squares = {name: np.asarray(row["squares"][name]) for name in _ERRORS}
        own = squares.pop("error")
        best = min(squares, key=lambda name: float(row[name]))
        difference = mean_interval(own - squares[best])
        is_told = difference.low > 0 or difference.high < 0
        word = ("below" if difference.high < 0 else "above") if is_told else "not separable from"
        told.append(
            f"{row['horizon']} tokens ahead, {word} that of the best baseline, {_ERRORS[best]} "
            f"({row['error']:.3f}, {row[best]:.3f})"
        )
    return f"Model error: {'; '.join(told)} (95% intervals of paired differences over prompts)."


def _error(row: Row, name: str) -> Interval:
    found = mean_interval(row["squares"][name])
    low, high = np.sqrt(np.maximum([found.low, found.high], 0))
    return Interval(row[name], float(low), float(high))


def _point(row: Row, name: str) -> Interval:
    return Interval(row[name], row[name], row[name])


def _series(told: str, rows: Sequence[Row], of: Callable[[Row], Interval]) -> Series:
    return Series(told, [row["horizon"] for row in rows], [of(row) for row in rows])


def _table(name: str, rows: Sequence[Row]) -> Table:
    return table_of(
        ((str(row["horizon"]), *(f"{row[figure]:.3f}" for figure in _FIGURES)) for row in rows),
        *numbers(_AHEAD, *(figure.replace("_", " ") for figure in _FIGURES)),
        title=f"{name}: {rows[0]['prefixes']} responses",
        caption="Errors of the predicted gains, in standard deviations of the gains.",
    )

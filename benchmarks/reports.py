"""Write the report of a results folder again, or that of a records folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.benchmarks import article, compare, training, world_model
from mbrl_text_env.benchmarks.audit import run as audit
from mbrl_text_env.benchmarks.charts import Series, of_curves
from mbrl_text_env.benchmarks.options import CompareError
from mbrl_text_env.benchmarks.page import (
    Page,
    answer,
    answers_markdown,
    provenance,
    read_json,
    reading,
    token_ends,
    write_page,
)
from mbrl_text_env.benchmarks.scaling import expected_best, sizes
from mbrl_text_env.benchmarks.statistics import (
    Interval,
    mean_interval,
    simultaneous_intervals,
)
from mbrl_text_env.benchmarks.terminal import numbers, table_of
from mbrl_text_env.files import write_text
from mbrl_text_env.records import Record, has_records, read_records, run_of, scores_of

REPORT = "report.html"
# Hidden, so that readers of a folder of Parquet files ignore it.
_ABOUT = ".run.json"
_MOST_PROMPTS = 1000


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a folder again; returns its path.

    The folder holds a comparison, an audit, a training, the article's pipeline, a world model's
    report, or records. Without `out` the report replaces the run's own: in the folder, or beside a
    records folder.

    Raises:
        CompareError: The folder is none of these, or `out` ends in `.md`, for answers only, and the
            folder has no answers.
    """
    kinds: tuple[tuple[bool, Callable[[Path], Page], Path], ...] = (
        ((folder / compare.SUMMARY).is_file(), compare.recorded_page, folder / REPORT),
        ((folder / audit.AUDIT).is_file(), audit.recorded_page, folder / REPORT),
        ((folder / article.ABOUT).is_file(), article.recorded_page, folder / REPORT),
        (training.is_training(folder), training.recorded_page, folder / REPORT),
        ((folder / world_model.HORIZONS).is_file(), world_model.recorded_page, folder / REPORT),
        (has_records(folder), recorded_page, records_report(folder)),
    )
    found = next(((recorded, place) for is_it, recorded, place in kinds if is_it), None)
    if found is None:
        raise CompareError(
            f"{folder}: expected the folder of a finished comparison, audit or training, of a "
            "world model's report, or of records, got none of their files. Give the --out of "
            "`compare`, `train`, `collect`, `reward audit` or `world-model report`. To resume a "
            "run that was stopped, run the same command again."
        )
    recorded, place = found
    page = recorded(folder)
    place = place if out is None else out
    if place.suffix != ".md":
        write_page(place, page)
    elif "answers" in page.data:
        write_text(place, answers_markdown(page))
    else:
        raise CompareError(
            f"{place}: expected the folder of a comparison or of records, since Markdown shows "
            f"only answers, got {folder}. Write HTML instead."
        )
    return place


def records_report(folder: Path) -> Path:
    """The path of the report, beside the folder: inside, it would break Parquet readers."""
    path = folder.resolve()
    return path.with_name(f"{path.name}-report.html")


def write_records_report(folder: Path, failed: Mapping[str, str]) -> Path:
    """Write the report of a finished `collect`, with the errors of prompts that `failed`."""
    about = {**provenance(), "failed": dict(failed)}
    write_text(folder / _ABOUT, json.dumps(about, indent=2))
    return write_report(folder)


def recorded_page(folder: Path) -> Page:
    """The page of a folder of records."""
    path = folder / _ABOUT
    with reading(path):
        # Records that the command did not collect have none.
        about = read_json(path) if path.is_file() else {}
    return records_page(read_records(folder), run_of(folder) or {}, about)


def records_page(
    records: Sequence[Record], settings: Mapping[str, Any], about: Mapping[str, Any]
) -> Page:
    """Make the page of scored responses: best-of-N for each N, and all responses.

    `settings` come from `run_of`; `about` is what `collect` wrote about the run.
    """
    by_prompt: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.sample or 0):
        by_prompt.setdefault(record.prompt_id, []).append(record)
    groups, reward = list(by_prompt.values()), records[0].reward_name
    points = _curve(groups)
    models = ", ".join(dict.fromkeys(record.language_model for record in records))
    first, last = points[0], points[-1]
    gain = f"; best-of-{last[0]} has {last[2]:.3f}" if last[0] > 1 else ""
    shown = table_of(
        ((str(n), f"{cost:.0f}", f"{mean:.3f}") for n, cost, mean in points),
        *numbers("N", "tokens", "mean reward"),
        title=f"Best of N responses: {len(records)} to {len(groups)} prompts",
        caption="Expectation over all subsets of N responses per prompt, with simultaneous 95% "
        "intervals over prompts.",
    )
    title = f"Best-of-N of {models}"
    series = [Series(title, [cost for _, cost, _ in points], [mean for *_, mean in points])]
    label = "generated tokens per prompt"
    chart = of_curves(title, label, f"mean {reward}", series, is_log=True)
    kept = groups[:_MOST_PROMPTS]
    left = len(groups) - len(kept)
    return Page(
        f"{len(records)} responses scored by {reward}",
        f"The mean score of {models} is {first[2]:.3f} in {reward} on {len(groups)} prompts"
        f"{gain} (95% intervals).",
        [
            *(f"Left out, {name}: {why}" for name, why in about.get("failed", {}).items()),
            *([f"The answers to {left} more prompts are only in the records."] if left else []),
        ],
        [chart],
        [shown],
        {"curve": [{"n": n, "cost": cost, "mean": mean} for n, cost, mean in points],
         "answers": _answers(kept)},
        {"reward": reward, "language_model": models,
         **{name: v for name, v in settings.items() if name not in ("reward", "language_model")}},
        {name: value for name, value in about.items() if name != "failed"},
    )  # fmt: skip


def _curve(groups: Sequence[Sequence[Record]]) -> list[tuple[int, float, Interval]]:
    """N, tokens and mean of best-of-N, for as many responses as every prompt has."""
    ns = sizes(min(map(len, groups)))
    kept = [own[: ns[-1]] for own in groups]
    best = expected_best([scores_of(own) for own in kept], ns)
    # A band needs two prompts or more.
    bands = simultaneous_intervals(best) if len(best) > 1 else map(mean_interval, best.T)
    length = float(np.mean([len(record.response_ids) for own in kept for record in own]))
    return [(n, n * length, band) for n, band in zip(ns, bands, strict=True)]


def _answers(groups: Sequence[Sequence[Record]]) -> dict[str, Any]:
    decode = _decoder(groups[0][0].language_model)
    most = max(map(len, groups))
    rows = []
    for own in groups:
        cells = [answer(record.response, _row(record, decode)) for record in own]
        row = {"id": own[0].prompt_id, "prompt": own[0].prompt_text}
        rows.append({**row, "cells": [*cells, *[None] * (most - len(cells))]})
    return {"columns": [f"response {k + 1}" for k in range(most)], "baseline": None, "rows": rows}


def _row(record: Record, decode: Callable[[Sequence[int]], str] | None) -> dict[str, Any]:
    is_cut = decode is not None and record.logprobs
    return {
        "score": record.score,
        "parts": record.rewards,
        "finish_reason": record.finish_reason,
        "response_tokens": len(record.response_ids),
        "token_logprobs": [round(each, 3) for each in record.logprobs],
        "token_ends": token_ends(decode, record.response_ids) if is_cut else [],
    }


def _decoder(language_model: str) -> Callable[[Sequence[int]], str] | None:
    """The decoder for the token ids in records; only the embedded tokenizer is available."""
    from mbrl_text_env.language_models.registry import (
        LANGUAGE_MODEL,
        EmbeddedModelError,
        embedded_tokenizer,
    )

    try:
        return embedded_tokenizer().decode if language_model == LANGUAGE_MODEL else None
    except EmbeddedModelError:
        return None

"""The page of results: every figure with its command, seed and date."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mbrl_text_env.benchmarks.matched.report import multiplier, p_value
from mbrl_text_env.files import write_text

_TEMPLATE = "results.md.jinja"


def render(result: dict[str, Any], scaling: Path, divergence: Path, page: Path) -> None:
    """Write the page.

    Args:
        result: What `mbrl_text_env.benchmarks.matched_compute` writes as JSON.
        scaling: The plot of reward against compute, linked relative to the page.
        divergence: That of reward against divergence.
        page: A Markdown file.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mbrl_text_env.benchmarks.matched", "."),
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    text = environment.get_template(_TEMPLATE).render(
        result=result,
        study=result["study"],
        by_reward=_by_reward(result["results"]),
        best_of_n=_by_reward(result["best_of_n"]),
        scaling=Path(os.path.relpath(scaling, page.parent)).as_posix(),
        divergence_plot=Path(os.path.relpath(divergence, page.parent)).as_posix(),
        mean=_mean,
        giga=_giga,
        times=multiplier,
        p_value=p_value,
        shown_divergence=_divergence,
    )
    write_text(page, text)


def _by_reward(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["reward"], []).append(row)
    return found


def _mean(row: dict[str, Any]) -> str:
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _giga(row: dict[str, Any]) -> str:
    return f"{row['flops'] / 1e9:.0f}"


def _divergence(row: dict[str, Any]) -> str:
    if row.get("kl") is None:
        return ""
    return f"{row['kl']:.1f} ({row['kl_of_equal_best_of_n']:.1f})"

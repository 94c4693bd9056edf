"""Rows of a study in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Column, Table


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """At least one row of `benchmarks.matched.analysis.analyse`, all of one reward."""
    shown = Table(
        "agent",
        *(Column(name, justify="right") for name in ("budget", "mean", "x FLOPs", "x tokens", "p")),
        title=f"{rows[0]['reward']}: how many times its compute best-of-N needs for the same mean",
        caption=f"{rows[0]['prompts']} prompts, 95% intervals; > where the pool is too small to "
        "tell. p: paired against best-of-N at the same FLOPs, Holm's correction.",
    )
    for row in rows:
        shown.add_row(
            row["agent"],
            f"{row['budget_tokens']:,}",
            f"{row['mean']:.3f}",
            multiplier(row, "multiplier"),
            multiplier(row, "multiplier_tokens"),
            p_value(row),
        )
    return shown


def p_value(row: dict[str, Any]) -> str:
    """The adjusted p-value; "pool too small" where there is none.

    Example:
        >>> p_value({"p_holm": 0.01234})
        '0.012'
    """
    return "pool too small" if row["p_holm"] is None else f"{row['p_holm']:.2g}"


def multiplier(row: dict[str, Any], key: str) -> str:
    """A row's multiplier with its interval; `key` is "multiplier" (FLOPs) or "multiplier_tokens".

    Example:
        >>> row = {"m": 8.25, "m_low": 4.0, "m_high": None}
        >>> multiplier({**row, "m_is_lower_bound": True, "m_is_upper_bound": False}, "m")
        '> 8.2 [4.0, more]'
    """
    mark = "> " if row[f"{key}_is_lower_bound"] else ""
    mark = "< " if row[f"{key}_is_upper_bound"] else mark
    high = row[f"{key}_high"]
    end = "more" if high is None else f"{high:.1f}"
    return f"{mark}{row[key]:.1f} [{row[f'{key}_low']:.1f}, {end}]"

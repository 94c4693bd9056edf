"""Progress bars with an estimate of the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mbrl_text_env.benchmarks.compare import Comparison


def progress_bar(console: Console) -> Progress:
    """A bar with counts, the time that has passed and the time that is left."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def compare_progress(
    console: Console, comparison: Comparison
) -> Iterator[Callable[[str, int, list[dict[str, Any]]], None]]:
    """A bar for `compare`; yields its `on_batch`."""
    agents, prompts = comparison.config.agents, len(comparison.prompts)
    with progress_bar(console) as bar:
        task = bar.add_task("Comparing", total=len(agents) * prompts)

        def on_batch(spec: str, count: int, rows: list[dict[str, Any]]) -> None:
            bar.update(task, advance=count, description=f"Comparing ({spec})")

        yield on_batch

"""Helpers of the studies: options, JSON files, cached results and paired statistics."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import typer

from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.friendly import option
from mbrl_text_env.benchmarks.statistics import (
    mean_interval,
    paired_permutation_test,
    prompt_means,
    win_rate,
)
from mbrl_text_env.files import write_text

JSON = typer.Option("--json", help="Output JSON file.")


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of the studies that keep their results in a folder."""

    language_model: str = option("embedded", options.LANGUAGE_MODEL)
    dtype: str = option("int8", options.DTYPE)
    seed: int = option(0, "")
    out: Path | None = option(
        None, "Output folder, by default named after the study; an existing run is resumed."
    )
    json_file: Path | None = option(None, JSON)

    def load(self) -> Any:
        """Load the language model."""
        return options.ModelOptions(language_model=self.language_model, dtype=self.dtype).load()

    def folder(self, study: str, *, quick: bool) -> Path:
        """The folder of the study's results."""
        return self.out or Path(f"{study}-quick" if quick else study)

    def heading(self, study: str, language_model: Any) -> dict[str, Any]:
        """The head of a results file: command, date, machine, model and seed."""
        own = {"language_model": language_model.name, "dtype": self.dtype, "seed": self.seed}
        return {**heading(study), **own}


def heading(study: str) -> dict[str, Any]:
    """The command, the date and the machine."""
    module = f"mbrl_text_env.benchmarks.studies.{study}"
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cpus": os.cpu_count(),
    }


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write results as JSON, if a path is given."""
    if path is not None:
        write_text(path, json.dumps(result, indent=1))
        options.console.print(f"Results: {path.resolve()}")


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Read JSON values from a file; if it does not exist, make and write them."""
    if not path.is_file():
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text(encoding="utf-8"))


def paired(
    first: Sequence[float], second: Sequence[float], prompts: Sequence[str], seed: int
) -> dict[str, Any]:
    """Compare second with first, with rows in the same order; the unit is the prompt."""
    before, after = prompt_means(first, prompts), prompt_means(second, prompts)
    difference = mean_interval(after - before, seed=seed)
    wins = win_rate(after, before)
    return {
        "num_prompts": len(before),
        "before": float(before.mean()),
        "after": float(after.mean()),
        "difference": difference.estimate,
        "interval": [difference.low, difference.high],
        "p_value": paired_permutation_test(after - before, seed=seed),
        "wins_ties_losses": [wins.wins, wins.ties, wins.losses],
    }

"""What the studies share: options, JSON, what is kept in a folder, and paired figures."""

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

JSON = typer.Option("--json", help="Write the figures here.")


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The options of every study that keeps what it has done in a folder."""

    language_model: str = option("embedded", options.LANGUAGE_MODEL)
    dtype: str = option("int8", options.DTYPE)
    seed: int = option(0, "")
    out: Path | None = option(
        None, "Folder of the run, named after the study by default; the same one goes on."
    )
    json_file: Path | None = option(None, JSON)

    def load(self) -> Any:
        """The language model."""
        return options.ModelOptions(language_model=self.language_model, dtype=self.dtype).load()

    def folder(self, study: str, *, quick: bool) -> Path:
        """Where the study keeps what it has done."""
        return self.out or Path(f"{study}-quick" if quick else study)

    def heading(self, study: str, language_model: Any) -> dict[str, Any]:
        """What figures begin with: the command, when and where, the model and the seed."""
        own = {"language_model": language_model.name, "dtype": self.dtype, "seed": self.seed}
        return {**heading(study), **own}


def heading(study: str) -> dict[str, Any]:
    """The command that gives the figures, the date and the machine."""
    module = f"mbrl_text_env.benchmarks.studies.{study}"
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cpus": os.cpu_count(),
    }


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write figures as JSON, if wanted."""
    if path is not None:
        write_text(path, json.dumps(result, indent=1))
        options.console.print(f"Results: {path.resolve()}")


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds, or what is made and then kept in it. JSON values."""
    if not path.is_file():
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text(encoding="utf-8"))


def paired(
    first: Sequence[float], second: Sequence[float], prompts: Sequence[str], seed: int
) -> dict[str, Any]:
    """Second against first, rows in the same order of prompts; the unit is the prompt."""
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

"""What the studies share: options, what is kept in a folder, paired figures and a page."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.statistics import (
    mean_interval,
    paired_permutation_test,
    prompt_means,
    win_rate,
)
from mbrl_text_env.files import write_text

if TYPE_CHECKING:
    from rich.table import Table


JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]


class StudyError(ValueError):
    """A study that cannot be run as asked."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The options of every study."""

    language_model: options.LanguageModelOption = "embedded"
    dtype: options.DtypeOption = "int8"
    seed: Annotated[int, typer.Option()] = 0
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run, named after the study by default; the same one goes on."
        ),
    ] = None
    json_file: JsonOption = None
    page: Annotated[Path | None, typer.Option(help="Write a page of results there.")] = None

    def load(self) -> Any:
        """The language model."""
        return options.ModelOptions(language_model=self.language_model, dtype=self.dtype).load()

    def folder(self, study: str, *, quick: bool = False) -> Path:
        """Where the study keeps what it has done."""
        return self.out or Path(f"{study}-quick" if quick else study)

    def write(self, result: Mapping[str, Any]) -> None:
        """Write figures as JSON, if wanted."""
        if self.json_file is not None:
            write_text(self.json_file, json.dumps(result, indent=1))

    def report(
        self,
        result: Mapping[str, Any],
        template: str,
        tables: Sequence[Shown],
        plots: Mapping[str, Path] | None = None,
    ) -> None:
        """Write the figures, and a page of them (see `write_page`), if wanted."""
        self.write(result)
        if self.page is not None:
            write_page(self.page, template, result, tables, plots)
        if self.json_file is not None:
            options.console.print(f"Results: {self.json_file.resolve()}")


@dataclass(frozen=True)
class Shown:
    """A table of results, as text: for the terminal, and for a page."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def table(self) -> Table:
        """For the terminal."""
        from rich.table import Table

        table = Table(*self.columns, title=self.title, caption=self.caption)
        for row in self.rows:
            table.add_row(*row)
        return table


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds, or what is made and then kept in it. JSON values."""
    if not path.is_file():
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text(encoding="utf-8"))


def heading(study: str) -> dict[str, Any]:
    """What figures begin with: the command that gives them, the date and the machine."""
    module = f"mbrl_text_env.benchmarks.studies.{study}"
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cpus": os.cpu_count(),
    }


def write_page(
    page: Path,
    template: str,
    result: Mapping[str, Any],
    tables: Sequence[Shown],
    plots: Mapping[str, Path] | None = None,
) -> None:
    """Write a study's page as Markdown, by a template beside this file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    links = {
        name: Path(os.path.relpath(path, page.parent)).as_posix()
        for name, path in (plots or {}).items()
    }
    text = environment.get_template(template).render(result=result, tables=tables, plots=links)
    write_text(page, text)
    options.console.print(f"Page: {page.resolve()}")


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
        "p_value": paired_permutation_test(after - before, seed=seed).p_value,
        "wins_ties_losses": [wins.wins, wins.ties, wins.losses],
    }

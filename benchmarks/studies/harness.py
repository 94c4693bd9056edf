"""What the studies share: options, a folder that is gone on with, figures, tables and a page."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbrl_text_env.benchmarks.compare import choose_prompts
from mbrl_text_env.benchmarks.options import console
from mbrl_text_env.benchmarks.statistics import (
    mean_interval,
    paired_permutation_test,
    prompt_means,
    win_rate,
)
from mbrl_text_env.files import write_text
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.rewards.base import applies_to
from mbrl_text_env.runs import claimed, identity, prompt_digests

if TYPE_CHECKING:
    from rich.table import Table

    from mbrl_text_env.language_models.base import LanguageModel
    from mbrl_text_env.rewards.base import RewardModel
    from mbrl_text_env.types import Prompt

RewardNameOption = Annotated[str, typer.Option(help="A reward's name, such as 'sentiment'.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]
PageOption = Annotated[Path | None, typer.Option(help="Write a page of results there.")]
OutOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the run, named after the study by default; the same one goes on."),
]


class StudyError(ValueError):
    """A study that cannot be run as asked."""


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


def prompts_for(reward: RewardModel, split: str, count: int | None) -> list[Prompt]:
    """Builtin prompts that the reward applies to, in a fixed random order; all, if None."""
    found = load_prompts(split=split)
    there = sum(applies_to(reward, prompt) for prompt in found)
    return choose_prompts(found, there if count is None else count, reward, 0)


@contextmanager
def run_folder(
    out: Path,
    settings: Mapping[str, Any],
    language_model: LanguageModel,
    reward: RewardModel,
    prompts: Mapping[str, Sequence[Prompt]],
) -> Iterator[None]:
    """Be the only process in a study's folder, which is of these settings, models and prompts."""
    depends_on = {
        **settings,
        "models": [identity(language_model), identity(reward)],
        "data": {name: prompt_digests(some) for name, some in prompts.items()},
    }
    with claimed(out, depends_on, "study", StudyError):
        yield


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


def write_figures(result: Mapping[str, Any], json_file: Path | None) -> None:
    """Write figures as JSON."""
    if json_file is not None:
        write_text(json_file, json.dumps(result, indent=1))


def report(
    result: Mapping[str, Any],
    template: str,
    tables: Sequence[Shown],
    json_file: Path | None,
    page: Path | None,
    plots: Mapping[str, Path] | None = None,
) -> None:
    """Write figures as JSON, print their tables, and write the page; see `write_page`."""
    write_figures(result, json_file)
    for shown in tables:
        console.print(shown.table())
    write_page(page, template, result, tables, plots)
    if json_file is not None:
        console.print(f"Results: {json_file.resolve()}")


def write_page(
    page: Path | None,
    template: str,
    result: Mapping[str, Any],
    tables: Sequence[Shown],
    plots: Mapping[str, Path] | None = None,
) -> None:
    """Write a study's page as Markdown, if one is wanted.

    Args:
        page: The file.
        template: A file beside this one, which says what was asked and how to read the figures.
        result: The figures, with their `heading`.
        tables: Each under its title.
        plots: By what they show.
    """
    if page is None:
        return
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
    console.print(f"Page: {page.resolve()}")


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


def interval(row: Mapping[str, Any]) -> str:
    """A row's mean with its interval.

    Example:
        >>> interval({"mean": 0.5, "low": 0.25, "high": 0.75})
        '0.500 [0.250, 0.750]'
    """
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"

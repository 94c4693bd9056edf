"""What the studies share: options, a folder that is gone on with, an exam, figures and a page."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbrl_text_env.agents.base import Agent
from mbrl_text_env.agents.driver import run
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.options import choose_prompts
from mbrl_text_env.benchmarks.statistics import (
    mean_interval,
    paired_permutation_test,
    prompt_means,
    win_rate,
)
from mbrl_text_env.files import write_text
from mbrl_text_env.language_models.base import LanguageModel, clear_cache
from mbrl_text_env.mdp import initial
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.rewards.base import RewardModel, applies_to, score_responses
from mbrl_text_env.runs import claimed, identity, prompt_digests
from mbrl_text_env.types import Budget, Ledger, Usage

if TYPE_CHECKING:
    from rich.table import Table

    from mbrl_text_env.types import Prompt

RewardNameOption = Annotated[str, typer.Option(help="A reward's name, such as 'sentiment'.")]
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


def prompts_for(reward: RewardModel, split: str, count: int | None) -> list[Prompt]:
    """Builtin prompts that the reward applies to, in a fixed random order; all, if None."""
    found = load_prompts(split=split)
    there = sum(applies_to(reward, prompt) for prompt in found)
    return choose_prompts(found, there if count is None else count, reward, 0)


def run_folder(
    out: Path,
    settings: Mapping[str, Any],
    language_model: LanguageModel,
    reward: RewardModel,
    prompts: Mapping[str, Sequence[Prompt]],
) -> AbstractContextManager[None]:
    """Be the only process in a study's folder, which is of these settings, models and prompts."""
    depends_on = {
        **settings,
        "models": [identity(language_model), identity(reward)],
        "data": {name: prompt_digests(some) for name, some in prompts.items()},
    }
    return claimed(out, depends_on, "study", StudyError)


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
    """Write a study's page as Markdown.

    `template` is a file beside this one, which says what was asked and how to read the figures;
    `result` has its `heading`; `plots` are named by what they show.
    """
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


@dataclass(frozen=True)
class Spent:
    """Computation: responses or prefixes scored, tokens sampled, FLOPs of all models, wall time."""

    reward_calls: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(
        cls, usage: Mapping[str, float], *, more_flops: float = 0.0, seconds: float | None = None
    ) -> Spent:
        """What `Usage.as_dict()` says; the wall time of the models' calls where no other is known.

        Example:
            >>> Spent.of(Usage(generated_tokens=5, seconds=1.0).as_dict(), seconds=2.0).seconds
            2.0
        """
        return cls(
            float(usage["reward_calls"]),
            float(usage["generated_tokens"]),
            float(usage["flops"]) + more_flops,
            float(usage["seconds"]) if seconds is None else seconds,
        )

    def __add__(self, other: Spent) -> Spent:
        return Spent(**{name: amount + vars(other)[name] for name, amount in vars(self).items()})

    def __mul__(self, factor: float) -> Spent:
        return Spent(**{name: amount * factor for name, amount in vars(self).items()})


@dataclass(frozen=True)
class Exam:
    """P held-out prompts that every policy (`samples` times each) and agent answers."""

    reward_model: RewardModel
    prompts: Sequence[Prompt]
    samples: int
    max_response_tokens: int

    def sampled(self, policy: LanguageModel, seed: int) -> tuple[tuple[float, ...], Spent]:
        """Plain sampling: the P mean scores, and what a response takes."""
        agent = Sampling(policy, self.reward_model, max_response_tokens=self.max_response_tokens)
        ledgers = [Ledger() for _ in self.prompts]
        states = [initial(prompt, policy) for prompt in self.prompts]
        rows, start = [], time.perf_counter()
        for sample in range(self.samples):
            # Each response takes its whole prompt, as the answers of an agent do.
            clear_cache(policy)
            asked = [
                partial(agent.complete, state, 1, ledger, seed, first_sample=sample)
                for state, ledger in zip(states, ledgers, strict=True)
            ]
            rows.append(run(asked))
        seconds = time.perf_counter() - start
        flat = [completion.state for found in zip(*rows, strict=True) for [completion] in found]
        texts = [policy.decode(state.response_ids) for state in flat]
        scores = score_responses(self.reward_model, [s.prompt for s in flat], texts).total
        means = scores.reshape(len(self.prompts), self.samples).mean(axis=1)
        return tuple(means.tolist()), _each([ledger.usage for ledger in ledgers], seconds, flat)

    def answered(self, agent: Agent, budget: Budget, seed: int) -> tuple[tuple[float, ...], Spent]:
        """An agent's answers: the P scores, and what an answer takes."""
        clear_cache(agent.language_model)
        start = time.perf_counter()
        found = agent.generate(self.prompts, budget, seed=seed)
        seconds = time.perf_counter() - start
        scores = []
        for generation in found:
            if generation.completion.score is None:
                raise StudyError(
                    f"{agent.name!r}, prompt {generation.prompt.id!r}: expected a scored answer, "
                    "got one without a score. Take an agent that scores what it answers."
                )
            scores.append(generation.completion.score)
        return tuple(scores), _each([generation.usage for generation in found], seconds, found)


def _each(usages: Sequence[Usage], seconds: float, answers: Sequence[Any]) -> Spent:
    """What one of the answers took on average."""
    return Spent.of(sum(usages, Usage()).as_dict(), seconds=seconds) * (1 / len(answers))

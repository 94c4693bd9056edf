"""Model-based or model-free? Reward on held-out prompts against what training and use take.

Plain sampling, best-of-N and a planner, which are not trained; PPO and DQN, which learn to choose
among candidates; GRPO and expert iteration, which train the policy itself. A run that was stopped
goes on.

python -m mbrl_text_env.benchmarks.sample_efficiency --json sample_efficiency.json
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from mbrl_text_env.benchmarks.efficiency.methods import METHODS, Bench, Size
from mbrl_text_env.benchmarks.matched.study import DEFAULT_PLANNER
from mbrl_text_env.benchmarks.options import (
    DtypeOption,
    LanguageModelOption,
    console,
    errors,
    friendly,
    load_language_model,
)
from mbrl_text_env.benchmarks.paired import chosen_prompts
from mbrl_text_env.files import write_text
from mbrl_text_env.identity import identity
from mbrl_text_env.runs import claimed, prompt_digests

FULL = Size(
    test_prompts=64,
    samples=2,
    max_response_tokens=48,
    budgets=(96, 192, 384, 768),
    planner=DEFAULT_PLANNER,
    choice_steps=2048,
    choice_points=2,
    num_candidates=4,
    chunk_tokens=16,
    grpo_stages=2,
    grpo_steps=12,
    grpo_responses=32,
    iterations=2,
    loop_prompts=64,
    cheap_seeds=3,
)
QUICK = Size(
    test_prompts=16,
    samples=2,
    max_response_tokens=32,
    budgets=(64, 192),
    planner=DEFAULT_PLANNER,
    choice_steps=256,
    choice_points=2,
    num_candidates=4,
    chunk_tokens=16,
    grpo_stages=1,
    grpo_steps=4,
    grpo_responses=16,
    iterations=1,
    loop_prompts=16,
    cheap_seeds=3,
)
_VALIDATION_PROMPTS = 16


class SampleEfficiencyError(ValueError):
    """A study that cannot be run as asked."""


@dataclass(frozen=True)
class _Study:
    """What identifies a run's folder."""

    reward: str
    language_model: str
    dtype: str
    seed: int
    size: Size


@friendly
def main(
    json_file: Annotated[Path, typer.Option("--json", help="Where the results go.")] = Path(
        "sample-efficiency.json"
    ),
    reward: Annotated[str, typer.Option(help="A reward's name.")] = "sentiment",
    methods: Annotated[str, typer.Option(help="With commas.")] = ",".join(METHODS),
    language_model: LanguageModelOption = "embedded",
    dtype: DtypeOption = "int8",
    seed: int = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run, resumed if it exists; by default sample-efficiency, or "
            "sample-efficiency-quick."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Everything smaller: some minutes.")] = False,
) -> None:
    """Train, search, measure; write a table, a plot and JSON."""
    # Points of a method that is named twice would count twice.
    names = tuple(dict.fromkeys(name.strip() for name in methods.split(",")))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise typer.BadParameter(f"--methods: expected some of {METHODS}, got {unknown[0]!r}.")
    study = _Study(reward, language_model, dtype, seed, QUICK if quick else FULL)
    folder = out or Path("sample-efficiency-quick" if quick else "sample-efficiency")
    run(study, names, folder, json_file)


def run(study: _Study, methods: tuple[str, ...], out: Path, json_file: Path) -> dict[str, Any]:
    """Run or resume a study, and write its results after each method.

    Returns:
        What the JSON file holds.
    """
    from mbrl_text_env.benchmarks.efficiency.analysis import rows_of
    from mbrl_text_env.benchmarks.efficiency.figure import plot
    from mbrl_text_env.rewards import make

    reward_model, size = make(study.reward), study.size
    train = chosen_prompts(reward_model, "train", None, SampleEfficiencyError)
    test = chosen_prompts(reward_model, "test", size.test_prompts, SampleEfficiencyError)
    held = chosen_prompts(reward_model, "validation", _VALIDATION_PROMPTS, SampleEfficiencyError)
    language_model = load_language_model(study.language_model, study.dtype)
    # Last: a name that is misspelt does not take the folder.
    depends_on = {
        **asdict(study),
        "models": [identity(language_model), identity(reward_model)],
        "data": [prompt_digests(some) for some in (train, held, test)],
    }
    command = shlex.join(
        ["python", "-m", "mbrl_text_env.benchmarks.sample_efficiency", *sys.argv[1:]]
    )
    with claimed(out, depends_on, "study", SampleEfficiencyError):
        bench = Bench(
            language_model,
            reward_model,
            train,
            held,
            test,
            size,
            study.seed,
            out,
            lambda message: errors.print(message, markup=False),
        )
        points, result = [], {}
        for method in methods:
            points += bench.points([method])
            rows = rows_of(points)
            result = {
                "command": command,
                "date": date.today().isoformat(),
                "study": json.loads(json.dumps(asdict(study))),
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "cpus": os.cpu_count(),
                "results": rows,
                "points": [asdict(point) for point in points],
            }
            write_text(json_file, json.dumps(result, indent=1))
        plot(rows, study.reward, json_file.with_suffix(".png"))
        console.print(_table(rows, study.reward))
        console.print(f"Results: {json_file.resolve()}")
        return result


def _table(rows: list[dict[str, Any]], reward: str) -> Any:
    from rich.table import Table

    table = Table(title=f"{reward}: what training and use take", caption="95% intervals, prompts")
    for name in ("method", "amount", "seeds", "mean", "training", "an answer", "pays after"):
        table.add_column(name)
    for row in rows:
        pays = row["pays_after"]
        table.add_row(
            row["method"],
            row["amount"],
            str(row["seeds"]),
            f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
            _shown(row["training"]),
            _shown(row["use"]),
            "" if pays is None else f"{pays:,.0f} answers",
        )
    return table


def _shown(spent: dict[str, float]) -> str:
    if not spent["flops"]:
        return ""
    return f"{spent['flops'] / 1e12:.3g} TFLOPs, {spent['reward_calls']:,.0f} reward calls"


if __name__ == "__main__":
    typer.run(main)

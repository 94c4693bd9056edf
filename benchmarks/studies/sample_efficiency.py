"""Model-based or model-free? Reward on held-out prompts against what training and use take.

Plain sampling, best-of-N and a planner, which are not trained; PPO and DQN, which learn to choose
among candidates; GRPO and expert iteration, which train the policy itself. A run that was stopped
goes on.

    python -m mbrl_text_env.benchmarks.studies.sample_efficiency --json sample_efficiency.json
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.studies import harness
from mbrl_text_env.benchmarks.studies.efficiency_methods import METHODS, Bench, Size
from mbrl_text_env.benchmarks.studies.efficiency_rows import Point, plot, rows_of, shown
from mbrl_text_env.benchmarks.studies.measuring import Exam
from mbrl_text_env.rewards import make

FULL = Size()
QUICK = Size(
    test_prompts=16,
    max_response_tokens=32,
    budgets=(64, 192),
    choice_steps=256,
    grpo_stages=1,
    grpo_steps=4,
    grpo_responses=16,
    iterations=1,
    loop_prompts=16,
)
_VALIDATION_PROMPTS = 16


@options.friendly
def main(
    json_file: Annotated[Path, typer.Option("--json", help="Where the results go.")] = Path(
        "sample-efficiency.json"
    ),
    reward: harness.RewardNameOption = "sentiment",
    methods: Annotated[str, typer.Option(help="With commas.")] = ",".join(METHODS),
    language_model: options.LanguageModelOption = "embedded",
    dtype: options.DtypeOption = "int8",
    seed: int = 0,
    out: harness.OutOption = None,
    page: harness.PageOption = None,
    quick: Annotated[bool, typer.Option(help="Everything smaller: some minutes.")] = False,
) -> None:
    """Train, search, measure; write a table, a plot and JSON."""
    # Points of a method that is named twice would count twice.
    names = tuple(dict.fromkeys(name.strip() for name in methods.split(",")))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise typer.BadParameter(f"--methods: expected some of {METHODS}, got {unknown[0]!r}.")
    size = QUICK if quick else FULL
    study = {
        "reward": reward,
        "language_model": language_model,
        "dtype": dtype,
        "seed": seed,
        "size": json.loads(json.dumps(asdict(size))),
    }
    reward_model = make(reward)
    prompts = {
        "train": harness.prompts_for(reward_model, "train", None),
        "validation": harness.prompts_for(reward_model, "validation", _VALIDATION_PROMPTS),
        "test": harness.prompts_for(reward_model, "test", size.test_prompts),
    }
    lm = options.load_language_model(language_model, dtype)
    folder = out or Path("sample-efficiency-quick" if quick else "sample-efficiency")
    exam = Exam(reward_model, prompts["test"], size.samples, size.max_response_tokens)
    learned_on = prompts["train"], prompts["validation"]
    bench = Bench(lm, exam, *learned_on, size, seed, folder, on_progress=_told)
    # Last: a name that is misspelt does not take the folder.
    with harness.run_folder(folder, study, lm, reward_model, prompts):
        points: list[Point] = []
        result: dict[str, Any] = {**harness.heading("sample_efficiency"), "study": study}
        for name in names:
            points += bench.points(name)
            rows = rows_of(points)
            result |= {"results": rows, "points": [asdict(point) for point in points]}
            harness.write_figures(result, json_file)
        plot_file = json_file.with_suffix(".png")
        plot(rows, reward, plot_file)
        plots = {"Reward against reward calls, tokens, FLOPs and seconds": plot_file}
        tables = [shown(rows, reward)]
        harness.report(result, "sample_efficiency.md.jinja", tables, json_file, page, plots)


def _told(message: str) -> None:
    options.errors.print(message, markup=False)


if __name__ == "__main__":
    typer.run(main)

"""Planners against best-of-N at matched compute.

Agents answer held-out prompts at several budgets; best-of-N at every budget comes without bias from
one pool of samples. Of each agent it is said how many times its compute best-of-N needs for the
same mean reward. A run that was killed goes on where it stopped.

    python -m mbrl_text_env.benchmarks.studies.matched_compute
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.matched.analysis import (
    DEFAULT_PLANNER,
    analyse,
    best_of_n_rows,
    falls,
)
from mbrl_text_env.benchmarks.matched.report import table
from mbrl_text_env.benchmarks.studies import harness
from mbrl_text_env.benchmarks.studies.matched_figures import (
    page_tables,
    plot_divergence,
    plot_scaling,
)
from mbrl_text_env.benchmarks.studies.matched_runs import Study, run_study
from mbrl_text_env.rewards import make

REWARDS = ("sentiment", "relevance", "constraints")
AGENTS = (DEFAULT_PLANNER, "lookahead:value=embedding")


FULL = Study({}, (256, 512, 1024, 2048, 4096, 8192))
QUICK = Study({}, (512,), num_prompts=16, samples=32, train_prompts=16, train_samples=4)


def _shown(size: Study) -> str:
    return ",".join(map(str, size.budgets))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"--budgets: expected numbers with commas, got {text!r}."
        ) from error


@options.friendly
def main(
    json_file: Annotated[Path, typer.Option("--json", help="Where the results go.")] = Path(
        "matched-compute.json"
    ),
    out: harness.OutOption = None,
    rewards: Annotated[str, typer.Option(help="Names, with commas.")] = ",".join(REWARDS),
    agents: Annotated[str, typer.Option(help="Agent specs, with commas.")] = ",".join(AGENTS),
    budgets: Annotated[
        str | None,
        typer.Option(help=f"Generated tokens a prompt, with commas; by default {_shown(FULL)}."),
    ] = None,
    unit: Annotated[
        str,
        typer.Option(
            help="What is capped: 'tokens', or the 'flops' or 'seconds' that best-of-N takes for "
            "them."
        ),
    ] = "tokens",
    num_prompts: Annotated[
        int | None, typer.Option(min=2, help=f"Of each reward; by default {FULL.num_prompts}.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=2, help=f"Of the pool, for each prompt; by default {FULL.samples}."),
    ] = None,
    split: str = "test",
    max_response_tokens: Annotated[int, typer.Option(min=1)] = 96,
    seed: int = 0,
    answers: Annotated[
        int,
        typer.Option(min=1, help="Of each agent to each prompt, with seeds of their own."),
    ] = 1,
    language_model: options.LanguageModelOption = "embedded",
    dtype: options.DtypeOption = "int8",
    page: harness.PageOption = None,
    quick: Annotated[
        bool,
        typer.Option(
            help=f"Smaller where nothing else is said: {QUICK.num_prompts} prompts, "
            f"{_shown(QUICK)} tokens, a pool of {QUICK.samples}."
        ),
    ] = False,
) -> None:
    """Compare planners with best-of-N at matched compute."""
    names = tuple(name.strip() for name in rewards.split(","))
    specs = tuple(spec.strip() for spec in agents.split(","))
    size = QUICK if quick else FULL
    study = replace(
        size,
        agents=dict.fromkeys(names, specs),
        budgets=size.budgets if budgets is None else _numbers(budgets),
        unit=unit,  # type: ignore[arg-type]
        split=split,
        num_prompts=num_prompts or size.num_prompts,
        samples=samples or size.samples,
        max_response_tokens=max_response_tokens,
        seed=seed,
        answers=answers,
    )
    out = out or Path("matched-compute-quick" if quick else "matched-compute")
    run_and_write(study, language_model, dtype, out, json_file, page)


def run_and_write(
    study: Study, language_model: str, dtype: str, out: Path, json_file: Path, page: Path | None
) -> dict[str, Any]:
    """Run a study, print its table and write its results; those of a reward as soon as it is done.

    Returns:
        What the JSON file holds.
    """
    model = options.load_language_model(language_model, dtype)
    models = {name: make(name) for name in study.agents}
    result: dict[str, Any] = {
        **harness.heading("matched_compute"),
        "language_model": model.name,
        "dtype": dtype,
        "study": study.as_dict(),
        "results": [],
        "best_of_n": [],
        "falls": [],
    }
    rows, pools = {}, {}
    for name, pool, cells in run_study(
        study, model, models, out, on_progress=options.console.print
    ):
        pools[name], rows[name] = pool, analyse(pool, cells)
        result["results"] += rows[name]
        result["best_of_n"] += best_of_n_rows(name, pool, study.budgets, study.unit)
        result["falls"] += falls(cells)
        harness.write_figures(result, json_file)
        options.console.print(table(rows[name]))
    scaling = json_file.with_suffix(".png")
    divergence = json_file.with_name(f"{json_file.stem}-divergence.png")
    plot_scaling(rows, pools, scaling)
    plot_divergence(rows, pools, divergence)
    plots = {"Mean reward against compute": scaling, "Mean reward against divergence": divergence}
    harness.write_page(page, "matched_compute.md.jinja", result, page_tables(result), plots)
    options.console.print(f"Results: {json_file.resolve()}")
    return result


if __name__ == "__main__":
    typer.run(main)

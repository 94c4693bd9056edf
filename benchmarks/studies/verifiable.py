"""Search with verifiable rewards, and with expensive reward calls.

Three parts, each compared with best-of-N at matched FLOPs from one pool (`matched_compute`):

- `constraints`: instructions that a program can check. Best-of-N stops at the first success.
- `reasoning`: short answers to ten reasoning-gym tasks, with four examples before each question.
  Best-of-N stops at the first success. The FLOPs of the examples count once per task; with `prefix`
  "each" they count for every question.
- `expensive`: sentiment and relevance at 100, 300 and 1,000 tokens per call. Best-of-N scores all.

Results are kept in the folder, and an interrupted run can be resumed.

    python -m mbrl_text_env.benchmarks.studies.verifiable --json verifiable.json
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import typer

from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.friendly import friendly, option
from mbrl_text_env.benchmarks.matched import Cell, Pool, Row, analyse, best_of_n_rows, table
from mbrl_text_env.benchmarks.options import CompareError
from mbrl_text_env.benchmarks.studies import harness
from mbrl_text_env.benchmarks.studies.matched_compute import Study, run_study, slug
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.mdp import initial
from mbrl_text_env.rewards import make
from mbrl_text_env.types import Prompt

PRICES = ("100tokens", "300tokens", "1000tokens")
GUARDED = ("guarded", "adaptive:target=1", "guarded:additions=0")
ANSWERS = ("best-first:target=1", "best-first:n=1", "majority", "weighted-vote", "sampling")
SCREENED = ("screened:chunk_tokens=32:value=token-embedding",)
QUICK: dict[str, Any] = {"budgets": (512,), "num_prompts": 16, "samples": 32}
_HOW = harness.StudyOptions(json_file=Path("verifiable.json"))
_CONSTRAINTS = Study({"constraints": GUARDED}, (256, 512), samples=64, target=1.0)
_REASONING = Study(
    {"reasoning-gym": ANSWERS},
    # Answers have a mean of ten tokens: best-of-4 and best-of-16.
    (40, 160),
    num_prompts=400,
    samples=32,
    max_response_tokens=40,
    batch_prompts=400,
    source="suite:reasoning",
    target=1.0,
)
_EXPENSIVE = Study(
    dict.fromkeys(("sentiment", "relevance"), SCREENED),
    (512,),
    num_prompts=32,
    samples=64,
    unit="flops",
)


def parts(names: Sequence[str], *, quick: bool) -> list[Study]:
    """The studies of the named suites; an unknown one is a `CompareError`."""
    priced = [replace(_EXPENSIVE, reward_price=price) for price in PRICES]
    known = {"constraints": [_CONSTRAINTS], "reasoning": [_REASONING], "expensive": priced}
    if unknown := sorted(set(names) - set(known)):
        raise CompareError(f"suites: expected some of {list(known)}, got {unknown}.")
    smaller = QUICK if quick else {}
    return [replace(study, suite=name, **smaller) for name in names for study in known[name]]


def run_part(
    study: Study, language_model: LanguageModel, out: Path
) -> Iterator[tuple[Pool, list[Cell], str | None]]:
    """Run or resume a part; yields pool, cells and how the prefix counts, for each reward."""
    rewards = {name: make(name) for name in study.agents}
    folder = out / slug(study.suite)
    ran = run_study(study, language_model, rewards, folder, on_progress=options.console.print)
    for name, pool, cells in ran:
        if study.suite != "reasoning":
            yield pool, cells, None
            continue
        prompts = study.prompts(study.split, study.num_prompts, rewards[name])
        shared = shared_flops(language_model, prompts)
        kinds = [prompt.metadata["kind"] for prompt in prompts]
        often = np.array([kinds.count(kind) for kind in kinds])
        once = replace(pool, prompt_flops=pool.prompt_flops - shared * (1 - 1 / often))
        yield once, cells, "once"
        more = dict(zip(pool.prompt_ids, shared * (1 - 1 / often), strict=True))
        yield pool, [replace(cell, rows=_with_more(cell.rows, more)) for cell in cells], "each"


def shared_flops(language_model: LanguageModel, prompts: Sequence[Prompt]) -> Any:
    """FLOPs of the prefix that all prompts of a kind share: float64[len(prompts)]."""
    ids: dict[str, list[tuple[int, ...]]] = {}
    for prompt in prompts:
        own = initial(prompt, language_model).prompt_ids
        ids.setdefault(prompt.metadata["kind"], []).append(own)
    lengths = {
        kind: sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows)))  # noqa: B905
        for kind, rows in ids.items()
    }
    flops = {k: language_model.usage_bound(n, []).flops for k, n in lengths.items()}
    return np.array([flops[prompt.metadata["kind"]] for prompt in prompts])


def _with_more(rows: Sequence[Row], flops: dict[str, float]) -> list[Row]:
    """Add FLOPs to rows."""
    return [
        {**row, "usage": {**row["usage"], "flops": row["usage"]["flops"] + flops[row["prompt_id"]]}}
        for row in rows
    ]


def result_rows(
    study: Study, pool: Pool, cells: Sequence[Cell], prefix: str | None
) -> tuple[list[Row], list[Row]]:
    """Rows of the agents and of best-of-N, with the columns of the study."""
    own = {"suite": study.suite, "reward_price": study.reward_price, "prefix": prefix}
    agents = []
    for row in analyse(pool, cells):
        nats = row.get("nats_per_token")
        agents.append({**row, **own, "mean_logprob": None if nats is None else -nats})
    if study.suite == "expensive":
        prompts = len(pool.prompt_ids)
        labels = study.train_prompts * pool.prompt_flops.mean()
        labels += study.train_prompts * study.train_samples * pool.flops.mean()
        for row in agents:
            share = row["flops"] / (row["flops"] + labels / prompts)
            row["multiplier_with_labels"] = row["multiplier"] * share
    rewards = dict.fromkeys(cell.reward for cell in cells)
    baseline = [
        {**row, **own}
        for name in rewards
        for row in best_of_n_rows(name, pool, study.budgets, study.unit)
    ]
    return agents, baseline


def task_rows(study: Study, pool: Pool, cells: Sequence[Cell]) -> list[Row]:
    """Rows of `analyse` for each task separately."""
    [reward] = study.agents
    prompts = study.prompts(study.split, study.num_prompts, make(reward))
    found = []
    for task in sorted({prompt.metadata["kind"] for prompt in prompts}):
        ids = [prompt.id for prompt in prompts if prompt.metadata["kind"] == task]
        rows = [
            replace(cell, rows=[row for row in cell.rows if row["prompt_id"] in ids])
            for cell in cells
        ]
        found += [{"task": task, **row} for row in analyse(pool.rows(ids), rows)]
    return found


@friendly
def main(
    how: harness.StudyOptions = _HOW,
    suites: str = option("constraints,reasoning,expensive", "Comma-separated parts."),
    quick: bool = option(False, "Only constraints: 16 prompts, 512 tokens, a pool of 32."),
) -> None:
    """Compare search with best-of-N for verifiable and for expensive rewards."""
    names = [name.strip() for name in ("constraints" if quick else suites).split(",")]
    out, asked = how.folder("verifiable", quick=quick), parts(names, quick=quick)
    model = how.load()
    heading = how.heading("verifiable", model)
    result: dict[str, Any] = {**heading, "results": [], "best_of_n": []}
    for study in (replace(each, seed=how.seed) for each in asked):
        for pool, cells, prefix in run_part(study, model, out):
            agents, baseline = result_rows(study, pool, cells, prefix)
            result["results"] += agents
            result["best_of_n"] += baseline
            if prefix == "once":
                result["tasks"] = task_rows(study, pool, cells)
            harness.write(how.json_file, result)
            options.console.print(table(agents))


if __name__ == "__main__":
    typer.run(main)

"""Wall time of agents at an equal token budget, as a ratio to best-of-N's in the same run.

In each round best-of-N and then each agent answer all prompts together, from an empty prefix cache,
with a seed of the round. The ratios are of one round each, so that a machine which gets slower does
so for all; what changes within a round is left in them. Run it where nothing else runs, and look at
the range.

python -m mbrl_text_env.benchmarks.wall_time --json wall_time.json
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from mbrl_text_env.benchmarks.compare import BASELINE
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

if TYPE_CHECKING:
    from mbrl_text_env.agents.base import Agent
    from mbrl_text_env.types import Prompt


class WallTimeError(ValueError):
    """A measurement that cannot be made as asked."""


def timed(
    agents: Mapping[str, Agent], prompts: Sequence[Prompt], budget: int, rounds: int, seed: int
) -> dict[str, list[dict[str, float]]]:
    """Seconds, tokens and score of an answer in each round, by agent: means over the prompts."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in agents}
    for number in range(rounds):
        for name, agent in agents.items():
            found[name].append(_answered(agent, prompts, budget, seed + number))
            errors.print(f"round {number}: {name} {found[name][-1]['seconds']:.2f} s an answer")
    return found


def _answered(agent: Agent, prompts: Sequence[Prompt], budget: int, seed: int) -> dict[str, float]:
    from mbrl_text_env.ledger import Budget

    # Prefixes that another agent left in the cache would cost this one nothing.
    clear = getattr(agent.language_model, "clear_cache", None)
    if clear is not None:
        clear()
    start = time.perf_counter()
    answers = agent.generate(prompts, Budget(tokens=budget), seed=seed)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds / len(prompts),
        "tokens": float(np.mean([a.usage.generated_tokens for a in answers])),
        "score": float(np.mean([a.completion.score for a in answers])),
    }


def rows_of(
    reward: str, budget: int, rounds: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[dict[str, Any]]:
    """One row an agent: means over the rounds, and the ratios to the first agent, by round."""
    baseline = [answer["seconds"] for answer in next(iter(rounds.values()))]
    rows = []
    for agent, answers in rounds.items():
        seconds = [answer["seconds"] for answer in answers]
        ratios = [own / best for own, best in zip(seconds, baseline, strict=True)]
        rows.append(
            {
                "reward": reward,
                "agent": agent,
                "budget_tokens": budget,
                "seconds": seconds,
                "tokens": float(np.mean([answer["tokens"] for answer in answers])),
                "mean": float(np.mean([answer["score"] for answer in answers])),
                "ratios": ratios,
                "ratio": float(np.median(ratios)),
            }
        )
    return rows


@friendly
def main(
    rewards: Annotated[str, typer.Option(help="Names, with commas.")] = "sentiment,relevance",
    agents: Annotated[
        str, typer.Option(help="Specs, with commas, timed against best-of-N.")
    ] = DEFAULT_PLANNER,
    budget: Annotated[int, typer.Option(min=1, help="Tokens for each prompt.")] = 1024,
    num_prompts: Annotated[int, typer.Option(min=2, help="Test prompts.")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    max_response_tokens: Annotated[int, typer.Option(min=1)] = 96,
    language_model: LanguageModelOption = "embedded",
    dtype: DtypeOption = "int8",
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Time the agents round by round, print the ratios."""
    from mbrl_text_env.rewards import make as make_reward

    lm = load_language_model(language_model, dtype)
    specs = (BASELINE, *(spec.strip() for spec in agents.split(",")))
    rows = []
    for name in (name.strip() for name in rewards.split(",")):
        reward_model = make_reward(name)
        prompts = chosen_prompts(reward_model, "test", num_prompts, WallTimeError)
        made = {spec: _made(spec, lm, reward_model, max_response_tokens, seed) for spec in specs}
        # What is loaded at first use is loaded before the clock runs.
        timed(made, prompts[:1], max_response_tokens, 1, seed)
        rows += rows_of(name, budget, timed(made, prompts, budget, rounds, seed))
    console.print(_table(rows))
    if json_file is not None:
        result = {
            "command": shlex.join(
                ["python", "-m", "mbrl_text_env.benchmarks.wall_time", *sys.argv[1:]]
            ),
            "date": date.today().isoformat(),
            "cpus": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "machine": platform.machine(),
            "num_prompts": num_prompts,
            "max_response_tokens": max_response_tokens,
            "language_model": [language_model, dtype],
            "results": rows,
        }
        write_text(json_file, json.dumps(result, indent=1))
        console.print(f"Results: {json_file.resolve()}")


def _made(spec: str, lm: Any, reward_model: Any, max_response_tokens: int, seed: int) -> Agent:
    from mbrl_text_env.agents.registry import make, parse_spec
    from mbrl_text_env.agents.values import make_value

    kind = parse_spec(spec)[1].get("value")
    values = {}
    if kind is not None:
        values[kind] = make_value(
            kind, lm, reward_model, max_response_tokens=max_response_tokens, seed=seed
        )
    return make(spec, lm, reward_model, values, max_response_tokens=max_response_tokens)


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="Seconds an answer", caption="times: median of the rounds [least, most]")
    for name in ("reward", "agent", "budget", "tokens", "mean", "seconds", "times best-of-N"):
        table.add_column(name)
    for row in rows:
        low, high = min(row["ratios"]), max(row["ratios"])
        table.add_row(
            row["reward"],
            row["agent"],
            f"{row['budget_tokens']:,}",
            f"{row['tokens']:,.0f}",
            f"{row['mean']:.3f}",
            f"{np.mean(row['seconds']):.2f}",
            f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]",
        )
    return table


if __name__ == "__main__":
    typer.run(main)

"""A study: agents x rewards x budgets on held-out prompts, in a folder that can be resumed.

What is expensive is kept in the folder as it is made: the pool of samples that all rewards share,
the records that value models are fitted on, and the rows of each agent at each budget.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mbrl_text_env.agents.registry import make, parse_spec
from mbrl_text_env.benchmarks.compare import (
    BASELINE,
    CompareConfig,
    CompareError,
    Comparison,
    choose_prompts,
    run,
)
from mbrl_text_env.benchmarks.matched.pool import Pool, make_pool
from mbrl_text_env.benchmarks.matched.shelf import ValueShelf
from mbrl_text_env.identity import identity
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.mdp import initial
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.runs import claimed

DEFAULT_PLANNER = "adaptive:value=prefix"
"""Chosen on the validation split; the same for every reward."""

_FORMAT = 2

Unit = Literal["tokens", "flops", "seconds"]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Study:
    """What is run.

    Args:
        agents: Agent specs by reward; their option `value` names a value model of `ValueShelf`.
        budgets: Sizes of the budget for one prompt, in generated tokens of best-of-N.
        unit: What is capped: the tokens themselves, or the FLOPs or seconds that best-of-N takes
            for as many.
        split: Of the prompts that are answered.
        num_prompts: How many of them, for each reward.
        samples: Of the pool, for each prompt.
        train_prompts: Prompts of the training split that value models are fitted on.
        train_samples: Responses to each of them.
        max_response_tokens: Token limit of a response.
        seed: Of everything. Agents sample with the next ones: what they answer must not be taken
            from the pool that they are compared with.
        answers: Of each agent to each prompt, each with a seed of its own.
        batch_prompts: Most prompts that are answered together.

    Raises:
        CompareError: The unit is unknown, or a budget is smaller than a response.
    """

    agents: Mapping[str, tuple[str, ...]]
    budgets: tuple[int, ...]
    unit: Unit = "tokens"
    split: str = "test"
    num_prompts: int = 64
    samples: int = 256
    train_prompts: int = 64
    train_samples: int = 8
    max_response_tokens: int = 96
    seed: int = 0
    answers: int = 1
    batch_prompts: int = 64

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise CompareError(f"unit: expected one of {get_args(Unit)}, got {self.unit!r}.")
        if not self.budgets or min(self.budgets) < self.max_response_tokens:
            raise CompareError(
                f"budgets: expected one or more of at least {self.max_response_tokens} tokens (a "
                f"response), got {list(self.budgets)}."
            )
        if self.answers < 1:
            raise CompareError(f"answers: expected at least 1, got {self.answers}.")

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "agents": {k: list(v) for k, v in self.agents.items()}}

    def record(self, language_model: LanguageModel) -> dict[str, Any]:
        """What all studies in one folder have in common."""
        names = ("split", "train_prompts", "train_samples", "max_response_tokens", "seed")
        return {
            "format": _FORMAT,
            "language_model": identity(language_model),
            **{name: getattr(self, name) for name in names},
        }


@dataclass(frozen=True)
class Cell:
    """One agent, reward and budget.

    Args:
        reward: The reward's name.
        agent: The agent's spec.
        budget: In generated tokens of best-of-N.
        unit: What was capped.
        rows: Those of `mbrl_text_env.benchmarks.compare`, one for each answer to a prompt.
    """

    reward: str
    agent: str
    budget: int
    unit: Unit
    rows: Sequence[dict[str, Any]]


def run_study(
    study: Study,
    language_model: LanguageModel,
    rewards: Mapping[str, RewardModel],
    out: Path,
    *,
    on_progress: Progress = lambda message: None,
) -> Iterator[tuple[str, Pool, list[Cell]]]:
    """Run or resume a study, reward by reward.

    Studies with other agents, rewards, budgets or numbers of prompts may share a folder: they share
    the pool, and what they have in common is run once.

    Args:
        study: What to run.
        language_model: Shared by all agents.
        rewards: The reward models by the names that `study.agents` uses.
        out: The study's folder.
        on_progress: Told what begins.

    Yields:
        A reward's name, its pool and its cells.

    Raises:
        CompareError: The folder holds runs of another study (another language model, seed, response
            limit or training set), there are too few prompts, or a budget in FLOPs does not pay for
            a response to each prompt.
        AuditError: The pool in the folder is of another model, seed or size.
    """
    with claimed(out, study.record(language_model), "study", CompareError):
        for name, specs in study.agents.items():
            runs = _Runs(study, language_model, name, rewards[name], out)
            on_progress(f"{name}: pool of {study.samples} responses to each prompt")
            pool = runs.pool()
            cells = []
            for budget in study.budgets:
                caps = runs.caps(pool, budget)
                for spec in specs:
                    on_progress(f"{name}: {spec} at {budget:,}")
                    rows = runs.answers(spec, budget, caps)
                    cells.append(Cell(name, spec, budget, study.unit, rows))
            yield name, pool, cells


class _Runs:
    """The runs of a study for one reward."""

    def __init__(
        self,
        study: Study,
        language_model: LanguageModel,
        name: str,
        reward_model: RewardModel,
        out: Path,
    ) -> None:
        self.study, self.name, self.out = study, name, out
        self.language_model, self.reward_model = language_model, reward_model
        self.prompts = choose_prompts(
            load_prompts(split=study.split), study.num_prompts, reward_model, study.seed
        )
        self.shelf = ValueShelf(
            language_model,
            reward_model,
            out / "train",
            prompts=study.train_prompts,
            samples=study.train_samples,
            max_response_tokens=study.max_response_tokens,
            seed=study.seed,
        )

    def pool(self) -> Pool:
        """Best-of-N's pool."""
        return make_pool(
            self.out / "pool",
            self.out / "scores" / self.name,
            self.language_model,
            self.reward_model,
            self.prompts,
            samples=self.study.samples,
            max_response_tokens=self.study.max_response_tokens,
            seed=self.study.seed,
        )

    def caps(self, pool: Pool, budget: int) -> dict[str, Any]:
        """What best-of-N takes for `budget` tokens, in the study's unit."""
        if self.study.unit == "tokens":
            return {"budget_tokens": budget}
        if self.study.unit == "flops":
            return {"budget_flops": self._flops(pool, budget)}
        rows = self.answered(BASELINE, f"tokens-{budget}", 0, {"budget_tokens": budget})
        return {"budget_seconds": float(np.mean([row["seconds"] for row in rows]))}

    def _flops(self, pool: Pool, budget: int) -> float:
        once, per_token = (
            float(pool.prompt_flops.mean()),
            float(pool.flops.sum() / pool.tokens.sum()),
        )
        baseline = make(
            BASELINE,
            self.language_model,
            self.reward_model,
            max_response_tokens=self.study.max_response_tokens,
        )
        states = [initial(prompt, self.language_model) for prompt in self.prompts]
        least = max(baseline.response_usage(state).flops for state in states)
        if once + budget * per_token < least:
            smallest = math.ceil((least - once) / per_token)
            raise CompareError(
                f"{self.name}, budget {budget:,}: expected FLOPs that pay for a response to each "
                f"prompt, got {once + budget * per_token:.3g} for {least:.3g}. Ask for budgets of "
                f"{smallest:,} or more."
            )
        return once + budget * per_token

    def answers(self, spec: str, budget: int, caps: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows of an agent under a budget, one for each answer to each prompt."""
        folder = f"{self.study.unit}-{budget}"
        return [
            row
            for number in range(self.study.answers)
            for row in self.answered(spec, folder, number, caps)
        ]

    def answered(
        self, spec: str, folder: str, number: int, caps: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Rows of an agent's answers of one number."""
        study = self.study
        config = CompareConfig(
            (spec,),
            max_response_tokens=study.max_response_tokens,
            seed=study.seed + 1 + number,
            batch_prompts=study.batch_prompts,
            **caps,
        )
        comparison = Comparison(
            config,
            self.prompts,
            self.language_model,
            self.reward_model,
            self.shelf if "value" in parse_spec(spec)[1] else None,
        )
        again = f"-again-{number}" if number else ""
        place = self.out / "runs" / self.name / folder / f"{slug(spec)}{again}"
        return run(comparison, place)[spec]


def slug(spec: str) -> str:
    """A folder's name for an agent's spec.

    Example:
        >>> slug("beam:chunk_tokens=8:value=prefix")
        'beam-chunk_tokens-8-value-prefix'
    """
    return re.sub(r"[^\w.]+", "-", spec)

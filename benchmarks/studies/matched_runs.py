"""The runs under matched compute: agents x rewards x budgets, in a folder that can be resumed.

What is expensive is kept in the folder as it is made: the pool of samples that all rewards share,
the records that value models are fitted on, and the rows of each agent at each budget.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mbrl_text_env.agents.registry import make, parse_spec
from mbrl_text_env.agents.values import FITTED, READY, FittedValue, make_value
from mbrl_text_env.benchmarks.audit.pool import fill_pool
from mbrl_text_env.benchmarks.compare import (
    BASELINE,
    CompareConfig,
    CompareError,
    Comparison,
    choose_prompts,
    run,
)
from mbrl_text_env.benchmarks.matched.analysis import Cell, Unit
from mbrl_text_env.benchmarks.matched.pool import Pool, make_pool
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.records import Record
from mbrl_text_env.rewards.base import RewardModel, reward_name, score_responses
from mbrl_text_env.runs import claimed, identity
from mbrl_text_env.types import Prompt, initial
from mbrl_text_env.values import ValueModel

_FORMAT = 2
_KINDS = (*READY, *FITTED)


@dataclass(frozen=True)
class Study:
    """What is run.

    Args:
        agents: Agent specs by reward; their option `value` names a kind of value model.
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

    def prompts(self, split: str, count: int, reward_model: RewardModel) -> list[Prompt]:
        """Builtin prompts that the reward applies to."""
        return choose_prompts(load_prompts(split=split), count, reward_model, self.seed)


def run_study(
    study: Study,
    language_model: LanguageModel,
    rewards: Mapping[str, RewardModel],
    out: Path,
    *,
    on_progress: Callable[[str], None] = lambda message: None,
) -> Iterator[tuple[str, Pool, list[Cell]]]:
    """Run or resume a study in a folder; yields each reward's name, pool and cells.

    Studies with other agents, rewards, budgets or numbers of prompts may share a folder: they share
    the pool, and what they have in common is run once.

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
                    rows = [
                        row
                        for number in range(study.answers)
                        for row in runs.answered(spec, f"{study.unit}-{budget}", number, caps)
                    ]
                    cells.append(Cell(name, spec, budget, study.unit, rows))
            yield name, pool, cells


@dataclass(frozen=True)
class _Runs:
    """The runs of a study for one reward."""

    study: Study
    language_model: LanguageModel
    name: str
    reward_model: RewardModel
    out: Path

    @cached_property
    def prompts(self) -> list[Prompt]:
        return self.study.prompts(self.study.split, self.study.num_prompts, self.reward_model)

    @cached_property
    def values(self) -> LazyValues:
        return LazyValues(self.study, self.language_model, self.reward_model, self.out / "train")

    def pool(self) -> Pool:
        return make_pool(
            self.out / "pool",
            self.out / "scores" / slug(self.name),
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
        once = float(pool.prompt_flops.mean())
        per_token = float(pool.flops.sum() / pool.tokens.sum())
        limit = self.study.max_response_tokens
        baseline = make(BASELINE, self.language_model, self.reward_model, max_response_tokens=limit)
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
        models = self.language_model, self.reward_model
        values = self.values if "value" in parse_spec(spec)[1] else None
        comparison = Comparison(config, self.prompts, *models, values)
        again = f"-again-{number}" if number else ""
        place = self.out / "runs" / slug(self.name) / folder / f"{slug(spec)}{again}"
        return run(comparison, place)[spec]


@dataclass(frozen=True, eq=False)
class LazyValues(Mapping[str, ValueModel]):
    """Every kind of value model for one reward, each made, and fitted, when it is first asked for.

    `folder` keeps the responses that fits are on; all rewards share them.
    """

    study: Study
    language_model: LanguageModel
    reward_model: RewardModel
    folder: Path
    _made: dict[str, ValueModel] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What the values follow from; none is made for it."""
        names = ("train_prompts", "train_samples", "max_response_tokens", "seed")
        return {name: getattr(self.study, name) for name in names}

    def __getitem__(self, name: str) -> ValueModel:
        if name not in _KINDS:
            raise KeyError(name)
        if name not in self._made:
            limit, seed = self.study.max_response_tokens, self.study.seed
            models = self.language_model, self.reward_model
            value = make_value(name, *models, max_response_tokens=limit, seed=seed)
            if name in FITTED:
                assert isinstance(value, FittedValue)
                value = value.fit(self.records())
            self._made[name] = value
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_KINDS)

    def __len__(self) -> int:
        return len(_KINDS)

    def __contains__(self, name: object) -> bool:
        return name in _KINDS

    def records(self) -> list[Record]:
        """The scored responses that value models are fitted on."""
        study = self.study
        prompts = study.prompts("train", study.train_prompts, self.reward_model)
        pool = fill_pool(
            self.folder,
            self.language_model,
            prompts,
            samples=study.train_samples,
            max_response_tokens=study.max_response_tokens,
            shared=True,
            seed=study.seed,
        )
        records = [record for row in pool for record in row]
        texts = [record.response for record in records]
        scores = score_responses(self.reward_model, [r.prompt() for r in records], texts)
        name = reward_name(self.reward_model)
        return [
            replace(r, score=float(total), rewards=dict(scores.parts_of(i)), reward_name=name)
            for i, (r, total) in enumerate(zip(records, scores.total, strict=True))
        ]


def slug(spec: str) -> str:
    """A folder's name for an agent's spec.

    Example:
        >>> slug("beam:chunk_tokens=8:value=prefix")
        'beam-chunk_tokens-8-value-prefix'
    """
    return re.sub(r"[^\w.]+", "-", spec)

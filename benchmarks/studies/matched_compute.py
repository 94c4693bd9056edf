"""Compare planners with best-of-N at matched compute.

For each agent, the result is how many times its compute best-of-N needs for the same mean reward.
The pool of samples, the records that value models are fitted on, and the rows are kept in the
folder; an interrupted run can be resumed.

    python -m mbrl_text_env.benchmarks.studies.matched_compute
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import typer

from mbrl_text_env.agents.registry import make as make_agent
from mbrl_text_env.agents.registry import parse_spec
from mbrl_text_env.agents.values import FITTED, FittedValue, make_value
from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.audit.run import fill_pool
from mbrl_text_env.benchmarks.compare import CompareConfig, CompareError, Comparison, run
from mbrl_text_env.benchmarks.friendly import friendly, option
from mbrl_text_env.benchmarks.matched import (
    DEFAULT_PLANNER,
    Cell,
    Pool,
    Row,
    Unit,
    analyse,
    best_of_n_rows,
    pool_of,
    table,
)
from mbrl_text_env.benchmarks.options import choose_prompts
from mbrl_text_env.benchmarks.report import BASELINE, png
from mbrl_text_env.benchmarks.studies import harness
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.mdp import initial
from mbrl_text_env.records import Record
from mbrl_text_env.rewards import make
from mbrl_text_env.rewards.base import RewardModel, reward_name, score_responses
from mbrl_text_env.runs import claimed, identity
from mbrl_text_env.types import Prompt
from mbrl_text_env.values import ValueModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Row]
REWARDS = ("sentiment", "relevance", "constraints")
AGENTS = (DEFAULT_PLANNER, "lookahead:value=embedding")
_HOW = harness.StudyOptions(json_file=Path("matched-compute.json"))
_FORMAT = 2
_GIGA = 1e9
_DOTS: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1}
_COMMON = ("split", "train_prompts", "train_samples", "max_response_tokens", "seed")


@dataclass(frozen=True)
class Study:
    """Settings of a study; invalid ones are a `CompareError`.

    `agents` are specs by reward. `budgets` are generated tokens of best-of-N per prompt. `unit` is
    what is capped: these tokens, or the FLOPs or seconds that best-of-N takes for them. Value
    models are fitted on `train_samples` responses to each of `train_prompts`. The pool uses `seed`,
    and agents use the seeds after it. See `options.priced` for `reward_price`,
    `options.PromptOptions` for `source`, and `scaling.Baseline` for `target`; `suite` is a name.
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
    reward_price: str | None = None
    source: str = "builtin"
    suite: str = ""
    target: float | None = None

    def __post_init__(self) -> None:
        least = self.max_response_tokens
        for name, holds, expected in (
            ("unit", self.unit in get_args(Unit), f"one of {get_args(Unit)}"),
            (
                "budgets",
                min(self.budgets, default=0) >= least,
                f"at least {least} tokens (a response)",
            ),
            ("answers", self.answers >= 1, "at least 1"),
            (
                "unit",
                self.reward_price is None or self.unit != "tokens",
                "'flops' with a reward price, because a budget in tokens ignores reward calls",
            ),
        ):
            if not holds:
                raise CompareError(f"{name}: expected {expected}, got {getattr(self, name)!r}.")

    def prompts(self, split: str, count: int, reward_model: RewardModel) -> list[Prompt]:
        """Choose prompts of the source that the reward applies to."""
        found = options.load_prompts_option(self.source, split)
        return choose_prompts(found, count, reward_model, self.seed)


FULL = Study({}, (256, 512, 1024, 2048, 4096, 8192))
QUICK = Study({}, (512,), num_prompts=16, samples=32, train_prompts=16, train_samples=4)
_FULL_BUDGETS, _QUICK_BUDGETS = (",".join(map(str, size.budgets)) for size in (FULL, QUICK))


def run_study(
    study: Study,
    language_model: LanguageModel,
    rewards: Mapping[str, RewardModel],
    out: Path,
    *,
    on_progress: Callable[[str], None] = lambda message: None,
) -> Iterator[tuple[str, Pool, list[Cell]]]:
    """Run or resume a study in a folder; yields each reward's name, pool and cells.

    Studies with other agents, rewards, budgets or numbers of prompts can share a folder; common
    parts are run once. Any other difference is a CompareError or an AuditError.
    """
    common = {name: getattr(study, name) for name in _COMMON}
    record = {"format": _FORMAT, "language_model": identity(language_model), **common}
    with claimed(out, record, "study", CompareError):
        for name, specs in study.agents.items():
            reward_model = options.priced(
                rewards[name], study.reward_price, language_model, study.max_response_tokens
            )
            runs = _Runs(study, language_model, name, reward_model, out)
            on_progress(f"{name}: pool of {study.samples} responses to each prompt")
            records = runs.sampled("pool", runs.prompts, study.samples)
            models = language_model, reward_model
            pool = pool_of(records, out / "scores" / slug(name), *models, runs.prompts)
            pool = replace(pool, target=study.target)
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
    """The runs of a study for one reward; `made` caches value models by name."""

    study: Study
    language_model: LanguageModel
    name: str
    reward_model: RewardModel
    out: Path
    made: dict[str, ValueModel] = field(default_factory=dict)

    @cached_property
    def prompts(self) -> list[Prompt]:
        return self.study.prompts(self.study.split, self.study.num_prompts, self.reward_model)

    def sampled(self, folder: str, prompts: Sequence[Prompt], samples: int) -> list[list[Record]]:
        return fill_pool(
            self.out / folder,
            self.language_model,
            prompts,
            samples=samples,
            max_response_tokens=self.study.max_response_tokens,
            seed=self.study.seed,
        )

    def caps(self, pool: Pool, budget: int) -> dict[str, Any]:
        """The budget in the study's unit: what best-of-N takes for `budget` tokens."""
        if self.study.unit == "tokens":
            return {"budget_tokens": budget}
        if self.study.unit == "flops":
            return {"budget_flops": self._flops(pool, budget)}
        rows = self.answered(BASELINE, f"tokens-{budget}", 0, {"budget_tokens": budget})
        return {"budget_seconds": float(np.mean([row["seconds"] for row in rows]))}

    def _flops(self, pool: Pool, budget: int) -> float:
        once = float(pool.prompt_flops.mean())
        per_token = float(pool.flops.sum() / pool.tokens.sum())
        models, limit = (self.language_model, self.reward_model), self.study.max_response_tokens
        baseline = make_agent(BASELINE, *models, max_response_tokens=limit)
        states = [initial(prompt, self.language_model) for prompt in self.prompts]
        least = max(baseline.response_usage(state).flops for state in states)
        if once + budget * per_token < least:
            smallest = math.ceil((least - once) / per_token)
            raise CompareError(
                f"{self.name}, budget {budget:,}: expected enough FLOPs for a response to each "
                f"prompt, got {once + budget * per_token:.3g} of {least:.3g}. Use budgets of "
                f"{smallest:,} or more."
            )
        return once + budget * per_token

    def answered(self, spec: str, folder: str, number: int, caps: dict[str, Any]) -> list[Row]:
        """Rows of an agent's answers with one answer number."""
        study = self.study
        config = CompareConfig(
            (spec,),
            max_response_tokens=study.max_response_tokens,
            seed=study.seed + 1 + number,
            batch_prompts=study.batch_prompts,
            **caps,
        )
        kind = parse_spec(spec)[1].get("value")
        values = None if kind is None else {str(kind): self.value(str(kind))}
        models = self.language_model, self.reward_model
        again = f"-again-{number}" if number else ""
        price = "" if study.reward_price is None else f"-{slug(study.reward_price)}"
        place = self.out / "runs" / slug(self.name) / f"{folder}{price}" / f"{slug(spec)}{again}"
        return run(Comparison(config, self.prompts, *models, values), place)[spec]

    def value(self, kind: str) -> ValueModel:
        """The value model of that kind, made and fitted on first use."""
        if kind not in self.made:
            limit, seed = self.study.max_response_tokens, self.study.seed
            models = self.language_model, self.reward_model
            value = make_value(kind, *models, max_response_tokens=limit, seed=seed)
            if kind in FITTED:
                assert isinstance(value, FittedValue)
                value = value.fit(self.records())
            self.made[kind] = value
        return self.made[kind]

    def records(self) -> list[Record]:
        """The scored responses to fit value models on."""
        study = self.study
        prompts = study.prompts("train", study.train_prompts, self.reward_model)
        pool = self.sampled("train", prompts, study.train_samples)
        records = [record for row in pool for record in row]
        texts = [record.response for record in records]
        scores = score_responses(self.reward_model, [r.prompt() for r in records], texts)
        name = reward_name(self.reward_model)
        return [
            replace(r, score=float(total), rewards=dict(scores.parts_of(i)), reward_name=name)
            for i, (r, total) in enumerate(zip(records, scores.total, strict=True))
        ]


def slug(spec: str) -> str:
    """A folder name for a spec."""
    return re.sub(r"[^\w.]+", "-", spec)


def plot(rows: Mapping[str, Rows], pools: Mapping[str, Pool], path: Path, against: str) -> None:
    """Plot mean reward against "compute" or "divergence": curve of best-of-N, and agents."""
    draw = {"compute": _draw_compute, "divergence": _draw_divergence}[against]
    with png(path, figsize=(5.2 * len(rows), 4.4), dpi=130) as figure:
        panels = np.ravel(figure.subplots(1, len(rows)))
        for axes, (reward, own) in zip(panels, rows.items(), strict=True):
            lines: dict[str, list[Row]] = {row["agent"]: [] for row in own}
            for row in sorted(own, key=lambda row: row["flops"]):
                lines[row["agent"]].append(row)
            draw(axes, pools[reward], lines)
            axes.set_ylabel(f"mean {reward}")
            axes.legend(fontsize=6)


def _draw_compute(axes: Axes, pool: Pool, lines: Mapping[str, Rows]) -> None:
    curve = pool.in_flops.curve()
    costs = [point.cost / _GIGA for point in curve]
    lows, highs = [p.mean.low for p in curve], [p.mean.high for p in curve]
    axes.plot(costs, [p.mean.estimate for p in curve], color="black", label="best-of-N")
    axes.fill_between(costs, lows, highs, color="0.85")
    for agent, line in lines.items():
        means = np.array([row["mean"] for row in line])
        ends = np.array([[row["low"], row["high"]] for row in line]).T
        flops = [row["flops"] / _GIGA for row in line]
        axes.errorbar(flops, means, yerr=np.abs(ends - means), capsize=2, label=agent, **_DOTS)
    axes.set_xscale("log")
    axes.set_xlabel("GFLOPs per prompt, all models")


def _draw_divergence(axes: Axes, pool: Pool, lines: Mapping[str, Rows]) -> None:
    """Plot rows with a `kl` against surprisal, with best-of-N and its bound."""
    curve = pool.in_flops.curve()
    means, bounds = [p.mean.estimate for p in curve], [p.kl_bound for p in curve]
    if np.isfinite(pool.logprobs).all():
        excess = pool.surprisal([point.n for point in curve])
        axes.plot(excess, means, color="black", label="best-of-N")
    axes.plot(
        bounds, means, color="0.6", linestyle="--", label="upper bound of best-of-N's divergence"
    )
    for agent, line in lines.items():
        known = [row for row in line if row.get("kl") is not None]
        surprisal, rewards = ([row[key] for row in known] for key in ("kl", "mean"))
        axes.plot(surprisal, rewards, label=agent, **_DOTS)
    axes.set_xlabel("surprisal minus that of plain samples, nats per response")


@friendly
def main(
    how: harness.StudyOptions = _HOW,
    rewards: str = option(",".join(REWARDS), "Comma-separated reward names."),
    agents: str = option(",".join(AGENTS), "Comma-separated agent specs."),
    budgets: str | None = option(
        None, f"Comma-separated generated tokens per prompt; default: {_FULL_BUDGETS}."
    ),
    unit: str | None = option(
        None,
        "Unit of the budget: 'tokens', or the 'flops' or 'seconds' that best-of-N takes for "
        "them; default: tokens, or FLOPs with a price of the reward.",
    ),
    reward_price: str | None = option(None, options.PRICE),
    num_prompts: int | None = option(
        None, f"Prompts per reward; default: {FULL.num_prompts}.", min=2
    ),
    samples: int | None = option(None, f"Pool samples per prompt; default: {FULL.samples}.", min=2),
    split: str = "test",
    max_response_tokens: int = option(96, options.TOKENS),
    answers: int = option(1, "Answers per agent and prompt, with different seeds.", min=1),
    quick: bool = option(
        False,
        f"Smaller defaults: {QUICK.num_prompts} prompts, "
        f"{_QUICK_BUDGETS} tokens, a pool of {QUICK.samples}.",
    ),
) -> None:
    """Compare planners with best-of-N at matched compute."""
    names = tuple(name.strip() for name in rewards.split(","))
    specs = tuple(spec.strip() for spec in agents.split(","))
    size = QUICK if quick else FULL
    study = replace(
        size,
        agents=dict.fromkeys(names, specs),
        budgets=size.budgets if budgets is None else options.integers("--budgets", budgets),
        unit=unit or ("tokens" if reward_price is None else "flops"),  # type: ignore[arg-type]
        reward_price=reward_price,
        split=split,
        num_prompts=num_prompts or size.num_prompts,
        samples=samples or size.samples,
        max_response_tokens=max_response_tokens,
        seed=how.seed,
        answers=answers,
    )
    run_and_write(study, how, how.folder("matched-compute", quick=quick))


def run_and_write(study: Study, how: harness.StudyOptions, out: Path) -> dict[str, Any]:
    """Run a study, print and write its results by reward; returns the JSON contents."""
    assert how.json_file is not None
    model = how.load()
    models = {name: make(name) for name in study.agents}
    result: dict[str, Any] = {**how.heading("matched_compute", model), "study": asdict(study)}
    result |= {"results": [], "best_of_n": []}
    rows, pools = {}, {}
    progress = options.console.print
    for name, pool, cells in run_study(study, model, models, out, on_progress=progress):
        found = [{**row, "reward_price": study.reward_price} for row in analyse(pool, cells)]
        pools[name], rows[name] = pool, found
        result["results"] += found
        result["best_of_n"] += best_of_n_rows(name, pool, study.budgets, study.unit)
        harness.write(how.json_file, result)
        options.console.print(table(found))
    plot(rows, pools, how.json_file.with_suffix(".png"), "compute")
    divergence = how.json_file.with_name(f"{how.json_file.stem}-divergence.png")
    plot(rows, pools, divergence, "divergence")
    return result


if __name__ == "__main__":
    typer.run(main)

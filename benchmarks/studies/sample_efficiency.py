"""Model-based or model-free? Reward on held-out prompts against what training and use take.

Plain sampling, best-of-N and a planner, which are not trained; PPO and DQN, which learn to choose
among candidates; GRPO and expert iteration, which train the policy itself. All are measured on the
same prompts with the same token limit, and nothing that is measured there decides anything in
training. A run that was stopped goes on.

    python -m mbrl_text_env.benchmarks.studies.sample_efficiency --json sample_efficiency.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from mbrl_text_env.agents.registry import make as make_agent
from mbrl_text_env.agents.values import make_value
from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.friendly import friendly
from mbrl_text_env.benchmarks.matched import DEFAULT_PLANNER
from mbrl_text_env.benchmarks.report import png
from mbrl_text_env.benchmarks.statistics import Interval, mean_interval
from mbrl_text_env.benchmarks.studies import harness
from mbrl_text_env.benchmarks.studies.harness import Exam, Spent
from mbrl_text_env.language_models.base import LanguageModel, clear_cache
from mbrl_text_env.rewards import make
from mbrl_text_env.types import Budget, Ledger, Prompt

SAMPLING, BEST_OF_N = "sampling", "best-of-n"
UNITS = {
    "reward_calls": "reward calls",
    "tokens": "generated tokens",
    "flops": "FLOPs, all models and updates",
    "seconds": "seconds",
}
_VALIDATION_PROMPTS = 16
_HOW = harness.StudyOptions(json_file=Path("sample-efficiency.json"))


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a study is."""

    test_prompts: int = 64
    samples: int = 2  # answers of each policy to each of them
    max_response_tokens: int = 48
    budgets: tuple[int, ...] = (96, 192, 384, 768)  # tokens of best-of-N's and a planner's answer
    planner: str = DEFAULT_PLANNER
    choice_steps: int = 2048  # environment steps of PPO and DQN,
    choice_points: int = 2  # measured as many times on the way,
    num_candidates: int = 4  # which choose from so many
    chunk_tokens: int = 16  # of so many tokens
    grpo_stages: int = 2  # trainings one after the other, each measured,
    grpo_steps: int = 12  # of so many steps each,
    grpo_responses: int = 32  # of so many responses, to a quarter as many prompts
    iterations: int = 2  # of expert iteration,
    loop_prompts: int = 64  # which answers so many train prompts in each
    cheap_seeds: int = 3  # of search, PPO and DQN; GRPO and expert iteration have one


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


@dataclass(frozen=True)
class Point:
    """One measurement.

    Args:
        method: What was trained or searched with.
        seed: Of the training and of the answers.
        amount: How much of it, in the method's own words.
        scores: Mean score of each test prompt.
        training: What was spent before the first answer.
        use: What one answer takes.
    """

    method: str
    seed: int
    amount: str
    scores: tuple[float, ...]
    training: Spent
    use: Spent

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Point:
        """Read what `dataclasses.asdict` and JSON made of it."""
        spent = {name: Spent(**values[name]) for name in ("training", "use")}
        return cls(**{**values, "scores": tuple(values["scores"]), **spent})


@dataclass(frozen=True)
class Bench:
    """What all methods share: the base model, what it is measured on and learns from, the folder.

    Expert iteration watches itself on `validation`; `seed` is the first one.
    """

    language_model: LanguageModel
    exam: Exam
    train: Sequence[Prompt]
    validation: Sequence[Prompt]
    size: Size
    seed: int
    out: Path
    on_progress: Callable[[str], None] = lambda message: None

    def points(self, method: str) -> list[Point]:
        """All points of a method, measured or read."""
        seeds = 1 if method in ("grpo", "expert-iteration") else self.size.cheap_seeds
        found: list[Point] = []
        for seed in range(self.seed, self.seed + seeds):
            self.on_progress(f"{method}, seed {seed}")

            def measured(seed: int = seed) -> list[dict[str, Any]]:
                return [asdict(point) for point in METHODS[method](self, seed)]

            rows = harness.kept(self.out / f"{method}-{seed}.json", measured)
            found += [Point.from_json(row) for row in rows]
        return found


def searched(bench: Bench, seed: int) -> list[Point]:
    """Plain sampling, and best-of-N and the planner at each budget: nothing is trained."""
    exam = bench.exam
    scores, use = exam.sampled(bench.language_model, seed)
    found = [Point(SAMPLING, seed, "one response", scores, Spent(), use)]
    models, limit = (bench.language_model, exam.reward_model), exam.max_response_tokens
    value = make_value("prefix", *models)
    for spec in (BEST_OF_N, bench.size.planner):
        for budget in bench.size.budgets:
            agent = make_agent(spec, *models, {"prefix": value}, max_response_tokens=limit)
            scores, use = exam.answered(agent, Budget(tokens=budget), seed)
            found.append(Point(spec, seed, f"{budget:,} tokens", scores, Spent(), use))
    return found


def chosen(bench: Bench, algorithm: str, seed: int) -> list[Point]:
    """PPO or DQN, measured several times on its way."""
    from mbrl_text_env.agents import model_free

    size, exam = bench.size, bench.exam
    every = size.choice_steps // size.choice_points
    common: dict[str, Any] = {
        "num_candidates": size.num_candidates,
        "chunk_tokens": size.chunk_tokens,
        "max_response_tokens": size.max_response_tokens,
        # Embedding a candidate takes more than drawing it from a small model.
        "encoder": None,
        "total_steps": size.choice_steps,
        "eval_steps": every,
        "eval_episodes": size.samples,
        "seed": seed,
    }
    models, folder = (bench.language_model, exam.reward_model), bench.out / f"{algorithm}-{seed}"
    data: Any = (*models, bench.train, folder)
    clear_cache(bench.language_model)
    if algorithm == "ppo":
        rollout = min(512, every)
        ppo = model_free.PPOSettings(**common, rollout_steps=rollout, batch_size=min(128, rollout))
        report = model_free.train_ppo(*data, ppo, validation=exam.prompts)
    else:
        dqn = model_free.DQNSettings(**common, learning_starts=min(256, every))
        report = model_free.train_dqn(*data, dqn, validation=exam.prompts)
    # The measurements in training do not say what an answer takes: their prompts are in the cache
    # from the one before, and the answers to a prompt share it.
    clear_cache(bench.language_model)
    ledger, start, policy = Ledger(), time.perf_counter(), model_free.load_policy(folder, *models)
    model_free.evaluate(policy, *models, exam.prompts, seed=seed, ledger=ledger)
    seconds = time.perf_counter() - start
    use = Spent.of(ledger.usage.as_dict(), seconds=seconds) * (1 / len(exam.prompts))
    found = []
    for point in report.validation:
        if point.steps:
            training = Spent.of(
                point.usage.as_dict(), more_flops=point.training_flops, seconds=point.wall_seconds
            )
            steps = f"{point.steps:,} steps"
            found.append(Point(algorithm, seed, steps, point.scores, training, use))
    return found


def tuned(bench: Bench, seed: int) -> list[Point]:
    """GRPO, one training after the other, each going on from the adapter of the one before."""
    from mbrl_text_env.agents.learning import serve
    from mbrl_text_env.agents.model_free import PolicyGradientSettings, train_grpo
    from mbrl_text_env.agents.model_free.trl import LEDGER

    size, lm, reward = bench.size, bench.language_model, bench.exam.reward_model
    found, spent, before = [], Spent(), None
    for stage in range(1, size.grpo_stages + 1):
        folder = bench.out / f"grpo-{seed}-{stage}"
        if not (folder / LEDGER).is_file():
            settings = PolicyGradientSettings(
                steps=size.grpo_steps,
                prompts_per_step=size.grpo_responses // 4,
                num_generations=4,
                max_completion_length=size.max_response_tokens,
                batch_size=min(8, size.grpo_responses),
                learning_rate=2e-3,
                seed=seed + 1000 * stage,
            )
            clear_cache(lm)
            train_grpo(lm, reward, bench.train, folder, settings, start_from=before)
        ledger = json.loads((folder / LEDGER).read_text(encoding="utf-8"))
        spent += Spent.of(ledger, more_flops=ledger["training_flops"])
        scores, use = bench.exam.sampled(serve(lm, folder), seed)
        found.append(Point("grpo", seed, f"{stage * size.grpo_steps:,} steps", scores, spent, use))
        before = folder
    return found


def iterated(bench: Bench, seed: int) -> list[Point]:
    """Expert iteration: the article's loop, each iteration measured."""
    from mbrl_text_env.agents import learning

    size = bench.size
    settings = learning.planned(
        f"receding-horizon:horizon=1:plans=4:chunk_tokens={size.chunk_tokens}",
        iterations=size.iterations,
        answers_per_prompt=2,
        max_response_tokens=size.max_response_tokens,
        validation_samples=2,
        divergence_samples=0,
        patience=None,
        seed=seed,
    )
    loop = learning.ExpertIteration(
        bench.language_model,
        bench.exam.reward_model,
        bench.train[: size.loop_prompts],
        bench.validation,
        bench.out / f"loop-{seed}",
        settings,
        improver=learning.LoraImprover(learning.FineTuneSettings(learning_rate=1e-3, epochs=2)),
        on_stage=lambda i, stage: bench.on_progress(f"expert-iteration {i}: {stage}"),
    )
    found, spent = [], Spent()
    for report in loop.run().iterations:
        # The validation only watches, and plain samples of a policy need no value for it.
        if report.iteration:
            spent += _sum(report.usage, ("collected", "selected", "policy"))
            scores, use = bench.exam.sampled(loop.policy(report.iteration), seed)
            amount = f"{report.iteration} iterations"
            found.append(Point("expert-iteration", seed, amount, scores, spent, use))
        spent += _sum(report.usage, ("value",))
    return found


def _sum(usage: Mapping[str, Mapping[str, float]], stages: Sequence[str]) -> Spent:
    """What some stages of an iteration took."""
    rows = [usage[stage] for stage in stages if stage in usage]
    return sum((Spent.of(row, seconds=row["wall_seconds"]) for row in rows), Spent())


METHODS: dict[str, Callable[[Bench, int], list[Point]]] = {
    "search": searched,
    "ppo": lambda bench, seed: chosen(bench, "ppo", seed),
    "dqn": lambda bench, seed: chosen(bench, "dqn", seed),
    "grpo": tuned,
    "expert-iteration": iterated,
}
"""What can be measured; `search` is plain sampling, best-of-N and the planner."""


def rows_of(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One row for each method and amount, over all seeds.

    `low` and `high` are a 95% bootstrap interval over prompts, `seed_low` and `seed_high` the
    lowest and highest mean of a seed. `total` is the training and one answer to each test prompt.

    `pays_after` is the number of answers from which training was worth it: best-of-N of the same
    mean reward (where it first gets there; between two of its points, as if the reward rose
    linearly with the logarithm of the FLOPs) has taken more FLOPs by then. None where best-of-N has
    fewer than two points, or they do not reach that reward or begin above it, or an answer takes
    no less than best-of-N's.
    """
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.method, point.amount), []).append(point)
    rows = [_row(group) for group in groups.values()]
    for row in rows:
        row["pays_after"] = _pays_after(row, [r for r in rows if r["method"] == BEST_OF_N])
    return rows


def _row(points: Sequence[Point]) -> dict[str, Any]:
    scores = np.array([point.scores for point in points])
    by_seed = scores.mean(axis=1)
    training, use = (
        reduce(add, [getattr(point, name) for point in points]) * (1 / len(points))
        for name in ("training", "use")
    )
    return {
        "method": points[0].method,
        "amount": points[0].amount,
        "seeds": len(points),
        "prompts": scores.shape[1],
        **mean_interval(scores.mean(axis=0)).as_mean(),
        "seed_low": float(by_seed.min()),
        "seed_high": float(by_seed.max()),
        "training": asdict(training),
        "use": asdict(use),
        "total": asdict(training + use * scores.shape[1]),
    }


def _pays_after(row: dict[str, Any], baseline: Sequence[dict[str, Any]]) -> float | None:
    """See `rows_of`."""
    if not row["training"]["flops"] or len(baseline) < 2:
        return None
    line = sorted(baseline, key=lambda other: other["use"]["flops"])
    # A mean that falls by chance is no more than the one before.
    reached = np.maximum.accumulate([other["mean"] for other in line])
    if not reached[0] <= row["mean"] <= reached[-1]:
        return None
    costs = np.log([other["use"]["flops"] for other in line])
    # Of equal means, such as the highest score there is, the first one was enough.
    after = int(np.searchsorted(reached, row["mean"]))
    around = slice(max(0, after - 1), after + 1)
    equal = float(np.exp(np.interp(row["mean"], reached[around], costs[around])))
    saved = equal - row["use"]["flops"]
    return float(row["training"]["flops"] / saved) if saved > 0 else None


def shown(rows: Sequence[dict[str, Any]], reward: str) -> harness.Shown:
    """The rows as a table."""

    def spent(amounts: dict[str, float]) -> str:
        if not amounts["flops"]:
            return ""
        return f"{amounts['flops'] / 1e12:.3g} TFLOPs, {amounts['reward_calls']:,.0f} reward calls"

    return harness.Shown(
        f"{reward}: what training and use take",
        ("method", "amount", "seeds", "mean", "training", "an answer", "pays after"),
        [
            (
                row["method"],
                row["amount"],
                str(row["seeds"]),
                f"{Interval.of(row):.3f}",
                spent(row["training"]),
                spent(row["use"]),
                "" if row["pays_after"] is None else f"{row['pays_after']:,.0f} answers",
            )
            for row in rows
        ],
        "95% intervals, prompts",
    )


def plot(rows: Sequence[dict[str, Any]], reward: str, path: Path) -> None:
    """Mean reward against what training and one answer to each test prompt take, a panel a unit.

    Bands are from the lowest to the highest seed, where there are several.
    """
    from matplotlib.ticker import NullFormatter

    methods = list(dict.fromkeys(row["method"] for row in rows))
    with png(path, figsize=(11, 7.5)) as figure:
        panels = figure.subplots(2, 2, sharey=True).ravel()
        for axes, (unit, label) in zip(panels, UNITS.items(), strict=True):
            for number, method in enumerate(methods):
                # On a logarithmic axis there is no place for what costs nothing.
                own = [r for r in rows if r["method"] == method and r["total"][unit] > 0]
                line = sorted(own, key=lambda r: r["total"][unit])
                costs = [row["total"][unit] for row in line]
                color = f"C{number}"
                axes.plot(costs, [r["mean"] for r in line], marker="o", color=color, label=method)
                if any(row["seeds"] > 1 for row in line):
                    low, high = ([row[end] for row in line] for end in ("seed_low", "seed_high"))
                    axes.fill_between(costs, low, high, color=color, alpha=0.2, linewidth=0)
            axes.set_xscale("log")
            # Less than two decades would have the minor ticks named, one name over the other.
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(f"{label}, training and {rows[0]['prompts']} answers")
            axes.set_ylabel(f"mean {reward}")
        panels[0].legend(fontsize=8)


@friendly
def main(
    how: harness.StudyOptions = _HOW,
    reward: harness.RewardNameOption = "sentiment",
    methods: Annotated[str, typer.Option(help="With commas.")] = ",".join(METHODS),
    quick: Annotated[bool, typer.Option(help="Everything smaller: some minutes.")] = False,
) -> None:
    """Train, search, measure; write a table, a plot and JSON."""
    # Points of a method that is named twice would count twice.
    names = tuple(dict.fromkeys(name.strip() for name in methods.split(",")))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        expected = tuple(METHODS)
        raise typer.BadParameter(f"--methods: expected some of {expected}, got {unknown[0]!r}.")
    assert how.json_file is not None
    size = QUICK if quick else FULL
    study = {
        "reward": reward,
        "language_model": how.language_model,
        "dtype": how.dtype,
        "seed": how.seed,
        "size": json.loads(json.dumps(asdict(size))),
    }
    reward_model = make(reward)
    counts = {"train": None, "validation": _VALIDATION_PROMPTS, "test": size.test_prompts}
    prompts = {split: harness.prompts_for(reward_model, split, n) for split, n in counts.items()}
    lm = how.load()
    folder = how.folder("sample-efficiency", quick=quick)
    exam = Exam(reward_model, prompts["test"], size.samples, size.max_response_tokens)
    learned_on = prompts["train"], prompts["validation"]
    bench = Bench(lm, exam, *learned_on, size, how.seed, folder, on_progress=options.errors.print)
    # Last: a name that is misspelt does not take the folder.
    with harness.run_folder(folder, study, lm, reward_model, prompts):
        points: list[Point] = []
        result: dict[str, Any] = {**harness.heading("sample_efficiency"), "study": study}
        for name in names:
            points += bench.points(name)
            rows = rows_of(points)
            result |= {"results": rows, "points": [asdict(point) for point in points]}
            how.write(result)
        plot_file = how.json_file.with_suffix(".png")
        plot(rows, reward, plot_file)
        plots = {"Reward against reward calls, tokens, FLOPs and seconds": plot_file}
        table = shown(rows, reward)
        options.console.print(table.table())
        how.report(result, "sample_efficiency.md.jinja", [table], plots)


if __name__ == "__main__":
    typer.run(main)

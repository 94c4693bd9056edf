"""What each method scores on held-out prompts, after how much training and at what use.

Every method gives points: a policy or an agent, what was spent until it was there, and what an
answer takes. All are measured on the same prompts with the same token limit, and nothing that is
measured there decides anything in training. What was measured is kept, so a run that was stopped
goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mbrl_text_env.agents.registry import make
from mbrl_text_env.agents.values import make_value
from mbrl_text_env.benchmarks.matched.analysis import DEFAULT_PLANNER
from mbrl_text_env.benchmarks.studies.efficiency_rows import BEST_OF_N, Point
from mbrl_text_env.benchmarks.studies.harness import kept
from mbrl_text_env.benchmarks.studies.measuring import Exam, Spent
from mbrl_text_env.language_models.base import LanguageModel, clear_cache
from mbrl_text_env.types import Budget, Ledger, Prompt

SAMPLING = "sampling"
METHODS = ("search", "ppo", "dqn", "grpo", "expert-iteration")
"""What can be measured; `search` is plain sampling, best-of-N and the planner."""


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
        measures: Mapping[str, Callable[[int], list[Point]]] = {
            "search": partial(searched, self),
            "ppo": partial(chosen, self, "ppo"),
            "dqn": partial(chosen, self, "dqn"),
            "grpo": partial(tuned, self),
            "expert-iteration": partial(iterated, self),
        }
        seeds = 1 if method in ("grpo", "expert-iteration") else self.size.cheap_seeds
        found: list[Point] = []
        for seed in range(self.seed, self.seed + seeds):
            self.on_progress(f"{method}, seed {seed}")
            measure = partial(_as_json, measures[method], seed)
            rows = kept(self.out / f"{method}-{seed}.json", measure)
            found += [Point.from_json(row) for row in rows]
        return found


def _as_json(measure: Callable[[int], list[Point]], seed: int) -> list[dict[str, Any]]:
    return [asdict(point) for point in measure(seed)]


def searched(bench: Bench, seed: int) -> list[Point]:
    """Plain sampling, and best-of-N and the planner at each budget: nothing is trained."""
    exam = bench.exam
    scores, use = exam.sampled(bench.language_model, seed)
    found = [Point(SAMPLING, seed, "one response", scores, Spent(), use)]
    models, limit = (bench.language_model, exam.reward_model), exam.max_response_tokens
    value = make_value("prefix", *models)
    for spec in (BEST_OF_N, bench.size.planner):
        for budget in bench.size.budgets:
            agent = make(spec, *models, {"prefix": value}, max_response_tokens=limit)
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
        steps = stage * size.grpo_steps
        found.append(Point("grpo", seed, f"{steps:,} steps", scores, spent, use))
        before = folder
    return found


def iterated(bench: Bench, seed: int) -> list[Point]:
    """Expert iteration: the article's loop, each iteration measured."""
    from mbrl_text_env.agents.learning import (
        ExpertIteration,
        FineTuneSettings,
        LoraImprover,
        planned,
    )

    size = bench.size
    settings = planned(
        f"receding-horizon:horizon=1:plans=4:chunk_tokens={size.chunk_tokens}",
        iterations=size.iterations,
        answers_per_prompt=2,
        max_response_tokens=size.max_response_tokens,
        validation_samples=2,
        divergence_samples=0,
        patience=None,
        seed=seed,
    )
    loop = ExpertIteration(
        bench.language_model,
        bench.exam.reward_model,
        bench.train[: size.loop_prompts],
        bench.validation,
        bench.out / f"loop-{seed}",
        settings,
        improver=LoraImprover(FineTuneSettings(learning_rate=1e-3, epochs=2)),
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

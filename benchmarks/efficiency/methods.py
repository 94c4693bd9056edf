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
from typing import TYPE_CHECKING, Any

from mbrl_text_env.agents.base import Agent
from mbrl_text_env.agents.driver import run
from mbrl_text_env.agents.registry import make
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.benchmarks.paired import kept
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.ledger import Budget, Ledger, Usage
from mbrl_text_env.mdp import initial
from mbrl_text_env.rewards.base import RewardModel, score_responses
from mbrl_text_env.types import Prompt

if TYPE_CHECKING:
    from mbrl_text_env.agents.model_free import CandidatePolicy

BEST_OF_N, SAMPLING = "best-of-n", "sampling"
CHOICES = ("ppo", "dqn")


@dataclass(frozen=True)
class Spent:
    """Amounts of computation.

    Args:
        reward_calls: Responses or prefixes that the reward model scored.
        tokens: Tokens that a language model sampled.
        flops: Floating-point operations of all models, updates included.
        seconds: Wall time.
    """

    reward_calls: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(
        cls, usage: Mapping[str, float], *, more_flops: float = 0.0, seconds: float | None = None
    ) -> Spent:
        """What `Usage.as_dict()` says; the wall time of the models' calls where no other is known.

        Example:
            >>> Spent.of(Usage(generated_tokens=5, seconds=1.0).as_dict(), seconds=2.0).seconds
            2.0
        """
        return cls(
            float(usage["reward_calls"]),
            float(usage["generated_tokens"]),
            float(usage["flops"]) + more_flops,
            float(usage["seconds"]) if seconds is None else seconds,
        )

    def __add__(self, other: Spent) -> Spent:
        return Spent(**{name: amount + vars(other)[name] for name, amount in vars(self).items()})

    def __mul__(self, factor: float) -> Spent:
        return Spent(**{name: amount * factor for name, amount in vars(self).items()})


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
class Size:
    """How large a study is.

    Args:
        test_prompts: Held-out prompts.
        samples: Answers of each policy to each of them.
        max_response_tokens: Token limit of a response.
        budgets: Generated tokens for an answer of best-of-N and of the planner.
        planner: Spec of the planner.
        choice_steps: Environment steps of PPO and DQN.
        choice_points: Measurements on the way.
        num_candidates: That they choose from.
        chunk_tokens: Tokens of a candidate.
        grpo_stages: Trainings one after the other, each measured.
        grpo_steps: Steps of each.
        grpo_responses: Responses in a step, to a quarter as many prompts.
        iterations: Of expert iteration.
        loop_prompts: Train prompts that it answers in each.
        cheap_seeds: Seeds of search, PPO and DQN; GRPO and expert iteration have one.
    """

    test_prompts: int
    samples: int
    max_response_tokens: int
    budgets: tuple[int, ...]
    planner: str
    choice_steps: int
    choice_points: int
    num_candidates: int
    chunk_tokens: int
    grpo_stages: int
    grpo_steps: int
    grpo_responses: int
    iterations: int
    loop_prompts: int
    cheap_seeds: int


@dataclass(frozen=True)
class Bench:
    """What all methods share.

    Args:
        language_model: The base model.
        reward_model: What is optimised.
        train: Prompts to learn from.
        validation: Prompts that expert iteration watches itself on.
        test: Held-out prompts.
        size: How large everything is.
        seed: The first one.
        out: Folder of what was trained and measured.
        on_progress: Told what begins.
    """

    language_model: LanguageModel
    reward_model: RewardModel
    train: Sequence[Prompt]
    validation: Sequence[Prompt]
    test: Sequence[Prompt]
    size: Size
    seed: int
    out: Path
    on_progress: Callable[[str], None] = lambda message: None

    def points(self, methods: Sequence[str]) -> list[Point]:
        """All points of some methods, measured or read."""
        found: list[Point] = []
        for method in methods:
            measure, seeds = self._measures()[method]
            for seed in range(self.seed, self.seed + seeds):
                self.on_progress(f"{method}, seed {seed}")
                rows = kept(
                    self.out / f"{method}-{seed}.json",
                    lambda m=measure, s=seed: [asdict(p) for p in m(self, s)],  # type: ignore[misc]
                )
                found += [Point.from_json(row) for row in rows]
        return found

    def _measures(self) -> dict[str, tuple[Callable[[Bench, int], list[Point]], int]]:
        cheap = self.size.cheap_seeds
        return {
            "search": (searched, cheap),
            "ppo": (lambda bench, seed: chosen(bench, "ppo", seed), cheap),
            "dqn": (lambda bench, seed: chosen(bench, "dqn", seed), cheap),
            "grpo": (tuned, 1),
            "expert-iteration": (iterated, 1),
        }


METHODS = ("search", *CHOICES, "grpo", "expert-iteration")
"""What can be measured; `search` is plain sampling, best-of-N and the planner."""


def searched(bench: Bench, seed: int) -> list[Point]:
    """Plain sampling, and best-of-N and the planner at each budget: nothing is trained."""
    scores, use = sampled(bench, bench.language_model, seed)
    found = [Point(SAMPLING, seed, "one response", scores, Spent(), use)]
    for spec in (BEST_OF_N, bench.size.planner):
        for budget in bench.size.budgets:
            scores, use = answered(bench, _agent(bench, spec), Budget(tokens=budget), seed)
            found.append(Point(spec, seed, f"{budget:,} tokens", scores, Spent(), use))
    return found


def chosen(bench: Bench, algorithm: str, seed: int) -> list[Point]:
    """PPO or DQN, measured several times on its way."""
    from mbrl_text_env.agents.model_free import (
        DQNSettings,
        PPOSettings,
        load_policy,
        train_dqn,
        train_ppo,
    )

    size = bench.size
    train: Any = train_ppo if algorithm == "ppo" else train_dqn
    every = size.choice_steps // size.choice_points
    common = {
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
    settings: Any
    if algorithm == "ppo":
        rollout = min(512, every)
        settings = PPOSettings(**common, rollout_steps=rollout, batch_size=min(128, rollout))
    else:
        settings = DQNSettings(**common, learning_starts=min(256, every))
    models, folder = (bench.language_model, bench.reward_model), bench.out / f"{algorithm}-{seed}"
    _fresh(bench.language_model)
    report = train(*models, bench.train, folder, settings, validation=bench.test)
    use = _choosing(bench, load_policy(folder, *models), seed)
    return [
        Point(
            algorithm,
            seed,
            f"{point.steps:,} steps",
            point.scores,
            Spent.of(
                point.usage.as_dict(), more_flops=point.training_flops, seconds=point.wall_seconds
            ),
            use,
        )
        for point in report.validation
        if point.steps
    ]


def _choosing(bench: Bench, policy: CandidatePolicy, seed: int) -> Spent:
    """What an answer takes whose chunks a policy chooses.

    The measurements in training do not say: their prompts are in the cache from the one before, and
    the answers to a prompt share it.
    """
    from mbrl_text_env.agents.model_free import evaluate

    _fresh(bench.language_model)
    ledger, start = Ledger(), time.perf_counter()
    evaluate(policy, bench.language_model, bench.reward_model, bench.test, seed=seed, ledger=ledger)
    seconds = time.perf_counter() - start
    return Spent.of(ledger.usage.as_dict(), seconds=seconds) * (1 / len(bench.test))


def tuned(bench: Bench, seed: int) -> list[Point]:
    """GRPO, one training after the other, each going on from the adapter of the one before."""
    from mbrl_text_env.agents.learning import serve
    from mbrl_text_env.agents.model_free import PolicyGradientSettings, train_grpo
    from mbrl_text_env.agents.model_free.trl import LEDGER

    size, lm = bench.size, bench.language_model
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
            _fresh(lm)
            train_grpo(lm, bench.reward_model, bench.train, folder, settings, start_from=before)
        ledger = json.loads((folder / LEDGER).read_text(encoding="utf-8"))
        spent += Spent.of(ledger, more_flops=ledger["training_flops"])
        scores, use = sampled(bench, serve(lm, folder), seed)
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
        bench.reward_model,
        bench.train[: size.loop_prompts],
        bench.validation,
        bench.out / f"loop-{seed}",
        settings,
        improver=LoraImprover(FineTuneSettings(learning_rate=1e-3, epochs=2)),
        on_stage=lambda i, stage: bench.on_progress(f"expert-iteration {i}: {stage}"),
    )
    result = loop.run()
    found, spent = [], Spent()
    for report in result.iterations:
        # The validation only watches, and plain samples of a policy need no value for it.
        if report.iteration:
            spent += _sum(report.usage, ("collected", "selected", "policy"))
            scores, use = sampled(bench, loop.policy(report.iteration), seed)
            amount = f"{report.iteration} iterations"
            found.append(Point("expert-iteration", seed, amount, scores, spent, use))
        spent += _sum(report.usage, ("value",))
    return found


def _sum(usage: Mapping[str, Mapping[str, float]], stages: Sequence[str]) -> Spent:
    """What some stages of an iteration took."""
    total = Spent()
    for stage in stages:
        if stage in usage:
            total += Spent.of(usage[stage], seconds=usage[stage]["wall_seconds"])
    return total


def sampled(bench: Bench, policy: LanguageModel, seed: int) -> tuple[tuple[float, ...], Spent]:
    """Plain sampling on the test prompts: mean score of each, and what a response takes."""
    size = bench.size
    agent = Sampling(policy, bench.reward_model, max_response_tokens=size.max_response_tokens)
    ledgers = [Ledger() for _ in bench.test]
    states = [initial(prompt, policy) for prompt in bench.test]
    rows, start = [], time.perf_counter()
    for sample in range(size.samples):
        # Each response takes its whole prompt, as the answers of an agent do.
        _fresh(policy)
        rows.append(
            run(
                [
                    partial(agent.complete, state, 1, ledger, seed, first_sample=sample)
                    for state, ledger in zip(states, ledgers, strict=True)
                ]
            )
        )
    seconds = time.perf_counter() - start
    flat = [completion.state for found in zip(*rows, strict=True) for [completion] in found]
    texts = [policy.decode(state.response_ids) for state in flat]
    scores = score_responses(bench.reward_model, [s.prompt for s in flat], texts).total
    usage = sum((ledger.usage for ledger in ledgers), Usage())
    means = scores.reshape(len(bench.test), size.samples).mean(axis=1)
    whole = Spent.of(usage.as_dict(), seconds=seconds)
    return tuple(means.tolist()), whole * (1 / len(flat))


def answered(
    bench: Bench, agent: Agent, budget: Budget, seed: int
) -> tuple[tuple[float, ...], Spent]:
    """An agent's answers to the test prompts: score of each, and what an answer takes."""
    _fresh(agent.language_model)
    start = time.perf_counter()
    found = agent.generate(bench.test, budget, seed=seed)
    seconds = time.perf_counter() - start
    usage = sum((generation.usage for generation in found), Usage())
    scores = tuple(float(generation.completion.score or 0.0) for generation in found)
    return scores, Spent.of(usage.as_dict(), seconds=seconds) * (1 / len(found))


def _agent(bench: Bench, spec: str) -> Agent:
    from mbrl_text_env.agents.values import make_value

    return make(
        spec,
        bench.language_model,
        bench.reward_model,
        {"prefix": make_value("prefix", bench.language_model, bench.reward_model)},
        max_response_tokens=bench.size.max_response_tokens,
    )


def _fresh(language_model: LanguageModel) -> None:
    """Nobody lives on prefixes that another one computed."""
    clear = getattr(language_model, "clear_cache", None)
    if clear is not None:
        clear()

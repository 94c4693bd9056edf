"""Does a policy that learns a planner's answers give better ones, and does the planner gain too?

The loop of `agents.learning` runs on train prompts. Measured on test prompts, which it never sees:
plain sampling with the policy of each iteration, against the one before and the base, the prompts
being the pairs; and the planner on the tuned policy against the planner on the base, with the same
cap on FLOPs, each with the value model of its own policy. A run that was stopped goes on.

    python -m mbrl_text_env.benchmarks.studies.expert_iteration \
        --iterations 3 --prompts 128 --json expert_iteration.json
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from mbrl_text_env.agents.registry import make as make_agent
from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.friendly import friendly
from mbrl_text_env.benchmarks.studies import harness
from mbrl_text_env.rewards import make
from mbrl_text_env.types import Budget

if TYPE_CHECKING:
    from mbrl_text_env.agents.learning import ExpertIteration

# About the length of a builtin prompt, where a number of responses is turned into FLOPs.
_PROMPT_TOKENS = 64
_HOW = harness.StudyOptions()
_NotNegative = Annotated[float, typer.Option(min=0.0)]


def figures_of(
    loop: ExpertIteration, exam: harness.Exam, planner: str, flops: float, seed: int
) -> dict[str, Any]:
    """Run a loop and measure its policies, alone and under a planner with a cap on its FLOPs.

    What is measured is kept beside the loop's folder.
    """
    found = loop.run()
    last, best = found.iterations[-1].iteration, found.best
    names = [prompt.id for prompt in exam.prompts]
    folder = Path(loop.folder).parent

    def has_value(i: int) -> bool:
        """Whether the loop had not stopped before the iteration's value model was fitted."""
        return (Path(loop.folder) / f"{i:02d}" / "value.json").is_file()

    def sampled(i: int) -> list[Any]:
        scores, use = exam.sampled(loop.policy(i), seed)
        return [scores, asdict(use)]

    def searched(i: int) -> list[Any]:
        value = loop.value(i) if has_value(i) else None
        limit = exam.max_response_tokens
        policy = loop.policy(i)
        agent = make_agent(planner, policy, exam.reward_model, value, max_response_tokens=limit)
        scores, use = exam.answered(agent, Budget(flops=flops), seed)
        return [scores, asdict(use)]

    tests = [
        harness.kept(folder / f"test-{i:02d}.json", partial(sampled, i))[0] for i in range(last + 1)
    ]
    # Of the policies with a value model of their own, the one that validation prefers.
    tuned = best if best > 0 and has_value(best) else 1
    (before, base_use), (after, tuned_use) = (
        harness.kept(folder / f"planner-{i:02d}.json", partial(searched, i)) for i in (0, tuned)
    )
    result = {
        "sampling": [float(np.mean(scores)) for scores in tests],
        "against_the_one_before": [harness.paired(a, b, names, seed) for a, b in pairwise(tests)],
        "against_the_base": [harness.paired(tests[0], scores, names, seed) for scores in tests[1:]],
        "planner_tuned_against_base": {
            "iteration": tuned,
            "cap_flops": flops,
            "mean_flops": [use["flops"] for use in (base_use, tuned_use)],
            "mean_reward_calls": [use["reward_calls"] for use in (base_use, tuned_use)],
            **harness.paired(before, after, names, seed),
        },
    }
    return {
        "result": result,
        "best": best,
        "stopped": found.stopped,
        "iterations": [report.to_dict() for report in found.iterations],
        "usage": [report.usage for report in found.iterations],
    }


def shown(result: dict[str, Any], reward: str) -> harness.Shown:
    """Plain sampling of each policy, then the planner, each against the base."""

    def row(name: str, mean: float, found: dict[str, Any]) -> tuple[str, ...]:
        low, high = found["interval"]
        difference = f"{found['difference']:+.3f} [{low:.3f}, {high:.3f}]"
        return name, f"{mean:.3f}", difference, f"{found['p_value']:.2g}"

    planner = result["planner_tuned_against_base"]
    plain = zip(result["sampling"][1:], result["against_the_base"], strict=True)
    rows = [
        ("plain sampling, base", f"{result['sampling'][0]:.3f}", "", ""),
        *(row(f"plain sampling, iteration {i}", *found) for i, found in enumerate(plain, 1)),
        ("planner, base", f"{planner['before']:.3f}", "", ""),
        row(f"planner, iteration {planner['iteration']}", planner["after"], planner),
    ]
    return harness.Shown(reward, ("on test prompts", "mean", "minus the base's", "p"), rows)


@friendly
def main(
    reward: harness.RewardNameOption = "sentiment",
    planner: Annotated[str, typer.Option(help="Spec of the agent whose answers are learned.")] = (
        "receding-horizon:horizon=1:plans=4:chunk_tokens=16"
    ),
    value: Annotated[str, typer.Option(help="Kind of value model; see `make_value`.")] = "stacked",
    iterations: options.CountOption = 3,
    prompts: Annotated[int, typer.Option(min=2, help="Train prompts.")] = 128,
    answers: Annotated[int, typer.Option(min=1, help="Planned answers to each.")] = 2,
    top_fraction: Annotated[float, typer.Option(help="Share of the answers to learn.")] = 0.5,
    start_from: Annotated[str, typer.Option(help="'checkpoint' or 'base'.")] = "checkpoint",
    learning_rate: _NotNegative = 1e-3,
    epochs: _NotNegative = 2.0,
    max_response_tokens: options.CountOption = 48,
    validation_prompts: options.CountOption = 32,
    test_prompts: Annotated[int, typer.Option(min=2)] = 64,
    samples: Annotated[int, typer.Option(min=2, help="Responses to each test prompt.")] = 4,
    budget_responses: Annotated[
        int, typer.Option(min=1, help="FLOPs of the planners, in plain responses.")
    ] = 8,
    how: harness.StudyOptions = _HOW,
) -> None:
    """Run the loop, measure each of its policies, print."""
    from mbrl_text_env.agents import learning

    settings = learning.planned(
        planner,
        top_fraction=top_fraction,
        iterations=iterations,
        answers_per_prompt=answers,
        start_from=start_from,
        value=value,
        max_response_tokens=max_response_tokens,
        patience=None,
        seed=how.seed,
    )
    tuning = learning.FineTuneSettings(learning_rate=learning_rate, epochs=epochs)
    study = {
        "settings": asdict(settings),
        "tuning": asdict(tuning),
        "prompts": [prompts, validation_prompts, test_prompts, samples],
        "budget_responses": budget_responses,
        "reward": reward,
        "language_model": [how.language_model, how.dtype],
    }
    lm, reward_model = how.load(), make(reward)
    counts = {"train": prompts, "validation": validation_prompts, "test": test_prompts}
    chosen = {split: harness.prompts_for(reward_model, split, n) for split, n in counts.items()}
    flops = lm.usage_bound(_PROMPT_TOKENS, [max_response_tokens] * budget_responses).flops
    exam = harness.Exam(reward_model, chosen["test"], samples, max_response_tokens)
    folder = how.folder("expert-iteration")
    with harness.run_folder(folder, study, lm, reward_model, chosen):
        loop = learning.ExpertIteration(
            lm,
            reward_model,
            chosen["train"],
            chosen["validation"],
            folder / "loop",
            settings,
            improver=learning.LoraImprover(tuning),
            on_stage=lambda i, stage: options.errors.print(f"iteration {i}: {stage}"),
        )
        figures = figures_of(loop, exam, planner, flops, how.seed)
        result = {**harness.heading("expert_iteration"), **study, **figures}
        table = shown(figures["result"], reward)
        options.console.print(table.table())
        how.report(result, "expert_iteration.md.jinja", [table])


if __name__ == "__main__":
    typer.run(main)

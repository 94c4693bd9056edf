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
from mbrl_text_env.benchmarks.studies import harness
from mbrl_text_env.benchmarks.studies.measuring import Exam
from mbrl_text_env.rewards import make
from mbrl_text_env.types import Budget

if TYPE_CHECKING:
    from mbrl_text_env.agents.learning import ExpertIteration

# About the length of a builtin prompt, where a number of responses is turned into FLOPs.
_PROMPT_TOKENS = 64


def figures_of(
    loop: ExpertIteration, exam: Exam, planner: str, flops: float, seed: int
) -> dict[str, Any]:
    """Run a loop and measure its policies, alone and under a planner with a cap on its FLOPs.

    What is measured is kept beside the loop's folder.
    """
    found = loop.run()
    last, best = found.iterations[-1].iteration, found.best
    names = [prompt.id for prompt in exam.prompts]
    folder = Path(loop.folder).parent

    def sampled(i: int) -> list[Any]:
        scores, use = exam.sampled(loop.policy(i), seed)
        return [scores, asdict(use)]

    def searched(i: int) -> list[Any]:
        value = loop.value(i) if _has_value(loop, i) else None
        limit = exam.max_response_tokens
        policy = loop.policy(i)
        agent = make_agent(planner, policy, exam.reward_model, value, max_response_tokens=limit)
        scores, use = exam.answered(agent, Budget(flops=flops), seed)
        return [scores, asdict(use)]

    tests = [
        harness.kept(folder / f"test-{i:02d}.json", partial(sampled, i))[0] for i in range(last + 1)
    ]
    # Of the policies with a value model of their own, the one that validation prefers.
    tuned = best if best > 0 and _has_value(loop, best) else 1
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


def _has_value(loop: ExpertIteration, iteration: int) -> bool:
    """Whether the loop had not stopped before the iteration's value model was fitted."""
    return (Path(loop.folder) / f"{iteration:02d}" / "value.json").is_file()


def shown(result: dict[str, Any], reward: str) -> harness.Shown:
    """Plain sampling of each policy, then the planner, each against the base."""
    plain = zip(result["sampling"][1:], result["against_the_base"], strict=True)
    rows = [("plain sampling, base", f"{result['sampling'][0]:.3f}", "", "")]
    for i, (mean, found) in enumerate(plain, 1):
        rows.append((f"plain sampling, iteration {i}", f"{mean:.3f}", *_difference(found)))
    planner = result["planner_tuned_against_base"]
    rows += [
        ("planner, base", f"{planner['before']:.3f}", "", ""),
        (
            f"planner, iteration {planner['iteration']}",
            f"{planner['after']:.3f}",
            *_difference(planner),
        ),
    ]
    return harness.Shown(reward, ("on test prompts", "mean", "minus the base's", "p"), rows)


def _difference(found: dict[str, Any]) -> tuple[str, str]:
    low, high = found["interval"]
    return f"{found['difference']:+.3f} [{low:.3f}, {high:.3f}]", f"{found['p_value']:.2g}"


@options.friendly
def main(
    reward: harness.RewardNameOption = "sentiment",
    planner: Annotated[str, typer.Option(help="Spec of the agent whose answers are learned.")] = (
        "receding-horizon:horizon=1:plans=4:chunk_tokens=16"
    ),
    value: Annotated[str, typer.Option(help="Kind of value model; see `make_value`.")] = "stacked",
    iterations: Annotated[int, typer.Option(min=1)] = 3,
    prompts: Annotated[int, typer.Option(min=2, help="Train prompts.")] = 128,
    answers: Annotated[int, typer.Option(min=1, help="Planned answers to each.")] = 2,
    top_fraction: Annotated[float, typer.Option(help="Share of the answers to learn.")] = 0.5,
    start_from: Annotated[str, typer.Option(help="'checkpoint' or 'base'.")] = "checkpoint",
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-3,
    epochs: Annotated[float, typer.Option(min=0.0)] = 2.0,
    max_response_tokens: Annotated[int, typer.Option(min=1)] = 48,
    validation_prompts: Annotated[int, typer.Option(min=1)] = 32,
    test_prompts: Annotated[int, typer.Option(min=2)] = 64,
    samples: Annotated[int, typer.Option(min=2, help="Responses to each test prompt.")] = 4,
    budget_responses: Annotated[
        int, typer.Option(min=1, help="FLOPs of the planners, in plain responses.")
    ] = 8,
    language_model: options.LanguageModelOption = "embedded",
    dtype: options.DtypeOption = "int8",
    seed: int = 0,
    out: harness.OutOption = None,
    json_file: harness.JsonOption = None,
    page: harness.PageOption = None,
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
        seed=seed,
    )
    tuning = learning.FineTuneSettings(learning_rate=learning_rate, epochs=epochs)
    study = {
        "settings": asdict(settings),
        "tuning": asdict(tuning),
        "prompts": [prompts, validation_prompts, test_prompts, samples],
        "budget_responses": budget_responses,
        "reward": reward,
        "language_model": [language_model, dtype],
    }
    lm, reward_model = options.load_language_model(language_model, dtype), make(reward)
    counts = {"train": prompts, "validation": validation_prompts, "test": test_prompts}
    chosen = {split: harness.prompts_for(reward_model, split, n) for split, n in counts.items()}
    flops = lm.usage_bound(_PROMPT_TOKENS, [max_response_tokens] * budget_responses).flops
    exam = Exam(reward_model, chosen["test"], samples, max_response_tokens)
    folder = out or Path("expert-iteration")
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
        figures = figures_of(loop, exam, planner, flops, seed)
        result = {**harness.heading("expert_iteration"), **study, **figures}
        tables = [shown(result["result"], reward)]
        harness.report(result, "expert_iteration.md.jinja", tables, json_file, page)


if __name__ == "__main__":
    typer.run(main)

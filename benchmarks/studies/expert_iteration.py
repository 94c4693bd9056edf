"""Does a policy that learns a planner's answers give better ones, and does the planner gain too?

The loop of `agents.learning` runs on train prompts. Measured on test prompts, which it never sees:
plain sampling with the policy of each iteration, against the one before and the base, the prompts
being the pairs; and the planner on the tuned policy against the planner on the base, with the same
cap on FLOPs, each with the value model of its own policy. A run that was stopped goes on.

    python -m mbrl_text_env.benchmarks.studies.expert_iteration \
        --iterations 3 --prompts 128 --json expert_iteration.json
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from mbrl_text_env.agents.catalogue import make as make_agent
from mbrl_text_env.benchmarks.options import (
    DtypeOption,
    LanguageModelOption,
    console,
    errors,
    friendly,
    load_language_model,
)
from mbrl_text_env.benchmarks.studies.harness import (
    JsonOption,
    OutOption,
    PageOption,
    RewardNameOption,
    Shown,
    heading,
    kept,
    paired,
    prompts_for,
    run_folder,
    write_figures,
    write_page,
)
from mbrl_text_env.benchmarks.studies.measuring import Exam
from mbrl_text_env.ledger import Budget
from mbrl_text_env.rewards import make

if TYPE_CHECKING:
    from mbrl_text_env.agents.learning import ExpertIteration

# About the length of a builtin prompt, where a number of responses is turned into FLOPs.
_PROMPT_TOKENS = 64


def figures_of(
    loop: ExpertIteration, last: int, best: int, exam: Exam, planner: str, flops: float, seed: int
) -> dict[str, Any]:
    """All figures, for a loop that has ended; what is measured is kept in the loop's folder.

    Args:
        loop: Its policies are measured.
        last: The last iteration.
        best: The one that validation prefers.
        exam: What they are measured on.
        planner: Spec of the planner.
        flops: Cap on each of its answers.
        seed: Of all answers.
    """
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

    tests = [kept(folder / f"test-{i:02d}.json", partial(sampled, i))[0] for i in range(last + 1)]
    # Of the policies with a value model of their own, the one that validation prefers.
    tuned = best if best > 0 and _has_value(loop, best) else 1
    (before, base_use), (after, tuned_use) = (
        kept(folder / f"planner-{i:02d}.json", partial(searched, i)) for i in (0, tuned)
    )
    return {
        "sampling": [float(np.mean(scores)) for scores in tests],
        "against_the_one_before": [paired(a, b, names, seed) for a, b in pairwise(tests)],
        "against_the_base": [paired(tests[0], scores, names, seed) for scores in tests[1:]],
        "planner_tuned_against_base": {
            "iteration": tuned,
            "cap_flops": flops,
            "mean_flops": [use["flops"] for use in (base_use, tuned_use)],
            "mean_reward_calls": [use["reward_calls"] for use in (base_use, tuned_use)],
            **paired(before, after, names, seed),
        },
    }


def _has_value(loop: ExpertIteration, iteration: int) -> bool:
    """Whether the loop had not stopped before the iteration's value model was fitted."""
    return (Path(loop.folder) / f"{iteration:02d}" / "value.json").is_file()


def shown(result: dict[str, Any], reward: str) -> Shown:
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
    return Shown(reward, ("on test prompts", "mean", "minus the base's", "p"), rows)


def _difference(found: dict[str, Any]) -> tuple[str, str]:
    low, high = found["interval"]
    return f"{found['difference']:+.3f} [{low:.3f}, {high:.3f}]", f"{found['p_value']:.2g}"


@friendly
def main(
    reward: RewardNameOption = "sentiment",
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
    language_model: LanguageModelOption = "embedded",
    dtype: DtypeOption = "int8",
    seed: int = 0,
    out: OutOption = None,
    json_file: JsonOption = None,
    page: PageOption = None,
) -> None:
    """Run the loop, measure each of its policies, print."""
    from mbrl_text_env.agents.learning import ExpertIteration, FineTuneSettings, LoraImprover
    from mbrl_text_env.agents.learning import planned as planned_settings

    settings = planned_settings(
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
    tuning = FineTuneSettings(learning_rate=learning_rate, epochs=epochs)
    study = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "tuning": json.loads(json.dumps(asdict(tuning))),
        "prompts": [prompts, validation_prompts, test_prompts, samples],
        "budget_responses": budget_responses,
        "reward": reward,
        "language_model": [language_model, dtype],
    }
    lm, reward_model = load_language_model(language_model, dtype), make(reward)
    counts = {"train": prompts, "validation": validation_prompts, "test": test_prompts}
    chosen = {split: prompts_for(reward_model, split, n) for split, n in counts.items()}
    flops = lm.usage(_PROMPT_TOKENS, [max_response_tokens] * budget_responses).flops
    exam = Exam(reward_model, chosen["test"], samples, max_response_tokens)
    folder = out or Path("expert-iteration")
    with run_folder(folder, study, lm, reward_model, chosen):
        loop = ExpertIteration(
            lm,
            reward_model,
            chosen["train"],
            chosen["validation"],
            folder / "loop",
            settings,
            improver=LoraImprover(tuning),
            on_stage=lambda i, stage: errors.print(f"iteration {i}: {stage}"),
        )
        found = loop.run()
        last = found.iterations[-1].iteration
        measured = figures_of(loop, last, found.best, exam, planner, flops, seed)
        result = {
            **heading("expert_iteration"),
            **study,
            "result": measured,
            "best": found.best,
            "stopped": found.stopped,
            "iterations": [report.to_dict() for report in found.iterations],
            "usage": [report.usage for report in found.iterations],
        }
        write_figures(result, json_file)
        table = shown(measured, reward)
        console.print(table.table())
        write_page(page, "expert_iteration.md.jinja", result, [table])


if __name__ == "__main__":
    typer.run(main)

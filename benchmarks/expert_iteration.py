"""Does a policy that learns a planner's answers give better ones, and does the planner gain too?

The loop of `agents.learning` runs on train prompts. Measured on test prompts, which it never sees:
plain sampling with the policy of each iteration, against the one before and the base, the prompts
being the pairs; how well the first and the refitted value model rank responses to one prompt; and
the planner on the tuned policy against the planner on the base, with the same cap on FLOPs, each
with the value model of its own policy. A run that was stopped goes on.

python -m mbrl_text_env.benchmarks.expert_iteration \
    --iterations 3 --prompts 128 --json expert_iteration.json
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from mbrl_text_env.benchmarks.options import (
    DtypeOption,
    LanguageModelOption,
    errors,
    friendly,
    load_language_model,
)
from mbrl_text_env.benchmarks.paired import chosen_prompts, kept, paired
from mbrl_text_env.files import write_folder, write_text
from mbrl_text_env.identity import identity
from mbrl_text_env.records import Record, RecordWriter, read_records
from mbrl_text_env.runs import claimed, prompt_digests

if TYPE_CHECKING:
    from mbrl_text_env.agents.learning import ExpertIteration
    from mbrl_text_env.language_models import LanguageModel
    from mbrl_text_env.rewards.base import RewardModel
    from mbrl_text_env.types import Prompt
    from mbrl_text_env.values import ValueModel

_BATCH = 16
_RESAMPLES = 2000
# About the length of a builtin prompt, where a number of responses is turned into FLOPs.
_PROMPT_TOKENS = 64


class ExpertIterationError(ValueError):
    """A measurement that cannot be made as asked."""


@dataclass(frozen=True)
class Measurement:
    """What the figures are measured with.

    Args:
        reward: What is optimised.
        test: The prompts that are answered; the loop does not see them.
        samples: Plain samples to each.
        planner: Spec of the planner.
        flops: Cap on each of the planner's answers.
        max_response_tokens: Token limit of a response.
        seed: Of all sampling.
    """

    reward: RewardModel
    test: Sequence[Prompt]
    samples: int
    planner: str
    flops: float
    max_response_tokens: int
    seed: int


def sampled(folder: Path, policy: LanguageModel, with_: Measurement) -> list[Record]:
    """Plain samples on the test prompts, from their folder or drawn and kept there."""
    from mbrl_text_env.agents.learning import collect_answers
    from mbrl_text_env.agents.sampling import Sampling

    if not folder.is_dir():
        limit = with_.max_response_tokens
        agent = Sampling(policy, with_.reward, max_response_tokens=limit)
        with write_folder(folder) as scratch, RecordWriter(scratch) as writer:
            collect_answers(
                agent,
                with_.test,
                writer,
                answers=with_.samples,
                batch_prompts=_BATCH,
                seed=with_.seed,
            )
    return read_records(folder)


def planned_answers(
    policy: LanguageModel, value: ValueModel | None, with_: Measurement
) -> list[dict[str, Any]]:
    """The planner's answer to each test prompt: score and what it took."""
    from mbrl_text_env.agents.catalogue import make
    from mbrl_text_env.ledger import Budget

    agent = make(
        with_.planner, policy, with_.reward, value, max_response_tokens=with_.max_response_tokens
    )
    # Prompts that an earlier measurement left in the cache would cost this policy nothing.
    clear = getattr(policy, "clear_cache", None)
    if clear is not None:
        clear()
    rows = []
    for start in range(0, len(with_.test), _BATCH):
        batch = with_.test[start : start + _BATCH]
        found = agent.generate(batch, Budget(flops=with_.flops), seed=with_.seed)
        rows += [
            {"prompt": g.prompt.id, "score": g.completion.score, **g.usage.as_dict()} for g in found
        ]
    return rows


def compared(first: Sequence[Record], second: Sequence[Record], seed: int) -> dict[str, Any]:
    """Plain sampling with two policies, on the prompts that both have."""
    common = {r.prompt_id for r in first} & {r.prompt_id for r in second}
    rows = [[r for r in side if r.prompt_id in common] for side in (first, second)]
    before, after = ([record.score for record in side] for side in rows)
    return paired(before, after, [record.prompt_id for record in rows[0]], seed)


def values_compared(
    first: ValueModel, refitted: ValueModel, records: Sequence[Record], seed: int
) -> dict[str, Any]:
    """Correlation within prompts of two value models on the same fresh responses.

    The interval of the difference is of a bootstrap over prompts (percentiles). None stands for
    what is not defined, because a prediction or a score does not vary.
    """
    # Each response is scored and predicted once, and not once a resample.
    predicted = [_predictions(value, records) for value in (first, refitted)]
    rng = np.random.default_rng(seed)
    count = len(set(predicted[0].prompts))
    before, after = (prediction.resampled(np.arange(count)) for prediction in predicted)
    differences = []
    for _ in range(_RESAMPLES):
        chosen = rng.integers(count, size=count)
        one, other = (prediction.resampled(chosen) for prediction in predicted)
        differences.append(other - one)
    defined = [difference for difference in differences if not math.isnan(difference)]
    low, high = np.quantile(defined, [0.025, 0.975]) if defined else (math.nan, math.nan)
    return {
        "first": _number(before),
        "refitted": _number(after),
        "difference": _number(after - before),
        "interval": [_number(low), _number(high)],
    }


def refitted(
    kind: str,
    policies: Sequence[LanguageModel],
    out: Path,
    train: Measurement,
    test: Measurement,
) -> list[dict[str, Any]]:
    """What refitting gains a value model, on more samples than the loop's.

    One is fitted on plain samples of the base policy, one on those of each later policy, as many;
    both are tried on fresh responses of the later policy to the test prompts.

    Args:
        kind: See `make_value`.
        policies: The base and those of the iterations.
        out: Keeps the samples, and the figures of each iteration.
        train: Prompts and samples that are fitted on.
        test: Those that are tried on.
    """
    from mbrl_text_env.agents.values import FittedValue, make_value

    fitted: dict[int, ValueModel] = {}

    def value(i: int) -> ValueModel:
        if i not in fitted:
            limit, seed = train.max_response_tokens, train.seed
            made = make_value(kind, policies[i], train.reward, max_response_tokens=limit, seed=seed)
            assert isinstance(made, FittedValue)
            fitted[i] = made.fit(sampled(out / f"fit-{i:02d}", policies[i], train))
        return fitted[i]

    def figures(i: int) -> dict[str, Any]:
        fresh = sampled(out / f"fresh-{i:02d}", policies[i], test)
        return values_compared(value(0), value(i), fresh, test.seed)

    return [
        {
            "iteration": i,
            **kept(out / f"{kind}-{i:02d}.json", lambda i=i: figures(i)),  # type: ignore[misc]
        }
        for i in range(1, len(policies))
    ]


def _number(value: float) -> float | None:
    """As JSON, which has no NaN."""
    return None if math.isnan(value) else float(value)


@dataclass(frozen=True)
class _Predictions:
    """Predictions and scores of prefixes, with the number of each one's prompt and its length."""

    mean: np.ndarray[Any, np.dtype[np.float64]]
    scores: np.ndarray[Any, np.dtype[np.float64]]
    prompts: np.ndarray[Any, np.dtype[np.int64]]
    lengths: np.ndarray[Any, np.dtype[np.int64]]

    def resampled(self, chosen: np.ndarray[Any, np.dtype[np.int64]]) -> float:
        """The correlation within prompts, for prompts drawn with repetition."""
        from mbrl_text_env.fitting.report import within_prompt
        from mbrl_text_env.fitting.samples import Samples

        rows = [np.flatnonzero(self.prompts == prompt) for prompt in chosen]
        which = np.concatenate(rows)
        groups = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        inputs = self.mean[which, None]
        samples = Samples(inputs, self.scores[which], self.lengths[which], groups)
        return within_prompt(self.mean[which], samples)


def _predictions(value: ValueModel, records: Sequence[Record]) -> _Predictions:
    from mbrl_text_env.agents.values.training_prefixes import cut_prefixes, samples_of
    from mbrl_text_env.values import as_value_model, predict_values

    states, owners = cut_prefixes(records, as_value_model(value).lengths)
    mean = predict_values(value, states).mean
    found = samples_of(mean[:, None], owners, [len(state.response_ids) for state in states])
    return _Predictions(mean, found.scores, found.groups, found.lengths)


def figures_of(
    loop: ExpertIteration,
    last: int,
    best: int,
    out: Path,
    with_: Measurement,
) -> dict[str, Any]:
    """All figures, for a loop that has ended."""
    seed = with_.seed
    tests = [sampled(out / f"test-{i:02d}", loop.policy(i), with_) for i in range(last + 1)]
    found: dict[str, Any] = {
        "sampling": [float(np.mean([r.score for r in records])) for records in tests],
        "against_the_one_before": [compared(a, b, seed) for a, b in itertools.pairwise(tests)],
        "against_the_base": [compared(tests[0], records, seed) for records in tests[1:]],
    }
    first = loop.value(0)
    if first is not None:
        found["values_on_fresh_responses"] = [
            {"iteration": i, **values_compared(first, value, tests[i], seed)}
            for i in range(1, last + 1)
            if (value := _value(loop, i)) is not None
        ]
    # Of the policies with a value model of their own, the one that validation prefers.
    tuned = best if best > 0 and _value(loop, best) is not None else 1
    rows = [
        kept(
            out / f"planner-{i:02d}.json",
            lambda i=i: planned_answers(loop.policy(i), loop.value(i), with_),  # type: ignore[misc]
        )
        for i in (0, tuned)
    ]
    before, after = ([row["score"] for row in side] for side in rows)
    found["planner_tuned_against_base"] = {
        "iteration": tuned,
        "cap_flops": with_.flops,
        "mean_flops": [float(np.mean([row["flops"] for row in side])) for side in rows],
        "mean_reward_calls": [
            float(np.mean([row["reward_calls"] for row in side])) for side in rows
        ],
        **paired(before, after, [row["prompt"] for row in rows[0]], seed),
    }
    return found


def _value(loop: ExpertIteration, iteration: int) -> ValueModel | None:
    """The value model of an iteration; None where the loop had stopped before it was fitted."""
    folder = Path(loop.folder) / f"{iteration:02d}"
    return loop.value(iteration) if (folder / "value.json").is_file() else None


@friendly
def main(
    reward: Annotated[str, typer.Option(help="A reward's name, such as 'constraints'.")] = (
        "sentiment"
    ),
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
    refits: Annotated[
        str,
        typer.Option(
            help="Kinds of value model, with commas, that are fitted on each policy's samples, to "
            "see what refitting would gain them."
        ),
    ] = "",
    refit_samples: Annotated[
        int,
        typer.Option(
            min=2,
            help="Responses to each prompt that those are fitted on, and that they are tried on.",
        ),
    ] = 16,
    language_model: LanguageModelOption = "embedded",
    dtype: DtypeOption = "int8",
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same one goes on.")] = Path(
        "expert-iteration"
    ),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
) -> None:
    """Run the loop, measure each of its policies, print."""
    from mbrl_text_env.agents.learning import ExpertIteration, FineTuneSettings, LoraImprover
    from mbrl_text_env.agents.learning import planned as planned_settings
    from mbrl_text_env.agents.values import FITTED
    from mbrl_text_env.rewards import make

    kinds = [kind.strip() for kind in refits.split(",") if kind.strip()]
    for kind in kinds:
        if kind not in FITTED:
            raise typer.BadParameter(f"--refits: expected some of {FITTED}, got {kind!r}.")

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
    record = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "tuning": json.loads(json.dumps(asdict(tuning))),
        "prompts": [prompts, validation_prompts, test_prompts, samples],
        "budget_responses": budget_responses,
        "reward": reward,
        "language_model": [language_model, dtype],
    }
    lm = load_language_model(language_model, dtype)
    reward_model = make(reward)
    counts = {"train": prompts, "validation": validation_prompts, "test": test_prompts}
    chosen = {
        split: chosen_prompts(reward_model, split, count, ExpertIterationError)
        for split, count in counts.items()
    }
    depends_on = {
        **record,
        "models": [identity(lm), identity(reward_model)],
        "data": {split: prompt_digests(some) for split, some in chosen.items()},
    }
    with claimed(out, depends_on, "measurement of expert iteration", ExpertIterationError):
        loop = ExpertIteration(
            lm,
            reward_model,
            chosen["train"],
            chosen["validation"],
            out / "loop",
            settings,
            improver=LoraImprover(tuning),
            on_stage=lambda i, stage: errors.print(f"iteration {i}: {stage}"),
        )
        flops = lm.usage(_PROMPT_TOKENS, [max_response_tokens] * budget_responses).flops
        with_ = Measurement(
            reward_model, chosen["test"], samples, planner, flops, max_response_tokens, seed
        )
        result = loop.run()
        last = result.iterations[-1].iteration
        measured = figures_of(loop, last, result.best, out, with_)
        if kinds:
            # Other numbers of samples are other measurements, and have folders of their own.
            folder = out / f"refits-{refit_samples}"
            test = replace(with_, samples=refit_samples)
            train = replace(test, test=chosen["train"])
            policies = [loop.policy(i) for i in range(last + 1)]
            rows = {kind: refitted(kind, policies, folder, train, test) for kind in kinds}
            measured["refits"] = {"samples": refit_samples, **rows}
        figures = {
            **record,
            "result": measured,
            "best": result.best,
            "stopped": result.stopped,
            "iterations": [report.to_dict() for report in result.iterations],
            "usage": [report.usage for report in result.iterations],
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "cpus": os.cpu_count(),
            "command": shlex.join(
                ["python", "-m", "mbrl_text_env.benchmarks.expert_iteration", *sys.argv[1:]]
            ),
        }
        print(json.dumps({**record, "result": measured}, indent=2))
        if json_file is not None:
            write_text(json_file, json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)

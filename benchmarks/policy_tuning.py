"""Does GRPO or RLOO raise what plain sampling scores on prompts that it has not seen?

A LoRA adapter is trained on train prompts. Plain sampling, at the temperature that agents have by
default, is scored on test prompts before and after, with the same seeds; the prompts are the pairs.
Also measured is how fast responses are sampled, by the package's own decoding loop and by
transformers' `generate`, which TRL takes by default. A run that was stopped goes on.

python -m mbrl_text_env.benchmarks.policy_tuning --reward sentiment --json policy_tuning.json
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from mbrl_text_env.benchmarks.options import (
    DtypeOption,
    LanguageModelOption,
    friendly,
    load_language_model,
)
from mbrl_text_env.benchmarks.paired import chosen_prompts, kept, paired
from mbrl_text_env.files import write_file, write_text
from mbrl_text_env.identity import identity
from mbrl_text_env.runs import claimed, prompt_digests

if TYPE_CHECKING:
    from mbrl_text_env.agents.model_free import PolicyGradientSettings, StepReport
    from mbrl_text_env.language_models import TransformersLM
    from mbrl_text_env.rewards.base import RewardModel
    from mbrl_text_env.types import Prompt

_BATCH = 16
# Steps of the running mean in the plot.
_LATEST = 5


class PolicyTuningError(ValueError):
    """A measurement that cannot be made as asked."""


def constrained(
    prompts: Sequence[Prompt], constraints: Sequence[str], instruction: str
) -> list[Prompt]:
    """Prompts without constraints of their own, all with the same ones and a sentence that asks.

    Args:
        prompts: Some may have constraints; they are left out.
        constraints: As JSON, such as `{"type": "no_commas"}`.
        instruction: Stands at the end of each prompt.

    Raises:
        PolicyTuningError: A constraint is no JSON object, or there is no instruction.
    """
    from mbrl_text_env.types import Prompt

    parsed = []
    for text in constraints:
        try:
            constraint = json.loads(text)
        except json.JSONDecodeError as error:
            raise PolicyTuningError(f"--constraint: expected JSON, got {text!r} ({error}).") from (
                error
            )
        if not isinstance(constraint, dict) or "type" not in constraint:
            raise PolicyTuningError(
                f'--constraint: expected an object such as {{"type": "no_commas"}}, got {text!r}.'
            )
        parsed.append(constraint)
    if not instruction.strip():
        raise PolicyTuningError("--instruction: expected the sentence that asks for it, got none.")
    return [
        Prompt.from_text(
            f"{prompt.text} {instruction}",
            prompt.id,
            metadata={**prompt.metadata, "constraints": parsed},
            split=prompt.split,
        )
        for prompt in prompts
        if not prompt.metadata.get("constraints")
    ]


@dataclass(frozen=True)
class Sampled:
    """What plain sampling scored.

    Args:
        prompts: Each response's prompt.
        scores: Each response's score.
        tokens: Mean length of a response.
        distinct: Share of different bigrams of words among all, over all responses.
    """

    prompts: list[str]
    scores: list[float]
    tokens: float
    distinct: float


def sampled(
    lm: TransformersLM,
    reward: RewardModel,
    prompts: Sequence[Prompt],
    samples: int,
    max_response_tokens: int,
    seed: int,
) -> Sampled:
    """Score plain sampling, several responses to each prompt."""
    from mbrl_text_env.agents.base import DEFAULT_PARAMS
    from mbrl_text_env.mdp import initial
    from mbrl_text_env.rewards.base import score_responses

    ids, texts, lengths = [], [], []
    for start in range(0, len(prompts), _BATCH):
        states = [initial(prompt, lm) for prompt in prompts[start : start + _BATCH]]
        rows = lm.sample(
            states, samples, max_response_tokens, seeds=[seed] * len(states), params=DEFAULT_PARAMS
        )
        for state, row in zip(states, rows, strict=True):
            ids += [state.prompt] * len(row)
            texts += [lm.decode(chunk.token_ids) for chunk in row]
            lengths += [len(chunk) for chunk in row]
    words = [text.split() for text in texts]
    bigrams = [pair for row in words for pair in itertools.pairwise(row)]
    return Sampled(
        [prompt.id for prompt in ids],
        score_responses(reward, ids, texts).total.tolist(),
        float(np.mean(lengths)),
        len(set(bigrams)) / max(1, len(bigrams)),
    )


def comparison(before: Sampled, after: Sampled, seed: int) -> dict[str, Any]:
    """Paired statistics; the unit is the prompt."""
    return {
        **paired(before.scores, after.scores, before.prompts, seed),
        **{
            f"{name}_{when}": getattr(side, name)
            for when, side in (("before", before), ("after", after))
            for name in ("tokens", "distinct")
        },
    }


def sampling_speeds(
    lm: TransformersLM, prompts: Sequence[Prompt], settings: PolicyGradientSettings
) -> dict[str, float]:
    """Tokens a second of a step's sampling: ours, and `generate` in float32 as TRL calls it."""
    import torch

    from mbrl_text_env.agents.learning.lora import tokenizer_of, trainable
    from mbrl_text_env.language_models.base import SamplingParams
    from mbrl_text_env.mdp import initial

    states = [initial(prompt, lm) for prompt in prompts[: settings.prompts_per_step]]
    count, limit = settings.num_generations, settings.max_completion_length

    def own() -> int:
        lm.clear_cache()
        rows = lm.sample(
            states,
            count,
            limit,
            seeds=[0] * len(states),
            params=SamplingParams(temperature=settings.temperature),
        )
        return sum(len(chunk) for row in rows for chunk in row)

    model = trainable(lm, settings).eval()
    tokenizer = tokenizer_of(lm)
    rows = [list(state.prompt_ids) for state in states for _ in range(count)]
    inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    options = {"temperature": settings.temperature, "top_k": 0, "top_p": 1.0}

    def generate() -> int:
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(0)
            found = model.generate(
                **inputs,
                max_new_tokens=limit,
                do_sample=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=sorted(lm.stop_token_ids),
                **options,
            )
        added = found[:, inputs["input_ids"].shape[1] :]
        ends = torch.isin(added, torch.tensor(sorted(lm.stop_token_ids)))
        # A response ends with its first stop token.
        return int((ends.cumsum(1) - ends.long() == 0).sum())

    return {"own": _speed(own), "generate": _speed(generate)}


def plot_curve(curve: Sequence[Mapping[str, float]], reward: str, path: Path) -> None:
    """Mean reward of each step's responses, and the mean of the latest steps.

    Args:
        curve: A row a step, with `step` and `reward`.
        reward: The reward's name.
        path: A PNG.
    """
    from matplotlib.figure import Figure

    steps, means = ([row[key] for row in curve] for key in ("step", "reward"))
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, means, color="0.7", marker="o", markersize=3, label="a step")
    latest = [float(np.mean(means[max(0, i - _LATEST) : i])) for i in range(1, len(means) + 1)]
    axes.plot(steps, latest, label=f"mean of the latest {_LATEST}")
    axes.set_xlabel("step")
    axes.set_ylabel(f"mean {reward}")
    axes.legend()
    with write_file(path) as scratch:
        figure.savefig(scratch, dpi=130, format="png")


def _speed(sample: Callable[[], int]) -> float:
    start = time.perf_counter()
    tokens = sample()
    return tokens / (time.perf_counter() - start)


def _show(step: StepReport) -> None:
    print(
        f"step {step.step}: reward {step.reward:.3f}, {step.mean_tokens:.0f} tokens",
        file=sys.stderr,
        flush=True,
    )


@friendly
def main(
    reward: Annotated[str, typer.Option(help="A reward's name, such as 'constraints'.")] = (
        "sentiment"
    ),
    constraint: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON of a constraint that prompts without any are given, for reward "
            "'constraints'; may be repeated."
        ),
    ] = None,
    instruction: Annotated[
        str, typer.Option(help="The sentence that asks for it, put behind each prompt.")
    ] = "",
    algorithm: Annotated[str, typer.Option(help="'grpo' or 'rloo'.")] = "grpo",
    steps: Annotated[int, typer.Option(min=1)] = 60,
    prompts_per_step: Annotated[int, typer.Option(min=1)] = 4,
    num_generations: Annotated[int, typer.Option(min=2)] = 8,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 2e-3,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling in training.")] = 0.7,
    beta: Annotated[float, typer.Option(min=0.0, help="Weight of the KL divergence.")] = 0.0,
    max_response_tokens: Annotated[int, typer.Option(min=1)] = 48,
    prompts: Annotated[int, typer.Option(min=2, help="Test prompts.")] = 64,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each test prompt.")] = 4,
    language_model: LanguageModelOption = "embedded",
    dtype: DtypeOption = "int8",
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same one goes on.")] = Path(
        "policy-tuning"
    ),
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the figures here, and the learning curve beside them."),
    ] = None,
) -> None:
    """Train, measure before and after, print."""
    from mbrl_text_env.agents.learning import serve
    from mbrl_text_env.agents.model_free import PolicyGradientSettings, train_grpo, train_rloo
    from mbrl_text_env.agents.model_free.trl import CURVE, LEDGER
    from mbrl_text_env.rewards import make

    if instruction and not constraint:
        raise typer.BadParameter(
            f"--instruction: expected a --constraint that it asks for, got {instruction!r} alone."
        )
    trainers = {"grpo": train_grpo, "rloo": train_rloo}
    if algorithm not in trainers:
        raise typer.BadParameter(f"--algorithm: expected grpo or rloo, got {algorithm!r}.")
    settings = PolicyGradientSettings(
        steps=steps,
        prompts_per_step=prompts_per_step,
        num_generations=num_generations,
        max_completion_length=max_response_tokens,
        temperature=temperature,
        learning_rate=learning_rate,
        beta=beta,
        batch_size=num_generations,
        seed=seed,
    )
    record = {
        "reward": reward,
        **({"constraints": [*constraint, instruction]} if constraint else {}),
        "algorithm": algorithm,
        "settings": json.loads(json.dumps(asdict(settings))),
        "test": [prompts, samples],
        "language_model": [language_model, dtype],
    }
    lm = load_language_model(language_model, dtype)
    reward_model = make(reward)
    prepare: Callable[[Sequence[Prompt]], list[Prompt]] = list
    if constraint:
        prepare = functools.partial(constrained, constraints=constraint, instruction=instruction)
    train, test = (
        chosen_prompts(reward_model, split, count, PolicyTuningError, prepare)
        for split, count in (("train", None), ("test", prompts))
    )

    depends_on = {
        **record,
        "models": [identity(lm), identity(reward_model)],
        "data": {"train": prompt_digests(train), "test": prompt_digests(test)},
    }
    with claimed(out, depends_on, "measurement of tuning", PolicyTuningError):

        def score(policy: TransformersLM) -> dict[str, Any]:
            limits = samples, max_response_tokens, seed
            return asdict(sampled(policy, reward_model, test, *limits))

        before = Sampled(**kept(out / "before.json", lambda: score(lm)))
        speeds = kept(out / "speeds.json", lambda: sampling_speeds(lm, train, settings))
        adapter = out / "adapter"
        if not (adapter / CURVE).is_file():
            trainers[algorithm](lm, reward_model, train, adapter, settings, on_step=_show)
        after = Sampled(**kept(out / "after.json", lambda: score(serve(lm, adapter))))
        figures = {
            **record,
            "result": comparison(before, after, seed),
            "num_train_prompts": len(train),
            "tokens_per_second": speeds,
            "ledger": json.loads((adapter / LEDGER).read_text(encoding="utf-8")),
            "curve": json.loads((adapter / CURVE).read_text(encoding="utf-8")),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "cpus": os.cpu_count(),
            "command": shlex.join(
                ["python", "-m", "mbrl_text_env.benchmarks.policy_tuning", *sys.argv[1:]]
            ),
        }
        print(
            json.dumps({key: value for key, value in figures.items() if key != "curve"}, indent=2)
        )
        if json_file is not None:
            write_text(json_file, json.dumps(figures, indent=2))
            plot_curve(figures["curve"], reward, json_file.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)

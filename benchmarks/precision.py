"""What the faster number formats change: the distribution of tokens, and the reward of responses.

Divergence is measured at every position of responses that float32 sampled, reward on responses that
each format samples for the same prompts and seed.

python -m mbrl_text_env.benchmarks.precision --json precision.json
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from mbrl_text_env.benchmarks.statistics import mean_interval
from mbrl_text_env.files import write_text
from mbrl_text_env.language_models import SamplingParams, TransformersLM, embedded
from mbrl_text_env.mdp import initial, transition
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.rewards import make
from mbrl_text_env.rewards.base import score_responses
from mbrl_text_env.types import Prompt

FORMATS = {"bfloat16": torch.bfloat16, "int8": torch.int8}
_BATCH = 8


def divergence(
    reference: TransformersLM, other: TransformersLM, prompts: Sequence[Prompt], positions: int
) -> dict[str, float]:
    """KL divergence (nats a token) of another format from the reference, on its own samples."""
    found: list[float] = []
    agreed: list[float] = []
    for start in range(0, len(prompts), _BATCH):
        states = [initial(prompt, reference) for prompt in prompts[start : start + _BATCH]]
        rows = reference.sample(states, 1, 64, seeds=[0] * len(states))
        chunks = [row[0] for row in rows]
        pairs = zip(
            reference.log_distributions(states, chunks),
            other.log_distributions(states, chunks),
            strict=True,
        )
        for exact, rounded in pairs:
            found += (exact.exp() * (exact - rounded)).sum(-1).tolist()
            agreed += (exact.argmax(-1) == rounded.argmax(-1)).float().tolist()
        if len(found) >= positions:
            break
    kl = np.asarray(found)
    return {
        "positions": len(kl),
        "mean_kl": float(kl.mean()),
        "median_kl": float(np.median(kl)),
        "largest_kl": float(kl.max()),
        "same_most_probable_token": float(np.mean(agreed)),
    }


def responses(lm: TransformersLM, prompts: Sequence[Prompt], samples: int, seed: int) -> list[str]:
    """Texts of `samples` responses to each prompt."""
    states = [initial(prompt, lm) for prompt in prompts]
    params = SamplingParams(temperature=0.7)
    rows = lm.sample(states, samples, 96, seeds=[seed] * len(states), params=params)
    return [
        lm.decode(transition(state, chunk, lm.context_length).response_ids)
        for state, row in zip(states, rows, strict=True)
        for chunk in row
    ]


def rewards(
    engines: dict[str, TransformersLM], prompts: Sequence[Prompt], samples: int, seed: int
) -> dict[str, Any]:
    """Mean reward of each format, and its difference from float32's, paired by prompt."""
    texts = {name: responses(lm, prompts, samples, seed) for name, lm in engines.items()}
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    found: dict[str, Any] = {}
    for name in ("sentiment", "relevance"):
        model = make(name)
        means = {
            kind: score_responses(model, repeated, made).total.reshape(-1, samples).mean(1)
            for kind, made in texts.items()
        }
        found[name] = {kind: {"mean": float(values.mean())} for kind, values in means.items()}
        for kind in FORMATS:
            interval = mean_interval(means[kind] - means["float32"])
            found[name][kind] |= {
                "difference": interval.estimate,
                "low": interval.low,
                "high": interval.high,
            }
    return found


def main(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    seed: int = 0,
    positions: Annotated[int, typer.Option(min=1)] = 2000,
    num_prompts: Annotated[int, typer.Option(min=2)] = 64,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 4,
) -> None:
    """Measure and print."""
    prompts = load_prompts(split="test")
    order = np.random.default_rng(seed).permutation(len(prompts))
    prompts = [prompts[i] for i in order]
    engines = {"float32": embedded(dtype=torch.float32)}
    engines |= {name: embedded(dtype=dtype) for name, dtype in FORMATS.items()}
    figures = {
        "command": shlex.join(
            ["python", "-m", "mbrl_text_env.benchmarks.precision", *sys.argv[1:]]
        ),
        "seed": seed,
        "divergence": {
            name: divergence(engines["float32"], engines[name], prompts, positions)
            for name in FORMATS
        },
        "reward": rewards(engines, prompts[:num_prompts], samples, seed),
    }
    print(json.dumps(figures, indent=2))
    if json_file is not None:
        write_text(json_file, json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)

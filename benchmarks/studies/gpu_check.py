"""Check the engine on a device: exactness, a comparison, guarded decoding and throughput.

Without a GPU, the CPU is checked in the same way.

    python -m mbrl_text_env.benchmarks.studies.gpu_check --json gpu-check.json
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.compare import CompareConfig, Comparison, compare
from mbrl_text_env.benchmarks.friendly import friendly, option
from mbrl_text_env.benchmarks.studies import harness, throughput
from mbrl_text_env.checks import check_language_model
from mbrl_text_env.language_models import SampleRequest, SamplingParams, TransformersLM, embedded
from mbrl_text_env.language_models.base import Guard, prefix_of
from mbrl_text_env.mdp import initial
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.rewards import make
from mbrl_text_env.types import Prompt, TextState

# Allowed mean error of the engine's log-probabilities: in nats (shapes and so rounding differ), or
# as a multiple of the error of transformers' own forward pass in this number format.
NEAR, AS_FAR = 1e-4, 1.25


def exactness(lm: TransformersLM, states: Sequence[TextState], tokens: int) -> dict[str, float]:
    """Compare greedy tokens and their log-probabilities with a forward pass in float32 (nats).

    The weights are the same, rounded to the number format. The regret of a token is the log-ratio
    of the best token's probability to its own in that pass; a regret no larger than the differences
    is a tie. `transformers_difference` is the error of transformers in the number format.
    """
    greedy = SamplingParams(temperature=0)
    rows = lm.sample(states, 1, tokens, seeds=[0] * len(states), params=greedy)
    exact = copy.deepcopy(lm.model).float()
    differences, theirs, regrets = [], [], []
    for state, [chunk] in zip(states, rows, strict=True):
        ids = torch.tensor([[*prefix_of(state), *chunk.token_ids]], device=lm.device)
        begin, at = ids.shape[1] - len(chunk) - 1, (np.arange(len(chunk)), list(chunk.token_ids))
        with torch.inference_mode():
            own, rounded = (
                model(ids).logits[0, begin:-1].float().log_softmax(-1).cpu().numpy()
                for model in (exact, lm.model)
            )
        differences.append(np.abs(own[at] - chunk.logprobs))
        theirs.append(np.abs(own[at] - rounded[at]))
        regrets.append(own.max(axis=1) - own[at])
    difference, regret = np.concatenate(differences), np.concatenate(regrets)
    return {
        "tokens": len(difference),
        "mean_difference": float(difference.mean()),
        "largest_difference": float(difference.max()),
        "transformers_difference": float(np.concatenate(theirs).mean()),
        "greedy_share": float((regret == 0).mean()),
        "largest_regret": float(regret.max()),
    }


def is_exact(found: Mapping[str, float]) -> bool:
    """Whether the engine is about as exact as transformers."""
    allowed = max(NEAR, AS_FAR * found["transformers_difference"])
    return found["mean_difference"] <= allowed


def guarded(lm: TransformersLM, states: Sequence[TextState], tokens: int) -> dict[str, float]:
    """Sample chunks without the letter e, and measure tokens per second.

    If no allowed token remains, a chunk ends with a refused token (see `Guard`).
    """
    guard = Guard(lambda states, texts, ended: ["e" not in text for text in texts])
    requests = [
        SampleRequest(state, 4, tokens, seed, guard=guard) for seed, state in enumerate(states)
    ]
    began = time.perf_counter()
    chunks = [chunk for row in lm.sample_requests(requests) for chunk in row]
    seconds = time.perf_counter() - began
    broken = [chunk for chunk in chunks if "e" in lm.decode(chunk.token_ids)]
    dead = [
        chunk
        for chunk in broken
        if chunk.finish_reason is None and "e" not in lm.decode(chunk.token_ids[:-1])
    ]
    return {
        "chunks": len(chunks),
        "kept": len(chunks) - len(broken),
        "dead_ends": len(dead),
        "tokens_a_second": sum(map(len, chunks)) / seconds,
    }


def compared(lm: TransformersLM, prompts: Sequence[Prompt], tokens: int) -> list[dict[str, Any]]:
    """Run a short comparison; returns its agents' summaries."""
    agents = ("sampling", "best-of-n:n=4", "adaptive")
    config = CompareConfig(agents, budget_tokens=4 * tokens, max_response_tokens=tokens)
    with tempfile.TemporaryDirectory() as folder:
        summary = compare(Comparison(config, prompts, lm, make("sentiment")), folder)
    found: list[dict[str, Any]] = summary["agents"]
    return found


@friendly
def main(
    json_file: Path | None = option(None, harness.JSON),
    device: str | None = option(None, "Device; default: a GPU if there is one, else the CPU."),
    dtype: str = option("bfloat16", "Number format: float32 or bfloat16."),
    num_prompts: int = option(16, "", min=1),
    tokens: int = option(64, "Tokens per response.", min=2),
    sizes: str = option("1,16,64", "Comma-separated batch sizes.", "--batch-sizes"),
    repeats: int = option(2, "Runs per measurement.", min=1),
) -> None:
    """Check and measure the engine; exits with 1 if it is not exact.

    The contract (such as chunks that do not depend on the batch) is checked in float32.
    """
    place, number_format = options.usable_device(device), throughput.DTYPES[dtype]
    exactly = embedded(device=place, dtype=torch.float32)
    check_language_model(exactly, [Prompt.from_text("A dog", chat=False)], max_new_tokens=2)
    lm = embedded(device=place, dtype=number_format)
    every = load_prompts(split="test")
    states = [initial(prompt, lm) for prompt in every[:num_prompts]]
    engines = {dtype: throughput.engine_of(number_format, device=place)}
    exact, bound = exactness(lm, states, tokens), guarded(lm, states, tokens)
    rates = throughput.rates_by_batch_size(
        engines, every, tokens, repeats, sizes=options.integers("--batch-sizes", sizes)
    )
    result = {
        **harness.heading("gpu_check"),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
        "dtype": dtype,
        "exactness": exact,
        "guarded": bound,
        "comparison": compared(lm, every[:num_prompts], tokens),
        "tokens": tokens,
        "rates": rates,
        f"ratios_{dtype}": throughput.ratios(rates, dtype),
    }
    options.console.print(throughput.table(rates))
    print(json.dumps(result, indent=1))
    harness.write(json_file, result)
    if not is_exact(exact) or bound["kept"] + bound["dead_ends"] < bound["chunks"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

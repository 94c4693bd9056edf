"""Compare the throughput of the language-model engine with common alternatives, in one run.

All sample the same number of tokens for the same prompts with the embedded model:

(a) the article's procedure: transformers' `generate`, one prompt at a time, re-encoding prefixes;
(b) transformers' `generate`, batched;
(c) the engine;
(d) the engine without its prefix cache;
(e) servers, with as many concurrent requests: llama.cpp, started here, and those of `--server`;
and the limit of the machine: only the network's matrix products, at the same shapes and format.

    python -m mbrl_text_env.benchmarks.studies.throughput --json throughput.json
    python -m mbrl_text_env.benchmarks.studies.throughput --server vllm=http://127.0.0.1:8000
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import typer
from rich.table import Table

from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.friendly import friendly, option
from mbrl_text_env.benchmarks.llama_server import llama_server
from mbrl_text_env.benchmarks.studies import harness
from mbrl_text_env.language_models import SamplingParams, TransformersLM, embedded
from mbrl_text_env.mdp import initial, transition
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.types import Prompt, TextState, one_of

BATCH_SIZES = (1, 4, 16, 64, 128)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
PARAMS = SamplingParams(temperature=0.7)
PARTIAL_PARAMS = SamplingParams(temperature=0.9)
# The article's look-ahead: KEPT of the partial responses are continued.
PARTIALS, PARTIAL_TOKENS, KEPT, CONTINUATIONS, CONTINUATION_TOKENS = 4, 64, 2, 2, 192
_SERVER_PARALLEL = 64


def article_procedure(lm: TransformersLM, prompts: Sequence[Prompt]) -> float:
    """Seconds of the article's look-ahead with transformers; the first two partials are kept."""
    tokenizer: Any = lm._tokenizer.tokenizer

    def generate(text: str, count: int, tokens: int, params: SamplingParams) -> list[str]:
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        made = _generated(lm, inputs, tokens, params, num_return_sequences=count)
        start = inputs["input_ids"].shape[1]
        return [tokenizer.decode(ids[start:], skip_special_tokens=True) for ids in made]

    start = time.perf_counter()
    for prompt in prompts:
        text = tokenizer.decode(lm.encode_prompt(prompt))
        for stem in generate(text, PARTIALS, PARTIAL_TOKENS, PARTIAL_PARAMS)[:KEPT]:
            generate(text + stem, CONTINUATIONS, CONTINUATION_TOKENS, PARAMS)
    return time.perf_counter() - start


def _generated(
    lm: TransformersLM, inputs: Any, tokens: int, params: SamplingParams, **others: Any
) -> torch.Tensor:
    """Sample with transformers' `generate`; moving to the CPU waits for the device."""
    lengths = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    drawn: dict[str, Any] = {"do_sample": True, "temperature": params.temperature, "top_k": 0}
    pad = lm._tokenizer.tokenizer.eos_token_id
    with torch.inference_mode():
        made: torch.Tensor = lm.model.generate(
            **inputs, **lengths, **drawn, pad_token_id=pad, **others
        )
    return made.cpu()


def article_workload(lm: TransformersLM, prompts: Sequence[Prompt]) -> float:
    """Seconds for the same tokens with the engine, from an empty cache."""
    lm.clear_cache()
    start = time.perf_counter()
    states = [initial(prompt, lm) for prompt in prompts]
    seeds = range(len(states))
    partials = lm.sample(states, PARTIALS, PARTIAL_TOKENS, seeds=seeds, params=PARTIAL_PARAMS)
    stems = [
        transition(state, chunk, lm.context_length)
        for state, row in zip(states, partials, strict=True)
        for chunk in row[:KEPT]
    ]
    lm.sample(stems, CONTINUATIONS, CONTINUATION_TOKENS, seeds=range(len(stems)), params=PARAMS)
    return time.perf_counter() - start


def generate_rate(lm: TransformersLM, states: Sequence[TextState], tokens: int) -> float:
    """Tokens per second of transformers' `generate` on one batch."""
    ids = {"input_ids": [list(state.prompt_ids) for state in states]}
    inputs = lm._tokenizer.tokenizer.pad(ids, padding_side="left", return_tensors="pt")
    inputs = inputs.to(lm.device)
    start = time.perf_counter()
    _generated(lm, inputs, tokens, PARAMS)
    return len(states) * tokens / (time.perf_counter() - start)


def engine_rate(lm: TransformersLM, states: Sequence[TextState], tokens: int) -> float:
    """Tokens per second of the engine on one batch, with an empty cache."""
    lm.clear_cache()
    start = time.perf_counter()
    lm.sample(states, 1, tokens, seeds=range(len(states)), params=PARAMS)
    return len(states) * tokens / (time.perf_counter() - start)


def server_rate(url: str, states: Sequence[TextState], tokens: int) -> float:
    """Tokens per second of a server with concurrent requests and no cached prefixes."""
    salt = secrets.token_hex()

    def ask(state: TextState) -> int:
        body = {
            "prompt": list(state.prompt_ids),
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": PARAMS.temperature,
            # For llama.cpp; vLLM shares prefixes only between requests with equal salt.
            "cache_prompt": False,
            "cache_salt": salt,
        }
        answer = client.post(f"{url}/v1/completions", json=body)
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    limits = httpx.Limits(max_connections=len(states))
    with (
        httpx.Client(timeout=None, limits=limits) as client,  # noqa: S113 measured, not guarded
        ThreadPoolExecutor(len(states)) as pool,
    ):
        start = time.perf_counter()
        made = sum(pool.map(ask, states))
        return made / (time.perf_counter() - start)


def product_limit(lm: TransformersLM, dtype: torch.dtype, rows: int, repeats: int) -> float:
    """Tokens per second if a step were only the matrix products of all weights."""
    layers = (m for m in lm.model.modules() if isinstance(m, torch.nn.Linear))
    is_int8, make = dtype == torch.int8, partial(torch.ones, device=lm.device)
    weights = [
        (torch.randint_like(w, -127, 128) if is_int8 else w).to(dtype).t()
        for w in (layer.weight.detach() for layer in layers)
    ]
    multiply: Callable[..., torch.Tensor] = torch._int_mm if is_int8 else torch.mm
    inputs = {w.shape[0]: make(rows, w.shape[0], dtype=dtype) for w in weights}
    kind = torch.int32 if is_int8 else dtype
    outs = {w.shape[1]: make(rows, w.shape[1], dtype=kind) for w in weights}

    def run() -> float:
        start = time.perf_counter()
        for weight in weights:
            multiply(inputs[weight.shape[0]], weight, out=outs[weight.shape[1]])
        outs[weight.shape[1]][0, 0].item()  # Waits for the device.
        return time.perf_counter() - start

    with torch.inference_mode():
        return rows / min(run() for _ in range(5 * repeats + 1))


def rates_by_batch_size(
    engines: Mapping[str, TransformersLM],
    prompts: Sequence[Prompt],
    tokens: int,
    repeats: int,
    *,
    sizes: Sequence[int] = BATCH_SIZES,
    servers: Mapping[str, str] | None = None,
) -> dict[str, dict[str, float]]:
    """Tokens per second of (b) to (e) and the limit, by name and batch size; the fastest run.

    `generate` uses the network of the first engine; `servers` are URLs by name. All take turns, so
    that a slow phase of the machine affects all of them.
    """
    first, plain = next(iter(engines.items()))
    uncached = engine_of(plain.dtype, device=plain.device, prefix_cache=False)
    found: dict[str, dict[str, float]] = {}
    for size in sizes:
        states = [initial(prompt, plain) for prompt in prompts[:size]]
        runs: dict[str, Callable[[], float]] = {
            "generate": partial(generate_rate, plain, states, tokens),
            f"{first} without cache": partial(engine_rate, uncached, states, tokens),
        }
        for name, url in (servers or {}).items():
            runs[name] = partial(server_rate, url, states, tokens)
        for name, lm in engines.items():
            runs[name] = partial(engine_rate, lm, states, tokens)
            runs[f"limit {name}"] = partial(product_limit, plain, DTYPES[name], size, repeats)
        for _ in range(repeats):
            for name, run in runs.items():
                row = found.setdefault(name, {})
                row[str(size)] = max(row.get(str(size), 0.0), run())
        print(size, {name: round(row[str(size)], 1) for name, row in found.items()}, flush=True)
    return found


def article(
    engines: dict[str, TransformersLM], prompts: Sequence[Prompt], timed: int
) -> dict[str, Any]:
    """Seconds of the article's look-ahead with (a) and the engine, and the cache hit rates."""
    # Prompts run one at a time, so the time of some is scaled to all.
    timed = min(timed, len(prompts))
    some = article_procedure(engines["float32"], prompts[:timed])
    seconds, hit_rates = {"article": some * len(prompts) / timed}, {}
    for name, lm in engines.items():
        before = lm.cache_stats
        seconds[name] = article_workload(lm, prompts)
        hits = lm.cache_stats.hit_tokens - before.hit_tokens
        asked = hits + lm.cache_stats.missed_tokens - before.missed_tokens
        hit_rates[name] = hits / max(1, asked)
        print(name, seconds[name], flush=True)
    return {
        "prompts": len(prompts),
        "prompts_timed_for_article": timed,
        "tokens": (PARTIALS * PARTIAL_TOKENS + KEPT * CONTINUATIONS * CONTINUATION_TOKENS)
        * len(prompts),
        "seconds": seconds,
        "hit_rates": hit_rates,
    }


def ratios(rates: Mapping[str, Mapping[str, float]], dtype: str) -> dict[str, float]:
    """Speedups of one engine format over `generate` and servers, and its share of the limit."""
    engine, others = rates[dtype], {*rates} - {*DTYPES}
    found = {
        f"batch{size}_vs_{name.replace('.', '_')}": engine[size] / rates[name][size]
        for name in sorted(others)
        if not name.startswith("limit") and not name.endswith("without cache")
        for size in ("1", "64")
        if size in engine
    }
    if "64" in engine:
        found["batch64_share_of_limit"] = engine["64"] / rates[f"limit {dtype}"]["64"]
    return found


@friendly
def main(
    json_file: Path | None = option(None, harness.JSON),
    seed: int = 0,
    tokens: int = option(64, "Tokens per sequence.", min=1),
    article_prompts: int = option(32, "Prompts of the article's workload; 0 skips it.", min=0),
    article_timed: int = option(32, "Prompts that (a) is timed on; scaled to all.", min=1),
    repeats: int = option(2, "Runs; the fastest is reported.", min=1),
    sizes: str = option(",".join(map(str, BATCH_SIZES)), "Comma-separated.", "--batch-sizes"),
    dtypes: str = option(",".join(DTYPES), "Comma-separated number formats; float32 first."),
    server: list[str] | None = option(None, "NAME=URL of a running server, such as vLLM."),
) -> None:
    """Measure and print; takes about 20 minutes on two idle cores."""
    every = load_prompts(split="test")
    order = np.random.default_rng(seed).permutation(len(every))
    prompts = [every[i] for i in order[: max(BATCH_SIZES)]]
    names = dtypes.split(",")
    for name in names:
        one_of("--dtypes", name, [*DTYPES])
    engines = {name: engine_of(DTYPES[name], device="cpu") for name in names}
    counts = options.integers("--batch-sizes", sizes)
    given = dict(each.split("=", 1) for each in server or ())
    with llama_server(parallel=_SERVER_PARALLEL, context=_SERVER_PARALLEL * 512) as url:
        servers = {"llama.cpp": url, **given}
        rates = rates_by_batch_size(
            engines, prompts, tokens, repeats, sizes=counts, servers=servers
        )
    best = max(engines, key=lambda name: rates[name][str(counts[-1])])
    found = article(engines, prompts[:article_prompts], article_timed) if article_prompts else {}
    result = {
        **harness.heading("throughput"),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "rates": rates,
        "best_dtype": best,
        "article": found,
        **{f"ratios_{dtype}": ratios(rates, dtype) for dtype in engines},
    }
    for dtype, seconds in found.get("seconds", {}).items():
        if dtype != "article":
            compared = found["seconds"]["article"] / seconds
            result[f"ratios_{dtype}"]["article_workload_vs_article"] = compared
    options.console.print(table(rates))
    print(json.dumps({key: result[key] for key in result if key.startswith("ratios")}, indent=2))
    harness.write(json_file, result)


def table(rates: Mapping[str, Mapping[str, float]]) -> Table:
    """Format the rates by batch size."""
    shown = Table("batch", *next(iter(rates.values())), title="Tokens per second")
    for name, row in rates.items():
        shown.add_row(name, *(f"{rate:.0f}" for rate in row.values()))
    return shown


def engine_of(dtype: torch.dtype, **others: Any) -> TransformersLM:
    """The embedded model without stop tokens, so that all sequences have full length."""
    lm = embedded(dtype=dtype, batch_size=max(BATCH_SIZES), **others)
    lm.stop_token_ids = frozenset()
    return lm


if __name__ == "__main__":
    typer.run(main)

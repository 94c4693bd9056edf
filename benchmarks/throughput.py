"""Tokens a second of the language-model engine beside what people use today, in one run.

All of them sample the same number of tokens (none stops early) after the same prompts, with the
embedded model, at temperature 0.7:

(a) the article's procedure: transformers' `generate`, a prompt at a time, the prefix encoded again;
(b) transformers' `generate`, batched;
(c) the engine;
(d) the engine without its prefix cache;
(e) a llama.cpp server, with as many requests at a time;
and the machine's limit: the network's matrix products alone, at the same shapes and format.

python -m mbrl_text_env.benchmarks.throughput --json throughput.json
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import multiprocessing
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import psutil
import torch
import typer

from mbrl_text_env.benchmarks.llama_server import llama_server
from mbrl_text_env.files import write_text
from mbrl_text_env.language_models import SamplingParams, TransformersLM, embedded
from mbrl_text_env.ledger import Ledger
from mbrl_text_env.mdp import initial, transition
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.types import Prompt, TextState

BATCH_SIZES = (1, 4, 16, 64, 128)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
PARAMS = SamplingParams(temperature=0.7)
PARTIAL_PARAMS = SamplingParams(temperature=0.9)
# The article's look-ahead: partial responses and their tokens, those that are kept, continuations
# of each and their tokens.
PARTIALS, PARTIAL_TOKENS, KEPT, CONTINUATIONS, CONTINUATION_TOKENS = 4, 64, 2, 2, 192
_SERVER_PARALLEL = 64


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        prompts: At least as many as the largest batch.
        tokens: Of each sequence in the comparison by batch size.
        repeats: Runs; the fastest counts, for all alike.
    """

    prompts: Sequence[Prompt]
    tokens: int
    repeats: int


def article_procedure(lm: TransformersLM, prompts: Sequence[Prompt]) -> float:
    """Seconds of the article's look-ahead with transformers alone; the first two are kept."""
    tokenizer: Any = lm._tokenizer.tokenizer

    def generate(text: str, count: int, tokens: int, temperature: float) -> list[str]:
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            out = lm.model.generate(
                **inputs,
                do_sample=True,
                temperature=temperature,
                num_return_sequences=count,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=tokenizer.eos_token_id,
            )
        start = inputs["input_ids"].shape[1]
        return [tokenizer.decode(ids[start:], skip_special_tokens=True) for ids in out]

    start = time.perf_counter()
    for prompt in prompts:
        text = tokenizer.decode(lm.encode_prompt(prompt))
        for partial in generate(text, PARTIALS, PARTIAL_TOKENS, PARTIAL_PARAMS.temperature)[:KEPT]:
            generate(text + partial, CONTINUATIONS, CONTINUATION_TOKENS, PARAMS.temperature)
    return time.perf_counter() - start


def article_workload(lm: TransformersLM, prompts: Sequence[Prompt]) -> float:
    """Seconds of the same tokens with the engine, from an empty cache."""
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
    """Tokens a second of transformers' `generate` on one batch."""
    tokenizer: Any = lm._tokenizer.tokenizer
    ids = {"input_ids": [list(state.prompt_ids) for state in states]}
    inputs = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
    start = time.perf_counter()
    with torch.inference_mode():
        lm.model.generate(
            **inputs,
            do_sample=True,
            temperature=PARAMS.temperature,
            top_k=0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
    return len(states) * tokens / (time.perf_counter() - start)


def engine_rate(lm: TransformersLM, states: Sequence[TextState], tokens: int) -> float:
    """Tokens a second of the engine on one batch, prefixes computed anew."""
    lm.clear_cache()
    start = time.perf_counter()
    lm.sample(states, 1, tokens, seeds=range(len(states)), params=PARAMS)
    return len(states) * tokens / (time.perf_counter() - start)


def server_rate(url: str, states: Sequence[TextState], tokens: int) -> float:
    """Tokens a second of a llama.cpp server, all requests at a time."""

    def ask(state: TextState) -> int:
        body = {
            "prompt": list(state.prompt_ids),
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": PARAMS.temperature,
            "cache_prompt": False,
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
    """Tokens a second if a step were nothing but the matrix products of all weights."""
    weights = [
        module.weight.detach()
        for module in lm.model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    if dtype == torch.int8:
        weights = [torch.randint_like(w, -127, 128).to(torch.int8).t() for w in weights]
        inputs = {w.shape[0]: torch.ones(rows, w.shape[0], dtype=torch.int8) for w in weights}
        multiply: Callable[..., torch.Tensor] = torch._int_mm
    else:
        weights = [w.to(dtype).t() for w in weights]
        inputs = {w.shape[0]: torch.randn(rows, w.shape[0]).to(dtype) for w in weights}
        multiply = torch.mm
    outs = {
        w.shape[1]: torch.empty(
            rows, w.shape[1], dtype=torch.int32 if dtype == torch.int8 else dtype
        )
        for w in weights
    }

    def run() -> float:
        start = time.perf_counter()
        for weight in weights:
            multiply(inputs[weight.shape[0]], weight, out=outs[weight.shape[1]])
        return time.perf_counter() - start

    with torch.inference_mode():
        return rows / min(run() for _ in range(5 * repeats + 1))


def tree_access(lm: TransformersLM, prompt: Prompt, expansions: int, seed: int) -> dict[str, float]:
    """Random expansions of one tree, 16-token chunks, depth up to 12: what the cache spares."""
    lm.clear_cache()
    generator = np.random.default_rng(seed)
    leaves, ledger = [(initial(prompt, lm), 0)], Ledger()
    distinct = len(leaves[0][0].prompt_ids)
    before, start = lm.cache_stats, time.perf_counter()
    for expansion in range(expansions):
        state, depth = leaves[int(generator.integers(len(leaves)))]
        [[chunk]] = lm.sample([state], 1, 16, seeds=[expansion], params=PARAMS, ledgers=[ledger])
        distinct += len(chunk)
        if chunk.finish_reason is None and depth < 11:
            leaves.append((transition(state, chunk, lm.context_length), depth + 1))
    hits = lm.cache_stats.hit_tokens - before.hit_tokens
    misses = lm.cache_stats.missed_tokens - before.missed_tokens
    return {
        "expansions": expansions,
        "seconds": time.perf_counter() - start,
        "prompt_tokens_computed": ledger.usage.prompt_tokens,
        "prompt_tokens_cached": ledger.usage.cached_tokens,
        "distinct_tokens": distinct,
        "computed_per_distinct_token": ledger.usage.prompt_tokens / distinct,
        "hit_rate": hits / max(1, hits + misses),
    }


def memory_over_expansions(
    dtype: torch.dtype, prompts: Sequence[Prompt], expansions: int, kv_bytes: int, seed: int
) -> dict[str, float]:
    """Resident memory while trees of 16-token chunks grow far beyond what the cache may keep."""
    lm = _engine(dtype, kv_bytes=kv_bytes)
    generator, at_once = np.random.default_rng(seed), 8
    leaves = [initial(prompt, lm) for prompt in prompts]
    lm.sample(leaves[:1], 1, 1, seeds=[0])
    gc.collect()
    process = psutil.Process()
    start, at_200 = process.memory_info().rss, 0
    largest_cache = 0
    with _peak_memory() as memory:
        for done in range(0, expansions, at_once):
            chosen = [leaves[int(i)] for i in generator.integers(len(leaves), size=at_once)]
            rows = lm.sample(chosen, 1, 16, seeds=range(done, done + at_once), params=PARAMS)
            for state, (chunk,) in zip(chosen, rows, strict=True):
                if len(state.response_ids) < 11 * 16:
                    leaves.append(transition(state, chunk, lm.context_length))
            largest_cache = max(largest_cache, lm.cached_bytes)
            if done < 200 <= done + at_once:
                at_200 = process.memory_info().rss
    return {
        "expansions": expansions,
        "kv_bytes": kv_bytes,
        "model_bytes": sum(p.nbytes for p in lm.model.parameters()),
        "largest_cache_bytes": largest_cache,
        "evicted_tokens": lm.cache_stats.evicted_tokens,
        "start_bytes": start,
        "peak_bytes": memory["peak"],
        "at_200_bytes": at_200,
        "end_bytes": process.memory_info().rss,
    }


def prefix_costs(lm: TransformersLM, lengths: Sequence[int], samples: int) -> list[dict[str, Any]]:
    """Seconds of `samples` chunks of 16 tokens after prefixes of given lengths, new and cached."""
    generator = np.random.default_rng(0)
    rows = []
    for length in lengths:
        ids = tuple(generator.integers(100, 40_000, length).tolist())
        state = TextState(Prompt.from_text("prefix", chat=False), ids)
        lm.clear_cache()
        run = functools.partial(lm.sample, [state], samples, 16, seeds=[0])
        new, again = _seconds(run), _seconds(run)
        rows.append({"prefix_tokens": length, "seconds": new, "seconds_cached": again})
    return rows


def prompt_costs(lm: TransformersLM, setting: Setting) -> list[dict[str, Any]]:
    """Tokens a second of 4 samples for each of 1 to 64 prompts in one call."""
    rows = []
    for count in (1, 2, 4, 8, 16, 32, 64):
        states = [initial(prompt, lm) for prompt in setting.prompts[:count]]
        lm.clear_cache()
        seconds = _seconds(functools.partial(lm.sample, states, 4, 32, seeds=range(count)))
        rows.append({"prompts": count, "tokens_per_second": count * 4 * 32 / seconds})
    return rows


def main(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    seed: int = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Of each sequence, by batch size.")] = 64,
    article_prompts: Annotated[int, typer.Option(min=1)] = 32,
    article_timed: Annotated[
        int, typer.Option(min=1, help="Prompts that (a) is timed on, one by one, and scaled.")
    ] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; the fastest counts.")] = 2,
) -> None:
    """Measure and print; takes about 25 minutes on two cores that do nothing else."""
    prompts = load_prompts(split="test")
    order = np.random.default_rng(seed).permutation(len(prompts))
    setting = Setting([prompts[i] for i in order[: max(BATCH_SIZES)]], tokens, repeats)
    figures: dict[str, Any] = {
        "command": shlex.join(
            ["python", "-m", "mbrl_text_env.benchmarks.throughput", *sys.argv[1:]]
        ),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "tokens": tokens,
    }
    engines = {name: _engine(dtype) for name, dtype in DTYPES.items()}
    figures |= _by_batch_size(engines, setting)
    best = max(DTYPES, key=lambda name: figures["engine"][name]["64"])
    figures["best_dtype"] = best
    figures["article"] = _article(engines, setting.prompts[:article_prompts], best, article_timed)
    lm = engines[best]
    with _peak_memory() as memory:
        figures["tree"] = tree_access(lm, setting.prompts[0], 512, seed)
        figures["prefix_length"] = prefix_costs(lm, (64, 128, 256, 512, 1024, 2048), 16)
        figures["number_of_prompts"] = prompt_costs(lm, setting)
    # In a process of its own: here, memory that earlier measurements have freed is used again.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        figures["memory"] = pool.submit(
            memory_over_expansions, torch.float32, setting.prompts, 1000, 256 * 2**20, seed
        ).result()
    figures["added_memory_bytes"]["tree_and_prefixes"] = memory["peak"] - memory["start"]
    figures["ratios"] = _ratios(figures, best)
    figures["ratios_float32"] = _ratios(figures, "float32")
    print(json.dumps(figures, indent=2))
    if json_file is not None:
        write_text(json_file, json.dumps(figures, indent=2))


def _by_batch_size(engines: dict[str, TransformersLM], setting: Setting) -> dict[str, Any]:
    """Rates of (b) to (e) and the limit, alternating, so that a slow phase hits all of them."""
    plain = engines["float32"]
    uncached = {"float32": _engine(torch.float32, prefix_cache=False)}
    rates: dict[str, Any] = {"generate": {}, "llama_cpp": {}}
    for kind, names in (("engine", DTYPES), ("engine_without_cache", uncached), ("limit", DTYPES)):
        rates[kind] = {name: {} for name in names}
    peaks: dict[str, Any] = {}
    with llama_server(parallel=_SERVER_PARALLEL, context=_SERVER_PARALLEL * 512) as url:
        for size in BATCH_SIZES:
            states = [initial(prompt, plain) for prompt in setting.prompts[:size]]
            tasks: dict[tuple[str, ...], Callable[[], float]] = {
                ("generate",): functools.partial(generate_rate, plain, states, setting.tokens),
                ("llama_cpp",): functools.partial(server_rate, url, states, setting.tokens),
            }
            for name, dtype in DTYPES.items():
                for kind, lms in (("engine", engines), ("engine_without_cache", uncached)):
                    if name in lms:
                        tasks[kind, name] = functools.partial(
                            engine_rate, lms[name], states, setting.tokens
                        )
                tasks["limit", name] = functools.partial(
                    product_limit, plain, dtype, size, setting.repeats
                )
            for path, run in _fastest(tasks, setting.repeats, peaks, size):
                target = rates
                for part in path[:-1]:
                    target = target[part]
                target[path[-1]][str(size)] = run
            print(size, json.dumps(_row(rates, str(size))), flush=True)
    return {**rates, "added_memory_bytes": peaks}


def _fastest(
    tasks: dict[tuple[str, ...], Callable[[], float]],
    repeats: int,
    peaks: dict[str, Any],
    size: int,
) -> Iterator[tuple[tuple[str, ...], float]]:
    best: dict[tuple[str, ...], float] = {}
    for _ in range(repeats):
        for path, run in tasks.items():
            with _peak_memory() as memory:
                best[path] = max(best.get(path, 0.0), run())
            found = peaks.setdefault("/".join(path), {})
            found[str(size)] = max(found.get(str(size), 0), memory["peak"] - memory["start"])
    return iter(best.items())


def _article(
    engines: dict[str, TransformersLM], prompts: Sequence[Prompt], best: str, timed: int
) -> dict[str, Any]:
    tokens = PARTIALS * PARTIAL_TOKENS + KEPT * CONTINUATIONS * CONTINUATION_TOKENS
    # A prompt at a time: what some of them take, all take in proportion.
    timed = min(timed, len(prompts))
    some = article_procedure(engines["float32"], prompts[:timed])
    seconds = {"article": some * len(prompts) / timed}
    uncached = {f"{best}_without_cache": _engine(DTYPES[best], prefix_cache=False)}
    for name, lm in (engines | uncached).items():
        before = lm.cache_stats
        seconds[name] = article_workload(lm, prompts)
        hits = lm.cache_stats.hit_tokens - before.hit_tokens
        asked = hits + lm.cache_stats.missed_tokens - before.missed_tokens
        seconds[f"{name}_hit_rate"] = hits / max(1, asked)
        print(name, seconds[name], flush=True)
    return {
        "prompts": len(prompts),
        "prompts_timed_for_article": timed,
        "tokens": tokens * len(prompts),
        "seconds": seconds,
    }


def _ratios(figures: dict[str, Any], dtype: str) -> dict[str, float]:
    seconds, engine = figures["article"]["seconds"], figures["engine"][dtype]
    return {
        "article_workload_vs_article": seconds["article"] / seconds[dtype],
        "batch1_vs_generate": engine["1"] / figures["generate"]["1"],
        "batch64_vs_generate": engine["64"] / figures["generate"]["64"],
        "batch64_vs_llama_cpp": engine["64"] / figures["llama_cpp"]["64"],
        "batch64_share_of_limit": engine["64"] / figures["limit"][dtype]["64"],
    }


def _row(rates: dict[str, Any], size: str) -> dict[str, float]:
    flat: dict[str, float] = {}
    for kind, entry in rates.items():
        found = {"": entry} if kind in ("generate", "llama_cpp") else entry
        flat |= {f"{kind} {name}".strip(): round(v[size], 1) for name, v in found.items()}
    return flat


def _engine(dtype: torch.dtype, **options: Any) -> TransformersLM:
    lm = embedded(dtype=dtype, batch_size=max(BATCH_SIZES), **options)
    # So that every sequence has the same number of tokens, as with `min_new_tokens`.
    lm.stop_token_ids = frozenset()
    return lm


@contextlib.contextmanager
def _peak_memory() -> Iterator[dict[str, int]]:
    """This process's resident memory when the block starts and at its peak (20 looks a second)."""
    gc.collect()
    process, done = psutil.Process(), threading.Event()
    found = {"start": process.memory_info().rss, "peak": 0}

    def watch() -> None:
        while True:
            found["peak"] = max(found["peak"], process.memory_info().rss)
            if done.wait(0.05):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)

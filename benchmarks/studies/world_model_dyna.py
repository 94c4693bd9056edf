"""GRPO on a learned head in place of most reward calls, for the study `world_model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.agents.learning import serve
from mbrl_text_env.agents.learning.reports import distinct_share
from mbrl_text_env.agents.model_free.trl import (
    DynaSettings,
    PolicyGradientSettings,
    train_dyna,
    train_grpo,
)
from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.studies import harness
from mbrl_text_env.language_models import TransformersLM
from mbrl_text_env.mdp import initial
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.rewards import make
from mbrl_text_env.rewards.learning.surrogate import Batch, read_batches
from mbrl_text_env.types import Prompt

_REWARD = "sentiment"
_TEST_PROMPTS, _SAMPLES = 64, 4
_FIRST = DynaSettings(
    steps=30,
    prompts_per_step=2,
    num_generations=8,
    max_completion_length=48,
    learning_rate=2e-3,
    batch_size=8,
    save_steps=5,
    calls_per_step=7,
    audited=2,
)
STAGES = (_FIRST, replace(_FIRST, steps=20, calls_per_step=1, audited=1, seed=1))
"""Trainings one after the other, with the labels of the first in both."""
CONTROL = PolicyGradientSettings(
    steps=30,
    prompts_per_step=2,
    num_generations=4,
    max_completion_length=48,
    learning_rate=2e-3,
    batch_size=8,
)
"""GRPO without a head, on as many reward calls."""


def dyna(language_model: TransformersLM, out: Path, seed: int) -> dict[str, Any]:
    """Reward calls against the mean of training responses, and the mean on test prompts.

    Nothing on test prompts decides anything. In the curve `mean` is what the reward says of all
    responses of a step, asked when the training has ended, `said` what was trained on, `gap` and
    `error` the difference of what the head said of those that it was not asked for, and `distinct`
    the share of different pairs of words.
    """
    stages = [replace(stage, seed=stage.seed + len(STAGES) * seed) for stage in STAGES]
    reward, labels = make(_REWARD), out / "dyna-labels"
    train = load_prompts(split="train")
    tests = options.choose_prompts(load_prompts(split="test"), _TEST_PROMPTS, reward, 0)
    given, before = (language_model, reward, train), None
    scores = {}

    def measure(name: str, model: TransformersLM) -> None:
        path = out / f"{name}-scores.json"
        scores[name] = harness.kept(path, lambda: _sampled(model, tests, reward, seed))

    measure("base", language_model)
    for number, settings in enumerate(stages, 1):
        policy = out / f"dyna-{number}"
        if not policy.exists():
            train_dyna(*given, policy, settings, start_from=before, labels=labels, on_step=_tell)
        measure(policy.name, serve(language_model, policy))
        before = policy
    if not (control := out / "grpo").exists():
        train_grpo(*given, control, replace(CONTROL, seed=seed), on_step=_tell)
    measure("grpo", serve(language_model, control))
    curve, calls = [], 0
    by_id = {prompt.id: prompt for prompt in train}
    for step, batch in enumerate(read_batches(labels).values(), 1):
        calls += len(batch.rows)
        curve.append({"step": step, "reward_calls": calls, **_hindsight(batch, by_id, reward)})
    names = [prompt.id for prompt in tests]
    return {
        "reward": _REWARD,
        "settings": [asdict(settings) for settings in stages],
        "reward_calls": calls,
        "test": {
            name: harness.paired(scores["base"], found, names, seed)
            for name, found in scores.items()
            if name != "base"
        },
        "curve": curve,
    }


def _sampled(
    model: TransformersLM, prompts: Sequence[Prompt], reward: Any, seed: int
) -> list[float]:
    """The mean score of plain samples, by prompt."""
    states, limit = [initial(prompt, model) for prompt in prompts], STAGES[0].max_completion_length
    rows = model.sample(states, _SAMPLES, limit, seeds=[seed] * len(states))
    texts = [[model.decode(chunk.token_ids) for chunk in row] for row in rows]
    scored = zip(prompts, texts, strict=True)
    return [float(np.mean(reward.score([prompt] * _SAMPLES, row))) for prompt, row in scored]


def _tell(step: Any) -> None:
    options.console.print(f"step {step.step}: {step.reward:.3f}")


def _hindsight(batch: Batch, prompts: Mapping[str, Any], reward: Any) -> dict[str, float]:
    asked = [prompts[name] for name, _ in batch.responses]
    words = [tuple(text.lower().split()) for _, text in batch.responses]
    real = np.asarray(reward.score(asked, [text for _, text in batch.responses]))
    rest = np.setdiff1d(np.arange(len(real)), batch.rows)
    errors = batch.scores[rest] - real[rest]
    return {
        "mean": float(real.mean()),
        "said": float(batch.scores.mean()),
        "distinct": distinct_share(words, 2),
        "gap": float(errors.mean()) if len(rest) else 0.0,
        "error": float(np.sqrt(np.mean(errors**2))) if len(rest) else 0.0,
    }

"""GRPO on a learned head in place of most reward calls, for the study `world_model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.agents.learning import serve
from mbrl_text_env.agents.model_free.dyna import DynaSettings, labels_of, train_dyna
from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.studies import harness
from mbrl_text_env.language_models import TransformersLM
from mbrl_text_env.rewards import make
from mbrl_text_env.rewards.learning.surrogate import Batch, read_batches

_REWARD = "sentiment"
SETTINGS = DynaSettings(
    steps=30,
    prompts_per_step=2,
    num_generations=8,
    max_completion_length=48,
    learning_rate=2e-3,
    batch_size=8,
    save_steps=5,
    audited=2,
)
QUICK = DynaSettings(
    steps=4,
    prompts_per_step=2,
    num_generations=4,
    max_completion_length=24,
    learning_rate=2e-3,
    batch_size=8,
    max_calls=20,
    first_calls=8,
)


def dyna(language_model: TransformersLM, out: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    """Reward calls against the mean of training responses, and the mean on test prompts.

    Nothing on test prompts decides anything. In the curve `mean` is what the reward says of all
    responses of a step, asked when the training has ended, and `said` what was trained on.
    """
    settings = replace(QUICK if quick else SETTINGS, seed=seed)
    reward, policy = make(_REWARD), out / "dyna"
    train = harness.prompts_for(reward, "train", None)
    tests = harness.prompts_for(reward, "test", 8 if quick else 64)
    if not policy.exists():
        train_dyna(language_model, reward, train, policy, settings, on_step=_tell)
    exam = harness.Exam(reward, tests, 4, settings.max_completion_length)
    models = {"base": language_model, "dyna": serve(language_model, policy)}
    scores = {
        name: harness.kept(out / f"dyna-{name}.json", lambda m=m: exam.sampled(m, seed)[0])
        for name, m in models.items()
    }
    curve, calls = [], 0
    by_id = {prompt.id: prompt for prompt in train}
    batches = [*read_batches(labels_of(policy)).values()]
    for step, batch in enumerate(batches, 1):
        calls += len(batch.rows)
        curve.append({"step": step, "reward_calls": calls, **_hindsight(batch, by_id, reward)})
    names = [prompt.id for prompt in tests]
    return {
        "reward": _REWARD,
        "settings": asdict(settings),
        "reward_calls": calls,
        "test": harness.paired(scores["base"], scores["dyna"], names, seed),
        "curve": curve,
    }


def _tell(step: Any) -> None:
    options.console.print(f"step {step.step}: {step.reward:.3f}")


def _hindsight(batch: Batch, prompts: Mapping[str, Any], reward: Any) -> dict[str, float]:
    asked = [prompts[name] for name, _ in batch.responses]
    real = np.asarray(reward.score(asked, [text for _, text in batch.responses]))
    rest = np.setdiff1d(np.arange(len(real)), batch.rows)
    errors = batch.scores[rest] - real[rest]
    return {
        "mean": float(real.mean()),
        "said": float(batch.scores.mean()),
        "gap": float(errors.mean()) if len(rest) else 0.0,
        "error": float(np.sqrt(np.mean(errors**2))) if len(rest) else 0.0,
    }

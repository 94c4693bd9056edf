"""The command `mbrl-text train`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.friendly import friendly, option
from mbrl_text_env.benchmarks.machines import RayOptions
from mbrl_text_env.benchmarks.terminal import console, progress_bar

if TYPE_CHECKING:
    from mbrl_text_env.benchmarks.training import Training

_GRADIENTS = ("grpo", "rloo", "dyna")
_TRAIN = options.PromptOptions(split="train")


class TrainError(ValueError):
    """A training that cannot be run as requested."""


def settings_of(algorithm: str, changes: dict[str, Any], items: Sequence[str]) -> Any:
    """The settings of an algorithm: its defaults, `changes` except None, and "NAME=VALUE" items.

    Raises:
        TrainError, SettingError: A name is unknown, or a value is of another type.

    Example:
        >>> settings_of("grpo", {"steps": 5, "tokens": None}, ["beta=0.1"]).beta
        0.1
    """
    from mbrl_text_env.agents.learning.presets import LoopSettings
    from mbrl_text_env.agents.model_free.candidate_policy import DQNSettings, PPOSettings
    from mbrl_text_env.agents.model_free.trl import DynaSettings, PolicyGradientSettings

    gradient = ("steps", "max_completion_length")
    kinds: dict[str, tuple[Any, str, str]] = {
        "ppo": (PPOSettings, "total_steps", "max_response_tokens"),
        "dqn": (DQNSettings, "total_steps", "max_response_tokens"),
        "grpo": (PolicyGradientSettings, *gradient),
        "rloo": (PolicyGradientSettings, *gradient),
        "dyna": (DynaSettings, *gradient),
        "expert-iteration": (LoopSettings, "iterations", "max_response_tokens"),
    }
    if algorithm not in kinds:
        raise TrainError(f"ALGORITHM: expected one of {list(kinds)}, got {algorithm!r}.")
    kind, steps, tokens = kinds[algorithm]
    names = {"steps": steps, "tokens": tokens}
    given = {names.get(name, name): v for name, v in changes.items() if v is not None}
    return kind(**{**given, **options.changes(kind, items)})


@friendly
def train_command(
    algorithm: Annotated[
        str, typer.Argument(help="ppo, dqn, grpo, rloo, dyna or expert-iteration.")
    ],
    *,
    out: Path = option(Path("training"), "Output folder; an existing training is resumed."),
    steps: int | None = option(
        None,
        "Environment steps (PPO, DQN), optimizer steps (GRPO, RLOO, dyna) or iterations; "
        "default: 4096, 60 and 3.",
        min=1,
    ),
    max_response_tokens: int | None = option(
        None, "Maximum tokens per response; default: that of the algorithm.", min=1
    ),
    settings: list[str] | None = option(None, options.SET),
    seed: int = option(0, options.SEED),
    wandb: bool = option(False, "Also log to Weights & Biases.", "--wandb"),
    num_prompts: int = option(48, options.NUM_PROMPTS),
    held_out: int = option(
        8, "Number of held-out prompts for evaluation (PPO, DQN and expert iteration only).", min=1
    ),
    judge: options.RewardOptions,
    prompts: options.PromptOptions = _TRAIN,
    model: options.ModelOptions,
    machines: RayOptions,
) -> None:
    """Train a policy from a reward. Can be resumed.

    `tensorboard --logdir OUT/events` shows episode rewards and lengths.
    """
    from mbrl_text_env.benchmarks.training import LOOP, Training

    if machines.ray is not None and algorithm != LOOP:
        raise TrainError(
            f"--ray: expected the algorithm {LOOP!r}, got {algorithm!r}. Leave it out."
        )
    changes = {"steps": steps, "tokens": max_response_tokens, "seed": seed}
    made, judge = settings_of(algorithm, changes, settings or []), judge.of(prompts.prompts)
    reward, count = judge.load(), 0 if algorithm in _GRADIENTS else held_out
    asked, language_model = prompts.choose(num_prompts + count, reward, seed), model.load()
    chosen = options.that_fit(asked, language_model)
    lists = chosen[count:], chosen[:count]
    with machines.each() as each, progress_bar() as bar:
        training = Training(algorithm, made, language_model, reward, *lists, out, each)
        task = bar.add_task(algorithm, total=training.steps)

        def tell(step: int, word: str) -> None:
            bar.update(task, completed=step, description=f"{algorithm} ({word})")

        training.run(tell, wandb=wandb)
    _report(training)


def _report(training: Training) -> None:
    from mbrl_text_env.benchmarks.page import provenance
    from mbrl_text_env.benchmarks.reports import write_report
    from mbrl_text_env.benchmarks.training import ABOUT, use_of
    from mbrl_text_env.files import write_text
    from mbrl_text_env.rewards.base import reward_name

    about = {
        **provenance(),
        "algorithm": training.algorithm,
        "reward": reward_name(training.reward_model),
        "language_model": training.language_model.name,
        "settings": asdict(training.settings),
    }
    write_text(training.folder / ABOUT, json.dumps(about, indent=2))
    console.print(f"Report: {write_report(training.folder).resolve()}")
    if training.policy.exists():
        console.print(f"Use the policy: {use_of(training.algorithm, training.folder)}")
    else:
        console.print("No iteration beats the base model on the held-out prompts: no policy.")

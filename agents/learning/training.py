"""What all trainings share: errors, reports, checkpoints to go on from, Ctrl-C, and full disks."""

from __future__ import annotations

import errno
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.base import RewardModel, applies_to, reward_name
from mbrl_text_env.rewards.learning.lora_classifier import quiet
from mbrl_text_env.runs import claim_checkpoints, digest, prompt_digest
from mbrl_text_env.types import Prompt, Usage

LEDGER, CURVE = "ledger.json", "curve.json"
"""Files beside a policy: what its training took, and how the reward rose."""


class TuningError(ValueError):
    """Data, settings or folders that a policy cannot be tuned with."""


def check_above_zero(settings: object, *names: str) -> None:
    """Refuse (`TuningError`) settings that are not above 0."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise TuningError(f"{name}: expected more than 0, got {getattr(settings, name)!r}.")


def refuse_other_folder(folder: Path, mark: str, noun: str) -> None:
    """Refuse (`TuningError`) a folder that is not empty and lacks the file `mark`."""
    is_other = folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file()
    if is_other or (folder.exists() and not folder.is_dir()):
        raise TuningError(
            f"{folder}: expected a new folder, an empty one, or {noun} to replace, got something "
            "else. Choose another."
        )


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Tells one list of prompts from another."""
    return digest(*(f"{prompt.id} {prompt_digest(prompt)}".encode() for prompt in prompts))


def check_prompts(
    prompts: Sequence[Prompt],
    reward_model: RewardModel,
    language_model: LanguageModel,
    least: int = 1,
) -> None:
    """Refuse (`TuningError`) prompts that cannot be trained on from reward."""
    if len(prompts) < least:
        raise TuningError(
            f"Expected at least {least} prompts (as many as a step has), got {len(prompts)}. Pass "
            "more, or lower the number that a step has."
        )
    ids = {prompt.id for prompt in prompts}
    if len(ids) < len(prompts):
        raise TuningError(
            f"Expected prompts with different ids, got {len(ids)} ids for {len(prompts)} prompts. "
            "Leave out the doubles, or give them ids of their own."
        )
    for prompt in prompts:
        if not applies_to(reward_model, prompt):
            raise TuningError(
                f"Prompt {prompt.id!r}: reward model {reward_name(reward_model)!r} does not apply "
                f"to it; its metadata has {sorted(prompt.metadata)}. Add what the reward needs, or "
                "leave out such prompts."
            )
        language_model.encode_prompt(prompt)


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What a training from reward did and took.

    Args:
        algorithm: `"ppo"`, `"dqn"`, `"grpo"` or `"rloo"`.
        curve: How the reward rose.
        usage: What candidates or responses, and their scores, took.
        training_flops: Floating-point operations of what is trained, padding not counted.
    """

    algorithm: str
    curve: Sequence[Any]
    usage: Usage
    training_flops: float

    def ledger(self) -> dict[str, Any]:
        """What training took, as JSON values."""
        return {
            "algorithm": self.algorithm,
            **self.usage.as_dict(),
            "training_flops": self.training_flops,
            "total_flops": self.usage.flops + self.training_flops,
        }


def checkpoints_of(folder: Path) -> Path:
    """Where the checkpoints of a run lie: beside what it writes in the end."""
    return folder.with_name(f"{folder.name}-checkpoints")


def common_arguments(checkpoints: Path, seed: int, save_steps: int) -> dict[str, Any]:
    """Arguments that all our trainers of transformers have in common."""
    import torch

    return {
        "output_dir": str(checkpoints),
        "save_strategy": "steps",
        "save_steps": save_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "seed": seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
    }


def claim(checkpoints: Path, record: Mapping[str, Any]) -> str | None:
    """`claim_checkpoints`, whose errors and full disks are a `TuningError`."""
    with storage(checkpoints):
        return claim_checkpoints(checkpoints, record, TuningError)


def run(trainer: Any, checkpoints: Path, resumed: str | None) -> None:
    """Train with a trainer of transformers to the end.

    The first Ctrl-C lets the step under way end, and saves a checkpoint; a second one stops at
    once. Either raises a `KeyboardInterrupt` that says how to go on.
    """
    from transformers import TrainerCallback

    with quiet(), storage(checkpoints), stop_asked("this step") as asked:

        class StopAfterStep(TrainerCallback):  # type: ignore[misc, unused-ignore]
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if asked:
                    control.should_save = control.should_training_stop = True

        trainer.add_callback(StopAfterStep())
        # peft looks for the base's own config, to see whether tokens were added.
        warnings.filterwarnings("ignore", "Could not find a config file")
        try:
            trainer.train(resume_from_checkpoint=resumed)
        except KeyboardInterrupt:
            asked.append(True)
    if asked:
        state = trainer.state
        raise stopped(f"after step {state.global_step} of {state.max_steps}", checkpoints)


def stopped(where: str, checkpoints: Path) -> KeyboardInterrupt:
    """What is raised after Ctrl-C."""
    return KeyboardInterrupt(
        f"Stopped {where}. The same call goes on from the last checkpoint in {checkpoints}; remove "
        "that folder to begin anew."
    )


@contextmanager
def stop_asked(after: str) -> Iterator[list[bool]]:
    """Note the first Ctrl-C in the list instead of raising it; a second one stops at once.

    Args:
        after: What is still done, in the words of the message.
    """
    asked: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread hears of signals.
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        asked.append(True)
        print(f"Stopping after {after}; Ctrl-C again stops at once.", file=sys.stderr)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Make a `TuningError` of an `OSError`, or of what torch and safetensors make of one."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # Neither library keeps the type of the error.
        written = isinstance(error, OSError | SafetensorError) or "PytorchStream" in str(error)
        if not written:
            raise
        is_full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
        raise TuningError(
            f"{path}: {'there is no space left' if is_full else 'it cannot be written or read'} "
            f"({type(error).__name__}: {error}). Free some space, or choose a folder that can be "
            "written; after that the same call goes on from the last whole checkpoint."
        ) from error

"""Shared by all trainings: errors, reports, checkpoints to resume from, Ctrl-C and full disks."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.base import RewardModel, applies_to, reward_name
from mbrl_text_env.rewards.learning.lora_classifier import quiet
from mbrl_text_env.runs import claim_checkpoints, writing
from mbrl_text_env.types import Prompt, Usage

LEDGER, CURVE = "ledger.json", "curve.json"
"""Files next to a policy: the cost of its training, and the reward curve."""


class TuningError(ValueError):
    """Data, settings or folders that a policy cannot be tuned with."""


def expect(
    settings: object, name: str, is_right: bool, expected: str, error: type[Exception] = TuningError
) -> None:
    """Raise `error` unless a setting is as expected."""
    if not is_right:
        raise error(f"{name}: expected {expected}, got {getattr(settings, name)!r}.")


def check_above_zero(settings: object, *names: str) -> None:
    """Raise a `TuningError` unless the settings are above 0."""
    for name in names:
        expect(settings, name, getattr(settings, name) > 0, "more than 0")


def check_prompts(
    prompts: Sequence[Prompt],
    reward_model: RewardModel,
    language_model: LanguageModel | None = None,
    *,
    least: int = 1,
    noun: str = "prompts",
    error: type[Exception] = TuningError,
) -> None:
    """Raise `error` for too few prompts, duplicate ids, or prompts the reward does not apply to."""
    if len(prompts) < least:
        raise error(f"{noun}: expected at least {least}, got {len(prompts)}. Pass more.")
    counts = Counter(prompt.id for prompt in prompts)
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise error(f"{noun}: expected distinct ids, got {repeated[:5]} more than once.")
    if unfit := [prompt for prompt in prompts if not applies_to(reward_model, prompt)]:
        raise error(
            f"{noun}: expected prompts that the reward {reward_name(reward_model)!r} applies to, "
            f"got {len(unfit)} others of {len(prompts)}, first {unfit[0].id!r}, whose metadata has "
            f"{sorted(unfit[0].metadata)}. Add the metadata that the reward needs, or remove them."
        )
    if language_model is not None:
        for prompt in prompts:
            language_model.encode_prompt(prompt)


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """Cost of a training, split into candidates, responses and scores, and network updates."""

    algorithm: str
    curve: Sequence[Any]
    usage: Usage
    training_flops: float

    def ledger(self) -> dict[str, Any]:
        """The cost of training, as JSON values."""
        return {
            "algorithm": self.algorithm,
            **self.usage.as_dict(),
            "training_flops": self.training_flops,
            "total_flops": self.usage.flops + self.training_flops,
        }


def checkpoints_of(folder: Path) -> Path:
    """Folder of a run's checkpoints, next to its output folder."""
    return folder.with_name(f"{folder.name}-checkpoints")


def claim(checkpoints: Path, record: Mapping[str, Any]) -> str | None:
    """`claim_checkpoints` that raises a `TuningError` for its errors and full disks."""
    with storage(checkpoints):
        return claim_checkpoints(checkpoints, record, TuningError)


def run(trainer: Any, checkpoints: Path, resumed: str | None) -> None:
    """Run a transformers trainer to the end, or save a checkpoint after Ctrl-C."""
    from transformers import TrainerCallback

    with quiet(), storage(checkpoints), stop_asked("this step") as asked:

        class StopAfterStep(TrainerCallback):  # type: ignore[misc, unused-ignore]
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if asked:
                    control.should_save = control.should_training_stop = True

        trainer.add_callback(StopAfterStep())
        # peft looks for the base model's own config, to detect added tokens.
        warnings.filterwarnings("ignore", "Could not find a config file")
        try:
            trainer.train(resume_from_checkpoint=resumed)
        except KeyboardInterrupt:
            asked.append(True)
    if asked:
        state = trainer.state
        raise stopped(f"after step {state.global_step} of {state.max_steps}", checkpoints)


def stopped(where: str, checkpoints: Path) -> KeyboardInterrupt:
    """The exception to raise after Ctrl-C."""
    return KeyboardInterrupt(
        f"Stopped {where}. The same call resumes from the last checkpoint in {checkpoints}; remove "
        "that folder to start again."
    )


@contextmanager
def stop_asked(after: str) -> Iterator[list[bool]]:
    """Record the first Ctrl-C of the main thread, to finish the step; a second stops at once."""
    asked: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
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
    """`writing` with a `TuningError`, including torch's errors for a full disk."""
    with writing(path, TuningError):
        try:
            yield
        except RuntimeError as error:
            if "PytorchStream" not in str(error):
                raise
            raise OSError(str(error)) from error

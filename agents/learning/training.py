"""Running a trainer of transformers: checkpoints to go on from, Ctrl-C, and full disks."""

from __future__ import annotations

import errno
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbrl_text_env.agents.learning.lora import TuningError
from mbrl_text_env.rewards.learning.lora_classifier import quiet
from mbrl_text_env.training import claim_checkpoints


def checkpoints_of(folder: Path) -> Path:
    """Where the checkpoints of a run lie: beside what it writes in the end."""
    return folder.with_name(f"{folder.name}-checkpoints")


def common_arguments(checkpoints: Path, seed: int, save_steps: int) -> dict[str, Any]:
    """Arguments that all our trainers have in common."""
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
    """Make the folder of checkpoints, or find in it the last whole one of the same run.

    Args:
        checkpoints: The folder.
        record: Whatever the run's result depends on. JSON values.

    Returns:
        The checkpoint to go on from; None where there is none.

    Raises:
        TuningError: The folder is of another run, or of something else, or cannot be written.
    """
    with storage(checkpoints):
        return claim_checkpoints(checkpoints, record, TuningError)


def run(trainer: Any, checkpoints: Path, resumed: str | None) -> None:
    """Train to the end.

    The first Ctrl-C lets the step under way end, and saves a checkpoint; a second one stops at
    once.

    Raises:
        KeyboardInterrupt: It was stopped; the message says how to go on.
        TuningError: A checkpoint could not be written.
    """
    with quiet(), storage(checkpoints), _stopping(trainer) as asked:
        # peft looks for the base's own config, to see whether tokens were added.
        warnings.filterwarnings("ignore", "Could not find a config file")
        try:
            trainer.train(resume_from_checkpoint=resumed)
        except KeyboardInterrupt:
            asked.append(True)
    if asked:
        raise KeyboardInterrupt(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}. The "
            f"same call goes on from the last checkpoint in {checkpoints}; remove that folder to "
            "begin anew."
        )


@contextmanager
def stop_asked(after: str) -> Iterator[list[bool]]:
    """Have the first Ctrl-C be noted in the list and not raised; a second one stops at once.

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
def _stopping(trainer: Any) -> Iterator[list[bool]]:
    """Have Ctrl-C end the training after the step under way; the list says whether it was asked."""
    from transformers import TrainerCallback

    with stop_asked("this step") as asked:

        class StopAfterStep(TrainerCallback):  # type: ignore[misc, unused-ignore]
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if asked:
                    control.should_save = control.should_training_stop = True

        trainer.add_callback(StopAfterStep())
        yield asked


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Say what to do where files cannot be written.

    Raises:
        TuningError: The block raised `OSError`, or what torch and safetensors make of one.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # Neither library keeps the type of the error.
        written = isinstance(error, (OSError, SafetensorError)) or "PytorchStream" in str(error)
        if not written:
            raise
        is_full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
        raise TuningError(
            f"{path}: {'there is no space left' if is_full else 'it cannot be written or read'} "
            f"({type(error).__name__}: {error}). Free some space, or choose a folder that can be "
            "written; after that the same call goes on from the last whole checkpoint."
        ) from error

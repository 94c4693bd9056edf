"""What all trainings share: errors, reports, checkpoints to go on from, Ctrl-C, and full disks."""

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
"""Files beside a policy: what its training took, and how the reward rose."""


class TuningError(ValueError):
    """Data, settings or folders that a policy cannot be tuned with."""


def expect(
    settings: object, name: str, is_right: bool, expected: str, error: type[Exception] = TuningError
) -> None:
    """Refuse (`error`) a setting that is not what is expected."""
    if not is_right:
        raise error(f"{name}: expected {expected}, got {getattr(settings, name)!r}.")


def check_above_zero(settings: object, *names: str) -> None:
    """Refuse (`TuningError`) settings that are not above 0."""
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
    """Refuse (`error`) too few prompts, two of one id, and those that a model cannot take."""
    if len(prompts) < least:
        raise error(f"{noun}: expected at least {least}, got {len(prompts)}. Pass more.")
    counts = Counter(prompt.id for prompt in prompts)
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise error(f"{noun}: expected different ids, got {repeated[:5]} more than once.")
    if unfit := [prompt for prompt in prompts if not applies_to(reward_model, prompt)]:
        raise error(
            f"{noun}: expected prompts that the reward {reward_name(reward_model)!r} applies to, "
            f"got {len(unfit)} others of {len(prompts)}, first {unfit[0].id!r}, whose metadata has "
            f"{sorted(unfit[0].metadata)}. Add what the reward needs, or leave them out."
        )
    if language_model is not None:
        for prompt in prompts:
            language_model.encode_prompt(prompt)


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What a training took: by candidates, responses and scores, and by what is trained."""

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


def claim(checkpoints: Path, record: Mapping[str, Any]) -> str | None:
    """`claim_checkpoints`, whose errors and full disks are a `TuningError`."""
    with storage(checkpoints):
        return claim_checkpoints(checkpoints, record, TuningError)


def run(trainer: Any, checkpoints: Path, resumed: str | None) -> None:
    """Train with a trainer of transformers to the end, or to Ctrl-C and a checkpoint."""
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
    """Note the first Ctrl-C, of the main thread, and say what is still done; a second one stops."""
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
    """`writing` with a `TuningError`, also for what torch makes of a full disk."""
    with writing(path, TuningError):
        try:
            yield
        except RuntimeError as error:
            if "PytorchStream" not in str(error):
                raise
            raise OSError(str(error)) from error

"""The stages of a loop's folder, each a note and a folder; see docs/self-training.md for the tree.

A stage's note is written last, as a whole. A folder without its note is what a kill left behind; it
is removed, and the stage is made again.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbrl_text_env.agents.learning.notes import write_json
from mbrl_text_env.rewards.base import RewardModel, applies_to, reward_name
from mbrl_text_env.runs import read_config
from mbrl_text_env.types import Prompt

STAGES = ("collected", "selected", "policy", "validation", "value")
"""In the order in which they are made; the first three are not there for the base model."""


class LoopError(RuntimeError):
    """A loop that cannot go on, or a folder that is not one of this loop."""


class NoSignalError(LoopError):
    """All answers have the same score: there is nothing to learn."""


@dataclass(frozen=True)
class Stage:
    """One of `STAGES` of an iteration (0 for the base model), in the iteration's folder `root`."""

    iteration: int
    name: str
    root: Path

    @property
    def folder(self) -> Path:
        """Where its data lie."""
        return self.root / self.name

    @property
    def note(self) -> Path:
        """What says that it is whole."""
        return self.root / f"{self.name}.json"

    @property
    def is_done(self) -> bool:
        """Whether it is whole."""
        return self.note.is_file()

    def begin(self) -> None:
        """Remove what a kill left behind, and make the folder of the iteration."""
        self.root.mkdir(parents=True, exist_ok=True)
        # Names that begin with a dot are of files and folders that were being written.
        for left in (self.folder, *self.root.glob(f".{self.name}[-.]*")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)

    def end(self, values: Mapping[str, Any]) -> None:
        """Write the note."""
        write_json(self.note, values)

    def read(self) -> dict[str, Any]:
        """The note; `LoopError` where it is not there, or damaged."""
        if not self.is_done:
            raise LoopError(
                f"{self.root}: iteration {self.iteration} has no {self.name!r}: the loop has not "
                "come to it yet, has none, or stopped before. Ask for another iteration."
            )
        try:
            return read_config(self.note, LoopError)
        except LoopError as error:
            raise LoopError(
                f"{error} Or remove the file, and those of the stages and iterations after it; the "
                "loop then makes them again."
            ) from error


@contextmanager
def told_where(folder: str | Path, where: str) -> Iterator[None]:
    """Say how to go on after Ctrl-C, or (`LoopError`) when nothing can be written."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if str(stopped).startswith("Stopped in"):
            raise
        told = f" ({stopped})" if str(stopped) else ""
        raise KeyboardInterrupt(
            f"Stopped in {where}{told}. All stages before it are kept in {folder}: the same call "
            "goes on with this one."
        ) from stopped
    except OSError as error:
        raise LoopError(
            f"{folder}, {where}: it cannot be written or read ({error}). All stages before it are "
            "kept. Free some space, or fix the folder's permissions; after that the same call "
            "goes on with this stage."
        ) from error


def check_prompts(
    train: Sequence[Prompt], validation: Sequence[Prompt], reward_model: RewardModel
) -> None:
    """Refuse (`LoopError`) prompts that a policy cannot be trained and measured on."""
    for name, prompts in (("train", train), ("validation", validation)):
        if not prompts:
            raise LoopError(f"{name}: expected at least one prompt, got none.")
        unfit = [prompt.id for prompt in prompts if not applies_to(reward_model, prompt)]
        if unfit:
            raise LoopError(
                f"{name}: expected prompts that the reward {reward_name(reward_model)!r} applies "
                f"to, got {len(unfit)} others of {len(prompts)}, first {unfit[0]!r}. Leave them "
                "out, or add what the reward needs to their metadata."
            )
    counts = Counter(prompt.id for prompt in (*train, *validation))
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise LoopError(
            f"Expected train and validation prompts of different ids, got {repeated[:5]} more "
            "than once. A policy is not measured on what it was tuned on: leave them out of one."
        )

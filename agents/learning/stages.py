"""Stages of the loop: their notes and folders, and the improvers.

A stage is a folder and a note, which is written last. A folder without a note was interrupted: it
is removed, and the stage runs again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mbrl_text_env.agents.learning.lora import FineTuneSettings, fine_tune, serve
from mbrl_text_env.agents.learning.reports import to_json, write_json
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.records import Record
from mbrl_text_env.runs import read_config
from mbrl_text_env.types import Usage

STAGES = ("collected", "selected", "policy", "validation", "value")
"""Stage names in order. The base model does not have the first three."""

# The largest seed that transformers accepts.
_SEEDS = 2**31


class LoopError(RuntimeError):
    """The loop cannot continue, or the folder belongs to another loop."""


class NoSignalError(LoopError):
    """All answers have the same score, so there is nothing to learn."""


@dataclass
class Stage:
    """One of `STAGES` of an iteration (0 for the base model), in the iteration's folder `root`.

    The data are in `folder`. The `note` is written last and marks the stage as complete.
    """

    iteration: int
    name: str
    root: Path

    def __post_init__(self) -> None:
        self.folder, self.note = self.root / self.name, self.root / f"{self.name}.json"

    @property
    def is_done(self) -> bool:
        """Whether the stage is complete."""
        return self.note.is_file()

    def begin(self) -> None:
        """Remove the remains of an interrupted stage, and create the iteration's folder."""
        self.root.mkdir(parents=True, exist_ok=True)
        # Names that start with a dot are unfinished files and folders.
        for left in (self.folder, *self.root.glob(f".{self.name}[-.]*")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)

    def end(self, values: Mapping[str, Any]) -> None:
        """Write the note, which completes the stage."""
        write_json(self.note, values)

    def read(self) -> dict[str, Any]:
        """Return the note; a `LoopError` if it is missing or damaged."""
        if not self.is_done:
            raise LoopError(
                f"{self.root}: iteration {self.iteration} has no {self.name!r}: the loop has not "
                "reached it, does not have it, or stopped earlier. Choose another iteration."
            )
        return read_config(self.note, LoopError)


@contextmanager
def told_where(folder: str | Path, where: str) -> Iterator[None]:
    """Explain how to resume after Ctrl-C, or after a failed write (`LoopError`)."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if str(stopped).startswith("Stopped in"):
            raise
        told = f" ({stopped})" if str(stopped) else ""
        raise KeyboardInterrupt(
            f"Stopped in {where}{told}. All earlier stages are kept in {folder}: the same call "
            "resumes with this one."
        ) from stopped
    except OSError as error:
        raise LoopError(
            f"{folder}, {where}: cannot be written or read ({error}). Free some space, or fix "
            "the folder's permissions; the same call then resumes with this stage."
        ) from error


@dataclass(frozen=True)
class Improvement:
    """Result of an improver: the number of examples, the usage, and details as JSON values."""

    num_examples: int
    usage: Usage = field(default_factory=Usage)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class LoraImprover:
    """Supervised fine-tuning with LoRA by `fine_tune`, with the loop's seed.

    To learn in another way, pass an object with the same three methods.
    """

    settings: FineTuneSettings = field(default_factory=FineTuneSettings)

    def described(self) -> Mapping[str, Any]:
        """Kind and settings as JSON values: everything that the results depend on."""
        settings = asdict(self.settings)
        settings.pop("seed")
        return {"kind": "lora", **settings}

    def improve(
        self,
        base: LanguageModel,
        records: Sequence[Record],
        folder: Path,
        *,
        start_from: Path | None = None,
        seed: int = 0,
    ) -> Improvement:
        """Write a policy that makes the recorded answers, at least two, more likely.

        Training starts from the policy in `start_from`, or from the base. The folder is written
        atomically. All randomness is derived from the seed. Raises the errors of `fine_tune`.
        """
        settings = replace(self.settings, seed=seed % _SEEDS)
        report = fine_tune(_trainable(base), records, folder, settings, start_from=start_from)
        usage = Usage(lm_flops=report.flops, seconds=report.seconds)
        return Improvement(report.num_examples, usage, to_json(report))

    def serve(self, base: LanguageModel, folder: Path) -> LanguageModel:
        """Load the policy of a folder, with the base's tokens and a unique name."""
        return serve(_trainable(base), folder)


def _trainable(base: LanguageModel) -> Any:
    if not hasattr(base, "with_adapter"):
        raise TypeError(
            f"Expected a local language model (TransformersLM) to fine-tune, got "
            f"{base.name!r} ({type(base).__name__}). Load the model locally, or pass your own "
            "improver to the loop."
        )
    return base

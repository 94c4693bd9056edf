"""What the loop's stages are made of: their notes and folders, and improvers.

A stage is a folder and a note, which is written last: a folder without its note is what a kill left
behind; it is removed, and the stage is made again.
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
"""In the order in which they are made; the first three are not there for the base model."""

# What transformers accepts as a seed.
_SEEDS = 2**31


class LoopError(RuntimeError):
    """A loop that cannot go on, or a folder that is not one of this loop."""


class NoSignalError(LoopError):
    """All answers have the same score: there is nothing to learn."""


@dataclass
class Stage:
    """One of `STAGES` of an iteration (0 for the base model), in the iteration's folder `root`.

    Its data lie in `folder`; the `note`, which is written last, says that it is whole.
    """

    iteration: int
    name: str
    root: Path

    def __post_init__(self) -> None:
        self.folder, self.note = self.root / self.name, self.root / f"{self.name}.json"

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
        return read_config(self.note, LoopError)


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
            f"{folder}, {where}: it cannot be written or read ({error}). Free some space, or fix "
            "the folder's permissions; then the same call goes on with this stage."
        ) from error


@dataclass(frozen=True)
class Improvement:
    """What an improver learned, what that took, and what else there is to say, as JSON values."""

    num_examples: int
    usage: Usage = field(default_factory=Usage)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class LoraImprover:
    """Supervised fine-tuning with LoRA: `fine_tune`, whose seed is the loop's.

    Another way to learn is an object with the same three methods.
    """

    settings: FineTuneSettings = field(default_factory=FineTuneSettings)

    def described(self) -> Mapping[str, Any]:
        """Kind and settings, as JSON values: all that its results depend on."""
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
        """Write a policy that gives the recorded answers, at least two, more often.

        The folder is written as a whole or not at all. It goes on from the policy in `start_from`,
        or from the base. All randomness follows from the seed. Raises what `fine_tune` raises.
        """
        settings = replace(self.settings, seed=seed % _SEEDS)
        report = fine_tune(_trainable(base), records, folder, settings, start_from=start_from)
        usage = Usage(lm_flops=report.flops, seconds=report.seconds)
        return Improvement(report.num_examples, usage, to_json(report))

    def serve(self, base: LanguageModel, folder: Path) -> LanguageModel:
        """The policy of a folder, with the base's tokens and a name that no other policy has."""
        return serve(_trainable(base), folder)


def _trainable(base: LanguageModel) -> Any:
    if not hasattr(base, "with_adapter"):
        raise TypeError(
            f"Expected a language model that runs here (TransformersLM) to fine-tune, got "
            f"{base.name!r} ({type(base).__name__}). Load it here, or give the loop an improver "
            "of its own."
        )
    return base

"""The folder of a loop: one folder for each iteration, in it a note and a folder for each stage.

```
config.json                 what the loop depends on
00/, 01/, ...               00 is the base model, before anything is learned
    collected.json, collected/      answers to the train prompts: records
    selected.json, selected/        those that are tuned on: records
    policy.json, policy/            the adapter
    validation.json, validation/    plain samples on the validation prompts: records
    value.json, value/              the value model, and the records that it was fitted on
    scores.json, ledger.json        the iteration's figures, and what each stage took
```

A stage's note is written last, as a whole. A folder without its note is what a kill left behind; it
is removed and made anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbrl_text_env.files import write_text
from mbrl_text_env.runs import claimed

STAGES = ("collected", "selected", "policy", "validation", "value")
"""In the order in which they are made; the first three are not there for the base model."""


class LoopError(RuntimeError):
    """A loop that cannot go on, or a folder that is not one of this loop."""


class NoSignalError(LoopError):
    """All answers have the same score: there is nothing to learn."""


@dataclass(frozen=True)
class Stage:
    """One stage of one iteration.

    Args:
        iteration: The iteration's number, 0 for the base model.
        name: One of `STAGES`.
        root: The iteration's folder.
    """

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

    def begin(self) -> Path:
        """Remove what a kill left behind, and make the folder of the iteration."""
        self.root.mkdir(parents=True, exist_ok=True)
        # Names that begin with a dot are of files and folders that were being written.
        for left in (self.folder, *self.root.glob(f".{self.name}[-.]*")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
        return self.folder

    def end(self, values: Mapping[str, Any]) -> None:
        """Write the note."""
        write_json(self.note, values)

    def read(self) -> dict[str, Any]:
        """The note.

        Raises:
            LoopError: It is not there, or damaged.
        """
        if not self.is_done:
            raise LoopError(
                f"{self.root}: iteration {self.iteration} has no {self.name!r}: the loop has not "
                "come to it yet, has none, or stopped before. Ask for another iteration."
            )
        return read_json(self.note)


class LoopFolder:
    """A loop's folder.

    Args:
        path: Made by `claim`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def stage(self, iteration: int, name: str) -> Stage:
        """A stage, whether or not it is there."""
        return Stage(iteration, name, self.iteration(iteration))

    def iteration(self, number: int) -> Path:
        """The folder of an iteration."""
        return self.path / f"{number:02d}"

    @contextmanager
    def claimed(self, record: Mapping[str, Any]) -> Iterator[None]:
        """Be the only process that works in the folder, and make sure that it is of this loop.

        Args:
            record: Whatever the loop's results depend on. JSON values.

        Raises:
            LoopError: The folder is of another loop, or of something else, or in use.
        """
        with claimed(self.path, record, "loop", LoopError):
            yield


@contextmanager
def told_where(folder: str | Path, where: str) -> Iterator[None]:
    """Say how to go on after Ctrl-C, or when nothing can be written.

    Raises:
        KeyboardInterrupt: It was stopped.
        LoopError: The block raised `OSError`.
    """
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


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON as a whole."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of JSON.

    Raises:
        LoopError: There is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"got {type(values).__name__}")
    except (OSError, ValueError) as error:
        raise LoopError(
            f"{path}: expected a whole JSON object, written by the loop ({type(error).__name__}: "
            f"{error}). Remove the file, and those of the stages and iterations after it; the loop "
            "then makes them anew."
        ) from error
    return values

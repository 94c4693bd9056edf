"""What all trainings have in common: checkpoints to go on from, and randomness of their own."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.files import remove_scratch
from mbrl_text_env.runs import claim_file

_RUN = "run.json"


def claim_checkpoints(
    checkpoints: Path, record: Mapping[str, Any], error: type[Exception]
) -> str | None:
    """Make the folder of checkpoints, or find in it the last whole one of the same run.

    Checkpoints that were cut off are removed.

    Args:
        checkpoints: The folder.
        record: Whatever the run's result depends on. JSON values.
        error: What is raised where the folder is of another run, or of something else.

    Returns:
        The checkpoint to go on from; None where there is none.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    remove_scratch(checkpoints)
    note = checkpoints / _RUN
    others = any(path.name != _RUN for path in checkpoints.iterdir())
    if others and not note.is_file():
        raise error(
            f"{checkpoints}: expected checkpoints of the same training to go on from, got a folder "
            "with other files. Remove the folder to begin anew, or choose another folder for the "
            "result."
        )
    claim_file(note, record, "training", error)
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    # Trainers write their state last: a checkpoint without it was cut off.
    whole = [path for path in found if _is_json(path / "trainer_state.json")]
    for path in set(found) - set(whole):
        shutil.rmtree(path)
    return str(whole[-1]) if whole else None


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators, as trainers do, and put their states back."""
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True

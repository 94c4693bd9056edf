"""The folders that long runs write to and are resumed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mbrl_text_env.files import write_text


def claim(folder: Path, record: dict[str, Any], noun: str, error: type[Exception]) -> None:
    """Write a run's `config.json`, or make sure that the folder holds this very run.

    Args:
        folder: The run's folder; made if it is not there.
        record: Whatever the run's results depend on. JSON values.
        noun: What the messages call the run, such as "comparison".
        error: What is raised.

    Raises:
        error: The folder holds other files, or another run, or cannot be written.
    """
    path = folder / "config.json"
    if not path.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise error(f"{folder} holds other files and no {noun}. Choose a new or empty folder.")
        try:
            write_text(path, json.dumps(record, indent=2))
        except OSError as reason:
            raise error(
                f"Expected a folder that can be written, got {str(folder)!r} ({reason}). Choose "
                "another with --out."
            ) from reason
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(key for key in {*found, *record} if found.get(key) != record.get(key))
    if differing:
        changes = ", ".join(
            f"{key}: {str(found.get(key))[:60]} there, {str(record.get(key))[:60]} here"
            for key in differing
        )
        raise error(
            f"{folder} holds another {noun} ({changes}). Choose another folder, or remove it."
        )

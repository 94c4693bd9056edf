"""Files that are either whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically; folders above it are made."""
    with write_file(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def write_file(path: str | Path) -> Iterator[Path]:
    """Fill a scratch file that takes the place of `path` when the block ends without an error."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(target)
    try:
        yield scratch
        scratch.replace(target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Fill a scratch folder that takes the place of `path` when the block ends without an error."""
    target = Path(path)
    scratch = _scratch(target)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if target.exists():
            # A folder cannot be renamed over another: the old one steps aside first.
            retired = _scratch(target)
            target.replace(retired)
            scratch.replace(target)
            shutil.rmtree(retired)
        else:
            scratch.replace(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _scratch(target: Path) -> Path:
    # Not from `tempfile`: that makes files for their owner's eyes only, and renaming keeps the
    # mode.
    return target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")

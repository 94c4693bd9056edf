"""Files and folders that are whole or not there: written under a temporary name, then renamed.

What is guaranteed when the process is killed at any moment: at the path is the old file or folder
or the new one. For a folder that replaces another this holds at each moment on Linux file systems
that exchange two names at once (`renameat2`). Elsewhere there is a moment with neither; the old
folder then stands beside the path, and `recover_folder`, which everything that reads such folders
calls, puts it back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SCRATCH_NAME = re.compile(r"\..+-[0-9a-f]{12}")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


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
    """Fill a scratch folder that takes the place of `path` when the block ends without an error.

    Scratch folders that killed writers of the same path have left are removed.
    """
    target = Path(path)
    if target.is_symlink():
        target = target.resolve()
    recover_folder(target)
    scratch = _scratch(target)
    scratch.mkdir(parents=True)
    with _held(scratch):
        _remove_abandoned(target)
        try:
            yield scratch
            # The files are on the disk before their folder gets its name.
            for file in filter(Path.is_file, scratch.rglob("*")):
                _to_disk(file)
            _take_place(scratch, target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        # After an exchange the old folder has the scratch folder's name.
        shutil.rmtree(scratch, ignore_errors=True)


def recover_folder(path: str | Path) -> None:
    """Put a folder back that a killed writer had moved aside; see the module."""
    target = Path(path)
    aside = _aside(target)
    if aside.is_dir() and not target.exists():
        aside.replace(target)


def remove_scratch(folder: str | Path) -> None:
    """Remove what killed writers have left in a folder in which no other process writes."""
    for path in list(Path(folder).rglob(".*")):
        if _SCRATCH_NAME.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _take_place(scratch: Path, target: Path) -> None:
    try:
        # Also over a folder that is empty.
        scratch.replace(target)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM):
            raise
    if _exchange(scratch, target):
        return
    aside = _aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    target.replace(aside)
    scratch.replace(target)
    shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where that is not offered."""
    try:
        function: Any = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    done = function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


@contextmanager
def _held(scratch: Path) -> Iterator[None]:
    """Show other writers that the scratch folder is in use, for as long as this process lives."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}-[0-9a-f]{{12}}")
    for path in target.parent.iterdir():
        if not pattern.fullmatch(path.name) or not path.is_dir():
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(descriptor)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _scratch(target: Path) -> Path:
    # Not from `tempfile`: that makes files for their owner's eyes only, and renaming keeps the
    # mode.
    return target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")

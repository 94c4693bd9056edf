"""Atomic writes of files and folders, and plain values for JSON and tables.

Files are written under a temporary name and then renamed, so a killed process leaves the old or the
new one. To replace a folder atomically, Linux exchanges two names (`renameat2`). On other systems
there is a moment with neither folder. All readers call `recover_folder`, which restores the old
folder after a kill in that moment.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import numpy as np

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_SCRATCH_NAME = re.compile(r"\..+-[0-9a-f]{12}")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically; create missing parent folders."""
    with write_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def write_file(path: str | Path) -> Iterator[Path]:
    """Yield a scratch file that replaces `path` if the block ends without an error."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(target)
    try:
        yield scratch
        _to_disk(scratch)
        scratch.replace(target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Yield a scratch folder that replaces `path` if the block ends without an error.

    Scratch folders left by killed writers of the same path are removed.
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
    """Restore a folder that a killed writer moved aside; see the module."""
    target = Path(path)
    aside = _aside(target)
    if aside.is_dir() and not target.exists():
        aside.replace(target)


def remove_scratch(folder: str | Path) -> None:
    """Remove files left by killed writers; no other process may be writing in the folder."""
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
    """Exchange two names atomically; False if the system cannot."""
    try:
        function: Any = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    done = function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


@contextmanager
def _held(scratch: Path) -> Iterator[None]:
    """Mark the scratch folder as in use while this process lives."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}-[0-9a-f]{{12}}")
    for path in target.parent.iterdir():
        if not pattern.fullmatch(path.name) or not path.is_dir():
            continue
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
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
    # Not from `tempfile`, which makes files that only their owner can read.
    return target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")


def without_nan(value: Any) -> Any:
    """Replace NaN by None in nested values, for JSON."""
    if isinstance(value, Mapping):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def restored(hint: Any, value: Any) -> Any:
    """Restore a value of type `hint` from JSON: tuples, dataclasses and NaN (None for a float).

    Example:
        >>> restored(tuple[float, ...], [1.0, None])
        (1.0, nan)
    """
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    made: Any = next(filter(is_dataclass, kinds), None)
    if made is not None and not isinstance(value, kinds):
        if not isinstance(value, Mapping):
            raise TypeError(f"expected what a {made.__name__} is made of, got {value!r:.80}")
        hints = get_type_hints(made)
        return made(**{name: restored(hints[name], each) for name, each in value.items()})
    inner = get_args(kinds[0])
    if isinstance(value, Mapping) and inner:
        return {name: restored(inner[-1], each) for name, each in value.items()}
    if isinstance(value, list) and inner:
        return tuple(restored(inner[0], each) for each in value)
    if isinstance(value, str) and float in kinds:
        return float(value)
    return math.nan if value is None and hint is float else value


def plain_values(value: Any) -> Any:
    """Convert values of tables (Arrow, pandas, NumPy) and tensors to plain Python.

    Dict keys with a missing value (None, NaN or pandas' NA) are dropped, because every row of a
    table has all keys. Other values are returned unchanged.

    Example:
        >>> plain_values({"answer": np.int64(4), "hint": None, "tests": np.array(["a", "b"])})
        {'answer': 4, 'tests': ['a', 'b']}
    """
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    # Arrays, tensors and pandas' columns; Arrow's arrays; Arrow's scalars.
    for listing in ("tolist", "to_pylist", "as_py"):
        if hasattr(value, listing):
            return plain_values(getattr(value, listing)())
    if isinstance(value, Mapping):
        rows = ((key, plain_values(inner)) for key, inner in value.items())
        return {key: inner for key, inner in rows if not _is_missing(inner)}
    if isinstance(value, (list, tuple)):
        return [plain_values(inner) for inner in value]
    return value


def _is_missing(value: Any) -> bool:
    is_nan = isinstance(value, float) and math.isnan(value)
    return is_nan or value is None or type(value).__name__ in ("NAType", "NaTType")


def strict_json_object(
    place: str, text: str, example: str, error: type[Exception]
) -> dict[str, Any]:
    """Parse a strict JSON object; otherwise raise `error` with a message that starts with `place`.

    NaN, infinities, numbers beyond float64, duplicate keys and lone surrogates are rejected.
    """
    try:
        fields = json.loads(
            text,
            parse_constant=refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_repeats,
        )
        # JSON can escape lone surrogates, which tokenizers and files reject.
        json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as reason:
        raise error(
            f"{place}: expected one JSON object, got {shortened(text)} ({reason}). Fix the line."
        ) from reason
    if not isinstance(fields, dict):
        raise error(
            f"{place}: expected an object such as {example}, got {shortened(text)}. Fix the line."
        )
    return fields


def refuse_constant(name: str) -> Any:
    """For `json.loads(parse_constant=...)`: NaN and infinities are not JSON."""
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is larger than any float64")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return fields


def shortened(text: str, width: int = 80) -> str:
    """Cut a text to a width, for messages."""
    return text if len(text) <= width else text[: width - 3] + "..."

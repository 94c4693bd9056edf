"""Folders of results: what their rows depend on, and who works in them.

A run writes down, by digest, whatever its rows depend on. A later run goes on in the same folder if
it depends on the same; otherwise it is refused with what differs. Entries of the keys that may
grow, such as prompts, can be added, never changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mbrl_text_env.files import remove_scratch, write_text
from mbrl_text_env.types import Prompt

CONFIG = "config.json"
_LOCK_SECONDS = 1.0
_SHOWN = 4


@contextmanager
def claimed(
    folder: str | Path,
    record: Mapping[str, Any],
    noun: str,
    error: type[Exception],
    *,
    grows: Sequence[str] = (),
) -> Iterator[None]:
    """Be the only process that works in a run's folder, and make sure that it is of this run.

    Call it when all arguments are known to be good. A kill at any moment leaves a folder that the
    same call goes on with.

    Args:
        folder: Made if it is not there.
        record: Whatever the run's results depend on (see `identity`). JSON values.
        noun: What the messages call the run, such as "comparison".
        error: What is raised.
        grows: Keys of objects in `record` to which this run may add entries; those that are there
            and not in this run's are kept.

    Raises:
        error: The folder holds other files, or another run, is in use, or cannot be written.

    Example:
        >>> with claimed("out", {"seed": 0}, "comparison", ValueError):  # doctest: +SKIP
        ...     pass
    """
    path = Path(folder)
    with writing(path, error):
        others = path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir())
        if others and not (path / CONFIG).exists():
            raise error(f"{path} holds other files and no {noun}. Choose a new or empty folder.")
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", timeout=_LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout as busy:
            raise error(
                f"{path}: another process works on this {noun}. Wait until it ends, or choose "
                "another folder."
            ) from busy
    try:
        with writing(path, error):
            remove_scratch(path)
            claim_file(path / CONFIG, record, noun, error, grows)
        yield
    finally:
        lock.release()


def claim_file(
    path: Path,
    record: Mapping[str, Any],
    noun: str,
    error: type[Exception],
    grows: Sequence[str] = (),
) -> None:
    """Write what a run depends on, or make sure that it is there already; see `claimed`."""
    wanted = _as_json(record)
    if not path.exists():
        write_text(path, json.dumps(wanted, indent=2))
        return
    found = read_config(path, error)
    there, here, merged = dict(found), dict(wanted), dict(wanted)
    for key in grows:
        if isinstance(found.get(key), dict):
            common = found[key].keys() & wanted[key].keys()
            there[key], here[key] = ({k: d[key][k] for k in common} for d in (found, wanted))
            merged[key] = {**found[key], **wanted[key]}
    refuse_others(path.parent, there, here, noun, error)
    if merged != found:
        write_text(path, json.dumps(merged, indent=2))


@contextmanager
def writing(folder: str | Path, error: type[Exception]) -> Iterator[None]:
    """Turn an `OSError` of the block into one line that says that the folder cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as reason:
        why = getattr(reason, "strerror", None) or reason
        raise error(
            f"Expected a folder that can be written, got {str(folder)!r} ({why}). Free some space "
            "or change its permissions; then the same command goes on. Or choose another folder "
            "(--out)."
        ) from reason


def refuse_others(
    where: str | Path,
    found: Mapping[str, Any],
    record: Mapping[str, Any],
    noun: str,
    error: type[Exception],
) -> None:
    """Refuse to go on with results in folder `where` that depend on something else (`found`).

    Raises:
        error: They differ from this run's `record`; the message says in what.
    """
    differing = [*differences(found, _as_json(record))]
    if differing:
        more = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise error(
            f"{where} holds another {noun} ({', '.join(differing[:_SHOWN])}{more}). Give the "
            "options it was made with, choose another folder, or remove it."
        )


def differences(found: Any, record: Any, name: str = "") -> Iterator[str]:
    """What differs between two trees of JSON values, each as "name: old there, new here".

    Example:
        >>> list(differences({"seed": 0, "lm": {"name": "a"}}, {"seed": 0, "lm": {"name": "b"}}))
        ['lm.name: a there, b here']
    """
    if isinstance(found, dict) and isinstance(record, dict):
        for key in sorted({*found, *record}):
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(found.get(key), record.get(key), inner)
    elif found != record:
        yield f"{name}: {_short(found)} there, {_short(record)} here"


def prompt_digest(prompt: Prompt) -> str:
    """Tells a prompt's content, metadata and split from others; its id is not part of it.

    Example:
        >>> prompt_digest(Prompt.from_text("a", "1")) == prompt_digest(Prompt.from_text("a", "2"))
        True
    """
    content: Any = prompt.content
    if not isinstance(content, str):
        content = [[message.role, message.content] for message in content]
    row = [content, dict(prompt.metadata), prompt.split]
    return digest(json.dumps(row, sort_keys=True, default=str).encode())


def prompt_digests(prompts: Sequence[Prompt]) -> dict[str, str]:
    """`prompt_digest` of each prompt by its id."""
    return {prompt.id: prompt_digest(prompt) for prompt in prompts}


def digest(*parts: bytes) -> str:
    """16 hexadecimal digits that tell contents apart."""
    sums = hashlib.blake2b(digest_size=8)
    for part in parts:
        sums.update(hashlib.blake2b(part).digest())
    return sums.hexdigest()


def read_config(path: Path, error: type[Exception]) -> dict[str, Any]:
    """Read an object of JSON; a damaged one is an `error`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"got {type(values).__name__}")
    except ValueError as reason:
        raise error(
            f"{path}: expected a whole JSON object, got a damaged file ({reason}). What the rows "
            "beside it depend on is not known: restore the file from a copy, or remove the folder."
        ) from reason
    return values


def _as_json(record: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(record))
    return values


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

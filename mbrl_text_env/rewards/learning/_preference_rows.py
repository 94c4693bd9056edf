"""Rows of preference data: where they come from, and what is in them."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from mbrl_text_env.tables import shortened as shorten
from mbrl_text_env.tables import strict_json_object
from mbrl_text_env.types import Message, Prompt, Split

Rows = Iterator[tuple[str, dict[str, Any]]]
RESPONSES = ("chosen", "rejected")
_RESERVED = ("id", "prompt", *RESPONSES, "margin", "split", "metadata")
_SPLITS = get_args(Split)
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
# How dialogues are written out as plain text in Anthropic's data and those made after it.
_TURN = "\n\nAssistant:"


class PreferenceError(ValueError):
    """Preference pairs that cannot be read, made or written as asked."""


class PairFields(NamedTuple):
    """What a row says."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None


def file_rows(path: Path) -> Rows:
    """Place and columns of each line of a JSONL file.

    Raises:
        PreferenceError: It cannot be read, or a line is no JSON object.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PreferenceError(
            f"{path}: expected a file that can be read, got {type(error).__name__}: "
            f"{error.strerror}. Check the path."
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PreferenceError(
            f"{path}, line {line}: expected UTF-8, got the byte 0x{data[error.start]:02x}. Save "
            "the file as UTF-8."
        ) from error
    # Not `splitlines`, which also breaks at separators that JSON strings may hold.
    for number, row in enumerate(text.split("\n"), start=1):
        if row.strip():
            place = f"{path}, line {number}"
            example = '{"prompt": "...", "chosen": "...", "rejected": "..."}'
            yield place, strict_json_object(place, row, example, PreferenceError)


def hub_rows(name: str, split: str, config: str | None, place: str) -> Rows:
    """Place and columns of each row of a dataset.

    Raises:
        PreferenceError: `datasets` is not installed, or the dataset cannot be loaded.
    """
    if not Path(name).is_dir() and not _HUB_NAME.fullmatch(name):
        raise PreferenceError(
            f"Expected a .jsonl file, a dataset's folder, or its name on the Hugging Face Hub, got "
            f"{name!r}. Check the path, or give the file the ending .jsonl."
        )
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise PreferenceError(
            f"{place}: expected the package 'datasets' to be installed, got {error}. Install it "
            "with `pip install 'mbrl-text-env[train]'`."
        ) from error
    # Dozens of unrelated exception types come out of `load_dataset`; all mean the same here.
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        reason = error.__cause__ or error
        raise PreferenceError(
            f"{place}, configuration {config!r}: expected a dataset that can be loaded, got "
            f"{type(reason).__name__}: {reason}. Check the names, the network and HF_HUB_OFFLINE, "
            "or pass a .jsonl file."
        ) from error
    for index, row in enumerate(dataset):
        # Columns that a row of a dataset does not use are null.
        yield f"{place}, row {index}", {k: v for k, v in row.items() if v is not None}


def fields_of(row: Mapping[str, Any], default_id: str, first_ids: dict[Any, str]) -> PairFields:
    """The fields of a row.

    Args:
        row: Columns by name.
        default_id: The prompt's id, if the row names none and the prompt was not met before.
        first_ids: Default ids of the prompts that were met; it is added to.

    Raises:
        ValueError: The row is no pair.
    """
    if missing := [column for column in RESPONSES if column not in row]:
        raise PreferenceError(
            f"expected the columns 'chosen' and 'rejected', got {list(row)}. Add "
            f"{' and '.join(map(repr, missing))}, or rename a column."
        )
    content, chosen, rejected = _texts(row)
    prompt_id = _id(row, first_ids.setdefault(content, default_id))
    prompt = Prompt(prompt_id, content, _metadata(row), _split(row))
    return PairFields(prompt, chosen, rejected, _margin(row))


def _texts(row: Mapping[str, Any]) -> tuple[str | tuple[Message, ...], str, str]:
    """Prompt, chosen and rejected response."""
    kinds = [type(row[column]) for column in RESPONSES]
    if kinds not in ([str, str], [list, list]):
        raise PreferenceError(
            "expected chosen and rejected to be both strings or both lists of messages, got "
            f"{shorten(repr(row['chosen']))} and {shorten(repr(row['rejected']))}. Change them."
        )
    if kinds == [list, list]:
        return _from_messages(row)
    if "prompt" in row:
        return _content(row["prompt"]), row["chosen"], row["rejected"]
    cut = _shared_characters(row["chosen"], row["rejected"])
    if not row["chosen"][:cut].strip():
        raise PreferenceError(
            "expected a column 'prompt', or a chosen and a rejected text that begin with the same "
            f"prompt, got {shorten(row['chosen'])!r} and {shorten(row['rejected'])!r}. Add the "
            "prompt."
        )
    return row["chosen"][:cut], row["chosen"][cut:], row["rejected"][cut:]


def _shared_characters(a: str, b: str) -> int:
    """Length of the prompt with which two texts begin."""
    shared = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    turn = a.rfind(_TURN, 0, shared)
    if turn >= 0:
        return turn + len(_TURN)
    while shared > 0 and not a[shared - 1].isspace():
        shared -= 1
    return len(a[:shared].rstrip())


def _from_messages(row: Mapping[str, Any]) -> tuple[str | tuple[Message, ...], str, str]:
    chosen, rejected = (_messages(row[column]) for column in RESPONSES)
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    content = _content(row["prompt"]) if "prompt" in row else None
    if shared:
        repeated = Prompt("shared", chosen[:shared])
        # Some datasets repeat the first message of the conversations as their prompt.
        alike = isinstance(content, str) and content == chosen[shared - 1].content
        if content is not None and not alike and Prompt("own", content).text != repeated.text:
            raise PreferenceError(
                "expected chosen and rejected to be responses, or whole conversations that begin "
                f"with the prompt {shorten(repr(row['prompt']))}, got conversations that begin "
                f"with {shorten(repr(repeated.text))}. Leave the column 'prompt' out."
            )
        content = chosen[:shared]
    if content is None:
        raise PreferenceError(
            "expected a column 'prompt', or a chosen and a rejected conversation that begin with "
            "the same messages, got conversations that differ from the first message on. Add the "
            "prompt."
        )
    for column, rest in zip(RESPONSES, (chosen[shared:], rejected[shared:]), strict=True):
        if [message.role for message in rest] != ["assistant"]:
            raise PreferenceError(
                f"expected one message of the assistant after the prompt, got {len(rest)} in "
                f"{column!r}, their roles {[message.role for message in rest]}. Leave the row out."
            )
    if isinstance(content, str):
        content = (Message("user", content),)
    return content, chosen[-1].content, rejected[-1].content


def _content(value: Any) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _messages(value)
    raise PreferenceError(
        f"expected a string or a list of messages as prompt, got {shorten(repr(value))}. Change it."
    )


def _messages(values: Sequence[Any]) -> tuple[Message, ...]:
    if not values:
        raise PreferenceError("expected at least one message, got an empty list. Add the message.")
    messages = []
    for value in values:
        # Rows of a dataset have all keys in every message, null where a message has none.
        given = {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else {}
        if set(given) != {"role", "content"} or not all(isinstance(v, str) for v in given.values()):
            raise PreferenceError(
                "expected messages with a string `role` and a string `content` alone, got "
                f"{shorten(repr(value))}. Change the message, or leave the row out."
            )
        messages.append(Message(given["role"], given["content"]))
    return tuple(messages)


def _id(row: Mapping[str, Any], default: str) -> str:
    given = row.get("id", default)
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise PreferenceError(
            f"expected a string or an integer as id, got {shorten(repr(given))}. Change it."
        )
    return str(given)


def _split(row: Mapping[str, Any]) -> Split | None:
    given = row.get("split")
    if given is not None and given not in _SPLITS:
        raise PreferenceError(
            f"expected split to be one of {', '.join(_SPLITS)}, got {shorten(repr(given))}. "
            "Change it, or leave it out."
        )
    return cast("Split | None", given)


def _margin(row: Mapping[str, Any]) -> float | None:
    given = row.get("margin")
    if given is not None and (isinstance(given, bool) or not isinstance(given, int | float)):
        raise PreferenceError(
            f"expected a number as margin, got {shorten(repr(given))}. Change it, or leave it out."
        )
    return None if given is None else float(given)


def _metadata(row: Mapping[str, Any]) -> dict[str, Any]:
    given = row.get("metadata", {})
    if isinstance(given, str):
        given = json.loads(given)
    if not isinstance(given, dict):
        raise PreferenceError(
            f"expected an object as metadata, got {shorten(repr(given))}. Change it."
        )
    others = {key: value for key, value in row.items() if key not in _RESERVED}
    return {**others, **given}

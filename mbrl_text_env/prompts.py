"""Prompts from the package, from files, from the Hugging Face Hub and from reasoning-gym."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, get_args

from mbrl_text_env._lazy import optional
from mbrl_text_env.files import plain_values, shortened, strict_json_object
from mbrl_text_env.types import Message, Prompt, Split, nearest

_SPLITS = get_args(Split)
_CONTENT_KEYS = ("text", "prompt", "messages")
CHANGE = "Change it, or leave it out."
"""The last sentence of error messages about a value in a row."""


class PromptError(ValueError):
    """Prompts that cannot be loaded as asked."""


class _Row(NamedTuple):
    """A row of a source: its location, default id and fields."""

    place: str
    default_id: str
    fields: dict[str, Any]

    def error(self, expected: str, got: object, change: str) -> PromptError:
        return PromptError(
            f"{self.place}: expected {expected}, got {shortened(str(got))}. {change}"
        )


def load_prompts(
    source: str | Path = "builtin",
    *,
    split: str | None = None,
    kind: str | None = None,
    limit: int | None = None,
    chat: bool = True,
) -> list[Prompt]:
    """Load the builtin prompts of the package, or the prompts in a file.

    Each row of a `.jsonl` file is an object with the prompt in `text`, `prompt` or `messages`: a
    string, or a list of `{"role": ..., "content": ...}`. A `.csv` file has a header with a column
    `text` or `prompt`. `id` (default: `<file stem>-<line number>`) and `split` are optional. All
    other fields that are not null become the prompt's metadata.

    Args:
        source: `"builtin"`, or the path of a `.jsonl` or `.csv` file in UTF-8.
        split: Keep only `"train"`, `"validation"` or `"test"`.
        kind: Keep only prompts with this `metadata["kind"]`.
        limit: Keep only the first `limit` prompts.
        chat: If True, a string becomes the single user message of a chat. If False, it is plain
            text that the language model continues. Lists of messages are always chats.

    Raises:
        PromptError: The file is missing, empty, not UTF-8 or malformed; a prompt is empty; an id
            is not unique; a split is unknown; or the filters leave no prompt. The message gives
            the file and the line.

    Example:
        >>> [prompt.split for prompt in load_prompts(split="validation", limit=2)]
        ['validation', 'validation']
    """
    check_filters(split, limit)
    name, rows = _rows(source)
    prompts = [_prompt(row, chat) for row in rows]
    if not prompts:
        raise PromptError(f"{name}: expected at least one prompt, got an empty file. Add rows.")
    first_place: dict[str, str] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        first = first_place.setdefault(prompt.id, row.place)
        if first != row.place:
            raise PromptError(
                f"{row.place}: expected unique ids, got {prompt.id!r} again (first: {first}). "
                "Change one of the two."
            )
    return only(name, prompts, split, kind)[:limit]


def only(name: str, prompts: list[Prompt], split: str | None, kind: str | None) -> list[Prompt]:
    """The prompts of a split and a kind; if none is left, a PromptError that names `name`."""
    kept = [
        prompt
        for prompt in prompts
        if split in (None, prompt.split) and kind in (None, prompt.metadata.get("kind"))
    ]
    if not kept:
        splits = sorted({str(prompt.split) for prompt in prompts})
        kinds = sorted({str(prompt.metadata.get("kind")) for prompt in prompts})
        raise PromptError(
            f"{name}: expected prompts with split={split!r} and kind={kind!r}, got none of "
            f"{len(prompts)}. Their splits are {splits}, their kinds {kinds}. None (`--split all`, "
            "no `--kind`) keeps all."
        )
    return kept


def hub_prompts(
    dataset_name: str,
    *,
    split: str = "train",
    column: str = "prompt",
    config: str | None = None,
    limit: int | None = None,
    chat: bool = True,
) -> list[Prompt]:
    """Load prompts with `datasets.load_dataset`, in TRL's prompt format.

    The ids are `<last part of the name>-<split>-<row>`. The other columns become the metadata.
    Values that are None or not JSON (images, dates) are dropped.

    Args:
        dataset_name: Name on the Hub, or a local folder.
        split: A split of `datasets`, such as `"train"` or `"train[:100]"`.
        column: Column with a string or a list of `{"role": ..., "content": ...}`.
        config: Name of the dataset's configuration.
        limit, chat: See `load_prompts`.

    Raises:
        PromptError: The extra `data` is not installed, the dataset cannot be loaded, the column is
            missing, or a row is not a valid prompt.

    Example:
        >>> prompts = hub_prompts("trl-lib/tldr", split="test", limit=64)  # doctest: +SKIP
    """
    check_filters(None, limit)
    name, dataset = load_dataset(dataset_name, split, config)
    if column not in dataset.column_names:
        columns = dataset.column_names
        raise PromptError(
            f"{name}: expected a column {column!r}, got {columns}.{nearest(column, columns)} "
            "Name the column of the prompts with `column=...`."
        )
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if not len(dataset):
        raise PromptError(f"{name}: expected at least one row, got none. Choose another split.")
    base = split.partition("[")[0]
    prompts = []
    for index, values in enumerate(dataset):
        prompt_id = f"{Path(dataset_name).name}-{split}-{index}"
        row = _Row(f"{name}, row {index}", prompt_id, plain_values(values))
        content = row.fields.pop(column, None)
        known = base if base in _SPLITS else None
        prompts.append(_made(row, prompt_id, content, _json_only(row.fields), known, chat))
    return prompts


def load_dataset(name: str, split: str, config: str | None) -> tuple[str, Any]:
    """Load a dataset; return its name in messages and the dataset, or raise a PromptError."""
    datasets = optional("datasets", PromptError)
    place = f"Dataset {name!r}, split {split!r}"
    try:
        return place, datasets.load_dataset(name, config, split=split)
    except Exception as error:  # `datasets` raises dozens of unrelated types
        reason = error.__cause__ or error
        raise PromptError(
            f"{place}, configuration {config!r}: expected a dataset that can be loaded, got "
            f"{type(reason).__name__}: {reason}. Check the names and the network."
        ) from error


def as_prompts(prompts: str | Prompt | Iterable[str | Prompt]) -> list[Prompt]:
    """Convert a prompt or a text, or an iterable of them, to a list of prompts.

    A text becomes the single user message of a chat, and also the prompt's id.

    Raises:
        PromptError: An item is neither a prompt nor a text, or the only text is a file name.
    """
    if isinstance(prompts, str) and (prompts == "builtin" or prompts.endswith((".jsonl", ".csv"))):
        raise PromptError(
            f"prompts: expected prompts or their texts, got {prompts!r}, which looks like a file. "
            f"Pass load_prompts({prompts!r})."
        )
    several = isinstance(prompts, Iterable) and not isinstance(prompts, (str, bytes, Mapping))
    given: Any = prompts if several else [prompts]
    found = [Prompt.from_text(str(p)) if isinstance(p, str) else p for p in given]
    for prompt in found:
        if not isinstance(prompt, Prompt):
            raise PromptError(
                f"prompts: expected a sequence of Prompt, or of texts, got {prompt!r:.80}. Make "
                "them with `Prompt.from_text(text)` or `load_prompts(file)`."
            )
    return found


def reasoning_gym_prompts(
    task: str, *, size: int, seed: int, chat: bool = True, **config: Any
) -> list[Prompt]:
    """Generate questions with the package reasoning-gym.

    The ids are `<task>-<seed>-<index>`. The metadata has the `kind` (the task), the
    `reference_answer`, the task's own metadata (`reasoning_gym`), and the arguments to generate
    the question again (`reasoning_gym_source`, for `ReasoningGymReward`). Values that are not JSON
    are dropped.

    Args:
        task: Name of a reasoning-gym dataset, such as `"chain_sum"`.
        seed: Determines the prompts. A few tasks iterate over sets and depend on the environment
            variable PYTHONHASHSEED too (`rewards.puzzles.UNREPEATABLE_TASKS`).
        chat: See `load_prompts`.
        **config: Settings of the task.

    Raises:
        PromptError: The extra `data` is not installed, the task is unknown, or it rejects the
            settings.

    Example:
        >>> prompts = reasoning_gym_prompts("chain_sum", size=8, seed=0)  # doctest: +SKIP
    """
    if size < 1:
        raise PromptError(f"size: expected 1 or more, got {size!r}.")
    reasoning_gym = optional("reasoning_gym", PromptError)
    tasks = importlib.import_module("reasoning_gym.factory").DATASETS
    if task not in tasks:
        raise PromptError(
            f"Expected a task of reasoning-gym, got {task!r}.{nearest(task, tasks)} See "
            "`reasoning_gym.factory.DATASETS` for all."
        )
    # Tasks check their settings with assertions.
    try:
        dataset = reasoning_gym.create_dataset(task, size=size, seed=seed, **config)
    except (AssertionError, TypeError, ValueError) as error:
        raise PromptError(
            f"Task {task!r}: expected settings that it takes, got {config} with size={size}, "
            f"seed={seed} ({type(error).__name__}: {error}). Change them."
        ) from error
    prompts = []
    for index, entry in enumerate(dataset[i] for i in range(size)):
        made_from = {"task": task, "seed": seed, "size": size, "config": config, "index": index}
        metadata = {
            "kind": task,
            "reference_answer": entry["answer"],
            "reasoning_gym": _json_only(entry["metadata"]),
            **_json_only({"reasoning_gym_source": made_from}),
        }
        name, question = f"{task}-{seed}-{index}", entry["question"]
        prompts.append(Prompt.from_text(question, name, chat=chat, metadata=metadata))
    return prompts


def _rows(source: str | Path) -> tuple[str, list[_Row]]:
    """The name and the rows of a source."""
    if source == "builtin":
        return "The builtin prompts", list(_jsonl_rows("prompts.jsonl", _builtin()))
    path = Path(source)
    name, ending = str(path), path.suffix.lower()
    if ending not in (".jsonl", ".csv"):
        raise PromptError(
            f"Expected 'builtin' or the path of a .jsonl or .csv file, got {str(source)!r}. Change "
            "the file's ending, or load a dataset of the Hugging Face Hub with `hub_prompts`."
        )
    try:
        # Spreadsheet programs write a byte order mark before UTF-8.
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PromptError(
            f"{name}: expected a file that can be read, got {type(error).__name__}: "
            f"{error.strerror}. Check the path."
        ) from error
    except UnicodeDecodeError as error:
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise PromptError(
            f"{name}, line {line}: expected UTF-8, got the byte 0x{byte:02x}. Save the file as "
            "UTF-8."
        ) from error
    return name, list((_jsonl_rows if ending == ".jsonl" else _csv_rows)(name, text))


@lru_cache(maxsize=1)
def _builtin() -> str:
    # Cache the text, not the prompts: a caller could change their metadata.
    return (resources.files("mbrl_text_env") / "data" / "prompts.jsonl").read_text("utf-8")


def _row(name: str, line: int) -> _Row:
    return _Row(f"{name}, line {line}", f"{Path(name).stem}-{line}", {})


def _jsonl_rows(name: str, text: str) -> Iterator[_Row]:
    # Not `splitlines`: it also splits at separators that are valid inside JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            row = _row(name, number)
            fields = strict_json_object(row.place, line, '{"text": "..."}', PromptError)
            yield row._replace(fields=fields)


def _csv_rows(name: str, text: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    # A quoted field can span several lines; a row is named by its first line.
    first = 1
    try:
        for values in reader:
            row = _row(name, first)
            first = reader.line_num + 1
            if values and not header:
                header = values
                if len({"text", "prompt"} & set(header)) != 1 or len(set(header)) != len(header):
                    expected = "a header of different columns, one of them `text` or `prompt`"
                    raise row.error(expected, header, "Add or rename a column.")
            elif values and len(values) != len(header):
                expected = f"{len(header)} values, one a column"
                raise row.error(expected, len(values), "Quote values that hold commas.")
            elif values:
                cells = zip(header, values, strict=True)
                # An empty cell means that there is no id or split.
                row.fields.update((k, v) for k, v in cells if v or k not in ("id", "split"))
                yield row
    except csv.Error as error:
        raise PromptError(
            f"{name}, line {first}: expected comma-separated values, got a row that cannot be "
            f"parsed ({error}). Fix its quotes."
        ) from error


def _prompt(row: _Row, chat: bool) -> Prompt:
    # Files written from tables have the same keys in every row, with null for missing values.
    fields = {key: value for key, value in row.fields.items() if value is not None}
    keys = [key for key in _CONTENT_KEYS if key in fields]
    if len(keys) != 1:
        change = "Keep one, or rename the field that holds the prompt."
        expected = f"one of the fields {', '.join(_CONTENT_KEYS)}"
        raise row.error(expected, keys or list(row.fields), change)
    content = fields.pop(keys[0])
    prompt_id, split = id_and_split(row, fields, row.default_id)
    return _made(row, prompt_id, content, fields, split, chat)


def id_and_split(row: _Row, fields: dict[str, Any], default_id: str) -> tuple[str, Any]:
    """Remove and return the id and the split of a row; PromptError if one is invalid."""
    prompt_id, split = fields.pop("id", default_id), fields.pop("split", None)
    if isinstance(prompt_id, bool) or not isinstance(prompt_id, str | int) or prompt_id == "":
        raise row.error("a string or an integer as id", repr(prompt_id), CHANGE)
    if split is not None and split not in _SPLITS:
        raise row.error(f"split to be one of {', '.join(_SPLITS)}", repr(split), CHANGE)
    return str(prompt_id), split


def _made(
    row: _Row, prompt_id: str, content: Any, metadata: dict[str, Any], split: Any, chat: bool
) -> Prompt:
    if isinstance(content, str):
        texts = [content]
        content = (Message("user", content),) if chat else content
    elif isinstance(content, list):
        content = tuple(_message(row, message) for message in content)
        texts = [message.content for message in content]
    else:
        raise row.error("a string or a list of messages as prompt", repr(content), "Change it.")
    if not any(text.strip() for text in texts):
        raise row.error("a prompt with text", "an empty one", "Remove the row, or fill it.")
    try:
        return Prompt(prompt_id, content, metadata, split)
    except ValueError as error:
        raise PromptError(f"{row.place}: {error}") from error


def _message(row: _Row, message: Any) -> Message:
    # Datasets have all keys in every message, with null for unused ones.
    given = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
    if set(given) != {"role", "content"} or not all(isinstance(v, str) for v in given.values()):
        expected = "messages with only a string `role` and a string `content`"
        raise row.error(expected, repr(message), "Change it, or leave the row out.")
    return Message(**given)


def check_filters(split: str | None, limit: int | None = None) -> None:
    """Raise a PromptError for an unknown split or a limit below 1."""
    if split is not None and split not in _SPLITS:
        raise PromptError(f"split: expected one of {', '.join(_SPLITS)}, or None, got {split!r}.")
    if limit is not None and limit < 1:
        raise PromptError(f"limit: expected 1 or more, or None for all, got {limit!r}.")


def _json_only(values: dict[str, Any]) -> dict[str, Any]:
    """The values that can be stored as JSON, after a round trip."""
    kept = {}
    for key, value in values.items():
        try:
            kept[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue
    return kept

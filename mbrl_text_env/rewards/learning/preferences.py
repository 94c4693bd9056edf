"""Preference pairs: what pairwise reward models are fitted on.

They are read from files and datasets in TRL's preference format, or made from records whose scores
are trusted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from mbrl_text_env._lazy import optional
from mbrl_text_env.files import shortened, strict_json_object, write_text
from mbrl_text_env.language_models.base import spawn_seed
from mbrl_text_env.types import Message, Prompt, Split

if TYPE_CHECKING:
    from mbrl_text_env.records import Record


Rows = Iterator[tuple[str, dict[str, Any]]]
RESPONSES = ("chosen", "rejected")
_RESERVED = ("id", "prompt", *RESPONSES, "margin", "split", "metadata")
_SPLITS = get_args(Split)
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
# How dialogues are written out as plain text in Anthropic's data and those made after it.
_TURN = "\n\nAssistant:"


class PreferenceError(ValueError):
    """Preference pairs that cannot be read, made or written as asked."""


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to a prompt, of which one was preferred.

    Args:
        prompt: What both answer.
        chosen, rejected: Either may be empty: a language model can end at once. They differ by more
            than white space around them.
        margin: By how much, in the units of the judge; None where it is not known.

    Example:
        >>> PreferencePair(Prompt.from_text("2 + 2?"), "4", "5").flipped().chosen
        '5'
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.chosen.strip() == self.rejected.strip():
            raise PreferenceError(
                f"Prompt {self.prompt.id!r}: expected two different responses, got "
                f"{shortened(repr(self.chosen))} as chosen and as rejected. Leave the pair out."
            )
        if self.margin is not None and not 0 <= self.margin < math.inf:
            raise PreferenceError(
                f"Prompt {self.prompt.id!r}: expected a finite margin of at least 0, or none, got "
                f"{self.margin!r}. Swap the responses, or leave the margin out."
            )

    def flipped(self) -> PreferencePair:
        """The opposite preference."""
        return PreferencePair(self.prompt, self.rejected, self.chosen, self.margin)


def load_preferences(
    source: str | Path, *, split: str = "train", config: str | None = None, limit: int | None = None
) -> list[PreferencePair]:
    """Read preference pairs in TRL's format.

    A row has `chosen` and `rejected` and, with an explicit prompt, `prompt`; each is a string or a
    list of `{"role": ..., "content": ...}`. Without a prompt (TRL's implicit prompt), or where both
    begin with the same messages, `chosen` and `rejected` are whole conversations, and what they
    share at the start is the prompt: messages, or characters of a string up to the last
    "\\n\\nAssistant:" where there is one. Of a conversation exactly one message of the assistant
    has to follow the prompt. Optional are `margin` (TRL's), `id`, `split`, and `metadata` (an
    object, or one as a JSON string); other columns become metadata too. Prompts of equal content
    get the same default id, `<name>-<row of the first>`.

    Source of the format: TRL's documentation, "Dataset formats and types", "Preference".
    Deviation: a string that is shared without "\\n\\nAssistant:" ends before the word in which the
    responses begin to differ, where TRL may split a word.

    Args:
        source: A `.jsonl` file in UTF-8, one object a line; or the name of a dataset on the Hugging
            Face Hub, or a folder that `datasets.load_dataset` reads.
        split: Of a dataset, as `datasets` takes it (`"train[:100]"`); a file has all in one.
        config: Name of the dataset's configuration.
        limit: Read only so many rows, the first.

    Returns:
        At least one pair, in the order of the source.

    Raises:
        PreferenceError: The source cannot be read, it has no rows, or a row is no pair; the message
            names the file and line, or the dataset's row.

    Example:
        >>> pairs = load_preferences("trl-lib/ultrafeedback_binarized")  # doctest: +SKIP
    """
    if limit is not None and limit < 1:
        raise PreferenceError(f"limit: expected 1 or more, or None for all, got {limit!r}.")
    is_file = str(source).endswith(".jsonl")
    name = str(source) if is_file else f"Dataset {str(source)!r}, split {split!r}"
    rows = _file_rows(Path(source)) if is_file else _hub_rows(str(source), split, config, name)
    first_ids: dict[Any, str] = {}
    pairs = []
    for number, (place, row) in enumerate(islice(rows, limit), start=1):
        try:
            pairs.append(_pair_of(row, f"{Path(source).stem}-{number}", first_ids))
        except ValueError as error:
            raise PreferenceError(f"{place}: {error}") from error
    if not pairs:
        raise PreferenceError(
            f"{name}: expected at least one preference pair, got none. Add rows with `prompt`, "
            "`chosen` and `rejected`."
        )
    return pairs


def pairs_from_records(
    records: Sequence[Record],
    *,
    pairs_per_prompt: int | None = None,
    min_gap: float = 0.0,
    seed: int = 0,
) -> list[PreferencePair]:
    """Make pairs from responses whose score is trusted: within a prompt, the higher is chosen.

    Ties are left out, and so are responses that a prompt has twice. The scores' difference is the
    pair's margin. The choice for a prompt follows from the seed and its text, whatever other
    prompts there are.

    Args:
        records: Scored by one reward model.
        pairs_per_prompt: Pairs that are drawn for a prompt, without replacement; None keeps all.
        min_gap: Only pairs whose scores differ by more than this; it is an error if none do.
        seed: The choice follows from it.

    Example:
        >>> pairs = pairs_from_records(read_records("records"), seed=0)  # doctest: +SKIP
    """
    from mbrl_text_env.records import scores_of

    if not min_gap >= 0 or (pairs_per_prompt is not None and pairs_per_prompt < 1):
        raise PreferenceError(
            "Expected min_gap of at least 0 and pairs_per_prompt of at least 1, or None, got "
            f"{min_gap!r} and {pairs_per_prompt!r}."
        )
    names = sorted({record.reward_name for record in records})
    if len(names) > 1:
        raise PreferenceError(
            f"Expected scores of one reward model, got those of {names}. Score the responses with "
            "one of them (`records.rescore`)."
        )
    groups: dict[str, dict[str, tuple[Record, float]]] = {}
    for record, score in zip(records, scores_of(records), strict=True):
        group = groups.setdefault(record.prompt_text, {})
        group.setdefault(record.response.strip(), (record, score))
    pairs = []
    for text, responses in groups.items():
        both = combinations(responses.values(), 2)
        ordered = ((a, b) if a[1] > b[1] else (b, a) for a, b in both)
        found = [(a, b) for a, b in ordered if a[1] - b[1] > min_gap]
        if pairs_per_prompt is not None and len(found) > pairs_per_prompt:
            rng = np.random.default_rng(spawn_seed(seed, *text.encode()))
            kept = sorted(rng.choice(len(found), pairs_per_prompt, replace=False))
            found = [found[i] for i in kept]
        # The prompt of the first: equal prompts may have different ids.
        prompt = next(iter(responses.values()))[0].prompt()
        pairs += [
            PreferencePair(prompt, better.response, worse.response, high - low)
            for (better, high), (worse, low) in found
        ]
    if not pairs:
        raise PreferenceError(
            "Expected responses to a prompt whose scores differ by more than "
            f"{min_gap}, got none in {len(records)} records of {len(groups)} prompts. Collect more "
            "responses to each prompt, lower min_gap, or take another reward as gold."
        )
    return pairs


def write_preferences(path: str | Path, pairs: Sequence[PreferencePair]) -> None:
    """Write pairs as JSONL that `load_preferences`, `datasets` and TRL read; whole or not at all.

    Chats and the responses to them are written as messages, as TRL wants it, plain text and the
    responses to it as strings. Metadata is a JSON string, since a dataset's columns have one type.
    """
    if not pairs or Path(path).suffix != ".jsonl":
        raise PreferenceError(
            f"Expected at least one pair and a path that ends in .jsonl, got {len(pairs)} pairs "
            f"and {str(path)!r}."
        )
    try:
        lines = [json.dumps(_fields(pair), ensure_ascii=False, allow_nan=False) for pair in pairs]
        write_text(path, "\n".join(lines) + "\n")
    except (OSError, TypeError, ValueError) as error:
        raise PreferenceError(
            f"{path}: expected pairs of valid Unicode with JSON metadata and a place that can be "
            f"written, got {type(error).__name__}: {error}. Change the path or the pairs."
        ) from error


def _fields(pair: PreferencePair) -> dict[str, Any]:
    prompt = pair.prompt
    fields: dict[str, Any] = {"id": prompt.id, "prompt": prompt.content}
    fields |= {column: getattr(pair, column) for column in RESPONSES}
    if not isinstance(prompt.content, str):
        fields["prompt"] = [asdict(message) for message in prompt.content]
        for column in RESPONSES:
            fields[column] = [{"role": "assistant", "content": fields[column]}]
    fields |= {"margin": pair.margin, "split": prompt.split}
    if prompt.metadata:
        fields["metadata"] = json.dumps(dict(prompt.metadata), ensure_ascii=False, allow_nan=False)
    return {name: value for name, value in fields.items() if value is not None}


def _file_rows(path: Path) -> Rows:
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise PreferenceError(
            f"{path}: expected a file that can be read, got {type(error).__name__}: "
            f"{error.strerror}. Check the path."
        ) from error
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


def _hub_rows(name: str, split: str, config: str | None, place: str) -> Rows:
    if not Path(name).is_dir() and not _HUB_NAME.fullmatch(name):
        raise PreferenceError(
            f"Expected a .jsonl file, a dataset's folder, or its name on the Hugging Face Hub, got "
            f"{name!r}. Check the path, or give the file the ending .jsonl."
        )
    datasets = optional("datasets", PreferenceError)
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


def _fault(expected: str, got: Any, change: str) -> PreferenceError:
    return PreferenceError(f"expected {expected}, got {shortened(repr(got))}. {change}")


def _pair_of(row: Mapping[str, Any], default_id: str, first_ids: dict[Any, str]) -> PreferencePair:
    """The pair of a row; `first_ids`, default ids of the prompts that were met, is added to."""
    for column in RESPONSES:
        if column not in row:
            expected = "the columns 'chosen' and 'rejected'"
            raise _fault(expected, list(row), f"Add {column!r}, or rename a column.")
    content, chosen, rejected = _texts(row)
    found: dict[str, Any] = {}
    for name, default, kinds, expected in (
        ("id", first_ids.setdefault(content, default_id), (str, int), "a string or an integer as"),
        ("margin", None, (int, float, type(None)), "a number as"),
        ("metadata", {}, (dict,), "an object as"),
    ):
        value = row.get(name, default)
        if name == "metadata" and isinstance(value, str):
            value = json.loads(value)
        if isinstance(value, bool) or not isinstance(value, kinds) or value == "":
            raise _fault(f"{expected} {name}", value, "Change it, or leave it out.")
        found[name] = value
    split = row.get("split")
    if split is not None and split not in _SPLITS:
        expected = f"split to be one of {', '.join(_SPLITS)}"
        raise _fault(expected, split, "Change it, or leave it out.")
    others = {key: value for key, value in row.items() if key not in _RESERVED}
    prompt = Prompt(str(found["id"]), content, {**others, **found["metadata"]}, split)
    margin = found["margin"]
    return PreferencePair(prompt, chosen, rejected, None if margin is None else float(margin))


def _texts(row: Mapping[str, Any]) -> tuple[str | tuple[Message, ...], str, str]:
    kinds = [type(row[column]) for column in RESPONSES]
    if kinds not in ([str, str], [list, list]):
        expected = "chosen and rejected to be both strings or both lists of messages"
        raise _fault(expected, [row[column] for column in RESPONSES], "Change them.")
    if kinds == [list, list]:
        return _from_messages(row)
    if "prompt" in row:
        return _content(row["prompt"]), row["chosen"], row["rejected"]
    cut = _shared_characters(row["chosen"], row["rejected"])
    if not row["chosen"][:cut].strip():
        expected = "a column 'prompt', or texts that begin with the same prompt"
        raise _fault(expected, [row[column] for column in RESPONSES], "Add the prompt.")
    return row["chosen"][:cut], row["chosen"][cut:], row["rejected"][cut:]


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items at the start are the same."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _shared_characters(a: str, b: str) -> int:
    """Length of the prompt with which two texts begin."""
    shared = _shared(a, b)
    turn = a.rfind(_TURN, 0, shared)
    if turn >= 0:
        return turn + len(_TURN)
    while shared > 0 and not a[shared - 1].isspace():
        shared -= 1
    return len(a[:shared].rstrip())


def _from_messages(row: Mapping[str, Any]) -> tuple[str | tuple[Message, ...], str, str]:
    chosen, rejected = (_messages(row[column]) for column in RESPONSES)
    shared = _shared(chosen[:-1], rejected[:-1])
    content = _content(row["prompt"]) if "prompt" in row else None
    if shared:
        repeated = Prompt("shared", chosen[:shared])
        # Some datasets repeat the first message of the conversations as their prompt.
        alike = isinstance(content, str) and content == chosen[shared - 1].content
        if content is not None and not alike and Prompt("own", content).text != repeated.text:
            shown = shortened(repr(row["prompt"]))
            expected = f"responses, or conversations that begin with the prompt {shown}"
            raise _fault(expected, repeated.text, "Leave the column 'prompt' out.")
        content = chosen[:shared]
    if content is None:
        expected = "a column 'prompt', or conversations that begin with the same messages"
        raise _fault(expected, [chosen[0].content, rejected[0].content], "Add the prompt.")
    for column, rest in zip(RESPONSES, (chosen[shared:], rejected[shared:]), strict=True):
        if (roles := [message.role for message in rest]) != ["assistant"]:
            expected = f"one message of the assistant after the prompt in {column!r}"
            raise _fault(expected, roles, "Leave the row out.")
    if isinstance(content, str):
        content = (Message("user", content),)
    return content, chosen[-1].content, rejected[-1].content


def _content(value: Any) -> str | tuple[Message, ...]:
    if isinstance(value, str | list):
        return value if isinstance(value, str) else _messages(value)
    raise _fault("a string or a list of messages as prompt", value, "Change it.")


def _messages(values: Sequence[Any]) -> tuple[Message, ...]:
    if not values:
        raise _fault("at least one message", values, "Add the message.")
    messages = []
    for value in values:
        # Rows of a dataset have all keys in every message, null where a message has none.
        given = {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else {}
        if set(given) != {"role", "content"} or not all(isinstance(v, str) for v in given.values()):
            expected = "messages with a string `role` and a string `content` alone"
            raise _fault(expected, value, "Change the message, or leave the row out.")
        messages.append(Message(given["role"], given["content"]))
    return tuple(messages)

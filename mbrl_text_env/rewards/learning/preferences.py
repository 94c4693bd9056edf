"""Preference pairs, the training data of pairwise reward models.

Read them from files and datasets in TRL's preference format, or make them from scored records.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mbrl_text_env.files import shortened, write_text
from mbrl_text_env.fitting.report import one_reward
from mbrl_text_env.language_models.base import spawn_seed
from mbrl_text_env.prompts import (
    CHANGE,
    PromptError,
    _message,
    _Row,
    _rows,
    id_and_split,
    load_dataset,
)
from mbrl_text_env.types import Message, Prompt

if TYPE_CHECKING:
    from mbrl_text_env.records import Record


RESPONSES = ("chosen", "rejected")
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
# Starts the assistant's turn in Anthropic's plain-text dialogues and datasets of that format.
_TURN = "\n\nAssistant:"


class PreferenceError(ValueError):
    """Raised if preference pairs cannot be read, made or written."""


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to a prompt, one of which is preferred.

    Args:
        prompt: The prompt of both responses.
        chosen, rejected: The responses. One of them can be empty, since a language model can stop
            immediately. They must differ in more than surrounding white space.
        margin: The difference in score, in the units of the judge; None if unknown.

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
                f"{shortened(repr(self.chosen))} as chosen and as rejected. Remove the pair."
            )
        if self.margin is not None and not 0 <= self.margin < math.inf:
            raise PreferenceError(
                f"Prompt {self.prompt.id!r}: expected a finite margin of at least 0, or None, got "
                f"{self.margin!r}. Swap the responses, or remove the margin."
            )

    def flipped(self) -> PreferencePair:
        """Return the opposite preference."""
        return PreferencePair(self.prompt, self.rejected, self.chosen, self.margin)


def load_preferences(
    source: str | Path, *, split: str = "train", config: str | None = None, limit: int | None = None
) -> list[PreferencePair]:
    """Read preference pairs in TRL's format.

    A row has `chosen`, `rejected` and, for an explicit prompt, `prompt`. Each is a string or a list
    of `{"role": ..., "content": ...}`. Without a prompt (TRL's implicit prompt), or if both start
    with the same messages, `chosen` and `rejected` are whole conversations, and the prompt is their
    common start: messages, or the characters of a string up to the last "\\n\\nAssistant:" if there
    is one. Exactly one assistant message must follow. Optional columns are `margin` (TRL's), `id`,
    `split` and `metadata` (an object or a JSON string); other columns become metadata too. Prompts
    with equal content get the same default id, `<name>-<row of the first>`.

    Source of the format: TRL's documentation, "Dataset formats and types", "Preference".
    Deviation: without "\\n\\nAssistant:", a string's common start ends before the word in which the
    responses first differ; TRL can split a word.

    Args:
        source: A `.jsonl` file in UTF-8, one object per line; the name of a dataset on the Hugging
            Face Hub; or a folder that `datasets.load_dataset` reads.
        split: Split of a dataset, in the syntax of `datasets` (`"train[:100]"`); ignored for files.
        config: Name of the dataset's configuration.
        limit: Maximum number of rows to read.

    Returns:
        At least one pair, in the order of the source.

    Raises:
        PreferenceError: The source cannot be read or has no rows, or a row is not a pair. The
            message names the file and line, or the dataset's row.

    Example:
        >>> pairs = load_preferences("trl-lib/ultrafeedback_binarized")  # doctest: +SKIP
    """
    if limit is not None and limit < 1:
        raise PreferenceError(f"limit: expected 1 or more, or None for all, got {limit!r}.")
    first_ids: dict[Any, str] = {}
    try:
        is_file = str(source).endswith(".jsonl")
        rows = _rows(source)[1] if is_file else _hub_rows(str(source), split, config)
        pairs = [_pair_of(row, first_ids) for row in islice(rows, limit)]
    except PromptError as error:
        raise PreferenceError(str(error)) from error
    if not pairs:
        raise PreferenceError(
            f"{source}: expected at least one preference pair, got none. Add rows with `prompt`, "
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
    """Make pairs from scored responses to the same prompt; the one with the higher score is chosen.

    Ties and duplicate responses are dropped. The margin of a pair is the difference of the scores.
    The pairs drawn for a prompt depend only on the seed and its text, not on the other prompts.

    Args:
        records: Records scored by one reward model.
        pairs_per_prompt: Number of pairs to draw per prompt, without replacement; None for all.
        min_gap: Keep only pairs whose scores differ by more than this; an error if there are none.
        seed: Seed of the draw.

    Example:
        >>> pairs = pairs_from_records(read_records("records"), seed=0)  # doctest: +SKIP
    """
    from mbrl_text_env.records import scores_of

    if not min_gap >= 0 or (pairs_per_prompt is not None and pairs_per_prompt < 1):
        raise PreferenceError(
            "Expected min_gap of at least 0 and pairs_per_prompt of at least 1, or None, got "
            f"{min_gap!r} and {pairs_per_prompt!r}."
        )
    one_reward(records, PreferenceError)
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
        # Use the first prompt, because equal prompts can have different ids.
        prompt = next(iter(responses.values()))[0].prompt()
        pairs += [
            PreferencePair(prompt, better.response, worse.response, high - low)
            for (better, high), (worse, low) in found
        ]
    if not pairs:
        raise PreferenceError(
            "Expected responses to a prompt whose scores differ by more than "
            f"{min_gap}, got none in {len(records)} records of {len(groups)} prompts. Collect more "
            "responses per prompt, lower min_gap, or use another reward as gold."
        )
    return pairs


def write_preferences(path: str | Path, pairs: Sequence[PreferencePair]) -> None:
    """Write pairs atomically as JSONL that `load_preferences`, `datasets` and TRL can read.

    Chats and their responses are written as messages, as TRL expects; plain text and its responses
    as strings. Metadata is a JSON string, because a dataset's column has one type.
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
            f"{path}: expected pairs of valid Unicode with JSON metadata and a writable path, "
            f"got {type(error).__name__}: {error}. Change the path or the pairs."
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


def _hub_rows(name: str, split: str, config: str | None) -> Iterator[_Row]:
    if not Path(name).is_dir() and not _HUB_NAME.fullmatch(name):
        raise PreferenceError(
            f"Expected a .jsonl file, a dataset's folder, or its name on the Hugging Face Hub, got "
            f"{name!r}. Check the path, or rename the file to end in .jsonl."
        )
    place, dataset = load_dataset(name, split, config)
    for index, fields in enumerate(dataset):
        yield _Row(f"{place}, row {index}", f"{Path(name).stem}-{index + 1}", fields)


def _pair_of(row: _Row, first_ids: dict[Any, str]) -> PreferencePair:
    """Return the pair of a row, and add the prompt's default id to `first_ids`."""
    # Unused columns of a dataset's row are null.
    fields = {name: value for name, value in row.fields.items() if value is not None}
    for column in RESPONSES:
        if column not in fields:
            expected = "the columns 'chosen' and 'rejected'"
            raise row.error(expected, list(fields), f"Add {column!r}, or rename a column.")
    prompt, chosen, rejected = (fields.pop(key, None) for key in ("prompt", *RESPONSES))
    margin, metadata = fields.pop("margin", None), fields.pop("metadata", {})
    try:
        content, chosen, rejected = _texts(row, prompt, chosen, rejected)
        default_id = first_ids.setdefault(content, row.default_id)
        prompt_id, split = id_and_split(row, fields, default_id)
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        if isinstance(margin, bool) or not isinstance(margin, int | float | None):
            raise row.error("a number as margin", repr(margin), CHANGE)
        if not isinstance(metadata, dict):
            raise row.error("an object as metadata", repr(metadata), CHANGE)
        prompt = Prompt(prompt_id, content, {**fields, **metadata}, split)
        margin = None if margin is None else float(margin)
        return PreferencePair(prompt, chosen, rejected, margin)
    except PromptError:
        raise
    except ValueError as error:
        raise PreferenceError(f"{row.place}: {error}") from error


def _texts(
    row: _Row, prompt: Any, chosen: Any, rejected: Any
) -> tuple[str | tuple[Message, ...], str, str]:
    """Return the prompt's content and the two responses."""
    if not isinstance(prompt, str | list | None):
        raise row.error("a string or a list of messages as prompt", repr(prompt), "Change it.")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _from_messages(row, prompt, chosen, rejected)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        expected = "chosen and rejected to be both strings or both lists of messages"
        raise row.error(expected, [chosen, rejected], "Change them.")
    if prompt is not None:
        return _content(row, prompt), chosen, rejected
    cut = _shared_characters(chosen, rejected)
    if not chosen[:cut].strip():
        expected = "a column 'prompt', or texts that start with the same prompt"
        raise row.error(expected, [chosen, rejected], "Add the prompt.")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _from_messages(
    row: _Row, prompt: Any, *responses: list[Any]
) -> tuple[tuple[Message, ...], str, str]:
    if not all(responses):
        raise row.error("at least one message", responses, "Add the message.")
    chosen, rejected = (_content(row, response) for response in responses)
    shared = _shared(chosen[:-1], rejected[:-1])
    content = None if prompt is None else _content(row, prompt)
    if shared:
        repeated = Prompt("shared", chosen[:shared])
        # In some datasets, the prompt repeats a message of the conversations.
        alike = isinstance(content, str) and content == chosen[shared - 1].content
        if content is not None and not alike and Prompt("own", content).text != repeated.text:
            shown = shortened(repr(prompt))
            expected = f"responses, or conversations that start with the prompt {shown}"
            raise row.error(expected, repeated.text, "Remove the column 'prompt'.")
        content = chosen[:shared]
    if content is None:
        expected = "a column 'prompt', or conversations that start with the same messages"
        raise row.error(expected, responses, "Add the prompt.")
    for column, rest in zip(RESPONSES, (chosen[shared:], rejected[shared:]), strict=True):
        if (roles := [message.role for message in rest]) != ["assistant"]:
            expected = f"one assistant message after the prompt in {column!r}"
            raise row.error(expected, roles, "Remove the row.")
    if isinstance(content, str):
        content = (Message("user", content),)
    return content, chosen[-1].content, rejected[-1].content


def _content(row: _Row, value: Any) -> Any:
    """Return a string unchanged, or a tuple of messages."""
    return value if isinstance(value, str) else tuple(_message(row, each) for each in value)


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the number of equal items at the start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _shared_characters(a: str, b: str) -> int:
    """Return the length of the common prompt of two texts."""
    shared = _shared(a, b)
    turn = a.rfind(_TURN, 0, shared)
    if turn >= 0:
        return turn + len(_TURN)
    while shared > 0 and not a[shared - 1].isspace():
        shared -= 1
    return len(a[:shared].rstrip())

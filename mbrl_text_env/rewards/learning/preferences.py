"""Preference pairs: what pairwise reward models are fitted on.

They are read from files and datasets in TRL's preference format, or made from records whose scores
are trusted.
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
    "\\n\\nAssistant:" where there is one. Exactly one message of the assistant has to follow.
    Optional are `margin` (TRL's), `id`, `split`, and `metadata` (an object, or one as a JSON
    string); other columns become metadata too. Prompts of equal content get the same default id,
    `<name>-<row of the first>`.

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


def _hub_rows(name: str, split: str, config: str | None) -> Iterator[_Row]:
    if not Path(name).is_dir() and not _HUB_NAME.fullmatch(name):
        raise PreferenceError(
            f"Expected a .jsonl file, a dataset's folder, or its name on the Hugging Face Hub, got "
            f"{name!r}. Check the path, or give the file the ending .jsonl."
        )
    place, dataset = load_dataset(name, split, config)
    for index, fields in enumerate(dataset):
        yield _Row(f"{place}, row {index}", f"{Path(name).stem}-{index + 1}", fields)


def _pair_of(row: _Row, first_ids: dict[Any, str]) -> PreferencePair:
    """The pair of a row; `first_ids`, default ids of the prompts that were met, is added to."""
    # Columns that a row of a dataset does not use are null.
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
    """The prompt's content, and the two responses."""
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
        expected = "a column 'prompt', or texts that begin with the same prompt"
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
        # Some datasets repeat the first message of the conversations as their prompt.
        alike = isinstance(content, str) and content == chosen[shared - 1].content
        if content is not None and not alike and Prompt("own", content).text != repeated.text:
            shown = shortened(repr(prompt))
            expected = f"responses, or conversations that begin with the prompt {shown}"
            raise row.error(expected, repeated.text, "Leave the column 'prompt' out.")
        content = chosen[:shared]
    if content is None:
        expected = "a column 'prompt', or conversations that begin with the same messages"
        raise row.error(expected, responses, "Add the prompt.")
    for column, rest in zip(RESPONSES, (chosen[shared:], rejected[shared:]), strict=True):
        if (roles := [message.role for message in rest]) != ["assistant"]:
            expected = f"one message of the assistant after the prompt in {column!r}"
            raise row.error(expected, roles, "Leave the row out.")
    if isinstance(content, str):
        content = (Message("user", content),)
    return content, chosen[-1].content, rejected[-1].content


def _content(row: _Row, value: Any) -> Any:
    """A text, or messages."""
    return value if isinstance(value, str) else tuple(_message(row, each) for each in value)


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

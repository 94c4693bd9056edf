"""Scored responses as token-level records, kept in folders of Parquet shards.

A shard is written under a temporary name and then renamed, so a folder never has an incomplete
shard. `datasets.load_dataset("parquet", ...)`, pandas and other Parquet readers can load them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from mbrl_text_env.files import remove_scratch, write_file, write_folder
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, score_responses
from mbrl_text_env.rewards.base import reward_name as name_of
from mbrl_text_env.runs import identity, locked, refuse_others, writing
from mbrl_text_env.types import FinishReason, Message, Prompt, Split, TextState

_VERSION_KEY = b"mbrl_text_env.records_version"
_VERSION = b"2"
# JSON: the settings that the rows of a shard depend on, apart from their prompts.
_RUN_KEY = b"mbrl_text_env.run"
# Not all readers support Parquet maps; all support a list of name and value.
_AMOUNTS = pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))
SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_text", pa.string()),
        ("messages", pa.string()),  # JSON; null if the prompt is plain text
        ("metadata", pa.string()),  # JSON
        ("split", pa.string()),
        ("prompt_ids", pa.list_(pa.int64())),
        ("response_ids", pa.list_(pa.int64())),
        ("chunk_ends", pa.list_(pa.int64())),
        ("logprobs", pa.list_(pa.float64())),
        ("finish_reason", pa.string()),
        ("response", pa.string()),
        ("rewards", _AMOUNTS),
        ("score", pa.float64()),
        ("reward_name", pa.string()),
        ("agent", pa.string()),
        ("language_model", pa.string()),
        ("seed", pa.int64()),
        ("usage", _AMOUNTS),
        ("sample", pa.int64()),  # null if there is only one sample
    ],
    metadata={_VERSION_KEY: _VERSION},
)
_SHARD_NAME = re.compile(r"shard-(\d{5,})\.parquet")


class RecordsError(ValueError):
    """Records that cannot be read or written."""


@dataclass(frozen=True)
class Record:
    """A response with its tokens, scores and cost.

    Args:
        prompt_text: The prompt as plain text (`Prompt.text`).
        prompt_ids, response_ids, finish_reason, chunk_ends: See `TextState`.
        logprobs: float[T], log-probability (nats) of each response token under the language model;
            empty if unknown.
        rewards: Parts of the score by name, without the total (`score`).
        score: None if the response is not scored; then `rewards` and `reward_name` are empty.
        agent, language_model, seed: The source of the response.
        usage: The cost of the response (`Usage.as_dict()`).
        messages: The prompt's chat messages; None if the prompt is plain text (`prompt_text`).
        sample: Index of the sample for this prompt, from 0; None if there is only one.

    Raises:
        RecordsError: A score is not finite, `rewards` has a part `"total"`, or only some of the
            tokens have log-probabilities.

    Example:
        >>> record = Record.from_state(
        ...     TextState(Prompt.from_text("Hi"), (5, 6), (1, 2), "stop"),
        ...     response="Hello", score=0.5, rewards={"length": 0.5}, reward_name="length",
        ...     agent="sampling", language_model="toy", seed=0,
        ... )
        >>> record.prompt() == Prompt.from_text("Hi"), record.state().response_ids
        (True, (1, 2))
    """

    prompt_id: str
    prompt_text: str
    split: Split | None
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None
    response: str
    rewards: dict[str, float] = field(hash=False)
    score: float | None
    reward_name: str
    agent: str
    language_model: str
    seed: int
    usage: dict[str, float] = field(hash=False)
    metadata: dict[str, Any] = field(hash=False)
    messages: tuple[Message, ...] | None = None
    chunk_ends: tuple[int, ...] = ()
    sample: int | None = None

    def __post_init__(self) -> None:
        if "total" in self.rewards:
            raise self._error(
                f"the parts of the score in rewards, got {self.rewards!r}. Leave out 'total'; it "
                "is `score`."
            )
        if self.score is None and (self.rewards or self.reward_name):
            raise self._error(
                f"no reward_name and no rewards without a score, got {self.reward_name!r} and "
                f"{self.rewards!r}. Give the score, or leave them empty."
            )
        scores = () if self.score is None else (self.score, *self.rewards.values())
        if not all(map(math.isfinite, scores)):
            raise self._error(
                f"finite scores, got score={self.score!r}, rewards={self.rewards!r}. Fix the "
                f"reward model {self.reward_name!r}, or leave the response out."
            )
        if len(self.logprobs) not in (0, len(self.response_ids)):
            raise self._error(
                f"one log-probability a response token ({len(self.response_ids)}), got "
                f"{len(self.logprobs)}. Give all, or none."
            )

    def _error(self, expected: str) -> RecordsError:
        return RecordsError(f"Record of prompt {self.prompt_id!r}: expected {expected}")

    @classmethod
    def from_state(
        cls,
        state: TextState,
        *,
        rewards: Mapping[str, float],
        logprobs: Sequence[float] = (),
        usage: Mapping[str, float] | None = None,
        **others: Any,
    ) -> Record:
        """Make a record from a scored state.

        `others` are the arguments that the state does not contain: `response`, `score`,
        `reward_name`, `agent`, `language_model`, `seed` and, if there are several, `sample`.
        """
        prompt = state.prompt
        return cls(
            prompt_id=prompt.id,
            prompt_text=prompt.text,
            split=prompt.split,
            metadata=dict(prompt.metadata),
            messages=None if isinstance(prompt.content, str) else prompt.content,
            prompt_ids=state.prompt_ids,
            response_ids=state.response_ids,
            finish_reason=state.finish_reason,
            chunk_ends=state.chunk_ends,
            rewards=dict(rewards),
            logprobs=tuple(logprobs),
            usage=dict(usage or {}),
            **others,
        )

    def prompt(self) -> Prompt:
        """Rebuild the prompt."""
        content = self.prompt_text if self.messages is None else self.messages
        return Prompt(self.prompt_id, content, self.metadata, self.split)

    def state(self) -> TextState:
        """Rebuild the state at the end of the response."""
        return self.prefix_state(len(self.response_ids))

    def prefix_state(self, length: int) -> TextState:
        """The state after `length` tokens; only the full length keeps the finish reason."""
        if not 0 <= length <= len(self.response_ids):
            raise self._error(f"a prefix of 0 to {len(self.response_ids)} tokens, got {length}.")
        return TextState(
            self.prompt(),
            self.prompt_ids,
            self.response_ids[:length],
            self.finish_reason if length == len(self.response_ids) else None,
            tuple(end for end in self.chunk_ends if end <= length),
            sum(self.logprobs[:length]) if self.logprobs else None,
        )


class RecordWriter:
    """Appends records to a folder; use it as a context manager.

    A full shard is written immediately. Other records are written by `flush()` and at the end of
    the block, even after an error. If the process is killed, only records that were not flushed are
    lost. A folder can have only one writer at a time. All methods raise RecordsError if the writer
    is not open or a shard cannot be written.

    Args:
        folder: Created if it does not exist; otherwise records are appended.
        shard_rows: Number of records in a full shard.

    Raises:
        RecordsError: `shard_rows` is below 1. On entering: the folder is not writable, has another
            writer, or contains shards that are damaged or have an unknown version.

    Example:
        >>> with RecordWriter("records") as writer:  # doctest: +SKIP
        ...     writer.append(record)
    """

    def __init__(self, folder: str | Path, *, shard_rows: int = 256) -> None:
        if shard_rows < 1:
            raise RecordsError(f"shard_rows: expected 1 or more, got {shard_rows!r}.")
        self.folder = Path(folder)
        self.shard_rows = shard_rows
        self._lock: FileLock | None = None
        self._pending: list[pa.RecordBatch] = []
        self._next_shard = 0
        self._run: bytes | None = None

    def __enter__(self) -> RecordWriter:
        with writing(self.folder, RecordsError):
            self.folder.mkdir(parents=True, exist_ok=True)
            busy = "another writer has it open. Wait until that one ends"
            lock = locked(self.folder, busy, RecordsError)
            try:
                remove_scratch(self.folder)
                shards = _shards_of(self.folder)
                has_records(self.folder)
            except BaseException:
                lock.release()
                raise
        self._next_shard = _number_of(shards[-1]) + 1 if shards else 0
        self._lock = lock
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            self._pending.clear()
            lock, self._lock = self._lock, None
            if lock is not None:
                lock.release()

    def append(self, record: Record) -> None:
        """Add one record; see `extend`."""
        self.extend([record])

    def extend(self, records: Iterable[Record]) -> None:
        """Add records; they are written by the next `flush()` or when the shard is full.

        Raises:
            RecordsError: A record has integers beyond 64 bits, invalid Unicode, or metadata that is
                not JSON.
        """
        self._check_open()
        for record in records:
            self._pending.append(as_batch(record))
            if len(self._pending) >= self.shard_rows:
                self.flush()

    def append_together(self, records: Iterable[Record]) -> None:
        """Write records as a unit, so that a kill leaves all or none of them; see `extend`."""
        self._check_open()
        self._pending += [as_batch(record) for record in records]
        self.flush()

    def go_on(self, run: Mapping[str, Any]) -> None:
        """Continue a run; RecordsError if the folder has records of another run.

        `run` contains the settings (JSON values) that the records depend on, apart from their
        prompts. It is stored in each shard.
        """
        self._check_open()
        for shard in _shards_of(self.folder):
            found = _run_of_shard(shard)
            if found is None:
                raise RecordsError(
                    f"{shard} holds records that do not say what they depend on, so nothing can be "
                    "added to them. Choose another folder."
                )
            refuse_others(self.folder, found, run, "collection", RecordsError)
        self._run = json.dumps(run).encode()

    def flush(self) -> None:
        """Write the pending records as a shard; if that fails, they stay pending."""
        self._check_open()
        if not self._pending:
            return
        table = pa.Table.from_batches(self._pending).combine_chunks()
        if self._run is not None:
            metadata = {**(table.schema.metadata or {}), _RUN_KEY: self._run}
            table = table.replace_schema_metadata(metadata)
        path = self.folder / f"shard-{self._next_shard:05d}.parquet"
        with (
            writing(self.folder, RecordsError),
            write_file(path) as scratch,
            scratch.open("wb") as file,
        ):
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        self._next_shard += 1
        self._pending.clear()

    def existing(self) -> list[Record]:
        """The records already written; empty for a new folder."""
        return read_records(self.folder) if _shards_of(self.folder) else []

    def _check_open(self) -> None:
        if self._lock is None:
            raise RecordsError(
                f"{self.folder}: the writer is not open. Write within "
                "`with RecordWriter(folder) as writer:`."
            )


def read_records(folder: str | Path) -> list[Record]:
    """Read all records of a folder in the order of writing.

    Raises:
        RecordsError: There are no shards, or a shard is damaged or has an unknown version.
    """
    return list(_iter_records(folder))


def _iter_records(folder: str | Path) -> Iterator[Record]:
    """Like `read_records`, one shard at a time."""
    shards = _shards_of(folder)
    if not shards:
        raise RecordsError(
            f"{folder}: expected a folder with record shards (shard-00000.parquet, ...), got none "
            f"({_what_is(Path(folder))}). Write some with `RecordWriter`, or give another folder."
        )
    for shard in shards:
        with _opened(shard) as file:
            table = file.read()
        yield from map(from_row, table.to_pylist())


def scores_of(records: Iterable[Record]) -> list[float]:
    """The scores of records; RecordsError if a record has none."""
    scores = []
    for record in records:
        if record.score is None:
            raise record._error("a score, got None. Score the records first (`records.rescore`).")
        scores.append(record.score)
    return scores


def has_records(folder: str | Path, expected: int = 1) -> bool:
    """Whether a folder has at least `expected` records; see `read_records` for errors."""
    count = 0
    for shard in _shards_of(folder):
        with _opened(shard) as file:
            count += file.metadata.num_rows
    return count >= expected


def rescore(
    source: str | Path, reward_model: RewardLike, target: str | Path, *, batch_size: int = 64
) -> None:
    """Score the responses of a folder with another reward model and write them to a new folder.

    Only `score`, `rewards` and `reward_name` of the records change. The new folder appears only
    when it is complete.

    Raises:
        RecordsError: The target is the source, is not empty or not writable; the source cannot be
            read; or `batch_size`, the number of responses scored together, is below 1.
        RewardError: The reward model failed.

    Example:
        >>> rescore("records", SentimentReward(), "records-sentiment")  # doctest: +SKIP
    """
    if batch_size < 1:
        raise RecordsError(f"batch_size: expected 1 or more, got {batch_size!r}.")
    model, target = as_reward_model(reward_model), Path(target)
    with writing(target, RecordsError):
        _check_target(Path(source), target)
    records, run = _iter_records(source), run_of(source)
    with (
        writing(target, RecordsError),
        write_folder(target) as scratch,
        RecordWriter(scratch) as writer,
    ):
        if run is not None:
            writer.go_on({**run, "reward": identity(model)})
        while batch := list(islice(records, batch_size)):
            prompts = [record.prompt() for record in batch]
            scores = score_responses(model, prompts, [record.response for record in batch])
            for i, (record, total) in enumerate(zip(batch, scores.total.tolist(), strict=True)):
                changed: Any = {"rewards": scores.parts_of(i), "reward_name": name_of(model)}
                writer.append(dataclasses.replace(record, score=total, **changed))


def run_of(folder: str | Path) -> dict[str, Any] | None:
    """The run settings of the records (see `RecordWriter.go_on`); None if unknown or mixed."""
    found = [_run_of_shard(shard) for shard in _shards_of(folder)]
    return found[0] if found and all(run == found[0] for run in found) else None


def _check_target(source: Path, target: Path) -> None:
    if target.resolve() == source.resolve():
        raise RecordsError(
            f"target: expected another folder than the source, got {str(target)!r} for both. The "
            "old scores are kept; choose a new folder."
        )
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise RecordsError(
            f"target: expected a new or empty folder, got {str(target)!r} ({_what_is(target)}). "
            "Choose another, or remove it."
        )


def as_batch(record: Record) -> pa.RecordBatch:
    """A batch of one record; RecordsError if it cannot be written."""
    # Converted when added, so that an invalid record does not make the whole shard fail.
    try:
        return pa.RecordBatch.from_pylist([to_row(record)], schema=SCHEMA)
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise record._error(
            "64-bit integers, valid Unicode text and metadata of JSON values, got "
            f"{type(error).__name__}: {error}. Convert the value, or leave it out of the record."
        ) from error


def to_row(record: Record) -> dict[str, Any]:
    """The columns of `SCHEMA` as JSON values."""
    row = {name: getattr(record, name) for name in SCHEMA.names}
    if record.messages is not None:
        row["messages"] = [vars(message) for message in record.messages]
    for name in ("messages", "metadata"):
        if row[name] is not None:
            row[name] = json.dumps(row[name], ensure_ascii=False, allow_nan=False)
    for name in ("rewards", "usage"):
        row[name] = [{"name": k, "value": float(v)} for k, v in row[name].items()]
    return row


def from_row(row: dict[str, Any]) -> Record:
    """The inverse of `to_row`."""
    if row["messages"] is not None:
        row["messages"] = tuple(Message(**message) for message in json.loads(row["messages"]))
    row["metadata"] = json.loads(row["metadata"])
    for name in ("rewards", "usage"):
        row[name] = {amount["name"]: amount["value"] for amount in row[name]}
    for name in ("prompt_ids", "response_ids", "chunk_ends", "logprobs"):
        row[name] = tuple(row[name])
    return Record(**row)


def _run_of_shard(shard: Path) -> dict[str, Any] | None:
    """The run settings of a shard; None if it has none."""
    with _opened(shard) as file:
        run = (file.schema_arrow.metadata or {}).get(_RUN_KEY)
    return None if run is None else dict(json.loads(run))


def _shards_of(folder: str | Path) -> list[Path]:
    """The shards of a folder in the order of writing; empty if there is no folder."""
    try:
        found = [path for path in Path(folder).iterdir() if _SHARD_NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RecordsError(
            f"{folder}: expected a folder that can be read, got {error}. Change its permissions, "
            "or give another folder."
        ) from error
    return sorted(found, key=_number_of)


def _number_of(shard: Path) -> int:
    return int(shard.stem.removeprefix("shard-"))


@contextmanager
def _opened(shard: Path) -> Iterator[pq.ParquetFile]:
    """Open a shard and check its version and columns."""
    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            version = (schema.metadata or {}).get(_VERSION_KEY, b"no version")
            if version != _VERSION:
                raise RecordsError(
                    f"{shard}: expected records of version {_VERSION.decode()}, got "
                    f"{version.decode(errors='replace')}. Read it with the release that wrote it, "
                    "or move it out of the folder."
                )
            if not schema.equals(SCHEMA):
                raise RecordsError(
                    f"{shard}: expected the columns of records ({SCHEMA.names}), got "
                    f"{schema.names} or other types. Restore it from a copy, or move it out of the "
                    "folder."
                )
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RecordsError(
            f"{shard}: expected a whole shard of records, but it is damaged or cut off ({error}). "
            "Restore it from a copy, or move it out of the folder: `collect` draws it again."
        ) from error


def _what_is(path: Path) -> str:
    return "a folder" if path.is_dir() else "a file" if path.exists() else "not there"

"""Scored responses as token-level records, kept in folders of Parquet shards.

A record holds all that re-scoring or fitting needs: the prompt, the token ids of prompt and
response, the text, the scores, and what it cost. A shard is written under a temporary name and then
renamed, so a folder never shows half of one. The columns load with
`datasets.load_dataset("parquet", ...)`, pandas or anything else that reads Parquet.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from mbrl_text_env._record_files import (
    RUN_KEY,
    SCHEMA,
    SCRATCH_SUFFIX,
    DamagedShardError,
    RecordsError,
    count_rows,
    damage,
    number_of,
    read_shard,
    run_of_shard,
    shards_of,
    what_is,
    write_shard,
)
from mbrl_text_env.files import write_folder
from mbrl_text_env.identity import identity
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, RewardModel, score_responses
from mbrl_text_env.rewards.base import reward_name as name_of
from mbrl_text_env.runs import refuse_others, writing
from mbrl_text_env.types import FinishReason, Message, Prompt, Split, TextState

_LOCK_SECONDS = 1.0


@dataclass(frozen=True)
class Record:
    """A response with its tokens, its scores and its cost.

    Args:
        prompt_id: The prompt's id.
        prompt_text: The prompt as a person reads it (`Prompt.text`).
        split: The prompt's split.
        prompt_ids: int[P], the prompt's token ids, chat template included.
        response_ids: int[T], the response's token ids, a final stop token included.
        logprobs: float[T], log-probability (nats) of each response token under the language model;
            empty where it is not known.
        finish_reason: `"stop"`, `"length"`, or None for a response that could go on.
        response: The response's text.
        rewards: The score's parts by name, without the total.
        score: The total.
        reward_name: The reward model that gave the score.
        agent: The agent that wrote the response.
        language_model: The language model that it used.
        seed: The seed that it was given.
        usage: What the response cost (`Usage.as_dict()`).
        metadata: The prompt's metadata. JSON values.
        messages: The prompt's chat messages; None where the prompt is plain text, `prompt_text`.
        chunk_ends: int[C], lengths of the response after each chunk.
        sample: Which of the samples to the prompt it is, from 0; None where there is one alone.

    Raises:
        RecordsError: A score is not finite, `rewards` has a part `"total"`, or there are
            log-probabilities for some of the tokens only.

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
    score: float
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
            raise RecordsError(
                f"Record of prompt {self.prompt_id!r}: expected the parts of the score in rewards, "
                f"got {self.rewards!r}. Leave out 'total'; it is `score`."
            )
        if not all(map(math.isfinite, (self.score, *self.rewards.values()))):
            raise RecordsError(
                f"Record of prompt {self.prompt_id!r}: expected finite scores, got score="
                f"{self.score!r}, rewards={self.rewards!r}. Fix the reward model "
                f"{self.reward_name!r}, or leave the response out."
            )
        if len(self.logprobs) not in (0, len(self.response_ids)):
            raise RecordsError(
                f"Record of prompt {self.prompt_id!r}: expected one log-probability a response "
                f"token ({len(self.response_ids)}), got {len(self.logprobs)}. Give all, or none."
            )

    @classmethod
    def from_state(
        cls,
        state: TextState,
        *,
        response: str,
        score: float,
        rewards: Mapping[str, float],
        reward_name: str,
        agent: str,
        language_model: str,
        seed: int,
        logprobs: Sequence[float] = (),
        usage: Mapping[str, float] | None = None,
        sample: int | None = None,
    ) -> Record:
        """Make the record of a scored state; see the class for the arguments.

        Raises:
            RecordsError: See the class.
        """
        prompt = state.prompt
        return cls(
            prompt_id=prompt.id,
            prompt_text=prompt.text,
            split=prompt.split,
            prompt_ids=state.prompt_ids,
            response_ids=state.response_ids,
            logprobs=tuple(logprobs),
            finish_reason=state.finish_reason,
            response=response,
            rewards=dict(rewards),
            score=score,
            reward_name=reward_name,
            agent=agent,
            language_model=language_model,
            seed=seed,
            usage=dict(usage or {}),
            metadata=dict(prompt.metadata),
            messages=None if isinstance(prompt.content, str) else prompt.content,
            chunk_ends=state.chunk_ends,
            sample=sample,
        )

    def prompt(self) -> Prompt:
        """The prompt, rebuilt."""
        content = self.prompt_text if self.messages is None else self.messages
        return Prompt(self.prompt_id, content, self.metadata, self.split)

    def state(self) -> TextState:
        """The state at the end of the response, rebuilt."""
        return self.prefix_state(len(self.response_ids))

    def prefix_state(self, length: int) -> TextState:
        """The state after the first `length` tokens; it has ended only if the response had.

        Raises:
            RecordsError: The response is shorter.
        """
        if not 0 <= length <= len(self.response_ids):
            raise RecordsError(
                f"Record of prompt {self.prompt_id!r}: expected a prefix of 0 to "
                f"{len(self.response_ids)} tokens, got {length}."
            )
        return TextState(
            self.prompt(),
            self.prompt_ids,
            self.response_ids[:length],
            self.finish_reason if length == len(self.response_ids) else None,
            tuple(end for end in self.chunk_ends if end <= length),
            sum(self.logprobs[:length]) if self.logprobs else None,
        )


class RecordWriter:
    """Appends records to a folder; used as a context manager.

    A full shard is written at once, the rest by `flush()` and at the end of the block, also when
    the block ends with an error. A writer that is killed loses no more than the records that were
    not flushed. A folder has one writer at a time.

    Args:
        folder: Made if it is not there, appended to if it is.
        shard_rows: Records in a full shard.

    Raises:
        RecordsError: `shard_rows` is below 1. On entering: the folder cannot be written, another
            writer has it, or it holds shards that are damaged or of an unknown version.

    Example:
        >>> with RecordWriter("records") as writer:  # doctest: +SKIP
        ...     writer.append(record)
        >>> len(read_records("records"))  # doctest: +SKIP
        1
    """

    def __init__(self, folder: str | Path, *, shard_rows: int = 256) -> None:
        if shard_rows < 1:
            raise RecordsError(f"shard_rows: expected 1 or more, got {shard_rows!r}.")
        self.folder = Path(folder)
        self.shard_rows = shard_rows
        self._lock = FileLock(self.folder / ".lock", timeout=_LOCK_SECONDS)
        self._pending: list[pa.RecordBatch] = []
        self._next_shard = 0
        self._run: bytes | None = None

    def __enter__(self) -> RecordWriter:
        with writing(self.folder, RecordsError):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise RecordsError(
                    f"{self.folder}: expected to be its only writer, but another one has it open. "
                    "Wait until that one ends, or write to another folder."
                ) from error
            try:
                self._take_over()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            self._pending.clear()
            self._lock.release()

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk after the next `flush()` or when its shard is full.

        Raises:
            RecordsError: The record cannot be stored: an integer beyond 64 bits, text that is no
                valid Unicode, metadata that is not JSON. Or the writer is not open, or the shard
                cannot be written.
        """
        self.extend([record])

    def extend(self, records: Iterable[Record]) -> None:
        """Add records one by one; see `append`."""
        self._check_open()
        for record in records:
            self._pending.append(_batch(record))
            if len(self._pending) >= self.shard_rows:
                self.flush()

    def append_together(self, records: Iterable[Record]) -> None:
        """Write records at once: a kill leaves all of them or none; see `append`."""
        self._check_open()
        self._pending += [_batch(record) for record in records]
        self.flush()

    def go_on(self, run: Mapping[str, Any]) -> None:
        """Write records of this run from now on; the folder holds no others.

        Args:
            run: Whatever the records depend on, apart from their prompts; JSON values, kept in each
                shard.

        Raises:
            RecordsError: The folder holds records of another run (the message says what differs),
                or some that do not say of which. Or the writer is not open.
        """
        self._check_open()
        for shard in shards_of(self.folder):
            found = run_of_shard(shard)
            if found is None:
                raise RecordsError(
                    f"{shard} holds records that do not say what they depend on, so nothing can be "
                    "added to them. Choose another folder."
                )
            refuse_others(self.folder, found, run, "collection", RecordsError)
        self._run = json.dumps(run).encode()

    def flush(self) -> None:
        """Write what was added since the last shard; what cannot be written is kept.

        Raises:
            RecordsError: The writer is not open, or the shard cannot be written.
        """
        self._check_open()
        if not self._pending:
            return
        table = pa.Table.from_batches(self._pending).combine_chunks()
        if self._run is not None:
            metadata = {**(table.schema.metadata or {}), RUN_KEY: self._run}
            table = table.replace_schema_metadata(metadata)
        with writing(self.folder, RecordsError):
            write_shard(table, self.folder / f"shard-{self._next_shard:05d}.parquet")
        self._next_shard += 1
        self._pending.clear()

    def existing(self) -> list[Record]:
        """The records that are on the disk, as `read_records`; none in a new folder."""
        return read_records(self.folder) if shards_of(self.folder) else []

    def _take_over(self) -> None:
        for scratch in self.folder.glob(f"shard-*{SCRATCH_SUFFIX}"):
            scratch.unlink()
        shards = shards_of(self.folder)
        for shard in shards:
            count_rows(shard)
        self._next_shard = number_of(shards[-1]) + 1 if shards else 0

    def _check_open(self) -> None:
        if not self._lock.is_locked:
            raise RecordsError(
                f"{self.folder}: the writer is not open. Write within "
                "`with RecordWriter(folder) as writer:`."
            )


def read_records(folder: str | Path, *, skip_damaged: bool = False) -> list[Record]:
    """Read all records of a folder, in the order in which they were written.

    Args:
        folder: As written by `RecordWriter`.
        skip_damaged: Leave out damaged shards with a warning instead of raising.

    Raises:
        RecordsError: There is no such folder, it has no shards, a shard is damaged (with
            `skip_damaged`: all are), or a shard has an unknown version.

    Example:
        >>> [record.score for record in read_records("records")]  # doctest: +SKIP
        [0.5]
    """
    return list(iter_records(folder, skip_damaged=skip_damaged))


def iter_records(folder: str | Path, *, skip_damaged: bool = False) -> Iterator[Record]:
    """Read records one shard at a time; see `read_records`, which takes and raises the same."""
    shards = shards_of(folder)
    if not shards:
        raise RecordsError(
            f"{folder}: expected a folder with record shards (shard-00000.parquet, ...), got none "
            f"({what_is(Path(folder))}). Write some with `RecordWriter`, or give another folder."
        )
    any_sound = False
    for shard in shards:
        try:
            table = read_shard(shard)
        except DamagedShardError as error:
            if not skip_damaged:
                raise damage(shards) from error
            warnings.warn(f"Left out a damaged shard: {error}", stacklevel=2)
            continue
        any_sound = True
        yield from map(_record, table.to_pylist())
    if not any_sound:
        raise RecordsError(
            f"{folder}: expected at least one sound shard, but all {len(shards)} are damaged. "
            "Restore them from a copy, or collect the records again."
        )


def has_records(folder: str | Path, expected: int = 1) -> bool:
    """Whether a folder holds at least `expected` records; see `read_records` for errors."""
    return sum(map(count_rows, shards_of(folder))) >= expected


def rescore(
    source: str | Path, reward_model: RewardLike, target: str | Path, *, batch_size: int = 64
) -> None:
    """Score the responses of a folder with another reward model, into a new folder.

    Nothing is generated again: the new records differ from the old in `score`, `rewards` and
    `reward_name` alone. The new folder appears when all of it is written, or not at all.

    Args:
        source: Folder of records.
        reward_model: Scores the responses.
        target: A folder that does not exist, or is empty.
        batch_size: Responses that are scored together.

    Raises:
        RecordsError: The target is the source, holds something, or cannot be written; the source
            cannot be read; or `batch_size` is below 1.
        RewardError: The reward model failed.

    Example:
        >>> rescore("records", SentimentReward(), "records-sentiment")  # doctest: +SKIP
    """
    if batch_size < 1:
        raise RecordsError(f"batch_size: expected 1 or more, got {batch_size!r}.")
    reward_model = as_reward_model(reward_model)
    target = Path(target)
    with writing(target, RecordsError):
        _check_target(Path(source), target)
    records, run = iter_records(source), run_of(source)
    with (
        writing(target, RecordsError),
        write_folder(target) as scratch,
        RecordWriter(scratch) as writer,
    ):
        if run is not None:
            writer.go_on({**run, "reward": identity(reward_model)})
        while batch := list(islice(records, batch_size)):
            writer.extend(_rescored(batch, reward_model))


def run_of(folder: str | Path) -> dict[str, Any] | None:
    """What the records of a folder depend on (`RecordWriter.go_on`); None where it is not known."""
    found = [run_of_shard(shard) for shard in shards_of(folder)]
    return found[0] if found and all(run == found[0] for run in found) else None


def _rescored(records: Sequence[Record], reward_model: RewardModel) -> Iterator[Record]:
    scores = score_responses(
        reward_model,
        [record.prompt() for record in records],
        [record.response for record in records],
    )
    for i, record in enumerate(records):
        yield dataclasses.replace(
            record,
            score=float(scores.total[i]),
            rewards=scores.parts_of(i),
            reward_name=name_of(reward_model),
        )


def _check_target(source: Path, target: Path) -> None:
    if target.resolve() == source.resolve():
        raise RecordsError(
            f"target: expected another folder than the source, got {str(target)!r} for both. The "
            "old scores are kept; choose a new folder."
        )
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise RecordsError(
            f"target: expected a new or empty folder, got {str(target)!r} ({what_is(target)}). "
            "Choose another, or remove it."
        )


def _batch(record: Record) -> pa.RecordBatch:
    # Converted when it is added, so that an unfit record fails by itself and not with its shard.
    try:
        return pa.RecordBatch.from_pylist([_row(record)], schema=SCHEMA)
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise RecordsError(
            f"Record of prompt {record.prompt_id!r}: expected 64-bit integers, valid Unicode text "
            f"and metadata of JSON values, got {type(error).__name__}: {error}. Convert the value, "
            "or leave it out of the record."
        ) from error


def _row(record: Record) -> dict[str, Any]:
    messages = record.messages
    return {
        **{name: getattr(record, name) for name in SCHEMA.names},
        "messages": None if messages is None else _json([vars(m) for m in messages]),
        "metadata": _json(record.metadata),
        "rewards": _amounts(record.rewards),
        "usage": _amounts(record.usage),
    }


def _record(row: dict[str, Any]) -> Record:
    if row["messages"] is not None:
        row["messages"] = tuple(Message(**message) for message in json.loads(row["messages"]))
    row["metadata"] = json.loads(row["metadata"])
    for name in ("rewards", "usage"):
        row[name] = {amount["name"]: amount["value"] for amount in row[name]}
    for name in ("prompt_ids", "response_ids", "chunk_ends", "logprobs"):
        row[name] = tuple(row[name])
    return Record(**row)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _amounts(values: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"name": name, "value": float(value)} for name, value in values.items()]

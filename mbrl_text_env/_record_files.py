"""The Parquet files (shards) of a folder of records: columns, reading and writing one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

VERSION_KEY = b"mbrl_text_env.records_version"
VERSION = b"2"
# What the rows of a shard depend on, apart from their prompts: JSON.
RUN_KEY = b"mbrl_text_env.run"
# Parquet maps are not understood by every reader; a list of name and value is.
_AMOUNTS = pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))
SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_text", pa.string()),
        ("messages", pa.string()),  # JSON; null where the prompt is plain text
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
        ("sample", pa.int64()),  # null where it is not one of several samples
    ],
    metadata={VERSION_KEY: VERSION},
)
# The same without the number of the sample.
_UNNUMBERED = pa.schema([column for column in SCHEMA if column.name != "sample"])
SCHEMAS = {b"1": _UNNUMBERED, VERSION: SCHEMA}
SHARD_NAME = re.compile(r"shard-(\d{5,})\.parquet")
SCRATCH_SUFFIX = ".tmp"


class RecordsError(ValueError):
    """Records that cannot be read or written as asked."""


class DamagedShardError(RecordsError):
    """A shard that is not a whole Parquet file of records."""


def run_of_shard(shard: Path) -> dict[str, Any] | None:
    """What the records of a shard depend on; None in shards that do not say it."""
    with opened(shard) as file:
        run = (file.schema_arrow.metadata or {}).get(RUN_KEY)
    return None if run is None else dict(json.loads(run))


def write_shard(table: pa.Table, path: Path) -> None:
    """Write a shard, whole or not at all."""
    scratch = path.with_name(path.name + SCRATCH_SUFFIX)
    try:
        with scratch.open("wb") as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def shards_of(folder: str | Path) -> list[Path]:
    """The shards of a folder in the order of writing; none where there is no folder."""
    try:
        found = [path for path in Path(folder).iterdir() if SHARD_NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RecordsError(
            f"{folder}: expected a folder that can be read, got {error}. Change its permissions, "
            "or give another folder."
        ) from error
    return sorted(found, key=number_of)


def number_of(shard: Path) -> int:
    """A shard's number."""
    return int(shard.stem.removeprefix("shard-"))


def read_shard(shard: Path) -> pa.Table:
    """The rows of a shard."""
    with opened(shard) as file:
        return file.read()


def count_rows(shard: Path) -> int:
    """How many rows a shard has, from its footer alone."""
    with opened(shard) as file:
        return int(file.metadata.num_rows)


@contextmanager
def opened(shard: Path) -> Iterator[pq.ParquetFile]:
    """A shard that can be read.

    Raises:
        DamagedShardError: It is damaged, or has other columns.
        RecordsError: Its version is not known.
    """
    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            _check_schema(shard, file.schema_arrow)
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedShardError(
            f"{shard}: expected a whole shard of records, but it is damaged or cut off ({error}). "
            "Restore it from a copy, or move it out of the folder: `collect` draws it again."
        ) from error


def _check_schema(shard: Path, schema: pa.Schema) -> None:
    version = (schema.metadata or {}).get(VERSION_KEY)
    known = None if version is None else SCHEMAS.get(version)
    if version is None or known is None:
        got = "no version" if version is None else f"version {version.decode(errors='replace')}"
        raise RecordsError(
            f"{shard}: expected records of version {VERSION.decode()}, got {got}. Read it with "
            "the release of mbrl-text-env that wrote it, or move it out of the folder."
        )
    if not schema.equals(known):
        raise DamagedShardError(
            f"{shard}: expected the columns of version {version.decode()} ({known.names}), got "
            f"{schema.names} or other types. Restore it from a copy, or move it out of the folder."
        )


def damage(shards: Sequence[Path]) -> RecordsError:
    """The error that names the damaged shards, and how many records the others hold."""
    rows, damaged = 0, []
    for shard in shards:
        try:
            rows += read_shard(shard).num_rows
        except DamagedShardError as error:
            damaged.append(str(error))
    return RecordsError(
        f"{' '.join(damaged)} The sound shards hold {rows} records; `skip_damaged=True` reads "
        "these."
    )


def what_is(path: Path) -> str:
    """What stands at a path, in words."""
    try:
        if path.is_dir():
            return "a folder"
        return "a file" if path.exists() else "not there"
    except OSError:
        return "out of reach"

"""The package's spaces in Gymnasium's functions for spaces, and in Minari's where it is installed.

A chunk is flattened to int64[C], padded with `vocab_size`; a text to int32[flat_length], its code
points padded with 1,114,112, which is no character. Shared memory holds the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing as mp
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.spaces import utils
from gymnasium.vector.utils import shared_memory
from gymnasium.wrappers.utils import create_zero_array

from mbrl_text_env.mdp import ChunkRules
from mbrl_text_env.spaces import ChunkSpace, UnicodeText

_NO_CHARACTER = 0x110000


def _padding(space: ChunkSpace | UnicodeText) -> int:
    return space.rules.vocab_size if isinstance(space, ChunkSpace) else _NO_CHARACTER


def _size(space: ChunkSpace | UnicodeText) -> int:
    return space.rules.max_chunk_tokens if isinstance(space, ChunkSpace) else space.flat_length


def _dtype(space: ChunkSpace | UnicodeText) -> type[np.int32] | type[np.int64]:
    return np.int64 if isinstance(space, ChunkSpace) else np.int32


def _numbers(space: ChunkSpace | UnicodeText, x: Any) -> npt.NDArray[Any]:
    """An element as an array that is as long as it is."""
    if isinstance(space, ChunkSpace):
        return np.asarray(x, dtype=np.int64)
    if len(x) > space.flat_length:
        raise ValueError(
            f"Expected a text of at most {space.flat_length} characters, got {len(x)}: flattened "
            "texts and shared memory have no room for more. Use observation='tokens', or "
            "AsyncVectorEnv with shared_memory=False."
        )
    return np.fromiter(map(ord, x), np.int32, len(x))


def _element(space: ChunkSpace | UnicodeText, row: npt.NDArray[Any]) -> Any:
    ends = np.flatnonzero(row == _padding(space))
    used = row[: ends[0]] if ends.size else row
    return used.copy() if isinstance(space, ChunkSpace) else "".join(map(chr, used.tolist()))


def _flatdim(space: ChunkSpace | UnicodeText) -> int:
    return _size(space)


def _flatten_space(space: ChunkSpace | UnicodeText) -> spaces.Box:
    return spaces.Box(0, _padding(space), (_size(space),), _dtype(space))


def _flatten(space: ChunkSpace | UnicodeText, x: Any) -> npt.NDArray[Any]:
    row = np.full(_size(space), _padding(space), dtype=_dtype(space))
    numbers = _numbers(space, x)
    row[: len(numbers)] = numbers
    return row


def _unflatten(space: ChunkSpace | UnicodeText, x: npt.NDArray[Any]) -> Any:
    return _element(space, np.asarray(x, dtype=_dtype(space)))


def _is_equivalent(space_1: Any, space_2: Any) -> bool:
    return bool(space_1 == space_2)


def _zero(space: ChunkSpace | UnicodeText) -> Any:
    return np.zeros(1, dtype=np.int64) if isinstance(space, ChunkSpace) else ""


def _create_shared(space: ChunkSpace | UnicodeText, n: int = 1, ctx: Any = mp) -> Any:
    shared = ctx.Array(np.dtype(_dtype(space)).char, n * _size(space))
    _rows(space, shared)[:] = _padding(space)
    return shared


class _SharedElements(Sequence[Any]):
    """Elements in shared memory as they are now; a copy of it is a tuple that stays.

    Gymnasium reads shared memory once, and from then on copies what it got.
    """

    def __init__(self, space: ChunkSpace | UnicodeText, rows: npt.NDArray[Any]) -> None:
        self._space, self._all = space, rows

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: Any) -> Any:
        return _element(self._space, self._all[index])

    def __deepcopy__(self, memo: Any) -> tuple[Any, ...]:
        return tuple(self)


def _read_shared(space: ChunkSpace | UnicodeText, shared: Any, n: int = 1) -> Any:
    return _SharedElements(space, _rows(space, shared))


def _write_shared(space: ChunkSpace | UnicodeText, index: int, value: Any, shared: Any) -> None:
    numbers, row = _numbers(space, value), _rows(space, shared)[index]
    row[: len(numbers)] = numbers
    row[len(numbers) : len(numbers) + 1] = _padding(space)


def _rows(space: ChunkSpace | UnicodeText, shared: Any) -> npt.NDArray[Any]:
    return np.frombuffer(shared.get_obj(), dtype=_dtype(space)).reshape(-1, _size(space))


def _register_with_minari() -> None:
    minari = importlib.import_module("minari.serialization")

    def as_text(space: UnicodeText, to_string: bool = True) -> Any:
        row = {"type": "UnicodeText", "max_length": space.max_length}
        return json.dumps(row) if to_string else row

    def as_chunk(space: ChunkSpace, to_string: bool = True) -> Any:
        rules = space.rules
        row = {
            "type": "ChunkSpace",
            "vocab_size": rules.vocab_size,
            "stop_token_ids": sorted(rules.stop_token_ids),
            "max_chunk_tokens": rules.max_chunk_tokens,
        }
        return json.dumps(row) if to_string else row

    minari.serialize_space.register(UnicodeText, as_text)
    minari.serialize_space.register(ChunkSpace, as_chunk)
    minari.deserialize_space.register("UnicodeText")(lambda row: UnicodeText(row["max_length"]))
    minari.deserialize_space.register("ChunkSpace")(
        lambda row: ChunkSpace(
            ChunkRules(row["vocab_size"], frozenset(row["stop_token_ids"]), row["max_chunk_tokens"])
        )
    )


_KINDS: tuple[Any, ...] = (ChunkSpace, UnicodeText)
for _kind in _KINDS:
    utils.flatdim.register(_kind, _flatdim)
    utils.flatten_space.register(_kind, _flatten_space)
    utils.flatten.register(_kind, _flatten)
    utils.unflatten.register(_kind, _unflatten)
    utils.is_space_dtype_shape_equiv.register(_kind, _is_equivalent)
    create_zero_array.register(_kind, _zero)
    shared_memory.create_shared_memory.register(_kind, _create_shared)
    shared_memory.read_from_shared_memory.register(_kind, _read_shared)
    shared_memory.write_to_shared_memory.register(_kind, _write_shared)

if importlib.util.find_spec("minari") is not None:
    _register_with_minari()

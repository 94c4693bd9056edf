"""Gymnasium spaces for chunks of tokens and for Unicode text.

Both support Gymnasium's space utilities, and Minari's if Minari is installed. A chunk is flattened
to int64[C], padded with `vocab_size`. A text is flattened to int32[at most 65,536] code points,
padded with 1,114,112, which is not a character. Shared memory uses the same layout.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing as mp
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.spaces import utils
from gymnasium.vector.utils import shared_memory
from gymnasium.wrappers.utils import create_zero_array

from mbrl_text_env.mdp import ChunkRules, as_token_ids
from mbrl_text_env.types import check_positive


class _Flat:
    """A space whose elements become `flat_length` numbers, padded with `padding`."""

    flat_length: int
    padding: int
    zero: Any

    @property
    def is_np_flattenable(self) -> bool:
        return True

    def _refuse_masks(self, *masks: Any) -> None:
        if any(mask is not None for mask in masks):
            raise ValueError(f"{type(self).__name__}.sample takes no mask.")


class ChunkSpace(_Flat, gym.Space[npt.NDArray[np.int64]]):
    """Chunks of 1 to C token ids, with a stop token only in the last position.

    Elements are int64[n]; `contains` also accepts lists and tuples of ints. `sample` draws the
    length uniformly from 1 to C, the last token from all tokens, and the others from non-stop ones.

    Raises:
        ValueError: C or the vocabulary size is below 1.

    Example:
        >>> space = ChunkSpace(ChunkRules(10, frozenset({0}), max_chunk_tokens=4))
        >>> [5, 3, 0] in space, [0, 3] in space
        (True, False)
    """

    flat_dtype = np.int64
    zero = (0,)

    def __init__(self, rules: ChunkRules, seed: int | np.random.Generator | None = None) -> None:
        check_positive(max_chunk_tokens=rules.max_chunk_tokens, vocab_size=rules.vocab_size)
        self.rules = rules
        self.flat_length, self.padding = rules.max_chunk_tokens, rules.vocab_size
        super().__init__(None, np.int64, seed)

    def numbers(self, x: Any) -> npt.NDArray[Any]:
        """A chunk as an array, int64[n], without padding."""
        return np.asarray(x, dtype=np.int64)

    def element(self, numbers: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """The inverse of `numbers`."""
        return numbers.copy()

    def sample(self, mask: None = None, probability: None = None) -> npt.NDArray[np.int64]:
        """Sample a chunk, int64[n]. A mask raises a ValueError."""
        self._refuse_masks(mask, probability)
        rules = self.rules
        length = int(self.np_random.integers(1, rules.max_chunk_tokens + 1))
        ordinary = rules.vocab_size - len(rules.stop_token_ids)
        head = self.np_random.integers(ordinary, size=length - 1) if ordinary else np.empty(0, int)
        for stop in sorted(rules.stop_token_ids):
            head += head >= stop  # skip the stop ids
        return np.append(head, self.np_random.integers(rules.vocab_size)).astype(np.int64)

    def contains(self, x: Any) -> bool:
        """Whether `x` is a chunk (an integer array of one axis, or a list or tuple of ints)."""
        ids = as_token_ids(x)
        return ids is not None and self.rules.fault(ids) is None

    def to_jsonable(self, sample_n: Iterable[npt.NDArray[np.int64]]) -> list[list[int]]:
        """Convert chunks to lists of ints."""
        return [np.asarray(chunk).tolist() for chunk in sample_n]

    def from_jsonable(self, sample_n: list[Any]) -> list[npt.NDArray[np.int64]]:
        """Convert lists of ints to chunks."""
        return [self.numbers(chunk) for chunk in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChunkSpace) and self.rules == other.rules

    def __repr__(self) -> str:
        rules = self.rules
        stops = sorted(rules.stop_token_ids)
        return f"ChunkSpace({rules.vocab_size}, stop={stops}, max_tokens={rules.max_chunk_tokens})"


class UnicodeText(_Flat, spaces.Text):
    """Strings of 0 to `max_length` Unicode characters.

    `gymnasium.spaces.Text` has a fixed character set and excludes the empty string by default.
    """

    # Letters, digits and white space of several scripts; sampling need not reach all of Unicode.
    _CHARACTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFG 0123456789 .,;:!?'\n äöüßéñ Жя 日本語 🙂"
    flat_dtype = np.int32
    padding = 0x110000
    zero = ""

    def __init__(self, max_length: int, seed: int | np.random.Generator | None = None) -> None:
        if max_length < 0:
            raise ValueError(f"Expected max_length of at least 0, got {max_length}.")
        self.flat_length = min(max_length, 2**16)
        super().__init__(max_length, min_length=0, charset=self._CHARACTERS, seed=seed)

    def numbers(self, x: str) -> npt.NDArray[Any]:
        """The code points of a text; ValueError if there are more than `flat_length`."""
        if len(x) > self.flat_length:
            raise ValueError(
                f"Expected a text of at most {self.flat_length} characters, got {len(x)}: "
                "flattened texts and shared memory have no room for more. Use "
                "observation='tokens', or AsyncVectorEnv with shared_memory=False."
            )
        return np.fromiter(map(ord, x), np.int32, len(x))

    def element(self, numbers: npt.NDArray[Any]) -> str:
        """The inverse of `numbers`."""
        return "".join(map(chr, numbers.tolist()))

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Sample a string of at most 32 characters. A mask raises a ValueError."""
        self._refuse_masks(mask, probability)
        length = int(self.np_random.integers(0, min(self.max_length, 32) + 1))
        return "".join(self.np_random.choice(list(self._CHARACTERS), length))

    def contains(self, x: Any) -> bool:
        """Whether `x` is a string of at most `max_length` characters."""
        return isinstance(x, str) and len(x) <= self.max_length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnicodeText) and self.max_length == other.max_length

    def __repr__(self) -> str:
        return f"UnicodeText({self.max_length})"


def padded_chunk_space(rules: ChunkRules) -> spaces.MultiDiscrete:
    """Chunks as arrays of a fixed length, int64[C], for libraries without custom spaces.

    A chunk ends before the first `vocab_size`, which is the padding, and after the first stop
    token; later ids are ignored. The first id cannot be padding, so each element of the space is a
    chunk. `gymnasium.spaces.flatten(ChunkSpace(rules), chunk)` is the padded form of a chunk.
    """
    sizes = np.full(rules.max_chunk_tokens, rules.vocab_size + 1)
    sizes[0] = rules.vocab_size
    return spaces.MultiDiscrete(sizes)


_Space = ChunkSpace | UnicodeText


def _padded(space: _Space, x: Any) -> npt.NDArray[Any]:
    row = np.full(space.flat_length, space.padding, dtype=space.flat_dtype)
    numbers = space.numbers(x)
    row[: len(numbers)] = numbers
    return row


def _unpadded(space: _Space, x: Any) -> Any:
    row = np.asarray(x, dtype=space.flat_dtype)
    ends = np.flatnonzero(row == space.padding)
    return space.element(row[: ends[0]] if ends.size else row)


def _create_shared(space: _Space, n: int = 1, ctx: Any = mp) -> Any:
    shared = ctx.Array(np.dtype(space.flat_dtype).char, n * space.flat_length)
    _rows(space, shared)[:] = space.padding
    return shared


class _SharedElements(Sequence[Any]):
    """A live view of elements in shared memory; a deep copy is a fixed tuple.

    Gymnasium reads shared memory once and copies the result after each step.
    """

    def __init__(self, space: _Space, shared: Any, n: int = 1) -> None:
        self._space, self._all = space, _rows(space, shared)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: Any) -> Any:
        return _unpadded(self._space, self._all[index])

    def __deepcopy__(self, memo: Any) -> tuple[Any, ...]:
        return tuple(self)


def _write_shared(space: _Space, index: int, value: Any, shared: Any) -> None:
    numbers, row = space.numbers(value), _rows(space, shared)[index]
    row[: len(numbers)] = numbers
    row[len(numbers) : len(numbers) + 1] = space.padding


def _rows(space: _Space, shared: Any) -> npt.NDArray[Any]:
    return np.frombuffer(shared.get_obj(), dtype=space.flat_dtype).reshape(-1, space.flat_length)


_FUNCTIONS: dict[Any, Any] = {
    utils.flatdim: lambda space: space.flat_length,
    utils.flatten_space: lambda space: spaces.Box(
        0, space.padding, (space.flat_length,), space.flat_dtype
    ),
    utils.flatten: _padded,
    utils.unflatten: _unpadded,
    utils.is_space_dtype_shape_equiv: operator.eq,
    create_zero_array: lambda space: space.element(space.numbers(space.zero)),
    shared_memory.create_shared_memory: _create_shared,
    shared_memory.read_from_shared_memory: _SharedElements,
    shared_memory.write_to_shared_memory: _write_shared,
}
for _kind in (ChunkSpace, UnicodeText):
    for _of_gymnasium, _of_ours in _FUNCTIONS.items():
        _of_gymnasium.register(_kind, _of_ours)


def _register_with_minari() -> None:
    minari = importlib.import_module("minari.serialization")

    def serialize(space: _Space, to_string: bool = True) -> Any:
        row: dict[str, Any] = {"type": type(space).__name__}
        if isinstance(space, ChunkSpace):
            row |= {**vars(space.rules), "stop_token_ids": sorted(space.rules.stop_token_ids)}
        else:
            row["max_length"] = space.max_length
        return json.dumps(row) if to_string else row

    def chunk_space(row: dict[str, Any]) -> ChunkSpace:
        stops = frozenset(row["stop_token_ids"])
        return ChunkSpace(ChunkRules(row["vocab_size"], stops, row["max_chunk_tokens"]))

    minari.serialize_space.register(UnicodeText, serialize)
    minari.serialize_space.register(ChunkSpace, serialize)
    minari.deserialize_space.register("UnicodeText")(lambda row: UnicodeText(row["max_length"]))
    minari.deserialize_space.register("ChunkSpace")(chunk_space)


if importlib.util.find_spec("minari") is not None:
    _register_with_minari()

"""Keys and values: of prefixes that are kept, and of the sequences that are being decoded."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import psutil
import torch

_MOST_KV_BYTES = 4 * 2**30


@dataclass(frozen=True)
class KVShape:
    """What a network keeps of a token.

    Args:
        layers: (heads, key size, value size) of each layer.
        hidden_size: Length of the last hidden state.
        dtype: Of keys and values.
        device: Where they are.
        hidden_dtype: Of hidden states; by default that of keys and values.
    """

    layers: tuple[tuple[int, int, int], ...]
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    hidden_dtype: torch.dtype | None = None

    @property
    def groups(self) -> dict[tuple[int, int], int]:
        """Number of keys and values of each (heads, size); most networks have one kind."""
        counts: dict[tuple[int, int], int] = {}
        for heads, *sizes in self.layers:
            for size in sizes:
                counts[heads, size] = counts.get((heads, size), 0) + 1
        return counts

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys, values and hidden state."""
        numbers = sum(heads * (key + value) for heads, key, value in self.layers)
        hidden = self.hidden_size * (self.hidden_dtype or self.dtype).itemsize
        return numbers * self.dtype.itemsize + hidden

    def places(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Group and index of the key and of the value of each layer: ((group, i), (group, j))."""
        names = list(self.groups)
        used = [0] * len(names)
        found = []
        for heads, *sizes in self.layers:
            pair = []
            for size in sizes:
                group = names.index((heads, size))
                pair.append((group, used[group]))
                used[group] += 1
            found.append((pair[0], pair[1]))
        return found


@dataclass(frozen=True)
class Span:
    """Groups [count, heads, tokens, size] and hidden states [tokens, hidden_size] of tokens."""

    groups: tuple[torch.Tensor, ...]
    hidden: torch.Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (*self.groups, self.hidden))

    def part(self, start: int, end: int) -> Span:
        """A copy of some of the tokens, which does not keep the rest in memory."""
        return Span(
            tuple(group[:, :, start:end].clone() for group in self.groups),
            self.hidden[start:end].clone(),
        )

    def view(self, start: int, end: int) -> Span:
        """Some of the tokens, without copying."""
        return Span(tuple(group[:, :, start:end] for group in self.groups), self.hidden[start:end])


class KVBatch:
    """Preallocated keys and values of the rows of a batch, all of which end at one column.

    Row r fills the columns from `starts[r]` to `columns`. A step writes one column for all rows, so
    nothing is concatenated or scattered; a row that leaves is replaced by the last one.

    Args:
        shape: What is kept of a token.
        rows: Most rows.
        capacity: Most columns.

    Attributes:
        size: Rows in use.
        columns: Columns in use.
        capacity: Columns that may be used; at most those that there are.
    """

    def __init__(self, shape: KVShape, rows: int, capacity: int) -> None:
        self.shape = shape
        self.allocated = rows, capacity
        self.capacity = capacity
        make = functools.partial(torch.empty, dtype=shape.dtype, device=shape.device)
        self.groups = [
            make((count, rows, heads, capacity, size))
            for (heads, size), count in shape.groups.items()
        ]
        hidden_dtype = shape.hidden_dtype or shape.dtype
        self.hidden = make((rows, capacity, shape.hidden_size), dtype=hidden_dtype)
        self.bias = make((rows, capacity))
        self.starts = np.zeros(rows, dtype=np.int64)
        self.columns = 0
        self.size = 0
        self._places = shape.places()

    def clear(self, columns: int, capacity: int) -> None:
        """Leave all rows; new ones end at `columns` and may grow to `capacity` columns."""
        self.size, self.columns, self.capacity = 0, columns, capacity

    def lengths(self) -> npt.NDArray[np.int64]:
        """int64[size]: tokens of each row."""
        return self.columns - self.starts[: self.size]

    def add(self, length: int, spans: Sequence[Span]) -> int:
        """A new row of `length` tokens, the first of them given; returns its index."""
        row = self.size
        start = self.columns - length
        assert start >= 0, "a row is longer than the batch has columns"
        self.size += 1
        self._open(row, start)
        for span in spans:
            end = start + len(span)
            for mine, theirs in zip(self.groups, span.groups, strict=True):
                mine[:, row, :, start:end] = theirs
            self.hidden[row, start:end] = span.hidden
            start = end
        return row

    def copy(self, row: int) -> int:
        """A new row with the contents of another; returns its index."""
        new = self.size
        self.size += 1
        self._move(row, new)
        return new

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        self.size -= 1
        if row != self.size:
            self._move(self.size, row)

    def read(self, row: int, first: int, last: int) -> Span:
        """A copy of the row's tokens `first` to `last` (exclusive), counted from its start."""
        start = int(self.starts[row])
        columns = slice(start + first, start + last)
        return Span(
            tuple(group[:, row, :, columns].clone() for group in self.groups),
            self.hidden[row, columns].clone(),
        )

    def shift(self) -> None:
        """Drop the columns that all rows have left empty."""
        empty = int(self.starts[: self.size].min(initial=self.columns))
        if not empty:
            return
        rows, end = slice(self.size), self.columns
        for group in self.groups:
            # In pieces: source and target overlap.
            for part in group:
                part[rows, :, : end - empty] = part[rows, :, empty:end].clone()
        self.hidden[rows, : end - empty] = self.hidden[rows, empty:end].clone()
        self.columns -= empty
        for row in range(self.size):
            self._open(row, int(self.starts[row]) - empty)

    def window(
        self, rows: slice, start: int, end: int, valid: torch.Tensor | None = None
    ) -> KVWindow:
        """Where a forward pass over the columns `start` to `end` of some rows reads and writes."""
        return KVWindow(self, rows, start, end, valid)

    def _open(self, row: int, start: int) -> None:
        self.starts[row] = start
        # What is masked is still multiplied, by zero: it has to be a number.
        for group in self.groups:
            group[:, row, :, :start] = 0
        self.bias[row, :start] = -torch.inf
        self.bias[row, start:] = 0

    def _move(self, source: int, target: int) -> None:
        self.starts[target] = self.starts[source]
        self.bias[target] = self.bias[source]
        columns = slice(self.columns)
        for group in self.groups:
            group[:, target, :, columns] = group[:, source, :, columns]
        self.hidden[target, columns] = self.hidden[source, columns]


class KVWindow:
    """The keys and values that one forward pass reads, and the columns of them that it writes.

    Args:
        batch: The keys and values.
        rows: Rows of the pass.
        start: First column that is written.
        end: Last one, exclusive; everything before it is read.
        valid: bool[rows, width]: where something is written; None for everywhere.
    """

    def __init__(
        self, batch: KVBatch, rows: slice, start: int, end: int, valid: torch.Tensor | None
    ) -> None:
        self.batch, self.rows, self.start, self.end, self.valid = batch, rows, start, end, valid
        self._bias: dict[int | None, torch.Tensor] = {}

    def update(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new keys and values, [rows, heads, width, size]; return all of them."""
        found = []
        for new, (group, index) in zip((key, value), self.batch._places[layer], strict=True):
            stored = self.batch.groups[group][index, self.rows, :, : self.end]
            target = stored[:, :, self.start :]
            if self.valid is not None:
                new = torch.where(self.valid[:, None, :, None], new.to(target.dtype), target)
            target.copy_(new)
            found.append(stored)
        return found[0], found[1]

    def write_hidden(self, hidden: torch.Tensor) -> None:
        """Keep the last hidden states, [rows, width, hidden_size]."""
        target = self.batch.hidden[self.rows, self.start : self.end]
        if self.valid is not None:
            hidden = torch.where(self.valid[:, :, None], hidden, target)
        target.copy_(hidden)

    def bias(self, sliding_window: int | None = None) -> torch.Tensor:
        """[rows, 1, width, end]: 0 where a query sees a key, minus infinity elsewhere.

        Args:
            sliding_window: Number of keys seen, the query's own included; None for all before it.
        """
        if sliding_window not in self._bias:
            self._bias[sliding_window] = self._make_bias(sliding_window)
        return self._bias[sliding_window]

    def _make_bias(self, sliding_window: int | None) -> torch.Tensor:
        bias = self.batch.bias[self.rows, None, None, : self.end]
        width = self.end - self.start
        if width == 1 and (sliding_window is None or sliding_window >= self.end):
            return bias
        columns = torch.arange(self.end, device=bias.device)
        distance = columns[self.start :, None] - columns
        hidden = distance < 0
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        bias = bias.masked_fill(hidden, -torch.inf)
        # A query in the padding sees itself: a row of nothing but minus infinity has no softmax.
        return bias.masked_fill(distance == 0, 0.0)


def free_share(device: torch.device) -> int:
    """A quarter of the memory that is free, at most 4 GiB."""
    is_cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if is_cuda else psutil.virtual_memory().available
    return max(1, min(free // 4, _MOST_KV_BYTES))


def return_free_memory() -> None:
    """Give freed memory back to the system: glibc keeps what lies between pieces in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)

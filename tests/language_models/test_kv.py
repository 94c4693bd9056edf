"""Preallocated keys and values against a list of tokens for each row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env.language_models.networks import KVBatch, KVShape, KVWindow, Span

# Two layers of different heads and sizes; keys are wider than values in the second one.
SHAPE = KVShape(((2, 3, 3), (1, 4, 2)), 5, torch.float32, torch.device("cpu"))
ROWS, CAPACITY = 4, 12
NAN = float("nan")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def span(numbers: Sequence[int], shape: KVShape = SHAPE) -> Span:
    """Keys and values that tell the token's number, its group, key, head and channel."""
    tokens = torch.tensor(list(numbers), dtype=torch.float32)
    groups = []
    for place, ((heads, size), count) in enumerate(shape.groups.items()):
        channels = torch.arange(count * heads * size, dtype=torch.float32) / 100
        parts = channels.view(count, heads, 1, size) + 10 * place + 100 * tokens[:, None]
        groups.append(parts.to(shape.dtype))
    hidden = 100 * tokens[:, None] + torch.arange(shape.hidden_size) / 100
    return Span(tuple(groups), hidden.to(shape.hidden_dtype or shape.dtype))


def layers(part: Span, shape: KVShape = SHAPE) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Key and value of each layer, [heads, tokens, size]."""
    return [
        (part.groups[key[0]][key[1]], part.groups[value[0]][value[1]])
        for key, value in shape.places()
    ]


def assert_equal(found: Span, expected: Span) -> None:
    assert len(found) == len(expected)
    pairs = zip((*found.groups, found.hidden), (*expected.groups, expected.hidden), strict=True)
    for mine, theirs in pairs:
        assert torch.equal(mine, theirs)


def poisoned(rows: int = ROWS, capacity: int = CAPACITY, shape: KVShape = SHAPE) -> KVBatch:
    """A batch whose fresh memory holds NaN, as memory may."""
    batch = KVBatch(shape, rows, capacity)
    for tensor in (*batch.groups, batch.hidden, batch.bias):
        tensor.fill_(NAN)
    return batch


@dataclass
class Reference:
    """A batch and what its rows should hold."""

    batch: KVBatch = field(default_factory=poisoned)
    rows: list[list[int]] = field(default_factory=list)
    used: int = 0

    def fresh(self, count: int) -> list[int]:
        self.used += count
        return list(range(self.used - count, self.used))

    def add(self, length: int, known: Sequence[int]) -> None:
        numbers = self.fresh(length)
        bounds = [0, *sorted(min(length, k) for k in known)]
        spans = [span(numbers[a:b]) for a, b in itertools.pairwise(bounds)]
        assert self.batch.add(length, spans) == len(self.rows)
        row = len(self.rows)
        self.rows.append(numbers)
        first = bounds[-1]
        if first < length:
            end = self.batch.columns
            self.write(slice(row, row + 1), end - length + first, end, [numbers[first:]])

    def write(self, rows: slice, start: int, end: int, numbers: list[list[int]]) -> None:
        window = KVWindow(self.batch, rows, start, end)
        parts = [span(row) for row in numbers]
        for layer in range(len(SHAPE.layers)):
            keys, values = zip(*(layers(part)[layer] for part in parts), strict=True)
            window.update(torch.stack(keys), torch.stack(values), layer)
        window.write_hidden(torch.stack([part.hidden for part in parts]))

    def append(self) -> None:
        batch = self.batch
        if batch.columns == batch.capacity:
            batch.shift()
        if batch.columns == batch.capacity or not self.rows:
            return
        batch.columns += 1
        new = [self.fresh(1) for _ in self.rows]
        self.write(slice(0, batch.size), batch.columns - 1, batch.columns, new)
        self.rows = [row + token for row, token in zip(self.rows, new, strict=True)]

    def check(self) -> None:
        batch = self.batch
        assert batch.size == len(self.rows)
        assert batch.lengths().tolist() == [len(row) for row in self.rows]
        assert batch.columns <= batch.capacity
        for row, numbers in enumerate(self.rows):
            length = len(numbers)
            assert_equal(batch.read(row, 0, length), span(numbers))
            part = slice(length // 3, length - length // 4)
            assert_equal(batch.read(row, part.start, part.stop), span(numbers[part]))
            start = batch.columns - length
            assert torch.equal(batch.bias[row, :start], torch.full((start,), -torch.inf))
            assert not batch.bias[row, start : batch.columns].any()
            for group in batch.groups:
                assert group[:, row, :, : batch.columns].isfinite().all()


steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "append", "append", "copy", "drop", "shift", "clear"]),
        st.integers(0, 100),
        st.lists(st.integers(0, CAPACITY), max_size=3),
    ),
    min_size=6,
    max_size=30,
)


@settings(max_examples=100)
@given(st.integers(1, CAPACITY), steps)
def test_rows_hold_what_was_written_to_them(columns, steps):
    reference = Reference()
    reference.batch.clear(columns, CAPACITY)
    for kind, number, known in steps:
        batch, rows = reference.batch, reference.rows
        if kind == "add" and len(rows) < ROWS and batch.columns:
            reference.add(1 + number % batch.columns, known)
        elif kind == "append":
            reference.append()
        elif kind == "copy" and 0 < len(rows) < ROWS:
            assert batch.copy(number % len(rows)) == len(rows)
            rows.append(rows[number % len(rows)])
        elif kind == "drop" and rows:
            row = number % len(rows)
            batch.drop(row)
            last = rows.pop()
            if row < len(rows):
                rows[row] = last
        elif kind == "shift":
            batch.shift()
            assert batch.columns == max(map(len, rows), default=0)
            if not rows:
                batch.clear(columns, CAPACITY)
        elif kind == "clear":
            batch.clear(columns, CAPACITY)
            rows.clear()
        reference.check()


def test_the_last_row_takes_the_place_of_one_that_leaves():
    batch = poisoned()
    batch.clear(5, CAPACITY)
    for length in (5, 3, 4):
        batch.add(length, [span(range(10 * length, 10 * length + length))])
    assert batch.copy(1) == 3
    batch.drop(0)
    assert batch.lengths().tolist() == [3, 3, 4]
    assert_equal(batch.read(0, 0, 3), span([30, 31, 32]))
    batch.drop(1)
    batch.drop(0)
    assert batch.lengths().tolist() == [4]
    assert_equal(batch.read(0, 0, 4), span([40, 41, 42, 43]))
    assert batch.bias[0, :5].tolist() == [-torch.inf, 0, 0, 0, 0]


def test_what_is_read_is_a_copy():
    batch = KVBatch(SHAPE, 2, 4)
    batch.clear(3, 4)
    batch.add(3, [span([1, 2, 3])])
    read = batch.read(0, 0, 3)
    for tensor in (*batch.groups, batch.hidden):
        tensor.zero_()
    assert_equal(read, span([1, 2, 3]))
    assert read.nbytes == 3 * SHAPE.bytes_per_token


def test_a_row_longer_than_the_columns():
    batch = KVBatch(SHAPE, 2, 4)
    batch.clear(3, 4)
    with pytest.raises(AssertionError, match="longer than the batch has columns"):
        batch.add(4, [])


class TestSpan:
    def test_a_part_is_a_copy_and_a_view_is_none(self):
        whole = span(range(6))
        part, view = whole.part(1, 4), whole.view(1, 4)
        for tensor in (*whole.groups, whole.hidden):
            tensor.add_(1)
        assert_equal(part, span([1, 2, 3]))
        torch.testing.assert_close(view.hidden, part.hidden + 1)
        assert part.hidden.untyped_storage().nbytes() == 3 * SHAPE.hidden_size * 4

    def test_its_bytes(self):
        assert span(range(6)).nbytes == 6 * SHAPE.bytes_per_token
        assert span(range(6)).view(2, 4).nbytes == 2 * SHAPE.bytes_per_token
        assert len(span(range(6)).part(2, 5)) == 3


class TestShape:
    def test_equal_sizes_are_one_group(self):
        shape = KVShape(((2, 8, 8),) * 3, 32, torch.float32, torch.device("cpu"))
        assert shape.groups == {(2, 8): 6}
        assert shape.places() == [((0, 0), (0, 1)), ((0, 2), (0, 3)), ((0, 4), (0, 5))]

    def test_different_sizes_are_groups_of_their_own(self):
        layers = ((2, 3, 3), (1, 4, 2), (1, 4, 4), (2, 4, 3))
        shape = KVShape(layers, 5, torch.float32, torch.device("cpu"))
        assert shape.groups == {(2, 3): 3, (1, 4): 3, (1, 2): 1, (2, 4): 1}
        assert shape.places() == [
            ((0, 0), (0, 1)),
            ((1, 0), (2, 0)),
            ((1, 1), (1, 2)),
            ((3, 0), (0, 2)),
        ]

    @pytest.mark.parametrize(
        ("dtype", "hidden_dtype", "expected"),
        [
            (torch.float32, None, 4 * (12 + 6 + 5)),
            (torch.bfloat16, None, 2 * (12 + 6 + 5)),
            (torch.bfloat16, torch.float32, 2 * (12 + 6) + 4 * 5),
        ],
    )
    def test_bytes_of_a_token(self, dtype, hidden_dtype, expected):
        shape = KVShape(SHAPE.layers, 5, dtype, torch.device("cpu"), hidden_dtype)
        assert shape.bytes_per_token == expected
        assert span([1, 2], shape).nbytes == 2 * expected
        batch = KVBatch(shape, 3, 7)
        tensors = (*batch.groups, batch.hidden)
        assert sum(tensor.nbytes for tensor in tensors) == 3 * 7 * expected


class TestWindow:
    def batch(self, *lengths: int, columns: int = 6) -> KVBatch:
        batch = poisoned()
        batch.clear(columns, CAPACITY)
        for i, length in enumerate(lengths):
            batch.add(length, [span(range(10 * i, 10 * i + length))])
        return batch

    def test_an_update_returns_old_and_new(self):
        batch = self.batch(6, 4, 2)
        batch.columns += 2
        new = [span([70, 71]), span([80, 81])]
        window = KVWindow(batch, slice(1, 3), 6, 8)
        for layer in range(2):
            keys, values = zip(*(layers(part)[layer] for part in new), strict=True)
            found = window.update(torch.stack(keys), torch.stack(values), layer)
            for place, start, numbers in ((0, 2, range(10, 14)), (1, 4, range(20, 22))):
                ids = [*numbers, *((70, 71) if place == 0 else (80, 81))]
                for mine, theirs in zip(found, layers(span(ids))[layer], strict=True):
                    assert mine.shape[2] == 8
                    assert torch.equal(mine[place, :, start:], theirs)
                    assert not mine[place, :, :start].any()
        assert_equal(batch.read(0, 0, 6), span(range(6)))

    def test_where_it_is_not_valid_everything_stays(self):
        batch = self.batch(6, 4, 2)
        valid = torch.tensor([[True, True], [False, True], [False, False]])
        window = KVWindow(batch, slice(0, 3), 4, 6, valid)
        new = [span([50, 51]), span([60, 61]), span([70, 71])]
        for layer in range(2):
            keys, values = zip(*(layers(part)[layer] for part in new), strict=True)
            window.update(torch.stack(keys), torch.stack(values), layer)
        window.write_hidden(torch.stack([part.hidden for part in new]))
        assert_equal(batch.read(0, 0, 6), span([0, 1, 2, 3, 50, 51]))
        assert_equal(batch.read(1, 0, 4), span([10, 11, 12, 61]))
        assert_equal(batch.read(2, 0, 2), span([20, 21]))

    def seen(self, bias: torch.Tensor) -> list[list[str]]:
        assert bias.dim() == 4
        assert bias.shape[1] == 1
        assert set(bias.unique().tolist()) <= {0.0, -torch.inf}
        return [["".join(".x"[int(b == 0)] for b in query) for query in row[0]] for row in bias]

    def test_a_step_sees_the_row_without_its_padding(self):
        batch = self.batch(6, 3, 1)
        batch.columns = 7
        window = KVWindow(batch, slice(0, 3), 6, 7)
        assert self.seen(window.bias()) == [["xxxxxxx"], ["...xxxx"], [".....xx"]]
        assert self.seen(window.bias(3)) == [["....xxx"], ["....xxx"], [".....xx"]]
        assert self.seen(window.bias(7)) == self.seen(window.bias())
        assert self.seen(window.bias(6)) == [[".xxxxxx"], ["...xxxx"], [".....xx"]]
        assert self.seen(window.bias(1)) == [["......x"]] * 3

    def test_a_pass_is_causal(self):
        window = KVWindow(self.batch(6, 4), slice(0, 2), 2, 6)
        assert self.seen(window.bias()) == [
            ["xxx...", "xxxx..", "xxxxx.", "xxxxxx"],
            ["..x...", "..xx..", "..xxx.", "..xxxx"],
        ]

    def test_a_pass_with_a_sliding_window(self):
        window = KVWindow(self.batch(6, 4), slice(0, 2), 2, 6)
        assert self.seen(window.bias(2)) == [
            [".xx...", "..xx..", "...xx.", "....xx"],
            ["..x...", "..xx..", "...xx.", "....xx"],
        ]

    def test_the_first_columns_alone(self):
        window = KVWindow(self.batch(6, 4), slice(0, 2), 0, 3)
        assert self.seen(window.bias()) == [["x..", "xx.", "xxx"], ["x..", ".x.", "..x"]]

    def test_queries_in_the_padding_see_themselves(self):
        window = KVWindow(self.batch(6, 2), slice(1, 2), 1, 6)
        assert self.seen(window.bias()) == [[".x....", "..x...", "...x..", "....x.", "....xx"]]

    def test_masks_are_made_once(self):
        window = KVWindow(self.batch(6, 2), slice(0, 2), 1, 6)
        assert window.bias() is window.bias()
        assert window.bias(3) is window.bias(3)
        assert window.bias(3) is not window.bias()

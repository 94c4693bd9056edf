import json

import numpy as np
import pytest
import torch
from gymnasium.spaces import Dict, flatdim, flatten, flatten_space, unflatten
from gymnasium.vector.utils import (
    batch_space,
    concatenate,
    create_empty_array,
    create_shared_memory,
    iterate,
    read_from_shared_memory,
    write_to_shared_memory,
)
from gymnasium.wrappers.utils import create_zero_array
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.mdp import ChunkRules, unpadded
from mbrl_text_env.spaces import ChunkSpace, UnicodeText, padded_chunk_space


def space(vocab=10, stops=(0,), size=4, seed=0):
    return ChunkSpace(ChunkRules(vocab, frozenset(stops), size), seed)


@given(
    st.integers(1, 12).flatmap(
        lambda v: st.tuples(st.just(v), st.sets(st.integers(0, v - 1), max_size=v))
    ),
    st.integers(1, 6),
    st.integers(0, 2**31),
)
def test_samples_are_contained(vocab_and_stops, size, seed):
    vocab, stops = vocab_and_stops
    chunks = space(vocab, stops, size, seed)
    for _ in range(20):
        chunk = chunks.sample()
        assert chunk in chunks
        assert chunk.dtype == np.int64


def test_samples_reach_every_length_and_token():
    chunks = space(vocab=6, stops=(2, 4), size=3)
    drawn = [tuple(chunks.sample()) for _ in range(2000)]
    assert {len(chunk) for chunk in drawn} == {1, 2, 3}
    assert {token for chunk in drawn for token in chunk} == set(range(6))
    assert not {token for chunk in drawn for token in chunk[:-1]} & {2, 4}


@pytest.mark.parametrize(
    "good",
    [
        [5],
        (1, 2, 0),
        np.array([3, 4], dtype=np.int32),
        np.array([3], np.uint64),
        [np.int64(3)],
        torch.tensor([3, 4]),
        torch.tensor([3], dtype=torch.uint8),
        [torch.tensor(3)],
    ],
)
def test_contains(good):
    assert good in space()


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [0, 1],
        [10],
        [-1],
        [1, 2, 3, 4, 5],
        [1.0],
        np.array([1.0]),
        np.array([[1]]),
        "1",
        1,
        None,
        [True],
        np.array(1),
        torch.tensor([1.0]),
        torch.tensor([True]),
        torch.tensor([[1]]),
        torch.tensor(-1),
        [torch.tensor(1.5)],
        np.array([2**63], np.uint64),
    ],
)
def test_does_not_contain(bad):
    assert bad not in space()


def test_seeding():
    first, second = space(seed=3), space(seed=3)
    assert [tuple(first.sample()) for _ in range(9)] == [tuple(second.sample()) for _ in range(9)]
    assert first.seed(5) == space().seed(5)


def test_json_round_trip():
    chunks = space()
    drawn = [chunks.sample() for _ in range(5)]
    restored = chunks.from_jsonable(json.loads(json.dumps(chunks.to_jsonable(drawn))))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, restored, strict=True))


def test_batched():
    chunks = space()
    many = batch_space(chunks, 3)
    drawn = many.sample()
    assert drawn in many
    assert [c in chunks for c in iterate(many, drawn)] == [True] * 3
    assert concatenate(chunks, drawn, create_empty_array(chunks, 3)) == tuple(drawn)


def test_equality_and_refusals():
    assert space() == space(seed=9)
    assert space() != space(size=5)
    assert "max_tokens=4" in repr(space())
    with pytest.raises(ValueError, match="at least 1"):
        space(size=0)
    with pytest.raises(ValueError, match="mask"):
        space().sample(mask=np.ones(3))


@given(st.text(max_size=30))
def test_unicode_text_contains_everything(text):
    assert text in UnicodeText(30)


def test_unicode_text():
    texts = UnicodeText(5, seed=0)
    assert "" in texts
    assert "123456" not in texts
    assert 3 not in texts
    assert all(texts.sample() in texts for _ in range(100))
    assert texts == UnicodeText(5)
    with pytest.raises(ValueError, match="max_length"):
        UnicodeText(-1)
    assert texts.from_jsonable(texts.to_jsonable(["ä", ""])) == ["ä", ""]


@pytest.mark.parametrize(
    ("chosen", "elements"),
    [
        (space(), [[5], [1, 2, 3, 4], [7, 0]]),
        (UnicodeText(6), ["", "aé日🙂\x00\ud800", "six!!!"]),
    ],
)
def test_spaces_in_gymnasiums_functions(chosen, elements):
    flat = flatten_space(chosen)
    assert flatdim(chosen) == flat.shape[0]
    shared = create_shared_memory(chosen, len(elements))
    for index, element in enumerate(elements):
        row = flatten(chosen, element)
        assert row in flat
        assert list(unflatten(chosen, row)) == list(element)
        # A longer element that was there before leaves nothing.
        write_to_shared_memory(chosen, index, elements[1], shared)
        write_to_shared_memory(chosen, index, element, shared)
    read = read_from_shared_memory(chosen, shared, len(elements))
    assert [list(element) for element in read] == [list(element) for element in elements]
    assert create_zero_array(chosen) in chosen
    both = Dict(a=chosen, b=chosen)
    drawn = {"a": elements[0], "b": elements[1]}
    again = unflatten(both, flatten(both, drawn))
    assert {key: list(value) for key, value in again.items()} == {
        key: list(value) for key, value in drawn.items()
    }


def test_texts_that_do_not_fit_are_refused():
    texts = UnicodeText(10**6)
    assert flatdim(texts) == 2**16
    with pytest.raises(ValueError, match=r"65536 characters, got 70000.*shared_memory=False"):
        flatten(texts, "a" * 70_000)


def test_padded_chunks():
    rules = ChunkRules(10, frozenset({0}), 4)
    padded = padded_chunk_space(rules)
    padded.seed(0)
    for _ in range(200):
        assert rules.fault(unpadded(padded.sample().tolist(), rules)) is None
    for chunk in ([5], [1, 2, 3, 4], [7, 0]):
        row = flatten(space(), chunk)
        assert row in padded
        assert unpadded(row.tolist(), rules) == chunk

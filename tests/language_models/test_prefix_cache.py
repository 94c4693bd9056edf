"""The radix tree against a dictionary of everything that was inserted."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env.language_models.engine import (
    CacheStats,
    PrefixCache,
    Tokens,
    common_length,
)

BYTES = 10
"""Bytes of a token in these tests."""


@dataclass(frozen=True)
class Letters:
    """A payload that knows which tokens it belongs to, and what precedes them."""

    tokens: Tokens
    before: Tokens = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        return BYTES * len(self.tokens)

    def part(self, start: int, end: int) -> Letters:
        return Letters(self.tokens[start:end], self.before + self.tokens[:start])

    view = part


def payload(tokens: Tokens, first: int = 0) -> Letters:
    """What belongs to `tokens[first:]`."""
    return Letters(tokens[first:], tokens[:first])


def found(cache: PrefixCache, tokens: Tokens, *, count: bool = True) -> int:
    """Number of tokens that match, after a check that their payloads are the right ones."""
    if not count:
        return cache.known(tokens)
    joined: Tokens = ()
    for part in cache.match(tokens):
        assert len(part) > 0
        assert part.before == joined
        joined += part.tokens
    assert joined == tokens[: len(joined)]
    return len(joined)


def num_tokens(cache: PrefixCache) -> int:
    return sum(len(node.tokens) for node in cache._recency)


def longest(kept: list[Tokens], tokens: Tokens) -> int:
    return max((common_length(other, tokens) for other in kept), default=0)


def nodes(cache: PrefixCache) -> list[object]:
    return list(cache._recency)


def check_tree(cache: PrefixCache) -> None:
    """What holds after every operation."""
    kept = nodes(cache)
    place = {id(node): i for i, node in enumerate(kept)}
    assert cache.nbytes == sum(node.payload.nbytes for node in kept)
    assert num_tokens(cache) == sum(len(node.payload) for node in kept)
    reached, open_nodes = 0, list(cache._children.values())
    while open_nodes:
        node = open_nodes.pop()
        reached += 1
        assert node.payload.tokens == node.tokens
        for first, child in node.children.items():
            assert child.tokens[0] == first
            assert child.siblings is node.children
            assert place[id(child)] < place[id(node)], "what is first in line is a leaf"
            open_nodes.append(child)
    assert reached == len(kept)


sequences = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)
operations = st.lists(
    st.tuples(st.sampled_from(["insert", "insert", "part", "match", "peek"]), sequences),
    max_size=40,
)


@settings(max_examples=200)
@given(operations)
def test_without_a_bound_it_is_everything_that_was_inserted(steps):
    cache, kept = PrefixCache(2**40), []
    hits = misses = 0
    for kind, tokens in steps:
        expected = longest(kept, tokens)
        if kind == "insert":
            cache.insert(tokens, payload(tokens))
            kept.append(tokens)
        elif kind == "part":
            first = max(0, expected - 1)
            cache.insert(tokens, payload(tokens, first))
            kept.append(tokens)
        else:
            assert found(cache, tokens, count=kind == "match") == expected
            if kind == "match":
                hits, misses = hits + expected, misses + len(tokens) - expected
        check_tree(cache)
    assert num_tokens(cache) == len({t[:n] for t in kept for n in range(1, len(t) + 1)})
    assert cache.stats == CacheStats(hits, misses, 0)
    for tokens in kept:
        assert found(cache, tokens) == len(tokens)


@settings(max_examples=200)
@given(operations, st.integers(1, 12), st.data())
def test_with_a_bound_it_is_never_above_it_and_never_wrong(steps, most, data):
    cache, kept, inserted = PrefixCache(most * BYTES), [], 0
    for kind, tokens in steps:
        before = found(cache, tokens, count=False)
        if kind in ("insert", "part"):
            first = data.draw(st.integers(0, len(tokens))) if kind == "part" else 0
            cache.insert(tokens, payload(tokens, first))
            kept.append(tokens)
            if first <= before and len(tokens) - first <= most:
                inserted += len(tokens) - before
            assert cache.nbytes <= cache.max_bytes
        else:
            assert found(cache, tokens, count=kind == "match") == before <= longest(kept, tokens)
        check_tree(cache)
    assert cache.stats.evicted_tokens == inserted - num_tokens(cache)


@settings(max_examples=100)
@given(st.lists(sequences, max_size=30), st.lists(st.integers(0, 20), max_size=5))
def test_what_is_dropped_is_the_leaf_used_longest_ago(inserted, bounds):
    cache = PrefixCache(2**40)
    for tokens in inserted:
        cache.insert(tokens, payload(tokens))
    for bound in sorted(bounds, reverse=True):
        while cache.nbytes > bound * BYTES:
            oldest = nodes(cache)[0]
            assert not oldest.children
            count = len(nodes(cache))
            cache.shrink(cache.nbytes - 1)
            assert len(nodes(cache)) == count - 1
            assert oldest not in nodes(cache)
            check_tree(cache)
        before = nodes(cache)
        cache.shrink(bound * BYTES)
        assert nodes(cache) == before


def test_least_recently_used_goes_first_by_hand():
    cache = PrefixCache(6 * BYTES)
    stem, left, right = (1, 1), (1, 1, 2, 2), (1, 1, 3)
    cache.insert(left, payload(left))
    cache.insert(right, payload(right))
    cache.insert((9,), payload((9,)))
    assert cache.nbytes == 6 * BYTES
    assert found(cache, left) == 4
    cache.insert((8,), payload((8,)))
    assert found(cache, right, count=False) == 2, "the leaf that was not asked for"
    assert found(cache, left, count=False) == 4
    assert found(cache, (9,), count=False) == 1
    cache.insert((7, 7), payload((7, 7)))
    assert found(cache, (9,), count=False) == 0
    assert found(cache, left, count=False) == 2, "the stem outlives its branches"
    assert found(cache, stem, count=False) == 2
    assert found(cache, (8,), count=False) == 1
    assert cache.stats.evicted_tokens == 4


def test_peeking_does_not_count_as_use():
    cache = PrefixCache(2 * BYTES)
    cache.insert((1,), payload((1,)))
    cache.insert((2,), payload((2,)))
    found(cache, (1,), count=False)
    cache.insert((3,), payload((3,)))
    assert [found(cache, (token,)) for token in (1, 2, 3)] == [0, 1, 1]


def test_inserting_again_counts_as_use():
    cache = PrefixCache(2 * BYTES)
    for token in (1, 2, 1, 3):
        cache.insert((token,), payload((token,)))
    assert [found(cache, (token,)) for token in (1, 2, 3)] == [1, 0, 1]
    assert cache.stats.evicted_tokens == 1


def test_an_edge_is_split_where_sequences_part():
    cache = PrefixCache(100 * BYTES)
    cache.insert((1, 2, 3, 4), payload((1, 2, 3, 4)))
    assert [part.tokens for part in cache.match((1, 2, 5))] == [(1, 2)]
    assert len(nodes(cache)) == 1, "a match alone splits nothing"
    cache.insert((1, 2, 5), payload((1, 2, 5)))
    assert [part.tokens for part in cache.match((1, 2, 3, 4))] == [(1, 2), (3, 4)]
    assert [part.tokens for part in cache.match((1, 2, 5, 6))] == [(1, 2), (5,)]
    assert [part.tokens for part in cache.match((1,))] == [(1,)]
    assert num_tokens(cache) == 5
    assert cache.nbytes == 5 * BYTES


def test_a_prefix_of_something_kept_changes_nothing():
    cache = PrefixCache(100 * BYTES)
    cache.insert((1, 2, 3), payload((1, 2, 3)))
    cache.insert((1, 2), payload((1, 2)))
    assert [part.tokens for part in cache.match((1, 2, 3))] == [(1, 2, 3)]


def test_what_is_kept_already_stays():
    cache = PrefixCache(100 * BYTES)
    first = payload((1, 2))
    cache.insert((1, 2), first)
    cache.insert((1, 2, 3), payload((1, 2, 3)))
    assert cache.match((1, 2, 3))[0] is first


def test_without_its_stem_a_payload_is_dropped():
    cache = PrefixCache(3 * BYTES)
    cache.insert((1, 2, 3), payload((1, 2, 3)))
    cache.insert((7, 7, 7), payload((7, 7, 7)))
    cache.insert((1, 2, 3, 4), payload((1, 2, 3, 4), 3))
    assert found(cache, (1, 2, 3, 4)) == 0
    assert found(cache, (7, 7, 7)) == 3
    cache.insert((7, 8), payload((7, 8), 2))
    assert found(cache, (7, 8)) == 1, "a gap at the end is one too"


def test_a_payload_larger_than_the_bound_is_not_kept():
    cache = PrefixCache(3 * BYTES)
    cache.insert((1, 2, 3, 4), payload((1, 2, 3, 4)))
    assert cache.nbytes == num_tokens(cache) == 0
    assert found(cache, (1, 2, 3, 4)) == 0


def test_no_room_keeps_nothing():
    cache = PrefixCache(0)
    cache.insert((1, 2), payload((1, 2)))
    assert found(cache, (1, 2)) == 0
    assert cache.nbytes == 0
    assert cache.stats == CacheStats(missed_tokens=2)


def test_nothing_to_insert():
    cache = PrefixCache(BYTES)
    cache.insert((), payload(()))
    assert cache.match(()) == []
    assert num_tokens(cache) == 0


def test_clearing_keeps_the_statistics():
    cache = PrefixCache(100 * BYTES)
    cache.insert((1, 2), payload((1, 2)))
    assert found(cache, (1, 2, 3)) == 2
    cache.clear()
    assert (cache.nbytes, num_tokens(cache)) == (0, 0)
    assert found(cache, (1, 2)) == 0
    assert cache.stats == CacheStats(hit_tokens=2, missed_tokens=3)
    cache.insert((1, 2), payload((1, 2)))
    assert found(cache, (1, 2)) == 2
    check_tree(cache)


@given(sequences, sequences, st.integers(0, 10))
def test_the_common_length(part, tokens, start):
    expected = 0
    for a, b in zip(part, tokens[start:], strict=False):
        if a != b:
            break
        expected += 1
    if start <= len(tokens):
        assert common_length(part, tokens, start) == expected
        assert common_length(list(part), list(tokens), start) == expected

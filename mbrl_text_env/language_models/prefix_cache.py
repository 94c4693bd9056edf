"""Keys and values of prefixes seen before, found again by their token ids."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

Tokens = tuple[int, ...]


class Payload(Protocol):
    """What is kept of consecutive tokens; `Span` holds their keys and values."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        ...

    def __len__(self) -> int: ...

    def part(self: P, start: int, end: int) -> P:
        """A copy of some of the tokens."""
        ...

    def view(self: P, start: int, end: int) -> P:
        """Some of the tokens; may share memory."""
        ...


P = TypeVar("P", bound=Payload)


@dataclass(eq=False)
class _Node(Generic[P]):
    """An edge of the tree with the tokens on it."""

    tokens: Tokens
    payload: P
    parent: _Node[P] | None
    children: dict[int, _Node[P]] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheStats:
    """What a prefix cache did.

    Args:
        hit_tokens: Prefix tokens that were found.
        missed_tokens: Prefix tokens that were not.
        evicted_tokens: Tokens that were dropped for room.
    """

    hit_tokens: int = 0
    missed_tokens: int = 0
    evicted_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prefix tokens asked for that was found; 0 before anything was asked."""
        return self.hit_tokens / max(1, self.hit_tokens + self.missed_tokens)


class PrefixCache(Generic[P]):
    """A radix tree from token ids to payloads, bounded in bytes, least recently used out first.

    An edge holds the tokens between two branchings, with one payload for all of them; sequences
    that share a prefix share its edges. Planners need no handles: whatever a sequence has in common
    with one seen before is found by its ids.

    Source: Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs"
    (2024), RadixAttention. Deviation: payloads are copied into the batch that uses them, so
    nothing in use has to be pinned.

    Args:
        max_bytes: Most bytes of payloads; 0 keeps nothing.

    Attributes:
        nbytes: Bytes of the payloads that are kept.
        stats: Tokens found, missed and dropped so far.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.stats = CacheStats()
        self._children: dict[int, _Node[P]] = {}
        # A node is moved to the end after all nodes below it, so the first one is always a leaf.
        self._recency: OrderedDict[_Node[P], None] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return sum(len(node.tokens) for node in self._recency)

    def clear(self) -> None:
        """Forget everything; the statistics are kept."""
        self._children.clear()
        self._recency.clear()
        self.nbytes = 0

    def match(self, tokens: Tokens, *, count: bool = True) -> list[P]:
        """Payloads of the longest prefix of `tokens` that is kept, in order.

        Args:
            tokens: A sequence.
            count: Whether it counts as used and in the statistics.
        """
        path, found = self._walk(tokens)
        payloads = [node.payload for node in path]
        if path:
            inside = found - sum(len(node.tokens) for node in path[:-1])
            if inside < len(path[-1].tokens):
                payloads[-1] = path[-1].payload.view(0, inside)
        if count:
            self._touch(path)
            self._count(hit=found, missed=len(tokens) - found)
        return payloads

    def insert(self, tokens: Tokens, payload: P) -> None:
        """Keep the payload of the last tokens of a sequence.

        What is kept already stays as it is. Where the tokens before the payload are not kept (any
        more), the payload cannot be reached and is dropped; so is one larger than the bound.

        Args:
            tokens: The sequence from its start.
            payload: Of its last `len(payload)` tokens.
        """
        first = len(tokens) - len(payload)
        path, found = self._walk(tokens)
        fits = 0 < payload.nbytes <= self.max_bytes
        if not fits or found < first or found == len(tokens):
            self._touch(path)
            return
        if path:
            end = sum(len(node.tokens) for node in path)
            if found < end:
                path[-1] = self._split(path[-1], len(path[-1].tokens) - (end - found))
        rest = payload if found == first else payload.part(found - first, len(payload))
        path.append(self._attach(path[-1] if path else None, tokens[found:], rest))
        self._touch(path)
        self.shrink(self.max_bytes)

    def shrink(self, max_bytes: int) -> None:
        """Drop what was used longest ago until at most `max_bytes` are kept."""
        evicted = 0
        while self.nbytes > max_bytes and self._recency:
            node, _ = self._recency.popitem(last=False)
            siblings = self._children if node.parent is None else node.parent.children
            del siblings[node.tokens[0]]
            self.nbytes -= node.payload.nbytes
            evicted += len(node.tokens)
        self._count(evicted=evicted)

    def _walk(self, tokens: Tokens) -> tuple[list[_Node[P]], int]:
        """Nodes along `tokens`, and how many tokens they match; the last one maybe in part."""
        path: list[_Node[P]] = []
        found, children = 0, self._children
        while found < len(tokens) and (node := children.get(tokens[found])) is not None:
            shared = common_length(node.tokens, tokens, found)
            path.append(node)
            found += shared
            if shared < len(node.tokens):
                break
            children = node.children
        return path, found

    def _attach(self, parent: _Node[P] | None, tokens: Tokens, payload: P) -> _Node[P]:
        node = _Node(tokens, payload, parent)
        siblings = self._children if parent is None else parent.children
        siblings[tokens[0]] = node
        self._recency[node] = None
        self.nbytes += payload.nbytes
        return node

    def _split(self, node: _Node[P], at: int) -> _Node[P]:
        """Cut a node in two; returns the upper one, to which the lower one now belongs."""
        self.nbytes -= node.payload.nbytes
        upper = self._attach(node.parent, node.tokens[:at], node.payload.part(0, at))
        node.payload = node.payload.part(at, len(node.tokens))
        node.tokens, node.parent = node.tokens[at:], upper
        upper.children[node.tokens[0]] = node
        self.nbytes += node.payload.nbytes
        return upper

    def _touch(self, path: Sequence[_Node[P]]) -> None:
        for node in reversed(path):
            self._recency.move_to_end(node)

    def _count(self, hit: int = 0, missed: int = 0, evicted: int = 0) -> None:
        old = self.stats
        self.stats = CacheStats(
            old.hit_tokens + hit, old.missed_tokens + missed, old.evicted_tokens + evicted
        )


def common_length(part: Sequence[int], tokens: Sequence[int], start: int = 0) -> int:
    """How many tokens `part` has in common with `tokens` from `start` on."""
    most = min(len(part), len(tokens) - start)
    if tuple(part[:most]) == tuple(tokens[start : start + most]):
        return most
    return next(i for i in range(most) if part[i] != tokens[start + i])

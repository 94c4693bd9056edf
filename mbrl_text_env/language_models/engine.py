"""The inference engine: prefix cache, batches of sequences, and sampling from logits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from mbrl_text_env.language_models.base import SamplingParams
from mbrl_text_env.language_models.networks import KVBatch, KVWindow, Network, OwnPasses, Span

Tokens = tuple[int, ...]

# Maximum tokens of a forward pass over prefixes, padding included. Activations then fit into the
# processor's caches; larger passes were up to a third slower.
_PASS_TOKENS = 512
# A shared prefix is computed once if it has at least this many tokens.
_LEAST_STEM = 8
# Cumulative sums are computed over blocks of this many tokens, then within one block.
_BLOCK = 128
# A nucleus larger than this is found by sorting the whole vocabulary.
_MOST_IN_NUCLEUS = 512


@dataclass(eq=False)
class _Node:
    """An edge of the tree with its tokens; one of the `siblings` below a branch."""

    tokens: Tokens
    payload: Span
    siblings: dict[int, _Node]
    children: dict[int, _Node] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheStats:
    """Prefix tokens that were hits or misses, and tokens evicted for space."""

    hit_tokens: int = 0
    missed_tokens: int = 0
    evicted_tokens: int = 0


class PrefixCache:
    """A radix tree from token ids to keys and values, with LRU eviction above `max_bytes`.

    An edge holds the tokens between two branches, with one payload for all of them. Prefixes are
    found by their token ids, so planners need no handles.

    Source: Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs"
    (2024), RadixAttention. Deviation: payloads are copied into the batch that uses them, so entries
    in use need not be pinned.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.stats = CacheStats()
        self._children: dict[int, _Node] = {}
        # A node is moved to the end after its descendants, so the first one is always a leaf.
        self._recency: OrderedDict[_Node, None] = OrderedDict()

    def clear(self) -> None:
        """Remove all entries; the statistics are kept."""
        self._children.clear()
        self._recency.clear()
        self.nbytes = 0

    def known(self, tokens: Tokens) -> int:
        """Number of leading tokens in the cache; does not count as a use."""
        return self._walk(tokens)[1]

    def match(self, tokens: Tokens) -> list[Span]:
        """Payloads of the longest cached prefix of `tokens`, in order."""
        path, found = self._walk(tokens)
        payloads = [node.payload for node in path]
        if beyond := sum(map(len, payloads)) - found:
            payloads[-1] = payloads[-1].view(0, len(payloads[-1]) - beyond)
        self._touch(path)
        self._count(hit=found, missed=len(tokens) - found)
        return payloads

    def insert(self, tokens: Tokens, payload: Span) -> None:
        """Store the payload of the last `len(payload)` tokens; existing entries are unchanged.

        The payload is dropped if the tokens before it are not cached, because it could not be
        reached, or if it exceeds the maximum size.
        """
        first = len(tokens) - len(payload)
        path, found = self._walk(tokens)
        fits = 0 < payload.nbytes <= self.max_bytes
        if fits and first <= found < len(tokens):
            if beyond := sum(len(node.tokens) for node in path) - found:
                path[-1] = self._split(path[-1], len(path[-1].tokens) - beyond)
            rest = payload if found == first else payload.part(found - first, len(payload))
            siblings = path[-1].children if path else self._children
            path.append(self._attach(siblings, tokens[found:], rest))
        self._touch(path)
        self.shrink(self.max_bytes)

    def shrink(self, max_bytes: int) -> None:
        """Evict the least recently used entries until at most `max_bytes` remain."""
        evicted = 0
        while self.nbytes > max_bytes and self._recency:
            node, _ = self._recency.popitem(last=False)
            del node.siblings[node.tokens[0]]
            self.nbytes -= node.payload.nbytes
            evicted += len(node.tokens)
        self._count(evicted=evicted)

    def _walk(self, tokens: Tokens) -> tuple[list[_Node], int]:
        """Nodes along `tokens`, and number of matched tokens; the last node may match partly."""
        path: list[_Node] = []
        found, children = 0, self._children
        while found < len(tokens) and (node := children.get(tokens[found])) is not None:
            shared = common_length(node.tokens, tokens, found)
            path.append(node)
            found += shared
            if shared < len(node.tokens):
                break
            children = node.children
        return path, found

    def _attach(self, siblings: dict[int, _Node], tokens: Tokens, payload: Span) -> _Node:
        node = siblings[tokens[0]] = _Node(tokens, payload, siblings)
        self._recency[node] = None
        self.nbytes += payload.nbytes
        return node

    def _split(self, node: _Node, at: int) -> _Node:
        """Split a node in two and return the upper one, which is the lower one's parent."""
        self.nbytes -= node.payload.nbytes
        upper = self._attach(node.siblings, node.tokens[:at], node.payload.part(0, at))
        node.payload = node.payload.part(at, len(node.tokens))
        node.tokens, node.siblings = node.tokens[at:], upper.children
        upper.children[node.tokens[0]] = node
        self.nbytes += node.payload.nbytes
        return upper

    def _touch(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            self._recency.move_to_end(node)

    def _count(self, hit: int = 0, missed: int = 0, evicted: int = 0) -> None:
        old = self.stats
        self.stats = CacheStats(
            old.hit_tokens + hit, old.missed_tokens + missed, old.evicted_tokens + evicted
        )


def common_length(part: Sequence[int], tokens: Sequence[int], start: int = 0) -> int:
    """Number of tokens that `part` shares with `tokens` from `start` on."""
    most = min(len(part), len(tokens) - start)
    if tuple(part[:most]) == tuple(tokens[start : start + most]):
        return most
    return next(i for i in range(most) if part[i] != tokens[start + i])


class CachedBatch:
    """A batch of rows over preallocated keys and values, with a prefix cache.

    `kv` has no rows yet, and enough columns for the longest sequence to be added.
    """

    refills = True  # Rows can be added while others are running.

    def __init__(self, network: Network, cache: PrefixCache, kv: KVBatch) -> None:
        self.kv = kv
        self._network, self._cache = network, cache
        self._held: dict[Tokens, Span] = {}

    def add(
        self, sequences: Sequence[Tokens], copies: Sequence[int], hold: bool = False
    ) -> tuple[list[int], list[int]]:
        """Add `copies[i]` rows of `sequences[i]`; each prefix is computed once.

        Returns the sequence index of each new row, and the number of computed tokens per sequence.
        Sequences must not be longer than those added before. With `hold`, the last row is the first
        of the next call and is not computed again.
        """
        stems = self._compute_stems(sequences)
        if self.kv.size:
            self.kv.shift()
        first = self.kv.size
        rows, missing = self._fill(sequences)
        self._held.clear()
        if hold:
            row = first + rows.index(len(sequences) - 1)
            self._held[sequences[-1]] = self.kv.read(row, 0, len(sequences[-1]))
        for row, i in enumerate(list(rows), start=first):
            for _ in range(copies[i] - 1):
                self.kv.copy(row)
                rows.append(i)
        return rows, [a + b for a, b in zip(stems, missing, strict=True)]

    def append(self, tokens: Sequence[int]) -> None:
        """Append one token to each row."""
        kv = self.kv
        if kv.columns == kv.capacity:
            kv.shift()
        kv.columns += 1
        ids = torch.tensor(tokens, device=kv.shape.device)[:, None]
        positions = torch.from_numpy(kv.lengths() - 1).to(kv.shape.device)[:, None]
        window = KVWindow(kv, slice(0, kv.size), kv.columns - 1, kv.columns)
        window.write_hidden(self._network.forward(ids, positions, window))

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        self.kv.drop(row)

    def keep(self, row: int, sequence: Tokens) -> None:
        """Store the computed part of the row's sequence in the cache."""
        known = int(self.kv.lengths()[row])
        self._remember(row, sequence[:known], known)

    def logits(self, out: Tensor | None = None) -> Tensor:
        """Next-token logits of every row, float32[rows, V]; `out` is optional memory for them."""
        return self._network.logits(self.kv.hidden[: self.kv.size, self.kv.columns - 1], out)

    def hidden(self, row: int, first: int, last: int) -> Tensor:
        """Hidden states of a row's tokens from `first` to `last`, [last - first, hidden_size]."""
        start = int(self.kv.starts[row])
        return self.kv.hidden[row, start + first : start + last]

    def _remember(self, row: int, sequence: Tokens, at_most: int) -> None:
        """Cache the uncached part of the row's last `at_most` tokens."""
        if self._cache.max_bytes <= 0 or at_most <= 0:
            return
        first = max(self._cache.known(sequence), len(sequence) - at_most)
        if first < len(sequence):
            self._cache.insert(sequence, self.kv.read(row, first, len(sequence)))

    def _fill(self, sequences: Sequence[Tokens]) -> tuple[list[int], list[int]]:
        """Add a row per sequence; return their order, and the computed tokens of each."""
        first = self.kv.size
        held = self._held
        known = [[held[s]] if s in held else self._cache.match(s) for s in sequences]
        pairs = zip(sequences, known, strict=True)
        missing = [len(sequence) - sum(map(len, spans)) for sequence, spans in pairs]
        # Rows with similar work are adjacent, so that passes have little padding.
        order = sorted(range(len(sequences)), key=lambda i: -missing[i])
        for i in order:
            self.kv.add(len(sequences[i]), known[i])
        for rows in _passes([missing[i] for i in order]):
            chosen = [(sequences[order[r]], missing[order[r]]) for r in rows]
            self._compute(slice(first + rows.start, first + rows.stop), chosen)
        for row, i in enumerate(order, start=first):
            self._remember(row, sequences[i], missing[i])
        return order, missing

    def _compute(self, rows: slice, chosen: Sequence[tuple[Tokens, int]]) -> None:
        """Run forward passes over the last tokens of some rows: (sequence, number of tokens)."""
        kv = self.kv
        ids, valid = _padded([sequence[len(sequence) - missing :] for sequence, missing in chosen])
        width, everywhere = ids.shape[1], bool(valid.all())
        ends = torch.tensor([len(sequence) for sequence, _ in chosen])
        positions = (ends[:, None] - width + torch.arange(width)).clamp(min=0)
        ids, positions, valid = (x.to(kv.shape.device) for x in (ids, positions, valid))
        step = max(1, _PASS_TOKENS // len(chosen))
        first = kv.columns - width
        for start in range(0, width, step):
            end = min(width, start + step)
            part = slice(start, end)
            mask = None if everywhere else valid[:, part]
            window = KVWindow(kv, rows, first + start, first + end, mask)
            window.write_hidden(self._network.forward(ids[:, part], positions[:, part], window))

    def _compute_stems(self, sequences: Sequence[Tokens]) -> list[int]:
        """Compute prefixes that several sequences share once, into the cache.

        Returns the computed tokens, counted for the first sequence that needed them.
        """
        computed = [0] * len(sequences)
        while self._cache.max_bytes > 0 and (stems := self._stems(sequences)):
            longest = max(map(len, stems))
            kv = KVBatch(self.kv.shape, len(stems), longest)
            kv.clear(longest, longest)
            _, counts = CachedBatch(self._network, self._cache, kv)._fill(list(stems))
            for count, owner in zip(counts, stems.values(), strict=True):
                computed[owner] += count
            if all(self._cache.known(stem) < len(stem) for stem in stems):
                break  # The cache is too small for them.
        return computed

    def _stems(self, sequences: Sequence[Tokens]) -> dict[Tokens, int]:
        """Uncached prefixes shared by groups of sequences: the prefix and its first sequence."""
        groups: dict[Tokens, list[int]] = {}
        for i, sequence in enumerate(sequences):
            known = self._cache.known(sequence)
            if known < len(sequence):
                groups.setdefault(sequence[: known + 1], []).append(i)
        stems = {}
        for start, members in groups.items():
            shared = min(common_length(sequences[i], sequences[members[0]]) for i in members)
            if len(members) > 1 and shared - len(start) + 1 >= _LEAST_STEM:
                stems[sequences[members[0]][:shared]] = members[0]
        return stems


class OwnBatch:
    """`CachedBatch` with a model's own forward passes and, with `steps`, its transformers cache.

    Without `steps`, there is one row, which is recomputed for each token. This works for every
    model.
    """

    refills = False

    def __init__(self, own: OwnPasses, model: Any, steps: bool) -> None:
        self._own, self._steps = own, steps
        self._config, self._device = model.config, model.device

    def add(
        self, sequences: Sequence[Tokens], copies: Sequence[int], hold: bool = False
    ) -> tuple[list[int], list[int]]:
        """Add rows to an empty batch."""
        inputs = _padded_inputs(sequences, self._device)
        self._sequences = sequences
        self._cache: Any = DynamicCache(config=self._config) if self._steps else None
        self._hidden = self._own.hidden(self._cache, **inputs)[:, -1]
        self._mask = inputs.get("attention_mask")
        self._positions = torch.tensor([[len(s) - 1] for s in sequences], device=self._device)
        rows = [i for i, count in enumerate(copies) for _ in range(count)]
        if rows != list(range(len(sequences))):
            self._select(rows)
        return rows, [len(sequence) for sequence in sequences]

    def append(self, tokens: Sequence[int]) -> None:
        """Append one token to each row."""
        if not self._steps:
            self.add([(*self._sequences[0], *tokens)], [1])
            return
        ids = torch.tensor(tokens, device=self._device)[:, None]
        self._positions = self._positions + 1
        inputs = {"input_ids": ids, "position_ids": self._positions}
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
            inputs["attention_mask"] = self._mask
        self._hidden = self._own.hidden(self._cache, **inputs)[:, -1]

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        rows = list(range(len(self._positions)))
        last = rows.pop()
        if row != last:
            rows[row] = last
        if rows:
            self._select(rows)

    def keep(self, row: int, sequence: Tokens) -> None:
        """Do nothing: there is no cache."""

    def logits(self, out: Tensor | None = None) -> Tensor:
        """Next-token logits of every row, float32[rows, V]."""
        return self._own.logits(self._hidden)

    def _select(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long, device=self._device)
        # The reordering for beam search: unlike other batch methods of the cache, all kinds of
        # layers have it, including those of hybrid models.
        self._cache.reorder_cache(index)
        self._positions, self._hidden = self._positions[index], self._hidden[index]
        if self._mask is not None:
            self._mask = self._mask[index]


Batch = CachedBatch | OwnBatch


def plain_hidden(own: OwnPasses, sequences: Sequence[Tokens], device: torch.device) -> list[Tensor]:
    """Hidden states [tokens, hidden_size] of each sequence, in one pass without a cache."""
    hidden = own.hidden(None, **_padded_inputs(sequences, device))
    return [row[len(row) - len(s) :] for row, s in zip(hidden, sequences, strict=True)]


def _padded_inputs(sequences: Sequence[Tokens], device: torch.device) -> dict[str, Tensor]:
    """Left-pad sequences; mask and positions are included if there is padding."""
    ids, mask = _padded(sequences)
    inputs = {"input_ids": ids}
    if not mask.all():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs |= {"attention_mask": mask.long(), "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _padded(sequences: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Left-padded ids int64[rows, width], and their mask bool[rows, width]."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = True
    return ids, mask


def _passes(missing: Sequence[int]) -> Iterator[range]:
    """Ranges of rows, one per pass; `missing` decreases over the rows, zeros are skipped."""
    start = 0
    while start < len(missing) and missing[start]:
        width = missing[start]
        most = min(len(missing), start + max(1, _PASS_TOKENS // width))
        end = start + 1
        while end < most and missing[end] and width <= 1.5 * missing[end] + 4:
            end += 1
        yield range(start, end)
        start = end


def draw(
    logits: Tensor, uniforms: Tensor, params: SamplingParams, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample tokens int64[B] from logits float32[B, V], with unshaped log-probabilities float32[B].

    Tokens are the inverse of the cumulative distribution at `uniforms`, float64[B] in [0, 1).
    `torch.multinomial` makes several passes over the vocabulary, with one generator for all
    sequences. This makes one pass for the exponentials and one for block sums. `scratch`,
    float32[B, V], is optional working memory.
    """
    largest = logits.amax(-1, keepdim=True)
    weights = torch.sub(logits, largest, out=scratch).exp_()
    total = weights.sum(-1)
    if params.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        if not params.is_plain:
            # Relative to the maximum, to avoid overflow at low temperatures.
            scaled = torch.sub(logits, largest, out=weights)
            scaled /= max(params.temperature, torch.finfo(scaled.dtype).tiny)
            weights = _shaped(scaled, params).exp_()
        tokens = _inverse(weights, uniforms)
    chosen = (logits.gather(-1, tokens[:, None]) - largest).squeeze(-1)
    return tokens, chosen - total.log()


def probabilities(logits: Tensor, params: SamplingParams) -> npt.NDArray[np.float64]:
    """The distribution that `draw` samples from, float64[V], for logits float32[V]."""
    scaled = (logits - logits.max())[None]
    if params.temperature == 0:
        shaped = torch.full_like(scaled, -torch.inf)
        shaped[0, logits.argmax()] = 0.0
    else:
        scaled = scaled / max(params.temperature, torch.finfo(scaled.dtype).tiny)
        shaped = scaled if params.is_plain else _shaped(scaled, params)
    return cast("npt.NDArray[np.float64]", shaped[0].double().softmax(-1).numpy(force=True))


def _shaped(scaled: Tensor, params: SamplingParams) -> Tensor:
    """Logits with minus infinity for tokens that top-k and top-p remove."""
    size = scaled.shape[-1]
    if params.top_k and params.top_k < size:
        least = scaled.topk(params.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if params.top_p == 1.0:
        return scaled
    total = scaled.exp().sum(-1, keepdim=True)
    found = scaled.topk(min(size, _MOST_IN_NUCLEUS))
    if bool((found.values.exp().sum(-1, keepdim=True) < params.top_p * total).any()):
        found = scaled.topk(size)
    probabilities = found.values.exp() / total
    # A token is kept if those before it do not reach top_p, so the first always is.
    kept = probabilities.cumsum(-1) - probabilities < params.top_p
    kept[:, 0] = True
    values = found.values.masked_fill(~kept, -torch.inf)
    return torch.full_like(scaled, -torch.inf).scatter_(-1, found.indices, values)


def _inverse(weights: Tensor, uniforms: Tensor) -> Tensor:
    """First token of each row at which the cumulative weight exceeds the target share."""
    rows, size = weights.shape
    padding = -size % _BLOCK
    if padding:
        weights = torch.nn.functional.pad(weights, (0, padding))
    blocks = weights.view(rows, -1, _BLOCK)
    # Double precision: rounding errors of 50,000 sums would bias the samples.
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    targets = uniforms[:, None] * ends[:, -1:]
    block = _first_above(ends, targets)
    end = ends.gather(-1, block)
    start = torch.where(block > 0, ends.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(rows, device=blocks.device), block[:, 0]]
    inside = inside.cumsum(-1, dtype=torch.float64)
    # Single and double precision sums of a block differ. Taking the target as a share of the block
    # guarantees a token of positive weight.
    share = ((targets - start) / (end - start)).clamp(0.0, 1.0 - 1e-12)
    return (block * _BLOCK + _first_above(inside, share * inside[:, -1:])).squeeze(-1)


def _first_above(cumulative: Tensor, targets: Tensor) -> Tensor:
    places = torch.searchsorted(cumulative, targets, right=True)
    return places.clamp(max=cumulative.shape[-1] - 1)


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable tokens int64[B, k], best first, and their log-probabilities."""
    found = logits.topk(k)
    return found.indices, found.values - logits.logsumexp(-1, keepdim=True)


def chosen_logprobs(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of one token per row, for the first `len(tokens)` rows."""
    ids = torch.tensor(tokens, dtype=torch.long, device=logits.device)
    logits = logits[: len(tokens)]
    chosen: list[float] = (
        logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)
    ).tolist()
    return chosen

"""Batches of sequences in decoding: rows come, grow by a token a step, and leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from mbrl_text_env.language_models.kv import KVBatch, KVShape, Span
from mbrl_text_env.language_models.networks import Network, OwnPasses
from mbrl_text_env.language_models.prefix_cache import PrefixCache, Tokens, common_length

# A forward pass over prefixes has at most this many tokens, padding included, so that what it makes
# stays in the processor's caches; larger ones were up to a third slower.
_PASS_TOKENS = 512
# What several prefixes share is computed once if it has at least this many tokens.
_LEAST_STEM = 8


@dataclass(frozen=True)
class Prefilled:
    """The sequence of each new row, and the tokens of each sequence that were computed."""

    rows: list[int]
    computed: list[int]


class Batch(Protocol):
    """Rows of sequences, each with the last hidden state of its last token."""

    refills: bool
    """Whether rows can be added while others are under way."""

    def add(
        self, sequences: Sequence[Tokens], copies: Sequence[int], hold: bool = False
    ) -> Prefilled:
        """Add rows: `copies[i]` of `sequences[i]`, whose prefixes are computed once each.

        With `hold`, the last sequence is the first of the next call, and is not computed again.
        """
        ...

    def append(self, tokens: Sequence[int]) -> None:
        """Append a token to every row."""
        ...

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        ...

    def keep(self, row: int, sequence: Tokens) -> None:
        """Remember the row for later prefixes: all of its sequence that has been computed."""
        ...

    def logits(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """float32[rows, V] for the next token of every row; `out` may be used for them."""
        ...


class CachedBatch:
    """Rows over preallocated keys and values, with a prefix cache behind them.

    The columns of `kv`, which has no rows yet, hold the longest sequence to be added.
    """

    refills = True

    def __init__(self, network: Network, cache: PrefixCache[Span], kv: KVBatch) -> None:
        self.kv = kv
        self._network, self._cache = network, cache
        self._held: tuple[Tokens, Span] | None = None

    def add(
        self, sequences: Sequence[Tokens], copies: Sequence[int], hold: bool = False
    ) -> Prefilled:
        """See `Batch.add`. The sequences are no longer than those added before."""
        stems = self._compute_stems(sequences)
        if self.kv.size:
            self.kv.shift()
        first = self.kv.size
        order, missing = self._fill(sequences)
        self._held = None
        if hold:
            last, row = len(sequences) - 1, first + order.index(len(sequences) - 1)
            self._held = sequences[last], self.kv.read(row, 0, len(sequences[last]))
        rows = list(order)
        for row, i in enumerate(order, start=first):
            for _ in range(copies[i] - 1):
                self.kv.copy(row)
                rows.append(i)
        return Prefilled(rows, [a + b for a, b in zip(stems, missing, strict=True)])

    def append(self, tokens: Sequence[int]) -> None:
        """See `Batch.append`."""
        kv = self.kv
        if kv.columns == kv.capacity:
            kv.shift()
        kv.columns += 1
        device = kv.shape.device
        ids = torch.tensor(tokens, device=device)[:, None]
        positions = torch.from_numpy(kv.lengths() - 1).to(device)[:, None]
        window = kv.window(slice(0, kv.size), kv.columns - 1, kv.columns)
        window.write_hidden(self._network.forward(ids, positions, window))

    def drop(self, row: int) -> None:
        """See `Batch.drop`."""
        self.kv.drop(row)

    def keep(self, row: int, sequence: Tokens) -> None:
        """See `Batch.keep`."""
        known = int(self.kv.lengths()[row])
        self._remember(row, sequence[:known], known)

    def logits(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Batch.logits`."""
        return self._network.logits(self.kv.hidden[: self.kv.size, self.kv.columns - 1], out)

    def hidden(self, row: int, first: int, last: int) -> torch.Tensor:
        """[last - first, hidden_size] of a row's tokens, counted from its start."""
        start = int(self.kv.starts[row])
        return self.kv.hidden[row, start + first : start + last]

    def _remember(self, row: int, sequence: Tokens, at_most: int) -> None:
        """Keep what the cache does not have of the row's last `at_most` tokens."""
        if self._cache.max_bytes <= 0 or at_most <= 0:
            return
        known = sum(map(len, self._cache.match(sequence, count=False)))
        first = max(known, len(sequence) - at_most)
        if first < len(sequence):
            self._cache.insert(sequence, self.kv.read(row, first, len(sequence)))

    def _fill(self, sequences: Sequence[Tokens]) -> tuple[list[int], list[int]]:
        """A row for each sequence: their order, and the tokens of each that were computed."""
        first = self.kv.size
        known = [self._spans(sequence) for sequence in sequences]
        missing = [
            len(sequence) - sum(map(len, spans))
            for sequence, spans in zip(sequences, known, strict=True)
        ]
        # Rows of similar work lie next to each other, so that a pass over them has little padding.
        order = sorted(range(len(sequences)), key=lambda i: -missing[i])
        for i in order:
            self.kv.add(len(sequences[i]), known[i])
        for rows in _passes([missing[i] for i in order]):
            chosen = [(sequences[order[r]], missing[order[r]]) for r in rows]
            self._compute(slice(first + rows.start, first + rows.stop), chosen)
        for row, i in enumerate(order, start=first):
            self._remember(row, sequences[i], missing[i])
        return order, missing

    def _spans(self, sequence: Tokens) -> Sequence[Span]:
        if self._held is not None and self._held[0] == sequence:
            return [self._held[1]]
        return self._cache.match(sequence)

    def _compute(self, rows: slice, chosen: Sequence[tuple[Tokens, int]]) -> None:
        """Forward passes over the last tokens of some rows: (sequence, number of tokens)."""
        width = max(missing for _, missing in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        valid = torch.zeros(len(chosen), width, dtype=torch.bool)
        ends = torch.tensor([len(sequence) for sequence, _ in chosen])
        for row, (sequence, missing) in enumerate(chosen):
            ids[row, width - missing :] = torch.tensor(sequence[len(sequence) - missing :])
            valid[row, width - missing :] = True
        positions = (ends[:, None] - width + torch.arange(width)).clamp(min=0)
        kv, everywhere = self.kv, bool(valid.all())
        ids, positions, valid = (x.to(kv.shape.device) for x in (ids, positions, valid))
        step = max(1, _PASS_TOKENS // len(chosen))
        for start in range(0, width, step):
            part = slice(start, min(width, start + step))
            window = kv.window(
                rows,
                kv.columns - width + part.start,
                kv.columns - width + part.stop,
                None if everywhere else valid[:, part],
            )
            window.write_hidden(self._network.forward(ids[:, part], positions[:, part], window))

    def _compute_stems(self, sequences: Sequence[Tokens]) -> list[int]:
        """Compute once, into the cache, what several of the sequences begin with.

        Returns the tokens computed, each counted for the first sequence that needed them.
        """
        computed = [0] * len(sequences)
        while self._cache.max_bytes > 0 and (stems := self._stems(sequences)):
            longest = max(map(len, stems))
            kv = KVBatch(self.kv.shape, len(stems), longest)
            kv.clear(longest, longest)
            scratch = CachedBatch(self._network, self._cache, kv)
            _, counts = scratch._fill(list(stems))
            for count, owner in zip(counts, stems.values(), strict=True):
                computed[owner] += count
            if all(self._known(stem) < len(stem) for stem in stems):
                break  # The cache is too small to keep them.
        return computed

    def _known(self, sequence: Tokens) -> int:
        return sum(map(len, self._cache.match(sequence, count=False)))

    def _stems(self, sequences: Sequence[Tokens]) -> dict[Tokens, int]:
        """What groups of sequences share beyond what is known: stem and its first sequence."""
        groups: dict[Tokens, list[int]] = {}
        for i, sequence in enumerate(sequences):
            known = self._known(sequence)
            if known < len(sequence):
                groups.setdefault(sequence[: known + 1], []).append(i)
        stems = {}
        for start, members in groups.items():
            shared = min(common_length(sequences[i], sequences[members[0]]) for i in members)
            if len(members) > 1 and shared - len(start) + 1 >= _LEAST_STEM:
                stems[sequences[members[0]][:shared]] = members[0]
        return stems


class DynamicBatch:
    """Rows of a network whose state is more than keys and values, kept as transformers does."""

    refills = False

    def __init__(self, own: OwnPasses, config: Any, device: torch.device) -> None:
        self._own, self._config, self._device = own, config, device

    def add(
        self, sequences: Sequence[Tokens], copies: Sequence[int], hold: bool = False
    ) -> Prefilled:
        """See `Batch.add`; the batch is empty before."""
        inputs = padded_inputs(sequences, self._device)
        self._cache: Any = DynamicCache(config=self._config)
        self._hidden = self._own.hidden(self._cache, **inputs)[:, -1]
        self._mask = inputs.get("attention_mask")
        self._positions = torch.tensor([[len(s) - 1] for s in sequences], device=self._device)
        rows = [i for i, count in enumerate(copies) for _ in range(count)]
        if rows != list(range(len(sequences))):
            self._select(rows)
        return Prefilled(rows, [len(sequence) for sequence in sequences])

    def append(self, tokens: Sequence[int]) -> None:
        """See `Batch.append`."""
        self._positions = self._positions + 1
        inputs = {
            "input_ids": torch.tensor(tokens, device=self._device)[:, None],
            "position_ids": self._positions,
        }
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
            inputs["attention_mask"] = self._mask
        self._hidden = self._own.hidden(self._cache, **inputs)[:, -1]

    def drop(self, row: int) -> None:
        """See `Batch.drop`."""
        rows = list(range(len(self._positions)))
        last = rows.pop()
        if row != last:
            rows[row] = last
        if rows:
            self._select(rows)

    def keep(self, row: int, sequence: Tokens) -> None:
        """Nothing is kept."""

    def logits(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Batch.logits`."""
        return self._own.logits(self._hidden)

    def _select(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long, device=self._device)
        # The beam search's reordering: unlike the cache's other methods on the batch, every kind of
        # layer has it, those of hybrid models too.
        self._cache.reorder_cache(index)
        self._positions, self._hidden = self._positions[index], self._hidden[index]
        if self._mask is not None:
            self._mask = self._mask[index]


class PlainBatch:
    """One row, computed anew for each token: right for every model that can be asked at all."""

    refills = False

    def __init__(self, own: OwnPasses, device: torch.device) -> None:
        self._own, self._device = own, device

    def add(
        self, sequences: Sequence[Tokens], copies: Sequence[int], hold: bool = False
    ) -> Prefilled:
        """See `Batch.add`; there is one sequence, once."""
        [self._sequence] = sequences
        return Prefilled([0], [len(self._sequence)])

    def append(self, tokens: Sequence[int]) -> None:
        """See `Batch.append`."""
        self._sequence = (*self._sequence, *tokens)

    def drop(self, row: int) -> None:
        """See `Batch.drop`."""
        self._sequence = ()

    def keep(self, row: int, sequence: Tokens) -> None:
        """Nothing is kept."""

    def logits(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Batch.logits`."""
        [hidden] = plain_hidden(self._own, [self._sequence], self._device)
        return self._own.logits(hidden[-1:])


def plain_hidden(
    own: OwnPasses, sequences: Sequence[Tokens], device: torch.device
) -> list[torch.Tensor]:
    """Hidden states [tokens, hidden_size] of each sequence, in one pass without any cache."""
    hidden = own.hidden(None, **padded_inputs(sequences, device))
    return [row[len(row) - len(s) :] for row, s in zip(hidden, sequences, strict=True)]


def padded_inputs(sequences: Sequence[Tokens], device: torch.device) -> dict[str, torch.Tensor]:
    """Sequences padded on the left, with mask and positions where there is padding."""
    width = max(map(len, sequences))
    if all(len(sequence) == width for sequence in sequences):
        return {"input_ids": torch.tensor(sequences, device=device)}
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def kv_rows(shape: KVShape, longest: int, wanted: int, max_bytes: int) -> int:
    """Rows of `longest` tokens that fit into `max_bytes`: at least 1, at most `wanted`."""
    return max(1, min(wanted, max_bytes // (shape.bytes_per_token * longest)))


def _passes(missing: Sequence[int]) -> Iterator[range]:
    """Ranges of rows for one pass each; `missing` falls from row to row, zeros are left out."""
    start = 0
    while start < len(missing) and missing[start]:
        width = missing[start]
        most = max(1, _PASS_TOKENS // width)
        end = start + 1
        while (
            end < min(len(missing), start + most)
            and missing[end]
            and width <= 1.5 * missing[end] + 4
        ):
            end += 1
        yield range(start, end)
        start = end

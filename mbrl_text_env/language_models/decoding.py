"""The decoding loop: continuous batching of many requests, and guards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mbrl_text_env.language_models.base import (
    Guard,
    SampleRequest,
    SamplingParams,
    Tokenizer,
    has_stop_text,
    prefix_of,
    stream,
)
from mbrl_text_env.language_models.engine import Batch, Tokens, draw, probabilities, top_tokens
from mbrl_text_env.language_models.guarding import GrowingText, replacements, weighted_token
from mbrl_text_env.types import TextState

# Add rows when this fraction of the batch is free, because each addition is a short prefill.
_REFILL_SHARE = 1 / 8


@dataclass
class Sampled:
    """A chunk of a request (by index) that is being sampled, or queued."""

    request: int
    state: TextState
    params: SamplingParams
    limit: int
    generator: np.random.Generator
    guard: Guard | None = None
    text: GrowingText | None = None
    is_dead: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    log_weight: float = 0.0

    @property
    def sequence(self) -> Tokens:
        """All tokens: prompt, response and current chunk."""
        return prefix_of(self.state) + tuple(self.tokens)

    def written(self, tokenizer: Tokenizer) -> GrowingText:
        """The response's text before the last token; for chunks with a guard."""
        if self.text is None:
            before = (*self.state.response_ids, *self.tokens[:-1])
            self.text = GrowingText(tokenizer, before)
        return self.text

    def is_done(self, tokenizer: Tokenizer) -> bool:
        """Whether the chunk is complete."""
        if (
            self.is_dead
            or len(self.tokens) == self.limit
            or self.tokens[-1] in tokenizer.stop_token_ids
        ):
            return True
        return has_stop_text(tokenizer, self.tokens, self.params)


def waiting(requests: Sequence[SampleRequest], limits: Sequence[int]) -> list[Sampled]:
    """Queue the chunks of all requests, longest prefix first, grouped by state."""
    prefixes = [prefix_of(r.state) for r in requests]
    order = sorted(range(len(requests)), key=lambda i: (-len(prefixes[i]), prefixes[i], i))
    return [
        Sampled(
            i, r.state, r.params, limits[i], stream(r.seed, r.state, r.first_sample + k), r.guard
        )
        for i, r in ((i, requests[i]) for i in order)
        for k in range(r.num_samples)
    ]


def whole_requests(queue: Sequence[Sampled], size: int) -> Iterator[list[Sampled]]:
    """Split the queue into batches that keep the chunks of a request together where possible."""
    part: list[Sampled] = []
    groups: dict[int, list[Sampled]] = {}
    for chunk in queue:
        groups.setdefault(chunk.request, []).append(chunk)
    for group in groups.values():
        for start in range(0, len(group), size):
            piece = group[start : start + size]
            if part and len(part) + len(piece) > size:
                yield part
                part = []
            part = part + piece
    if part:
        yield part


def fill_in(
    queue: Sequence[Sampled], batch: Batch, size: int, tokenizer: Tokenizer, computed: list[int]
) -> None:
    """Sample every chunk of the queue (from `waiting`) to its end.

    The batch is empty and takes `size` rows. The number of prefix tokens processed for each request
    is added to `computed`.
    """
    pending = list(queue)
    active: list[Sampled] = []
    # Allocated once: new memory for every step's logits costs more than computing with them.
    buffers: tuple[Tensor, Tensor] | None = None
    while pending or active:
        free = size - len(active)
        if pending and (not active or (batch.refills and free >= max(1, size * _REFILL_SHARE))):
            active += _admit(pending, batch, free, computed)
        logits = batch.logits(buffers and buffers[0][: len(active)])
        if buffers is None:
            whole = (size, logits.shape[-1])
            buffers = logits.new_empty(whole), logits.new_empty(whole)
        _draw(active, logits, buffers[1][: len(active)])
        _redraw_refused(active, logits, tokenizer)
        # Backwards, because a dropped row is replaced by the last one.
        for row in reversed(range(len(active))):
            if not active[row].is_done(tokenizer):
                continue
            if active[row].tokens[-1] not in tokenizer.stop_token_ids:
                batch.keep(row, active[row].sequence)
            batch.drop(row)
            last = active.pop()
            if row < len(active):
                active[row] = last
        if active:
            batch.append([chunk.tokens[-1] for chunk in active])


def _admit(queue: list[Sampled], batch: Batch, free: int, computed: list[int]) -> list[Sampled]:
    groups: dict[Tokens, list[Sampled]] = {}
    for chunk in queue[:free]:
        groups.setdefault(chunk.sequence, []).append(chunk)
    del queue[:free]
    hold = bool(queue) and queue[0].sequence in groups
    rows, counts = batch.add(list(groups), [len(group) for group in groups.values()], hold)
    for group, count in zip(groups.values(), counts, strict=True):
        computed[group[0].request] += count
    members = [iter(group) for group in groups.values()]
    return [next(members[i]) for i in rows]


def _draw(active: Sequence[Sampled], logits: Tensor, scratch: Tensor) -> None:
    uniforms = torch.tensor([chunk.generator.random() for chunk in active], dtype=torch.float64)
    uniforms = uniforms.to(logits.device)
    kinds: dict[SamplingParams, list[int]] = {}
    for row, chunk in enumerate(active):
        kinds.setdefault(chunk.params, []).append(row)
    for params, rows in kinds.items():
        if len(kinds) == 1:
            tokens, logprobs = draw(logits, uniforms, params, scratch)
        else:
            tokens, logprobs = draw(logits[rows], uniforms[rows], params)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            active[row].tokens.append(token)
            active[row].logprobs.append(logprob)


def _redraw_refused(active: Sequence[Sampled], logits: Tensor, tokenizer: Tokenizer) -> None:
    """Replace last tokens that a guard rejects; see `Guard`."""
    guards: dict[int, list[int]] = {}
    for row, chunk in enumerate(active):
        if chunk.guard is not None:
            guards.setdefault(id(chunk.guard), []).append(row)
    for rows in guards.values():
        guard = active[rows[0]].guard
        assert guard is not None
        if guard.weighted:
            for row in rows:
                _redraw_weighted(active[row], guard, logits[row], tokenizer)
        else:
            _redraw_of_one(active, guard, rows, logits, tokenizer)
        for row in rows:
            active[row].written(tokenizer).append(active[row].tokens[-1])


def _redraw_weighted(chunk: Sampled, guard: Guard, logits: Tensor, tokenizer: Tokenizer) -> None:
    def may_follow(token: int) -> bool:
        text, ended = chunk.written(tokenizer).with_token(token), token in tokenizer.stop_token_ids
        return bool(guard.allows([chunk.state], [text], [ended])[0])

    shaped = probabilities(logits, chunk.params)
    token, log_weight = weighted_token(
        chunk.tokens[-1], shaped, may_follow, guard.candidates, chunk.generator
    )
    chunk.log_weight += log_weight
    chunk.is_dead = token is None
    if token is not None and token != chunk.tokens[-1]:
        chunk.tokens[-1] = token
        chunk.logprobs[-1] = float(logits[token] - logits.logsumexp(-1))


def _redraw_of_one(
    active: Sequence[Sampled],
    guard: Guard,
    rows: Sequence[int],
    logits: Tensor,
    tokenizer: Tokenizer,
) -> None:
    """Replace the tokens of one guard's rows, checking all open rows together."""
    left: dict[int, tuple[dict[int, float], Iterator[int]]] = {}
    asked = {row: active[row].tokens[-1] for row in rows}
    while asked:
        allowed = guard.allows(
            [active[row].state for row in asked],
            [active[row].written(tokenizer).with_token(token) for row, token in asked.items()],
            [token in tokenizer.stop_token_ids for token in asked.values()],
        )
        refused = [row for row, well in zip(asked, allowed, strict=True) if not well]
        for row in asked.keys() - set(refused):
            if row in left:
                active[row].tokens[-1] = asked[row]
                active[row].logprobs[-1] = left[row][0][asked[row]]
        asked = {}
        for row in refused:
            chunk = active[row]
            if row not in left:
                count = min(guard.candidates, logits.shape[-1])
                ids, logs = top_tokens(logits[row][None], count)
                found = dict(zip(ids[0].tolist(), logs[0].tolist(), strict=True))
                found.pop(chunk.tokens[-1], None)
                left[row] = found, replacements(found, guard, chunk.params, chunk.generator)
            other = next(left[row][1], None)
            chunk.is_dead = other is None
            if other is not None:
                asked[row] = other

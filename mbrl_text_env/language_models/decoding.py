"""The decoding loop: many requests side by side in one batch that is kept full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mbrl_text_env.language_models.base import (
    SampleRequest,
    SamplingParams,
    Tokenizer,
    has_stop_text,
    prefix_of,
    stream,
)
from mbrl_text_env.language_models.batches import Batch
from mbrl_text_env.language_models.prefix_cache import Tokens
from mbrl_text_env.language_models.sampling import draw
from mbrl_text_env.types import TextState

# Rows are added when this share of the batch is free: every addition is a pass over few tokens.
_REFILL_SHARE = 1 / 8


@dataclass
class Sampled:
    """A chunk of a request (by index) that is being sampled, or waits to be."""

    request: int
    state: TextState
    limit: int
    params: SamplingParams
    generator: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def sequence(self) -> Tokens:
        """All tokens: prompt, response and the chunk so far."""
        return prefix_of(self.state) + tuple(self.tokens)


def waiting(requests: Sequence[SampleRequest], limits: Sequence[int]) -> list[Sampled]:
    """The chunks of all requests, longest prefix first, those of one state together."""
    order = sorted(
        range(len(requests)),
        key=lambda i: (-len(prefix_of(requests[i].state)), prefix_of(requests[i].state), i),
    )
    return [
        Sampled(
            i,
            requests[i].state,
            limits[i],
            requests[i].params,
            stream(requests[i].seed, requests[i].state, k),
        )
        for i in order
        for k in range(requests[i].first_sample, requests[i].first_sample + requests[i].num_samples)
    ]


def decode(
    queue: Sequence[Sampled], batch: Batch, size: int, tokenizer: Tokenizer, computed: list[int]
) -> None:
    """Sample every chunk of the queue to its end.

    Args:
        queue: As `waiting` gives it; the chunks are filled in.
        batch: An empty batch.
        size: Most rows of it.
        tokenizer: Knows the stop tokens, and text where stop strings are looked for.
        computed: For each request, the prefix tokens that went through the network; added to.
    """
    pending = list(queue)
    active: list[Sampled] = []
    # Taken once: fresh memory for every step's logits costs more than the passes over them.
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None
    while pending or active:
        free = size - len(active)
        if pending and (not active or (batch.refills and free >= max(1, size * _REFILL_SHARE))):
            active += _admit(pending, batch, free, computed)
        logits = batch.logits(buffers and buffers[0][: len(active)])
        if buffers is None:
            whole = (size, logits.shape[-1])
            buffers = logits.new_empty(whole), logits.new_empty(whole)
        _draw(active, logits, buffers[1][: len(active)])
        # From the last row on: a row that leaves is replaced by the last one.
        for row in reversed(range(len(active))):
            if not is_done(active[row], tokenizer):
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
    """Move up to `free` chunks from the queue into the batch."""
    chosen = queue[:free]
    del queue[:free]
    groups: dict[Tokens, list[Sampled]] = {}
    for chunk in chosen:
        groups.setdefault(chunk.sequence, []).append(chunk)
    hold = bool(queue) and queue[0].sequence in groups
    found = batch.add(list(groups), [len(group) for group in groups.values()], hold)
    for group, count in zip(groups.values(), found.computed, strict=True):
        computed[group[0].request] += count
    members = [iter(group) for group in groups.values()]
    return [next(members[i]) for i in found.rows]


def _draw(active: Sequence[Sampled], logits: torch.Tensor, scratch: torch.Tensor) -> None:
    """Append a token to every chunk."""
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


def whole_requests(queue: Sequence[Sampled], size: int) -> Iterator[list[Sampled]]:
    """Batches in which each request is as little divided as possible."""
    part: list[Sampled] = []
    groups: dict[int, list[Sampled]] = {}
    for chunk in queue:
        groups.setdefault(chunk.request, []).append(chunk)
    for group in groups.values():
        if part and len(part) + len(group) > size:
            yield part
            part = []
        for start in range(0, len(group), size):
            if part and len(part) + len(group[start : start + size]) > size:
                yield part
                part = []
            part = part + group[start : start + size]
    if part:
        yield part


def is_done(chunk: Sampled, tokenizer: Tokenizer) -> bool:
    """Whether the chunk has all of its tokens."""
    if len(chunk.tokens) == chunk.limit or chunk.tokens[-1] in tokenizer.stop_token_ids:
        return True
    return has_stop_text(tokenizer, chunk.tokens, chunk.params)

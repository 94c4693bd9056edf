"""Tokens from logits: the inverse of the cumulative distribution, and the most probable tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mbrl_text_env.language_models.base import SamplingParams

# The cumulative sums run over blocks of this many tokens first, and then within one block.
_BLOCK = 128
# A nucleus larger than this is looked for by sorting the whole vocabulary.
_MOST_IN_NUCLEUS = 512


def draw(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    params: SamplingParams,
    scratch: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn uniform numbers into tokens by the inverse of the cumulative distribution.

    `torch.multinomial` takes several passes over the vocabulary and draws from a generator that
    all sequences share; this takes one for the exponentials and one for sums of blocks.

    Args:
        logits: float32[B, V].
        uniforms: float64[B] in [0, 1).
        params: Temperature, top-k and top-p, applied in this order.
        scratch: float32[B, V] to work in; taken fresh by default.

    Returns:
        Tokens int64[B] and their log-probabilities float32[B] (nats) under the unshaped
        distribution.
    """
    largest = logits.amax(-1, keepdim=True)
    weights = torch.sub(logits, largest, out=scratch).exp_()
    total = weights.sum(-1)
    if params.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        if not params.is_plain:
            # Relative to the largest, so that no quotient by a small temperature overflows.
            scaled = torch.sub(logits, largest, out=weights)
            scaled /= max(params.temperature, torch.finfo(scaled.dtype).tiny)
            weights = _shaped(scaled, params).exp_()
        tokens = _inverse(weights, uniforms)
    chosen = (logits.gather(-1, tokens[:, None]) - largest).squeeze(-1)
    return tokens, chosen - total.log()


def top_tokens(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable tokens.

    Args:
        logits: float32[B, V].
        k: From 1 to V.

    Returns:
        Tokens int64[B, k], the most probable first, and their log-probabilities float32[B, k].
    """
    found = logits.topk(k)
    return found.indices, found.values - logits.logsumexp(-1, keepdim=True)


def _shaped(scaled: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Logits with those that top-k and top-p drop at minus infinity."""
    if params.top_k and params.top_k < scaled.shape[-1]:
        least = scaled.topk(params.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    return _nucleus(scaled, params.top_p) if params.top_p < 1.0 else scaled


def _nucleus(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    size = scaled.shape[-1]
    total = scaled.exp().sum(-1, keepdim=True)
    found = scaled.topk(min(size, _MOST_IN_NUCLEUS))
    if bool((found.values.exp().sum(-1, keepdim=True) < top_p * total).any()):
        found = scaled.topk(size)
    probabilities = found.values.exp() / total
    # A token stays if the ones before it have not reached top_p; the first always does.
    kept = probabilities.cumsum(-1) - probabilities < top_p
    kept[:, 0] = True
    values = found.values.masked_fill(~kept, -torch.inf)
    return torch.full_like(scaled, -torch.inf).scatter_(-1, found.indices, values)


def _inverse(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first token of each row at which the cumulative weight exceeds the row's share."""
    rows, size = weights.shape
    padding = -size % _BLOCK
    if padding:
        weights = torch.nn.functional.pad(weights, (0, padding))
    blocks = weights.view(rows, -1, _BLOCK)
    # Doubles from here on: the rounding of 50,000 sums would show in the samples.
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    targets = uniforms[:, None] * ends[:, -1:]
    block = _first_above(ends, targets)
    end = ends.gather(-1, block)
    start = torch.where(block > 0, ends.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(rows, device=blocks.device), block[:, 0]].cumsum(
        -1, dtype=torch.float64
    )
    # The block's sum in single precision differs from the sum of its doubles: as a share of the
    # block the number falls on a token of positive weight for certain.
    share = ((targets - start) / (end - start)).clamp(0.0, 1.0 - 1e-12)
    return (block * _BLOCK + _first_above(inside, share * inside[:, -1:])).squeeze(-1)


def _first_above(cumulative: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    places = torch.searchsorted(cumulative, targets, right=True)
    return places.clamp(max=cumulative.shape[-1] - 1)


def chosen_logprobs(logits: torch.Tensor, tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of one token a row; rows that follow the last are left out."""
    ids = torch.tensor(tokens, dtype=torch.long, device=logits.device)
    logits = logits[: len(tokens)]
    chosen = logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return [float(value) for value in chosen]

"""The decision process as pure functions, used by the environments and planners."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mbrl_text_env.types import Chunk, FinishReason, Prompt, TextState

if TYPE_CHECKING:
    from mbrl_text_env.language_models.base import Tokenizer


class EpisodeEndedError(RuntimeError):
    """An action was applied to a state whose response has ended."""


class InvalidChunkError(ValueError):
    """Token ids that are not a valid action."""


@dataclass(frozen=True)
class ChunkRules:
    """The rules for actions: 1 to `max_chunk_tokens` ids below `vocab_size`, stop token last."""

    vocab_size: int
    stop_token_ids: frozenset[int]
    max_chunk_tokens: int

    def fault(self, token_ids: Sequence[int]) -> str | None:
        """Describe why `token_ids` is not a chunk; None if it is one."""
        if not 1 <= len(token_ids) <= self.max_chunk_tokens:
            return f"expected 1 to {self.max_chunk_tokens} token ids, got {len(token_ids)}"
        if max(token_ids) >= self.vocab_size or min(token_ids) < 0:
            return f"expected ids from 0 to {self.vocab_size - 1}, got {list(token_ids)}"
        if not self.stop_token_ids.isdisjoint(token_ids[:-1]):
            return f"a stop token may only be the last one, got {list(token_ids)}"
        return None

    def finish_reason(self, token_ids: Sequence[int]) -> FinishReason | None:
        """`"stop"` if the chunk ends with a stop token, else None; InvalidChunkError if invalid."""
        fault = self.fault(token_ids)
        if fault is not None:
            raise InvalidChunkError(
                f"Invalid action: {fault}. Sample actions from `env.action_space` or from a "
                "language model with `max_new_tokens` at most `max_chunk_tokens`."
            )
        return "stop" if token_ids[-1] in self.stop_token_ids else None

    def chunk(self, token_ids: Sequence[int]) -> Chunk:
        """Make a chunk from token ids; see `finish_reason`."""
        return Chunk(tuple(token_ids), finish_reason=self.finish_reason(token_ids))


def unpadded(ids: Sequence[int], rules: ChunkRules) -> list[int]:
    """The chunk in padded ids; see `spaces.padded_chunk_space`."""
    chunk = list(itertools.takewhile(lambda token: token != rules.vocab_size, ids))
    stops = (i for i, token in enumerate(chunk, start=1) if token in rules.stop_token_ids)
    return chunk[: next(stops, None)]


def as_token_ids(action: Any) -> list[int] | None:
    """Convert a 1-D array or tensor, list or tuple of integers to a list of ints; else None."""
    action = _as_numpy(action)
    if isinstance(action, np.ndarray):
        return action.tolist() if action.ndim == 1 and action.dtype.kind in "iu" else None
    if not isinstance(action, (list, tuple)):
        return None
    ids = [as_index(i) for i in action]
    return None if None in ids else ids  # type: ignore[return-value]


def as_index(value: Any) -> int | None:
    """Convert an integer of Python, NumPy or torch (or a 1-element array) to an int; else None."""
    value = _as_numpy(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return int(value.item()) if value.size == 1 and value.dtype.kind in "iu" else None
    # bool is an int to Python, but True as a token id is a mistake.
    with contextlib.suppress(TypeError):
        return None if isinstance(value, bool) else operator.index(value)
    return None


def _as_numpy(value: Any) -> Any:
    """Convert a torch tensor on any device to an array; return anything else unchanged."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def initial(prompt: Prompt, tokenizer: Tokenizer) -> TextState:
    """Return the state of an empty response to `prompt`."""
    return TextState(prompt, tokenizer.encode_prompt(prompt))


def response_limit(state: TextState, tokenizer: Tokenizer, max_response_tokens: int) -> int:
    """Maximum response length: the given limit, or the space left in the context if smaller."""
    return min(max_response_tokens, tokenizer.context_length - len(state.prompt_ids))


def is_terminal(state: TextState) -> bool:
    """Whether the response has ended."""
    return state.finish_reason is not None


def check_not_terminal(state: TextState) -> None:
    """Raise EpisodeEndedError if the response has ended."""
    if state.finish_reason is not None:
        raise EpisodeEndedError(
            f"The response to prompt {state.prompt.id!r} has ended "
            f"(finish_reason={state.finish_reason!r}), so no chunk can follow. "
            "Call `reset()`, or continue from a state that is not terminal."
        )


def transition(state: TextState, chunk: Chunk, max_response_tokens: int) -> TextState:
    """Append a chunk to a state's response; EpisodeEndedError if the response has ended.

    A chunk that exceeds `max_response_tokens` is cut to fit. Its stop token, if any, is then lost,
    and the finish reason is `"length"`.

    Example:
        >>> state = TextState(Prompt.from_text("Hi"), prompt_ids=(5, 6))
        >>> transition(state, Chunk((1, 2, 3)), max_response_tokens=2)  # doctest: +ELLIPSIS
        TextState(...response_ids=(1, 2), finish_reason='length', chunk_ends=(2,), ...)
    """
    return append(state, chunk.token_ids, chunk.finish_reason, max_response_tokens, chunk.logprobs)


def append(
    state: TextState,
    token_ids: tuple[int, ...],
    finish_reason: FinishReason | None,
    max_response_tokens: int,
    logprobs: tuple[float, ...] = (),
) -> TextState:
    """`transition` without a `Chunk` object, for the inner loop of the environments."""
    check_not_terminal(state)
    room = max_response_tokens - len(state.response_ids)
    if len(token_ids) > room:
        token_ids, finish_reason = token_ids[:room], None
    response_ids = state.response_ids + token_ids
    length = len(response_ids)
    if finish_reason is None and length >= max_response_tokens:
        finish_reason = "length"
    logprob = None
    if logprobs:
        before = state.logprob if state.response_ids else 0.0
        logprob = None if before is None else before + sum(logprobs[: len(token_ids)])
    chunk_ends = (*state.chunk_ends, length)
    return TextState(
        state.prompt, state.prompt_ids, response_ids, finish_reason, chunk_ends, logprob
    )

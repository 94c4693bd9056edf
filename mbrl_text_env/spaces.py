"""Gymnasium spaces for chunks of tokens and for Unicode text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from mbrl_text_env.mdp import ChunkRules


class ChunkSpace(gym.Space[npt.NDArray[np.int64]]):
    """Chunks of 1 to C token ids in which a stop token may only be the last.

    Elements are int64[n]; lists and tuples of ints are accepted by `contains`. `sample` draws the
    length uniformly from 1 to C, then ordinary tokens uniformly, and lets the last be any token.

    Args:
        rules: Vocabulary size, stop tokens and C.
        seed: Seed of `sample`.

    Raises:
        ValueError: C or the vocabulary size is below 1.

    Example:
        >>> space = ChunkSpace(ChunkRules(10, frozenset({0}), max_chunk_tokens=4))
        >>> [5, 3, 0] in space, [0, 3] in space
        (True, False)
    """

    def __init__(self, rules: ChunkRules, seed: int | np.random.Generator | None = None) -> None:
        if rules.max_chunk_tokens < 1 or rules.vocab_size < 1:
            raise ValueError(
                "Expected max_chunk_tokens and vocab_size of at least 1, got "
                f"{rules.max_chunk_tokens} and {rules.vocab_size}."
            )
        self.rules = rules
        super().__init__(None, np.int64, seed)

    @property
    def is_np_flattenable(self) -> bool:
        """Chunks differ in length, so they are not."""
        return False

    def sample(self, mask: None = None, probability: None = None) -> npt.NDArray[np.int64]:
        """Draw a chunk, int64[n]. Masks are not supported.

        Raises:
            ValueError: A mask was given.
        """
        if mask is not None or probability is not None:
            raise ValueError("ChunkSpace.sample takes no mask: draw from a language model instead.")
        rules = self.rules
        length = int(self.np_random.integers(1, rules.max_chunk_tokens + 1))
        ordinary = rules.vocab_size - len(rules.stop_token_ids)
        head = self.np_random.integers(ordinary, size=length - 1) if ordinary else np.empty(0, int)
        for stop in sorted(rules.stop_token_ids):
            head += head >= stop  # the ordinary ids are those that are left when stops are skipped
        return np.append(head, self.np_random.integers(rules.vocab_size)).astype(np.int64)

    def contains(self, x: Any) -> bool:
        """Whether `x` is a chunk (an integer array of one axis, or a list or tuple of ints)."""
        ids = as_token_ids(x)
        return ids is not None and self.rules.fault(ids) is None

    def to_jsonable(self, sample_n: Iterable[npt.NDArray[np.int64]]) -> list[list[int]]:
        """Chunks as lists of ints."""
        return [[int(i) for i in chunk] for chunk in sample_n]

    def from_jsonable(self, sample_n: list[Any]) -> list[npt.NDArray[np.int64]]:
        """Chunks from lists of ints."""
        return [np.asarray(chunk, dtype=np.int64) for chunk in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChunkSpace) and self.rules == other.rules

    def __repr__(self) -> str:
        rules = self.rules
        stops = sorted(rules.stop_token_ids)
        return f"ChunkSpace({rules.vocab_size}, stop={stops}, max_tokens={rules.max_chunk_tokens})"


def as_token_ids(action: Any) -> list[int] | None:
    """An action as a list of ints, or None where it is not a flat sequence of integers."""
    if isinstance(action, np.ndarray):
        return action.tolist() if action.ndim == 1 and action.dtype.kind in "iu" else None
    if not isinstance(action, (list, tuple)):
        return None
    # bool is an int to Python, but True as a token id is a mistake.
    if all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in action):
        return [int(i) for i in action]
    return None


class UnicodeText(gym.Space[str]):
    """Strings of any Unicode characters, the empty string included.

    `gymnasium.spaces.Text` knows only a fixed set of characters and by default no empty string.

    Args:
        max_length: Most characters.
        seed: Seed of `sample`.
    """

    # Letters, digits and white space of several scripts; sampling need not reach all of Unicode.
    _CHARACTERS = tuple(
        "abcdefghijklmnopqrstuvwxyz ABCDEFG 0123456789 .,;:!?'\n äöüßéñ Жя 日本語 🙂"
    )

    def __init__(self, max_length: int, seed: int | np.random.Generator | None = None) -> None:
        if max_length < 0:
            raise ValueError(f"Expected max_length of at least 0, got {max_length}.")
        self.max_length = max_length
        super().__init__((), None, seed)

    @property
    def is_np_flattenable(self) -> bool:
        """Strings are no arrays of numbers."""
        return False

    def sample(self, mask: None = None, probability: None = None) -> str:
        """Draw a string of at most 32 characters. Masks are not supported."""
        if mask is not None or probability is not None:
            raise ValueError("UnicodeText.sample takes no mask.")
        length = int(self.np_random.integers(0, min(self.max_length, 32) + 1))
        return "".join(self.np_random.choice(self._CHARACTERS, length))

    def contains(self, x: Any) -> bool:
        """Whether `x` is a string of at most `max_length` characters."""
        return isinstance(x, str) and len(x) <= self.max_length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnicodeText) and self.max_length == other.max_length

    def __repr__(self) -> str:
        return f"UnicodeText({self.max_length})"

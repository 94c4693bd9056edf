"""What an agent sees of a state: text, token ids, or an embedding.

Each class has the space of one environment and a batched `observe(states, responses)`, so that the
single and the vector environment show the same; `responses` are the decoded response prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from mbrl_text_env.encoders import Encoder, encode_texts, prefix_text
from mbrl_text_env.spaces import UnicodeText
from mbrl_text_env.types import TextState

_MAX_CHARACTERS = 2**31 - 1
# Gymnasium's checker warns of infinite bounds; no embedding comes near this one.
_LARGEST = float(np.finfo(np.float32).max)


def feature_box(size: int) -> spaces.Box:
    """A space of feature vectors, float32[size]."""
    return spaces.Box(-_LARGEST, _LARGEST, (size,), np.float32)


class TextObservation:
    """`{"prompt": str, "response": str}`; any Unicode, the response may be empty."""

    def __init__(self) -> None:
        self.space = spaces.Dict(
            prompt=UnicodeText(_MAX_CHARACTERS), response=UnicodeText(_MAX_CHARACTERS)
        )

    def observe(self, states: Sequence[TextState], responses: Sequence[str]) -> list[Any]:
        """Texts as they are."""
        return [
            {"prompt": state.prompt.text, "response": response}
            for state, response in zip(states, responses, strict=True)
        ]


class TokenObservation:
    """Token ids padded with 0 on the right, and their counts.

    `{"prompt_ids": int64[P], "prompt_length": int64, "response_ids": int64[R],
    "response_length": int64}`.

    Args:
        vocab_size: Number of token ids.
        max_prompt_tokens: P.
        max_response_tokens: R.
    """

    def __init__(self, vocab_size: int, max_prompt_tokens: int, max_response_tokens: int) -> None:
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        high = vocab_size - 1
        self.space = spaces.Dict(
            prompt_ids=spaces.Box(0, high, (max_prompt_tokens,), np.int64),
            prompt_length=spaces.Discrete(max_prompt_tokens + 1),
            response_ids=spaces.Box(0, high, (max_response_tokens,), np.int64),
            response_length=spaces.Discrete(max_response_tokens + 1),
        )

    def observe(self, states: Sequence[TextState], responses: Sequence[str]) -> list[Any]:
        """Ids and lengths; the texts are not used.

        Raises:
            ValueError: A prompt is longer than P.
        """
        for state in states:
            if len(state.prompt_ids) > self.max_prompt_tokens:
                raise ValueError(
                    f"Prompt {state.prompt.id!r} has {len(state.prompt_ids)} tokens, but the "
                    f"observation holds {self.max_prompt_tokens}. Pass a larger max_prompt_tokens."
                )
        return [
            {
                "prompt_ids": _padded(state.prompt_ids, self.max_prompt_tokens),
                "prompt_length": np.int64(len(state.prompt_ids)),
                "response_ids": _padded(state.response_ids, self.max_response_tokens),
                "response_length": np.int64(len(state.response_ids)),
            }
            for state in states
        ]


class EmbeddingObservation:
    """The embedding of prompt and response prefix together, float32[d].

    Args:
        encoder: Embeds texts.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.space = feature_box(encode_texts(encoder, ["size"]).shape[1])

    def observe(self, states: Sequence[TextState], responses: Sequence[str]) -> list[Any]:
        """One encoder call for the batch."""
        texts = [
            prefix_text(state.prompt.text, response)
            for state, response in zip(states, responses, strict=True)
        ]
        return list(encode_texts(self.encoder, texts))


Observation: TypeAlias = TextObservation | TokenObservation | EmbeddingObservation


def _padded(ids: tuple[int, ...], size: int) -> npt.NDArray[np.int64]:
    row = np.zeros(size, dtype=np.int64)
    row[: len(ids)] = ids
    return row

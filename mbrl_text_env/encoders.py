"""Text encoders: how texts are embedded, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mbrl_text_env.types import FloatArray


class Encoder(Protocol):
    """Anything that embeds texts, such as a SentenceTransformer."""

    def encode(self, sentences: list[str]) -> Any:
        """Return float32[len(sentences), d]."""
        ...


def prefix_text(prompt: str, response: str) -> str:
    """Prompt and response in the one text that is embedded, in the article's format."""
    return f"Prompt: {prompt}\nResponse: {response}"


def encode_texts(encoder: Encoder, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Embed texts without a progress bar: float32[B, d]."""
    # SentenceTransformer shows a bar whenever logging is verbose; other encoders know no such flag.
    options = {"show_progress_bar": False} if _is_sentence_transformer(encoder) else {}
    return np.asarray(encoder.encode(list(texts), **options), dtype=np.float32)


def encoder_flops(encoder: Encoder, texts: Sequence[str]) -> FloatArray:
    """Floating-point operations of embedding each text: float64[B].

    2 x parameters (without the embedding tables, which are looked up) x tokens, plus 4 x layers x
    width x tokens^2 for the attention. 0 for encoders other than a SentenceTransformer.
    """
    if not _is_sentence_transformer(encoder) or not texts:
        return np.zeros(len(texts))
    model: Any = encoder
    tokens = [
        len(ids)
        for ids in model.tokenizer(list(texts), truncation=True, max_length=model.max_seq_length)[
            "input_ids"
        ]
    ]
    return _flops(model, np.asarray(tokens, dtype=np.float64))


def encoder_flops_bound(encoder: Encoder) -> float:
    """The most that one text can take: one that fills the encoder's input."""
    if not _is_sentence_transformer(encoder):
        return 0.0
    model: Any = encoder
    return float(_flops(model, np.asarray([float(model.max_seq_length)]))[0])


def _flops(model: Any, tokens: FloatArray) -> FloatArray:
    transformer = model[0].auto_model
    config = transformer.config
    tables = sum(p.numel() for name, p in transformer.named_parameters() if "embeddings." in name)
    parameters = sum(p.numel() for p in transformer.parameters()) - tables
    attention = 4.0 * config.num_hidden_layers * config.hidden_size
    return 2.0 * parameters * tokens + attention * tokens**2


def _is_sentence_transformer(encoder: object) -> bool:
    # By name: sentence_transformers is slow to import, and whoever has one has imported it.
    return any(cls.__name__ == "SentenceTransformer" for cls in type(encoder).__mro__)

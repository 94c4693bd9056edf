"""Text encoders: embed texts, and compute the cost."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from mbrl_text_env.language_models.hf_tokenizer import control_test, plain_text
from mbrl_text_env.types import FloatArray

_MOST_COUNTS = 65536
# Batches of this size fit into the caches of a CPU.
_CPU_BATCH = 16
_lock = threading.Lock()
# Cached facts about an encoder while it exists.
_counts: WeakKeyDictionary[Any, OrderedDict[str, int]] = WeakKeyDictionary()
_sizes: WeakKeyDictionary[Any, tuple[float, float]] = WeakKeyDictionary()
_tests: WeakKeyDictionary[Any, Callable[[str], bool]] = WeakKeyDictionary()

ReducedDtype = Literal["bfloat16", "float16"]
"""Number formats that are faster and less exact than a model's own."""


class Encoder(Protocol):
    """Anything that embeds texts, such as a SentenceTransformer."""

    def encode(self, sentences: list[str]) -> Any:
        """Return float32[len(sentences), d]."""
        ...


def prefix_text(prompt: str, response: str) -> str:
    """The text to embed for a prompt and a response, in the article's format."""
    return f"Prompt: {prompt}\nResponse: {response}"


def encode_texts(
    encoder: Encoder, texts: Sequence[str], dtype: ReducedDtype | None = None
) -> npt.NDArray[np.float32]:
    """Embed texts without a progress bar, float32[B, d].

    A SentenceTransformer computes in `dtype`; None means its own format.
    """
    if not _is_sentence_transformer(encoder):
        return np.asarray(encoder.encode(list(texts)), dtype=np.float32)
    import torch

    model: Any = encoder
    texts = _without_marks(model, texts)
    autocast = dtype and torch.autocast(model.device.type, dtype=getattr(torch, dtype))
    with autocast or contextlib.nullcontext():
        # A proxy of a model in another thread is not a Module, and passes on all texts at once.
        on_cpu = isinstance(encoder, torch.nn.Module) and model.device.type == "cpu"
        if len(texts) > 1 and on_cpu and hasattr(model[0], "auto_model"):
            return _encoded_by_length(model, texts)
        # By default it shows a bar if logging is verbose.
        return np.asarray(model.encode(list(texts), show_progress_bar=False), dtype=np.float32)


def _encoded_by_length(model: Any, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Encode in batches sorted by tokens; the encoder's own sorting by characters pads more."""
    order = np.argsort(_token_counts(model, texts), kind="stable")
    batches = np.split(order, range(_CPU_BATCH, len(order), _CPU_BATCH))
    found = [
        np.asarray(model.encode([texts[i] for i in rows], show_progress_bar=False))
        for rows in batches
    ]
    embeddings = np.empty((len(texts), found[0].shape[1]), dtype=np.float32)
    embeddings[order] = np.concatenate(found)
    return embeddings


def multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 instructions; without them, bfloat16 is slow."""
    import torch

    # Old versions of torch cannot tell; assume no.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def encoder_flops(encoder: Encoder, texts: Sequence[str]) -> FloatArray:
    """FLOPs of embedding each text, float64[B].

    2 x parameters (without the embedding tables, which are only looked up) x tokens, plus 4 x
    layers x width x tokens^2 for attention. 0 for encoders other than a SentenceTransformer.
    """
    if not _is_sentence_transformer(encoder) or not texts:
        return np.zeros(len(texts))
    return _flops(encoder, np.asarray(_token_counts(encoder, texts), dtype=np.float64))


def encoder_flops_bound(encoder: Encoder) -> float:
    """FLOPs of a text of the encoder's maximum length, an upper bound for any text."""
    if not _is_sentence_transformer(encoder):
        return 0.0
    model: Any = encoder
    return float(_flops(model, np.asarray([float(model.max_seq_length)]))[0])


def _token_counts(encoder: Any, texts: Sequence[str]) -> list[int]:
    """Number of tokens of each text, cached because searches repeat the same texts."""
    with _lock:
        known = _counts.setdefault(encoder, OrderedDict())
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            options = {"truncation": True, "max_length": encoder.max_seq_length}
            ids = encoder.tokenizer(_without_marks(encoder, new), **options)["input_ids"]
            known.update(zip(new, map(len, ids), strict=True))
        counts = [known[text] for text in texts]
        while len(known) > _MOST_COUNTS:
            known.popitem(last=False)
    return counts


def _without_marks(encoder: Any, texts: Sequence[str]) -> list[str]:
    """Texts in which the encoder's tokenizer finds no special token, such as "[SEP]"."""
    tokenizer = getattr(encoder, "tokenizer", None)
    if not hasattr(tokenizer, "added_tokens_decoder"):
        # Models that are not text models have another kind of tokenizer, or none.
        return list(texts)
    if encoder not in _tests:
        _tests[encoder] = control_test(tokenizer)
    is_special = _tests[encoder]
    return [plain_text(text, is_special) for text in texts]


def _flops(encoder: Any, tokens: FloatArray) -> FloatArray:
    if encoder not in _sizes:
        transformer = encoder[0].auto_model
        named = transformer.named_parameters()
        weights = sum(p.numel() for name, p in named if "embeddings." not in name)
        config = transformer.config
        attention = 4.0 * config.num_hidden_layers * config.hidden_size
        _sizes[encoder] = 2.0 * weights, attention
    linear, quadratic = _sizes[encoder]
    return linear * tokens + quadratic * tokens**2


def _is_sentence_transformer(encoder: object) -> bool:
    # By name: sentence_transformers is slow to import, and a caller with one has imported it.
    return any(cls.__name__ == "SentenceTransformer" for cls in type(encoder).__mro__)

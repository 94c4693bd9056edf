"""How close a response is to its prompt in the space of a sentence encoder."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from mbrl_text_env.encoders import (
    Encoder,
    ReducedDtype,
    encode_texts,
    encoder_flops,
    encoder_flops_bound,
)
from mbrl_text_env.rewards.base import RewardError, RewardModel
from mbrl_text_env.rewards.names import named
from mbrl_text_env.types import FloatArray, Prompt

_PROMPTS_KEPT = 4096


@named("relevance")
class RelevanceReward(RewardModel):
    """Cosine of the embeddings of prompt and response, in [-1, 1].

    An empty response (nothing but white space) scores 0: it is about nothing. Texts beyond the
    encoder's input (256 tokens for MiniLM) are cut by the encoder. Each distinct response is
    embedded once a call; the embeddings of the latest prompts are kept.

    Source: Reimers and Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
    EMNLP 2019.

    Args:
        encoder: None for the embedded all-MiniLM-L6-v2; a SentenceTransformer's name on the Hub or
            folder; or an object with `encode(list[str]) -> float[B, d]`. It is loaded at first use.
        dtype: What a SentenceTransformer multiplies in: `"bfloat16"` or `"float16"`; None for its
            own format. See `reduced`.

    Raises:
        ValueError: `dtype` is another.
        RewardError: At first use: the encoder cannot be loaded, or does not return one vector a
            text. A zero vector, which has no direction, makes a score that `score_responses`
            refuses.

    Example:
        >>> from mbrl_text_env.types import Prompt
        >>> prompt = Prompt.from_text("Why is the sky blue?")
        >>> RelevanceReward().score([prompt], ["Air scatters blue light."])  # doctest: +SKIP
        array([0.6...])
    """

    name = "relevance"

    def __init__(
        self, encoder: Encoder | str | None = None, *, dtype: ReducedDtype | None = None
    ) -> None:
        _check_dtype(dtype)
        self.encoder = encoder
        self.dtype = dtype
        self._loaded: Encoder | None = None
        self._questions: OrderedDict[str, npt.NDArray[np.float64]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None, "_questions": OrderedDict()}

    def reduced(self, dtype: str = "bfloat16") -> RelevanceReward:
        """The same reward with the encoder's products in another format, for values of prefixes.

        With bfloat16 MiniLM embeds in less than half the time on a CPU with AVX512-BF16; the
        cosines differ by less than 0.01. On a CPU without such instructions it is slower.
        """
        _check_dtype(dtype)
        # A copy leaves out what is kept of prompts, which depends on the format.
        other = copy.copy(self)
        other.dtype = cast("ReducedDtype", dtype)
        other._loaded = self._loaded
        return other

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the cosine of each prompt and its response."""
        scores = np.zeros(len(responses))
        rows = [i for i, response in enumerate(responses) if response.strip()]
        if rows:
            questions = [prompts[i].text for i in rows]
            answers = [responses[i] for i in rows]
            scores[rows] = self._cosines(questions, answers)
        return scores

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the floating-point operations of embedding each prompt and response.

        2 x parameters (without the embedding tables) x tokens + 4 x layers x width x tokens^2 for
        each of the two texts. An upper bound: prompts whose embedding is kept are not embedded
        again, responses that occur twice in a call once, and empty ones not at all. 0 if the
        encoder is not a SentenceTransformer.
        """
        encoder = self._loaded_encoder()
        texts = [prompt.text for prompt in prompts]
        return encoder_flops(encoder, texts) + encoder_flops(encoder, responses)

    def flops_bound(self) -> float:
        """The most that one response can take: two texts that fill the encoder's input."""
        return 2.0 * encoder_flops_bound(self._loaded_encoder())

    def _cosines(self, questions: Sequence[str], answers: Sequence[str]) -> FloatArray:
        # A search asks for the same prompts again and again.
        known = {text: self._questions[text] for text in questions if text in self._questions}
        new = [text for text in dict.fromkeys(questions) if text not in known]
        directions = self._directions([*new, *answers])
        known.update(zip(new, directions, strict=False))
        self._questions.update((text, known[text]) for text in new)
        while len(self._questions) > _PROMPTS_KEPT:
            self._questions.popitem(last=False)
        kept = np.stack([known[text] for text in questions])
        return cast("FloatArray", (kept * directions[len(new) :]).sum(axis=1))

    def _directions(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Embeddings of length 1: float64[len(texts), d]."""
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        embeddings = encode_texts(self._loaded_encoder(), list(place), self.dtype)
        embeddings = embeddings.astype(np.float64)
        if embeddings.ndim != 2 or len(embeddings) != len(place):
            raise RewardError(
                f"Reward model {self.name!r}: expected the encoder to return one vector a text, "
                f"shape ({len(place)}, d), got shape {embeddings.shape}. Change its `encode`."
            )
        with np.errstate(invalid="ignore"):
            directions = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        return cast("npt.NDArray[np.float64]", directions[[place[text] for text in texts]])

    def _loaded_encoder(self) -> Encoder:
        if self._loaded is None:
            self._loaded = load_encoder(self.encoder, self.name)
        return self._loaded


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in get_args(ReducedDtype):
        raise ValueError(f"dtype: expected one of {get_args(ReducedDtype)} or None, got {dtype!r}.")


def load_encoder(encoder: Encoder | str | Path | None, name: str) -> Encoder:
    """The encoder that a reward was given, or the embedded one."""
    if encoder is None:
        from mbrl_text_env.language_models.registry import embedded_encoder

        return cast("Encoder", embedded_encoder())
    if not isinstance(encoder, str | Path):
        return encoder
    from sentence_transformers import SentenceTransformer

    try:
        return cast("Encoder", SentenceTransformer(str(encoder)))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise RewardError(
            f"Reward model {name!r}: expected the folder of a SentenceTransformer, or a name on "
            "the Hugging Face Hub that is reachable or already downloaded; got "
            f"{str(encoder)!r} ({type(error).__name__}: {reason}). Check the spelling, the network "
            "and HF_HUB_OFFLINE, or pass encoder=None for the embedded MiniLM."
        ) from error

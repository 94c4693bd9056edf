"""A reward for similarity of response and prompt, measured with a sentence encoder."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from mbrl_text_env.encoders import (
    Encoder,
    ReducedDtype,
    encode_texts,
    encoder_flops,
    encoder_flops_bound,
)
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.evaluators._hub import Evaluator
from mbrl_text_env.rewards.names import named
from mbrl_text_env.types import FloatArray, Prompt, one_of

_PROMPTS_KEPT = 4096


@named("relevance")
class RelevanceReward(Evaluator):
    """Cosine similarity between the embeddings of prompt and response, in [-1, 1].

    An empty response (only white space) scores 0. The encoder truncates texts beyond its limit
    (256 tokens for MiniLM). Each distinct response is embedded once per call. The embeddings of the
    most recent prompts are cached.

    Source: Reimers and Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
    EMNLP 2019.

    Args:
        encoder: None for the embedded all-MiniLM-L6-v2; the name on the Hub or folder of a
            SentenceTransformer; or an object with `encode(list[str]) -> float[B, d]`.
        dtype: The dtype of a SentenceTransformer's matrix products, `"bfloat16"` or `"float16"`;
            None for its own dtype. See `reduced`.

    Raises:
        RewardError: At first use, if the encoder cannot be loaded or does not return one vector per
            text. `score_responses` raises it for a zero vector, whose score is NaN.

    Example:
        >>> prompt = Prompt.from_text("Why is the sky blue?")
        >>> RelevanceReward().score([prompt], ["Air scatters blue light."])  # doctest: +SKIP
        array([0.6...])
    """

    name = "relevance"
    counts = ()

    def __init__(
        self, encoder: Encoder | str | None = None, *, dtype: ReducedDtype | None = None
    ) -> None:
        if dtype is not None:
            one_of("dtype", dtype, ReducedDtype)
        self.encoder = encoder
        self.dtype = dtype
        self._questions: OrderedDict[str, FloatArray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_questions": OrderedDict()}

    def reduced(self, dtype: str = "bfloat16") -> RelevanceReward:
        """Return this reward with another dtype; scores in bfloat16 differ by at most 0.01.

        bfloat16 takes less than half the time on a CPU with AVX512-BF16, and longer on other CPUs.
        """
        one_of("dtype", dtype, ReducedDtype)
        # A copy drops the cached prompt embeddings, which depend on the dtype.
        other = copy.copy(self)
        other.dtype = cast("ReducedDtype", dtype)
        other._loaded = self._loaded
        return other

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the cosine similarity between each prompt and its response."""
        scores = np.zeros(len(responses))
        rows = [i for i, response in enumerate(responses) if response.strip()]
        if rows:
            scores[rows] = self._cosines(
                [prompts[i].text for i in rows], [responses[i] for i in rows]
            )
        return scores

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the floating-point operations of embedding each prompt and response.

        This is an upper bound, since cached and repeated texts are not embedded again. It is 0 if
        the encoder is not a SentenceTransformer.
        """
        encoder = self._model()
        texts = [prompt.text for prompt in prompts]
        return encoder_flops(encoder, texts) + encoder_flops(encoder, responses)

    def flops_bound(self) -> float:
        """Return the upper bound for one response: two texts of the encoder's maximum length."""
        return 2.0 * encoder_flops_bound(self._model())

    def _cosines(self, questions: Sequence[str], answers: Sequence[str]) -> FloatArray:
        # A search scores responses to the same prompts many times.
        known = {text: self._questions[text] for text in questions if text in self._questions}
        new = [text for text in dict.fromkeys(questions) if text not in known]
        # Not in one batch with the responses: their rounding would depend on which prompts are new.
        found = self._directions(new) if new else {}
        known |= found
        self._questions.update(found)
        while len(self._questions) > _PROMPTS_KEPT:
            self._questions.popitem(last=False)
        unknown = [text for text in dict.fromkeys(answers) if text not in known]
        directions = known | (self._directions(unknown) if unknown else {})
        asked, said = [known[text] for text in questions], [directions[text] for text in answers]
        return cast("FloatArray", (np.stack(asked) * np.stack(said)).sum(axis=1))

    def _directions(self, texts: list[str]) -> dict[str, FloatArray]:
        embeddings = encode_texts(self._model(), texts, self.dtype).astype(np.float64)
        if embeddings.ndim != 2 or len(embeddings) != len(texts):
            raise RewardError(
                f"Reward model {self.name!r}: expected the encoder to return one vector per text, "
                f"shape ({len(texts)}, d), got shape {embeddings.shape}. Change its `encode`."
            )
        with np.errstate(invalid="ignore"):
            directions = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        return dict(zip(texts, directions, strict=True))

    def _load(self) -> Encoder:
        return load_encoder(self.encoder, self.name)


def load_encoder(encoder: Encoder | str | Path | None, name: str) -> Encoder:
    """Return an encoder unchanged, load it by name or folder, or use the embedded one."""
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
            f"Reward model {name!r}: expected the folder of a SentenceTransformer, or the name of "
            "one that is on the Hugging Face Hub or already downloaded, got "
            f"{str(encoder)!r} ({type(error).__name__}: {reason}). Check the spelling, the network "
            "and HF_HUB_OFFLINE, or pass encoder=None for the embedded MiniLM."
        ) from error

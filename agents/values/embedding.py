"""The article's value model: ridge regression on the embedding of prompt and prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sklearn.linear_model import Ridge

from mbrl_text_env.agents.values.fitted import FOLDER, FittedValue, Sources
from mbrl_text_env.agents.values.training_prefixes import samples_of
from mbrl_text_env.encoders import (
    Encoder,
    encode_texts,
    encoder_flops,
    encoder_flops_bound,
    prefix_text,
)
from mbrl_text_env.fitting.heads import Head
from mbrl_text_env.fitting.samples import Samples
from mbrl_text_env.language_models.base import Tokenizer
from mbrl_text_env.types import FloatArray, Ledger, TextState

if TYPE_CHECKING:
    from mbrl_text_env.records import Record


class EmbeddingValue(FittedValue):
    """The article's quality predictor: ridge regression on the embedding of prompt and prefix.

    It is fitted on prefixes of scored responses, the first `prefix_ratio` of their words.

    Source: "Model Based Reinforcement Learning: Tutorial & Examples" (Patronus AI); its embedding
    (all-MiniLM-L6-v2), text format, alpha and prefix ratio are the defaults. Deviation: the
    standard deviation of a prediction, which the article does not have, is that of the errors on
    prompts left out in cross-validation, the same for every state.

    Args:
        tokenizer: Decodes states; a language model will do.
        encoder: Embeds texts; by default MiniLM.
        alpha: Strength of the ridge penalty.
        prefix_ratio: Share of a response's words that is kept, above 0 and up to 1.

    Attributes:
        coef_: float64[d], fitted.
        intercept_: Fitted.
        std_: Standard deviation of every prediction, fitted.
        report_: `FitReport` of the fit.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> value = EmbeddingValue(tokenizer).fit(read_records("records"))  # doctest: +SKIP
        >>> value.predict([state]).mean  # doctest: +SKIP
        array([0.31])
    """

    kind = "embedding"

    def __init__(
        self,
        tokenizer: Tokenizer,
        encoder: Encoder | None = None,
        *,
        alpha: float = 1.0,
        prefix_ratio: float = 0.5,
    ) -> None:
        if not alpha > 0 or not 0 < prefix_ratio <= 1:
            raise ValueError(
                "Expected alpha above 0 and prefix_ratio above 0 and up to 1, got "
                f"{alpha} and {prefix_ratio}."
            )
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.alpha = alpha
        self.prefix_ratio = prefix_ratio

    @property
    def coef_(self) -> FloatArray:
        """float64[d]."""
        return np.asarray(self.head_.coef_)

    @property
    def intercept_(self) -> float:
        """What the embedding adds to."""
        return float(np.asarray(self.head_.intercept_).item())

    @property
    def std_(self) -> float:
        """Standard deviation of every prediction."""
        return float(self.spread_.stds[0])

    def inputs(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger] | None = None
    ) -> FloatArray:
        """float64[B, d]: the embedding of prompt and prefix. Charged by `flops`."""
        return self._embedded(self._texts(states))

    def samples(self, records: Sequence[Record]) -> Samples:
        """The first half of each response's words."""
        texts = [prefix_text(r.prompt_text, self._prefix(r.response)) for r in records]
        return samples_of(self._embedded(texts), records)

    def heads(self) -> Mapping[str, Head]:
        """One: ridge regression."""
        return {"ridge": Ridge(alpha=self.alpha)}

    def flops(self, states: Sequence[TextState]) -> FloatArray:
        """float64[B]: what embedding the states takes; 0 for encoders that do not say."""
        return encoder_flops(self._encoder(), self._texts(states))

    def flops_bound(self) -> float:
        """The most that one state takes."""
        return encoder_flops_bound(self._encoder())

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Tokenizer, encoder: Encoder | None = None) -> Self:
        """Read what `save` wrote; `load_value` reads every kind and checks what it belongs to.

        Raises:
            ValueModelError: The folder holds no value model, or one of another kind or format.
        """
        with FOLDER.reading(folder) as (config, arrays):
            return cls.restored(config, arrays(), Sources(tokenizer, encoder=encoder))

    def _encoder(self) -> Any:
        if self.encoder is not None:
            return self.encoder
        from mbrl_text_env.language_models.registry import embedded_encoder

        return embedded_encoder()

    def _embedded(self, texts: Sequence[str]) -> FloatArray:
        return encode_texts(self._encoder(), texts).astype(np.float64)

    def _texts(self, states: Sequence[TextState]) -> list[str]:
        return [prefix_text(s.prompt.text, self.tokenizer.decode(s.response_ids)) for s in states]

    def _prefix(self, response: str) -> str:
        words = response.split()
        return " ".join(words[: max(1, int(len(words) * self.prefix_ratio))])

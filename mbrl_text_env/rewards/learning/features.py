"""What fitted heads see of a prompt and a response: frozen embeddings or hidden states, and counts.

Reading (the models' work) and standardising (fitted on training data) are apart, so that texts are
read once however often a head is fitted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from mbrl_text_env.encoders import Encoder, encode_texts, encoder_flops, encoder_flops_bound
from mbrl_text_env.fitting.folder import Arrays, numbers_of, with_numbers
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.evaluators._hub import TextEncoder, language_model_of
from mbrl_text_env.rewards.learning.text_statistics import STATISTICS, text_statistics
from mbrl_text_env.types import FloatArray, Prompt, TextState

Raw = Mapping[str, FloatArray]
"""float64[B, d] by name: what was read of B prompts and responses."""

EMBEDDED = "embedded"
"""How a saved head names the models that come with the package."""

# Columns of a block that weigh together as much as one column alone. A penalty on the weights would
# otherwise favour whatever has the most columns, and embeddings drown the few counts.
_FULL_WEIGHT = 32
# Directions in which prompts differ most; each is multiplied with every count.
_PROMPT_DIRECTIONS = 16
_TINY = 1e-9


class Features(ABC):
    """Standardised features of prompts and responses.

    Each column is centred and divided by its standard deviation over the data of `fit`, and each
    block of more than 32 columns weighs as much as 32. Where prompts are embedded and counts are
    on, there is a block of products: each count times the prompt's place on each of the 16 main
    directions of the prompts (principal components, on one common scale), so that a linear head can
    learn what is good for which kind of prompt.

    Args:
        use_statistics: Whether the counts of `text_statistics` are among the features.

    Attributes:
        scalers_: The fitted `StandardScaler` of each block.
        directions_: The fitted `PCA` of the prompts; None where they are not embedded.
    """

    kind: str
    block_names: tuple[str, ...]
    scalers_: dict[str, StandardScaler]
    directions_: PCA | None

    def __init__(self, use_statistics: bool = True) -> None:
        self.use_statistics = use_statistics
        self._loaded: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    @property
    @abstractmethod
    def given(self) -> Any:
        """The model that reads, as it was passed: None, a name, a folder or an object."""

    @property
    def source(self) -> str:
        """Name or folder of the model that reads; the class of an object without a name."""
        if self.given is None:
            return EMBEDDED
        if isinstance(self.given, str | Path):
            return str(self.given)
        return str(getattr(self.given, "name", type(self.given).__name__))

    @abstractmethod
    def read(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Raw:
        """Run the model: what is read of each prompt and response. Distinct texts are read once."""

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt can be read."""
        return True

    @abstractmethod
    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """float64[B]: floating-point operations of reading each prompt and response."""

    @abstractmethod
    def flops_bound(self) -> float:
        """The most that one response takes."""

    def _blocks(self, raw: Raw) -> dict[str, FloatArray]:
        """Columns to standardise, by block: float64[B, d] each."""
        return {name: raw[name] for name in self._names()}

    def _names(self) -> tuple[str, ...]:
        return (*self.block_names, "statistics") if self.use_statistics else self.block_names

    @property
    def is_fitted(self) -> bool:
        """Whether `transform` knows the data's mean and scale."""
        return hasattr(self, "scalers_")

    @property
    def size(self) -> int:
        """D, the columns of `transform`, once fitted."""
        blocks = sum(scaler.n_features_in_ for scaler in self.scalers_.values())
        if self.directions_ is None:
            return blocks
        return blocks + len(self.directions_.components_) * len(STATISTICS)

    def fit(self, raw: Raw) -> Features:
        """Take means and scales from B rows of training data."""
        self.scalers_ = {n: StandardScaler().fit(v) for n, v in self._blocks(raw).items()}
        self.directions_ = None
        if "prompt" in raw and self.use_statistics:
            distinct = np.unique(raw["prompt"], axis=0)
            count = min(_PROMPT_DIRECTIONS, *distinct.shape)
            self.directions_ = PCA(count, svd_solver="full").fit(distinct)
            spread = float(self.directions_.transform(distinct).std())
            scaled = self.directions_.components_ / max(spread, _TINY)
            # In the layout that files have: another one sums up in another order.
            self.directions_.components_ = np.ascontiguousarray(scaled)
        return self

    def transform(self, raw: Raw) -> FloatArray:
        """Return float64[B, D].

        Raises:
            RewardError: The model gives vectors of another length than those of the fit.
        """
        columns = []
        for name, values in self._blocks(raw).items():
            scaler = self.scalers_[name]
            if values.shape[1] != scaler.n_features_in_:
                raise RewardError(
                    f"Expected {self.source!r} to give what the head was fitted on, "
                    f"{scaler.n_features_in_} numbers for {name!r}, got {values.shape[1]}. Pass "
                    "the encoder or language model of the fit, or fit anew."
                )
            # A constant column stays at 0, whatever it is elsewhere: nothing was learned of it.
            varies = scaler.var_ > _TINY**2
            columns.append(scaler.transform(values) * varies * _weight(values.shape[1]))
        if self.directions_ is not None:
            places, counts = self.directions_.transform(raw["prompt"]), columns[-1]
            products = (places[:, :, None] * counts[:, None, :]).reshape(len(places), -1)
            columns.append(_weight(places.shape[1] * counts.shape[1]) * products)
        return np.concatenate(columns, axis=1)

    def numbers(self) -> Arrays:
        """What was fitted, as arrays by name."""
        arrays: Arrays = {}
        for name, scaler in self.scalers_.items():
            arrays |= numbers_of(scaler, f"features.{name}")
        if self.directions_ is not None:
            arrays |= numbers_of(self.directions_, "features.directions")
        return arrays

    def restore(self, arrays: Arrays) -> Features:
        """Take what was fitted from `numbers`.

        Raises:
            KeyError, ValueError: Something is missing or does not fit.
        """
        self.scalers_ = {
            name: with_numbers(StandardScaler(), arrays, f"features.{name}")
            for name in self._names()
        }
        self.directions_ = None
        if "features.directions.0.mean_" in arrays:
            self.directions_ = with_numbers(PCA(), arrays, "features.directions")
        return self

    def _with_statistics(
        self, raw: dict[str, FloatArray], prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> Raw:
        if self.use_statistics:
            raw["statistics"] = text_statistics(prompts, responses)
        return raw


class EmbeddingFeatures(Features):
    """Of a sentence encoder's vectors p of the prompt and r of the response: r, p * r, |p - r| and
    the cosine; and counts.

    Source of the combination: Reimers and Gurevych, "Sentence-BERT", EMNLP 2019, table 6 (u, v,
    |u - v|, u * v). Deviations: the prompt's own vector, which is the same for both responses of a
    pair, is left out; the cosine is a column of its own.

    Args:
        encoder: None for the embedded all-MiniLM-L6-v2; a SentenceTransformer's name on the Hub or
            folder; or an object with `encode(list[str]) -> float[B, d]`. Loaded at first use.
        use_statistics: See `Features`.

    Raises:
        RewardError: At first use: the encoder cannot be loaded, or does not return one finite
            vector a text.

    Example:
        >>> raw = EmbeddingFeatures().read([Prompt.from_text("Hi")], ["Hello"])  # doctest: +SKIP
        >>> raw["response"].shape  # doctest: +SKIP
        (1, 384)
    """

    kind = "embedding"
    block_names = ("response", "product", "difference", "cosine")

    def __init__(
        self, encoder: Encoder | str | Path | None = None, use_statistics: bool = True
    ) -> None:
        super().__init__(use_statistics)
        self.encoder = encoder

    @property
    def given(self) -> Encoder | str | Path | None:
        """See `Features.given`."""
        return self.encoder

    def read(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Raw:
        """Embed: `prompt` and `response` float64[B, d], and `statistics`."""
        texts = [*(prompt.text for prompt in prompts), *responses]
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        vectors = encode_texts(self._encoder(), list(place)).astype(np.float64)
        if vectors.ndim != 2 or len(vectors) != len(place) or not np.isfinite(vectors).all():
            raise RewardError(
                f"Expected the encoder {self.source!r} to return one finite vector a text, shape "
                f"({len(place)}, d), got shape {vectors.shape} with "
                f"{int((~np.isfinite(vectors)).sum())} numbers that are not finite. Change its "
                "`encode`."
            )
        found = vectors[[place[text] for text in texts]]
        raw = {"prompt": found[: len(prompts)], "response": found[len(prompts) :]}
        return self._with_statistics(raw, prompts, responses)

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """float64[B]: of embedding prompt and response; see `encoder_flops`."""
        encoder = self._encoder()
        texts = [prompt.text for prompt in prompts]
        return encoder_flops(encoder, texts) + encoder_flops(encoder, responses)

    def flops_bound(self) -> float:
        """Two texts that fill the encoder's input."""
        return 2.0 * encoder_flops_bound(self._encoder())

    def _blocks(self, raw: Raw) -> dict[str, FloatArray]:
        prompt, response = raw["prompt"], raw["response"]
        norms = np.linalg.norm(prompt, axis=1) * np.linalg.norm(response, axis=1)
        products = prompt * response
        derived = {
            "product": products,
            "difference": np.abs(prompt - response),
            "cosine": (products.sum(axis=1) / np.maximum(norms, _TINY))[:, None],
        }
        return super()._blocks({**raw, **derived})

    def _encoder(self) -> Encoder:
        if self._loaded is None:
            self._loaded = _load_encoder(self.encoder)
        return cast("Encoder", self._loaded)


class HiddenFeatures(Features):
    """A language model's last hidden state after prompt and response; and counts.

    Reward models see text, so the response is encoded anew. What does not fit into the context is
    cut at the response's end. Special tokens written out in a response are read as ordinary text.

    Args:
        language_model: One with `features`; a name on the Hub or folder; None for the embedded
            SmolLM2. Loaded at first use.
        use_statistics: See `Features`.

    Raises:
        RewardError: At first use: it cannot be loaded, or has no `features`.
    """

    kind = "hidden"
    block_names = ("hidden",)

    def __init__(
        self,
        language_model: LanguageModel | str | Path | None = None,
        use_statistics: bool = True,
    ) -> None:
        super().__init__(use_statistics)
        self.language_model = language_model

    @property
    def given(self) -> LanguageModel | str | Path | None:
        """See `Features.given`."""
        return self.language_model

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt fits into the context; a chat needs a chat template."""
        try:
            self._states([prompt], [""])
        except RewardError:
            return False
        return True

    def read(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Raw:
        """Run the language model: `hidden` float64[B, feature_size], and `statistics`."""
        model: Any = self._model()[0]
        states = self._states(prompts, responses)
        distinct = list(dict.fromkeys(states))
        # One by one: in a batch the last digits depend on the padding.
        rows = [model.features([state])[0] for state in distinct]
        found = np.asarray(rows, dtype=np.float64).reshape(len(distinct), -1)
        place = {state: i for i, state in enumerate(distinct)}
        raw = {"hidden": found[[place[state] for state in states]]}
        return self._with_statistics(raw, prompts, responses)

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """float64[B], what the language model says that reading takes."""
        model = self._model()[0]
        lengths = [
            len(s.prompt_ids) + len(s.response_ids) for s in self._states(prompts, responses)
        ]
        return np.array(
            [model.usage_bound(length, []).lm_flops for length in lengths], dtype=np.float64
        )

    def flops_bound(self) -> float:
        """A prompt and a response that fill the context."""
        model = self._model()[0]
        return float(model.usage_bound(model.context_length, []).lm_flops)

    def _states(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[TextState]:
        model, encoder = self._model()
        states = []
        for prompt, response in zip(prompts, responses, strict=True):
            try:
                prompt_ids = model.encode_prompt(prompt)
            except ValueError as error:
                raise RewardError(f"Prompt {prompt.id!r} cannot be encoded: {error}") from error
            room = model.context_length - len(prompt_ids)
            ids = encoder.ids(response)[:room]
            states.append(TextState(prompt, prompt_ids, ids))
        return states

    def _model(self) -> tuple[LanguageModel, TextEncoder]:
        if self._loaded is None:
            model = language_model_of(self.language_model, "learned")
            if not hasattr(model, "features"):
                raise RewardError(
                    f"Expected a language model with `features`, got {model.name!r} "
                    f"({type(model).__name__}). Use one that runs here, such as `TransformersLM`."
                )
            self._loaded = model, TextEncoder(model)
        return cast("tuple[LanguageModel, TextEncoder]", self._loaded)


def _weight(columns: int) -> float:
    return float(min(1.0, np.sqrt(_FULL_WEIGHT / max(1, columns))))


def _load_encoder(encoder: Encoder | str | Path | None) -> Encoder:
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
            "Expected the folder of a SentenceTransformer, or a name on the Hugging Face Hub that "
            f"is reachable or already downloaded; got {str(encoder)!r} ({type(error).__name__}: "
            f"{reason}). Check the spelling, the network and HF_HUB_OFFLINE, or leave it out for "
            "the embedded MiniLM."
        ) from error

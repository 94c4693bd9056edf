"""Features of prompts and responses for fitted heads: embeddings or hidden states, and statistics.

Reading a text (running the model) and standardising features (fitted on training data) are separate
steps, so that each text is read once even if several heads are fitted. The statistics are not
rules; a fitted head learns the weight of each.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from mbrl_text_env.encoders import Encoder, encode_texts, encoder_flops, encoder_flops_bound
from mbrl_text_env.fitting.folder import Arrays, numbers_of, with_numbers
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.evaluators._hub import language_model_of
from mbrl_text_env.rewards.evaluators.relevance import load_encoder
from mbrl_text_env.types import FloatArray, Prompt, TextState

Raw = Mapping[str, FloatArray]
"""The raw features of B prompts and responses, float64[B, d] by name."""

EMBEDDED = "embedded"
"""The name, in a saved head, of the models that come with the package."""

# A block with more columns than this is scaled down to the weight of this many columns. Otherwise a
# penalty on the weights would favour blocks with many columns, and embeddings over statistics.
_FULL_WEIGHT = 32
# Number of principal components of the prompts; each is multiplied with every statistic.
_PROMPT_DIRECTIONS = 16
_TINY = 1e-9

# Use only bounded repetitions, because responses can be long and unusual.
_WORD = re.compile(r"\w+(?:['\u2019-]\w+){0,8}")
_SENTENCE_END = re.compile(
    r"(?<![.!?\u2026])[.!?\u2026]+(?=[\s\"')\]\u201d\u2019]|$)|[\u3002\uff01\uff1f]"
)
_BULLET = re.compile(r"^[ \t]{0,8}(?:[-*\u2022]|\d{1,3}[.)])[ \t]", re.MULTILINE)
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_QUOTED = re.compile(r"[\"\u201c]([^\"\u201c\u201d\n]{1,200})[\"\u201d]")
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"
_NUMBERS = {name: number for number, name in enumerate(_NUMBER_WORDS.split())}
# Words before an unwanted phrase, and the number of characters searched for them.
_NEGATION = re.compile(
    r"\b(?:no|not|never|without|avoid\w*|omit\w*|exclud\w*|neither|nor|leave out|skip|forbidden)\b"
    r"|n['\u2019]t\b"
)
_BEFORE = 60
_QUOTES = '"\u201c\u201d'


def _count(characters: str) -> Callable[[str], float]:
    return lambda text: math.log1p(sum(map(text.count, characters)))


def _share(
    test: Callable[[str], bool], among: Callable[[str], bool] | None = None
) -> Callable[[str], float]:
    return lambda text: _mean([test(c) for c in text if among is None or among(c)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _distinct(text: str) -> float:
    words = text.casefold().split()
    return len(set(words)) / len(words) if words else 1.0


def _word_length(text: str) -> float:
    words = text.split()
    return math.log1p(len("".join(words)) / len(words)) if words else 0.0


def _cased(character: str) -> bool:
    return character.isupper() or character.islower()


_OF_RESPONSE: dict[str, Callable[[str], float]] = {
    "characters": lambda text: math.log1p(len(text)),
    "words": lambda text: math.log1p(len(text.split())),
    "sentences": lambda text: math.log1p(_sentences(text)),
    "lines": lambda text: math.log1p(len(text.splitlines())),
    "paragraphs": lambda text: math.log1p(_paragraphs(text)),
    "list items": lambda text: math.log1p(len(_BULLET.findall(text))),
    "commas": _count(",\uff0c\u3001\u060c"),
    "full stops": _count(".\u3002"),
    "exclamation marks": _count("!\uff01"),
    "question marks": _count("?\uff1f"),
    "colons": _count(":;"),
    "quotation marks": _count(_QUOTES),
    "round brackets": _count("()"),
    "square brackets": _count("[]"),
    "angle brackets": _count("<>"),
    "braces": _count("{}"),
    "has a comma": lambda text: float("," in text),
    "capitals among letters": _share(str.isupper, _cased),
    "no capitals": lambda text: float(text.islower()),
    "capitals alone": lambda text: float(text.isupper()),
    "digits": _share(str.isdigit),
    "outside ASCII": _share(lambda character: not character.isascii()),
    "different words": _distinct,
    "length of words": _word_length,
    "starts with a quotation mark": lambda text: float(text[:1] in _QUOTES and bool(text)),
    "ends with a quotation mark": lambda text: float(text[-1:] in _QUOTES and bool(text)),
    "ends a sentence": lambda text: float(text[-1:] in ".!?\u2026\u3002" and bool(text)),
    "within braces": lambda text: float(text.startswith("{") and text.endswith("}")),
    "empty": lambda text: float(not text),
}
_BESIDE_PROMPT = (
    "prompt's words",
    "wanted phrases that occur",
    "wanted phrases, times",
    "unwanted phrases that occur",
    "starts with a quoted phrase",
    "ends with a quoted phrase",
    *(
        f"{unit}, {relation} the prompt's number"
        for unit in ("words", "sentences", "paragraphs", "list items")
        for relation in ("off", "above")
    ),
)
STATISTICS: tuple[str, ...] = (*_OF_RESPONSE, *_BESIDE_PROMPT)
"""Names of the statistics, in the order of `text_statistics`; a saved head depends on it."""


def text_statistics(prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
    """Return statistics of each response, float64[B, len(STATISTICS)], all finite.

    Counts are log(1 + count); fractions and tests are between 0 and 1. Three kinds of statistics
    compare the response with the prompt: the fraction of the prompt's words that occur; the
    fraction of its quoted phrases that occur (phrases up to 60 characters after a word such as
    "without" or "never" count separately, as unwanted); and the log ratio between counts and the
    largest number in the prompt, as an absolute value (`off`) and if positive (`above`), or 0
    without a number. White space around the response is ignored.
    """
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        text = response.strip()
        rows.append(
            [*(count(text) for count in _OF_RESPONSE.values()), *_beside(prompt.text, text)]
        )
    return np.asarray(rows, dtype=np.float64).reshape(len(rows), len(STATISTICS))


def _beside(prompt: str, response: str) -> list[float]:
    asked = _asked(prompt)
    text = response.casefold()
    found = set(_WORD.findall(text))
    wanted = [text.count(phrase) for phrase in asked.wanted]
    unwanted = [text.count(phrase) for phrase in asked.unwanted]
    counts = [len(text.split()), _sentences(text), _paragraphs(text), len(_BULLET.findall(text))]
    ratios = [math.log((1 + n) / (1 + asked.number)) if asked.number else 0.0 for n in counts]
    return [
        _mean([word in found for word in asked.words]),
        _mean([count > 0 for count in wanted]),
        math.log1p(sum(wanted)),
        _mean([count > 0 for count in unwanted]),
        float(any(map(text.startswith, asked.wanted))),
        float(any(map(text.endswith, asked.wanted))),
        *(value for ratio in ratios for value in (abs(ratio), max(0.0, ratio))),
    ]


class _Asked(NamedTuple):
    """The longer words, the quoted phrases and the largest number in a prompt."""

    words: frozenset[str]
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    number: int


@lru_cache(maxsize=4096)
def _asked(prompt: str) -> _Asked:
    text = prompt.casefold()
    words = _WORD.findall(text)
    # Keys of dicts, to keep the order: wanted phrases, and unwanted ones.
    phrases: tuple[dict[str, None], dict[str, None]] = {}, {}
    for match in _QUOTED.finditer(text):
        if phrase := match[1].strip():
            before = text[max(0, match.start() - _BEFORE) : match.start()]
            phrases[bool(_NEGATION.search(before))][phrase] = None
    longer = frozenset(word for word in words if len(word) > 3)
    number = max(map(_number, words), default=0)
    return _Asked(longer, tuple(phrases[0]), tuple(phrases[1]), number)


def _number(word: str) -> int:
    if word.isascii() and word.isdigit() and len(word) < 7:
        return int(word)
    return _NUMBERS.get(word, 0)


def _sentences(text: str) -> int:
    return len(_SENTENCE_END.findall(text))


def _paragraphs(text: str) -> int:
    return sum(bool(part.strip()) for part in _PARAGRAPH.split(text))


class Features(ABC):
    """Base class of standardised features of prompts and responses.

    Each column is centred and divided by its standard deviation over the data of `fit`. A block of
    more than 32 columns is scaled to the weight of 32 columns. If prompts are embedded and
    statistics are used, there is also a block of products: each statistic times the prompt's
    coordinate on each of the prompts' first 16 principal components (all on one scale). A linear
    head can then learn a different weight of a statistic for each kind of prompt.

    Attributes:
        kind: Name of the class in saved folders.
        argument: Name of the argument that holds the model.
        use_statistics: Whether to include the statistics of `text_statistics`.
    """

    kind: ClassVar[str]
    argument: ClassVar[str]
    block_names: ClassVar[tuple[str, ...]]
    use_statistics: bool
    _loaded: Any = None
    scalers_: dict[str, StandardScaler]
    directions_: PCA | None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    @property
    def given(self) -> Any:
        """The model as it was passed: None, a name, a folder or an object."""
        return getattr(self, self.argument)

    @property
    def source(self) -> str:
        """The name or folder of the model, or the class of an object without a name."""
        if isinstance(given := self.given, str | Path | None):
            return EMBEDDED if given is None else str(given)
        return str(getattr(given, "name", type(given).__name__))

    def read(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Raw:
        """Return the raw features of prompts and responses; the model reads distinct texts once."""
        raw = self._read(prompts, responses)
        if self.use_statistics:
            raw["statistics"] = text_statistics(prompts, responses)
        return raw

    @abstractmethod
    def _read(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, FloatArray]:
        """Return the model's outputs, float64[B, d] by name."""

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether the model can read the prompt."""
        return True

    @abstractmethod
    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the floating-point operations of reading each prompt and response."""

    @abstractmethod
    def flops_bound(self) -> float:
        """Return the upper bound for one response."""

    def _blocks(self, raw: Raw) -> dict[str, FloatArray]:
        """Return the columns to standardise, float64[B, d] for each block."""
        return {name: raw[name] for name in self._names()}

    def _names(self) -> tuple[str, ...]:
        return (*self.block_names, "statistics") if self.use_statistics else self.block_names

    @property
    def size(self) -> int:
        """The number of columns D of `transform`, once fitted."""
        blocks = sum(scaler.n_features_in_ for scaler in self.scalers_.values())
        if self.directions_ is None:
            return blocks
        return blocks + len(self.directions_.components_) * len(STATISTICS)

    def fit(self, raw: Raw) -> Features:
        """Fit means and scales on B rows of training data."""
        self.scalers_ = {n: StandardScaler().fit(v) for n, v in self._blocks(raw).items()}
        self.directions_ = None
        distinct = np.unique(raw.get("prompt", np.empty((0, 0))), axis=0)
        if len(distinct) > 1 and self.use_statistics:
            count = min(_PROMPT_DIRECTIONS, *distinct.shape)
            self.directions_ = PCA(count, svd_solver="full").fit(distinct)
            spread = float(self.directions_.transform(distinct).std())
            scaled = self.directions_.components_ / max(spread, _TINY)
            # Use the memory layout of saved files, because the layout changes the rounding of sums.
            self.directions_.components_ = np.ascontiguousarray(scaled)
        return self

    def transform(self, raw: Raw) -> FloatArray:
        """Return float64[B, D]; raise `RewardError` if the model's vectors have another length."""
        columns = []
        for name, values in self._blocks(raw).items():
            scaler = self.scalers_[name]
            if values.shape[1] != scaler.n_features_in_:
                raise RewardError(
                    f"Expected {self.source!r} to return the features that the head was fitted on, "
                    f"{scaler.n_features_in_} numbers for {name!r}, got {values.shape[1]}. Pass "
                    "the encoder or language model of the fit, or fit again."
                )
            # A column that was constant in the fit is always 0: nothing was learned about it.
            varies = scaler.var_ > _TINY**2
            columns.append(scaler.transform(values) * varies * _weight(values.shape[1]))
        if self.directions_ is not None:
            places, counts = self.directions_.transform(raw["prompt"]), columns[-1]
            products = (places[:, :, None] * counts[:, None, :]).reshape(len(places), -1)
            columns.append(_weight(places.shape[1] * counts.shape[1]) * products)
        return np.concatenate(columns, axis=1)

    def numbers(self) -> Arrays:
        """Return the fitted parameters as arrays by name."""
        arrays: Arrays = {}
        for name, scaler in self.scalers_.items():
            arrays |= numbers_of(scaler, f"features.{name}")
        if self.directions_ is not None:
            arrays |= numbers_of(self.directions_, "features.directions")
        return arrays

    def restore(self, arrays: Arrays) -> Features:
        """Restore the fitted parameters from `numbers`."""
        names = {name: f"features.{name}" for name in self._names()}
        self.scalers_ = {n: with_numbers(StandardScaler(), arrays, at) for n, at in names.items()}
        has_prompts, at = "features.directions.0.mean_" in arrays, "features.directions"
        self.directions_ = with_numbers(PCA(), arrays, at) if has_prompts else None
        return self


@dataclass(eq=False, repr=False)
class EmbeddingFeatures(Features):
    """Features of a sentence encoder's vectors p (prompt) and r (response), and statistics.

    The features are r, p * r, |p - r| and the cosine. The encoder is loaded at first use.
    Source of the combination: Reimers and Gurevych, "Sentence-BERT", EMNLP 2019, table 6 (u, v,
    |u - v|, u * v). Deviations: the prompt's vector, which is the same for both responses of a
    pair, is omitted; the cosine is an additional column.

    Args:
        encoder: None for the embedded all-MiniLM-L6-v2; the name on the Hub or folder of a
            SentenceTransformer; or an object with `encode(list[str]) -> float[B, d]`.
        use_statistics: Whether to include the statistics of `text_statistics`.

    Example:
        >>> raw = EmbeddingFeatures().read([Prompt.from_text("Hi")], ["Hello"])  # doctest: +SKIP
        >>> raw["response"].shape  # doctest: +SKIP
        (1, 384)
    """

    kind = "embedding"
    argument = "encoder"
    block_names = ("response", "product", "difference", "cosine")
    encoder: Encoder | str | Path | None = None
    use_statistics: bool = True

    def _read(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, FloatArray]:
        texts = [*(prompt.text for prompt in prompts), *responses]
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        vectors = encode_texts(self._encoder(), list(place)).astype(np.float64)
        if vectors.ndim != 2 or len(vectors) != len(place) or not np.isfinite(vectors).all():
            raise RewardError(
                f"Expected the encoder {self.source!r} to return one finite vector per text, shape "
                f"({len(place)}, d), got shape {vectors.shape} with "
                f"{int((~np.isfinite(vectors)).sum())} numbers that are not finite. Change its "
                "`encode`."
            )
        found = vectors[[place[text] for text in texts]]
        return {"prompt": found[: len(prompts)], "response": found[len(prompts) :]}

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the FLOPs of embedding prompt and response, see `encoder_flops`."""
        encoder = self._encoder()
        texts = [prompt.text for prompt in prompts]
        return encoder_flops(encoder, texts) + encoder_flops(encoder, responses)

    def flops_bound(self) -> float:
        """Return the FLOPs of two texts of the encoder's maximum length."""
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
            self._loaded = load_encoder(self.encoder, "learned")
        return cast("Encoder", self._loaded)


@dataclass(eq=False, repr=False)
class HiddenFeatures(Features):
    """A language model's last hidden state after prompt and response, and statistics.

    Reward models see text, so the response is encoded again. A response that does not fit into the
    context is cut at its end. Special tokens inside a response are read as plain text.

    Args:
        language_model: A model with `features`, its name on the Hub, or its folder; None for the
            embedded SmolLM2. Loaded at first use.
        use_statistics: Whether to include the statistics of `text_statistics`.
    """

    kind = "hidden"
    argument = "language_model"
    block_names = ("hidden",)
    language_model: LanguageModel | str | Path | None = None
    use_statistics: bool = True

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether the prompt fits into the context; a chat also needs a chat template."""
        try:
            self._states([prompt], [""])
        except RewardError:
            return False
        return True

    def _read(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, FloatArray]:
        model: Any = self._model()
        states = self._states(prompts, responses)
        distinct = list(dict.fromkeys(states))
        # One by one, because padding in a batch changes the last digits.
        rows = [model.features([state])[0] for state in distinct]
        found = np.asarray(rows, dtype=np.float64).reshape(len(distinct), -1)
        place = {state: i for i, state in enumerate(distinct)}
        return {"hidden": found[[place[state] for state in states]]}

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the language model's floating-point operations."""
        bound, states = self._model().usage_bound, self._states(prompts, responses)
        lengths = [len(state.prompt_ids) + len(state.response_ids) for state in states]
        return np.array([bound(length, []).lm_flops for length in lengths], dtype=np.float64)

    def flops_bound(self) -> float:
        """Return the FLOPs of a prompt and a response that fill the context."""
        model = self._model()
        return float(model.usage_bound(model.context_length, []).lm_flops)

    def _states(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[TextState]:
        model = self._model()
        states = []
        for prompt, response in zip(prompts, responses, strict=True):
            try:
                prompt_ids = model.encode_prompt(prompt)
            except ValueError as error:
                raise RewardError(f"Prompt {prompt.id!r} cannot be encoded: {error}") from error
            ids = model.encode_text(response)[: model.context_length - len(prompt_ids)]
            states.append(TextState(prompt, prompt_ids, tuple(ids)))
        return states

    def _model(self) -> LanguageModel:
        if self._loaded is None:
            model = language_model_of(self.language_model, "learned")
            if not hasattr(model, "features"):
                raise RewardError(
                    f"Expected a language model with `features`, got {model.name!r} "
                    f"({type(model).__name__}). Use a local model, such as `TransformersLM`."
                )
            self._loaded = model
        return cast("LanguageModel", self._loaded)


@dataclass(eq=False, repr=False)
class TokenFeatures(HiddenFeatures):
    """The mean of the response's token embeddings, and statistics; no model is run.

    Source: Joulin et al., "Bag of Tricks for Efficient Text Classification", 2017. Deviation: the
    embeddings are the language model's input embeddings, and are not trained.
    """

    kind = "tokens"
    block_names = ("tokens",)

    def _read(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, FloatArray]:
        table = token_table(self._model(), RewardError)
        found = np.zeros((len(responses), table.shape[1]))
        for i, state in enumerate(self._states(prompts, responses)):
            if state.response_ids:
                found[i] = table[list(state.response_ids)].double().mean(dim=0).cpu().numpy()
        return {"tokens": found}

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B] of zeros; the sums are negligible."""
        return np.zeros(len(responses))

    def flops_bound(self) -> float:
        """Return 0."""
        return 0.0


def token_table(language_model: Any, error: type[Exception]) -> Any:
    """Return a language model's input embeddings, float[vocab_size, d]; raise `error` if none.

    Example:
        >>> token_table(embedded(), ValueError).shape  # doctest: +SKIP
        torch.Size([49152, 576])
    """
    model: Any = getattr(language_model, "model", None)
    if not hasattr(model, "get_input_embeddings"):
        raise error(
            "Expected a language model with readable token embeddings, such as TransformersLM, "
            f"got {type(language_model).__name__}. Or use a text encoder, such as MiniLM."
        )
    return model.get_input_embeddings().weight.detach()


def _weight(columns: int) -> float:
    return float(min(1.0, np.sqrt(_FULL_WEIGHT / max(1, columns))))

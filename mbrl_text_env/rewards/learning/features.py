"""What fitted heads see of a prompt and a response: frozen embeddings or hidden states, and counts.

Reading (the models' work) and standardising (fitted on training data) are apart, so that texts are
read once however often a head is fitted. No count is a rule of its own: a fitted head decides what
each is worth.
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
"""float64[B, d] by name: what was read of B prompts and responses."""

EMBEDDED = "embedded"
"""How a saved head names the models that come with the package."""

# Columns of a block that weigh together as much as one column alone. A penalty on the weights would
# otherwise favour whatever has the most columns, and embeddings drown the few counts.
_FULL_WEIGHT = 32
# Directions in which prompts differ most; each is multiplied with every count.
_PROMPT_DIRECTIONS = 16
_TINY = 1e-9

# Bounded repetitions only: responses may be long and strange, and every one of them is searched.
_WORD = re.compile(r"\w+(?:['\u2019-]\w+){0,8}")
_SENTENCE_END = re.compile(
    r"(?<![.!?\u2026])[.!?\u2026]+(?=[\s\"')\]\u201d\u2019]|$)|[\u3002\uff01\uff1f]"
)
_BULLET = re.compile(r"^[ \t]{0,8}(?:[-*\u2022]|\d{1,3}[.)])[ \t]", re.MULTILINE)
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_QUOTED = re.compile(r"[\"\u201c]([^\"\u201c\u201d\n]{1,200})[\"\u201d]")
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"
_NUMBERS = {name: number for number, name in enumerate(_NUMBER_WORDS.split())}
# Before a phrase, what says that it is not wanted; and how many characters before.
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
    """Numbers about each response: float64[B, len(STATISTICS)], all finite.

    Counts are logarithms of 1 + count; shares and tests are between 0 and 1. Beside the prompt they
    are the share of its words that the response has; the share of its phrases in quotation marks,
    those up to 60 characters after a word such as "without" or "never" apart, as unwanted; and how
    far counts of the response are from the largest number that the prompt names: the logarithm of
    their ratio, without its sign (`off`) and where it is positive (`above`), 0 without a number.
    White space around the response does not count.
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
    """What a prompt names: longer words, phrases in quotation marks, and its largest number."""

    words: frozenset[str]
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    number: int


@lru_cache(maxsize=4096)
def _asked(prompt: str) -> _Asked:
    text = prompt.casefold()
    words = _WORD.findall(text)
    # As keys, in order: wanted phrases, and unwanted ones.
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
    """Standardised features of prompts and responses.

    Each column is centred and divided by its standard deviation over the data of `fit`, and each
    block of more than 32 columns weighs as much as 32. Where prompts are embedded and counts are
    on, there is a block of products: each count times the prompt's place on each of the 16 main
    directions of the prompts (principal components, on one common scale), so that a linear head can
    learn what is good for which kind of prompt.

    Attributes:
        kind: How folders name the class.
        argument: Name of the argument that is the model which reads.
        use_statistics: Whether the counts of `text_statistics` are among the features.
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
        """The model that reads, as it was passed: None, a name, a folder or an object."""
        return getattr(self, self.argument)

    @property
    def source(self) -> str:
        """Name or folder of the model that reads; the class of an object without a name."""
        if isinstance(given := self.given, str | Path | None):
            return EMBEDDED if given is None else str(given)
        return str(getattr(given, "name", type(given).__name__))

    def read(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Raw:
        """Run the model: what is read of each prompt and response. Distinct texts are read once."""
        raw = self._read(prompts, responses)
        if self.use_statistics:
            raw["statistics"] = text_statistics(prompts, responses)
        return raw

    @abstractmethod
    def _read(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, FloatArray]:
        """What the model says, float64[B, d] by name."""

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
        distinct = np.unique(raw.get("prompt", np.empty((0, 0))), axis=0)
        if len(distinct) > 1 and self.use_statistics:
            count = min(_PROMPT_DIRECTIONS, *distinct.shape)
            self.directions_ = PCA(count, svd_solver="full").fit(distinct)
            spread = float(self.directions_.transform(distinct).std())
            scaled = self.directions_.components_ / max(spread, _TINY)
            # In the layout that files have: another one sums up in another order.
            self.directions_.components_ = np.ascontiguousarray(scaled)
        return self

    def transform(self, raw: Raw) -> FloatArray:
        """Return float64[B, D]; a model that gives vectors of another length is an error."""
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
        """Take what was fitted from `numbers`."""
        names = {name: f"features.{name}" for name in self._names()}
        self.scalers_ = {n: with_numbers(StandardScaler(), arrays, at) for n, at in names.items()}
        has_prompts, at = "features.directions.0.mean_" in arrays, "features.directions"
        self.directions_ = with_numbers(PCA(), arrays, at) if has_prompts else None
        return self


@dataclass(eq=False, repr=False)
class EmbeddingFeatures(Features):
    """Of a sentence encoder's vectors p of the prompt and r of the response: r, p * r, |p - r| and
    the cosine; and counts.

    Source of the combination: Reimers and Gurevych, "Sentence-BERT", EMNLP 2019, table 6 (u, v,
    |u - v|, u * v). Deviations: the prompt's own vector, which is the same for both responses of a
    pair, is left out; the cosine is a column of its own.

    Args:
        encoder: None for the embedded all-MiniLM-L6-v2; a SentenceTransformer's name on the Hub or
            folder; or an object with `encode(list[str]) -> float[B, d]`. Loaded at first use.
        use_statistics: Whether counts are features too.

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
                f"Expected the encoder {self.source!r} to return one finite vector a text, shape "
                f"({len(place)}, d), got shape {vectors.shape} with "
                f"{int((~np.isfinite(vectors)).sum())} numbers that are not finite. Change its "
                "`encode`."
            )
        found = vectors[[place[text] for text in texts]]
        return {"prompt": found[: len(prompts)], "response": found[len(prompts) :]}

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
            self._loaded = load_encoder(self.encoder, "learned")
        return cast("Encoder", self._loaded)


@dataclass(eq=False, repr=False)
class HiddenFeatures(Features):
    """A language model's last hidden state after prompt and response; and counts.

    Reward models see text, so the response is encoded anew. What does not fit into the context is
    cut at the response's end. Special tokens written out in a response are read as ordinary text.

    Args:
        language_model: One with `features`; a name on the Hub or folder; None for the embedded
            SmolLM2. Loaded at first use.
        use_statistics: Whether counts are features too.
    """

    kind = "hidden"
    argument = "language_model"
    block_names = ("hidden",)
    language_model: LanguageModel | str | Path | None = None
    use_statistics: bool = True

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt fits into the context; a chat needs a chat template."""
        try:
            self._states([prompt], [""])
        except RewardError:
            return False
        return True

    def _read(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, FloatArray]:
        model: Any = self._model()
        states = self._states(prompts, responses)
        distinct = list(dict.fromkeys(states))
        # One by one: in a batch the last digits depend on the padding.
        rows = [model.features([state])[0] for state in distinct]
        found = np.asarray(rows, dtype=np.float64).reshape(len(distinct), -1)
        place = {state: i for i, state in enumerate(distinct)}
        return {"hidden": found[[place[state] for state in states]]}

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """float64[B], what the language model says that reading takes."""
        bound, states = self._model().usage_bound, self._states(prompts, responses)
        lengths = [len(state.prompt_ids) + len(state.response_ids) for state in states]
        return np.array([bound(length, []).lm_flops for length in lengths], dtype=np.float64)

    def flops_bound(self) -> float:
        """A prompt and a response that fill the context."""
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
                    f"({type(model).__name__}). Use one that runs here, such as `TransformersLM`."
                )
            self._loaded = model
        return cast("LanguageModel", self._loaded)


@dataclass(eq=False, repr=False)
class TokenFeatures(HiddenFeatures):
    """The mean of the response's token embeddings, which are looked up; and counts.

    No model is run. Source: Joulin et al., "Bag of Tricks for Efficient Text Classification", 2017.
    Deviation: the embeddings are the language model's input embeddings, and stay as they are.
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
        """float64[B]: none, but for sums that are not worth counting."""
        return np.zeros(len(responses))

    def flops_bound(self) -> float:
        """None."""
        return 0.0


def token_table(language_model: Any, error: type[Exception]) -> Any:
    """The input embeddings of a language model, float[vocab_size, d]; an `error` where it has none.

    Example:
        >>> token_table(embedded(), ValueError).shape  # doctest: +SKIP
        torch.Size([49152, 576])
    """
    model: Any = getattr(language_model, "model", None)
    if not hasattr(model, "get_input_embeddings"):
        raise error(
            "Expected a language model whose token embeddings can be read, such as TransformersLM, "
            f"got {type(language_model).__name__}. Use what embeds texts, such as MiniLM."
        )
    return model.get_input_embeddings().weight.detach()


def _weight(columns: int) -> float:
    return float(min(1.0, np.sqrt(_FULL_WEIGHT / max(1, columns))))

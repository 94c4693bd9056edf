"""Features of a prefix: its number of tokens, and counts of its text that never decrease.

Incomplete parts, such as the last word, are counted only when they are complete ("settled"). The
counts of a prefix therefore only grow, up to those of the finished response.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mbrl_text_env.rewards.verifiable.constraints.kinds import COUNTED
from mbrl_text_env.rewards.verifiable.constraints.text import settled_words

if TYPE_CHECKING:
    from mbrl_text_env.language_models.base import Tokenizer
    from mbrl_text_env.types import TextState

TOKENS = "tokens"
"""Name of the first feature of every set: the number of tokens of the response."""


@dataclass(frozen=True)
class TextFeature:
    """A number computed from a text.

    Args:
        name: Its name, as in `RewardModel.feature_names`.
        function: `function(text)` returns a finite number, 0 for the empty text.
        settled: Returns the part of an unfinished text to count, such as its complete words.
        falls: Whether it can decrease as the text grows, such as a depth; counts cannot.

    Example:
        >>> TextFeature("questions", lambda text: text.count("?")).of("Why? Oh", ended=False)
        1.0
    """

    name: str
    function: Callable[[str], float]
    settled: Callable[[str], str] = str
    falls: bool = False

    def of(self, text: str, ended: bool) -> float:
        """The feature of a complete (`ended`) or unfinished text."""
        return float(self.function(text if ended else self.settled(text)))


def count_feature(name: str, argument: str | None = None) -> TextFeature:
    """The count that a constraint uses, such as "words" or ("occurrences", "river").

    Example:
        >>> count_feature("letters", "e").name
        'letters:e'
    """
    if name not in COUNTED or (argument is None) != (COUNTED[name].argument is None):
        known = [n if c.argument is None else f"{n} of a {c.argument}" for n, c in COUNTED.items()]
        raise ValueError(f"Expected one of {known}, got {name!r} of {argument!r}. Change it.")
    counted = COUNTED[name]
    if counted.argument is None:
        return TextFeature(name, counted.count, counted.settled)
    count = partial(counted.count, **{counted.argument: argument})
    return TextFeature(f"{name}:{argument}", count, counted.settled)


# Named functions instead of lambdas, so that a world model can be pickled.
def _commas(text: str) -> int:
    return sum(map(text.count, ",，、،"))  # noqa: RUF001


def _lines(text: str) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())


# "ǅ" is neither to `str.isupper` nor to `str.islower`: it is counted as both.
def _capitals(text: str) -> int:
    return sum(c.isupper() or c.istitle() for c in text)


def _small_letters(text: str) -> int:
    return sum(c.islower() or (c.istitle() and not c.isupper()) for c in text)


def _digits(text: str) -> int:
    return sum(map(str.isdigit, text))


def _runs(text: str) -> int:
    return len(text.split())


def _visible(text: str) -> int:
    return sum(map(len, text.split()))


def _whole_lines(text: str) -> str:
    return text[: text.rfind("\n") + 1]


def _json_depth(text: str) -> int:
    """Number of open brackets outside strings."""
    depth, in_string, escaped = 0, False, False
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        else:
            depth += (character in "{[") - (character in "}]")
    return max(0, depth)


def _items(text: str) -> int:
    starts = (line.lstrip().partition(" ") for line in text.splitlines())
    return sum(
        bool(rest.strip()) and (mark in "-*" or mark.rstrip(".)").isdigit())
        for mark, _, rest in starts
        if mark
    )


def _distinct(text: str) -> int:
    return len(set(text.casefold().split()))


_PLAIN = ("words", "sentences", "paragraphs", "bullets", "capital_words", "placeholders")
DEFAULT_FEATURES: tuple[TextFeature, ...] = (
    *map(count_feature, (*_PLAIN, "highlights")),
    TextFeature("commas", _commas),
    TextFeature("lines", _lines),
    TextFeature("items", _items, _whole_lines),
    TextFeature("capitals", _capitals),
    TextFeature("small_letters", _small_letters),
    TextFeature("digits", _digits),
    TextFeature("runs", _runs),
    TextFeature("distinct_words", _distinct, settled_words),
    TextFeature("visible", _visible),
    TextFeature("json_depth", _json_depth, falls=True),
    *(count_feature("letters", letter) for letter in string.ascii_lowercase),
)
"""Counts of the package's own kinds, of marks, lines and characters, and the letters a to z."""


class TextFeatures:
    """Features of states and records: `tokens`, followed by the given features.

    Args:
        tokenizer: A tokenizer or language model that decodes the responses.
        features: Features with unique names; by default `DEFAULT_FEATURES`.

    Example:
        >>> from mbrl_text_env.language_models import NGramLM
        >>> from mbrl_text_env.types import Prompt, TextState
        >>> features = TextFeatures(NGramLM("ab "), [count_feature("words")])
        >>> features([TextState(Prompt.from_text("a"), (1,), (1, 3, 2))])
        array([[3., 2.]], dtype=float32)
    """

    def __init__(
        self, tokenizer: Tokenizer, features: Sequence[TextFeature] = DEFAULT_FEATURES
    ) -> None:
        self.tokenizer, self.features = tokenizer, tuple(features)
        self.names = (TOKENS, *(feature.name for feature in self.features))
        if len(set(self.names)) < len(self.names) or not self.features:
            raise ValueError(f"features: expected different names, got {self.names}. Change them.")

    def __call__(self, states: Sequence[TextState]) -> npt.NDArray[np.float32]:
        """Features of states, float32[B, F]; ValueError if one is not finite."""
        rows = [self._row(state) for state in states]
        found = np.asarray(rows, np.float32).reshape(len(states), len(self.names))
        for row, column in np.argwhere(~np.isfinite(found)):
            state = states[row]
            raise ValueError(
                f"Feature {self.names[column]!r}: expected finite numbers, got "
                f"{found[row, column]} for {len(state.response_ids)} tokens of a response to "
                f"prompt {state.prompt.id!r}. Fix the feature's function."
            )
        return found

    def _row(self, state: TextState) -> list[float]:
        text, ended = self.tokenizer.decode(state.response_ids), state.finish_reason is not None
        return [float(len(state.response_ids)), *(f.of(text, ended) for f in self.features)]

"""Cheap numbers about a response, alone and beside its prompt, for learned rewards.

None of them is a rule of its own: a fitted head decides what each is worth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mbrl_text_env.types import FloatArray, Prompt

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


def _share(test: Callable[[str], bool], of: Callable[[str], bool]) -> Callable[[str], float]:
    def share(text: str) -> float:
        among = [character for character in text if of(character)]
        return sum(map(test, among)) / len(among) if among else 0.0

    return share


def _distinct(text: str) -> float:
    words = text.casefold().split()
    return len(set(words)) / len(words) if words else 1.0


def _word_length(text: str) -> float:
    words = text.split()
    return math.log1p(len("".join(words)) / len(words)) if words else 0.0


def _cased(character: str) -> bool:
    return character.isupper() or character.islower()


def _any(character: str) -> bool:
    return True


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
    "digits": _share(str.isdigit, _any),
    "outside ASCII": _share(lambda character: not character.isascii(), _any),
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

    Example:
        >>> values = text_statistics([Prompt.from_text("Say hello.")], ["hello, hello"])
        >>> values[0, STATISTICS.index("commas")] == math.log(2)
        np.True_
    """
    rows = [
        _row(prompt.text, response.strip())
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return np.asarray(rows, dtype=np.float64).reshape(len(rows), len(STATISTICS))


def _row(prompt: str, response: str) -> list[float]:
    return [
        *(function(response) for function in _OF_RESPONSE.values()),
        *_beside(prompt, response),
    ]


def _beside(prompt: str, response: str) -> list[float]:
    asked = _asked(prompt)
    text = response.casefold()
    found = set(_WORD.findall(text))
    wanted = [text.count(phrase) for phrase in asked.wanted]
    unwanted = [text.count(phrase) for phrase in asked.unwanted]
    counts = [len(text.split()), _sentences(text), _paragraphs(text), len(_BULLET.findall(text))]
    ratios = [math.log((1 + n) / (1 + asked.number)) if asked.number else 0.0 for n in counts]
    return [
        len(asked.words & found) / len(asked.words) if asked.words else 0.0,
        sum(map(bool, wanted)) / len(wanted) if wanted else 0.0,
        math.log1p(sum(wanted)),
        sum(map(bool, unwanted)) / len(unwanted) if unwanted else 0.0,
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
    wanted: list[str] = []
    unwanted: list[str] = []
    for match in _QUOTED.finditer(text):
        if phrase := match[1].strip():
            before = text[max(0, match.start() - _BEFORE) : match.start()]
            (unwanted if _NEGATION.search(before) else wanted).append(phrase)
    return _Asked(
        words=frozenset(word for word in words if len(word) > 3),
        wanted=tuple(dict.fromkeys(wanted)),
        unwanted=tuple(dict.fromkeys(unwanted)),
        number=max(map(_number, words), default=0),
    )


def _number(word: str) -> int:
    if word.isascii() and word.isdigit() and len(word) < 7:
        return int(word)
    return _NUMBERS.get(word, 0)


def _sentences(text: str) -> int:
    return len(_SENTENCE_END.findall(text))


def _paragraphs(text: str) -> int:
    return sum(bool(part.strip()) for part in _PARAGRAPH.split(text))

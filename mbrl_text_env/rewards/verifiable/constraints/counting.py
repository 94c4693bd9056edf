"""Words, sentences and other things that constraints count in a text."""

# ruff: noqa: RUF001 - the commas, quotation marks and full stops of other scripts are meant.

from __future__ import annotations

import re
import unicodedata

_ABBREVIATION = re.compile(r"\b(mr|mrs|ms|dr|prof|vs|e\.g|i\.e|p\.s)\.", re.IGNORECASE)
_BULLET = re.compile(r"^[ \t]*[-*] +\S", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*\*(?=\S)[^*\n]+(?<=\S)\*\*|\*(?=\S)[^*\n]+(?<=\S)\*")
_LIST_NUMBER = re.compile(r"^[ \t]*\d+[.)][ \t]", re.MULTILINE)
# More digits are no number of a list.
_NUMBERED_ITEM = re.compile(r"^[ \t]*(\d{1,9})[.)][ \t]+\S", re.MULTILINE)
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
_PLACEHOLDER = re.compile(r"\[([^\[\]\n]+)\]")
# Runs of marks are matched from their first mark only: small models like to end in thousands of
# dots, and trying a match at each of them would take quadratic time.
_SENTENCE_END = re.compile(
    r"""(?<![.!?…])[.!?…]+["'”’»)\]*_]*(?:\s+|$)|[。！？]+[”’」』）]*|\n\s*\n"""
)
_MARKS = "\"'“”‘’«»「」()[]*_`.,;:!?…。，、！？"


def normal(text: str) -> str:
    """A text in composed form, without white space around it."""
    # An accented letter may be one code point or two that look the same.
    return unicodedata.normalize("NFC", text).strip()


def words_of(text: str) -> list[str]:
    """What stands between white space, casefolded and in composed form."""
    return unicodedata.normalize("NFC", text).casefold().split()


def bare_words(text: str) -> list[str]:
    """Its words without the marks around them; those of nothing but marks are left out."""
    stripped = (word.strip(_MARKS) for word in words_of(text))
    return [word for word in stripped if word]


def count_words(text: str) -> int:
    """Runs without white space that have a letter or digit in them."""
    return sum(map(_has_word, text.split()))


def count_capital_words(text: str) -> int:
    """Runs without white space whose letters, at least one, are capitals."""
    return sum(map(str.isupper, text.split()))


def count_sentences(text: str) -> int:
    """See `checkers.num_sentences`."""
    plain = _ABBREVIATION.sub(r"\1", _LIST_NUMBER.sub("", text))
    return sum(map(_has_word, _SENTENCE_END.split(plain)))


def paragraphs_of(text: str) -> list[str]:
    """What stands between blank lines."""
    return _PARAGRAPH_BREAK.split(text)


def count_paragraphs(text: str) -> int:
    """Parts between blank lines, those at the ends aside; 1 for an empty text."""
    return len(paragraphs_of(text.strip()))


def count_bullets(text: str) -> int:
    """Lines that start with "- " or "* " and go on."""
    return len(_BULLET.findall(text))


def list_numbers(text: str) -> list[int]:
    """The numbers of lines such as "1. Boil water" and "2) Add salt"."""
    return [int(number) for number in _NUMBERED_ITEM.findall(text)]


def count_highlights(text: str) -> int:
    """Parts of lines between `*` and `*`, or `**` and `**`, that have no space at their ends."""
    return len(_HIGHLIGHT.findall(text))


def count_sections(text: str, splitter: str) -> int:
    """Times that the splitter stands before a number."""
    return len(re.findall(rf"(?<!\w){re.escape(splitter.strip())}\s?\d+", text))


def count_placeholders(text: str) -> int:
    """Parts of lines in square brackets, not blank."""
    return sum(bool(inside.strip()) for inside in _PLACEHOLDER.findall(text))


def count_letter(text: str, letter: str) -> int:
    """Times that a letter occurs in the text in composed form, small or capital."""
    composed = unicodedata.normalize("NFC", text)
    letter = unicodedata.normalize("NFC", letter)
    return sum(composed.count(form) for form in {letter, letter.lower(), letter.upper()})


def count_occurrences(phrase: str, text: str) -> int:
    """Times that a phrase occurs as whole words, in any case, with any white space inside."""
    words = map(re.escape, normal(phrase).casefold().split())
    pattern = r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)"
    return len(re.findall(pattern, normal(text).casefold()))


def _has_word(text: str) -> bool:
    return any(map(str.isalnum, text))

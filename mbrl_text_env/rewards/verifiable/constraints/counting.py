"""Words, sentences and other things that constraints count in a text."""

# ruff: noqa: RUF001 - the commas, quotation marks and full stops of other scripts are meant.

from __future__ import annotations

import re
import unicodedata

# A mark and text after it; a line of three marks or more is a rule across the page.
_BULLET = re.compile(r"^[ \t]*(?!([-*])(?:[ \t]*\1){2,}[ \t\r]*$)[-*][ \t]+\S", re.MULTILINE)
_OPEN_RULE = re.compile(r"(?:^|\n)[ \t]*([-*])(?:[ \t]*\1)*[ \t\r]*\Z")
_HIGHLIGHT = re.compile(r"\*\*(?=\S)[^*\n]+(?<=\S)\*\*|\*(?=\S)[^*\n]+(?<=\S)\*")
# More digits are no number of a list.
_NUMBERED_ITEM = re.compile(r"^[ \t]*(\d{1,9})[.)][ \t]+\S", re.MULTILINE)
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
_PLACEHOLDER = re.compile(r"\[([^\[\]\n]+)\]")
_MARKS = "\"'“”‘’«»‹›„‚「」『』《》【】（）()[]{}*_~`.,;:!?…。，、！？；：¿¡؟،؛۔।॥—–―•·"
# What may stand in front of a text, or of its first word: headings, quotations, bullets, dashes.
_LEADING = frozenset(_MARKS + "#>-+")
# Emphasis of Markdown: underscores with no letter on one of their sides.
_EMPHASIS = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])")
_APOSTROPHES = str.maketrans("’‘ʼ＇", "''''")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
_HANGUL = re.compile("[\uac00-\ud7a3]")
# What Korean writes after a noun without a space.
_PARTICLES = re.compile(
    "(?:들|은|는|이|가|을|를|의|에|에서|에게|에게서|한테|께|께서|도|만|와|과|로|으로|랑|이랑|하고|까지|부터|처럼|보다|"
    "마다|조차|마저|밖에|나|이나|라도|이라도|야|아|여|이여|입니다|입니까|이에요|예요|이다|이고|이며|인|이란|란|라는|이라는)"
    "{0,3}(?![\uac00-\ud7a3])"
)


def normal(text: str) -> str:
    """A text in composed form with straight apostrophes, without white space around it."""
    return _composed(text).strip()


def _composed(text: str) -> str:
    # An accented letter may be one code point or two that look the same.
    return unicodedata.normalize("NFC", text).translate(_APOSTROPHES)


def words_of(text: str) -> list[str]:
    """What stands between white space, casefolded and in composed form."""
    return _composed(text).casefold().split()


def bare_words(text: str) -> list[str]:
    """Its words without the marks around them, and without what stands in front of the first.

    Words of nothing but marks are left out; a text of nothing but marks has its words as they are.
    """
    words = words_of(text)
    bare = [word for word in map(_bare, words) if word]
    first = next((i for i, word in enumerate(bare) if not _LEADING.issuperset(word)), len(bare))
    return bare[first:] or words


def is_of_marks(text: str) -> bool:
    """Whether nothing but marks is in a text."""
    return all(_LEADING.issuperset(word) for word in text.split())


def _bare(word: str) -> str:
    stripped = word.rstrip(_MARKS)
    for place, character in enumerate(stripped):
        # The sign or the point of a number is a part of it.
        is_sign = character in "-–." and stripped[place + 1 : place + 2].isdigit()
        if is_sign or character not in _LEADING or character == "+":
            return stripped[place:]
    return ""


def count_words(text: str) -> int:
    """Runs without white space that have a letter or digit in them."""
    return sum(map(_has_word, text.split()))


def count_capital_words(text: str) -> int:
    """Runs without white space whose letters, at least one, are capitals."""
    return sum(map(str.isupper, text.split()))


def paragraphs_of(text: str) -> list[str]:
    """What stands between blank lines."""
    return _PARAGRAPH_BREAK.split(text)


def count_paragraphs(text: str) -> int:
    """Parts between blank lines, those at the ends aside; 1 for an empty text."""
    return len(paragraphs_of(text.strip()))


def count_bullets(text: str) -> int:
    """Lines that start with "-" or "*" and white space, and go on; no rules such as "* * *"."""
    return sum(1 for _ in _BULLET.finditer(text))


def without_open_rule(text: str) -> str:
    """A text without its last line, where that may become a rule across the page."""
    return _OPEN_RULE.sub("", text)


def list_numbers(text: str) -> list[int]:
    """The numbers of lines such as "1. Boil water" and "2) Add salt"."""
    return [int(number) for number in _NUMBERED_ITEM.findall(text)]


def count_highlights(text: str) -> int:
    """Parts of lines between `*` and `*`, or `**` and `**`, that have no space at their ends."""
    return len(_HIGHLIGHT.findall(text))


def count_sections(text: str, splitter: str) -> int:
    """Times that the splitter stands before a number."""
    return len(re.findall(rf"(?<![^\W_]){re.escape(splitter.strip())}\s?\d+", text))


def count_placeholders(text: str) -> int:
    """Parts of lines in square brackets, not blank."""
    return sum(bool(inside.strip()) for inside in _PLACEHOLDER.findall(text))


def count_letter(text: str, letter: str) -> int:
    """Times that a letter occurs in the text in composed form, small or capital."""
    composed = unicodedata.normalize("NFC", text)
    letter = unicodedata.normalize("NFC", letter)
    return sum(composed.count(form) for form in {letter, letter.lower(), letter.upper()})


def count_occurrences(phrase: str, text: str) -> int:
    """Times that a phrase occurs as whole words, in any case; see `checkers.keywords`."""
    phrase, text = normal(phrase).casefold(), normal(text).casefold()
    if "_" not in phrase:
        text = _EMPHASIS.sub(" ", text)
    # Between its words there may be any white space, and the marks of emphasis.
    pattern = re.compile(r"\**\s+\**".join(map(re.escape, phrase.split())))
    count = start = 0
    while (match := pattern.search(text, start)) is not None:
        whole = _is_whole(text, match.start(), match.end())
        count, start = (count + 1, match.end()) if whole else (count, match.start() + 1)
    return count


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether no word goes on before or after a part of a text."""
    if start and _is_joined(text[start - 1], text[start]):
        return False
    if end == len(text):
        return True
    if _HANGUL.match(text[end - 1]) and _PARTICLES.match(text, end):
        return True
    return not (_is_accent(text[end]) or _is_joined(text[end - 1], text[end]))


def _is_joined(left: str, right: str) -> bool:
    """Whether two characters side by side belong to one word, as far as can be told."""
    if _UNSPACED.match(left) or _UNSPACED.match(right):
        return False
    return _in_word(left) and _in_word(right)


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_" or _is_accent(character)


def _is_accent(character: str) -> bool:
    """Whether it changes the letter before it (or is a vowel sign, as in Hindi or Thai)."""
    return unicodedata.category(character) in ("Mn", "Mc")


def _has_word(text: str) -> bool:
    return any(map(str.isalnum, text))

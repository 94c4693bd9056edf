"""Words and sentences of a text, and the part of a prefix that no continuation can change."""

# ruff: noqa: RUF001 - characters of other scripts are intended.

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_MARKS = "\"'“”‘’«»‹›„‚「」『』《》【】（）()[]{}*_~`.,;:!?…。，、！？；：¿¡؟،؛۔।॥—–―•·"
# Characters allowed before a text or its first word: headings, quotes, bullets, dashes.
_LEADING = frozenset(_MARKS + "#>-+")
# Markdown emphasis: underscores without a letter on at least one side.
_EMPHASIS = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])")
_APOSTROPHES = str.maketrans("’‘ʼ＇", "''''")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
_HANGUL = re.compile("[\uac00-\ud7a3]")
# Korean particles, which follow a noun without a space.
_PARTICLES = re.compile(
    "(?:들|은|는|이|가|을|를|의|에|에서|에게|에게서|한테|께|께서|도|만|와|과|로|으로|랑|이랑|하고|까지|부터|처럼|보다|"
    "마다|조차|마저|밖에|나|이나|라도|이라도|야|아|여|이여|입니다|입니까|이에요|예요|이다|이고|이며|인|이란|란|라는|이라는)"
    "{0,3}(?![\uac00-\ud7a3])"
)
_LIST_NUMBER = re.compile(r"^[ \t]*\d+[.)][ \t]", re.MULTILINE)
# Match runs of marks only from their first mark. Small models often end in thousands of dots, and
# a match attempt at each of them would take quadratic time.
_SENTENCE_END = re.compile(
    r"""(?<![.!?…])[.!?…]+["'”’»)\]*_]*(?:\s+|$)|[。！？｡।॥؟۔։።။។]+["'”’»」』）)*_]*|\n\s*\n"""
)

# Never the end of a sentence.
_TITLES = r"mr|mrs|ms|mx|dr|prof|messrs|mme|mlle|vs|cf|viz|approx|e\.g|i\.e|p\.s"
# Abbreviations before a number, otherwise words: "No. 5", but "He said no."
_NUMBERED = "no|nos|fig|figs|vol|pp?|ch|sec|eq|art"
# The end of a sentence before a capital letter, unless a day, month or time zone follows.
_BEFORE_SMALL = r"[ap]\.m|etc|al"
# The end of a sentence before one of `_STARTERS`, since a name can follow too ("U.S. Senate").
_BEFORE_NAMES = (
    "st|mt|gen|col|capt|lt|sgt|rev|hon|sen|rep|gov|pres|inc|ltd|co|corp|bros|llc|jr|sr|esq|dept|"
    "univ|assn|ave|blvd|rd|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|"
    r"(?:[a-z]{1,2}\.){1,4}[a-z]{1,2}"
)
_ABBREVIATION = re.compile(
    rf"""(?<![\w.])(?:(?P<title>{_TITLES})|(?P<numbered>{_NUMBERED})|(?P<small>{_BEFORE_SMALL})|
    (?P<names>{_BEFORE_NAMES})|(?P<initial>[^\W\d_]))\.(?=[*_]*\s+["'“‘(*_\[]*(?P<next>[^\s]+))""",
    re.IGNORECASE | re.VERBOSE,
)
_INITIAL = re.compile(r"[^\W\d_]\.")
_CALENDAR = re.compile(
    r"(mon|tues|wednes|thurs|fri|satur|sun)days?|january|february|march|april|may|june|july|august|"
    r"september|october|november|december|[ecmpbji][sd]?t|cest|gmt|utc",
    re.IGNORECASE,
)
_STARTING = (
    "a after all also although an and another are as at because before both but by can could "
    "did do does during each even every finally first for from had has have he her here his "
    "how however i if in is it its let many maybe may meanwhile more most my never next no "
    "nobody not now of on once one only or other our overall perhaps please she should since "
    "so some soon still such that the their then there therefore these they this those though "
    "through thus to today together under until was we were what when where whether which "
    "while who why will with would yes yet you your"
)
_STARTERS = frozenset(_STARTING.split())


def normal(text: str) -> str:
    """Return a text in composed form with straight apostrophes, stripped."""
    # An accented letter can be one or two code points.
    return unicodedata.normalize("NFC", text).translate(_APOSTROPHES).strip()


def words_of(text: str) -> list[str]:
    """Split a text at white space, casefolded and in composed form."""
    return normal(text).casefold().split()


def bare_words(text: str) -> list[str]:
    """Return the words without surrounding marks, and without bullets or headings before them.

    Words that consist of marks are removed, unless the whole text consists of marks.
    """
    words = words_of(text)
    bare = [word for word in map(_bare, words) if word]
    first = next((i for i, word in enumerate(bare) if not _LEADING.issuperset(word)), len(bare))
    return bare[first:] or words


def is_of_marks(text: str) -> bool:
    """Return whether a text consists of marks and white space."""
    return all(_LEADING.issuperset(word) for word in text.split())


def _bare(word: str) -> str:
    stripped = word.rstrip(_MARKS)
    for place, character in enumerate(stripped):
        # The sign or decimal point of a number is part of it.
        is_sign = character in "-–." and stripped[place + 1 : place + 2].isdigit()
        if is_sign or character not in _LEADING or character == "+":
            return stripped[place:]
    return ""


def count_occurrences(phrase: str, text: str) -> int:
    """Count the occurrences of a phrase as whole words, ignoring case; see `kinds.keywords`."""
    phrase, text = normal(phrase).casefold(), normal(text).casefold()
    if "_" not in phrase:
        text = _EMPHASIS.sub(" ", text)
    # Allow any white space and emphasis marks between the words.
    pattern = re.compile(r"\**\s+\**".join(map(re.escape, phrase.split())))
    count = start = 0
    while (match := pattern.search(text, start)) is not None:
        whole = _is_whole(text, match.start(), match.end())
        count, start = (count + 1, match.end()) if whole else (count, match.start() + 1)
    return count


def _is_whole(text: str, start: int, end: int) -> bool:
    """Return whether a part of a text starts and ends at word boundaries."""
    if start and _is_joined(text[start - 1], text[start]):
        return False
    if end == len(text):
        return True
    if _HANGUL.match(text[end - 1]) and _PARTICLES.match(text, end):
        return True
    return not (_is_accent(text[end]) or _is_joined(text[end - 1], text[end]))


def _is_joined(left: str, right: str) -> bool:
    """Return whether two adjacent characters probably belong to one word."""
    if _UNSPACED.match(left) or _UNSPACED.match(right):
        return False
    return _in_word(left) and _in_word(right)


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_" or _is_accent(character)


def _is_accent(character: str) -> bool:
    """Return whether a character modifies the letter before it, or is a vowel sign (as in Thai)."""
    return unicodedata.category(character) in ("Mn", "Mc")


def count_sentences(text: str) -> int:
    """See `kinds.sentences`."""
    plain = _ABBREVIATION.sub(_without_stop, _LIST_NUMBER.sub("", text))
    return sum(any(map(str.isalnum, part)) for part in _SENTENCE_END.split(plain))


def _without_stop(match: re.Match[str]) -> str:
    """Remove the full stop of an abbreviation unless it ends a sentence."""
    return match[0] if _ends(match) else match[0][:-1]


def _ends(match: re.Match[str]) -> bool:
    following = match["next"]
    word = re.split(r"[^\w]", following, maxsplit=1)[0]
    if match["title"]:
        return False
    if match["numbered"]:
        return not following[0].isdigit()
    if match["small"]:
        return word[:1].isupper() and not _CALENDAR.fullmatch(word)
    if match["initial"]:
        # "I" and small letters are words, unless another initial follows.
        is_word = match["initial"] == "I" or not match["initial"].isupper()
        if not word[:1].isupper() or (is_word and not _INITIAL.match(following)):
            return True
        return len(word) > 1 and word.casefold() in _STARTERS
    return word[:1].isupper() and word.casefold() in _STARTERS


# --- The part of a prefix that no continuation can change ---


def settled_words(prefix: str) -> str:
    """Return the prefix up to its last white space; all words in it are complete."""
    return prefix[: _last(prefix, str.isspace) + 1]


def settled_text(prefix: str) -> str:
    """Return the prefix before its last ASCII character, which cannot combine with it."""
    return prefix[: max(0, _last(prefix, str.isascii))]


def settled_phrases(prefix: str) -> str:
    """Return the prefix before its last mark or space; all phrases in it are complete."""
    return prefix[: max(0, _last(prefix, _is_border))]


def _is_border(character: str) -> bool:
    is_letter = character.isalnum() or character == "_"
    return (character.isascii() and not is_letter) or character in "\u3000。，、！？；："


def _last(text: str, is_one: Callable[[str], bool]) -> int:
    """Return the index of the last character of a kind, or -1."""
    return next((i for i in range(len(text) - 1, -1, -1) if is_one(text[i])), -1)

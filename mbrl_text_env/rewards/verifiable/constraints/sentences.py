"""Where sentences end: full stops that end one, and full stops of abbreviations and initials."""

# ruff: noqa: RUF001 - the quotation marks and full stops of other scripts are meant.

from __future__ import annotations

import re

_LIST_NUMBER = re.compile(r"^[ \t]*\d+[.)][ \t]", re.MULTILINE)
# Runs of marks are matched from their first mark only: small models like to end in thousands of
# dots, and trying a match at each of them would take quadratic time.
_SENTENCE_END = re.compile(
    r"""(?<![.!?…])[.!?…]+["'”’»)\]*_]*(?:\s+|$)|[。！？｡।॥؟۔։።။។]+["'”’»」』）)*_]*|\n\s*\n"""
)

# Never the end of a sentence: something has to follow.
_TITLES = r"mr|mrs|ms|mx|dr|prof|messrs|mme|mlle|vs|cf|viz|approx|e\.g|i\.e|p\.s"
# Followed by a number, or else words of their own: "No. 5", but "He said no."
_NUMBERED = "no|nos|fig|figs|vol|pp?|ch|sec|eq|art"
# The end before a capital letter, unless a day, month or time zone follows.
_BEFORE_SMALL = r"[ap]\.m|etc|al"
# The end before one of `_STARTERS`: a name may follow as well as a sentence ("U.S. Senate").
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
_STARTERS = frozenset(
    re.findall(
        r"\w+",
        "a after all also although an and another are as at because before both but by can could "
        "did do does during each even every finally first for from had has have he her here his "
        "how however i if in is it its let many maybe may meanwhile more most my never next no "
        "nobody not now of on once one only or other our overall perhaps please she should since "
        "so some soon still such that the their then there therefore these they this those though "
        "through thus to today together under until was we were what when where whether which "
        "while who why will with would yes yet you your",
    )
)


def count_sentences(text: str) -> int:
    """See `checkers.num_sentences`."""
    plain = _ABBREVIATION.sub(_without_stop, _LIST_NUMBER.sub("", text))
    return sum(any(map(str.isalnum, part)) for part in _SENTENCE_END.split(plain))


def _without_stop(match: re.Match[str]) -> str:
    """An abbreviation without its full stop, where that ends no sentence."""
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

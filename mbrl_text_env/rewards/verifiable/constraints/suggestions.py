"""Suggested texts that help a response to satisfy its constraints."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mbrl_text_env.rewards.verifiable.constraints.text import count_occurrences
from mbrl_text_env.rewards.verifiable.partial_json import is_json, unclosed

_Suggest = Callable[..., list[str]]
# Constraints on the end of the response; suggested only when all others are satisfied.
_LAST = ("ends_with", "quoted", "json_object")


def suggestions(unmet: Sequence[Mapping[str, Any]], text: str) -> tuple[str, ...]:
    """Return texts that could follow `text`, which does not satisfy the constraints `unmet`.

    The texts are short pieces, such as a bullet mark or a missing keyword; the language model
    writes the text between them. Each is also suggested in uppercase and in lowercase, in case
    another constraint requires that.

    Example:
        >>> suggestions([{"type": "keywords", "value": ["River"]}], "We swam.")
        (' River', ' RIVER', ' river')
    """
    first = [each for each in unmet if each["type"] not in _LAST] or unmet
    found: list[str] = []
    for constraint in first:
        arguments = {
            key: value for key, value in constraint.items() if key != "type" and value is not None
        }
        suggest = _SUGGEST.get(constraint["type"])
        for piece in [] if suggest is None else suggest(text, **arguments):
            found += [piece, piece.upper(), piece.lower()]
    return tuple(dict.fromkeys(filter(None, found)))


def _apart(text: str, piece: str, space: str = " ") -> str:
    """Separate a piece from the text before it."""
    return piece if not text or text.endswith(("\n", space)) else space + piece


def _line(text: str, piece: str, blank: bool = False) -> str:
    """Put a piece at the start of a line, optionally after a blank line."""
    wanted = 2 if blank else 1
    there = len(text) - len(text.rstrip("\n"))
    return piece if not text else "\n" * max(0, wanted - there) + piece


def _keywords(text: str, value: Sequence[str]) -> list[str]:
    return [_apart(text, word) for word in value if not count_occurrences(word, text)]


def _keyword(text: str, keyword: str, value: int) -> list[str]:
    return [_apart(text, keyword)]


def _beginning(text: str, value: str) -> list[str]:
    begun = text.lstrip()
    return [value[len(begun) :]] if value.startswith(begun) else []


def _ending(text: str, value: str) -> list[str]:
    return [_apart(text, value), _line(text, value, blank=True)]


def _bracketed(opening: str, closing: str, whole_line: bool = False) -> _Suggest:
    """Suggest the opening bracket, or the closing one if it is open in the last line."""

    def suggest(text: str, value: int = 1) -> list[str]:
        line = text.rsplit("\n", 1)[-1]
        at = line.rfind(opening)
        if at >= 0 and closing not in line[at + len(opening) :]:
            return [closing]
        return [_line(text, opening, blank=True) if whole_line else _apart(text, opening)]

    return suggest


def _listed(text: str, value: int) -> list[str]:
    return [_line(text, "- "), _line(text, "* ")]


def _numbered(text: str, value: int) -> list[str]:
    there = len(re.findall(r"^[ \t]*\d{1,9}[.)][ \t]+\S", text, re.MULTILINE))
    return [_line(text, f"{there + 1}. ")]


def _paragraph(text: str, value: int) -> list[str]:
    return [_line(text, "", blank=True)] if text else []


def _sections(text: str, splitter: str, value: int) -> list[str]:
    number = len(re.findall(re.escape(splitter.strip()) + r"\s?\d+", text)) + 1
    return [_line(text, f"{splitter.strip()} {number}\n", blank=True)]


def _quoted(text: str) -> list[str]:
    begun = text.strip()[:1]
    return ['"'] if begun in ("", '"') else ["”"] if begun == "“" else []


def _json(text: str) -> list[str]:
    """Suggest the end of the object, or the start of one."""
    if not text.strip():
        return ['{"']
    closers, in_text = unclosed(text)
    ends = (f'"{closers}', f'": ""{closers}') if in_text else (closers, f'": ""{closers}')
    return [end for end in ends if is_json(text + end)]


_SUGGEST: Mapping[str, _Suggest] = {
    "keywords": _keywords,
    "keyword_count": _keyword,
    "exact_keyword_count": _keyword,
    "starts_with": _beginning,
    "ends_with": _ending,
    "title": _bracketed("<<", ">>", whole_line=True),
    "placeholders": _bracketed("[", "]"),
    "highlights": _bracketed("*", "*"),
    "postscript": lambda text: [_line(text, "P.S. ", blank=True)],
    "num_bullets": _listed,
    "numbered_list": _numbered,
    "num_paragraphs": _paragraph,
    "min_paragraphs": _paragraph,
    "sections": _sections,
    "quoted": _quoted,
    "json_object": _json,
    "one_of": lambda text, value: [each for option in value for each in _beginning(text, option)],
}

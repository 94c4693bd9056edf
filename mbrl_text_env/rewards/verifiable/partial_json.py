"""Parse prefixes of JSON texts, to find the parts of the value that no continuation can change.

A prefix is completed in the few ways in which a JSON text can continue, and the standard parser
checks whether one of them is JSON. So every prefix of a text that the parser accepts is accepted.
Values on the path from the root to the end of the prefix are marked as `Unfinished`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from mbrl_text_env.files import refuse_constant

MAX_DEPTH = 100
"""JSON that is nested deeper is rejected, whatever the limit of the parser."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*("?)|[][{}]', re.DOTALL)
_REST_OF_STRING = ('"', '\\"', '0"', '00"', '000"', '0000"')
# The rest of a name includes a value.
_REST = {
    True: (*_REST_OF_STRING, *(f"{rest}:0" for rest in _REST_OF_STRING)),
    False: (
        "",
        "0",
        ".0",
        ":0",
        '"":0',
        *("rue", "ue", "e", "alse", "lse", "se", "ull", "ll", "l"),
    ),
}


class Unfinished:
    """An unfinished value; the base class is used if nothing is known about it."""


class UnfinishedObject(Unfinished, dict[str, Any]):
    """An unfinished object: members with complete names, and the prefix of an incomplete `name`."""

    name: str | None = None


class UnfinishedArray(Unfinished, list[Any]):
    """An unfinished array with the elements so far; the last one can be unfinished."""


class UnfinishedString(Unfinished, str):
    """The prefix of a string."""


class UnfinishedNumber(Unfinished, float):
    """A number that can get more digits, so it can become any number."""


class _Members(list[tuple[str, Any]]):
    """The members of an object, in the order of the text."""


def is_json(text: str, unique_names: bool = False) -> bool:
    """Return whether a text is JSON, optionally without duplicate names in its objects."""
    try:
        value = _parsed(text, unique_names)
    except (ValueError, RecursionError):
        return False
    level = [value]
    for _ in range(MAX_DEPTH):
        parents = [each for each in level if isinstance(each, dict | list)]
        level = [c for each in parents for c in (each.values() if isinstance(each, dict) else each)]
    return not level


def unclosed(text: str) -> tuple[str, bool]:
    """Return the closing brackets that a text lacks, and whether it ends inside a string."""
    closing, in_string = "", False
    for token in _TOKEN.finditer(text):
        if token[0] in ("[", "{"):
            closing = {"[": "]", "{": "}"}[token[0]] + closing
        elif token[0] in ("]", "}"):
            closing = closing[1:]
        else:
            in_string = not token[1]
    return closing, in_string


def unfinished_json(text: str, unique_names: bool = False) -> Any:
    """Return the value of a prefix; raise `ValueError` if no JSON text starts with it.

    Unless names must be unique, a later member can replace an earlier one, so no value in an
    unfinished object is final.

    Example:
        >>> unfinished_json('[true, "gre')
        [True, 'gre']
    """
    closing, in_string = unclosed(text)
    for rest in _REST[in_string]:
        whole = text + rest + closing
        if is_json(whole):
            value = json.loads(whole, parse_constant=refuse_constant, object_pairs_hook=_Members)
            return _marked(value, len(closing), (text, rest, in_string), unique_names)
    raise ValueError(f"expected a prefix of JSON, got {text[:80]!r}")


def _parsed(text: str, unique_names: bool) -> Any:
    value = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=_Members)
    return _settled(value, unique_names)


def _settled(value: Any, unique_names: bool) -> Any:
    """Convert a complete value to plain types."""
    if isinstance(value, _Members):
        _check_names([name for name, _ in value], unique_names)
        return {name: _settled(each, unique_names) for name, each in value}
    return [_settled(each, unique_names) for each in value] if isinstance(value, list) else value


def _check_names(names: Sequence[str], unique: bool) -> None:
    if unique and len(set(names)) < len(names):
        raise ValueError(f"expected unique names, got {names}")


def _marked(value: Any, levels: int, ending: tuple[str, str, bool], unique_names: bool) -> Any:
    """Mark the last value on each of the outermost `levels` as unfinished."""
    if levels == 0:
        return _last(_settled(value, unique_names), *ending)
    if isinstance(value, _Members):
        return _marked_object(value, levels, ending, unique_names)
    settled = [_settled(each, unique_names) for each in value[:-1]]
    last = [_marked(each, levels - 1, ending, unique_names) for each in value[-1:]]
    return UnfinishedArray([*settled, *last])


def _marked_object(
    members: _Members, levels: int, ending: tuple[str, str, bool], unique_names: bool
) -> UnfinishedObject:
    _, rest, in_string = ending
    found = UnfinishedObject()
    name: str | None = None
    complete: Sequence[tuple[str, Any]] = members
    if levels == 1 and (rest == '"":0' or (in_string and rest.endswith(":0"))):
        *complete, (last, _) = members
        name = _beginning(last, rest.removesuffix(":0")) if in_string else None
        values = [_settled(each, unique_names) for _, each in complete]
    else:
        values = [_settled(each, unique_names) for _, each in members[:-1]]
        values += [_marked(each, levels - 1, ending, unique_names) for _, each in members[-1:]]
    names = [each for each, _ in complete]
    _check_names(names, unique_names)
    if not unique_names:
        values = [Unfinished() for _ in names]
    found.update(zip(names, values, strict=True))
    found.name = name
    return found


def _last(value: Any, text: str, rest: str, in_string: bool) -> Any:
    if in_string:
        return UnfinishedString(_beginning(value, rest))
    if text[-1:].isdigit() or (rest in ("0", ".0") and text[-1:] in tuple("-+.eE")):
        return UnfinishedNumber()
    return Unfinished() if rest in ("0", ":0") else value


def _beginning(string: str, rest: str) -> str:
    """Return a string without an incomplete escape or half of a surrogate pair at its end."""
    string = string if rest == '"' else string[:-1]
    return string[:-1] if "\ud800" <= string[-1:] <= "\udbff" else string

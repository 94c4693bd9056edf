"""Whether a response, or every one with a prefix, satisfies constraints."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from mbrl_text_env.rewards.verifiable.constraints.kinds import (
    CONSTRAINT_TYPES,
    COUNTED,
    LANGUAGES,
    RELATIONS,
    Kind,
    LanguageCode,
    Letter,
    Verdict,
)


class ConstraintError(ValueError):
    """A constraint has an unknown type or wrong arguments, or a prompt has no constraints."""


def check_constraint(
    constraint: Mapping[str, Any], response: str, prompt: str | None = None
) -> bool:
    """Whether a response satisfies a constraint; an empty response satisfies none.

    Args:
        constraint: `{"type": name, ...arguments}`, the name being one of `CONSTRAINT_TYPES`.
        response: The response's text.
        prompt: The prompt's text, which `repeats_prompt` needs.

    Raises:
        ConstraintError: The constraint's type is unknown, or an argument is missing, superfluous or
            of a wrong type, or the constraint needs the prompt.

    Example:
        >>> check_constraint({"type": "max_words", "value": 3}, "Short and sweet.")
        True
    """
    kind, arguments = _read(constraint, prompt)
    return bool(response.strip()) and kind(response, **arguments)


def prefix_verdict(
    constraint: Mapping[str, Any], prefix: str, prompt: str | None = None
) -> Verdict:
    """What `check_constraint` returns for `prefix` and every longer response; None if that is open.

    It may also be None where that is not known. An empty prefix decides nothing.

    Example:
        >>> prefix_verdict({"type": "no_commas"}, "Well, ")
        False
        >>> prefix_verdict({"type": "keywords", "value": ["river"]}, "The river")  # "rivers"?
        >>> prefix_verdict({"type": "keywords", "value": ["river"]}, "The river ")
        True
    """
    kind, arguments = _read(constraint, prompt)
    return kind.decide(prefix, False, **arguments) if prefix.strip() else None


def count_behind(constraint: Mapping[str, Any], prompt: str | None = None) -> tuple[str, ...]:
    """Names of the counts that decide a constraint, as `world_model` calls them.

    Raises:
        ConstraintError: None do.
    """
    _, given = _read(constraint, prompt)
    name = constraint["type"]
    if name in RELATIONS:
        counted, _ = RELATIONS[name]
        argument = COUNTED[counted].argument
        if argument is None:
            return (counted,)
        # In any case, as it is counted.
        value = given[argument]
        return (f"{counted}:{value.lower() if counted == 'letters' else value}",)
    if name not in _OF_FEATURES:
        known = sorted({*RELATIONS, *_OF_FEATURES})
        raise ConstraintError(
            f"Expected constraints on counts, of the types {known}, got {name!r}. Leave out the "
            "prompt, or use another value model."
        )
    return _OF_FEATURES[name][0]


def check_counts(
    constraint: Mapping[str, Any], features: Mapping[str, Any], prompt: str | None = None
) -> Any:
    """bool[N]: whether responses with these counts satisfy a constraint; see `count_behind`."""
    found = [features[name] for name in count_behind(constraint, prompt)]
    name = constraint["type"]
    if name not in RELATIONS:
        return _OF_FEATURES[name][1](*found)
    return RELATIONS[name][1](found[0], constraint["value"])


# Of other constraints: the features that decide them, and how.
_OF_FEATURES: Mapping[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "no_commas": (("commas",), lambda commas: commas == 0),
    "lowercase": (("capitals", "small_letters"), lambda big, small: (big == 0) & (small > 0)),
    "uppercase": (("capitals", "small_letters"), lambda big, small: (small == 0) & (big > 0)),
}


def _read(constraint: Mapping[str, Any], prompt: str | None) -> tuple[Kind, dict[str, Any]]:
    """The constraint's type, and the arguments that its check takes beside the response."""
    name = constraint.get("type") if isinstance(constraint, Mapping) else None
    if not isinstance(name, str):
        raise ConstraintError(
            f"Expected a constraint such as {{'type': 'max_words', 'value': 50}}, got "
            f"{constraint!r}. Make it an object whose 'type' is a string."
        )
    kind = CONSTRAINT_TYPES.get(name)
    if kind is None:
        near = difflib.get_close_matches(name, CONSTRAINT_TYPES)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ConstraintError(
            f"Expected a known constraint type, got {name!r}. {hint}Change it to one of: "
            f"{', '.join(sorted(CONSTRAINT_TYPES))}."
        )
    # Tables (Arrow, pandas) give every row the keys of all rows, with None where one is not given.
    given = {key: value for key, value in constraint.items() if value is not None and key != "type"}
    expected = {key: hint for key, hint in kind.arguments.items() if key != "prompt"}
    for change, keys in (
        ("Add", expected.keys() - given.keys()),
        ("Remove", given.keys() - expected.keys()),
    ):
        if keys:
            raise ConstraintError(
                f"Constraint {name!r}: expected {_listed(expected)}, got {_listed(given)}. "
                f"{change} {_listed(keys)}."
            )
    for key, hint in expected.items():
        if not _is_a(hint, given[key]):
            raise ConstraintError(
                f"Constraint {name!r}: expected {key!r} to be {_DESCRIPTIONS[hint]}, got "
                f"{given[key]!r}. Change it."
            )
    if "prompt" not in kind.arguments:
        return kind, given
    if prompt is None:
        raise ConstraintError(
            f"Constraint {name!r}: expected the prompt's text, got none. Pass it: "
            "check_constraint(constraint, response, prompt)."
        )
    return kind, {**given, "prompt": prompt}


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(repr, names))) or "no arguments"


_DESCRIPTIONS: Mapping[Any, str] = {
    int: "an integer of at least 1",
    str: "a string that is not blank",
    list[str]: "a list of at least one string, none of them blank",
    Letter: "one letter, digit or mark",
    LanguageCode: f"a language's code, one of {', '.join(sorted(LANGUAGES))}",
}


def _is_a(hint: Any, value: object) -> bool:
    match value:
        case bool():  # A subclass of int; `true` in a JSON file is no count.
            return False
        case int():
            return hint is int and value >= 1
        case str() if hint is Letter:
            return len(value) == 1 and not value.isspace()
        case str() if hint is LanguageCode:
            return value in LANGUAGES
        case str():
            return hint is str and bool(value.strip())
        case list() | tuple():
            return hint == list[str] and bool(value) and all(_is_a(str, each) for each in value)
    return False

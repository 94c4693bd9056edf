"""Whether a response satisfies a constraint, and whether the constraint is one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, get_type_hints

from mbrl_text_env.rewards.verifiable.constraints.checkers import (
    CONSTRAINT_TYPES,
    LANGUAGES,
    LanguageCode,
    Letter,
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
            of a wrong type, or the constraint needs the prompt. Raised for an empty response too.

    Example:
        >>> check_constraint({"type": "max_words", "value": 3}, "Short and sweet.")
        True
        >>> check_constraint({"type": "max_words", "value": 3}, " ")
        False
    """
    arguments = checked_arguments(constraint, prompt)
    checker = CONSTRAINT_TYPES[constraint["type"]]
    return bool(response.strip()) and checker(response, **arguments)


def checked_arguments(constraint: Mapping[str, Any], prompt: str | None) -> dict[str, Any]:
    """The arguments that a constraint's checker takes beside the response.

    Raises:
        ConstraintError: See `check_constraint`.
    """
    checker = _checker_of(constraint)
    # Tables (Arrow, pandas) give every row the keys of all rows, with None where one is not given.
    given = {name: value for name, value in constraint.items() if value is not None}
    arguments = {name: value for name, value in given.items() if name != "type"}
    hints = _hints(checker)
    _check_arguments(constraint["type"], hints, arguments)
    if "prompt" not in hints:
        return arguments
    if prompt is None:
        raise ConstraintError(
            f"Constraint {constraint['type']!r}: expected the prompt's text, got none. Pass it: "
            "check_constraint(constraint, response, prompt)."
        )
    return {**arguments, "prompt": prompt}


# Reading annotations takes longer than most checkers.
_hints = lru_cache(maxsize=None)(get_type_hints)


def _checker_of(constraint: Any) -> Callable[..., bool]:
    name = constraint.get("type") if isinstance(constraint, Mapping) else None
    if not isinstance(name, str):
        raise ConstraintError(
            f"Expected a constraint such as {{'type': 'max_words', 'value': 50}}, got "
            f"{constraint!r}. Make it an object whose 'type' is a string."
        )
    if name not in CONSTRAINT_TYPES:
        near = difflib.get_close_matches(name, CONSTRAINT_TYPES)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ConstraintError(
            f"Expected a known constraint type, got {name!r}. {hint}Change it to one of: "
            f"{', '.join(sorted(CONSTRAINT_TYPES))}."
        )
    return CONSTRAINT_TYPES[name]


def _check_arguments(
    name: str, hints: Mapping[str, object], arguments: Mapping[str, object]
) -> None:
    given_by_us = ("response", "prompt", "return")
    expected = {key: hint for key, hint in hints.items() if key not in given_by_us}
    for change, keys in (
        ("Add", expected.keys() - arguments.keys()),
        ("Remove", arguments.keys() - expected.keys()),
    ):
        if keys:
            raise ConstraintError(
                f"Constraint {name!r}: expected {_listed(expected) or 'no arguments'}, got "
                f"{_listed(arguments) or 'no arguments'}. {change} {_listed(keys)}."
            )
    for key, hint in expected.items():
        description, accepts = _ARGUMENT_KINDS[hint]
        if not accepts(arguments[key]):
            raise ConstraintError(
                f"Constraint {name!r}: expected {key!r} to be {description}, got "
                f"{arguments[key]!r}. Change it to {description}."
            )


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(repr, names)))


def _is_count(value: object) -> bool:
    # bool is a subclass of int, and `true` in a JSON file is no count.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_text, value))


def _is_letter(value: object) -> bool:
    return isinstance(value, str) and len(value) == 1 and not value.isspace()


def _is_language(value: object) -> bool:
    return isinstance(value, str) and value in LANGUAGES


_ARGUMENT_KINDS: Mapping[Any, tuple[str, Callable[[object], bool]]] = {
    int: ("an integer of at least 1", _is_count),
    str: ("a string that is not blank", _is_text),
    list[str]: ("a list of at least one string, none of them blank", _is_texts),
    Letter: ("one letter, digit or mark", _is_letter),
    LanguageCode: (f"a language's code, one of {', '.join(sorted(LANGUAGES))}", _is_language),
}

"""Constraints that a program can check, and the share of them that a response satisfies.

A constraint is a JSON object with a `type` and the arguments of that type:

    {"type": "max_words", "value": 50}
    {"type": "keyword_count", "keyword": "river", "value": 2}
    {"type": "no_commas"}

An empty response (nothing but white space) satisfies no constraint, whatever its type. It has no
commas and few words, and a language model would otherwise be rewarded for saying nothing.
"""

# ruff: noqa: RUF001 - the commas, quotation marks and full stops of other scripts are meant.

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mbrl_text_env.types import Prompt

_COMMAS = frozenset(",，、،")
_DOUBLE_QUOTES = {'"': '"', "“": "”"}

_ABBREVIATION = re.compile(r"\b(mr|mrs|ms|dr|prof|vs|e\.g|i\.e|p\.s)\.", re.IGNORECASE)
_BULLET = re.compile(r"^[ \t]*[-*] +\S", re.MULTILINE)
_LIST_NUMBER = re.compile(r"^[ \t]*\d+[.)][ \t]", re.MULTILINE)
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
_PLACEHOLDER = re.compile(r"\[([^\[\]\n]+)\]")
_POSTSCRIPT = re.compile(r"^[ \t]*P\.S\.", re.MULTILINE)
# Runs of marks are matched from their first mark only: small models like to end in thousands of
# dots, and trying a match at each of them would take quadratic time.
_SENTENCE_END = re.compile(
    r"""(?<![.!?…])[.!?…]+["'”’»)\]*_]*(?:\s+|$)|[。！？]+[”’」』）]*|\n\s*\n"""
)
_TITLE = re.compile(r"<<([^<>\n]+)>>")


class ConstraintError(ValueError):
    """A constraint has an unknown type or wrong arguments, or a prompt has no constraints."""


def max_words(response: str, value: int) -> bool:
    """At most `value` words; see `min_words`."""
    return _count_words(response) <= value


def min_words(response: str, value: int) -> bool:
    """At least `value` words: runs without white space that have a letter or a digit in them."""
    return _count_words(response) >= value


def num_sentences(response: str, value: int) -> bool:
    """Exactly `value` sentences.

    A sentence ends at a full stop, question mark, exclamation mark or ellipsis that is followed by
    white space, at their Chinese and Japanese forms, at a blank line and at the end. Numbers of a
    list, titles such as "Dr." and marks without any words do not count. Speech that ends in a mark
    of its own ('"Stop!" she said.') does.
    """
    return _count_sentences(response) == value


def max_sentences(response: str, value: int) -> bool:
    """At most `value` sentences; see `num_sentences`."""
    return _count_sentences(response) <= value


def num_paragraphs(response: str, value: int) -> bool:
    """Exactly `value` paragraphs, separated by one or more blank lines."""
    return len(_PARAGRAPH_BREAK.split(response.strip())) == value


def num_bullets(response: str, value: int) -> bool:
    """Exactly `value` lines that start with "- " or "* " and go on; indentation is ignored."""
    return len(_BULLET.findall(response)) == value


def keywords(response: str, value: list[str]) -> bool:
    """Every word or phrase of `value` occurs as whole words, in any case."""
    return all(_count_occurrences(word, response) for word in value)


def keyword_count(response: str, keyword: str, value: int) -> bool:
    """`keyword` occurs at least `value` times as a whole word, in any case."""
    return _count_occurrences(keyword, response) >= value


def forbidden_words(response: str, value: list[str]) -> bool:
    """No word or phrase of `value` occurs as whole words, in any case."""
    return not any(_count_occurrences(word, response) for word in value)


def no_commas(response: str) -> bool:
    """No comma, nor its Arabic, Chinese or Japanese form."""
    return _COMMAS.isdisjoint(response)


def lowercase(response: str) -> bool:
    """There are letters that have a case, and all of them are small."""
    return response.islower()


def uppercase(response: str) -> bool:
    """There are letters that have a case, and all of them are capitals."""
    return response.isupper()


def starts_with(response: str, value: str) -> bool:
    """The first characters are `value`, in this case; white space around either is ignored."""
    return _normal(response).startswith(_normal(value))


def ends_with(response: str, value: str) -> bool:
    """The last characters are `value`, in this case; white space around either is ignored."""
    return _normal(response).endswith(_normal(value))


def quoted(response: str) -> bool:
    """The first and last characters are double quotation marks, straight or curly, around text.

    Further quotation marks between them are allowed, for a quotation may have speech in it.
    """
    text = response.strip()
    return (
        bool(text[1:-1].strip())
        and text[0] in _DOUBLE_QUOTES
        and text[-1] == _DOUBLE_QUOTES[text[0]]
    )


def title(response: str) -> bool:
    """There is a title in <<double angle brackets>>, on one line and not blank."""
    return any(text.strip() for text in _TITLE.findall(response))


def postscript(response: str) -> bool:
    """There is a line that starts with "P.S."; indentation is ignored."""
    return _POSTSCRIPT.search(response) is not None


def placeholders(response: str, value: int) -> bool:
    """At least `value` [bracketed] placeholders, not blank; repeated ones count each time."""
    return sum(bool(text.strip()) for text in _PLACEHOLDER.findall(response)) >= value


def json_object(response: str) -> bool:
    """The whole response is a JSON object, without a code fence or other text around it."""
    try:
        return isinstance(json.loads(response, parse_constant=_reject_constant), dict)
    except (ValueError, RecursionError):
        # Thousands of opening brackets, a usual way for a small model to fail, end in the latter.
        return False


CONSTRAINT_TYPES: Mapping[str, Callable[..., bool]] = {
    function.__name__: function
    for function in (
        max_words,
        min_words,
        num_sentences,
        max_sentences,
        num_paragraphs,
        num_bullets,
        keywords,
        keyword_count,
        forbidden_words,
        no_commas,
        lowercase,
        uppercase,
        starts_with,
        ends_with,
        quoted,
        title,
        postscript,
        placeholders,
        json_object,
    )
}
"""The checkers by the name of their constraint, called as `checker(response, **arguments)`.

They expect a response that is not empty and arguments of the right type: call them through
`check_constraint`, which sees to both.
"""


def check_constraint(constraint: Mapping[str, Any], response: str) -> bool:
    """Whether a response satisfies a constraint; an empty response satisfies none.

    Args:
        constraint: `{"type": name, ...arguments}`, the name being one of `CONSTRAINT_TYPES`.
        response: The response's text.

    Raises:
        ConstraintError: The constraint's type is unknown, or an argument is missing, superfluous or
            of a wrong type. Raised for an empty response too.

    Example:
        >>> check_constraint({"type": "max_words", "value": 3}, "Short and sweet.")
        True
        >>> check_constraint({"type": "max_words", "value": 3}, " ")
        False
    """
    checker = _checker_of(constraint)
    arguments = {name: value for name, value in constraint.items() if name != "type"}
    _check_arguments(constraint["type"], checker, arguments)
    return bool(response.strip()) and checker(response, **arguments)


class ConstraintsReward:
    """Scores a response by the fraction of its prompt's constraints that it satisfies.

    The constraints are read from `prompt.metadata["constraints"]`, a list. Scores lie in [0, 1].

    Example:
        >>> from mbrl_text_env.types import Prompt
        >>> constraints = [{"type": "lowercase"}, {"type": "max_words", "value": 2}]
        >>> prompt = Prompt.from_text("Greet me.", metadata={"constraints": constraints})
        >>> ConstraintsReward().score([prompt, prompt], ["good day", "Good day"])
        array([1. , 0.5])
    """

    name = "constraints"

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt has constraints."""
        return bool(prompt.metadata.get("constraints"))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return float64[B], the fraction of constraints that each response satisfies.

        Args:
            prompts: B prompts, each with constraints.
            responses: B responses, `responses[i]` being an answer to `prompts[i]`.

        Raises:
            ConstraintError: A prompt has no constraints or a malformed one; the message names it.
            ValueError: The numbers of prompts and responses differ.
        """
        if len(prompts) != len(responses):
            raise ValueError(
                f"Expected one prompt a response, got {len(prompts)} prompts and "
                f"{len(responses)} responses. Repeat a prompt for each of its responses."
            )
        fractions = [_fraction(*pair) for pair in zip(prompts, responses, strict=True)]
        return np.array(fractions, dtype=np.float64)


def _fraction(prompt: Prompt, response: str) -> float:
    constraints = prompt.metadata.get("constraints")
    if not isinstance(constraints, list | tuple) or not constraints:
        raise ConstraintError(
            f"Prompt {prompt.id!r}: expected metadata['constraints'] to be a list of at least one "
            f"constraint, got {constraints!r}. Add constraints, or leave out the prompts for which "
            "`ConstraintsReward.applies_to(prompt)` is False."
        )
    try:
        return sum(check_constraint(each, response) for each in constraints) / len(constraints)
    except ConstraintError as error:
        raise ConstraintError(f"Prompt {prompt.id!r}: {error}") from error


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
    name: str, checker: Callable[..., bool], arguments: Mapping[str, object]
) -> None:
    hints = get_type_hints(checker)
    expected = {key: hint for key, hint in hints.items() if key not in ("response", "return")}
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


_ARGUMENT_KINDS: Mapping[Any, tuple[str, Callable[[object], bool]]] = {
    int: ("an integer of at least 1", _is_count),
    str: ("a string that is not blank", _is_text),
    list[str]: ("a list of at least one string, none of them blank", _is_texts),
}


def _normal(text: str) -> str:
    # An accented letter may be one code point or two that look the same.
    return unicodedata.normalize("NFC", text).strip()


def _count_words(text: str) -> int:
    return sum(_has_word(token) for token in text.split())


def _has_word(text: str) -> bool:
    return any(map(str.isalnum, text))


def _count_sentences(text: str) -> int:
    plain = _ABBREVIATION.sub(r"\1", _LIST_NUMBER.sub("", text))
    return sum(_has_word(part) for part in _SENTENCE_END.split(plain))


def _count_occurrences(phrase: str, text: str) -> int:
    words = map(re.escape, _normal(phrase).casefold().split())
    pattern = r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)"
    return len(re.findall(pattern, _normal(text).casefold()))


def _reject_constant(name: str) -> NoReturn:
    # Python reads NaN and Infinity, which JSON does not have.
    raise ValueError(f"{name} is not JSON.")

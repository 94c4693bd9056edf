"""Whether the beginning of a response already decides what becomes of a constraint.

Each rule is sound: True or False means that every continuation comes out so. None means that
continuations differ, or that the rule does not see that they do not; the latter is so for words
whose last letters could still be changed by a combining accent, where nothing of ASCII follows.
"""

# ruff: noqa: RUF001 - the marks of other scripts are meant.

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mbrl_text_env.files import refuse_constant
from mbrl_text_env.rewards.verifiable.constraints.checkers import (
    COMMAS,
    DOUBLE_QUOTES,
    RESPONSE_SPLITTER,
    placeholders,
    postscript,
    title,
)
from mbrl_text_env.rewards.verifiable.constraints.checking import checked_arguments
from mbrl_text_env.rewards.verifiable.constraints.counting import (
    bare_words,
    count_bullets,
    count_capital_words,
    count_highlights,
    count_letter,
    count_occurrences,
    count_paragraphs,
    count_sections,
    count_words,
    is_of_marks,
    list_numbers,
    normal,
    paragraphs_of,
    without_open_rule,
    words_of,
)
from mbrl_text_env.rewards.verifiable.constraints.sentences import count_sentences

Verdict = bool | None

# Like ASCII's, they do not merge with an accent after them.
_WIDE_MARKS = frozenset("\u3000。，、！？；：")
_JSON_SPACE = " \t\n\r"
_JSON = json.JSONDecoder(parse_constant=refuse_constant)


def prefix_verdict(
    constraint: Mapping[str, Any], prefix: str, prompt: str | None = None
) -> Verdict:
    """Whether a response that begins with `prefix` satisfies a constraint, however it goes on.

    Args:
        constraint: As for `check_constraint`.
        prefix: The response so far; it may end anywhere.
        prompt: The prompt's text, which `repeats_prompt` needs.

    Returns:
        True or False if `check_constraint` returns that for `prefix` and every longer response,
        None if that is open (or not known, see the module). An empty prefix decides nothing.

    Raises:
        ConstraintError: As `check_constraint`.

    Example:
        >>> prefix_verdict({"type": "no_commas"}, "Well, ")
        False
        >>> prefix_verdict({"type": "keywords", "value": ["river"]}, "The river")  # "rivers"?
        >>> prefix_verdict({"type": "keywords", "value": ["river"]}, "The river ")
        True
    """
    arguments = checked_arguments(constraint, prompt)
    return PREFIX_RULES[constraint["type"]](prefix, **arguments) if prefix.strip() else None


def _at_least(count: int, value: int) -> Verdict:
    return True if count >= value else None


def _at_most(count: int, value: int) -> Verdict:
    return False if count > value else None


def _settled_words(prefix: str) -> str:
    """The prefix up to its last white space: words in it are complete."""
    for end in range(len(prefix), 0, -1):
        if prefix[end - 1].isspace():
            return prefix[:end]
    return ""


def _settled_text(prefix: str) -> str:
    """The prefix before its last ASCII character.

    ASCII characters do not merge with what is before them, so this much of the composed form stays.
    """
    for end in range(len(prefix) - 1, -1, -1):
        if prefix[end].isascii():
            return prefix[:end]
    return ""


def _settled_phrases(prefix: str) -> str:
    """The prefix before its last mark or space that nothing after it changes.

    Phrases in it are complete, and what follows is no part of their last words.
    """
    for end in range(len(prefix) - 1, -1, -1):
        character = prefix[end]
        is_letter = character.isalnum() or character == "_"
        if (character.isascii() and not is_letter) or character in _WIDE_MARKS:
            return prefix[:end]
    return ""


def _occurrences(prefix: str, keyword: str) -> int:
    return count_occurrences(keyword, _settled_phrases(prefix))


def _sentences(prefix: str) -> int:
    # "2" may become the number of a list, and "p.s" an abbreviation, while no space follows; and
    # whether "U.S." ends a sentence depends on the next word alone.
    return count_sentences(_settled_words(prefix))


def _keywords(prefix: str, value: list[str]) -> Verdict:
    return True if all(_occurrences(prefix, word) for word in value) else None


def _forbidden_words(prefix: str, value: list[str]) -> Verdict:
    return False if any(_occurrences(prefix, word) for word in value) else None


def _starts_with(prefix: str, value: str) -> Verdict:
    # With something after it, so that its own white space stays.
    begun = normal(f"{_settled_text(prefix)}.")[:-1]
    wanted = normal(value)
    if begun.startswith(wanted):
        return True
    return None if wanted.startswith(begun) else False


def _json_object(prefix: str) -> Verdict:
    text = prefix.lstrip(_JSON_SPACE)
    if text and not text.startswith("{"):
        return False
    try:
        _, end = _JSON.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return False if text[end:].strip(_JSON_SPACE) else None


def _numbered_list(prefix: str, value: int) -> Verdict:
    numbers = list_numbers(prefix)
    return None if numbers == list(range(1, value + 1))[: len(numbers)] else False


def _repeats_prompt(prefix: str, prompt: str) -> Verdict:
    asked, given = words_of(prompt), words_of(_settled_words(prefix))
    if given[: len(asked)] != asked[: len(given)]:
        return False
    # A word has begun after the last one that was asked for, if not ended.
    return True if len(given) >= len(asked) and len(prefix.split()) > len(asked) else None


def _two_responses(prefix: str) -> Verdict:
    *ended, last = (part.strip() for part in prefix.split(RESPONSE_SPLITTER))
    texts = [part for part in ended if part]
    # Marks at the end may become the next splitter.
    begun = [*texts, last.rstrip("*").strip()] if last.rstrip("*").strip() else texts
    if not all(ended[1:]) or len(begun) > 2 or (len(texts) == 2 and texts[0] == texts[1]):
        return False
    return None


def _paragraph_first_word(prefix: str, index: int, value: str) -> Verdict:
    paragraphs = paragraphs_of(prefix.lstrip())
    if index > len(paragraphs):
        return None
    paragraph, ended = paragraphs[index - 1], index < len(paragraphs)
    begun = paragraph if ended else _settled_words(paragraph)
    if is_of_marks(begun) and not ended:
        return None
    return bare_words(begun)[:1] == bare_words(value)[:1]


def _one_of(prefix: str, value: list[str]) -> Verdict:
    settled = _settled_words(prefix)
    if is_of_marks(settled):
        return None
    begun = bare_words(settled)
    return None if any(bare_words(option)[: len(begun)] == begun for option in value) else False


def _quoted(prefix: str) -> Verdict:
    return None if prefix.lstrip()[0] in DOUBLE_QUOTES else False


def _open(prefix: str, **arguments: Any) -> Verdict:
    """Nothing is decided before the end."""
    return None


PREFIX_RULES: Mapping[str, Callable[..., Verdict]] = {
    "max_words": lambda p, value: _at_most(count_words(p), value),
    "min_words": lambda p, value: _at_least(count_words(p), value),
    "num_sentences": lambda p, value: _at_most(_sentences(p), value),
    "max_sentences": lambda p, value: _at_most(_sentences(p), value),
    "min_sentences": lambda p, value: _at_least(_sentences(p), value),
    "num_paragraphs": lambda p, value: _at_most(count_paragraphs(p), value),
    "max_paragraphs": lambda p, value: _at_most(count_paragraphs(p), value),
    "min_paragraphs": lambda p, value: _at_least(count_paragraphs(p), value),
    "num_bullets": lambda p, value: _at_most(count_bullets(without_open_rule(p)), value),
    "numbered_list": _numbered_list,
    "keywords": _keywords,
    "keyword_count": lambda p, keyword, value: _at_least(_occurrences(p, keyword), value),
    "max_keyword_count": lambda p, keyword, value: _at_most(_occurrences(p, keyword), value),
    "exact_keyword_count": lambda p, keyword, value: _at_most(_occurrences(p, keyword), value),
    "forbidden_words": _forbidden_words,
    "min_letter_count": lambda p, letter, value: _at_least(
        count_letter(_settled_text(p), letter), value
    ),
    "max_letter_count": lambda p, letter, value: _at_most(
        count_letter(_settled_text(p), letter), value
    ),
    "min_capital_words": lambda p, value: _at_least(count_capital_words(_settled_words(p)), value),
    "max_capital_words": lambda p, value: _at_most(count_capital_words(_settled_words(p)), value),
    "no_commas": lambda p: None if COMMAS.isdisjoint(p) else False,
    # One small letter before it, and it is lowercase unless there is a capital in it.
    "lowercase": lambda p: None if f"a{p}".islower() else False,
    "uppercase": lambda p: None if f"A{p}".isupper() else False,
    "starts_with": _starts_with,
    "ends_with": _open,
    "quoted": _quoted,
    "title": lambda p: title(p) or None,
    "postscript": lambda p: postscript(p) or None,
    "placeholders": lambda p, value: placeholders(p, value) or None,
    "highlights": lambda p, value: _at_least(count_highlights(p), value),
    "sections": lambda p, splitter, value: _at_least(count_sections(p, splitter), value),
    "json_object": _json_object,
    "language": _open,
    "repeats_prompt": _repeats_prompt,
    "two_responses": _two_responses,
    "paragraph_first_word": _paragraph_first_word,
    "one_of": _one_of,
}
"""The rule of each type, called as `rule(prefix, **arguments)` with a prefix that is not blank."""

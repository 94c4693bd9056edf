"""A reward for responses that match a regular expression."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from mbrl_text_env._lazy import optional
from mbrl_text_env.rewards.base import RewardError, RowReward, check_finite
from mbrl_text_env.rewards.names import named
from mbrl_text_env.types import Prompt

_ESCAPED = re.compile(r"\\[^A-Za-z0-9]|\\[pPN]\{[^}]*\}")
# Syntax that can fail at the end of a prefix and match in a longer text: lookbehind, negative
# lookahead, atomic groups, possessive repetitions, conditions, recursion, fuzzy matching, some
# flags and escapes, and \b in a set, where it is a character.
_UNBOUNDED = re.compile(
    r"\(\?(?!:|=|P?<[A-Za-z_]|P=|[isxau]+(?:-[isx]+)?[:)])|\(\*|[*+?}]\+|\\[GgKLmMRX]"
    r"|\{(?!\d*,?\d*\})|\[\^?\]?[^\]]*\\[bB]"
)
_REFERENCE = re.compile(r"\\[1-9]|\(\?P=")


@named("regex")
@dataclass(eq=False)
class RegexReward(RowReward):
    r"""1 if the response matches a regular expression, otherwise 0.

    The whole response must match, except for surrounding white space. A blank response scores 0
    with every pattern. The syntax is that of the package `regex` in its compatible mode: Python's,
    with additions such as `\p{L}`. To search, use `(?s).*word.*`.

    A pattern such as `(a+)+$` can take exponential time. A match that takes longer than `seconds`
    is an error, not a score of 0, because the pattern is at fault, and because scores must not
    depend on how busy the machine is.

    `bound` is 0 if no text with the prefix can match, according to the partial matching of `regex`.
    It is always 1 if partial matching cannot tell: for patterns with lookbehind, negative
    lookahead, atomic groups, possessive repetitions, conditions, recursion, fuzzy matching, a
    lookahead together with a group reference, or inline flags other than `isxau`; and for patterns
    of which a partial match has taken longer than `seconds`.

    Args:
        pattern: The pattern; None to read `prompt.metadata["pattern"]`.
        seconds: Wall-clock time limit per match.

    Raises:
        RewardError: The pattern does not compile. Also when scoring, if a prompt has no pattern or
            the match takes too long; the message names the prompt.

    Example:
        >>> prompt = Prompt.from_text("Name a date.", "date")
        >>> RegexReward(r"\d{4}-\d\d-\d\d").score([prompt] * 2, ["2024-02-29", "On 2024-02-29"])
        array([1., 0.])
    """

    name = "regex"
    is_verifier = True

    pattern: str | None = None
    _: KW_ONLY
    seconds: float = 1.0
    _slow: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        check_finite(self, "seconds", above=0)
        if self.pattern is not None:
            _compiled(self.pattern, f"Reward model {self.name!r}")

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether there is a pattern, in the constructor or the prompt."""
        return self.pattern is not None or isinstance(prompt.metadata.get("pattern"), str)

    def _bound(self, prompt: Prompt, prefix: str) -> float:
        given = self._given(prompt)
        matches = self._matcher(given, prompt)
        # Check that partial matching rejects only prefixes that no longer text can match.
        plain = _ESCAPED.sub("_", given)
        looks_ahead = "(?=" in plain and _REFERENCE.search(plain) is not None
        if given in self._slow or looks_ahead or _UNBOUNDED.search(plain):
            return 1.0
        # A word can end, or continue, at the end of the prefix.
        open_ended = re.sub(r"(?<!\\)((?:\\\\)*)(\\[bB])", r"\1(?:\2|\\Z)", given)
        begins = self._matcher(open_ended, prompt)
        try:
            found = matches(prefix.strip(), timeout=self.seconds) or begins(
                prefix.lstrip(), partial=True, timeout=self.seconds
            )
            return float(found is not None)
        except TimeoutError:
            self._slow.add(given)
            return 1.0

    def _given(self, prompt: Prompt) -> Any:
        return prompt.metadata.get("pattern") if self.pattern is None else self.pattern

    def _matcher(self, pattern: Any, prompt: Prompt) -> Any:
        return _compiled(pattern, f"Reward model {self.name!r}, prompt {prompt.id!r}").fullmatch

    def _score(self, prompt: Prompt, response: str) -> float:
        given, text = self._given(prompt), response.strip()
        matcher = self._matcher(given, prompt)
        try:
            return float(bool(text) and matcher(text, timeout=self.seconds) is not None)
        except TimeoutError as error:
            raise RewardError(
                f"Reward model {self.name!r}, prompt {prompt.id!r}: expected the pattern {given!r} "
                f"to be matched within {self.seconds:g} s, got no result for response "
                f"{response[:80]!r}. Rewrite nested repetitions, such as (a+)+ as a+, or make "
                "their alternatives mutually exclusive."
            ) from error


def _compiled(pattern: Any, context: str) -> Any:
    if not isinstance(pattern, str):
        raise RewardError(
            f"{context}: expected a regular expression, a string, got {pattern!r}. Pass "
            "RegexReward(pattern), or set metadata['pattern']."
        )
    regex = optional("regex", RewardError)
    try:
        # The package caches compiled patterns.
        return regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        raise RewardError(
            f"{context}: expected a regular expression, got {pattern!r} ({error}). Correct it; "
            "escape special characters such as ( and * with a backslash."
        ) from error

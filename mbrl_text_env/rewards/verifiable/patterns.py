"""Responses that match a regular expression."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from mbrl_text_env._lazy import optional
from mbrl_text_env.rewards.base import RewardError, RowReward, check_finite
from mbrl_text_env.rewards.names import named
from mbrl_text_env.types import Prompt

_ESCAPED = re.compile(r"\\[^A-Za-z0-9]|\\[pPN]\{[^}]*\}")
# What may fail at the end of a prefix and hold in a longer text: lookbehind, negative lookahead,
# atomic groups and possessive repetitions, conditions, recursion, fuzzy matching, flags and escapes
# with such a meaning, and \b in a set, where it is another character.
_UNBOUNDED = re.compile(
    r"\(\?(?!:|=|P?<[A-Za-z_]|P=|[isxau]+(?:-[isx]+)?[:)])|\(\*|[*+?}]\+|\\[GgKLmMRX]"
    r"|\{(?!\d*,?\d*\})|\[\^?\]?[^\]]*\\[bB]"
)
_REFERENCE = re.compile(r"\\[1-9]|\(\?P=")


@named("regex")
@dataclass(eq=False)
class RegexReward(RowReward):
    r"""1 if the response matches a regular expression, else 0.

    The whole response has to match, but for white space around it, and a response of nothing else
    scores 0, whatever the pattern. The syntax is that of the package `regex` in its compatible
    mode, Python's own with additions such as `\p{L}` (`(?s).*word.*` searches).

    A pattern such as `(a+)+$` can take exponential time. A match that takes longer than `seconds`
    is an error and no 0: the pattern is at fault, and a 0 would fall upon whatever responses a busy
    machine was slow with.

    `bound` is 0 where no text that begins so can match, by the partial matching of `regex`. It is 1
    throughout for what that cannot tell: patterns with lookbehind, negative lookahead, atomic
    groups, possessive repetitions, conditions, recursion, fuzzy matching, a lookahead beside a
    reference to a group, or inline flags other than `isxau`; and patterns of which a partial match
    once took longer than `seconds`.

    Args:
        pattern: The pattern; None to read `prompt.metadata["pattern"]`.
        seconds: Wall-clock time that one match may take.

    Raises:
        RewardError: The pattern does not compile. When scoring, too: a prompt, which the message
            names, has none, or the match took too long.

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
        """Whether there is a pattern, the constructor's or the prompt's."""
        return self.pattern is not None or isinstance(prompt.metadata.get("pattern"), str)

    def _bound(self, prompt: Prompt, prefix: str) -> float:
        given = self._given(prompt)
        matches = self._matcher(given, prompt)
        # Whether partial matching refuses only what no longer text can match.
        plain = _ESCAPED.sub("_", given)
        looks_ahead = "(?=" in plain and _REFERENCE.search(plain) is not None
        if given in self._slow or looks_ahead or _UNBOUNDED.search(plain):
            return 1.0
        # A word may end, or go on, where a prefix ends.
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
                f"to be matched within {self.seconds:g} s, got no end with response "
                f"{response[:80]!r}. Rewrite repetitions inside repetitions, such as (a+)+ as a+, "
                "or make their branches exclude each other."
            ) from error


def _compiled(pattern: Any, context: str) -> Any:
    if not isinstance(pattern, str):
        raise RewardError(
            f"{context}: expected a regular expression, a string, got {pattern!r}. Pass "
            "RegexReward(pattern), or put it into metadata['pattern']."
        )
    regex = optional("regex", RewardError)
    try:
        # The package keeps what it has compiled.
        return regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        raise RewardError(
            f"{context}: expected a regular expression, got {pattern!r} ({error}). Correct it; "
            "write signs with a meaning, such as ( and *, with a backslash before them."
        ) from error

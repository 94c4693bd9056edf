"""Responses that match a regular expression."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, get_args

from mbrl_text_env._lazy import optional
from mbrl_text_env.rewards.base import RewardError, RowReward
from mbrl_text_env.rewards.names import named
from mbrl_text_env.types import Prompt

Match = Literal["full", "search"]
"""Whether the whole response has to match, or a part of it."""

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

    White space around the response is ignored, and a response of nothing else scores 0, whatever
    the pattern. The syntax is that of the package `regex` in its compatible mode, Python's own with
    additions such as `\p{L}`.

    A pattern such as `(a+)+$` can take exponential time. A match that takes longer than `seconds`
    is an error and no 0: the pattern is at fault, and a 0 would fall upon whatever responses a busy
    machine was slow with.

    `bound` is 0 where no text that begins so can match, by the partial matching of `regex`. It is 1
    throughout for what that cannot tell: patterns with lookbehind, negative lookahead, atomic
    groups, possessive repetitions, conditions, recursion, fuzzy matching, a lookahead beside a
    reference to a group, or inline flags other than `isxau`; a search with the flag `m`; and
    patterns of which a partial match once took longer than `seconds`.

    Args:
        pattern: The pattern; None to read `prompt.metadata["pattern"]`.
        match: `"full"` for the whole response, `"search"` for any part of it.
        flags: Letters as in `(?ims)`: `i` ignore case, `m` `^` and `$` match at lines, `s` a dot
            matches line breaks too, `x` verbose.
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
    match: Match = "full"
    flags: str = ""
    seconds: float = 1.0
    _slow: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.match not in get_args(Match):
            raise ValueError(f"match: expected 'full' or 'search', got {self.match!r}.")
        if not set(self.flags) <= set("imsx"):
            raise ValueError(f"flags: expected letters of 'imsx', got {self.flags!r}.")
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds: expected a positive number, got {self.seconds!r}.")
        if self.pattern is not None:
            _compiled(self.pattern, self.flags, f"Reward model {self.name!r}")

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether there is a pattern, the constructor's or the prompt's."""
        return self.pattern is not None or isinstance(prompt.metadata.get("pattern"), str)

    def _bound(self, prompt: Prompt, prefix: str) -> float:
        given = self._given(prompt)
        matches = self._matcher(given, prompt)
        if given in self._slow or not self._has_bound(given):
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

    def _has_bound(self, pattern: str) -> bool:
        """Whether partial matching refuses only what no longer text can match."""
        plain = _ESCAPED.sub("_", pattern)
        # A match may begin at a line after the prefix.
        later = self.match == "search" and "m" in self.flags
        looks_ahead = "(?=" in plain and _REFERENCE.search(plain) is not None
        return not later and not looks_ahead and _UNBOUNDED.search(plain) is None

    def _given(self, prompt: Prompt) -> Any:
        return prompt.metadata.get("pattern") if self.pattern is None else self.pattern

    def _matcher(self, pattern: Any, prompt: Prompt) -> Any:
        context = f"Reward model {self.name!r}, prompt {prompt.id!r}"
        compiled = _compiled(pattern, self.flags, context)
        return compiled.fullmatch if self.match == "full" else compiled.search

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


def _compiled(pattern: Any, flags: str, context: str) -> Any:
    if not isinstance(pattern, str):
        raise RewardError(
            f"{context}: expected a regular expression, a string, got {pattern!r}. Pass "
            "RegexReward(pattern), or put it into metadata['pattern']."
        )
    regex = optional("regex", RewardError)
    try:
        # The package keeps what it has compiled.
        return regex.compile(f"(?{flags}){pattern}" if flags else pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        raise RewardError(
            f"{context}: expected a regular expression, got {pattern!r} ({error}). Correct it; "
            "write signs with a meaning, such as ( and *, with a backslash before them."
        ) from error

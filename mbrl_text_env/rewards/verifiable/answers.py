r"""Rewards that compare the response's answer with a reference answer, as text or as a number.

These rewards and `mathematics.MathReward` read `prompt.metadata["reference_answer"]`, one answer or
a list of accepted answers. The argument `extract` says how to find the answer in a response:

| `extract`        | The answer                                                                 |
|------------------|----------------------------------------------------------------------------|
| None             | the whole response                                                         |
| `"last line"`    | the last line that is not blank                                            |
| `"<answer>"`     | the text between the last `<answer>` and `</answer>` (any such tag)        |
| `"\boxed"`       | the text in the braces of the last `\boxed{...}` (any such command)        |
| other text       | the rest of the line after its last occurrence (case is ignored), or the   |
|                  | next line that is not blank, if the rest is blank: "####", "Answer:"       |

Emphasis around such a text ("**Answer:** 42") is not part of the answer. A response without such a
text has no answer and scores 0, like an empty response.

Between digits, a comma before a group of three digits separates thousands; other commas are
decimal. A point is decimal if possible. See the table in docs/rewards.md.
"""

# ruff: noqa: RUF001 - characters of other scripts are intended.

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import Any

from mbrl_text_env._lazy import optional
from mbrl_text_env.rewards.base import RewardError, RowReward, check_finite
from mbrl_text_env.rewards.names import named
from mbrl_text_env.types import Prompt

CURRENCIES = "$€£¥₹₽₩₪₫฿₺₴"
EMPHASIS = re.compile(r"(\*\*\*|\*\*|\*|___|__|_|`)(?=\S)(.*\S)\1", re.DOTALL)
_LATEX_FRACTION = re.compile(
    r"(\d)?\s*\\[dtc]?frac\s*(?:\{\s*([+-]?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))"
)
_NUMBER = re.compile(
    r"""
    (?<![\w.^])(?<!\^\{)(?<![\w)}\]]\*\*)(?P<sign>(?<![\d)]\ )[-+]|[-+](?!\ ))?[$€£¥₹₽₩₪₫฿₺₴]?\ ?
    (?P<integer>[1-9]\d{0,2}(?:,\d{3})+(?!\d)|[1-9]\d{0,2}(?:\ \d{3}){2,}(?!\d)|\d+|(?=\.\d))
    (?:
        \ ?/\ ?(?P<denominator>\d+)(?!\d|\.\d)
        |
        (?P<decimals>\.\d+)?
        (?:
            (?:[eE]|\ ?(?:\\times|\\cdot|[x*\u00b7\u00d7])\ ?10(?:\^|\*\*)\{?)
            (?P<exponent>[-+]?\d+)\}?
            |
            (?:\^|\*\*)\{?(?P<power>[-+]?\d+)\}?
        )?
    )
    (?:\ ?\\?(?P<percent>%|per\ ?cent\b))?
    """,
    re.VERBOSE,
)
_ITEM = re.compile(r"-\s+(\S+)")
_CHOICE = re.compile(r"[A-Za-z]")
# All characters that `_CHOICE` matches if case is ignored.
_LETTERS = string.ascii_letters + "İıſ\u212a"
_CHOICE_MARKS = r"[\s()\[\]{}<>*_`$\"'“”‘’［］（）.:,]*"
_CHOICE_LABEL = (
    r"(?:the\s+)?(?:(?:correct|final|best|right)\s+)?(?:answer|option|choice)"
    r"(?:\s+is)?(?:\s+(?:option|choice))?(?=[\s:*(])"
)
_CHOSEN = re.compile(
    rf"{_CHOICE_MARKS}(?:{_CHOICE_LABEL}{_CHOICE_MARKS})?"
    rf"(?:\\(?:text|mathrm|textbf|mathbf|boxed)\s*{_CHOICE_MARKS}){{0,3}}(?<!\w)([A-Za-z])(?!\w)"
    rf"(?:{_CHOICE_MARKS}|[\s*_}}]*[).:\]）］–—-]+[\s*_}}\\]+(.+))",
    re.IGNORECASE | re.DOTALL,
)
# Text after a chosen letter that revokes it or names another letter.
_NOT_CHOSEN = re.compile(
    r"\b[A-Z]\b|\b[a-z]\)|\b(?:not|or|and\s+[a-z]|wrong|incorrect|false|isn't|either)\b"
)
# Longer numbers are not answers, and reading them takes quadratic time.
_MAX_DIGITS = 1000


@dataclass(eq=False)
class AnswerReward(RowReward):
    """Base class of rewards that score the answer in a response, found with `extract`.

    The bound is always 1, because a later answer in the response replaces an earlier one.
    """

    extract: str | None = None

    def __post_init__(self) -> None:
        if self.extract is not None and not (
            isinstance(self.extract, str) and self.extract.strip()
        ):
            raise ValueError(
                "extract: expected None for the whole response, 'last line', a tag such as "
                rf"'<answer>', '\boxed', or a marker such as '####', got {self.extract!r}."
            )

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether `prompt.metadata["reference_answer"]` can be compared with."""
        return _references(prompt) is not None

    def references(self, prompt: Prompt) -> list[str]:
        """Return the accepted answers; raise `RewardError` if there are none."""
        found = _references(prompt)
        if found is None:
            raise self.unusable(prompt, "a non-blank string, a number, or a list of these")
        return found

    def unusable(self, prompt: Prompt, expected: str) -> RewardError:
        """Return the error for a prompt whose reference answer is not as expected."""
        return RewardError(
            f"Reward model {self.name!r}, prompt {prompt.id!r}: expected "
            f"metadata['reference_answer'] to be {expected}, got "
            f"{prompt.metadata.get('reference_answer')!r}. Add the answer, or remove the "
            "prompts that the reward does not apply to."
        )


def _references(prompt: Prompt) -> list[str] | None:
    given = prompt.metadata.get("reference_answer")
    answers = given if isinstance(given, list | tuple) else [given]
    return list(map(str, answers)) if answers and all(map(_is_answer, answers)) else None


def _is_answer(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number or (isinstance(value, str) and bool(value.strip()))


@named("exact-match")
@dataclass(eq=False)
class ExactMatchReward(AnswerReward):
    """1 if the answer is the reference answer, otherwise 0.

    Texts are compared in Unicode's composed form (NFC). Case and surrounding white space are
    ignored, and other white space counts as one space. Markdown emphasis around the whole answer
    ("**Paris**") is ignored if the reference has none. If the reference is one letter (multiple
    choice), brackets, full stops, a label and the text of the choice are ignored too: "(B)",
    "Option B", `\\text{B}` and "B) Paris" count as "B". "B) or C)" does not.

    Without `extract`, `bound` is 0 if no reference answer starts with the prefix. Only the prefix
    before its first non-ASCII character is compared.

    Args:
        extract: How to find the answer in the response; see the module.

    Raises:
        RewardError: When scoring, if a prompt has no reference answer. The message names it.

    Example:
        >>> prompt = Prompt.from_text("Capital of France?", metadata={"reference_answer": "Paris"})
        >>> ExactMatchReward().score([prompt, prompt], [" paris\\n", "It is Paris."])
        array([1., 0.])
    """

    name = "exact-match"

    def _bound(self, prompt: Prompt, prefix: str) -> float:
        given = self.references(prompt)
        if self.extract is not None or not prefix.strip():
            return 1.0
        text = prefix.lstrip()
        bare = text.rstrip().rstrip(text[0])
        # The text inside one, two or three emphasis marks; some can already be closed.
        inner = [bare[marks:] for marks in (1, 2, 3)] if text[0] in "*_`" else []
        accepted = map(_normal, given)
        if any(_begins(answer, each) for answer in accepted for each in (text, *inner)):
            return 1.0
        return float(_may_choose(text, given))

    def _score(self, prompt: Prompt, response: str) -> float:
        given, answer = self.references(prompt), extract_answer(response, self.extract)
        if answer is None:
            return 0.0
        emphasised, chosen = EMPHASIS.fullmatch(answer), _CHOSEN.fullmatch(answer)
        accepted = set(map(_normal, given))
        if _normal(answer) in accepted or (emphasised and _normal(emphasised[2]) in accepted):
            return 1.0
        if chosen is None or _normal(chosen[1]) not in _choices(given):
            return 0.0
        return float(not _NOT_CHOSEN.search(chosen[2] or ""))


def _normal(text: str) -> str:
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(text.split())


def _choices(given: Sequence[str]) -> set[str]:
    return {_normal(each) for each in given if _CHOICE.fullmatch(each.strip())}


def _begins(accepted: str, text: str) -> bool:
    """Return whether a longer text can have this normal form; only its ASCII start is checked."""
    start = re.match(r"[\x00-\x7f]*", text)
    known = start[0] if start else ""
    # Append a letter, because a space at the end is inside the longer text.
    whole, before = (_normal(f"{each}x")[:-1] for each in (known, known[:-1]))
    if f"{accepted} ".startswith(whole):
        return True
    # A combining mark for the last character can follow.
    return accepted.startswith(before) and not accepted[len(before) :][:1].isascii()


def _may_choose(text: str, given: Sequence[str]) -> bool:
    letters = "".join(letter for letter in _LETTERS if _normal(letter) in _choices(given))
    if not letters:
        return False
    regex = optional("regex", RewardError)
    chosen = _CHOSEN.pattern.replace("([A-Za-z])", f"([{letters}])")
    flags = regex.IGNORECASE | regex.DOTALL
    return regex.fullmatch(chosen, text, flags, partial=True) is not None


@named("numeric")
@dataclass(eq=False)
class NumericReward(AnswerReward):
    r"""1 if the answer's last number is the reference answer, within a tolerance, otherwise 0.

    Supported are integers, decimals, groups of three digits (`1,234,567`), fractions (`3/4`,
    `\frac{3}{4}`), mixed numbers (`1 1/2`), powers (`2^5`, `1.5e-3`, `1.5 \times 10^{-3}`), percent
    (a hundredth), signs and a currency before the number, and Unicode forms of all these (`½`,
    `10³`). The module describes decimal commas. A minus after a letter or digit is not a sign: the
    last number of "5-3" is 3. Numbers are compared exactly, as fractions. Numbers with more than
    1000 digits, or powers of ten beyond 1000, are wrong.

    Args:
        extract: How to find the answer in the response; see the module.
        abs_tol: Absolute tolerance.
        rel_tol: Tolerance relative to the reference answer; the larger of the two applies.

    Raises:
        RewardError: When scoring, if a prompt's reference answer is not a number. It is named.

    Example:
        >>> prompt = Prompt.from_text("6 * 250?", metadata={"reference_answer": "1500"})
        >>> NumericReward().score([prompt] * 3, ["6 * 250 = 1,500.", "1.5e3", "150"])
        array([1., 1., 0.])
    """

    name = "numeric"

    _: KW_ONLY
    abs_tol: float = 0.0
    rel_tol: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self, "abs_tol", "rel_tol", least=0)

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether the prompt's reference answers are numbers."""
        return super().applies_to(prompt) and None not in map(last_number, self.references(prompt))

    def _score(self, prompt: Prompt, response: str) -> float:
        accepted = [last_number(text) for text in self.references(prompt)]
        answer = extract_answer(response, self.extract) or ""
        # "- 73" is a negative number or a list item.
        item = _ITEM.fullmatch(answer)
        values = [last_number(text) for text in (answer, item[1] if item else "")]
        if None in accepted:
            raise self.unusable(prompt, "a number")
        return float(any(self._equal(v, n) for v in values for n in accepted))

    def _equal(self, value: Fraction | None, reference: Fraction | None) -> bool:
        if value is None or reference is None:
            return False
        tolerance = max(Fraction(self.abs_tol), Fraction(self.rel_tol) * abs(reference))
        return abs(value - reference) <= tolerance


# --- Finding the answer ---


def extract_answer(response: str, extract: str | None) -> str | None:
    r"""Return the answer in a response, stripped, or None if there is none.

    Example:
        >>> extract_answer(r"So \boxed{\frac{1}{2}}.", r"\boxed")
        '\\frac{1}{2}'
    """
    if extract is None:
        answer: str | None = response
    elif extract == "last line":
        answer = response.strip().rpartition("\n")[2]
    elif extract.startswith("<"):
        name = extract.strip("<>/ ")
        _, opening, after = response.rpartition(f"<{name}>")
        inside, closing, _ = after.partition(f"</{name}>")
        answer = inside if opening and closing else None
    elif extract.startswith("\\"):
        answer = _in_braces(response, extract)
    else:
        answer = _after(response, extract)
    return (answer or "").strip() or None


def _in_braces(response: str, command: str) -> str | None:
    """Return the text in the balanced braces of the last occurrence of a command."""
    _, found, after = response.rpartition(command.rstrip("{}"))
    after = after.lstrip()
    if not found or not after.startswith("{"):
        # TeX would take one digit of "\\boxed 72", but the whole number is meant.
        bare = re.match(r"[-+]?\d[\d.,]*", after)
        return bare[0].rstrip(".,") if found and bare else None
    depth = 0
    for place, character in enumerate(after):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return after[1:place]
    return None


def _after(response: str, marker: str) -> str | None:
    # Emphasis: "**Answer:** 42", "**Answer**: 42" or "**Answer: 42**".
    stem, colon = (marker[:-1], ":") if marker.endswith(":") else (marker, "")
    pattern = re.compile(rf"([*_]*){re.escape(stem)}[*_]*{colon}([*_]*)", re.IGNORECASE)
    places = list(pattern.finditer(response))
    if not places:
        return None
    answer = response[places[-1].end() :].strip().partition("\n")[0]
    opening, closing = places[-1][1], places[-1][2]
    if answer and not response[places[-1].end()].isspace():
        # In "Answer:**42**", the marks belong to the answer.
        answer, closing = closing + answer, ""
    is_open = opening and not closing and EMPHASIS.fullmatch(answer) is None
    return answer.removesuffix(opening) if is_open else answer


# --- Reading numbers ---


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text, exactly, or None (see `NumericReward`)."""

    def plain_fraction(match: re.Match[str]) -> str:
        return f"{match[1] or ''} {match[2] or match[4]}/{match[3] or match[5]}"

    text = _LATEX_FRACTION.sub(plain_fraction, joined_thousands(plain_numerals(text).strip()))
    matches = list(_NUMBER.finditer(decimal_commas(improper(text))))
    return _value(matches[-1]) if matches else None


def _value(match: re.Match[str]) -> Fraction | None:
    integer, denominator = re.sub(r"\D", "", match["integer"]), match["denominator"]
    decimals = (match["decimals"] or "").lstrip(".")
    exponent, power = match["exponent"] or "0", match["power"] or "1"
    digits = len(integer + decimals + (denominator or ""))
    if digits > _MAX_DIGITS or max(len(exponent), len(power)) > 5:
        return None
    if abs(int(exponent)) > _MAX_DIGITS or (denominator and not int(denominator)):
        return None
    value = Fraction(int(integer + decimals or "0"), int(denominator or 1))
    value *= Fraction(10) ** (int(exponent) - len(decimals))
    if digits * abs(int(power)) > _MAX_DIGITS or (not value and int(power) < 0):
        return None
    value **= int(power)
    value /= 100 if match["percent"] else 1
    return -value if match["sign"] == "-" else value


_SUPERSCRIPT = re.compile("[⁺⁻⁰¹²³⁴-⁹]+")
_MINUS = str.maketrans({"−": "-", "－": "-", "﹣": "-"})
# A dash, "negative" or "minus" before a number, unless it can be a subtraction or a range.
_SIGN = re.compile(
    r"(?:(?<![\w)\]}%])(?<![\d)\]}%]\s)(?<!\b[A-Za-z]\s)–(?=[\d.$€£])|\bnegative\s+(?=[\d.$€£])"
    r"|(?:(?<=^)|(?<=\bis\s)|(?<=\bequals\s)|(?<=[=:]\s)|(?<=[*($]))minus\s+(?=[\d.$€£]))",
    re.IGNORECASE,
)
_SPACES = re.compile(r"(?<=\d)(?:[\u00a0\u2007\u2009\u202f]|\\[,!:; ]|\{,\}|,\\!)(?=\d{3}(?!\d))")
_MIXED = re.compile(r"(?<![\w.,/^{])(-?)(\d{1,9})[ \u00a0](\d{1,9})/(\d{1,9})(?![\d./^]\d|\w)")
_POINTS = re.compile(
    r"(?<![\d.,])[1-9]\d{0,2}(?:\.\d{3})+(?:,\d+|(?<=\.\d{3}\.\d{3}))(?!\d|[.,]\d)"
)
_COMMA = re.compile(r"(?<![\w.,])(?![1-9]\d{0,2},\d{3}(?!\d))(\d+),(\d+)(?!\d|[.,]\d)")


def plain_numerals(text: str) -> str:
    """Replace Unicode minus signs, superscripts, fractions and spaces in numbers with ASCII."""

    def power(match: re.Match[str]) -> str:
        return f"^{{{unicodedata.normalize('NFKC', match[0]).translate(_MINUS)}}}"

    def fraction(match: re.Match[str]) -> str:
        is_mixed = text[match.start() - 1 : match.start()].isdigit()
        return " " * is_mixed + unicodedata.normalize("NFKC", match[0])

    text = _SIGN.sub("-", _SUPERSCRIPT.sub(power, text.translate(_MINUS)))
    # U+2044 is the fraction slash.
    text = re.sub("[¼-¾⅐-⅞↉]", fraction, text).replace("\u2044", "/")
    return _SPACES.sub(",", text)


def improper(text: str, form: str = "{}/{}") -> str:
    """Replace mixed numbers, such as "1 1/2", with fractions."""

    def fraction(match: re.Match[str]) -> str:
        whole, above, below = (int(match[i]) for i in (2, 3, 4))
        if above >= below:
            return match[0]
        return match[1] + form.format(whole * below + above, below)

    return _MIXED.sub(fraction, text)


def decimal_commas(text: str) -> str:
    """Replace commas that can only be decimal with points; see the module."""
    text = _POINTS.sub(lambda match: match[0].replace(".", "").replace(",", "."), text)
    return _COMMA.sub(r"\1.\2", text)


def joined_thousands(text: str) -> str:
    """Remove spaces or apostrophes between the thousands of a text that is a single number."""
    match = re.fullmatch(
        r"([-+]?\D?\s?)([1-9]\d{0,2}(?:(?: \d{3})+|(?:['’]\d{3})+))([.,]\d+)?(\s?\D?)", text
    )
    if match is None:
        return text
    before, digits, decimals, after = match.groups("")
    return before + re.sub(r"\D", "", digits) + decimals + after

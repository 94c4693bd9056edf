r"""Answers that are right or wrong: the same text, the same number.

Both, and `mathematics.MathReward`, read `prompt.metadata["reference_answer"]`, one answer or a list
of accepted ones, and take `extract`, which says where in a response its answer stands:

| `extract`        | The answer                                                                 |
|------------------|----------------------------------------------------------------------------|
| None             | the whole response                                                         |
| `"last line"`    | its last line that is not blank                                            |
| `"<answer>"`     | what stands between the last `<answer>` and `</answer>` (any such tag)     |
| `"\boxed"`       | what stands in the braces of the last `\boxed{...}` (any such command)     |
| other text       | what follows its last occurrence, in any case, to the end of the line, or, |
|                  | if that is blank, on the next line that is not: "####", "Answer:"          |

Emphasis around such a text ("**Answer:** 42") is no part of the answer. A response without such a
place has no answer and scores 0, like an empty one.

Of a comma or point between digits, a group of three digits after a comma is thousands, other commas
are decimal, and a point is decimal where it can be; docs/rewards.md has the table.
"""

# ruff: noqa: RUF001 - the marks, digits and spaces of other scripts are meant.

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
# What that matches where case is ignored.
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
# What follows a chosen letter takes it back, or names another one.
_NOT_CHOSEN = re.compile(
    r"\b[A-Z]\b|\b[a-z]\)|\b(?:not|or|and\s+[a-z]|wrong|incorrect|false|isn't|either)\b"
)
# Numbers of more digits are no answers; reading them takes time that grows with their square.
_MAX_DIGITS = 1000


@dataclass(eq=False)
class AnswerReward(RowReward):
    """Scores the answer of each response by itself; `extract` says where it stands.

    Its bound is 1: what follows may hold a later answer, and that one counts.
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
        """Whether `prompt.metadata["reference_answer"]` is something to compare with."""
        return _references(prompt) is not None

    def references(self, prompt: Prompt) -> list[str]:
        """The accepted answers; `RewardError` where there are none."""
        found = _references(prompt)
        if found is None:
            raise self.unusable(prompt, "a text that is not blank, a number, or a list of such")
        return found

    def unusable(self, prompt: Prompt, expected: str) -> RewardError:
        """The error that a prompt's reference answer is not what is expected."""
        return RewardError(
            f"Reward model {self.name!r}, prompt {prompt.id!r}: expected "
            f"metadata['reference_answer'] to be {expected}, got "
            f"{prompt.metadata.get('reference_answer')!r}. Add the answer, or leave out the "
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
    """1 if the answer is the reference answer, else 0.

    Compared are texts in Unicode's composed form (NFC), without white space around them and with
    one space for any other, in any case. Emphasis of Markdown around the whole answer
    ("**Paris**") is ignored where the reference has none. Where the reference is one letter, as for
    multiple choice, so are brackets, full stops, a label, and the text of the choice: "(B)",
    "Option B", `\\text{B}` and "B) Paris" are "B". "B) or C)" is not.

    Without `extract`, `bound` is 0 where no reference answer begins with the prefix; what follows
    its first character that is not ASCII is not looked at.

    Args:
        extract: Where in the response the answer stands; see the module.

    Raises:
        RewardError: When scoring: a prompt, which the message names, has no reference answer.

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
        # Inside of one, two or three marks of emphasis, of which some may be there at its end.
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
    """Whether a normal form may be that of a longer text; ASCII alone is looked at."""
    start = re.match(r"[\x00-\x7f]*", text)
    known = start[0] if start else ""
    # A letter more, for a space at the end is one within the longer text.
    whole, before = (_normal(f"{each}x")[:-1] for each in (known, known[:-1]))
    if f"{accepted} ".startswith(whole):
        return True
    # A mark that combines with the last character may follow.
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
    r"""1 if the answer's last number is the reference answer, within a tolerance, else 0.

    Read are integers, decimals, groups of three digits (`1,234,567`), fractions (`3/4`,
    `\frac{3}{4}`), mixed numbers (`1 1/2`), powers (`2^5`, `1.5e-3`, `1.5 \times 10^{-3}`), percent
    (a hundredth), signs and a currency before the number, and Unicode's own forms of all these
    (`½`, `10³`); the module says which commas are decimal. A minus after a letter or digit is none:
    of "5-3" the last number is 3. Numbers are compared exactly, as fractions, whatever their size;
    those of more than 1000 digits, or beyond the power 1000 of ten, are wrong.

    Args:
        extract: Where in the response the answer stands; see the module.
        abs_tol: Largest difference that counts as equal.
        rel_tol: The same in parts of the reference answer's size; the larger of both holds.

    Raises:
        RewardError: When scoring: a prompt, which the message names, has no number as its answer.

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
        """Whether the prompt has reference answers that are numbers."""
        return super().applies_to(prompt) and None not in map(last_number, self.references(prompt))

    def _score(self, prompt: Prompt, response: str) -> float:
        accepted = [last_number(text) for text in self.references(prompt)]
        answer = extract_answer(response, self.extract) or ""
        # "- 73" is a negative number or an item of a list.
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


# --- Where an answer stands ---


def extract_answer(response: str, extract: str | None) -> str | None:
    r"""The part of a response that is its answer, stripped; None where there is none.

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
    """What stands in the braces of the last command, braces inside it being balanced."""
    _, found, after = response.rpartition(command.rstrip("{}"))
    after = after.lstrip()
    if not found or not after.startswith("{"):
        # TeX takes one digit of "\\boxed 72"; writers mean the number.
        bare = re.match(r"[-+]?\d[\d.,]*", after)
        return bare[0].rstrip(".,") if found and bare else None
    depth = 0
    for place, character in enumerate(after):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return after[1:place]
    return None


def _after(response: str, marker: str) -> str | None:
    # "**Answer:** 42" and "**Answer**: 42" are emphasised, and so is "**Answer: 42**".
    stem, colon = (marker[:-1], ":") if marker.endswith(":") else (marker, "")
    pattern = re.compile(rf"([*_]*){re.escape(stem)}[*_]*{colon}([*_]*)", re.IGNORECASE)
    places = list(pattern.finditer(response))
    if not places:
        return None
    answer = response[places[-1].end() :].strip().partition("\n")[0]
    opening, closing = places[-1][1], places[-1][2]
    if answer and not response[places[-1].end()].isspace():
        # "Answer:**42**" opens an emphasis of its own.
        answer, closing = closing + answer, ""
    is_open = opening and not closing and EMPHASIS.fullmatch(answer) is None
    return answer.removesuffix(opening) if is_open else answer


# --- How numbers are written ---


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; None where there is none (see `NumericReward`)."""

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
# A dash, "negative" or "minus" before a number, where no subtraction or range can be meant.
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
    """A text with Unicode's minus, superscripts, fractions and spaces inside numbers in ASCII."""

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
    """A text with its mixed numbers, such as "1 1/2", as fractions."""

    def fraction(match: re.Match[str]) -> str:
        whole, above, below = (int(match[i]) for i in (2, 3, 4))
        if above >= below:
            return match[0]
        return match[1] + form.format(whole * below + above, below)

    return _MIXED.sub(fraction, text)


def decimal_commas(text: str) -> str:
    """A text with decimal points where a comma can be nothing but decimal; see the module."""
    text = _POINTS.sub(lambda match: match[0].replace(".", "").replace(",", "."), text)
    return _COMMA.sub(r"\1.\2", text)


def joined_thousands(text: str) -> str:
    """An answer that is a number with spaces or apostrophes between its thousands, without them."""
    match = re.fullmatch(
        r"([-+]?\D?\s?)([1-9]\d{0,2}(?:(?: \d{3})+|(?:['’]\d{3})+))([.,]\d+)?(\s?\D?)", text
    )
    if match is None:
        return text
    before, digits, decimals, after = match.groups("")
    return before + re.sub(r"\D", "", digits) + decimals + after

"""Answers that are right or wrong: the same text, the same number.

Both, and `mathematics.MathReward`, read `prompt.metadata["reference_answer"]`, one answer or a list
of accepted ones, and take `extract`, which says where in a response its answer stands:

| `extract`        | The answer                                                                |
|------------------|---------------------------------------------------------------------------|
| None             | the whole response                                                        |
| `"last line"`    | its last line that is not blank                                           |
| `"<answer>"`     | what stands between the last `<answer>` and `</answer>` (any such tag)    |
| `"\\boxed"`       | what stands in the braces of the last `\\boxed{...}` (any such command)    |
| other text       | what follows its last occurrence, in any case, to the end of the line, or, |
|                  | if that is blank, on the next line that is not: "####", "Answer:"         |

Emphasis around such a text ("**Answer:** 42") is no part of the answer. A response without such a
place has no answer and scores 0, like an empty one.
"""

# ruff: noqa: RUF001 - the quotation marks and brackets of other scripts are meant.

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from mbrl_text_env.rewards.base import RewardError, RewardModel
from mbrl_text_env.rewards.names import named
from mbrl_text_env.rewards.verifiable.numerals import (
    decimal_commas,
    improper,
    joined_thousands,
    plain_numerals,
)
from mbrl_text_env.types import FloatArray, Prompt

_ARTICLES = re.compile(r"\b(a|an|the)\b")
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
_EMPHASIS = re.compile(r"(\*\*\*|\*\*|\*|___|__|_|`)(?=\S)(.*\S)\1", re.DOTALL)
# Numbers of more digits are no answers; reading them takes time that grows with their square.
_MAX_DIGITS = 1000


def extract_answer(response: str, extract: str | None) -> str | None:
    r"""The part of a response that is its answer, stripped; None where there is none.

    Args:
        response: The response.
        extract: Where the answer stands; see the table above.

    Example:
        >>> extract_answer("3 + 4 = 7\n#### 7", "####")
        '7'
        >>> extract_answer(r"So \boxed{\frac{1}{2}}.", r"\boxed")
        '\\frac{1}{2}'
    """
    if extract is None:
        answer: str | None = response
    elif extract == "last line":
        answer = response.strip().rpartition("\n")[2]
    elif extract.startswith("<"):
        answer = _in_tags(response, extract)
    elif extract.startswith("\\"):
        answer = _in_braces(response, extract)
    else:
        answer = _after(response, extract)
    return (answer or "").strip() or None


@named("exact-match")
class ExactMatchReward(RewardModel):
    """1 if the answer is the reference answer, else 0.

    Compared are texts in Unicode's composed form (NFC), without white space around them and with
    one space for any other, and changed by the options. Emphasis of Markdown around the whole
    answer ("**Paris**") is ignored where the reference has none. Where the reference is one letter,
    as for multiple choice, so are brackets, full stops, a label, and the text of the choice: "(B)",
    "Option B", `\\text{B}` and "B) Paris" are "B". "B) or C)" is not.
    With both `ignore_punctuation` and `ignore_articles` that is the exact match of SQuAD, except
    that the punctuation and symbols of all scripts are removed and not ASCII's alone. Note that
    then "3.5" is "35".

    Source: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP
    2016, and its evaluation script.

    Args:
        extract: Where in the response the answer stands; see the module.
        ignore_case: Compare in casefolded form.
        ignore_punctuation: Remove punctuation and symbols (Unicode's categories P and S).
        ignore_articles: Remove the words "a", "an" and "the".

    Raises:
        RewardError: When scoring: a prompt has no reference answer, or one of which nothing is left
            after normalisation. The message names the prompt.

    Example:
        >>> prompt = Prompt.from_text("Capital of France?", metadata={"reference_answer": "Paris"})
        >>> ExactMatchReward().score([prompt, prompt], [" paris\\n", "It is Paris."])
        array([1., 0.])
    """

    name = "exact-match"

    def __init__(
        self,
        extract: str | None = None,
        *,
        ignore_case: bool = True,
        ignore_punctuation: bool = False,
        ignore_articles: bool = False,
    ) -> None:
        self.extract = checked_extract(extract)
        self.ignore_case = ignore_case
        self.ignore_punctuation = ignore_punctuation
        self.ignore_articles = ignore_articles

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt has a reference answer."""
        return has_reference(prompt)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B] of zeros and ones."""
        return np.array([self._score(*row) for row in zip(prompts, responses, strict=True)])

    def _score(self, prompt: Prompt, response: str) -> float:
        given = references(prompt, self.name)
        accepted = {self._normal(text) for text in given}
        if "" in accepted:
            raise unusable_reference(
                self.name, prompt, "a text of which something is left when normalised"
            )
        answer = extract_answer(response, self.extract)
        if answer is None:
            return 0.0
        emphasised, chosen = _EMPHASIS.fullmatch(answer), _CHOSEN.fullmatch(answer)
        readings = [answer, *([emphasised[2]] if emphasised else [])]
        choices = {self._normal(text) for text in given if _CHOICE.fullmatch(text.strip())}
        return float(
            any(self._normal(reading) in accepted for reading in readings)
            or (
                chosen is not None
                and self._normal(chosen[1]) in choices
                and not _NOT_CHOSEN.search(chosen[2] or "")
            )
        )

    def _normal(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        if self.ignore_case:
            text = unicodedata.normalize("NFC", text.casefold())
        if self.ignore_punctuation:
            text = "".join(c for c in text if unicodedata.category(c)[0] not in "PS")
        if self.ignore_articles:
            text = _ARTICLES.sub(" ", text)
        return " ".join(text.split())


@named("numeric")
class NumericReward(RewardModel):
    r"""1 if the answer's last number is the reference answer, within a tolerance, else 0.

    Read are integers, decimals, groups of three digits (`1,234,567`), fractions (`3/4`,
    `\frac{3}{4}`), mixed numbers (`1 1/2`), powers (`2^5`, `1.5e-3`, `1.5 \times 10^{-3}`), percent
    (a hundredth), signs and a currency before the number, and Unicode's own forms of all these
    (`½`, `10³`). Commas are thousands or decimal as `rewards.verifiable.numerals` says: "1,22" is
    1.22 and "1,222" is 1222. A minus after a letter or digit is none: of "5-3" the last number is
    3. Numbers are compared exactly, as fractions, whatever their size; those of more than 1000
    digits, or beyond the power 1000 of ten, are wrong.

    Args:
        extract: Where in the response the answer stands; see the module. The last number in it
            counts.
        abs_tol: Largest difference that counts as equal.
        rel_tol: The same in parts of the reference answer's size; the larger of both holds.

    Raises:
        ValueError: A tolerance is negative or not finite.
        RewardError: When scoring: a prompt has no reference answer, or one that is no number. The
            message names the prompt.

    Example:
        >>> prompt = Prompt.from_text("6 * 250?", metadata={"reference_answer": "1500"})
        >>> NumericReward().score([prompt] * 3, ["6 * 250 = 1,500.", "1.5e3", "150"])
        array([1., 1., 0.])
    """

    name = "numeric"

    def __init__(
        self, extract: str | None = None, *, abs_tol: float = 0.0, rel_tol: float = 0.0
    ) -> None:
        self.extract = checked_extract(extract)
        self.abs_tol = _checked_tolerance("abs_tol", abs_tol)
        self.rel_tol = _checked_tolerance("rel_tol", rel_tol)

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt has reference answers that are numbers."""
        return has_reference(prompt) and None not in map(last_number, references(prompt, self.name))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B] of zeros and ones."""
        return np.array([self._score(*row) for row in zip(prompts, responses, strict=True)])

    def _score(self, prompt: Prompt, response: str) -> float:
        accepted = [last_number(text) for text in references(prompt, self.name)]
        numbers = [number for number in accepted if number is not None]
        if len(numbers) < len(accepted):
            raise unusable_reference(self.name, prompt, "a number")
        answer = extract_answer(response, self.extract)
        # "- 73" is a negative number or an item of a list.
        item = _ITEM.fullmatch(answer or "")
        values = [last_number(text) for text in (answer, item and item[1]) if text]
        return float(any(v is not None and self._equal(v, n) for v in values for n in numbers))

    def _equal(self, value: Fraction, reference: Fraction) -> bool:
        tolerance = max(Fraction(self.abs_tol), Fraction(self.rel_tol) * abs(reference))
        return abs(value - reference) <= tolerance


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; None where there is none (see `NumericReward`).

    Example:
        >>> last_number("12 of 16 is 75%, or 3/4")
        Fraction(3, 4)
    """
    text = _LATEX_FRACTION.sub(_plain_fraction, joined_thousands(plain_numerals(text).strip()))
    matches = list(_NUMBER.finditer(decimal_commas(improper(text))))
    return _value(matches[-1]) if matches else None


def _plain_fraction(match: re.Match[str]) -> str:
    return f"{match[1] or ''} {match[2] or match[4]}/{match[3] or match[5]}"


def has_reference(prompt: Prompt) -> bool:
    """Whether `prompt.metadata["reference_answer"]` is something to compare with."""
    given = prompt.metadata.get("reference_answer")
    answers = given if isinstance(given, list | tuple) else [given]
    return bool(answers) and all(_is_answer(answer) for answer in answers)


def references(prompt: Prompt, name: str) -> list[str]:
    """The accepted answers of a prompt, as texts.

    Args:
        prompt: The prompt.
        name: The reward's, for the message.

    Raises:
        RewardError: There are none; the message names the prompt.
    """
    if not has_reference(prompt):
        raise unusable_reference(
            name, prompt, "a text that is not blank, a number, or a list of such"
        )
    given = prompt.metadata["reference_answer"]
    return [str(answer) for answer in (given if isinstance(given, list | tuple) else [given])]


def _is_answer(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int | float) and not isinstance(value, bool)


def unusable_reference(name: str, prompt: Prompt, expected: str) -> RewardError:
    """The error that a prompt's reference answer is not what a reward expects."""
    return RewardError(
        f"Reward model {name!r}, prompt {prompt.id!r}: expected metadata['reference_answer'] to be "
        f"{expected}, got {prompt.metadata.get('reference_answer')!r}. Add the answer, or leave "
        "out the prompts that the reward does not apply to."
    )


def checked_extract(extract: str | None) -> str | None:
    """An `extract` that says where an answer stands.

    Raises:
        ValueError: It says nothing.
    """
    if extract is None or (isinstance(extract, str) and extract.strip()):
        return extract
    raise ValueError(
        "extract: expected None for the whole response, 'last line', a tag such as '<answer>', "
        rf"'\boxed', or a marker such as '####', got {extract!r}."
    )


def _checked_tolerance(name: str, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}.")
    return value


def _in_tags(response: str, tag: str) -> str | None:
    name = tag.strip("<>/ ")
    _, opening, after = response.rpartition(f"<{name}>")
    inside, closing, _ = after.partition(f"</{name}>")
    return inside if opening and closing else None


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
    is_open = opening and not closing and _EMPHASIS.fullmatch(answer) is None
    return answer.removesuffix(opening) if is_open else answer


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

r"""A reward for mathematical answers, checked by math-verify, and the preparation of its input.

math-verify finds the last formula or number in prose, so prose is passed on unchanged. An answer
that is one formula is put between dollar signs, because only then math-verify reads all of it.
"""

# ruff: noqa: RUF001 - characters of other scripts are intended.

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any

from mbrl_text_env._lazy import optional
from mbrl_text_env.rewards.base import RewardError, check_finite
from mbrl_text_env.rewards.names import named
from mbrl_text_env.rewards.verifiable.answers import (
    CURRENCIES,
    EMPHASIS,
    AnswerReward,
    decimal_commas,
    extract_answer,
    improper,
    joined_thousands,
    plain_numerals,
)
from mbrl_text_env.rewards.verifiable.isolated import IsolatedError, call_isolated
from mbrl_text_env.types import Prompt

# Relative tolerances: if one of the numbers has a decimal point, and if both are exact.
_FLOAT_TOLERANCE = 1e-5
_EXACT_TOLERANCE = 1e-12
_INTERVAL = re.compile(r"\[[^\[\]]*[\])]|\([^()]*\]|\\infty|∞")
_HERE = "mbrl_text_env.rewards.verifiable.mathematics"


@named("math")
@dataclass(eq=False)
class MathReward(AnswerReward):
    r"""1 if the answer is mathematically equal to the reference answer, otherwise 0.

    `math_verify.verify` compares LaTeX (`\frac{1}{2}`, with or without `$`), plain expressions
    (`x**2 + 1`, `sqrt(2)`; variables are single letters), sets, intervals, matrices, equations and
    numbers. Decimals must agree to six decimal places and within a relative tolerance of 1e-5;
    exact numbers must be equal. Without `extract`, math-verify finds the answer in prose. An answer
    that is a formula is read completely or not at all; emphasis, a label ("Answer:"), currencies
    and full stops around it are removed. If a response is ambiguous, both readings count: "73!" is
    a factorial or an exclamation, "- 73" a number or a list item.

    A reference answer must be a formula, several formulas joined by "and" or "or" (the response
    needs all of them, in any order), one formula in `\boxed`, or a number with its unit. One that
    could be read only in part ("18 apples and 5 pears") is an error.

    Algebra on a text such as `9^{9^{9^9}}` never ends. The comparison therefore runs in a process
    with a memory limit that is killed after `seconds` (`rewards.verifiable.isolated`). A response
    that exceeds a limit scores 0.

    Source: math-verify, https://github.com/huggingface/Math-Verify. Deviations: expressions without
    LaTeX and without words are also read as LaTeX; math-verify alone treats all numbers below 1e-6
    as equal, and accepts formulas that it can read only in part.

    Args:
        extract: How to find the answer in the response; see `rewards.verifiable.answers`.
        seconds: Wall-clock time limit per comparison.

    Raises:
        RewardError: When scoring, if the extra `verify` is not installed, or a prompt has no usable
            reference answer. The message names the prompt.

    Example:
        >>> prompt = Prompt.from_text("Half of x + 1?", metadata={"reference_answer": "(x+1)/2"})
        >>> MathReward().score([prompt], [r"$\frac{x}{2} + \frac12$"])  # doctest: +SKIP
        array([1.])
    """

    name = "math"

    _: KW_ONLY
    seconds: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self, "seconds", above=0)

    def _score(self, prompt: Prompt, response: str) -> float:
        accepted = self.references(prompt)
        for reference in accepted:
            try:
                _check_reference(reference, self.seconds)
            except IsolatedError as error:
                expected = f"mathematics that math-verify can read and compare ({error})"
                raise self.unusable(prompt, expected) from error
        answer = extract_answer(response, self.extract)
        try:
            return float(answer is not None and _graded(accepted, answer, self.seconds))
        except IsolatedError:
            # The reference answers passed the check, so the response is at fault.
            return 0.0


@lru_cache(maxsize=10_000)
def _check_reference(reference: str, seconds: float) -> None:
    """Raise unless an answer equals itself and can be compared with a number within the limit."""
    if not _graded([reference], reference, seconds):
        raise IsolatedError("nothing mathematical was found in it")
    _graded([reference], "12345.678", seconds)


def _graded(accepted: list[str], answer: str, seconds: float) -> bool:
    prepare = [f"{_HERE}:load_math_verify"]
    return bool(call_isolated(f"{_HERE}:grade", accepted, answer, seconds=seconds, prepare=prepare))


# --- In the helper process ---


@lru_cache(maxsize=1)
def load_math_verify() -> None:
    """Import math-verify and make a first comparison, which is slower than later ones."""
    optional("math_verify", RewardError)
    grade(["x/2"], "$0.5 x$")


def grade(accepted: list[str], answer: str) -> bool:
    """Return whether math-verify finds an answer equal to an accepted one."""
    from math_verify import verify

    _compare_by_size()
    golds = {text: _parsed(reference_reading(text)) for text in accepted}
    unread = [text for text, gold in golds.items() if not gold]
    if unread:
        raise ValueError(f"nothing mathematical was found in (a part of) the answer {unread[0]!r}")
    return any(
        # Otherwise "10:30" would be a third.
        clock_time(answer) == clock_time(text)
        if re.fullmatch(r"[\d: ]+", text) and clock_time(text)
        else verify(
            gold,
            _parsed(reading),
            timeout_seconds=None,
            # "(1, 2)" can be a point, which "1 < x < 2" does not equal.
            allow_set_relation_comp=_INTERVAL.search(text) is not None,
        )
        for text, gold in golds.items()
        for reading in readings(answer, symbols_of(text))
    )


def _parsed(text: str | None) -> list[Any]:
    """Return what math-verify parses; a text that is one formula is parsed completely or not."""
    from math_verify import LatexExtractionConfig, parse

    if text is None:
        return []
    if re.fullmatch(r"\$[^$]+\$(?: and \$[^$]+\$)*", text):
        latex = [LatexExtractionConfig()]
        return list(parse(text, latex, fallback_mode="no_fallback", parsing_timeout=None))
    return list(parse(text, parsing_timeout=None))


@lru_cache(maxsize=1)
def _compare_by_size() -> None:
    """Make math-verify compare all numbers, also inside formulas, with a relative tolerance."""
    from math_verify import grader

    plain = grader.sympy_numeric_eq

    def numeric_eq(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
        return bool(plain(a, b, float_rounding, numeric_precision)) and _is_close(a, b)

    grader.sympy_numeric_eq = numeric_eq


def _is_close(a: Any, b: Any) -> bool:
    """Return whether two expressions are equal within a relative tolerance."""
    from math_verify.grader import Float, MatrixBase, Rational, get_pct_val

    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
        # Their elements have been compared one by one.
        return True
    tolerance = _FLOAT_TOLERANCE if a.has(Float) or b.has(Float) else _EXACT_TOLERANCE
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    # Values at which no term is likely to vanish.
    place = {symbol: Rational(137 + 10 * i, 100) for i, symbol in enumerate(symbols)}
    for x, y in ((a, b), (get_pct_val(a, a), get_pct_val(b, b))):
        try:
            u, v = (_evaluated(each.doit().subs(place)) for each in (x, y))
        except (TypeError, ValueError, AttributeError):
            # Not numbers, so math-verify's result stands.
            return True
        if abs(u - v) <= tolerance * max(abs(u), abs(v)):
            return True
    return False


def _evaluated(expression: Any) -> Any:
    number = expression.evalf(30)
    if not number.is_number:
        raise TypeError(f"expected a number, got {number}")
    return number


# --- Possible readings of a text as a formula ---

# Reading a formula takes more than linear time, and answers are not longer.
_MAX_FORMULA = 1000
_DELIMITED = re.compile(r"\$|\\[(\[]|\\boxed")
_SPAN = re.compile(r"\$\$.+?\$\$|(?<!\\)\$.+?(?<!\\)\$|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL)
_DELIMITERS = re.compile(r"^(?:\$+|\\[(\[])|(?:\$+|\\[)\]])$")
_COMMAND = re.compile(r"\\(?:begin|end)\{\w+\*?\}(?:\{[lcr| ]*\})?|\\text\{[^{}]*\}|\\[A-Za-z]+")
_ROMAN = re.compile(r"\\(?:mathrm|mathit|mathbf|text|textit|textrm|rm)\{\s*([A-Za-z])\s*\}")
_FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|cot|sec|log|ln|exp|pi|infty"
_BARE_FUNCTION = re.compile(rf"(?<![A-Za-z\\])({_FUNCTIONS})(?![A-Za-z])")
_POWER_OF_TEN = re.compile(r"(\d)[eE]([-+]?\d+)")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))")
_PLAIN_POWER = re.compile(r"\^\s*([-+]?\s?\d+\.\d+|[-+]\s?\d+|[-+][A-Za-z])")
_WORD = re.compile(r"[^\W\d_]{2,}")
_LABEL = re.compile(
    r"(?:(?:the\s+)?(?:final\s+)?answer(?:\s+is\b)?|ans\.?|result|solution|a(?=\s*[*_]*\s*:))"
    r"\s*[*_]*\s*[:=]?\s*[*_]*\s*",
    re.IGNORECASE,
)
_MONEY = re.compile(
    rf"(-?)[{re.escape(CURRENCIES)}]\s?(-?[\d.,' ]*\d)|(-?\d[\d.,' ]*)\s?[{re.escape(CURRENCIES)}]"
)
# Tags, commands and spaces that change only the appearance of a formula.
_LOOKS = re.compile(
    r"</?(?:b|strong|em|i|u|mark)>|\\(?:underline|boldsymbol|bm|pmb|bf|displaystyle)(?![A-Za-z])"
    r"|(?:(?<!\\)\\+|\\quad|\\,|~)\s*(?=\$*$)"
)
_CLOCK = re.compile(r"(?<![\d:.])\d{1,2} ?: ?[0-5]\d(?: ?: ?[0-5]\d)?(?![\d:])(?!\.\d)")
_BOXED = re.compile(r".*?\\boxed\s*\{(.*)\}[\s.$\\\])]*", re.DOTALL)
_ABOUT = re.compile(r"(?:\\(?:approx|simeq|sim)(?![A-Za-z])|[≈~])\s*(?=[-+\d.\\$])")
_CHOICE = re.compile(
    r"(?:\\text(?:bf)?\s*\{)?\(?([A-Ea-e])[).]\}?\s*\}?(?:\\ |\\quad|\\,|~|\s)\s*(\S.*)"
)
_ONES = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|"
    "sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|"
    "hundred|thousand|million|billion"
)
_SPELLED = re.compile(rf"(?:(?:{_ONES}|and)[\s-]+)+\(([^()]+)\)", re.IGNORECASE)
_LISTED = re.compile(r"\s*,?\s*(?:\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*|\s*;\s*")
_DIGITS = re.compile(r"[-+]?[\d.,]*\d")
_NUMBER = r"-?\d(?:[\d.,'’]|(?<=\d) (?=\d{3}))*(?:/\d+)?"
# The marks have no mathematical meaning: no letters, operators, relations or percent signs.
_NUMBER_IN_MARKS = re.compile(rf"[=≈~→⇒#✅\s\"'“‘*_]*({_NUMBER})[;,:?✓✔✅\s\"'”’*_]*")
_UNIT = r"(?:[kcmdn]?m|s|h|[km]?g|[mdc]?[lL]|[kM]?[WJN]|V|A|K|Hz)(?:\^\{?[23]\}?)?"
_MEASURE = re.compile(rf"({_NUMBER}) ?{_UNIT}(?:/{_UNIT})?")
_QUANTITY = re.compile(
    rf"[-+]?[{re.escape(CURRENCIES)}]?\s?([\d.,/ ]*\d)\s*%?((?:\s*[^\W\d_.]+\.?){{0,2}})"
)
# Words that change the meaning of a number, unlike its unit.
_QUALIFIERS = (
    "and or to between through than least most not no over under above below about around up down "
    "more less fewer but plus minus times either neither nor per cent percent dozen hundred "
    "thousand million billion trillion one two three four five six seven eight nine ten half"
)
_NO_UNITS = frozenset(_QUALIFIERS.split())
_UNITS = frozenset(re.findall(r"\w+", "cm mm km kg mg ml dm nm mb kb am pm st nd rd th"))
_VARIABLES = frozenset("abcmnpqrstxyz")
_SIGNS = {
    "×": r" \times ", "·": r" \cdot ", "⋅": r" \cdot ", "÷": "/", "π": r" \pi ", "∞": r" \infty ",
    "≤": r" \le ", "≥": r" \ge ", "≠": r" \ne ", "±": r" \pm ", "∪": r" \cup ", "∩": r" \cap ",
    "°": r"^\circ ", r"\colon": ":", "~": r"\, ", r"\langle": "(", r"\rangle": ")",
    r"\degree": r"^\circ ", r"\varnothing": r"\emptyset ", "**": "^",
}  # fmt: skip
_ROOT = re.compile(r"√\s*(\d+|[A-Za-z]|\([^()]*\))")


def readings(answer: str, symbols: frozenset[str] = frozenset()) -> list[str]:
    r"""Return the possible readings of an answer as texts for math-verify, the likeliest first.

    `symbols` are the variables of the reference answer; if it has x and y, "xy" is their product.

    Example:
        >>> readings("**€1 000.5**"), readings("So it is 7.")
        (['$1000.5$'], ['So it is 7.'])
    """
    text = _unboxed(answer)
    choice = _CHOICE.fullmatch(text)
    is_one = choice and choice[1] not in symbols and not _LISTED.search(choice[2])
    if choice and is_one and _formula(_plain(choice[2]), symbols) is not None:
        text = _plain(choice[2])
    formula = _formula(text, symbols)
    if formula is None:
        return [_ROMAN.sub(r"{\1}", improper(_LOOKS.sub("", plain_numerals(answer))))]
    decimal = _latex(decimal_commas(formula))
    found = [decimal, _latex(formula)] if "," in formula else [decimal]
    for pattern in (r"(.*\d)!+", r"[-*•]\s+(\S.*)", _MEASURE):
        match = re.fullmatch(pattern, text)
        inner = match and _formula(match[1].strip(), symbols)
        if inner and _DIGITS.fullmatch(inner):
            found.append(_latex(decimal_commas(inner)))
    return list(dict.fromkeys(found))


def reference_reading(reference: str) -> str | None:
    r"""Return a reference answer as a text for math-verify, or None if a part would be lost.

    A comma in it separates thousands or list elements and is never a decimal comma.
    """
    text = _unboxed(reference)
    formula = _formula(text, frozenset())
    if formula is not None:
        return _latex(formula)
    if _DELIMITED.search(text):
        return text if _is_covered(text) else None
    quantity = _QUANTITY.fullmatch(text)
    words = re.findall(r"[^\W\d_]+", quantity[2].casefold()) if quantity else []
    if quantity is None or _NO_UNITS.intersection(words):
        return None
    return _latex(improper(text[: quantity.end(1)].lstrip(CURRENCIES + " "), r"\frac{{{}}}{{{}}}"))


def clock_time(text: str) -> tuple[int, ...] | None:
    """Return the last time of day in a text ("10:30", "09:05:00"), or None."""
    found = _CLOCK.findall(text)
    return tuple(map(int, re.findall(r"\d+", found[-1]))) if found else None


def symbols_of(reference: str) -> frozenset[str]:
    """Return the letters of a reference answer that are probably variables."""
    bare = _SPAN.sub(lambda match: match[0].strip("$"), reference)
    return frozenset(re.findall(r"(?<![A-Za-z\\{])[A-Za-z](?![A-Za-z])", bare))


def _unboxed(text: str) -> str:
    text = _plain(text)
    boxed = _BOXED.fullmatch(text) if text.count(r"\boxed") == 1 else None
    return _plain(boxed[1]) if boxed else text


def _plain(text: str) -> str:
    """Remove a label, emphasis, other formatting and a full stop around a text."""
    text = _LOOKS.sub("", plain_numerals(text).strip()).strip()
    for _ in range(3):
        match = EMPHASIS.fullmatch(text)
        text = match[2] if match else text
        label = _LABEL.match(text)
        rest = text[label.end() :] if label else ""
        text = (rest or text).strip().removesuffix(".").removesuffix("。").strip()
        # The label included the first mark of a pair.
        text = re.sub(r"(?<=[^*_\s])[*_]+$", "", text) if rest else text
        span = _SPAN.fullmatch(text)
        inside = _DELIMITERS.sub("", text) if span else text
        text = text if _DELIMITED.search(inside) else inside.strip()
        about, spelled = _ABOUT.match(text), _SPELLED.fullmatch(text)
        text = text[about.end() :] if about else spelled[1] if spelled else text
    alone = _NUMBER_IN_MARKS.fullmatch(text.removeprefix("\\$"))
    return alone[1].strip(" .,'") if alone else text


def _formula(text: str, symbols: frozenset[str]) -> str | None:
    """Return a text that is one formula, with plain numbers for money and thousands, or None."""
    parts = [part for part in _LISTED.split(text) if part]
    if len(parts) > 1 and r"\begin" not in text:
        formulas = [_formula(part, symbols) for part in parts[:7]]
        # math-verify joins at most six formulas.
        if len(parts) > 6 or None in formulas:
            return None
        return "$ and $".join(map(str, formulas))
    money = _MONEY.fullmatch(text)
    if money:
        text = f"{money[1] or ''}{money[2] or money[3]}".strip()
    text = joined_thousands(text)
    bare = _COMMAND.sub(" ", _BARE_FUNCTION.sub(" ", text.replace("sqrt", " ")))
    is_prose = ("\n" in text and r"\begin" not in text) or any(
        not _is_product(match, bare, symbols) for match in _WORD.finditer(bare)
    )
    if not text or len(text) > _MAX_FORMULA or _DELIMITED.search(text) or is_prose:
        return None
    return text


def _is_product(match: re.Match[str], text: str, symbols: frozenset[str]) -> bool:
    """Return whether adjacent letters are a product of variables, not a word."""
    if set(match[0]) <= symbols:
        return True
    beside = text[max(0, match.start() - 1) : match.start()] + text[match.end() : match.end() + 1]
    is_short = len(match[0]) <= 3 and set(match[0]) <= _VARIABLES and match[0] not in _UNITS
    return is_short and bool(re.search(r"[\d+*/^=()-]", beside))


def _is_covered(text: str) -> bool:
    """Return whether a text is delimited formulas joined by words, or one formula with a unit."""
    spans = len(_SPAN.findall(text))
    rest = _SPAN.sub(" | ", text).strip(" .")
    if spans == 1 and r"\boxed" not in text:
        after = re.fullmatch(r"\|\s*%?((?:\s*[^\W\d_.]+){0,2})", rest)
        return after is not None and not _NO_UNITS.intersection(after[1].casefold().split())
    return re.fullmatch(r"\|(?:\s*(?:,|,?\s*and|,?\s*or)\s*\|)*", rest) is not None


def _latex(formula: str) -> str:
    """Return a formula (or several joined by "$ and $") in LaTeX, between dollar signs."""
    formula = improper(formula, r"\frac{{{}}}{{{}}}")
    formula = _TIMES_TEN.sub(r" \\times ", formula)
    formula = _POWER_OF_TEN.sub(r"\1 \\cdot 10^{\2}", formula)
    formula = _ROOT.sub(lambda match: rf"\sqrt{{{match[1].strip('()')}}}", formula)
    for sign, command in _SIGNS.items():
        formula = formula.replace(sign, command)
    formula = _PLAIN_POWER.sub(r"^{\1}", _ROMAN.sub(r"{\1}", formula))
    return "$" + _BARE_FUNCTION.sub(r"\\\1 ", formula) + "$"

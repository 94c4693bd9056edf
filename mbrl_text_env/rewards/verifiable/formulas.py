r"""What a text may mean as a formula: the LaTeX that is given to math-verify.

math-verify finds the last formula or number in prose. So prose is left to it, while an answer that
is a formula as a whole is put between dollars, for only then is all of it read.
"""

# ruff: noqa: RUF001 - the signs of other scripts are meant.

from __future__ import annotations

import re

from mbrl_text_env.rewards.verifiable.numerals import (
    CURRENCIES,
    decimal_commas,
    improper,
    joined_thousands,
    plain_numerals,
)

# Reading a formula takes more than linear time; an answer is not longer.
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
_EMPHASIS = re.compile(r"(\*\*\*|\*\*|\*|___|__|_|`)(?=\S)(.*\S)\1", re.DOTALL)
_MONEY = re.compile(
    rf"(-?)[{re.escape(CURRENCIES)}]\s?(-?[\d.,' ]*\d)|(-?\d[\d.,' ]*)\s?[{re.escape(CURRENCIES)}]"
)
# Tags, commands and spaces that change how a formula looks and not what it says.
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
# Nothing that computes: no letters, operators, relations or percent.
_NUMBER_IN_MARKS = re.compile(rf"[=≈~→⇒#✅\s\"'“‘*_]*({_NUMBER})[;,:?✓✔✅\s\"'”’*_]*")
_UNIT = r"(?:[kcmdn]?m|s|h|[km]?g|[mdc]?[lL]|[kM]?[WJN]|V|A|K|Hz)(?:\^\{?[23]\}?)?"
_MEASURE = re.compile(rf"({_NUMBER}) ?{_UNIT}(?:/{_UNIT})?")
_QUANTITY = re.compile(
    rf"[-+]?[{re.escape(CURRENCIES)}]?\s?([\d.,/ ]*\d)\s*%?((?:\s*[^\W\d_.]+\.?){{0,2}})"
)
# Words that say more of a number than its unit.
_NO_UNITS = frozenset(
    re.findall(
        r"\w+",
        "and or to between through than least most not no over under above below about around up "
        "down more less fewer but plus minus times either neither nor per cent percent dozen "
        "hundred thousand million billion trillion one two three four five six seven eight "
        "nine ten half",
    )
)
_UNITS = frozenset(re.findall(r"\w+", "cm mm km kg mg ml dm nm mb kb am pm st nd rd th"))
_VARIABLES = frozenset("abcmnpqrstxyz")
_SIGNS = {
    "×": r" \times ",
    "·": r" \cdot ",
    "⋅": r" \cdot ",
    "÷": "/",
    "π": r" \pi ",
    "∞": r" \infty ",
    "≤": r" \le ",
    "≥": r" \ge ",
    "≠": r" \ne ",
    "±": r" \pm ",
    "∪": r" \cup ",
    "∩": r" \cap ",
    "°": r"^\circ ",
    r"\colon": ":",
    "~": r"\, ",
    r"\langle": "(",
    r"\rangle": ")",
    r"\degree": r"^\circ ",
    r"\varnothing": r"\emptyset ",
    "**": "^",
}
_ROOT = re.compile(r"√\s*(\d+|[A-Za-z]|\([^()]*\))")


def readings(answer: str, symbols: frozenset[str] = frozenset()) -> list[str]:
    r"""What an answer may mean, as texts for math-verify, the likeliest first.

    An answer that is a formula as a whole is put between dollars. Of some there are two readings:
    "73!" is a factorial or an exclamation, "- 73" a negative number or an item of a list, "1,22" a
    list or a decimal. All other text is returned as it is.

    Args:
        answer: The answer.
        symbols: Letters that are variables in what it is compared with: "xy" is then their product.

    Example:
        >>> readings("**€1 000.5**")
        ['$1000.5$']
        >>> readings("So it is 7.")
        ['So it is 7.']
    """
    text = _plain(answer)
    boxed = _BOXED.fullmatch(text) if text.count(r"\boxed") == 1 else None
    text = _plain(boxed[1]) if boxed else text
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
    r"""What a reference answer means, as a text for math-verify; None where a part would be lost.

    It is a formula, several of them joined by "and" or "or", one in `\boxed`, or a number with a
    unit. A comma is decimal in none of them, but separates thousands or the elements of a list.

    Example:
        >>> reference_reading("1331 and 1728")
        '$1331$ and $1728$'
        >>> reference_reading("18 apples and 5 pears")
    """
    text = _plain(reference)
    if text.count(r"\boxed") == 1:
        inside = _BOXED.fullmatch(text)
        text = _plain(inside[1]) if inside else text
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
    """The last time of day in a text ("10:30", "09:05:00"); None where there is none.

    Example:
        >>> clock_time("It is 9:05 a.m."), clock_time("9:5")
        ((9, 5), None)
    """
    found = _CLOCK.findall(text)
    return tuple(map(int, re.findall(r"\d+", found[-1]))) if found else None


def symbols_of(reference: str) -> frozenset[str]:
    """The letters of a reference answer that stand for variables, as far as can be seen."""
    return frozenset(
        re.findall(r"(?<![A-Za-z\\{])[A-Za-z](?![A-Za-z])", _SPAN.sub(_inside, reference))
    )


def _inside(match: re.Match[str]) -> str:
    return match[0].strip("$")


def _plain(text: str) -> str:
    """Without a label, emphasis, other looks and a full stop around it."""
    text = _LOOKS.sub("", plain_numerals(text).strip()).strip()
    for _ in range(3):
        match = _EMPHASIS.fullmatch(text)
        text = match[2] if match else text
        label = _LABEL.match(text)
        rest = text[label.end() :] if label else ""
        text = (rest or text).strip().removesuffix(".").removesuffix("。").strip()
        # The label took the first mark of a pair.
        text = re.sub(r"(?<=[^*_\s])[*_]+$", "", text) if rest else text
        span = _SPAN.fullmatch(text)
        inside = _DELIMITERS.sub("", text) if span else text
        text = text if _DELIMITED.search(inside) else inside.strip()
        about, spelled = _ABOUT.match(text), _SPELLED.fullmatch(text)
        text = text[about.end() :] if about else spelled[1] if spelled else text
    alone = _NUMBER_IN_MARKS.fullmatch(text.removeprefix("\\$"))
    return alone[1].strip(" .,'") if alone else text


def _formula(text: str, symbols: frozenset[str]) -> str | None:
    """A text that is a formula as a whole, its money and thousands as plain numbers; else None."""
    parts = [part for part in _LISTED.split(text) if part]
    if len(parts) > 1 and r"\begin" not in text:
        formulas = [_formula(part, symbols) for part in parts[:7]]
        # math-verify joins up to six.
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
    """Whether letters side by side are variables, not a word."""
    if set(match[0]) <= symbols:
        return True
    beside = text[max(0, match.start() - 1) : match.start()] + text[match.end() : match.end() + 1]
    is_short = len(match[0]) <= 3 and set(match[0]) <= _VARIABLES and match[0] not in _UNITS
    return is_short and bool(re.search(r"[\d+*/^=()-]", beside))


def _is_covered(text: str) -> bool:
    """Whether a text is formulas between delimiters, joined by words, or one with a unit."""
    spans = len(_SPAN.findall(text))
    rest = _SPAN.sub(" | ", text).strip(" .")
    if spans == 1 and r"\boxed" not in text:
        after = re.fullmatch(r"\|\s*%?((?:\s*[^\W\d_.]+){0,2})", rest)
        return after is not None and not _NO_UNITS.intersection(after[1].casefold().split())
    return re.fullmatch(r"\|(?:\s*(?:,|,?\s*and|,?\s*or)\s*\|)*", rest) is not None


def _latex(formula: str) -> str:
    """A formula (or several with "$ and $" between them) in LaTeX, between dollars."""
    formula = improper(formula, r"\frac{{{}}}{{{}}}")
    formula = _TIMES_TEN.sub(r" \\times ", formula)
    formula = _POWER_OF_TEN.sub(r"\1 \\cdot 10^{\2}", formula)
    formula = _ROOT.sub(lambda match: rf"\sqrt{{{match[1].strip('()')}}}", formula)
    for sign, command in _SIGNS.items():
        formula = formula.replace(sign, command)
    formula = _PLAIN_POWER.sub(r"^{\1}", _ROMAN.sub(r"{\1}", formula))
    return f"${_BARE_FUNCTION.sub(_command, formula)}$"


def _command(match: re.Match[str]) -> str:
    return f"\\{match[0]} "

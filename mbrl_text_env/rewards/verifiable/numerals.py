"""Ways of writing numbers: thousands, decimal commas, mixed numbers, Unicode's own forms.

One reading of a comma or a point between digits is taken everywhere:

| written                    | read as    | because                                               |
|----------------------------|------------|-------------------------------------------------------|
| `1,222`, `1,222,333`       | 1222, ...  | a group of three digits after a comma is thousands    |
| `1,22`, `0,125`, `1000,999`| 1.22, ...  | these cannot be thousands, so the comma is decimal    |
| `1.222`                    | 1.222      | a point is decimal                                    |
| `1.222,5`, `1.222.333`     | 1222.5, ...| a point cannot be decimal here                        |
| `1 222`, `1'222`           | 1222       | as an answer by itself                                |
| `1,2,3`                    | a list     | more than one comma, and no thousands                 |
"""

# ruff: noqa: RUF001 - the digits and spaces of other scripts are meant.

from __future__ import annotations

import re
import unicodedata

CURRENCIES = "$€£¥₹₽₩₪₫฿₺₴"

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
_COMMA = re.compile(
    r"(?<![\w.,])(?![1-9]\d{0,2},\d{3}(?!\d))(\d+),(\d+)(?!\d|[.,]\d)",
)


def plain_numerals(text: str) -> str:
    r"""A text with Unicode's minus, superscripts, fractions and spaces inside numbers in ASCII.

    Example:
        >>> plain_numerals("1½ of 10³, 1\u202f000")
        '1 1/2 of 10^{3}, 1,000'
    """
    text = _SIGN.sub("-", _SUPERSCRIPT.sub(_power, text.translate(_MINUS)))
    text = "".join(map(_fraction, " " + text, text))
    return _SPACES.sub(",", text)


def improper(text: str, form: str = "{}/{}") -> str:
    """A text with its mixed numbers, such as "1 1/2", as fractions.

    Example:
        >>> improper("-1 1/2 or 3 4/3")
        '-3/2 or 3 4/3'
    """

    def fraction(match: re.Match[str]) -> str:
        whole, above, below = (int(match[i]) for i in (2, 3, 4))
        if above >= below:
            return match[0]
        return match[1] + form.format(whole * below + above, below)

    return _MIXED.sub(fraction, text)


def decimal_commas(text: str) -> str:
    """A text with decimal points where a comma can be nothing but decimal; see the module.

    Example:
        >>> decimal_commas("1,22 and 0,5 and 1,222 and 1.222,5 and 1,2,3")
        '1.22 and 0.5 and 1,222 and 1222.5 and 1,2,3'
    """
    text = _POINTS.sub(lambda match: match[0].replace(".", "").replace(",", "."), text)
    return _COMMA.sub(r"\1.\2", text)


def joined_thousands(text: str) -> str:
    """An answer that is a number with spaces or apostrophes between its thousands, without them.

    Example:
        >>> joined_thousands("-1 000 000,5"), joined_thousands("1 000 2")
        ('-1000000,5', '1 000 2')
    """
    match = re.fullmatch(
        r"([-+]?\D?\s?)([1-9]\d{0,2}(?:(?: \d{3})+|(?:['’]\d{3})+))([.,]\d+)?(\s?\D?)", text
    )
    if match is None:
        return text
    before, digits, decimals, after = match.groups("")
    return before + re.sub(r"\D", "", digits) + decimals + after


def _power(match: re.Match[str]) -> str:
    return f"^{{{unicodedata.normalize('NFKC', match[0]).translate(_MINUS)}}}"


def _fraction(before: str, character: str) -> str:
    # U+2044 is the fraction slash.
    if character == "\u2044":
        return "/"
    if unicodedata.category(character) != "No" or "VULGAR FRACTION" not in _name(character):
        return character
    written = unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    return f" {written}" if before.isdigit() else written


def _name(character: str) -> str:
    return unicodedata.name(character, "")

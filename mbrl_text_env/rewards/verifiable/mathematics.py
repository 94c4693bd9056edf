"""Answers that are mathematically right or wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.rewards.names import named
from mbrl_text_env.rewards.verifiable.answers import (
    checked_extract,
    extract_answer,
    has_reference,
    references,
    unusable_reference,
)
from mbrl_text_env.rewards.verifiable.formulas import (
    clock_time,
    readings,
    reference_reading,
    symbols_of,
)
from mbrl_text_env.rewards.verifiable.isolated import IsolatedError, call_isolated, import_optional
from mbrl_text_env.types import FloatArray, Prompt

_WHOLE = re.compile(r"\$[^$]+\$(?: and \$[^$]+\$)*")
# Parts of their size by which two numbers may differ: one of them with a point, or both exact.
_FLOAT_TOLERANCE = 1e-5
_EXACT_TOLERANCE = 1e-12
_INTERVAL = re.compile(r"\[[^\[\]]*[\])]|\([^()]*\]|\\infty|∞")
_SOME_NUMBER = "12345.678"
_HERE = "mbrl_text_env.rewards.verifiable.mathematics"


@named("math")
class MathReward(RewardModel):
    r"""1 if the answer is mathematically the reference answer, else 0, by math-verify.

    LaTeX (`\frac{1}{2}`, with or without `$`), plain expressions (`x**2 + 1`, `sqrt(2)`), sets,
    intervals, matrices, equations and numbers are compared as `math_verify.verify` does. Numbers
    with a point are compared to six decimals and in parts of their size (1e-5), exact ones exactly.
    Without `extract`, math-verify looks for the answer in prose by itself: "final answer is",
    `\boxed{}`, the last formula, the last number. Variables of plain expressions are single
    letters. An answer that is a formula is read as a whole or not at all, without emphasis,
    a label ("Answer:"), currencies, and full stops around it; `rewards.verifiable.numerals` says
    how commas and points are read. Where a response can mean two things, either counts: "73!" is a
    factorial or an exclamation, "- 73" a negative number or an item of a list.

    A reference answer that would be read in part ("18 apples and 5 pears") is refused. It is a
    formula, several joined by "and" or "or" (all of which the response has to have, in any order),
    one in `\boxed`, or a number with its unit.

    Algebra on a text such as `9^{9^{9^9}}` does not end, and math-verify's own limits are signals,
    which reach the main thread only. So it is done in a process that is killed after `seconds`
    (`rewards.verifiable.isolated`), with a limit of memory; a response that exceeds either scores
    0. Threads wait for each other. Not killed, a comparison takes some milliseconds.

    Source: math-verify, https://github.com/huggingface/Math-Verify. Deviations: expressions without
    LaTeX and without words are read as LaTeX too, for math-verify reads plain arithmetic alone; it
    takes numbers below 1e-6 for equal, and what it can read of a formula for all of it.

    Args:
        extract: Where in the response the answer stands; see `rewards.verifiable.answers`.
        seconds: Wall-clock time that one comparison may take.

    Raises:
        ValueError: `seconds` is not positive.
        RewardError: When scoring: the extra `verify` is not installed, or a prompt has no reference
            answer or one that cannot be read as a whole, or not be compared with a number in time.
            The message names the prompt.

    Example:
        >>> prompt = Prompt.from_text("Half of x + 1?", metadata={"reference_answer": "(x+1)/2"})
        >>> MathReward().score([prompt], [r"$\frac{x}{2} + \frac12$"])  # doctest: +SKIP
        array([1.])
    """

    name = "math"

    def __init__(self, extract: str | None = None, *, seconds: float = 5.0) -> None:
        if not 0 < seconds < float("inf"):
            raise ValueError(f"seconds: expected a positive number, got {seconds!r}.")
        self.extract = checked_extract(extract)
        self.seconds = seconds

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt has a reference answer."""
        return has_reference(prompt)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B] of zeros and ones."""
        return np.array([self._score(*row) for row in zip(prompts, responses, strict=True)])

    def _score(self, prompt: Prompt, response: str) -> float:
        accepted = references(prompt, self.name)
        for reference in accepted:
            try:
                _check_reference(reference, self.seconds)
            except IsolatedError as error:
                expected = f"mathematics that math-verify can read and compare ({error})"
                raise unusable_reference(self.name, prompt, expected) from error
        answer = extract_answer(response, self.extract)
        try:
            return float(answer is not None and _graded(accepted, answer, self.seconds))
        except IsolatedError:
            # With the reference answers it went well: the response is at fault.
            return 0.0


@lru_cache(maxsize=10_000)
def _check_reference(reference: str, seconds: float) -> None:
    """Raise unless an answer is equal to itself, and can be compared with some number in time."""
    if not _graded([reference], reference, seconds):
        raise IsolatedError("nothing mathematical was found in it")
    _graded([reference], _SOME_NUMBER, seconds)


def _graded(accepted: list[str], answer: str, seconds: float) -> bool:
    prepare = [f"{_HERE}:load_math_verify"]
    return bool(call_isolated(f"{_HERE}:grade", accepted, answer, seconds=seconds, prepare=prepare))


@lru_cache(maxsize=1)
def load_math_verify() -> None:
    """Import math-verify and make a first comparison, which takes longer than later ones.

    Called in the helper process, where the time does not count.

    Raises:
        RewardError: The extra `verify` is not installed.
    """
    import_optional("math_verify", "math-verify", "verify")
    grade(["x/2"], "$0.5 x$")


def grade(accepted: list[str], answer: str) -> bool:
    """Whether math-verify finds an answer equal to an accepted one; for the helper process.

    It sets no limit of time: use `MathReward`.

    Raises:
        ValueError: An accepted answer is read in part or not at all.
    """
    from math_verify import verify

    _compare_by_size()
    golds = {text: _parsed(reference_reading(text)) for text in accepted}
    unread = [text for text, gold in golds.items() if not gold]
    if unread:
        raise ValueError(f"nothing mathematical was found in it, or in a part of it: {unread[0]!r}")
    return any(
        # Else "10:30" would be a third.
        clock_time(answer) == clock_time(text)
        if re.fullmatch(r"[\d: ]+", text) and clock_time(text)
        else verify(
            gold,
            _parsed(reading),
            timeout_seconds=None,
            # "(1, 2)" may be a point, and then "1 < x < 2" is not it.
            allow_set_relation_comp=_INTERVAL.search(text) is not None,
        )
        for text, gold in golds.items()
        for reading in readings(answer, symbols_of(text))
    )


def _parsed(text: str | None) -> list[Any]:
    """What math-verify reads; of a formula that is one as a whole, all or nothing."""
    from math_verify import LatexExtractionConfig, parse

    if text is None:
        return []
    if _WHOLE.fullmatch(text):
        latex = [LatexExtractionConfig()]
        return list(parse(text, latex, fallback_mode="no_fallback", parsing_timeout=None))
    return list(parse(text, parsing_timeout=None))


@lru_cache(maxsize=1)
def _compare_by_size() -> None:
    """Let math-verify compare numbers relative to their size, wherever they stand."""
    from math_verify import grader

    plain = grader.sympy_numeric_eq

    def numeric_eq(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
        return bool(plain(a, b, float_rounding, numeric_precision)) and _is_close(a, b)

    grader.sympy_numeric_eq = numeric_eq


def _is_close(a: Any, b: Any) -> bool:
    """Whether two expressions, equal to some decimals, are equal in parts of their size."""
    from math_verify.grader import Float, MatrixBase, Rational, get_pct_val

    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
        # Their elements were compared one by one.
        return True
    tolerance = _FLOAT_TOLERANCE if a.has(Float) or b.has(Float) else _EXACT_TOLERANCE
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    # Somewhere that nothing vanishes.
    place = {symbol: Rational(137 + 10 * i, 100) for i, symbol in enumerate(symbols)}
    for x, y in ((a, b), (get_pct_val(a, a), get_pct_val(b, b))):
        try:
            u, v = (_evaluated(each.doit().subs(place)) for each in (x, y))
        except (TypeError, ValueError, AttributeError):
            # No numbers: math-verify's word for it.
            return True
        if abs(u - v) <= tolerance * max(abs(u), abs(v)):
            return True
    return False


def _evaluated(expression: Any) -> Any:
    """An expression as a number of 30 digits.

    Raises:
        TypeError: It is none.
    """
    number = expression.evalf(30)
    if not number.is_number:
        raise TypeError(f"expected a number, got {number}")
    return number

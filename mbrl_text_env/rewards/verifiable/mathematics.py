"""Answers that are mathematically right or wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mbrl_text_env.rewards.verifiable.answers import (
    checked_extract,
    extract_answer,
    has_reference,
    references,
    unusable_reference,
)
from mbrl_text_env.rewards.verifiable.isolated import IsolatedError, call_isolated, import_optional
from mbrl_text_env.types import FloatArray, Prompt

_DELIMITED = re.compile(r"\$|\\[(\[]|\\boxed|\\begin")
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
_FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|cot|sec|log|ln|exp|pi|infty"
_BARE_FUNCTION = re.compile(rf"(?<![A-Za-z\\])({_FUNCTIONS})(?![A-Za-z])")
_POWER_OF_TEN = re.compile(r"(\d)[eE]([-+]?\d+)")
_WORD = re.compile(r"[^\W\d_]{2,}")
# Reading a formula takes more than linear time; an answer is not longer.
_MAX_FORMULA = 1000
_SOME_NUMBER = "12345.678"
_HERE = "mbrl_text_env.rewards.verifiable.mathematics"


class MathReward:
    r"""1 if the answer is mathematically the reference answer, else 0, by math-verify.

    LaTeX (`\frac{1}{2}`, with or without `$`), plain expressions (`x**2 + 1`, `sqrt(2)`), sets,
    intervals, equations and numbers are compared as `math_verify.verify` does, numbers to six
    decimals. Without `extract`, math-verify looks for the answer in the response by itself:
    "final answer is", `\boxed{}`, the last formula, the last number. Variables of plain expressions
    are single letters.

    Algebra on a text such as `9^{9^{9^9}}` does not end, and math-verify's own limits are signals,
    which reach the main thread only. So it is done in a process that is killed after `seconds`
    (`rewards.verifiable.isolated`), with a limit of memory; a response that exceeds either scores
    0. Threads wait for each other. Not killed, a comparison takes some milliseconds.

    Source: math-verify, https://github.com/huggingface/Math-Verify. Deviation: expressions without
    LaTeX and without words are read as LaTeX too, for math-verify reads plain arithmetic alone.

    Args:
        extract: Where in the response the answer stands; see `rewards.verifiable.answers`.
        seconds: Wall-clock time that one comparison may take.

    Raises:
        ValueError: `seconds` is not positive.
        RewardError: When scoring: the extra `verify` is not installed, or a prompt has no reference
            answer or one that math-verify cannot read, or not compare with a number in time. The
            message names the prompt.

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
    """
    from math_verify import parse, verify

    target = parse(_as_latex(answer), parsing_timeout=None)
    golds = [parse(_as_latex(text), parsing_timeout=None) for text in accepted]
    return any(verify(gold, target, timeout_seconds=None) for gold in golds)


def _as_latex(text: str) -> str:
    """Formulas without prose between dollars; all else as it is."""
    formula = text.strip().rstrip(".")
    bare = _LATEX_COMMAND.sub(" ", _BARE_FUNCTION.sub(" ", formula.replace("sqrt", " ")))
    if len(formula) > _MAX_FORMULA or _DELIMITED.search(text) or _WORD.search(bare):
        return text
    formula = _POWER_OF_TEN.sub(r"\1 \\cdot 10^{\2}", formula)
    return f"${_BARE_FUNCTION.sub(_command, formula).replace('**', '^')}$"


def _command(match: re.Match[str]) -> str:
    return f"\\{match[0]} "

"""Exact, numeric and mathematical answers against cases worked out by hand."""

# ruff: noqa: RUF001 - the signs of other scripts are meant.

from __future__ import annotations

import pickle
import sys
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards.base import RewardError, applies_to, score_responses
from mbrl_text_env.rewards.verifiable.answers import (
    ExactMatchReward,
    NumericReward,
    extract_answer,
    last_number,
)
from mbrl_text_env.rewards.verifiable.mathematics import MathReward
from mbrl_text_env.types import Prompt

REWARDS = {"exact": ExactMatchReward, "numeric": NumericReward, "math": MathReward}


def asked(reference, name="question") -> Prompt:
    return Prompt.from_text("What is it?", name, metadata={"reference_answer": reference})


def score(reward, reference, response) -> float:
    return float(reward.score([asked(reference)], [response])[0])


@pytest.mark.parametrize(
    ("response", "extract", "expected"),
    [
        ("  all of it \n", None, "all of it"),
        (" \n", None, None),
        ("First.\nLast. \n\n", "last line", "Last."),
        ("One line", "last line", "One line"),
        ("<answer>a</answer> no: <answer> b\nc </answer>.", "<answer>", "b\nc"),
        ("<answer>a</answer> <answer>b", "<answer>", None),
        ("<final>a</final>", "<final>", "a"),
        ("answer", "<answer>", None),
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\boxed", r"\frac{1}{2}"),
        (r"\boxed {x}", r"\boxed{}", "x"),
        (r"\boxed{\frac{1}{2}", r"\boxed", None),
        (r"\boxed 5", r"\boxed", "5"),
        (r"$\boxed72$.", r"\boxed", "72"),
        (r"\boxed five", r"\boxed", None),
        ("2 + 2\n#### 4\n", "####", "4"),
        ("#### 3\nNo.\n#### 4 apples\nDone.", "####", "4 apples"),
        ("ANSWER:\n\n 42 \nBye", "Answer:", "42"),
        ("no marker", "Answer:", None),
        ("Answer: ", "Answer:", None),
        ("**Answer:** 42", "Answer:", "42"),
        ("**Answer**: 42", "Answer:", "42"),
        ("**Answer: 42**", "Answer:", "42"),
        ("Answer: **42**", "Answer:", "**42**"),
        ("Answer:**42**", "Answer:", "**42**"),
        ("__Answer:__\n\n42 apples", "Answer:", "42 apples"),
    ],
)
def test_where_the_answer_stands(response, extract, expected):
    assert extract_answer(response, extract) == expected


@pytest.mark.parametrize("reward", REWARDS.values())
@pytest.mark.parametrize("extract", ["", " ", 3])
def test_an_extract_that_says_nothing_is_refused(reward, extract):
    with pytest.raises(ValueError, match="extract: expected None for the whole response"):
        reward(extract)


# The same text


@pytest.mark.parametrize(
    ("options", "reference", "response", "expected"),
    [
        ({}, "Paris", " PARIS\n", 1),
        ({}, "Paris", "Paris.", 0),
        ({}, "Paris", "It is Paris", 0),
        ({}, ["Paris", "Paname"], "paname", 1),
        ({}, "New  York", "new\nyork", 1),
        ({}, "café", "CAFE\u0301", 1),
        ({}, "Straße", "STRASSE", 1),
        ({}, 42, "42", 1),
        ({}, "", "", None),
        ({}, "Paris", "**Paris**", 1),
        ({}, "__init__", "__init__", 1),
        ({}, "init", "__init__", 1),
        ({}, "__init__", "init", 0),
        ({}, "B", "(B)", 1),
        ({}, "B", "B.", 1),
        ({}, "B", "**B**", 1),
        ({}, "B", r"\text{(B)}", 1),
        ({}, "B", "b)", 1),
        ({}, "B", "(A)", 0),
        ({}, "B", "A or B", 0),
        ({}, "B", "Option B", 1),
        ({}, "B", "The correct answer is **(B) Paris**.", 1),
        ({}, "B", "B) Paris\nbecause it is", 1),
        ({}, "B", "b: paris", 1),
        ({}, "B", r"$\boxed{\text{(B) }Paris}$", 1),
        ({}, "B", "“B”", 1),
        ({}, "B", "B) or C)", 0),
        ({}, "B", "A) Paris B) London", 0),
        ({}, "B", "B) Paris and C) Rome", 0),
        ({}, "B", "B) is wrong", 0),
        ({}, "B", "The answer is not B", 0),
        ({}, "B", "B cells", 0),
        ({}, "A", "A dog.", 0),
        ({}, "B", "(" * 20_000, 0),
        ({}, "A", "A+", 0),
        ({}, "A", "a b", 0),
        ({}, ["A", "C"], "[C]", 1),
        ({"extract": "answer is"}, "B", "The answer is (B).", 1),
        ({"extract": "answer is"}, "B", "The answer is Berlin.", 0),
        ({"extract": r"\boxed"}, "B", r"So \boxed{\text{B}}.", 1),
        ({"extract": "####"}, "Paris", "I think so.\n#### Paris", 1),
        ({"extract": "####"}, "Paris", "Paris", 0),
    ],
)
def test_exact_match(options, reference, response, expected):
    if expected is None:
        with pytest.raises(RewardError, match=r"prompt 'question': expected .*got ''"):
            score(ExactMatchReward(**options), reference, response)
    else:
        assert score(ExactMatchReward(**options), reference, response) == expected


@given(st.text())
def test_a_text_matches_itself_and_an_empty_response_nothing(text):
    if text.strip():
        assert score(ExactMatchReward(), text, text) == 1
        assert score(ExactMatchReward(), text, "") == 0


# The same number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 of 16 is 75%, or 3/4", "3/4"),
        ("about 1,234,567.50 in all.", "1234567.5"),
        ("1\u00a0234", "1234"),
        ("1,2,3", "3"),
        ("12,34", "12.34"),
        ("0,125", "0.125"),
        ("1,222", "1222"),
        ("1000,999", "1000.999"),
        ("1.234,56", "1234.56"),
        ("1.234.567", "1234567"),
        ("1.234", "1.234"),
        ("1 000", "1000"),
        ("in 2023 about 1 000 000", "1000000"),
        ("rooms 5 200", "200"),
        (r"1{,}000 or 2\,000", "2000"),
        ("1 1/2", "3/2"),
        ("-2 3/4 or so", "-11/4"),
        ("3 4/3", "4/3"),
        (r"1\frac{1}{2}", "3/2"),
        ("1½", "3/2"),
        ("2^5", "32"),
        ("2**-2", "1/4"),
        ("10³", "1000"),
        ("so 10^3 = 1000", "1000"),
        ("3 × 10⁴", "30000"),
        ("x^2", None),
        ("9^99999", None),
        ("0^-1", None),
        ("€73 and 74€", "74"),
        ("-3.5", "-3.5"),
        ("\u22127", "-7"),
        ("5-3", "3"),
        ("x = -2", "-2"),
        ("-$1,000", "-1000"),
        ("$1,000.", "1000"),
        ("(7)", "7"),
        (".5", "1/2"),
        ("1e3", "1000"),
        ("1.5E-3", "0.0015"),
        (r"1.5 \times 10^{-3}", "0.0015"),
        ("1.5 x 10^3", "1500"),
        ("50 %", "1/2"),
        (r"50\%", "1/2"),
        (r"so \frac{3}{4}", "3/4"),
        (r"\dfrac{-3}{4}", "-3/4"),
        ("٣", "3"),
        ("9" * 1000, "9" * 1000),
        ("9" * 1001, None),
        ("1e1000000000", None),
        ("1/0", None),
        ("It is 1/2.", "1/2"),
        ("5 / 7.5", "7.5"),
        ("x2 and b.5", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text, expected):
    assert last_number(text) == (None if expected is None else Fraction(expected))


@pytest.mark.parametrize(
    ("options", "reference", "response", "expected"),
    [
        ({}, "1500", "6 * 250 = 1,500.", 1),
        ({}, 0.5, "1/2", 1),
        ({}, 1e20, "100000000000000000000", 1),
        ({}, "9007199254740993", "9007199254740992", 0),
        ({}, "73", "- 73", 1),
        ({}, "-73", "- 73", 1),
        ({}, "73", "-73", 0),
        ({}, "73", "so - 73", 0),
        ({}, "1.22", "1,22", 1),
        ({}, "22", "1,22", 0),
        ({}, "1.222", "1,222", 0),
        ({}, "1/3", "0.333", 0),
        ({"abs_tol": 0.001}, "1/3", "0.333", 1),
        ({"abs_tol": 0.0001}, "1/3", "0.333", 0),
        ({"rel_tol": 0.01}, "1000", "1010", 1),
        ({"rel_tol": 0.01}, "1000", "1011", 0),
        ({"rel_tol": 0.01}, "-1000", "-990", 1),
        ({"abs_tol": 5, "rel_tol": 0.01}, "100", "105", 1),
        ({}, ["1", "2"], "2", 1),
        ({}, "2", "2, not 3", 0),
        ({"extract": "####"}, "2", "#### 2\nnot 3", 1),
        ({}, "2", "two", 0),
        ({}, "2", "", 0),
        ({}, "7", "Total: **7**", 1),
        ({}, "-7", "It is negative 7.", 1),
        ({}, "7", "It is negative 7.", 0),
        ({}, "-7", "minus 7", 1),
        ({}, "7", "10 minus 7", 1),
        ({}, "-7", "–7", 1),
        ({}, "7", "pages 1–7, 1 – 7", 1),
        ({}, "7", "10 - 7", 1),
        ({}, "1/2", "50 percent", 1),
        ({}, "1/2", r"\frac12", 1),
        ({}, "5/2", r"2 \cfrac{1}{2}", 1),
    ],
)
def test_numeric(options, reference, response, expected):
    assert score(NumericReward(**options), reference, response) == expected


@given(st.fractions(), st.fractions())
def test_numbers_are_compared_exactly(reference, value):
    expected = float(reference == value)
    assert score(NumericReward(), str(reference), f"It is {value}.") == expected


@pytest.mark.parametrize("name", ["abs_tol", "rel_tol"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_tolerances_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} to be a finite number of at least 0"):
        NumericReward(**{name: value})


def test_a_reference_that_is_no_number_is_an_error_whatever_the_response():
    assert not applies_to(NumericReward(), asked("many"))
    for response in ("3", ""):
        with pytest.raises(
            RewardError, match=r"prompt 'question': expected .*a number, got .*many"
        ):
            score(NumericReward(), ["3", "many"], response)


# The same mathematics


@pytest.mark.parametrize(
    ("reference", "response", "expected"),
    [
        ("1/2", "0.5", 1),
        ("1/2", r"\frac12", 1),
        ("1/2", r"$\frac{2}{4}$", 1),
        (r"\frac{1}{2}", "1/2", 1),
        (r"\frac{1}{2}", "2", 0),
        ("2", r"\frac{1}{2}", 0),
        ("x^2 + 1", "1 + x**2", 1),
        ("x**2 + 1", r"$x^2+1$", 1),
        ("x**2 + 1", "x**2 - 1", 0),
        ("(x+1)/2", r"So we get $\frac{x}{2} + \frac12$.", 1),
        ("(x+1)^2", "x^2 + 2*x + 1", 1),
        ("sqrt(8)", r"2\sqrt{2}", 1),
        ("2*pi", r"$2\pi$", 1),
        ("sin(x)", r"$\cos x$", 0),
        ("42", "The answer is 42.", 1),
        ("42", "The answer is 43.", 0),
        ("42", r"Let me see. \boxed{42}", 1),
        ("{1, 2}", r"$\{2, 1\}$", 1),
        ("(1, 2)", "$(2, 1)$", 0),
        ("x = 3", "3", 1),
        ("3,000", "3000", 1),
        ("50%", "0.5", 1),
        ("1e6", "1000000", 1),
        ("0.0015", "1.5e-3", 1),
        ("3", r"\boxed{1} \boxed{2} \boxed{3}", 0),
        ("3", "1 or 2 or 3, or 4", 0),
        ("3", r"$\{1, 2, 3\}$", 0),
        ("73", "**73**", 1),
        ("-73", "**-73**", 1),
        ("73", "- 73", 1),
        ("73", "- 74", 0),
        ("73", "73!", 1),
        ("120", "5!", 1),
        ("5", "6!", 0),
        ("73", "A: 73", 1),
        ("42", "**Answer:** 42", 1),
        ("42", "Answer: **42**", 1),
        ("73", "€73", 1),
        ("73", "74 €", 0),
        ("7", "≈ 7?", 1),
        ("7", "7 m/s", 1),
        ("7", "7x", 0),
        ("1000000", "1 000 000", 1),
        ("1000", r"$1\,000$", 1),
        ("0", "1 000", 0),
        ("12", "1 2", 0),
        ("1000.99", "1000,99", 1),
        ("1.22", "1,22", 1),
        ("22", "1,22", 0),
        ("0.125", "0,125", 1),
        ("125", "0,125", 0),
        ("1222", "1,222", 1),
        ("1.222", "1,222", 0),
        ("1234.56", "1.234,56", 1),
        ("1, 2", "1.2", 0),
        ("1,2", "2, 1", 1),
        ("1.5", "1 1/2", 1),
        ("1/2", "It is 1 1/2.", 0),
        ("1.5", "It is 1 1/2.", 1),
        ("1 1/2", "1", 0),
        ("0.001", "10^-3", 1),
        ("30000", "3 x 10⁴", 1),
        ("x^2", "x²", 1),
        ("3/2", "1½", 1),
        ("-7", "−7", 1),
        ("7", "−7", 0),
        ("2*x*y", "2xy", 1),
        ("2*x*y", "2xz", 0),
        ("2xy", "x*y*2", 1),
        (r"\sqrt{2}", "√2", 1),
        ("45", "45°", 1),
        ("{-3, 3}", r"\pm 3", 1),
        ("3", r"\pm 3", 0),
        ("[1, 2)", "(1, 2]", 0),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"$\begin{pmatrix} 1 \\ 2 \end{pmatrix}$", 1),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", 0),
        (
            r"\left(\begin{array}{c}1\\2\end{array}\right)",
            r"\boxed{\left(\begin{array}{c}1\\2\end{array}\right)}",
            1,
        ),
        ("1331 and 1728", "1728 and 1331", 1),
        ("1331 and 1728", "1728", 0),
        ("x = 3 or x = 5", "5 or 3", 1),
        ("x = 3 or x = 5", "5", 0),
        (r"x=3 \text{ or } x=5", "$x=5$", 0),
        ("5 cm", "5", 1),
        ("5 cm", "4", 0),
        (r"So \boxed{5}", "5", 1),
        ("6.6e-34", "1.0e-30", 0),
        ("6.6e-34", "0.66e-33", 1),
        ("0.001", "0.0010004", 0),
        ("1/3", "0.333333", 1),
        ("1/12", "0.083333", 1),
        ("1/3", "0.333", 0),
        ("0", "1e-9", 0),
        ("123456.7", "123456.8", 0),
        (r"\frac{1}{2004!}", r"$\frac{1}{2006!}$", 0),
        (r"\frac{1}{2^{99}}", r"$\frac{1}{2^{98}}$", 0),
        (r"\frac{1}{2^{99}}", "2^-99", 1),
        ("x/2^99", "x/2^98", 0),
        ("x/2^99", "x/2^{99}", 1),
        (r"1-\frac{1}{\mathrm{e}}", r"$1+\frac{1}{\mathrm{e}}$", 0),
        (r"1-\frac{1}{\mathrm{e}}", "$1-e^{-1}$", 1),
        (["1", "-1"], "-1", 1),
        ("7", "seven", 0),
        ("7", "A) 7", 1),
        ("7", r"So \boxed{\textbf{(A)}\ 7}.", 1),
        ("7", "A) 7 or B) 8", 0),
        ("7", "(7) 8", 0),
        ("7", "seven (7)", 1),
        ("7", "seven (8)", 0),
        ("7", r"$\approx 7$", 1),
        ("7", r"$\underline{7}$", 1),
        ("7", r"{\bf 7}", 1),
        ("7", "<b>7</b>", 1),
        ("7", r"7\\", 1),
        ("-7", "It is negative 7.", 1),
        ("7", "It is negative 7.", 0),
        (r"\frac{12}{7}", r"$\frac{12}{7} \approx 1.71$", 1),
        (r"\frac{12}{7}", "1.71", 0),
        ("45°", r"45\degree", 1),
        ("[0, 1)", r"0 \le x < 1", 1),
        ("[0, 1)", "0 < x < 1", 0),
        ("(1, 2)", "1 < x < 2", 0),
        ("10:30", "It is 10:30 a.m.", 1),
        ("10:30", "1:3", 0),
        ("12:24", "6:12", 0),
        ("3:4", r"$3\colon 4$", 1),
        ("3:4", "4:3", 0),
        ("7", "", 0),
        ("7", "日本 🙂", 0),
    ],
)
def test_math(reference, response, expected):
    assert score(MathReward(), reference, response) == expected


@pytest.mark.parametrize(
    "reference",
    [
        "18 apples and 5 pears",
        "between 3 and 7",
        "at least 5",
        "5 or more",
        "$5$ apples and $3$ pears",
        "$5$ or so",
        r"x = 3 + \nothing{",
    ],
)
def test_a_reference_that_would_be_read_in_part_is_refused(reference):
    with pytest.raises(RewardError, match=r"prompt 'question': .*nothing mathematical was found"):
        score(MathReward(), reference, "5")


def test_math_after_a_marker():
    reward = MathReward("Answer:")
    assert score(reward, "x + 1", "4 apples.\nAnswer: 1 + x\n5 pears.") == 1
    assert score(reward, "5", "5") == 0


EXPLOSIONS = ["9^{9^{9^9}}", "$9^{9^{9^{9^9}}}$", "9**9**9**9", r"$\binom{10^{9}}{10^{8}}!!$"]


@pytest.mark.parametrize("explosion", EXPLOSIONS)
def test_a_response_that_explodes_scores_0_in_time_and_its_neighbours_are_right(explosion):
    reward = MathReward(seconds=1.0)
    prompts = [asked("9", str(i)) for i in range(4)]
    reward.score(prompts[:1], ["9"])
    began = time.monotonic()
    scores = score_responses(reward, prompts, ["9", explosion, "18/2", "8"]).total
    np.testing.assert_array_equal(scores, [1, 0, 1, 0])
    # Two limits, and a start of the process on a busy machine.
    assert time.monotonic() - began < 60


def test_a_response_is_not_run_as_python(tmp_path):
    target = tmp_path / "written"
    attacks = [
        f"__import__('pathlib').Path({str(target)!r}).touch()",
        f"$__import__('os').system('touch {target}')$",
        f"1 + open({str(target)!r}, 'w').close()",
    ]
    prompts = [asked("1", str(i)) for i in range(3)]
    MathReward().score(prompts, attacks)
    assert not target.exists()


def test_math_in_threads_and_pickled():
    reward = pickle.loads(pickle.dumps(MathReward(seconds=1.5)))  # noqa: S301 - our own
    assert reward.seconds == 1.5
    found: dict[int, list[float]] = {}

    def work(number: int) -> None:
        responses = [str(number), "9^{9^{9^9}}" if number == 2 else "x", f"{2 * number}/2"]
        found[number] = reward.score([asked(str(number))] * 3, responses).tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == {number: [1.0, 0.0, 1.0] for number in range(4)}


def test_a_reference_that_is_no_mathematics_is_an_error_with_the_prompts_name():
    with pytest.raises(RewardError, match=r"prompt 'question': .*nothing mathematical was found"):
        score(MathReward(), "I do not know it", "3")
    with pytest.raises(RewardError, match=r"prompt 'question': .*took longer than 0.5 s"):
        score(MathReward(seconds=0.5), "9^{9^{9^9}} + x", "3")


def test_without_math_verify_the_extra_is_named(monkeypatch):
    from mbrl_text_env.rewards.verifiable.mathematics import load_math_verify

    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RewardError, match=r"pip install 'mbrl-text-env\[verify\]'"):
        load_math_verify()


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_a_limit_of_time_has_to_be_one(seconds):
    with pytest.raises(ValueError, match="seconds to be a finite number above 0"):
        MathReward(seconds=seconds)


# All of them


@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
@pytest.mark.parametrize("extract", [None, "####"])
def test_the_contract(reward, extract):
    responses = ["7", "#### 7", "", "14/2", " \n", "日本 🙂 e\u0301", "7. " * 3333, "x" * 10_000]
    check_reward_model(reward(extract), [asked("7"), asked(["8", 7], "two")], responses)


@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
@pytest.mark.parametrize("metadata", [{}, {"reference_answer": None}, {"reference_answer": []}])
def test_a_prompt_without_a_reference_answer_is_named(reward, metadata):
    prompt = Prompt.from_text("What?", "bare", metadata=metadata)
    assert not applies_to(reward(), prompt)
    assert applies_to(reward(), asked("7"))
    with pytest.raises(
        RewardError, match=r"prompt 'bare': expected metadata\['reference_answer'\]"
    ):
        reward().score([asked("7"), prompt], ["7", "7"])

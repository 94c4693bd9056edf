"""What an answer is read as, before math-verify compares it."""

import pytest

from mbrl_text_env.rewards.verifiable.mathematics import readings, reference_reading, symbols_of


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("**73**", ["$73$"]),
        ("73!", ["$73!$", "$73$"]),
        ("- 73", ["$- 73$", "$73$"]),
        ("1,22", ["$1.22$", "$1,22$"]),
        ("1,222", ["$1,222$"]),
        ("7 m", ["$7 m$", "$7$"]),
        ("So it is 7.", ["So it is 7."]),
        ("The values are 1 1/2.", ["The values are 3/2."]),
        (r"\[x^2\]", ["$x^2$"]),
        ("3 or 5", ["$3$ and $5$"]),
        ("2xy", ["$2xy$"]),
        ("10^-3", ["$10^{-3}$"]),
    ],
)
def test_readings(answer, expected):
    found = readings(answer, frozenset("xy"))
    assert [text for text in found if text in expected] == expected
    assert len(found) <= 2


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("5 cm", "$5$"),
        ("$18", "$18$"),
        ("1331 and 1728", "$1331$ and $1728$"),
        ("$3$ or $5$", "$3$ or $5$"),
        (r"So \boxed{\frac{1}{2}}.", r"$\frac{1}{2}$"),
        ("1,22", "$1,22$"),
        ("5 or more", None),
        ("two of 5", None),
        ("$5$ apples and $3$ pears", None),
    ],
)
def test_a_reference_is_read_as_a_whole_or_not_at_all(reference, expected):
    assert reference_reading(reference) == expected


def test_the_variables_of_a_reference():
    assert symbols_of(r"2*x + \sqrt{y} + sin(z)") == frozenset("xz")
    assert symbols_of("$a b$") == frozenset("ab")

"""Ways of writing numbers, read as the table in the module says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.rewards.verifiable.answers import (
    decimal_commas,
    improper,
    joined_thousands,
    plain_numerals,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,22", "1.22"),
        ("-0,125 or 1000,999", "-0.125 or 1000.999"),
        ("1,222 and 1,222,333", "1,222 and 1,222,333"),
        ("1.222", "1.222"),
        ("1.222,5 and 1.222.333", "1222.5 and 1222333"),
        ("1,2,3 and 1, 2 and v1.2.3", "1,2,3 and 1, 2 and v1.2.3"),
    ],
)
def test_a_comma_is_decimal_where_it_can_be_nothing_else(text, expected):
    assert decimal_commas(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 000", "1000"),
        ("1'000'000.5", "1000000.5"),
        ("-€1 000", "-€1000"),
        ("€1 000", "€1000"),
        ("1 000 2", "1 000 2"),
        ("0 000", "0 000"),
        ("1 000 apples", "1 000 apples"),
    ],
)
def test_spaces_separate_the_thousands_of_a_number_by_itself(text, expected):
    assert joined_thousands(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u22121\u00bd", "-1 1/2"),
        ("10\u00b3 and x\u207b\u00b2", "10^{3} and x^{-2}"),
        ("1\u202f000\u2009000", "1,000,000"),
        (r"1{,}000 or 2\,000", "1,000 or 2,000"),
        ("\u2460 5\u00b0", "\u2460 5\u00b0"),
    ],
)
def test_the_forms_of_unicode_and_latex_become_plain(text, expected):
    assert plain_numerals(text) == expected


@given(st.integers(1, 99), st.integers(1, 99), st.integers(2, 99))
def test_a_mixed_number_is_a_fraction_with_the_same_value(whole, above, below):
    text = f"{whole} {above}/{below}"
    expected = f"{whole * below + above}/{below}" if above < below else text
    assert improper(text) == expected
    assert improper(f"it is -{text}.") == f"it is -{expected}."


@given(st.text(max_size=50))
def test_text_without_digits_is_left_alone(text):
    if not any(character.isnumeric() for character in text):
        assert decimal_commas(text) == improper(text) == joined_thousands(text) == text

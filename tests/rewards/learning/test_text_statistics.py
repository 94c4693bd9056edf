"""Counts of texts, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.rewards.learning.features import STATISTICS, text_statistics
from mbrl_text_env.types import Prompt


def statistics(prompt, response):
    (row,) = text_statistics([Prompt.from_text(prompt)], [response])
    return dict(zip(STATISTICS, row, strict=True))


def test_the_response_by_hand():
    found = statistics("Go", ' "One, two!"\n\n- THREE four?\n')
    expected = {
        "words": math.log(6),
        "sentences": math.log(3),
        "lines": math.log(4),
        "paragraphs": math.log(3),
        "list items": math.log(2),
        "commas": math.log(2),
        "quotation marks": math.log(3),
        "capitals among letters": 6 / 15,
        "starts with a quotation mark": 1.0,
        "ends with a quotation mark": 0.0,
        "ends a sentence": 1.0,
        "empty": 0.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    empty = statistics("Go", " \n")
    assert empty["empty"] == 1.0
    assert empty["capitals among letters"] == empty["starts with a quotation mark"] == 0.0


def test_the_prompt_by_hand():
    prompt = 'Write three sentences with "the sea", and never use the words "blue" and "deep".'
    found = statistics(prompt, "The sea is deep. The sea")
    expected = {
        "wanted phrases that occur": 1.0,
        "wanted phrases, times": math.log(3),
        "unwanted phrases that occur": 0.5,
        "starts with a quoted phrase": 1.0,
        "ends with a quoted phrase": 1.0,
        "sentences, off the prompt's number": math.log(4 / 2),
        "sentences, above the prompt's number": 0.0,
        "words, off the prompt's number": math.log(7 / 4),
        "words, above the prompt's number": math.log(7 / 4),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert statistics("No number.", "One.")["words, off the prompt's number"] == 0.0


@given(prompt=st.text(max_size=60), response=st.text(max_size=200))
def test_any_texts_have_finite_counts(prompt, response):
    row = text_statistics([Prompt.from_text(f"x{prompt}")], [response])
    assert row.shape == (1, len(STATISTICS))
    assert np.isfinite(row).all()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("part", ["a", " ", ". ", "'a", "-\n", '"', "- ", "a-", "\n \n", "1)"])
def test_long_texts_take_no_time(part):
    text = part * 50_000
    assert np.isfinite(text_statistics([Prompt.from_text("x" + text)], [text])).all()


def test_no_texts():
    assert text_statistics([], []).shape == (0, len(STATISTICS))

"""Sentiment against compound scores that were worked out by hand."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.rewards.evaluators.sentiment import SentimentReward, split_sentences
from mbrl_text_env.types import Prompt

PROMPT = Prompt.from_text("How was it?")


def score(response):
    return SentimentReward().score([PROMPT], [response])[0]


def compound(valence):
    """VADER's normalisation of a summed valence, rounded as it does."""
    return round(valence / math.sqrt(valence**2 + 15), 4)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # Valences of the lexicon: good 1.9, great 3.1, terrible -2.1.
        ("It was good.", compound(1.9)),
        ("It was terrible.", compound(-2.1)),
        # An exclamation mark adds 0.292, so the marks have to stay with their sentence.
        ("It was good!", compound(1.9 + 0.292)),
        # Negation multiplies by -0.74.
        ("It was not good.", compound(1.9 * -0.74)),
        ("It was great. It was terrible.", (compound(3.1) + compound(-2.1)) / 2),
        ("It was great. I went home. It was good.", (compound(3.1) + compound(1.9)) / 3),
        ("It was great\nI went home\r\n\r\nIt was good", (compound(3.1) + compound(1.9)) / 3),
        ("1. It was great.\n2. It was good.", (compound(3.1) + compound(1.9)) / 2),
        # From the table of examples of VADER's own documentation.
        ("VADER is smart, handsome, and funny.", 0.8316),
        ("VADER is VERY SMART, handsome, and FUNNY!!!", 0.9342),
    ],
)
def test_scores_worked_out_by_hand(response, expected):
    assert score(response) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("response", ["", " \n\t", "...", "?!", "42.", "I went home."])
def test_no_sentence_and_a_neutral_one_score_zero(response):
    assert score(response) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Really?! Yes...", ["Really?!", "Yes..."]),
        ("It cost 3.50 at example.com, too.", ["It cost 3.50 at example.com, too."]),
        ("A line\nand another\r\n\r\nand a third", ["A line", "and another", "and a third"]),
        ("1. First\n2. Second", ["First", "Second"]),
        ("🙂", ["🙂"]),
        (":)", [":)"]),
        ("", []),
    ],
)
def test_where_a_sentence_ends(text, expected):
    assert split_sentences(text) == expected


def test_thousands_of_marks_take_no_time():
    assert split_sentences("." * 100_000) == []
    assert split_sentences(" " * 100_000 + "!" * 100_000 + "\n" * 100_000) == []


@given(st.lists(st.text(), max_size=5))
def test_scores_lie_between_minus_one_and_one(responses):
    scores = SentimentReward().score([PROMPT] * len(responses), responses)
    assert scores.dtype == np.float64
    assert scores.shape == (len(responses),)
    assert (np.abs(scores) <= 1.0).all()


def test_the_lexicon_is_not_pickled():
    reward = SentimentReward()
    reward.score([PROMPT], ["It was good."])
    assert len(pickle.dumps(reward)) < 200

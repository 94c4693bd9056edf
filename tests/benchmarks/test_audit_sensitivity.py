import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mbrl_text_env.benchmarks.audit.measures import (
    FILLER,
    INTERVENTIONS,
    intervene,
    length_beyond_gold,
)

TEXT = "First it rains. Pi is 3.14 today. Then it stops"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("neutral filler", f"{TEXT}. {FILLER}"),
        ("last sentence again", f"{TEXT}. Then it stops."),
        ("response twice", f"{TEXT}. {TEXT}."),
        ("first sentence last", "Pi is 3.14 today. Then it stops. First it rains."),
        ("exclamation marks", "First it rains! Pi is 3.14 today! Then it stops!"),
        ("'!!!' at the end", f"{TEXT}!!!"),
        ("bold type", f"**{TEXT}**"),
        ("upper case", TEXT.upper()),
    ],
)
def test_by_hand(name, text):
    assert intervene(name, TEXT) == text


def test_additions_keep_the_response_whole():
    for name in ("preamble", "flattery first", "flattery last", "neutral filler"):
        assert TEXT in intervene(name, TEXT)
        assert len(intervene(name, TEXT)) > len(TEXT) + 20


@given(st.text(max_size=200))
def test_any_text_and_always_the_same(text):
    for name in INTERVENTIONS:
        assert intervene(name, text) == intervene(name, text)
        if not text.strip():
            assert intervene(name, text) == text


def test_length_beyond_gold_is_the_partial_correlation():
    """Equals the correlation of what is left of both ranks after a regression on the gold's."""
    proxy, gold, lengths = np.random.default_rng(0).normal(size=(3, 6, 40))
    proxy += gold + lengths
    expected = []
    for rows in zip(proxy, lengths, gold, strict=True):
        p, x, g = (stats.rankdata(row) for row in rows)
        left = [y - np.polyval(np.polyfit(g, y, 1), g) for y in (p, x)]
        expected.append(np.corrcoef(*left)[0, 1])
    found = length_beyond_gold(proxy, gold, lengths)
    assert found.estimate == pytest.approx(np.mean(expected))
    assert found.low > 0.4


def test_length_beyond_gold_where_there_is_nothing_to_explain():
    gold, lengths = np.random.default_rng(0).normal(size=(2, 5, 20))
    assert length_beyond_gold(np.exp(gold), gold, lengths).estimate == 0.0
    assert length_beyond_gold(gold, gold, np.ones((5, 20))) is None

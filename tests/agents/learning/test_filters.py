"""Which answers are learned, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mbrl_text_env.agents.learning import FilterError, FilterSettings, select
from mbrl_text_env.agents.learning.answers import scores_described
from tests.agents.values.worlds import written

ROWS = [
    written("ab", "a", 0.2),
    written("ab", "b", 1.0),
    written("ab", "c", 0.6),
    written("c", "a", 0.6),
    written("c", "b", 0.1),
]


def scores(records):
    return [record.score for record in records]


def kept(rows, **settings):
    return select(rows, FilterSettings(**{"distinct": False, **settings}))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"threshold": 0.6}, [1.0, 0.6, 0.6]),
        # 0.4 of 5 is 2 and of the two with 0.6 the first is taken; 0.5 of 5 is rounded up to 3.
        ({"top_fraction": 0.4}, [1.0, 0.6]),
        ({"top_fraction": 0.5}, [1.0, 0.6, 0.6]),
        ({"top_fraction": 1.0}, [0.2, 1.0, 0.6, 0.6, 0.1]),
        ({"best_of_prompt": 1}, [1.0, 0.6]),
        ({"best_of_prompt": 2}, [1.0, 0.6, 0.6, 0.1]),
        ({"best_of_prompt": 9}, [0.2, 1.0, 0.6, 0.6, 0.1]),
    ],
)
def test_one_filter(settings, expected):
    assert scores(kept(ROWS, **settings)) == expected


def test_of_equal_scores_the_first_is_taken():
    assert kept(ROWS, top_fraction=0.4)[1] is ROWS[2]


def test_a_fraction_is_not_rounded_up_by_floating_point():
    rows = [written("ab", "abcde"[i % 5], float(i)) for i in range(30)]
    assert len(kept(rows, top_fraction=0.1)) == 3


def test_duplicates_are_those_of_one_prompt():
    again = replace(ROWS[1], seed=7)
    assert select([*ROWS, again], FilterSettings()) == ROWS
    # Response "a" is there twice, to two prompts.
    assert ROWS[0].response == ROWS[3].response


def test_a_chain():
    rows = [*ROWS, replace(ROWS[1], seed=7)]
    found = select(rows, FilterSettings(threshold=0.1, top_fraction=0.6, best_of_prompt=1))
    # Without the duplicate five pass the threshold, three of these are the best, one a prompt.
    assert found == [ROWS[1], ROWS[3]]
    assert [record.seed for record in kept(rows, best_of_prompt=2)] == [0, 0, 0, 7]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 1)), min_size=2, max_size=20),
    st.floats(0.01, 1),
    st.integers(1, 4),
)
def test_what_is_kept_scores_no_less_than_what_is_dropped(rows, fraction, n):
    records = [written(prompt, "abc", score) for prompt, score in rows]
    assume(fraction * len(records) > 1)
    found = kept(records, top_fraction=fraction)
    assert len(found) == pytest.approx(fraction * len(records), abs=1)
    dropped = [r.score for r in records if not any(r is other for other in found)]
    assert min(scores(found)) >= max(dropped, default=0)
    best = kept(records, best_of_prompt=n + 1)
    for prompt in "ab":
        own = sorted((r.score for r in records if r.prompt_id == prompt), reverse=True)
        found = sorted((r.score for r in best if r.prompt_id == prompt), reverse=True)
        assert found == own[: n + 1]


@pytest.mark.parametrize(
    ("settings", "left"),
    [(FilterSettings(threshold=1.1), 0), (FilterSettings(threshold=0.7), 1)],
)
def test_too_little_is_left(settings, left):
    with pytest.raises(FilterError) as caught:
        select([*ROWS, ROWS[0]], settings)
    message = str(caught.value)
    assert f"at least two responses, got {left} of 6 (5 of them distinct)" in message
    assert "The 6 scores of 2 prompts range from 0.1 to 1, quartiles 0.2, 0.4 and 0.6" in message
    assert "Lower threshold" in message


def test_nothing_at_all():
    with pytest.raises(FilterError, match=r"got 0 of 0 .* There are no scores"):
        select([], FilterSettings())
    assert scores_described(ROWS).endswith("the most frequent is 0.6 (2 times).")


@pytest.mark.parametrize(
    "setting",
    [
        {"threshold": float("nan")},
        {"top_fraction": 0.0},
        {"top_fraction": 1.5},
        {"best_of_prompt": 0},
    ],
)
def test_settings_out_of_range(setting):
    with pytest.raises(FilterError, match=next(iter(setting))):
        FilterSettings(**setting)

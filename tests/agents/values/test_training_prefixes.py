"""Prefixes: which are cut, what they are called, and which records are refused."""

import numpy as np
import pytest

from mbrl_text_env.agents.values import FitError, cut_prefixes, samples_of
from mbrl_text_env.agents.values.fitted import check_lengths, check_records
from mbrl_text_env.values import LENGTHS
from tests.agents.values.worlds import samples, written

RECORD = written("ab", "abcde", 0.5, logprobs=[-1.0, -2.0, -3.0, -4.0, -5.0])


def cut(*responses, lengths):
    states, owners = cut_prefixes([written("ab", r, 1.0) for r in responses], lengths)
    return [
        (owner.response, len(state.response_ids))
        for state, owner in zip(states, owners, strict=True)
    ]


def test_every_length_below_the_responses_own_gives_a_prefix():
    assert cut("abcde", lengths=(2, 4, 8)) == [("abcde", 2), ("abcde", 4)]
    assert cut("abcde", lengths=(2, 5)) == [("abcde", 2)]  # the whole response teaches nothing
    assert cut("abcde", "abc", lengths=(2, 4)) == [("abcde", 2), ("abcde", 4), ("abc", 2)]


def test_short_responses_give_their_first_half():
    assert cut("abcde", lengths=(8,)) == [("abcde", 2)]
    assert cut("ab", "a", "", lengths=(8,)) == [("ab", 1)]


def test_prefixes_are_the_responses_first_tokens():
    [state], [owner] = cut_prefixes([RECORD], (3,))
    assert owner is RECORD
    assert state.response_ids == RECORD.response_ids[:3]
    assert state.prompt_ids == RECORD.prompt_ids
    assert state.finish_reason is None
    assert state.logprob == -6.0


def test_default_lengths_are_valid():
    check_lengths(LENGTHS)
    assert cut("ab" * 20, lengths=LENGTHS) == [("ab" * 20, n) for n in (8, 16, 24, 32)]


def test_what_cannot_be_cut():
    with pytest.raises(FitError, match="responses of at least 2 tokens, got 2 without"):
        cut("a", "", lengths=(2,))
    for bare in ({"response_ids": (), "logprobs": ()}, {"prompt_ids": ()}):
        with pytest.raises(FitError, match=r"Record of prompt 'ab': expected token ids.*collect"):
            cut_prefixes([written("ab", "abc", 1.0, **bare)], (2,))


def test_samples_hold_scores_lengths_and_one_group_a_prompt():
    owners = [written("b", "aa", 1.0), written("a", "aa", 2.0), written("b", "aa", 3.0)]
    found = samples_of(np.array([[1], [2], [3]], dtype=np.float32), owners, [4, 5, 6])
    assert found.inputs.dtype == np.float64
    assert found.inputs.tolist() == [[1.0], [2.0], [3.0]]
    assert found.scores.tolist() == [1.0, 2.0, 3.0]
    assert found.lengths.tolist() == [4, 5, 6]
    assert found.groups[0] == found.groups[2] != found.groups[1]
    assert (len(found), found.num_prompts) == (3, 2)
    assert samples_of(np.ones((3, 1)), owners).lengths.tolist() == [0, 0, 0]


def test_rows():
    table = samples([[1, 2], [3, 4], [5, 6]], [7, 8, 9], groups=[0, 0, 1], lengths=[1, 2, 3])
    some = table.rows(np.array([2, 0]))
    assert some.inputs.tolist() == [[5, 6], [1, 2]]
    assert (some.scores.tolist(), some.lengths.tolist(), some.groups.tolist()) == (
        [9, 7], [3, 1], [1, 0],
    )  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_that_are_not_finite_name_their_prompt(bad):
    owners = [written("a", "aa", 1.0), written("cab", "aa", 2.0), written("d", "aa", 3.0)]
    with pytest.raises(FitError, match=r"for 2 of 3 prefixes, first for prompt 'cab'"):
        samples_of(np.array([[0.0, 1.0], [1.0, bad], [bad, bad]]), owners)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"reward_name": "length"}, r"one reward model, got those of \['count', 'length'\].*resc"),
        ({"language_model": "other"}, r"one language model, got those of \['other', 'toy'\]"),
        ({"score": 1.0}, r"differ, got 1\.0 2 times: there is no signal"),
    ],
)
def test_records_that_teach_nothing(other, match):
    first = written("a", "aa", 1.0)
    second = written("a", "ab", **{"score": 2.0, **other})
    with pytest.raises(FitError, match=match):
        check_records([first, second])
    check_records([first, written("a", "ab", 2.0)])


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_records(count):
    with pytest.raises(FitError, match=f"at least 2 scored records.*got {count}"):
        check_records([RECORD] * count)


@pytest.mark.parametrize("lengths", [(), (0, 2), (-1,), (2, 2), (4, 2)])
def test_lengths_that_are_none(lengths):
    with pytest.raises(ValueError, match=r"lengths: expected.*increasing order, got"):
        check_lengths(lengths)

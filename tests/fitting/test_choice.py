"""The figures that a fit is judged by."""

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import BaseEstimator

from mbrl_text_env.files import restored, without_nan
from mbrl_text_env.fitting.heads import (
    HeldOut,
    Spread,
    choose,
    cross_spread,
    held_out,
    length_bins,
)
from mbrl_text_env.fitting.report import (
    FitReport,
    LengthReport,
    correlation,
    root_mean_square,
    value_report,
    within_prompt,
)
from tests.agents.values.worlds import samples

NAN = float("nan")


def test_correlation_by_hand():
    # Deviations (-1, 0, 1) and (-1, -1, 2): 3 / sqrt(2 * 6).
    assert correlation(np.array([1.0, 2, 3]), np.array([1.0, 1, 4])) == pytest.approx(
        3 / np.sqrt(12)
    )
    for flat in ([1.0, 2, 3], [5.0, 5, 5]), ([5.0, 5, 5], [1.0, 2, 3]), ([1.0], [2.0]):
        assert np.isnan(correlation(*map(np.array, flat)))


def test_within_prompt_takes_off_what_prompts_and_lengths_differ_by():
    groups, lengths = [0, 0, 0, 0, 1, 1], [2, 2, 4, 4, 2, 2]
    scores = np.array([0.0, 1, 0, 1, 10, 11])
    table = samples(scores, scores, groups, lengths)
    # Right about every prompt's and length's level, and nothing else.
    assert np.isnan(within_prompt(np.array([0.0, 0, 7, 7, 10, 10]), table))
    # Right about each pair, and wrong about the levels.
    assert within_prompt(np.array([50.0, 51, 0, 1, -10, -9]), table) == pytest.approx(1)
    assert within_prompt(-scores, table) == pytest.approx(-1)
    # One pair of three the wrong way: (1 + 1 - 1) / 3.
    assert within_prompt(np.array([0.0, 1, 0, 1, 1, 0]), table) == pytest.approx(1 / 3)


def test_within_prompt_has_no_figure_where_no_prompt_has_two_scores():
    table = samples([1, 2, 3], [1.0, 2.0, 3.0])
    assert np.isnan(within_prompt(table.scores, table))
    # What rounding leaves of large scores that are equal is no signal.
    scores = np.repeat([123456.7, 7654321.9], 3)
    equal = samples(scores, scores, groups=[0, 0, 0, 1, 1, 1])
    assert np.isnan(within_prompt(scores, equal))


rows = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 3), *[st.integers(-9, 9)] * 2),
    min_size=2,
    max_size=24,
)


@given(rows, st.integers(0, 2**16))
def test_within_prompt_does_not_depend_on_order_level_or_scale(table, seed):
    groups, lengths, guess, scores = map(np.array, zip(*table, strict=True))
    found = within_prompt(guess.astype(float), samples(scores, scores, groups, lengths))
    order = np.random.default_rng(seed).permutation(len(table))
    level = np.array([100.0, -50, 3, 0.5])[groups] + lengths
    again = within_prompt(
        (0.25 * guess + level)[order], samples(scores, scores, groups, lengths).rows(order)
    )
    assert again == pytest.approx(found, nan_ok=True, abs=1e-9)
    assert np.isnan(found) or -1 - 1e-9 <= found <= 1 + 1e-9


def test_length_bins_pool_neighbours_that_are_rare():
    lengths = np.repeat([2, 4, 8, 16], [3, 1, 2, 1])
    found = [sorted(set(lengths[rows])) for rows in length_bins(lengths, least=2)]
    assert found == [[2], [4, 8, 16]]
    found = [sorted(set(lengths[rows])) for rows in length_bins(lengths, least=4)]
    assert found == [[2, 4, 8, 16]]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 30))
def test_length_bins_divide_the_rows_in_order(lengths, least):
    lengths = np.array(lengths)
    bins = length_bins(lengths, least)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    assert len(bins) == 1 or min(map(len, bins)) >= least
    for one, other in itertools.pairwise(bins):
        assert lengths[one].max() < lengths[other].min()


def test_a_spread_is_the_error_by_length():
    lengths = np.repeat([4, 8], 20)
    errors = np.tile([1.0, -1.0], 20) * np.where(lengths == 4, 2.0, 6.0)
    spread = Spread.fit(errors, lengths)
    assert spread.knots.tolist() == [4, 8]
    assert spread.stds.tolist() == [2, 6]
    assert spread.at([0, 4, 6, 8, 100]).tolist() == [2, 2, 4, 6, 6]
    assert root_mean_square(np.array([3.0, -4.0])) == pytest.approx(np.sqrt(12.5))


class Remembers(BaseEstimator):
    """Predicts the mean score of the prompts that it has seen; refuses those."""

    def fit(self, inputs, scores):
        self.seen_, self.mean_ = set(inputs[:, 0]), scores.mean()
        return self

    def predict(self, inputs):
        assert self.seen_.isdisjoint(inputs[:, 0])
        return np.full(len(inputs), self.mean_)


@given(st.lists(st.integers(0, 8), min_size=2, max_size=40))
def test_held_out_never_divides_a_prompt(groups):
    table = samples(groups, np.arange(len(groups)), groups)
    guess = held_out(Remembers(), table)
    if table.num_prompts < 2:
        assert guess is None
        return
    for group in set(groups):
        assert len(set(guess.folds[table.groups == group])) == 1
    for fold in set(guess.folds):
        rest = table.scores[guess.folds != fold].mean()
        assert set(guess.mean[guess.folds == fold]) == {rest}


class Guessing(BaseEstimator):
    """One of the inputs."""

    def __init__(self, column):
        self.column = column

    def fit(self, inputs, scores):
        return self

    def predict(self, inputs):
        return inputs[:, self.column]


def test_choose_takes_what_ranks_best_within_prompts():
    # The first input knows the prompts' levels, the second the order, the third the wrong order.
    scores = np.array([10.0, 11, 20, 21, 30, 31])
    order = 20 + scores % 10
    inputs = np.column_stack([scores - scores % 10, order, 40 - scores])
    table = samples(inputs, scores, groups=[0, 0, 1, 1, 2, 2])
    heads = {"levels": Guessing(0), "order": Guessing(1), "wrong": Guessing(2)}
    best, guess = choose(heads, table)
    assert best == "order"
    assert guess.mean.tolist() == order.tolist()


def test_choose_does_not_take_chance_for_skill():
    """The first ranks one pair rightly and is far off; the mean score would be nearer."""
    scores = np.array([0.0, 1, 0, 1])
    inputs = np.column_stack([[5.0, 9, 9, 9], [2.0, 1, 1, 2], scores])
    table = samples(inputs, scores, groups=[0, 0, 1, 1])
    assert choose({"far": Guessing(0), "near": Guessing(1)}, table)[0] == "near"
    assert choose({f"{i}": Guessing(i) for i in range(3)}, table)[0] == "2"


def test_choose_takes_the_smaller_error_where_prompts_have_one_score_each():
    scores = np.array([1.0, 2, 3, 4])
    table = samples(np.column_stack([scores + 9, scores + 1, scores + 1]), scores)
    assert choose({f"{i}": Guessing(i) for i in range(3)}, table)[0] == "1"


def test_choose_takes_the_first_where_nothing_can_be_left_out():
    table = samples(np.ones((3, 3)), [1, 2, 3], groups=[0, 0, 0])
    assert choose({"b": Guessing(0), "a": Guessing(1)}, table) == ("b", None)


def test_cross_spread_is_that_of_the_other_parts():
    table = samples(np.zeros(4), np.zeros(4))
    guess = HeldOut(np.array([3.0, -3.0, 1.0, -1.0]), np.array([0, 0, 1, 1]))
    assert cross_spread(guess, table).tolist() == [1, 1, 3, 3]


def test_a_report_by_hand():
    scores = np.array([0.0, 1, 4, 5])
    table = samples(scores, scores, groups=[0, 0, 1, 1], lengths=[2, 2, 4, 4])
    found = value_report(np.array([0.0, 1, 5, 2]), np.array([1.0, 1, 1, 1]), table, num_records=2)
    assert (found.num_records, found.num_prompts, found.num_prefixes) == (2, 2, 4)
    # Errors 0, 0, 1 and -3.
    assert found.std == found.z_std == pytest.approx(np.sqrt(10 / 4))
    assert (found.within_one_std, found.within_two_std) == (0.75, 0.75)
    assert found.correlation == pytest.approx(np.corrcoef([0, 1, 5, 2], scores)[0, 1])
    # Deviations (-.5, .5, 1.5, -1.5) and (-.5, .5, -.5, .5): -1 / sqrt(5 * 1).
    assert found.within_prompt == pytest.approx(-1 / np.sqrt(5))
    short, long = found.by_length
    assert (short.length, short.num_prefixes, short.within_prompt, short.std) == (
        2, 2, pytest.approx(1), 0.0,
    )  # fmt: skip
    assert (long.length, long.within_prompt, long.std) == (
        4, pytest.approx(-1), pytest.approx(np.sqrt(5)),
    )  # fmt: skip
    half = value_report(np.array([0.0, 1, 5, 2]), np.array([0.0, 0, 0.5, 1]), table, num_records=2)
    assert half.z_std == pytest.approx(np.sqrt((4 + 9) / 4))
    assert (half.within_one_std, half.within_two_std) == (0.5, 0.75)


def test_prefixes_without_lengths_have_no_report_by_length():
    scores = np.array([1.0, 2])
    assert value_report(scores, np.ones(2), samples(scores, scores), 2).by_length == ()


def test_one_prompt_alone_has_no_figures():
    table = samples([1, 2, 3], [1.0, 2, 6], groups=[0, 0, 0], lengths=[4, 4, 8])
    found = value_report(None, None, table, num_records=2)
    assert repr(found) == repr(FitReport(2, 1, NAN, NAN, float(np.std([1, 2, 6])), 3))
    assert np.isnan([found.within_one_std, found.within_two_std, found.z_std]).all()


maybe = st.floats(-9, 9) | st.just(NAN)
lengths_reports = st.builds(LengthReport, st.integers(1, 99), st.integers(1, 9), *[maybe] * 3)
reports = st.builds(
    FitReport, st.integers(2, 99), st.integers(1, 9), *[maybe] * 3, st.integers(1, 999),
    *[maybe] * 3, st.lists(lengths_reports, max_size=3).map(tuple),
)  # fmt: skip


@given(reports)
def test_reports_come_back_from_json(found):
    text = json.dumps(without_nan(asdict(found)), allow_nan=False)
    # NaN is no equal of itself; written out it is.
    assert repr(restored(FitReport, json.loads(text))) == repr(found)

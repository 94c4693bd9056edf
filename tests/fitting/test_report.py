"""Figures of fits, computed by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.files import restored, without_nan
from mbrl_text_env.fitting.report import (
    bradley_terry_loss,
    pair_report,
    regression_report,
    split_by_group,
)
from mbrl_text_env.rewards import RewardFitError, RewardFitReport

LOG3 = math.log(3)


def test_pairs_by_hand():
    # Margins log 3, 0, -log 3: probabilities 3/4, 1/2, 1/4 of the chosen response.
    report = pair_report(
        np.array([LOG3, 1.0, 0.0]), np.array([0.0, 1.0, LOG3]), "aab", [[9, 1], [2, 2], [1, 9]]
    )
    assert report.accuracy == pytest.approx(0.5)
    assert report.longer_wins == pytest.approx(0.5)
    loss = -(math.log(3 / 4) + math.log(1 / 2) + math.log(1 / 4)) / 3
    assert report.log_loss == pytest.approx(loss)
    assert (report.num_pairs, report.num_prompts) == (3, 2)
    # The model is sure with 1/2 once and with 3/4 twice, of which it is right in one.
    assert [entry.count for entry in report.calibration] == [1, 0, 2, 0, 0]
    assert report.calibration[0].observed == 0.5
    assert report.calibration[2].predicted == pytest.approx(0.75)
    assert report.calibration[2].observed == 0.5
    assert report.ece == pytest.approx(2 / 3 * 0.25)


def test_very_sure_pairs_have_finite_losses():
    assert bradley_terry_loss(np.array([-1e4])) == 1e4
    assert bradley_terry_loss(np.array([1e4])) == 0.0


margins = st.lists(st.floats(-50, 50), min_size=1, max_size=30)


@given(margins=margins)
def test_bins_hold_every_pair_and_flipping_mirrors(margins):
    values = np.array(margins)
    zeros, lengths = np.zeros(len(values)), np.ones((len(values), 2))
    report = pair_report(values, zeros, range(len(values)), lengths)
    flipped = pair_report(zeros, values, range(len(values)), lengths)
    assert sum(entry.count for entry in report.calibration) == len(values)
    assert report.accuracy + flipped.accuracy == pytest.approx(1.0)
    right = sum(e.count * e.observed for e in report.calibration if e.count)
    assert right == pytest.approx(report.accuracy * len(values))
    for entry in report.calibration:
        if entry.count:
            assert entry.low - 1e-12 <= entry.predicted <= entry.high + 1e-12
    assert 0 <= report.ece <= 1


def test_a_calibrated_model_has_a_small_error():
    rng = np.random.default_rng(0)
    values = rng.normal(scale=2, size=20_000)
    wins = rng.random(len(values)) < 1 / (1 + np.exp(-values))
    signed = np.where(wins, values, -values)
    lengths = np.ones((len(values), 2))
    calibrated = pair_report(signed, np.zeros(len(values)), range(len(values)), lengths)
    boastful = pair_report(3 * signed, np.zeros(len(values)), range(len(values)), lengths)
    assert calibrated.ece < 0.01 < 0.05 < boastful.ece


def test_regression_by_hand():
    scores, predicted = np.array([1.0, 2.0, 4.0, 5.0]), np.array([1.0, 2.0, 5.0, 4.0])
    report = regression_report(predicted, scores, ["a", "a", "b", "b"], [1, 2, 3, 4])
    assert report.r2 == pytest.approx(1 - 2 / 10)
    assert report.correlation == pytest.approx(0.9)
    assert report.within_prompt == pytest.approx(0.0)
    assert (report.num_pairs, report.accuracy, report.longer_wins) == (2, 0.5, 1.0)
    flat = regression_report(predicted, np.ones(4), ["a", "a", "b", "b"], [1, 2, 3, 4])
    assert flat.num_pairs == 0
    assert math.isnan(flat.accuracy)
    assert math.isnan(flat.r2)


@given(
    groups=st.lists(st.integers(0, 30), min_size=5, max_size=60).filter(lambda g: len(set(g)) > 4),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_splits_do_not_leak(groups, share, seed):
    held_out = split_by_group(groups, share, seed)
    out, kept = (
        {g for g, o in zip(groups, held_out, strict=True) if o == side} for side in (True, False)
    )
    assert not out & kept
    assert out
    assert len(kept) >= 3
    np.testing.assert_array_equal(held_out, split_by_group(groups, share, seed))


def test_splits_that_cannot_be():
    with pytest.raises(RewardFitError, match=r"at least 5 different prompts.*got 4 in 40 rows"):
        split_by_group([0, 1, 2, 3] * 10, 0.2, 0)
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(RewardFitError, match="held_out"):
            split_by_group(range(10), share, 0)


@pytest.mark.parametrize("regression", [False, True])
def test_a_report_comes_back_from_json(regression):
    scores = np.array([0.0, 1.0])
    if regression:
        held_out = regression_report(scores, np.ones(2), ["a", "b"], [1, 2])
    else:
        held_out = pair_report(scores, np.zeros(2), ["a", "b"], [[1, 2], [2, 1]])
    report = RewardFitReport("o", "m", "d", 3, 4, 5, math.nan, held_out, {"C": 0.1})
    text = json.dumps(without_nan(asdict(report)), allow_nan=False)
    # NaN is no equal of itself; written out it is.
    assert repr(restored(RewardFitReport, json.loads(text))) == repr(report)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.statistics import WinRate, mean_interval, simultaneous_intervals, win_rate


def test_a_constant_has_no_interval():
    assert mean_interval(np.full(5, 2.0)).high == 2.0
    assert mean_interval(np.array([3.0])).low == 3.0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=30))
def test_the_interval_holds_the_mean(values):
    found = mean_interval(np.array(values), resamples=499)
    assert found.estimate == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= found.low <= found.estimate + 1e-9
    assert found.estimate - 1e-9 <= found.high <= max(values) + 1e-9


def test_coverage_by_simulation():
    """About 95 of 100 intervals hold the true mean (binomial bounds at one in a thousand)."""
    rng = np.random.default_rng(0)
    trials = 400
    covered = 0
    for _ in range(trials):
        found = mean_interval(rng.exponential(size=60), resamples=499)
        covered += found.low <= 1.0 <= found.high
    assert 0.89 <= covered / trials <= 0.98


def test_simultaneous_intervals_hold_together():
    """All of eight correlated columns at once; intervals of single columns do not."""
    rng = np.random.default_rng(0)
    trials = 200
    together = apart = 0
    for _ in range(trials):
        values = rng.normal(size=(20, 8)) + rng.normal(size=(20, 1))
        found = simultaneous_intervals(values, resamples=999)
        together += all(interval.low <= 0 <= interval.high for interval in found)
        single = [mean_interval(column, resamples=199) for column in values.T[:3]]
        apart += all(interval.low <= 0 <= interval.high for interval in single)
    assert 0.90 <= together / trials <= 0.995
    assert apart < together


def test_simultaneous_intervals_of_odd_columns():
    rng = np.random.default_rng(0)
    usual = rng.normal(size=(12, 2))
    one_differs = np.zeros((12, 1))
    one_differs[3] = 1.0
    found = simultaneous_intervals(np.hstack([usual, np.full((12, 1), 0.1), one_differs]))
    assert (found[2].low, found[2].high) == (found[2].estimate, found[2].estimate)
    assert found[3].low < 0 < found[3].estimate < found[3].high < 1
    # Balanced: the odd column does not blow up the others.
    alone = simultaneous_intervals(usual)
    for interval, other in zip(found, alone, strict=False):
        assert interval.high - interval.low < 1.5 * (other.high - other.low)


def test_win_rate_by_hand():
    found = win_rate(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 3.0, 5.0]))
    assert found == WinRate(wins=1, ties=2, losses=1)
    assert found.rate == 0.5
    assert WinRate(3, 0, 1).rate == 0.75


def test_refusals():
    for wrong in ([], [np.nan, 1.0], [[1.0]]):
        with pytest.raises(ValueError, match="finite"):
            mean_interval(np.array(wrong))
    for wrong in (np.ones((1, 2)), np.ones(3), np.ones((3, 0)), np.full((3, 1), np.inf)):
        with pytest.raises(ValueError, match="at least two rows"):
            simultaneous_intervals(wrong)
    with pytest.raises(ValueError, match="pairs"):
        win_rate(np.ones(2), np.ones(3))

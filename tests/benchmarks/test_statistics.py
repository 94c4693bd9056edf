import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env.benchmarks.statistics import (
    WinRate,
    holm,
    mean_interval,
    paired_differences,
    paired_permutation_test,
    percentile_tail,
    prompt_means,
    simultaneous_intervals,
    smallest_detectable_effect,
    win_rate,
)


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
        with pytest.raises(ValueError, match=r"at least two rows|finite values in 2 dimension"):
            simultaneous_intervals(wrong)
    with pytest.raises(ValueError, match="pairs"):
        win_rate(np.ones(2), np.ones(3))


def row(prompt_id, seed, score, **others):
    return {"prompt_id": prompt_id, "seed": seed, "score": score, **others}


class TestPairs:
    def test_by_prompt_and_seed(self):
        own = [row("a", 0, 1.0), row("b", 0, 2.0), row("b", 1, 3.0), row("c", 0, 4.0)]
        other = [row("b", 1, 0.5), row("a", 0, 0.0), row("d", 0, 9.0), row("b", 2, 9.0)]
        assert paired_differences(own, other).tolist() == [1.0, 2.5]

    def test_rows_without_a_score_are_missing(self):
        own = [row("a", 0, None), row("b", 0, 2.0)]
        found = paired_differences(own, [row("a", 0, 1.0), row("b", 0, 1.0)])
        assert found.tolist() == [1.0]

    def test_refusals(self):
        doubled = [row("a", 0, 1.0), row("a", 0, 1.0)]
        for sides in ((doubled, [row("a", 0, 1.0)]), ([row("a", 0, 1.0)], doubled)):
            with pytest.raises(ValueError, match=r"several for \('a', 0\)"):
                paired_differences(*sides)
        with pytest.raises(ValueError, match="none among 1 and 1"):
            paired_differences([row("a", 0, 1.0)], [row("a", 1, 1.0)])
        with pytest.raises(ValueError, match="finite"):
            paired_differences([row("a", 0, math.nan)], [row("a", 0, 1.0)])


class TestClusters:
    def test_prompt_means_by_hand(self):
        found = prompt_means([1.0, 2.0, 3.0, 7.0], ["b", "a", "b", "a"])
        assert found.tolist() == [2.0, 4.5]

    def test_equals_resampling_prompts_with_all_their_rows(self):
        rng = np.random.default_rng(0)
        table = rng.normal(size=(20, 3)) + rng.normal(size=(20, 1))
        prompts = [f"p{i}" for i in range(20) for _ in range(3)]
        slow = [table[rng.integers(20, size=20)].mean() for _ in range(8000)]
        found = mean_interval(prompt_means(table.ravel(), prompts))
        width = np.quantile(slow, 0.975) - np.quantile(slow, 0.025)
        assert found.estimate == pytest.approx(table.mean())
        assert found.high - found.low == pytest.approx(width, rel=0.08)

    def test_coverage_by_simulation(self):
        """Prompts of different level, three seeds each; as if independent, rows mislead."""
        rng = np.random.default_rng(0)
        trials, covered, naive = 1000, 0, 0
        prompts = np.repeat(np.arange(40), 3).tolist()
        for trial in range(trials):
            values = (rng.normal(size=(40, 3)) + 1.5 * rng.normal(size=(40, 1))).ravel()
            found = mean_interval(prompt_means(values, prompts), resamples=499)
            covered += found.low <= 0 <= found.high
            if trial < 200:
                rows = mean_interval(values, resamples=499)
                naive += rows.low <= 0 <= rows.high
        assert 0.93 <= covered / trials <= 0.97
        assert naive / 200 < 0.85

    def test_refusals(self):
        with pytest.raises(ValueError, match="for each of 2 values, got 1"):
            prompt_means([1.0, 2.0], ["a"])
        with pytest.raises(ValueError, match="finite"):
            prompt_means([], [])


class TestPercentileTail:
    def test_by_hand(self):
        """Student's quantile for 9 degrees of freedom, 2.262, by sqrt(10 / 9): 2.3846 normal."""
        assert percentile_tail(10, 0.95) == pytest.approx(0.00855, abs=1e-5)
        assert percentile_tail(10**6, 0.95) == pytest.approx(0.025, abs=1e-5)

    @pytest.mark.parametrize(("units", "confidence"), [(1, 0.95), (5, 0.0), (5, 1.0)])
    def test_refusals(self, units, confidence):
        with pytest.raises(ValueError, match="two units"):
            percentile_tail(units, confidence)


def p_by_brute_force(tenths):
    """Over all sign patterns, in whole numbers."""
    sums = [
        sum(s * d for s, d in zip(signs, tenths, strict=True))
        for signs in itertools.product((1, -1), repeat=len(tenths))
    ]
    greater = sum(value >= sum(tenths) for value in sums) / len(sums)
    less = sum(value <= sum(tenths) for value in sums) / len(sums)
    return min(1.0, 2 * min(greater, less))


class TestPermutation:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(-4, 4), min_size=1, max_size=8))
    def test_equals_brute_force(self, tenths):
        """Tenths are not exact in binary, so sums that should be equal differ by rounding."""
        found = paired_permutation_test([d / 10 for d in tenths])
        assert found == pytest.approx(p_by_brute_force(tenths))

    def test_fishers_darwin_data(self):
        """Of the 32,768 sign patterns of Darwin's 15 pairs of maize, 863 are as high.

        Fisher, "The Design of Experiments", section 21.
        """
        eighths = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
        found = paired_permutation_test(eighths, resamples=2**15)
        assert found == pytest.approx(2 * 863 / 32768)

    def test_random_patterns_come_near_and_never_to_zero(self):
        rng = np.random.default_rng(0)
        differences = rng.normal(0.4, 1, size=14)
        exact = paired_permutation_test(differences, resamples=2**14)
        near = paired_permutation_test(differences, resamples=9999)
        assert near != exact
        assert near == pytest.approx(exact, rel=0.15)
        assert paired_permutation_test(np.ones(64), resamples=999) == pytest.approx(2 / 1000)

    def test_zeros_change_nothing(self):
        differences = np.random.default_rng(0).normal(0.5, 1, size=10)
        with_zeros = paired_permutation_test(np.append(differences, np.zeros(40)))
        assert with_zeros == paired_permutation_test(differences)
        assert paired_permutation_test(np.zeros(5)) == 1.0

    def test_size_by_simulation(self):
        """Skewed levels, equal agents: a true null is rejected in some 5 of 100 tests."""
        rng = np.random.default_rng(0)
        rejected = 0
        for _ in range(400):
            differences = rng.exponential(size=8) - rng.exponential(size=8)
            rejected += paired_permutation_test(differences, resamples=256) <= 0.05
        assert 0.03 <= rejected / 400 <= 0.07

    def test_refusals(self):
        for wrong in ([], [math.nan], [[1.0]]):
            with pytest.raises(ValueError, match="differences: expected finite"):
                paired_permutation_test(wrong)


class TestHolm:
    def test_by_hand(self):
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
        assert holm([0.2]).tolist() == [0.2]

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
    def test_equals_the_step_down_procedure(self, p_values):
        adjusted = holm(p_values)
        assert (adjusted >= np.array(p_values)).all()
        assert (np.diff(adjusted[np.argsort(p_values, kind="stable")]) >= 0).all()
        for alpha in (0.01, 0.05, 0.3):
            rejected = set()
            for step, i in enumerate(np.argsort(p_values, kind="stable")):
                if p_values[i] * (len(p_values) - step) > alpha:
                    break
                rejected.add(int(i))
            assert set(np.flatnonzero(adjusted <= alpha).tolist()) == rejected

    def test_family_error_by_simulation(self):
        """Among twenty true nulls, a false alarm in at most some 5 of 100 families."""
        uniform = np.random.default_rng(0).uniform(size=(2000, 20))
        alarms = np.mean([holm(family).min() <= 0.05 for family in uniform])
        assert 0.03 <= alarms <= 0.07

    def test_refusals(self):
        for wrong, message in (([], "finite"), ([math.nan], "finite"), ([1.2], "0 to 1")):
            with pytest.raises(ValueError, match=message):
                holm(wrong)


class TestDetectableEffect:
    @pytest.mark.parametrize(("effect", "prompts"), [(0.8, 15), (0.5, 34), (0.2, 199)])
    def test_known_sample_sizes(self, effect, prompts):
        """The smallest sizes for power 0.8 that tables of the paired t-test give."""
        assert smallest_detectable_effect(prompts, 1.0) <= effect
        assert smallest_detectable_effect(prompts - 1, 1.0) > effect

    def test_normal_limit_and_unit(self):
        """(1.96 + 0.8416) sd / sqrt(n)."""
        found = smallest_detectable_effect(10**6, 7.0)
        assert found == pytest.approx(7 * 2.8016 / 1000, rel=1e-3)
        assert smallest_detectable_effect(5, 0.0) == 0.0
        assert smallest_detectable_effect(2, 1.0, alpha=0.001, power=0.999) > 100

    def test_power_of_the_permutation_test_by_simulation(self):
        rng = np.random.default_rng(0)
        effect = smallest_detectable_effect(10, 1.0)
        found = [
            paired_permutation_test(rng.normal(effect, 1, size=10), resamples=1024) <= 0.05
            for _ in range(400)
        ]
        assert 0.74 <= np.mean(found) <= 0.86

    def test_refusals(self):
        for prompts, sd, power in ((1, 1.0, 0.8), (5, -1.0, 0.8), (5, 1.0, 0.01), (5, 1.0, 1.0)):
            with pytest.raises(ValueError, match="two prompts or more"):
                smallest_detectable_effect(prompts, sd, power=power)

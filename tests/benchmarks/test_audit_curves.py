import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.audit.curves import (
    best_of_n_curves,
    best_of_weights,
    expected_scores,
    kl_bound,
    sizes,
    within_sd,
)

# Few different values, so that ties are common.
SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=7)


def by_brute_force(proxy, judged, n):
    """Mean over all subsets; among tied best, each is chosen as often."""
    means = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        means.append(np.mean([judged[i] for i in subset if proxy[i] == top]))
    return np.mean(means)


@settings(max_examples=60)
@given(SCORES, st.data())
def test_equals_the_mean_over_all_subsets(proxy, data):
    judged = data.draw(
        st.lists(st.floats(-3, 3), min_size=len(proxy), max_size=len(proxy)), label="gold"
    )
    for n in range(1, len(proxy) + 1):
        weights = best_of_weights(proxy, n)
        assert weights.sum() == pytest.approx(1.0)
        for scores in (judged, proxy):
            assert weights @ scores == pytest.approx(by_brute_force(proxy, scores, n), abs=1e-12)


def test_weights_by_hand():
    assert best_of_weights([3.0, 1.0, 2.0], 2) == pytest.approx([2 / 3, 0, 1 / 3])
    # Of the three pairs, one is of the tied two and two hold one of them.
    assert best_of_weights([5.0, 1.0, 5.0], 2) == pytest.approx([0.5, 0, 0.5])
    assert best_of_weights([5.0, 1.0, 5.0], 1) == pytest.approx([1 / 3] * 3)
    assert best_of_weights([1.0] * 4, 3) == pytest.approx([0.25] * 4)


def test_large_pools_do_not_overflow():
    weights = best_of_weights(np.arange(3000.0), 1500)
    assert weights.sum() == pytest.approx(1.0)
    assert weights[-1] == pytest.approx(0.5)


@pytest.mark.parametrize("n", [0, 4, -1])
def test_n_out_of_range(n):
    with pytest.raises(ValueError, match=rf"expected 1 to 3 .*got {n}"):
        best_of_weights([1.0, 2.0, 3.0], n)


def test_unbiased_for_best_of_n():
    """Best of 4 uniform scores is 4/5 on average, read off pools of 8."""
    pools = np.random.default_rng(0).uniform(size=(4000, 8))
    means = expected_scores(pools, pools, [4])[:, 0]
    assert means.mean() == pytest.approx(0.8, abs=4 * means.std() / math.sqrt(4000))


def test_sizes_and_kl():
    assert sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert sizes(5) == [1, 2, 4, 5]
    assert kl_bound(2) == pytest.approx(0.1931, abs=1e-4)
    assert kl_bound(64) == pytest.approx(3.1745, abs=1e-4)


def test_choosing_by_a_monotone_transform_is_choosing_by_the_gold():
    gold = np.random.default_rng(0).normal(size=(12, 16))
    curves = best_of_n_curves(np.exp(gold), gold)
    assert curves.efficiency == pytest.approx(1.0)
    assert curves.peak_n == 16
    means = [point.gold.estimate for point in curves.points]
    assert means == sorted(means)
    assert means[0] == pytest.approx(gold.mean())
    assert means[-1] == pytest.approx(gold.max(axis=1).mean())
    assert curves.points[-1].gold_gain.estimate == pytest.approx(
        (means[-1] - means[0]) / within_sd(gold)
    )
    assert all(decline.fall.high < 0 for decline in curves.declines)


def test_a_fall_by_chance_is_rarely_called_one():
    """Gold that has nothing to do with the proxy: 5% of audits may see a fall or a rise."""
    rng = np.random.default_rng(0)
    trials, found = 40, 0
    for _ in range(trials):
        proxy, gold = rng.normal(size=(2, 16, 8))
        found += any(d.fall.low > 0 for d in best_of_n_curves(proxy, gold).declines)
    assert found / trials <= 0.1


def test_a_real_fall_is_found():
    """The gold rises with the proxy up to one standard deviation and falls beyond."""
    proxy = np.random.default_rng(0).normal(size=(24, 64))
    gold = -np.abs(proxy - 1.0)
    curves = best_of_n_curves(proxy, gold)
    assert curves.peak_n in (4, 8)
    assert {d.from_n for d in curves.declines if d.fall.low > 0} >= {4, 8, 16}
    assert curves.at(64).proxy_gain.low > 1.5

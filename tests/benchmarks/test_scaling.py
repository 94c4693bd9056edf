import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mbrl_text_env.benchmarks.scaling import (
    Baseline,
    best_of_weights,
    compute_multiplier,
    expected_best,
    expected_scores,
    kl_bound,
    sizes,
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


@settings(max_examples=60)
@given(arrays(np.float64, (2, 6), elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])))
def test_expected_best_is_the_mean_over_all_subsets(scores):
    found = expected_best(scores, range(1, 7))
    for row, means in zip(scores, found, strict=True):
        for n, mean in enumerate(means, 1):
            assert mean == pytest.approx(
                np.mean([max(subset) for subset in itertools.combinations(row, n)])
            )
    assert found == pytest.approx(expected_scores(scores, scores, range(1, 7)))


def test_expected_best_of_a_large_pool():
    scores = np.arange(3000.0)[None]
    # The highest of n from 0..m-1 is n (m + 1) / (n + 1) - 1 on average.
    for n, mean in zip(
        (1, 7, 1500, 3000), expected_best(scores, (1, 7, 1500, 3000))[0], strict=True
    ):
        assert mean == pytest.approx(n * 3001 / (n + 1) - 1)


@settings(max_examples=25)
@given(st.integers(2, 40), st.integers(0, 10**6))
def test_curves_rise_from_the_mean_to_the_maximum(samples, seed):
    scores = np.random.default_rng(seed).normal(size=(3, samples))
    curves = Baseline(scores, np.ones_like(scores)).curves
    assert (np.diff(curves, axis=1) >= 0).all()
    assert curves[:, 0] == pytest.approx(scores.mean(axis=1))
    assert curves[:, -1] == pytest.approx(scores.max(axis=1))


class TestBaseline:
    def test_costs_with_a_stop_at_the_target_by_hand(self):
        """Two of four samples succeed, for 8 each; the others cost 2 and 4."""
        scores, costs = (
            np.array([[1.0, 0, 0, 1], [0, 0, 0, 0]]),
            np.array([[8.0, 2, 4, 8], [5] * 4]),
        )
        pool = Baseline(scores, costs, np.array([10.0, 0.0]), target=1.0)
        success = np.array([1 / 2, 5 / 6, 1, 1])
        failures = np.cumsum([1 / 2, 1 / 6, 0, 0])
        expected = [10 + 8 * success + 3 * failures, [5, 10, 15, 20]]
        np.testing.assert_allclose(pool.cost_curves, expected)
        assert pool.mean_costs(2) == pytest.approx(np.mean([row[1] for row in expected]))
        assert pool.at_mean_cost(pool.mean_costs(3)).ns.tolist() == pytest.approx([3, 3])
        with pytest.raises(ValueError, match="at least the highest score"):
            Baseline(scores, costs, target=0.5)

    def test_the_costs_with_a_stop_are_those_of_draws(self):
        rng = np.random.default_rng(0)
        scores, costs = (rng.random((1, 12)) < 0.2).astype(float), rng.uniform(1, 9, (1, 12))
        pool, spent = Baseline(scores, costs, target=1.0), []
        for order in (rng.permutation(12) for _ in range(20_000)):
            first = np.flatnonzero(scores[0, order])
            drawn = order[: min(5, first[0] + 1 if len(first) else 12)]
            spent.append(costs[0, drawn].sum())
        assert np.mean(spent) == pytest.approx(pool.mean_costs(5), rel=0.01)

    def test_costs_by_hand(self):
        pool = Baseline(
            np.zeros((2, 2)), np.array([[1.0, 3.0], [4.0, 6.0]]), np.array([10.0, 20.0])
        )
        assert pool.sample_costs.tolist() == [2.0, 5.0]
        assert pool.mean_costs(1) == 15 + 3.5
        assert pool.mean_costs(4) == 15 + 4 * 3.5

    def test_the_expected_cost_is_that_of_all_subsets(self):
        costs = np.random.default_rng(0).exponential(size=(1, 6))
        subsets = list(itertools.combinations(costs[0], 4))
        assert Baseline(costs, costs).mean_costs(4) == pytest.approx(
            np.mean([sum(s) for s in subsets])
        )

    def test_at_cost_by_hand(self):
        scores = np.array([[0.0, 3.0, 6.0], [0.0, 0.0, 3.0]])
        pool = Baseline(scores, np.full((2, 3), 2.0), 1.0)
        # (5 - 1) / 2 = 2 samples, (7 - 1) / 2 = 3.
        found = pool.at_cost([5.0, 7.0])
        assert found.ns.tolist() == [2.0, 3.0]
        assert found.means == pytest.approx([5.0, 3.0])
        assert not found.too_expensive.any()
        assert not found.too_cheap.any()
        # Half way from 1 to 2 in log N.
        between = pool.at_cost(1 + 2 * math.sqrt(2))
        assert between.means == pytest.approx([4.0, 1.5])

    def test_at_cost_beyond_the_pool_is_marked(self):
        pool = Baseline(np.array([[0.0, 4.0], [0.0, 2.0]]), np.ones((2, 2)), 1.0)
        found = pool.at_cost([3.5, 1.5])
        assert found.too_expensive.tolist() == [True, False]
        assert found.too_cheap.tolist() == [False, True]
        assert found.means.tolist() == [4.0, 1.0]

    def test_at_mean_cost_has_one_n(self):
        rng = np.random.default_rng(0)
        pool = Baseline(
            rng.normal(size=(5, 16)), rng.exponential(size=(5, 16)), rng.uniform(size=5)
        )
        found = pool.at_mean_cost(pool.mean_costs(6))
        assert found.ns == pytest.approx([6.0] * 5)
        assert found.means == pytest.approx(pool.curves[:, 5])

    def test_large_pools_are_read_on_a_grid(self):
        scores = np.random.default_rng(0).normal(size=(3, 5000))
        pool = Baseline(scores, np.ones_like(scores))
        assert len(pool.ns) <= 1024
        assert (pool.ns[0], pool.ns[-1]) == (1, 5000)
        found = pool.at_cost(3777.0).means
        assert found == pytest.approx(expected_best(scores, [3777])[:, 0], abs=1e-5)

    def test_curve(self):
        rng = np.random.default_rng(0)
        pool = Baseline(rng.normal(size=(8, 6)), np.full((8, 6), 3.0), 2.0)
        points = pool.curve()
        assert [point.n for point in points] == [1, 2, 4, 6]
        assert [point.cost for point in points] == [5.0, 8.0, 14.0, 20.0]
        assert points[2].mean.low < points[2].mean.estimate < points[2].mean.high
        assert points[2].kl_bound == kl_bound(4)
        assert points[2].mean.estimate == pytest.approx(pool.curves[:, 3].mean())

    @pytest.mark.parametrize(
        ("scores", "costs", "prompt_costs", "message"),
        [
            (np.ones((2, 3)), np.ones((2, 2)), 0.0, "same shape"),
            (np.ones((2, 1)), np.ones((2, 1)), 0.0, "two or more samples"),
            (np.ones(3), np.ones(3), 0.0, "2 dimension"),
            (np.full((2, 2), np.nan), np.ones((2, 2)), 0.0, "finite"),
            (np.ones((2, 2)), np.ones((2, 2)), np.ones(3), "one for each of 2"),
            (np.ones((2, 2)), np.ones((2, 2)), -1.0, "0 or more"),
            (np.ones((2, 2)), np.zeros((2, 2)), 1.0, "above 0"),
        ],
    )
    def test_refusals(self, scores, costs, prompt_costs, message):
        with pytest.raises(ValueError, match=message):
            Baseline(scores, costs, prompt_costs)


def pool_of(rng, prompts, samples, spread=1.0):
    """Scores with prompts of different level, and costs that differ by sample."""
    level = spread * rng.normal(size=(prompts, 1))
    scores = rng.normal(size=(prompts, samples)) + level
    return level, Baseline(scores, rng.integers(20, 97, size=scores.shape).astype(float), 30.0)


def best_of(rng, level, n):
    """Rewards and costs of a real best-of-n, with fresh samples."""
    scores = rng.normal(size=(len(level), n)) + level
    return scores.max(axis=1), 30 + rng.integers(20, 97, size=scores.shape).sum(axis=1)


class TestMultiplier:
    @pytest.mark.parametrize(("samples", "ratio"), [(8, 1), (4, 8)])
    def test_best_of_n_against_itself_and_eight_times_as_much(self, samples, ratio):
        """Estimates centre on the truth, and about 95 of 100 intervals hold it."""
        rng = np.random.default_rng(0)
        trials, covered, estimates = 400, 0, []
        for _ in range(trials):
            level, pool = pool_of(rng, 48, 96)
            rewards, _ = best_of(rng, level, samples * ratio)
            _, costs = best_of(rng, level, samples)
            truth = pool.mean_costs(samples * ratio) / (30 + samples * 58)
            found = compute_multiplier(rewards, costs, pool, resamples=400)
            covered += found.low <= truth <= found.high
            estimates.append(found.estimate / truth)
        assert 0.93 <= covered / trials <= 0.97
        assert np.median(estimates) == pytest.approx(1.0, abs=0.05)

    def test_by_hand(self):
        """Best-of-N of 0, 3, 6 is 3, 5, 6; a reward of 5.5 is half way from 2 to 3 in log N."""
        pool = Baseline(np.tile([0.0, 3.0, 6.0], (4, 1)), np.full((4, 3), 10.0), 5.0)
        found = compute_multiplier(np.full(4, 5.5), np.full(4, 5.0), pool)
        assert found.equal_n == pytest.approx(math.sqrt(6))
        assert found.equal_cost == pytest.approx(5 + 10 * math.sqrt(6))
        assert found.estimate == pytest.approx(1 + 2 * math.sqrt(6))
        # All prompts are alike: nothing varies.
        assert (found.low, found.high) == pytest.approx((found.estimate, found.estimate))
        assert not found.is_lower_bound
        assert not found.is_upper_bound

    def test_above_the_pool_is_a_lower_bound(self):
        _, pool = pool_of(np.random.default_rng(0), 16, 32)
        found = compute_multiplier(pool.scores.max(axis=1) + 1, np.full(16, 300.0), pool)
        assert found.is_lower_bound
        assert not found.is_upper_bound
        assert found.equal_n == 32
        assert found.estimate == pytest.approx(pool.mean_costs(32) / 300)
        assert found.high == math.inf
        assert 0 < found.low <= found.estimate
        data = json.loads(json.dumps(found.as_row("x"), allow_nan=False))
        assert data["x_high"] is None
        assert data["x_is_lower_bound"] is True

    def test_near_the_end_of_the_pool_the_upper_end_is_open(self):
        rng = np.random.default_rng(0)
        _, pool = pool_of(rng, 16, 32)
        rewards = pool.curves[:, 30] + 0.3 * rng.normal(size=16)
        rewards += pool.curves[:, 30].mean() - rewards.mean()
        found = compute_multiplier(rewards, np.full(16, 300.0), pool)
        assert not found.is_lower_bound
        assert found.high == math.inf

    def test_below_a_single_sample_is_an_upper_bound(self):
        _, pool = pool_of(np.random.default_rng(0), 16, 32)
        found = compute_multiplier(pool.scores.min(axis=1) - 1, np.full(16, 300.0), pool)
        assert found.is_upper_bound
        assert not found.is_lower_bound
        assert (found.equal_n, found.low) == (1.0, 0.0)
        assert found.estimate == pytest.approx(pool.mean_costs(1) / 300)

    def test_a_saturated_reward_is_reached(self):
        """Where every sample has the full reward, one of them is as good as the agent."""
        pool = Baseline(np.full((4, 8), 0.1), np.full((4, 8), 2.0))
        found = compute_multiplier(np.full(4, 0.1), np.full(4, 1.0), pool)
        assert (found.estimate, found.is_lower_bound, found.is_upper_bound) == (2.0, False, False)

    @settings(max_examples=20)
    @given(st.integers(0, 10**6), st.floats(0.1, 10))
    def test_units_do_not_matter(self, seed, unit):
        rng = np.random.default_rng(seed)
        level, pool = pool_of(rng, 6, 12)
        rewards, costs = best_of(rng, level, 3)
        scaled = Baseline(3 * pool.scores - 1, unit * pool.costs, unit * pool.prompt_costs)
        ours = compute_multiplier(rewards, costs, pool, resamples=100)
        theirs = compute_multiplier(3 * rewards - 1, unit * costs, scaled, resamples=100)
        for name in ("estimate", "low", "high", "equal_n"):
            assert getattr(theirs, name) == pytest.approx(getattr(ours, name))

    def test_agrees_with_a_slow_bootstrap(self):
        rng = np.random.default_rng(0)
        level, pool = pool_of(rng, 20, 64)
        rewards, costs = best_of(rng, level, 8)
        slow = []
        for _ in range(1500):
            rows = rng.integers(20, size=20)
            drawn = Baseline(pool.scores[rows], pool.costs[rows], pool.prompt_costs[rows])
            n = np.exp(np.interp(rewards[rows].mean(), drawn.curves.mean(axis=0), np.log(drawn.ns)))
            slow.append(drawn.mean_costs(n) / costs[rows].mean())
        found = compute_multiplier(rewards, costs, pool, resamples=4000)
        # Expanded percentiles of 20 prompts at 95%: 1.6% of each end.
        low, high = np.quantile(slow, [0.0159, 0.9841])
        assert found.low == pytest.approx(low, rel=0.06)
        assert found.high == pytest.approx(high, rel=0.06)

    def test_at_mean_cost_is_where_the_multiplier_is_one(self):
        _, pool = pool_of(np.random.default_rng(0), 12, 40)
        same = pool.at_mean_cost(400.0).means
        assert compute_multiplier(same, np.full(12, 400.0), pool).estimate == pytest.approx(1.0)

    def test_costs_that_hang_on_luck_deceive_at_cost(self):
        """An agent that stops at a good sample: its own costs make best-of-N look worse."""
        rng = np.random.default_rng(0)
        pool = Baseline(rng.normal(size=(400, 128)), np.ones((400, 128)))
        drawn = rng.normal(size=(400, 64))
        hits = drawn > 1.8
        spent = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1.0, 64.0)
        fair = pool.at_mean_cost(spent.mean()).means.mean()
        assert pool.at_cost(spent).means.mean() < fair - 0.1

    @pytest.mark.parametrize(
        ("rewards", "costs", "message"),
        [
            (np.ones(3), np.ones(4), "each prompt of the pool"),
            (np.ones(3), np.ones(3), "pool of 4 prompts"),
            (np.full(4, np.nan), np.ones(4), "finite"),
            (np.ones(4), np.zeros(4), "not all 0"),
            (np.ones(4), np.array([-1.0, 1, 1, 1]), "0 or more"),
        ],
    )
    def test_refusals(self, rewards, costs, message):
        pool = Baseline(np.ones((4, 2)), np.ones((4, 2)))
        with pytest.raises(ValueError, match=message):
            compute_multiplier(rewards, costs, pool)

    def test_no_resamples(self):
        pool = Baseline(np.ones((4, 2)), np.ones((4, 2)))
        with pytest.raises(ValueError, match="resamples"):
            compute_multiplier(np.ones(4), np.ones(4), pool, resamples=0)

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.benchmarks.scaling import drawn_best
from mbrl_text_env.benchmarks.statistics import exchange_test


class TestDrawnBest:
    def test_groups_are_disjoint(self):
        pool = np.arange(24.0).reshape(2, 12)
        found = drawn_best(pool, 3)
        assert found.shape == (2, 4)
        for row, own in zip(pool, found, strict=True):
            assert set(own) <= set(row)
            assert len(set(own)) == 4
            assert row.max() in own

    def test_one_and_all(self):
        pool = np.random.default_rng(0).normal(size=(3, 5))
        assert np.sort(drawn_best(pool, 1)) == pytest.approx(np.sort(pool))
        assert drawn_best(pool, 5)[:, 0] == pytest.approx(pool.max(axis=1))

    def test_fractions_are_between_their_neighbours(self):
        pool = np.random.default_rng(0).normal(size=(400, 64))
        two, between, three = (drawn_best(pool, n).mean() for n in (2, 2.5, 3))
        assert two < between < three
        assert between == pytest.approx((two + three) / 2, abs=0.02)

    @pytest.mark.parametrize("n", [0.5, 5.5])
    def test_refusals(self, n):
        with pytest.raises(ValueError, match="1 to 5"):
            drawn_best(np.zeros((2, 5)), n)


class TestExchange:
    def test_by_all_exchanges(self):
        rng = np.random.default_rng(3)
        own, others = rng.normal(size=4) + 0.8, rng.normal(size=(4, 3))
        together = np.column_stack([own, others])
        sums = [sum(row) for row in itertools.product(*together)]
        above = np.mean([total >= own.sum() - 1e-9 for total in sums])
        below = np.mean([total <= own.sum() + 1e-9 for total in sums])
        expected = min(1.0, 2 * min(above, below))
        found = exchange_test(own, others, resamples=20_000)
        assert found == pytest.approx(expected, abs=0.02)

    @pytest.mark.parametrize("count", [2, 3])
    def test_several_answers_by_all_exchanges(self, count):
        """Any two of the scores of each prompt may be the agent's own."""
        rng = np.random.default_rng(count)
        own, others = rng.normal(size=(3, 2)) + 0.8, rng.normal(size=(3, count))
        together = np.column_stack([own, others])
        chosen = itertools.product(*(itertools.combinations(row, 2) for row in together))
        sums = [np.sum(pairs) for pairs in chosen]
        assert len(sums) == math.comb(2 + count, 2) ** 3
        above = np.mean([total >= own.sum() - 1e-9 for total in sums])
        below = np.mean([total <= own.sum() + 1e-9 for total in sums])
        expected = 2 * min(above, below)
        assert 0.05 < expected < 0.9
        found = exchange_test(own, others, resamples=20_000)
        assert found == pytest.approx(expected, abs=0.02)

    @given(seed=st.integers(0, 999), prompts=st.integers(1, 6), count=st.integers(1, 5))
    def test_one_column_is_a_list(self, seed, prompts, count):
        rng = np.random.default_rng(seed)
        own, others = rng.normal(size=prompts), rng.normal(size=(prompts, count))
        found = [exchange_test(x, others, resamples=199, seed=seed) for x in (own, own[:, None])]
        assert found[0] == found[1]

    @pytest.mark.parametrize("own", [50.0, -50.0])
    def test_it_is_two_sided(self, own):
        """One of 10^4 exchanges is as far off, on either side."""
        found = exchange_test(np.full((4, 2), own), np.arange(12.0).reshape(4, 3))
        assert 2 / 10_000 <= found <= 2 * 6 / 10_000

    def test_more_answers_show_the_same_effect_more_surely(self):
        rng, found = np.random.default_rng(5), {1: 0, 2: 0, 4: 0}
        for trial in range(100):
            own, others = rng.normal(size=(8, 4)) + 0.6, rng.normal(size=(8, 12))
            for count in found:
                p = exchange_test(own[:, :count], others, resamples=399, seed=trial)
                found[count] += p < 0.05
        assert found[4] > found[2] + 10 > found[1] + 20

    def test_equal_scores_say_nothing(self):
        assert exchange_test(np.ones(8), np.ones((8, 3))) == 1.0
        assert exchange_test(np.ones((8, 2)), np.ones((8, 3))) == 1.0

    def test_units_do_not_matter(self):
        rng = np.random.default_rng(1)
        own, others = rng.normal(size=12), rng.normal(size=(12, 4))
        assert exchange_test(own, others) == exchange_test(1000 * own, 1000 * others)

    @pytest.mark.parametrize("shape", [(16,), (16, 3)], ids=["one answer", "three"])
    def test_it_is_right_where_scores_are_skewed(self, shape):
        """Near the top of a range differences from an expected score are skewed to one side."""
        rng, wrong = np.random.default_rng(0), np.zeros(2)
        for trial in range(300):
            pool = rng.beta(8, 0.6, size=(16, 60))
            own = rng.beta(8, 0.6, size=(*shape, 6)).max(axis=-1)
            p = exchange_test(own, drawn_best(pool, 6, seed=trial), resamples=399, seed=trial)
            wrong[int(own.mean() > pool.mean())] += p < 0.05
        assert wrong.sum() / 300 < 0.09

    def test_refusals(self):
        with pytest.raises(ValueError, match="same prompts"):
            exchange_test(np.zeros(3), np.zeros((4, 2)))
        with pytest.raises(ValueError, match="same prompts"):
            exchange_test(np.zeros((4, 2)), np.zeros((2, 4)))
        for own in (np.zeros((3, 2, 2)), np.zeros((3, 0)), [[0.0, np.nan]] * 3):
            with pytest.raises(ValueError, match="own"):
                exchange_test(own, np.zeros((3, 2)))

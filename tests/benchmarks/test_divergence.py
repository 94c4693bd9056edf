"""Divergence estimates against distributions whose divergence is known."""

import math

import numpy as np
import pytest

from mbrl_text_env.benchmarks.scaling import contrastive_bound, kl_bound, surprisal_excess


class TestDivergence:
    def test_surprisal_by_hand(self):
        found = surprisal_excess([-5.0, -7.0], [[-3.0, -5.0], [-4.0, -8.0]])
        assert found.estimate == 1.0  # (5 - 4 + 7 - 6) / 2

    def test_surprisal_of_a_narrowed_distribution_is_a_lower_bound(self):
        """Of a known distribution, tilted: entropy falls, and the excess is below the KL."""
        rng = np.random.default_rng(0)
        p = np.full(64, 1 / 64) * rng.uniform(0.5, 1.5, size=64)
        p /= p.sum()
        q = p * np.exp(2 * rng.normal(size=64))
        q /= q.sum()
        kl = (q * np.log(q / p)).sum()
        draws = rng.choice(64, p=q, size=2000), rng.choice(64, p=p, size=(2000, 4))
        found = surprisal_excess(np.log(p)[draws[0]], np.log(p)[draws[1]])
        entropies = [-(x * np.log(x)).sum() for x in (p, q)]
        truth = kl - (entropies[0] - entropies[1])
        assert found.low < truth < found.high
        assert found.high < kl

    @pytest.mark.parametrize("n", [1, 4, 16])
    def test_contrastive_bound_is_nearly_tight_for_best_of_n(self, n):
        rng = np.random.default_rng(n)
        found = [
            contrastive_bound(rng.normal(size=(64, n)).max(axis=1), rng.normal(size=(64, 256)))
            for _ in range(20)
        ]
        mean = np.mean([interval.estimate for interval in found])
        assert kl_bound(n) - 0.15 < mean < kl_bound(n) + 0.02
        assert np.mean([interval.low <= kl_bound(n) for interval in found]) >= 0.9

    def test_contrastive_bound_of_a_discrete_choice_is_below_the_divergence(self):
        """Pass or fail: the best of 4 passes with 1 - 0.7^4; ties are many."""
        rng = np.random.default_rng(0)
        passes = 1 - 0.7**4
        kl = passes * math.log(passes / 0.3) + (1 - passes) * math.log((1 - passes) / 0.7)
        found = [
            contrastive_bound(
                (rng.uniform(size=64) < passes).astype(float),
                (rng.uniform(size=(64, 64)) < 0.3).astype(float),
            ).estimate
            for _ in range(40)
        ]
        assert kl - 0.15 < np.mean(found) <= kl + 0.02

    def test_it_sees_choices_from_below_and_is_capped(self):
        rng = np.random.default_rng(0)
        plain = rng.normal(size=(64, 32))
        below = contrastive_bound(rng.normal(size=(64, 8)).min(axis=1), plain)
        assert below.low > 0.5
        assert contrastive_bound(np.full(64, 99.0), plain).estimate == pytest.approx(
            math.log(33), abs=1e-3
        )

    def test_units_do_not_matter(self):
        rng = np.random.default_rng(0)
        own, plain = rng.normal(size=8), rng.normal(size=(8, 16))
        assert contrastive_bound(own, plain) == contrastive_bound(np.exp(own), np.exp(plain))

    def test_refusals(self):
        with pytest.raises(ValueError, match="2 responses and samples of 3 prompts"):
            surprisal_excess(np.ones(2), np.ones((3, 4)))
        with pytest.raises(ValueError, match="two prompts"):
            contrastive_bound(np.ones(1), np.ones((1, 4)))
        with pytest.raises(ValueError, match="finite"):
            contrastive_bound(np.array([np.nan, 1.0]), np.ones((2, 4)))

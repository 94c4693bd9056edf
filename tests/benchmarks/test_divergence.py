"""Divergence estimates against distributions whose divergence is known."""

import numpy as np
import pytest

from mbrl_text_env.benchmarks.scaling import surprisal_excess


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

    def test_refusals(self):
        with pytest.raises(ValueError, match="2 responses and samples for 3 prompts"):
            surprisal_excess(np.ones(2), np.ones((3, 4)))

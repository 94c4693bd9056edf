"""The scores of tree search by hand, schedules, and noise that is distributed as it should be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.agents.mcts import (
    Children,
    completed_values,
    considered_visits,
    gumbel_interior_scores,
    gumbel_root_scores,
    perturbed_log_priors,
    puct_scores,
    rescaled_values,
    widened,
)


def stats(visits, values, prior=None, **own):
    visits = np.array(visits, float)
    prior = np.full(len(visits), 1 / len(visits)) if prior is None else np.array(prior)
    return Children(visits, np.array(values, float), prior, **{"node_visits": visits.sum(), **own})


class TestPolicies:
    def test_puct_by_hand(self):
        """c = 1.25 + log(19656 / 19652); sqrt(3) x c x (0.2, 0.8) / (3, 2)."""
        children = stats([2, 1], [0.5, 0.1], [0.2, 0.8], node_value=0.3)
        bonus = 3**0.5 * (1.25 + np.log(19656 / 19652)) * np.array([0.2 / 3, 0.8 / 2])
        assert puct_scores(children) == pytest.approx(np.array([1.0, 0.0]) + bonus)

    def test_values_are_rescaled_by_the_node_and_its_children(self):
        assert rescaled_values(stats([1, 1], [2, 3], node_value=1.0)).tolist() == [0.5, 1.0]
        assert rescaled_values(stats([1, 0], [2, 9], node_value=4.0)).tolist() == [0.0, 0.0]
        assert rescaled_values(stats([0, 0], [0, 0])).tolist() == [0.0, 0.0]
        assert rescaled_values(stats([3, 1], [7, 7], node_value=7.0)).tolist() == [0.0, 0.0]

    def test_missing_values_are_completed_by_the_mixed_value(self):
        """Visited: 4 x (0.25 x 8 + 0.25 x 4) / 0.5 = 24; with the node's own 1: 25 / 5 = 5."""
        children = stats([3, 1, 0], [8, 4, 0], [0.25, 0.25, 0.5], raw_value=1.0)
        expected = 0.1 * (50 + 3) * np.array([1.0, 0.0, 0.25])
        assert completed_values(children) == pytest.approx(expected)

    def test_nothing_known_prefers_nothing(self):
        assert completed_values(stats([0, 0], [0, 0])).tolist() == [0.0, 0.0]
        assert gumbel_interior_scores(stats([0, 0], [0, 0], [0.9, 0.1])) == pytest.approx(
            np.array([0.9, 0.1])
        )

    def test_interior_visits_follow_the_improved_policy(self):
        values, visits = np.array([0.2, 0.9, 0.4]), np.zeros(3)
        policy = np.zeros(3)
        for _ in range(600):
            children = stats(visits, values, [0.6, 0.1, 0.3])
            policy = gumbel_interior_scores(children) + visits / (1 + visits.sum())
            visits[np.argmax(gumbel_interior_scores(children))] += 1
        assert visits / 600 == pytest.approx(policy, abs=0.03)

    def test_only_children_whose_turn_it_is_are_visited(self):
        children = stats([2, 1, 1], [0.9, 0.1, 0.2])
        counts = np.array([2, 1, 1])
        scores = gumbel_root_scores(children, np.array([0.0, 9.0, 0.0]), counts, 1)
        assert scores[0] == -np.inf
        assert np.argmax(scores) == 1

    @pytest.mark.parametrize(
        ("considered", "simulations", "schedule"),
        [
            (0, 2, [0, 1]),
            (1, 3, [0, 1, 2]),
            (2, 5, [0, 0, 1, 1, 2]),
            (3, 6, [0, 0, 0, 1, 1, 2]),
            (4, 12, [0] * 4 + [1, 1, 2, 2, 3, 3, 4, 4]),
            (5, 10, [0] * 5 + [1, 1, 2, 2, 3]),
            (8, 16, [0] * 8 + [1] * 4 + [2, 2, 3, 3]),
            (16, 32, [0] * 16 + [1] * 8 + [2] * 4 + [3] * 4),
            (8, 5, [0] * 5),
        ],
    )
    def test_the_schedule_of_sequential_halving(self, considered, simulations, schedule):
        assert list(considered_visits(considered, simulations)) == schedule

    @given(st.integers(1, 40), st.integers(1, 200))
    def test_a_schedule_can_always_be_followed(self, considered, simulations):
        visits = [0] * considered
        for turn in considered_visits(considered, simulations):
            visits[visits.index(turn)] += 1
        assert sum(visits) == simulations

    def test_samples_give_gumbel_noise_plus_log_prior(self):
        """Means log p + 0.5772, variances pi^2 / 6, and the largest is a with probability p(a)."""
        prior, rng = np.array([0.5, 0.3, 0.2]), np.random.default_rng(0)
        found = np.array(
            [
                perturbed_log_priors(counts, rng)
                for counts in rng.multinomial(100, prior, size=4000)
                if counts.min() > 0
            ]
        )
        assert found.mean(axis=0) == pytest.approx(np.log(prior) + 0.57722, abs=0.06)
        assert found.var(axis=0) == pytest.approx(np.full(3, np.pi**2 / 6), rel=0.1)
        firsts = np.bincount(found.argmax(axis=1)) / len(found)
        assert firsts == pytest.approx(prior, abs=0.03)

    def test_widening(self):
        assert [widened(n, 2.0, 0.5) for n in range(6)] == [1, 2, 3, 4, 4, 5]
        assert [widened(n, 3.0, 0.0) for n in (1, 9)] == [3, 3]

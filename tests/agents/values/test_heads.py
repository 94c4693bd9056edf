"""Heads are scikit-learn's models, and lines by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mbrl_text_env.agents.values.heads import (
    BoostedHead,
    LinearHead,
    LinesHead,
    arrays_of,
    boosted_head,
    fit_boosting,
    fit_lines,
    fit_ridge,
    from_arrays,
)
from tests.agents.values.worlds import samples


def random_samples(seed=0, count=80, size=4):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, size)) * 10.0 ** np.arange(-1, size - 1)
    return samples(inputs, np.sin(inputs[:, 1]) + inputs[:, 0] + rng.normal(size=count))


def test_a_linear_head_by_hand():
    head = LinearHead(np.array([2.0, -1.0]), np.array([0.5]))
    assert head.predict(np.array([[1.0, 1.0], [0.0, 3.0]])).tolist() == [1.5, -2.5]
    assert head.predict(np.zeros((0, 2))).shape == (0,)


def test_a_slope_by_hand():
    # Deviations (-1, 1) and (-2, 2): 4 / (2 + 2).
    head = fit_ridge(samples([1, 3], [1, 5]), alpha=2.0)
    assert head.coef.tolist() == pytest.approx([1.0])
    assert head.predict(np.array([[2.0], [3.0]])) == pytest.approx([3.0, 4.0])


@pytest.mark.parametrize("alpha", [0.1, 10.0])
@pytest.mark.parametrize("standardise", [False, True])
def test_ridge_is_that_of_scikit_learn(alpha, standardise):
    table, new = random_samples(), random_samples(1).inputs
    model = Ridge(alpha=alpha)
    reference = make_pipeline(StandardScaler(), model) if standardise else model
    reference.fit(table.inputs, table.scores)
    head = fit_ridge(table, alpha, standardise=standardise)
    assert head.predict(new) == pytest.approx(reference.predict(new), rel=1e-9)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_an_input_that_does_not_vary_has_no_weight(constant):
    table = random_samples()
    wider = replace(table, inputs=np.column_stack([table.inputs, np.full(len(table), constant)]))
    head, without = (fit_ridge(t, 1.0, standardise=True) for t in (wider, table))
    assert head.coef[-1] == 0.0
    assert head.coef[:-1] == pytest.approx(without.coef)
    # Nor does it, where it does vary in what is predicted.
    assert head.predict(np.array([[0.0] * 4 + [9e9]]))[0] == pytest.approx(without.intercept[0])


def test_an_input_that_varies_by_rounding_alone_has_no_weight():
    table = random_samples()
    rounded = np.where(np.arange(len(table)) % 2, 0.1 + 0.2, 0.3)
    wider = replace(table, inputs=np.column_stack([table.inputs, rounded]))
    assert fit_ridge(wider, 1.0, standardise=True).coef[-1] == 0.0


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    depth=st.integers(1, 4),
    trees=st.integers(1, 12),
    rate=st.floats(0.01, 1.0),
)
def test_trees_are_those_of_scikit_learn(seed, depth, trees, rate):
    table = random_samples(seed, count=50)
    model = GradientBoostingRegressor(
        n_estimators=trees, max_depth=depth, learning_rate=rate, random_state=seed
    ).fit(table.inputs, table.scores)
    head = boosted_head(model)
    new = random_samples(seed + 1).inputs
    assert head.predict(new) == pytest.approx(model.predict(new), rel=1e-9, abs=1e-12)
    # On the thresholds themselves, and on their nearest neighbours, too.
    inner = head.left != np.arange(len(head.left))
    for feature, threshold in zip(head.feature[inner], head.threshold[inner], strict=True):
        near = np.tile(new[:1], (5, 1))
        up, down = np.float32(threshold), np.float64(threshold)
        near[:, feature] = [
            threshold,
            np.nextafter(up, np.float32(np.inf)),
            np.nextafter(up, np.float32(-np.inf)),
            np.nextafter(down, np.inf),
            np.nextafter(down, -np.inf),
        ]
        assert head.predict(near) == pytest.approx(model.predict(near), rel=1e-9, abs=1e-12)


def test_trees_of_constant_scores_are_leaves():
    head = fit_boosting(samples(np.arange(60), np.full(60, 2.5)))
    assert head.predict(np.array([[-1.0], [1e9]])).tolist() == [2.5, 2.5]
    assert head.predict(np.zeros((0, 1))).shape == (0,)


def test_boosting_follows_its_seed():
    table, other = random_samples(), random_samples(1).inputs
    once, again, differently = (fit_boosting(table, seed).predict(other) for seed in (0, 0, 1))
    assert once.tolist() == again.tolist()
    assert once.tolist() != differently.tolist()


# One tree, a root and two leaves: 1 up to 0.5, otherwise 2; from 10.
TREE = BoostedHead(
    roots=np.array([0]),
    left=np.array([1, 1, 2]),
    right=np.array([2, 1, 2]),
    feature=np.array([0, 0, 0]),
    threshold=np.array([0.5, 0.0, 0.0]),
    value=np.array([0.0, 1.0, 2.0]),
    initial=np.array([10.0]),
)


def test_a_tree_by_hand():
    assert TREE.predict(np.array([[0.5], [0.6], [-3.0]])).tolist() == [11, 12, 11]


@pytest.mark.parametrize(
    "change",
    [
        {"left": [0, 1, 2]},  # a node that is its own left child alone
        {"right": [0, 1, 2]},
        {"left": [1, 0, 2], "right": [2, 0, 2]},  # back to the root, for ever
        {"left": [9, 1, 2]},
        {"right": [-1, 1, 2]},
        {"roots": [3]},
        {"roots": [-1]},
        {"feature": [-1, 0, 0]},
        {"value": [0.0, 1.0]},
        {"threshold": []},
        {"initial": []},
    ],
)
def test_damaged_trees_are_refused(change):
    damaged = {name: np.array(values, dtype=getattr(TREE, name).dtype)
               for name, values in change.items()}  # fmt: skip
    with pytest.raises(ValueError, match="do not form trees"):
        replace(TREE, **damaged)


def test_lines_by_hand():
    head = LinesHead(np.array([4.0, 8.0]), np.array([1.0, 3.0]), np.array([10.0, 0.0]))
    asked = np.array([[2.0, 4], [2.0, 8], [2.0, 6], [2.0, 1], [2.0, 99]])
    # Between the knots slope 2 and intercept 5; outside, the nearest line.
    assert head.predict(asked).tolist() == [12, 6, 9, 12, 6]


def test_lines_are_least_squares_for_each_length():
    rng = np.random.default_rng(0)
    lengths = np.repeat([4, 8], 30)
    first = rng.normal(size=60)
    scores = np.where(lengths == 4, 2 * first + 1, -first) + rng.normal(size=60)
    head = fit_lines(samples(np.column_stack([first, lengths]), scores, lengths=lengths))
    assert head.knots.tolist() == [4, 8]
    for i, length in enumerate((4, 8)):
        own = lengths == length
        slope, intercept = np.polyfit(first[own], scores[own], 1)
        assert (head.slopes[i], head.intercepts[i]) == pytest.approx((slope, intercept))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_lines_do_not_depend_on_the_rewards_scale(scale):
    first = np.linspace(1, 2, 30) * scale
    lengths = np.full(30, 4)
    head = fit_lines(samples(np.column_stack([first, lengths]), 3 * first, lengths=lengths))
    assert head.slopes == pytest.approx([3.0])


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_a_reward_that_does_not_vary_predicts_the_mean(constant):
    lengths = np.full(30, 4)
    inputs = np.column_stack([np.full(30, constant), lengths])
    head = fit_lines(samples(inputs, np.arange(30), lengths=lengths))
    assert (head.slopes.tolist(), head.intercepts.tolist()) == ([0.0], [14.5])


def test_heads_come_back_from_arrays():
    arrays = {**arrays_of(TREE, "one"), **arrays_of(LinearHead(np.ones(2), np.ones(1)), "two")}
    assert "one.roots" in arrays
    again = from_arrays(BoostedHead, arrays, "one")
    assert all((getattr(again, n) == getattr(TREE, n)).all() for n in vars(TREE))
    del arrays["two.coef"]
    with pytest.raises(KeyError, match=r"two\.coef"):
        from_arrays(LinearHead, arrays, "two")

"""Heads are scikit-learn's models, and lines by hand; their numbers come back from arrays."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.tree import DecisionTreeRegressor

from mbrl_text_env.fitting.folder import numbers_of, with_numbers
from mbrl_text_env.fitting.heads import LinePerLength, scaled_ridge
from tests.agents.values.worlds import samples


def fitted(head, table):
    return clone(head).fit(table.inputs, table.scores)


def random_samples(seed=0, count=80, size=4):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, size)) * 10.0 ** np.arange(-1, size - 1)
    return samples(inputs, np.sin(inputs[:, 1]) + inputs[:, 0] + rng.normal(size=count))


def test_a_slope_by_hand():
    # Deviations (-1, 1) and (-2, 2): 4 / (2 + 2).
    head = fitted(Ridge(alpha=2.0), samples([1, 3], [1, 5]))
    assert head.coef_.tolist() == pytest.approx([1.0])
    assert head.predict(np.array([[2.0], [3.0]])) == pytest.approx([3.0, 4.0])


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_an_input_that_does_not_vary_has_no_weight(constant):
    table = random_samples()
    wider = replace(table, inputs=np.column_stack([table.inputs, np.full(len(table), constant)]))
    head, without = (fitted(scaled_ridge(1.0), t)[-1] for t in (wider, table))
    assert head.coef_[-1] == pytest.approx(0.0, abs=1e-12)
    assert head.coef_[:-1] == pytest.approx(without.coef_)


def test_an_input_that_varies_by_rounding_alone_has_no_weight():
    table = random_samples()
    rounded = np.where(np.arange(len(table)) % 2, 0.1 + 0.2, 0.3)
    wider = replace(table, inputs=np.column_stack([table.inputs, rounded]))
    assert fitted(scaled_ridge(1.0), wider)[-1].coef_[-1] == pytest.approx(0.0, abs=1e-12)


def lines(knots, slopes, intercepts):
    head = LinePerLength()
    head.knots_, head.slopes_, head.intercepts_ = map(np.array, (knots, slopes, intercepts))
    return head


def test_lines_by_hand():
    head = lines([4.0, 8.0], [1.0, 3.0], [10.0, 0.0])
    asked = np.array([[2.0, 4], [2.0, 8], [2.0, 6], [2.0, 1], [2.0, 99]])
    # Between the knots slope 2 and intercept 5; outside, the nearest line.
    assert head.predict(asked).tolist() == [12, 6, 9, 12, 6]


def test_lines_are_least_squares_for_each_length():
    rng = np.random.default_rng(0)
    lengths = np.repeat([4, 8], 30)
    first = rng.normal(size=60)
    scores = np.where(lengths == 4, 2 * first + 1, -first) + rng.normal(size=60)
    head = fitted(
        LinePerLength(), samples(np.column_stack([first, lengths]), scores, lengths=lengths)
    )
    assert head.knots_.tolist() == [4, 8]
    for i, length in enumerate((4, 8)):
        own = lengths == length
        slope, intercept = np.polyfit(first[own], scores[own], 1)
        assert (head.slopes_[i], head.intercepts_[i]) == pytest.approx((slope, intercept))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_lines_do_not_depend_on_the_rewards_scale(scale):
    first = np.linspace(1, 2, 30) * scale
    lengths = np.full(30, 4)
    head = fitted(
        LinePerLength(), samples(np.column_stack([first, lengths]), 3 * first, lengths=lengths)
    )
    assert head.slopes_ == pytest.approx([3.0])


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_a_reward_that_does_not_vary_predicts_the_mean(constant):
    lengths = np.full(30, 4)
    inputs = np.column_stack([np.full(30, constant), lengths])
    head = fitted(LinePerLength(), samples(inputs, np.arange(30), lengths=lengths))
    assert (head.slopes_.tolist(), head.intercepts_.tolist()) == ([0.0], [14.5])


@pytest.mark.parametrize(
    "head", [Ridge(2.0), scaled_ridge(3.0), LinePerLength(), make_pipeline(PCA(2), Ridge())]
)
def test_heads_come_back_from_arrays(head):
    table, new = random_samples(), random_samples(1).inputs
    one = fitted(head, table)
    arrays = numbers_of(one, "one")
    again = with_numbers(head, arrays, "one")
    assert again.predict(new).tolist() == one.predict(new).tolist()
    first = next(iter(arrays))
    with pytest.raises(KeyError, match=first):
        with_numbers(head, {n: a for n, a in arrays.items() if n != first}, "one")


def test_numbers_that_do_not_fit_each_other():
    arrays = numbers_of(fitted(scaled_ridge(1.0), random_samples()), "one")
    cut = {**arrays, "one.standardscaler.mean_": arrays["one.standardscaler.mean_"][1:]}
    with pytest.raises(ValueError, match="StandardScaler that do not fit each other"):
        with_numbers(scaled_ridge(1.0), cut, "one")
    head = with_numbers(scaled_ridge(1.0), arrays, "one")
    with pytest.raises(ValueError, match="expecting 4 features"):
        head.predict(np.ones((1, 5)))


def test_heads_that_are_not_known_are_not_kept():
    tree = fitted(DecisionTreeRegressor(), random_samples())
    with pytest.raises(ValueError, match=r"DecisionTreeRegressor is not kept.*`numbers`"):
        numbers_of(tree, "one")

"""The cheap last parts of value models: plain arrays, fitted once and evaluated with NumPy.

A head knows nothing of models that cost something. So it can be fitted many times on inputs that
were paid for once, and be kept in a file of numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mbrl_text_env.agents.values.prefixes import Samples
from mbrl_text_env.agents.values.validation import length_bins
from mbrl_text_env.types import FloatArray

Arrays = dict[str, npt.NDArray[Any]]
H = TypeVar("H")

# Trees small enough that a few hundred responses do not lead them astray.
_TREES, _DEPTH, _RATE, _LEAST_LEAF, _SHARE = 60, 3, 0.1, 20, 0.5
_TINY = 1e-9


@dataclass(frozen=True)
class LinearHead:
    """A weighted sum of the inputs.

    Args:
        coef: float64[d].
        intercept: float64[1].
    """

    coef: FloatArray
    intercept: FloatArray

    def predict(self, inputs: FloatArray) -> FloatArray:
        """float64[B] for float64[B, d]."""
        return np.asarray(inputs @ self.coef + self.intercept[0])


def fit_ridge(samples: Samples, alpha: float, *, standardise: bool = False) -> LinearHead:
    """Ridge regression; with `standardise`, the penalty is on inputs of variance 1."""
    from sklearn.linear_model import Ridge

    mean, scale = np.zeros(samples.inputs.shape[1]), np.ones(samples.inputs.shape[1])
    if standardise:
        mean, deviation = samples.inputs.mean(axis=0), samples.inputs.std(axis=0)
        # What does not vary says nothing; dividing by rounding errors would make it loud.
        scale = np.where(deviation > _TINY * (1 + np.abs(mean)), deviation, np.inf)
    model = Ridge(alpha=alpha).fit((samples.inputs - mean) / scale, samples.scores)
    coef = np.asarray(model.coef_, dtype=np.float64) / scale
    return LinearHead(coef, np.asarray([float(model.intercept_) - float(mean @ coef)]))


@dataclass(frozen=True)
class BoostedHead:
    """Boosted regression trees, evaluated level by level for all inputs and trees at once.

    The trees of scikit-learn's `GradientBoostingRegressor` (Friedman, 2001), whose arrays are
    public; all nodes lie one after the other.

    Args:
        roots: int64[T], each tree's first node.
        left, right: int64[M], a node's children; a leaf is its own.
        feature: int64[M], input that a node looks at.
        threshold: float64[M]; up to it goes left.
        value: float64[M], what a leaf adds, learning rate included.
        initial: float64[1], the sum's start.
    """

    roots: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    feature: npt.NDArray[np.int64]
    threshold: FloatArray
    value: FloatArray
    initial: FloatArray

    def predict(self, inputs: FloatArray) -> FloatArray:
        """float64[B] for float64[B, d]."""
        # scikit-learn compares inputs that it has rounded to single precision.
        rounded = np.asarray(inputs).astype(np.float32)
        rows = np.arange(len(rounded))[:, None]
        nodes = np.tile(self.roots, (len(rounded), 1))
        while True:
            goes_left = rounded[rows, self.feature[nodes]] <= self.threshold[nodes]
            below = np.where(goes_left, self.left[nodes], self.right[nodes])
            if (below == nodes).all():
                return np.asarray(self.initial[0] + self.value[nodes].sum(axis=1))
            nodes = below

    def __post_init__(self) -> None:
        nodes = np.arange(len(self.left))
        children_follow = ((self.left > nodes) & (self.right > nodes)) | (
            (self.left == nodes) & (self.right == nodes)
        )
        sizes = {len(a) for a in (self.left, self.right, self.feature, self.threshold, self.value)}
        ends = [a.max(initial=0) for a in (self.roots, self.left, self.right)]
        least = min(a.min(initial=0) for a in (self.roots, self.feature))
        # A damaged file must not send `predict` round in circles, nor to other trees' nodes.
        if (
            len(sizes) > 1
            or len(self.initial) != 1
            or least < 0
            or max(ends) >= max(1, len(nodes))
            or not children_follow.all()
        ):
            raise ValueError("trees whose nodes do not form trees")


def fit_boosting(samples: Samples, seed: int = 0) -> BoostedHead:
    """Gradient boosting with small trees, each on half of the rows."""
    from sklearn.ensemble import GradientBoostingRegressor

    model = GradientBoostingRegressor(
        n_estimators=_TREES,
        max_depth=_DEPTH,
        learning_rate=_RATE,
        min_samples_leaf=_LEAST_LEAF,
        subsample=_SHARE,
        random_state=seed,
    ).fit(samples.inputs, samples.scores)
    return boosted_head(model)


def boosted_head(model: Any) -> BoostedHead:
    """Take the trees out of a fitted `GradientBoostingRegressor`."""
    trees = [estimator.tree_ for estimator in model.estimators_[:, 0]]
    sizes = [tree.node_count for tree in trees]
    roots = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    own = np.arange(sum(sizes))
    starts = np.repeat(roots, sizes)

    def joined(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(tree, name) for tree in trees])

    is_leaf = joined("children_left") < 0
    return BoostedHead(
        roots,
        np.where(is_leaf, own, joined("children_left") + starts),
        np.where(is_leaf, own, joined("children_right") + starts),
        np.where(is_leaf, 0, joined("feature")).astype(np.int64),
        joined("threshold").astype(np.float64),
        model.learning_rate * joined("value").reshape(-1).astype(np.float64),
        np.asarray(model.init_.constant_, dtype=np.float64).reshape(1),
    )


@dataclass(frozen=True)
class LinesHead:
    """A line in the first input for every value of the second, the prefix's length.

    Args:
        knots: float64[K], lengths, increasing.
        slopes: float64[K]; between knots they are interpolated, as the intercepts are.
        intercepts: float64[K].
    """

    knots: FloatArray
    slopes: FloatArray
    intercepts: FloatArray

    def predict(self, inputs: FloatArray) -> FloatArray:
        """float64[B] for float64[B, 2]."""
        first, lengths = inputs[:, 0], inputs[:, 1]
        slopes = np.interp(lengths, self.knots, self.slopes)
        return np.asarray(np.interp(lengths, self.knots, self.intercepts) + slopes * first)


def fit_lines(samples: Samples) -> LinesHead:
    """Least squares for each length; neighbouring lengths together where one has few rows."""
    knots, slopes, intercepts = [], [], []
    for rows in length_bins(samples.lengths):
        first, scores = samples.inputs[rows, 0], samples.scores[rows]
        variance = float(np.var(first))
        covariance = float(np.mean((first - first.mean()) * (scores - scores.mean())))
        slope = covariance / variance if variance > _TINY**2 * np.mean(first**2) else 0.0
        knots.append(float(samples.lengths[rows].mean()))
        slopes.append(slope)
        intercepts.append(float(scores.mean() - slope * first.mean()))
    return LinesHead(np.asarray(knots), np.asarray(slopes), np.asarray(intercepts))


def arrays_of(part: Any, prefix: str) -> Arrays:
    """A dataclass of arrays as arrays by name, for a file."""
    return {f"{prefix}.{f.name}": np.ascontiguousarray(getattr(part, f.name)) for f in fields(part)}


def from_arrays(kind: type[H], arrays: Arrays, prefix: str) -> H:
    """Read `arrays_of`.

    Raises:
        KeyError: An array is missing.
    """
    return kind(**{f.name: arrays[f"{prefix}.{f.name}"] for f in fields(kind)})  # type: ignore[arg-type]

"""Heads that scikit-learn does not have ready, and how one of several heads is chosen.

A head is an estimator of scikit-learn: it has `fit(inputs, scores)` and `predict(inputs)`, asks no
model that costs something, and so can be fitted often on features that were paid for once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mbrl_text_env.fitting.report import (
    IntArray,
    Samples,
    root_mean_square,
    split_by_group,
    within_prompt,
)
from mbrl_text_env.types import FloatArray

Head = Any
"""An estimator of scikit-learn, a `Pipeline` too."""

_FOLDS = 5
_REWARD_FOLDS = 4
# Rows that a standard deviation, or a line, is estimated from; lengths with fewer are pooled.
_LEAST_ROWS = 20
# Relative variance that is rounding.
_TINY = 1e-18
# Strengths of the penalty that cross-validation chooses from.
_INVERSE_PENALTIES = tuple(10.0**power for power in range(-5, 2))
_PENALTIES = tuple(10.0**power for power in range(-2, 6))
_HIDDEN_UNITS = 32
_EPOCHS = 400
_PATIENCE = 40
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 1e-2


def scaled_ridge(alpha: float) -> Pipeline:
    """Ridge regression whose penalty is on inputs of variance 1."""
    return make_pipeline(StandardScaler(), Ridge(alpha=alpha))


class LinePerLength(RegressorMixin, BaseEstimator):
    """A least-squares line in the first input for every value of the second, a length.

    Neighbouring lengths with few rows share a line; between `knots_` lines are interpolated.
    """

    numbers = ("knots_", "slopes_", "intercepts_")

    def fit(self, inputs: FloatArray, scores: FloatArray) -> LinePerLength:
        """Fit on float64[N, 2] and float64[N]."""
        bins = length_bins(inputs[:, 1].astype(np.int64))
        means = np.asarray([[*inputs[rows, :2].mean(axis=0), scores[rows].mean()] for rows in bins])
        slopes = []
        for rows, (first, _, score) in zip(bins, means, strict=True):
            deviations = inputs[rows, 0] - first
            variance = float(np.mean(deviations**2))
            covariance = float(np.mean(deviations * (scores[rows] - score)))
            varies = variance > _TINY * np.mean(inputs[rows, 0] ** 2)
            slopes.append(covariance / variance if varies else 0.0)
        self.knots_, self.slopes_ = means[:, 1], np.asarray(slopes)
        self.intercepts_ = means[:, 2] - self.slopes_ * means[:, 0]
        return self

    def predict(self, inputs: FloatArray) -> FloatArray:
        """float64[B] for float64[B, 2]; outside the knots the nearest line holds."""
        first, lengths = inputs[:, 0], inputs[:, 1]
        slopes = np.interp(lengths, self.knots_, self.slopes_)
        return np.asarray(np.interp(lengths, self.knots_, self.intercepts_) + slopes * first)


class HeldOut(NamedTuple):
    """Predictions float64[N] from heads fitted on other prompts, and each row's fold, int64[N]."""

    mean: FloatArray
    folds: IntArray


def held_out(head: Head, samples: Samples) -> HeldOut | None:
    """Predict each prompt's rows from the other prompts'; None where there is only one prompt."""
    if samples.num_prompts < 2:
        return None
    parts = GroupKFold(min(_FOLDS, samples.num_prompts))
    splits = [*parts.split(samples.inputs, groups=samples.groups)]
    folds = np.zeros(len(samples), dtype=np.int64)
    for fold, (_, left_out) in enumerate(splits):
        folds[left_out] = fold
    return HeldOut(cross_val_predict(head, samples.inputs, samples.scores, cv=splits), folds)


def fitted(head: Head, samples: Samples) -> Head:
    """A copy of the head, fitted."""
    return clone(head).fit(samples.inputs, samples.scores)


def choose(heads: Mapping[str, Head], samples: Samples) -> tuple[str, HeldOut | None]:
    """The name of the head that ranks best within prompts left out, and its predictions.

    Search chooses among responses to one prompt, so the correlation within a prompt decides;
    without one, or where all are further off than the mean score, the squared error. The first of
    equals is taken.
    """
    found = {name: held_out(head, samples) for name, head in heads.items()}

    def merit(name: str) -> tuple[bool, float, float]:
        guess = found[name]
        if guess is None:
            return False, 0.0, 0.0
        within = within_prompt(guess.mean, samples)
        error = root_mean_square(guess.mean - samples.scores)
        if error > np.std(samples.scores):
            return False, -error, 0.0
        return True, (-1.0 if np.isnan(within) else within), -error

    best = max(heads, key=merit)
    return best, found[best]


class Spread(NamedTuple):
    """A standard deviation by prefix length: float64[K] at increasing lengths, interpolated."""

    knots: FloatArray
    stds: FloatArray

    @classmethod
    def fit(cls, errors: FloatArray, lengths: IntArray) -> Spread:
        """Root mean square of errors by length."""
        bins = length_bins(lengths)
        return cls(
            np.asarray([lengths[rows].mean() for rows in bins], dtype=np.float64),
            np.asarray([root_mean_square(errors[rows]) for rows in bins]),
        )

    def at(self, lengths: Any) -> FloatArray:
        """float64[B] for int[B]."""
        return np.interp(np.asarray(lengths, dtype=np.float64), self.knots, self.stds)


def cross_spread(guess: HeldOut, samples: Samples) -> FloatArray:
    """float64[N]: the standard deviation of each row by the errors of the other parts' rows."""
    errors = guess.mean - samples.scores
    stds = np.zeros(len(samples))
    for fold in np.unique(guess.folds):
        own = guess.folds == fold
        stds[own] = Spread.fit(errors[~own], samples.lengths[~own]).at(samples.lengths[own])
    return stds


def length_bins(lengths: IntArray, least: int = _LEAST_ROWS) -> list[IntArray]:
    """Row indices by length, neighbouring lengths together where one has too few rows."""
    bins: list[IntArray] = []
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        if bins and len(bins[-1]) < least:
            bins[-1] = np.concatenate([bins[-1], rows])
        else:
            bins.append(rows)
    if len(bins) > 1 and len(bins[-1]) < least:
        last = bins.pop()
        bins[-1] = np.concatenate([bins[-1], last])
    return bins


class LayeredHead(NamedTuple):
    """Layers from features to a score, with a rectifier (max(0, x)) between two.

    Each is its weights float64[d_in, d_out] and bias float64[d_out]; the last d_out is 1.
    """

    layers: tuple[tuple[FloatArray, FloatArray], ...]

    def __call__(self, inputs: FloatArray) -> FloatArray:
        """float64[B, D] to float64[B]."""
        values = inputs
        for i, (weights, bias) in enumerate(self.layers):
            values = (np.maximum(values, 0.0) if i else values) @ weights + bias
        return np.asarray(values[:, 0], dtype=np.float64)

    def moved(self, amount: float) -> LayeredHead:
        """The head with `amount` added to every score."""
        *first, (weights, bias) = self.layers
        return LayeredHead((*first, (weights, bias + amount)))


class Problem(NamedTuple):
    """What a head is fitted on: features float64[B, D] of pairs, or of responses with scores.

    `inputs` of pairs are the chosen ones', beside `rejected`; others have `targets`, float64[B].
    """

    inputs: FloatArray
    groups: IntArray
    rejected: FloatArray | None = None
    targets: FloatArray | None = None

    def subset(self, rows: npt.NDArray[Any]) -> Problem:
        """Some of the rows."""
        return Problem(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]

    def says_nothing(self) -> bool:
        """Whether the inputs are the same for all rows, or both responses of all pairs."""
        if self.rejected is not None:
            return np.array_equal(self.inputs, self.rejected)
        return not np.ptp(self.inputs, axis=0).any()


def fit_linear(problem: Problem, seed: int) -> tuple[LayeredHead, dict[str, Any]]:
    """Choose the penalty by cross-validation over prompts, then fit on all."""
    groups = problem.groups
    folds = GroupKFold(min(_REWARD_FOLDS, len(np.unique(groups))), shuffle=True, random_state=seed)
    sizes = [len(left_out) for _, left_out in folds.split(groups, groups=groups)]

    def mean_scores(results: Mapping[str, Any]) -> FloatArray:
        # By row: a fold of more rows counts for more.
        scores = [results[f"split{i}_test_score"] for i in range(len(sizes))]
        return np.average(scores, axis=0, weights=sizes)

    def best_index(results: Mapping[str, Any]) -> int:
        return int(mean_scores(results).argmax())

    if problem.rejected is not None:
        differences = problem.inputs - problem.rejected
        # Every pair goes in both ways: its loss and that of its mirror image are the same, and the
        # solver wants to see both classes.
        inputs, groups = np.concatenate([differences, -differences]), np.tile(groups, 2)
        targets: npt.NDArray[Any] = np.repeat([1, 0], len(differences))
        model: Any = LogisticRegression(fit_intercept=False, max_iter=1000)
        grid, scoring = {"C": _INVERSE_PENALTIES}, "neg_log_loss"
    else:
        assert problem.targets is not None
        inputs, targets, model = problem.inputs, problem.targets, Ridge()
        grid, scoring = {"alpha": _PENALTIES}, "neg_mean_squared_error"
    search = GridSearchCV(model, grid, scoring=scoring, cv=folds, refit=best_index)
    best = search.fit(inputs, targets, groups=groups).best_estimator_
    weights = np.asarray(best.coef_, dtype=np.float64).reshape(-1, 1)
    head = LayeredHead(((weights, np.asarray(best.intercept_, dtype=np.float64).reshape(1)),))
    loss = -float(mean_scores(search.cv_results_).max())
    return head, {**search.best_params_, "validation_loss": loss}


def fit_mlp(problem: Problem, seed: int) -> tuple[LayeredHead, dict[str, Any]]:
    """One hidden layer by AdamW on all rows at once, stopped by a fifth of the prompts.

    The weights are those of the epoch with the lowest loss on these; it comes with them.
    """
    import torch

    apart = split_by_group(list(problem.groups), 0.2, seed)
    part, rest = problem.subset(~apart), problem.subset(apart)
    shift, scale = 0.0, 1.0
    if part.targets is not None:
        shift, scale = float(part.targets.mean()), float(part.targets.std()) or 1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(problem.inputs.shape[1], _HIDDEN_UNITS),
            torch.nn.ReLU(),
            torch.nn.Linear(_HIDDEN_UNITS, 1),
        ).double()

    def loss(of: Problem) -> torch.Tensor:
        scores = network(torch.from_numpy(of.inputs))[:, 0]
        if of.rejected is not None:
            others = network(torch.from_numpy(of.rejected))[:, 0]
            return torch.nn.functional.softplus(others - scores).mean()
        assert of.targets is not None
        return ((scores - torch.from_numpy((of.targets - shift) / scale)) ** 2).mean()

    optimizer = torch.optim.AdamW(
        network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
    )
    best, best_loss, best_epoch = copy.deepcopy(network), np.inf, 0
    for epoch in range(_EPOCHS):
        optimizer.zero_grad()
        loss(part).backward()
        optimizer.step()
        with torch.no_grad():
            validation = float(loss(rest)) * scale**2
        if validation < best_loss:
            best, best_loss, best_epoch = copy.deepcopy(network), validation, epoch + 1
        elif epoch + 1 - best_epoch >= _PATIENCE:
            break
    first, first_bias, last, last_bias = (p.detach().numpy().T.copy() for p in best.parameters())
    head = LayeredHead(((first, first_bias), (last * scale, last_bias * scale + shift)))
    return head, {"epochs": best_epoch, "validation_loss": best_loss}

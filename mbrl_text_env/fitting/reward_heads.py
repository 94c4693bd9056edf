"""Heads that score responses, fitted on preference pairs or on scores."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mbrl_text_env.fitting.report import bradley_terry_loss
from mbrl_text_env.fitting.samples import IntArray, split_by_group
from mbrl_text_env.types import FloatArray

# Strengths of the penalty that cross-validation chooses from.
_INVERSE_PENALTIES = tuple(10.0**power for power in range(-5, 2))
_PENALTIES = tuple(10.0**power for power in range(-2, 6))
_FOLDS = 4
_HIDDEN_UNITS = 32
_EPOCHS = 400
_PATIENCE = 40
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 1e-2


class LayeredHead(NamedTuple):
    """Layers from features to a score, with a rectifier (max(0, x)) between two.

    Args:
        layers: Weights float64[d_in, d_out] and bias float64[d_out] of each; the last d_out is 1.
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
    """What a head is fitted on: pairs, or responses with scores.

    Args:
        inputs: float64[B, D], features of the responses; of pairs, of the chosen ones.
        groups: int64[B], the prompt of each row.
        rejected: float64[B, D], features of the rejected responses; None without pairs.
        targets: float64[B], scores; None with pairs.
    """

    inputs: FloatArray
    groups: IntArray
    rejected: FloatArray | None = None
    targets: FloatArray | None = None

    def subset(self, rows: npt.NDArray[Any]) -> Problem:
        """Some of the rows."""
        return Problem(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]

    def loss(self, head: LayeredHead) -> float:
        """Mean loss of a head: Bradley-Terry of pairs, in nats; squared error of scores."""
        if self.rejected is not None:
            return bradley_terry_loss(head(self.inputs) - head(self.rejected))
        assert self.targets is not None
        return float(((head(self.inputs) - self.targets) ** 2).mean())

    def says_nothing(self) -> bool:
        """Whether the inputs are the same for all rows, or both responses of all pairs."""
        if self.rejected is not None:
            return np.array_equal(self.inputs, self.rejected)
        return not np.ptp(self.inputs, axis=0).any()


def fit_linear(problem: Problem, seed: int) -> tuple[LayeredHead, dict[str, Any]]:
    """Choose the penalty by cross-validation over prompts, then fit on all.

    Returns:
        The head, and the penalty that was chosen with its mean loss on the folds left out.
    """
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold

    groups = problem.groups
    folds = GroupKFold(min(_FOLDS, len(np.unique(groups))), shuffle=True, random_state=seed)
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

    The weights are those of the epoch with the lowest loss on the prompts that are kept apart.

    Returns:
        The head, and the number of that epoch with its loss.
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

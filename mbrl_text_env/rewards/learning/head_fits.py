"""The optimisation of heads: penalised logistic and ridge regression, and a small network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mbrl_text_env.rewards.learning.fit_report import bradley_terry_loss, split_by_group
from mbrl_text_env.rewards.learning.learned import Head
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


class Problem(NamedTuple):
    """What a head is fitted on: pairs, or responses with scores.

    Args:
        inputs: float64[B, D], features of the responses; of pairs, of the chosen ones.
        groups: int64[B], the prompt of each row.
        rejected: float64[B, D], features of the rejected responses; None without pairs.
        targets: float64[B], scores; None with pairs.
    """

    inputs: FloatArray
    groups: npt.NDArray[np.int64]
    rejected: FloatArray | None = None
    targets: FloatArray | None = None

    def subset(self, rows: npt.NDArray[Any]) -> Problem:
        """Some of the rows."""
        return Problem(
            self.inputs[rows],
            self.groups[rows],
            None if self.rejected is None else self.rejected[rows],
            None if self.targets is None else self.targets[rows],
        )

    def loss(self, head: Head) -> float:
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


def fit_linear(problem: Problem, seed: int) -> tuple[Head, dict[str, Any]]:
    """Choose the penalty by cross-validation over prompts, then fit on all.

    Returns:
        The head, and the penalty that was chosen with its mean loss on the folds left out.
    """
    from sklearn.model_selection import GroupKFold

    is_pairs = problem.rejected is not None
    grid, setting = (_INVERSE_PENALTIES, "C") if is_pairs else (_PENALTIES, "alpha")
    solve = _logistic if is_pairs else _ridge
    losses = np.zeros(len(grid))
    folds = GroupKFold(min(_FOLDS, len(np.unique(problem.groups))), shuffle=True, random_state=seed)
    for fitted_on, left_out in folds.split(problem.inputs, groups=problem.groups):
        part, rest = problem.subset(fitted_on), problem.subset(left_out)
        losses += [rest.loss(solve(part, strength)) * len(left_out) for strength in grid]
    best = int(losses.argmin())
    validation = float(losses[best] / len(problem.inputs))
    return solve(problem, grid[best]), {setting: grid[best], "validation_loss": validation}


def _logistic(problem: Problem, strength: float) -> Head:
    from sklearn.linear_model import LogisticRegression

    assert problem.rejected is not None
    differences = problem.inputs - problem.rejected
    # Every pair goes in both ways: its loss and that of its mirror image are the same, and the
    # solver wants to see both classes.
    inputs = np.concatenate([differences, -differences])
    labels = np.repeat([1, 0], len(differences))
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000)
    weights = np.asarray(model.fit(inputs, labels).coef_, dtype=np.float64)
    return Head(((weights.T, np.zeros(1)),))


def _ridge(problem: Problem, strength: float) -> Head:
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=strength).fit(problem.inputs, problem.targets)
    weights = np.asarray(model.coef_, dtype=np.float64)[:, None]
    return Head(((weights, np.array([float(model.intercept_)])),))


def fit_mlp(problem: Problem, seed: int) -> tuple[Head, dict[str, Any]]:
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
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
    )
    loss = _torch_loss(part, shift, scale)
    best, best_loss, best_epoch = _head(network, shift, scale), np.inf, 0
    for epoch in range(_EPOCHS):
        optimizer.zero_grad()
        loss(network).backward()
        optimizer.step()
        head = _head(network, shift, scale)
        validation = rest.loss(head)
        if validation < best_loss:
            best, best_loss, best_epoch = head, validation, epoch + 1
        elif epoch + 1 - best_epoch >= _PATIENCE:
            break
    return best, {"epochs": best_epoch, "validation_loss": float(best_loss)}


def _torch_loss(problem: Problem, shift: float, scale: float) -> Callable[[Any], Any]:
    import torch

    inputs = torch.from_numpy(problem.inputs)
    if problem.rejected is not None:
        rejected = torch.from_numpy(problem.rejected)
        softplus = torch.nn.functional.softplus
        return lambda network: softplus(network(rejected) - network(inputs)).mean()
    assert problem.targets is not None
    targets = torch.from_numpy((problem.targets - shift) / scale)[:, None]
    return lambda network: ((network(inputs) - targets) ** 2).mean()


def _head(network: Any, shift: float, scale: float) -> Head:
    """A network of torch as a head; its outputs times `scale`, plus `shift`."""
    first, _, last = network
    weights = [
        parameter.detach().numpy().T.copy()
        for parameter in (first.weight, first.bias, last.weight, last.bias)
    ]
    return Head(((weights[0], weights[1]), (weights[2] * scale, weights[3] * scale + shift)))


FITS: Mapping[str, Callable[[Problem, int], tuple[Head, dict[str, Any]]]] = {
    "linear": fit_linear,
    "mlp": fit_mlp,
}
"""How a head is fitted, by its kind."""

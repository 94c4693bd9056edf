"""What the study of world models compares with, and its correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbrl_text_env.rewards.verifiable.constraints.checking import check_counts, count_behind
from mbrl_text_env.types import FloatArray

_RESAMPLES = 2000


@dataclass
class Relabelled:
    """Boosting on prefixes and constraints, each record relabelled with many of them."""

    names: tuple[str, ...]

    def fit(self, rows: FloatArray, ends: FloatArray, sets: Sequence[Any], seed: int) -> Relabelled:
        """Fit on rows float64[N, F], with what they became, each under its share of constraints."""
        from sklearn.ensemble import HistGradientBoostingClassifier

        rng, inputs, labels = np.random.default_rng(seed), [], []
        for constraint in (each for some in sets for each in some):
            chosen = rng.choice(len(rows), max(1, len(rows) // 9), replace=False)
            inputs.append(self._inputs(rows[chosen], constraint))
            labels.append(check_counts(constraint, self._named(ends[chosen])))
        self.calls = sum(map(len, labels))
        self.head = HistGradientBoostingClassifier(random_state=seed)
        self.head.fit(np.vstack(inputs), np.concatenate(labels))
        return self

    def predict(self, rows: FloatArray, constraints: Sequence[Any]) -> FloatArray:
        """The mean probability of the constraints, float64[N]."""
        found = [self.head.predict_proba(self._inputs(rows, each))[:, 1] for each in constraints]
        return np.asarray(np.mean(found, axis=0))

    def _named(self, rows: FloatArray) -> dict[str, FloatArray]:
        return dict(zip(self.names, rows.T, strict=True))

    def _inputs(self, rows: FloatArray, constraint: Mapping[str, Any]) -> FloatArray:
        now = self._named(rows)[count_behind(constraint)[0]]
        value = np.full(len(rows), float(constraint.get("value", 0)))
        relation = ("min", "max", "num", "no").index(constraint["type"].partition("_")[0])
        return np.column_stack([np.full(len(rows), relation), value, now, value - now, rows])


def forest(inputs: FloatArray, labels: FloatArray, rows: FloatArray) -> FloatArray:
    """What trees fitted on inputs float64[N, F] and labels say of rows."""
    from sklearn.ensemble import ExtraTreesRegressor

    forest = ExtraTreesRegressor(100, min_samples_leaf=3, random_state=0).fit(inputs, labels)
    return np.asarray(forest.predict(rows))


def correlations(
    predicted: Mapping[str, FloatArray],
    final: FloatArray,
    cells: Sequence[tuple[int, int]],
    seed: int,
) -> dict[str, FloatArray]:
    """Correlations within (prompt, set) cells: of all, then of resamples of prompts, in one array.

    The resamples of all predictions are the same, so that differences are paired.
    """
    _, cell = np.unique(cells, axis=0, return_inverse=True)
    _, prompt = np.unique([place for place, _ in cells], return_inverse=True)
    cell, count = cell.reshape(-1), int(prompt.max()) + 1
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    weights = np.vstack([np.ones(count), weights])

    def centred(values: FloatArray) -> FloatArray:
        return np.asarray(values - (np.bincount(cell, values) / np.bincount(cell))[cell])

    def summed(values: FloatArray) -> FloatArray:
        return np.asarray(weights @ np.bincount(prompt, values))

    y = centred(final)
    return {
        name: summed(x * y) / np.sqrt(np.maximum(summed(x * x) * summed(y * y), 1e-300))
        for name, x in ((name, centred(values)) for name, values in predicted.items())
    }

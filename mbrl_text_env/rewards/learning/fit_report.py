"""How well a fitted reward does on prompts that it was not fitted on."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mbrl_text_env.types import FloatArray

_LEAST_GROUPS = 5


class RewardFitError(ValueError):
    """Data that a reward cannot be fitted on, or arguments that do not fit each other."""


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs of which the model is about equally sure.

    Args:
        low: Lower end of the bin; the probability of the response that the model prefers.
        high: Upper end.
        count: Pairs in the bin.
        predicted: Their mean predicted probability; NaN without pairs.
        observed: Share of them in which the model's preference is right; NaN without pairs.
    """

    low: float
    high: float
    count: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class PairReport:
    """What a reward says of preference pairs.

    Args:
        num_pairs: Pairs.
        num_prompts: Different prompts among them.
        accuracy: Share of pairs whose chosen response scores higher; a tie counts half.
        log_loss: Mean of -log sigmoid(chosen - rejected), in nats; log 2 = 0.693 is chance.
        longer_wins: Accuracy of preferring the longer response, the usual confound; ties count
            half. Below 0.5 shorter ones are preferred.
        ece: Expected calibration error: mean of |predicted - observed| over the bins, weighted by
            their counts.
        calibration: The bins, from 0.5 to 1.
        chance: Accuracy of guessing.
    """

    num_pairs: int
    num_prompts: int
    accuracy: float
    log_loss: float
    longer_wins: float
    ece: float
    calibration: tuple[CalibrationBin, ...]
    chance: float = 0.5


@dataclass(frozen=True)
class RegressionReport:
    """What a reward says of responses whose score is known.

    Args:
        num_records: Responses.
        num_prompts: Different prompts among them.
        r2: 1 - squared error / variance of the scores; below 0 the mean is the better prediction.
            NaN where all scores are the same.
        correlation: Pearson correlation of prediction and score.
        within_prompt: The same after each prompt's mean is taken off both: what a choice among
            responses to one prompt can use. NaN where no prompt has two different scores.
        num_pairs: Pairs of responses to a prompt whose scores differ.
        accuracy: Share of these that are put in order; a tie counts half, and without pairs it is
            NaN.
        longer_wins: That of preferring the longer response.
        chance: That of guessing.
    """

    num_records: int
    num_prompts: int
    r2: float
    correlation: float
    within_prompt: float
    num_pairs: int
    accuracy: float
    longer_wins: float
    chance: float = 0.5


@dataclass(frozen=True)
class RewardFitReport:
    """A fit: what it was made from, and its figures on prompts that were left out.

    Args:
        objective: `"bradley-terry"` or `"regression"`.
        model: What was fitted, such as `"linear on embedding"` or `"lora"`.
        data: What the preferences or scores come from.
        seed: Split and fit follow from it.
        num_fitted: Pairs or records that the model was fitted on.
        num_fitted_prompts: Different prompts among them.
        fitted_accuracy: Pair accuracy on these; far above the held-out one it is overfitting. NaN
            where it was not measured.
        held_out: The figures on the prompts that were left out.
        chosen: What was chosen by cross-validation, and other settings of the fit.
    """

    objective: str
    model: str
    data: str
    seed: int
    num_fitted: int
    num_fitted_prompts: int
    fitted_accuracy: float
    held_out: PairReport | RegressionReport
    chosen: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN is None."""
        found: dict[str, Any] = _without_nan(asdict(self))
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RewardFitReport:
        """The report of which `as_dict` made `values`.

        Raises:
            KeyError: Something is missing.
            TypeError: Something is unknown.
        """
        held_out = dict(values["held_out"])
        bins = held_out.pop("calibration", None)
        if bins is None:
            report: PairReport | RegressionReport = RegressionReport(**_with_nan(held_out))
        else:
            calibration = tuple(CalibrationBin(**_with_nan(entry)) for entry in bins)
            report = PairReport(calibration=calibration, **_with_nan(held_out))
        others = {key: value for key, value in values.items() if key != "held_out"}
        return cls(held_out=report, **_with_nan(others))


def pair_report(
    chosen: FloatArray,
    rejected: FloatArray,
    groups: Sequence[Hashable],
    lengths: npt.ArrayLike,
    *,
    num_bins: int = 5,
) -> PairReport:
    """Measure scores of preference pairs.

    The probability of a preference is the Bradley-Terry model's, sigmoid(chosen - rejected). The
    calibration curve is that of the response which the model prefers, so it goes from 0.5 to 1; the
    curve over all probabilities is its mirror image at 0.5, since each pair could be asked either
    way. Where both score the same, half of the pair counts as right.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (bins of equal width).

    Args:
        chosen: float64[B], scores of the chosen responses.
        rejected: float64[B].
        groups: B prompts.
        lengths: int[B, 2], characters of the chosen and the rejected response.
        num_bins: Bins of equal width.

    Example:
        >>> report = pair_report(
        ...     np.array([2.0, 0.0]), np.array([0.0, 1.0]), ["a", "b"], [[5, 1], [4, 4]]
        ... )
        >>> report.accuracy, report.longer_wins, sum(entry.count for entry in report.calibration)
        (0.5, 0.75, 2)
    """
    margins = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    confidence = _sigmoid(np.abs(margins))
    right = _wins(margins)
    edges = np.linspace(0.5, 1.0, num_bins + 1)
    place = np.clip(np.digitize(confidence, edges[1:-1]), 0, num_bins - 1)
    bins = []
    for i in range(num_bins):
        inside = place == i
        count = int(inside.sum())
        predicted = float(confidence[inside].mean()) if count else math.nan
        observed = float(right[inside].mean()) if count else math.nan
        bins.append(
            CalibrationBin(float(edges[i]), float(edges[i + 1]), count, predicted, observed)
        )
    errors = [b.count * abs(b.predicted - b.observed) for b in bins if b.count]
    characters = np.asarray(lengths, dtype=np.float64)
    return PairReport(
        num_pairs=len(margins),
        num_prompts=len(set(groups)),
        accuracy=float(right.mean()),
        log_loss=bradley_terry_loss(margins),
        longer_wins=float(_wins(characters[:, 0] - characters[:, 1]).mean()),
        ece=float(sum(errors) / len(margins)),
        calibration=tuple(bins),
    )


def bradley_terry_loss(margins: FloatArray) -> float:
    """Mean of -log sigmoid(margin), in nats, for margins float64[B] of chosen over rejected.

    Example:
        >>> bradley_terry_loss(np.zeros(3)) == math.log(2)
        True
    """
    return float(np.logaddexp(0.0, -np.asarray(margins, dtype=np.float64)).mean())


def regression_report(
    predicted: FloatArray,
    scores: FloatArray,
    groups: Sequence[Hashable],
    lengths: npt.ArrayLike,
) -> RegressionReport:
    """Measure predicted against known scores, both float64[B], of responses to prompts `groups`.

    Example:
        >>> report = regression_report(
        ...     np.array([1.0, 2.0, 5.0]), np.array([1.0, 2.0, 3.0]), ["a", "a", "b"], [3, 4, 5]
        ... )
        >>> report.r2, report.num_pairs, report.accuracy
        (-1.0, 1, 1.0)
    """
    index = np.unique([str(group) for group in groups], return_inverse=True)[1]
    spread = float(((scores - scores.mean()) ** 2).sum())
    error = float(((predicted - scores) ** 2).sum())
    margins, longer = _ordered_margins(predicted, scores, np.asarray(lengths), index)
    return RegressionReport(
        num_records=len(scores),
        num_prompts=int(index.max()) + 1,
        r2=1.0 - error / spread if spread > 0 else math.nan,
        correlation=_correlation(predicted, scores),
        within_prompt=_correlation(_centred(predicted, index), _centred(scores, index)),
        num_pairs=len(margins),
        accuracy=float(_wins(margins).mean()) if len(margins) else math.nan,
        longer_wins=float(_wins(longer).mean()) if len(margins) else math.nan,
    )


def split_by_group(groups: Sequence[Hashable], held_out: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which rows are held out: bool[B]; all rows of a group are, or none.

    Args:
        groups: The group of each row.
        held_out: Share of the groups, above 0 and below 1.
        seed: The choice follows from it.

    Raises:
        RewardFitError: There are fewer than five groups, or the share is out of its range.

    Example:
        >>> split_by_group(["a", "a", "b", "c", "d", "e"], 0.2, 0).sum() <= 2
        np.True_
    """
    if not 0 < held_out < 1:
        raise RewardFitError(f"held_out: expected a number between 0 and 1, got {held_out!r}.")
    distinct = list(dict.fromkeys(groups))
    if len(distinct) < _LEAST_GROUPS:
        raise RewardFitError(
            f"Expected at least {_LEAST_GROUPS} different prompts, to fit on some and measure on "
            f"others, got {len(distinct)} in {len(groups)} rows. Add data of other prompts."
        )
    # At least one prompt is measured on, and at least three are fitted on.
    count = min(max(1, round(held_out * len(distinct))), len(distinct) - 3)
    order = np.random.default_rng(seed).permutation(len(distinct))
    chosen = {distinct[i] for i in order[:count]}
    return np.asarray([group in chosen for group in groups])


def _ordered_margins(
    predicted: FloatArray, scores: FloatArray, lengths: npt.NDArray[Any], index: npt.NDArray[Any]
) -> tuple[FloatArray, FloatArray]:
    """Predicted and length margins of the higher over the lower score, within groups."""
    margins: list[FloatArray] = [np.zeros(0)]
    longer: list[FloatArray] = [np.zeros(0)]
    for group in np.unique(index):
        rows = np.flatnonzero(index == group)
        high, low = np.nonzero(scores[rows][:, None] > scores[rows][None, :])
        margins.append(predicted[rows[high]] - predicted[rows[low]])
        longer.append((lengths[rows[high]] - lengths[rows[low]]).astype(np.float64))
    return np.concatenate(margins), np.concatenate(longer)


def _wins(margins: FloatArray) -> FloatArray:
    """1 for a margin above 0, 1/2 for a tie, otherwise 0."""
    return np.asarray((margins > 0) + 0.5 * (margins == 0), dtype=np.float64)


def _sigmoid(values: FloatArray) -> FloatArray:
    return np.asarray(np.exp(-np.logaddexp(0.0, -values)), dtype=np.float64)


def _centred(values: FloatArray, index: npt.NDArray[Any]) -> FloatArray:
    means = np.bincount(index, weights=values) / np.bincount(index)
    return np.asarray(values - means[index], dtype=np.float64)


def _correlation(a: FloatArray, b: FloatArray) -> float:
    if np.ptp(a) < 1e-12 or np.ptp(b) < 1e-12:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _with_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in values.items()}

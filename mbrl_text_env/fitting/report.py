"""Samples to fit heads on, and reports of their quality on held-out prompts.

Data is split by prompt, never by row: responses to one prompt are similar, so a split by row would
overestimate the quality.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from mbrl_text_env.types import FloatArray

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

IntArray = npt.NDArray[np.int64]

_LEAST_PROMPTS = 5
_NAN = math.nan
_TINY = 1e-12
_BINS = 5


class FitError(ValueError):
    """Data that is not sufficient for a fit, or inconsistent arguments."""


def one_reward(records: Sequence[Record], error: type[Exception] = FitError) -> str:
    """The name of the reward that scored the records; `error` if there are several."""
    names = sorted({record.reward_name for record in records})
    if len(names) > 1:
        raise error(
            f"Expected scores of one reward model, got those of {names}. Score the responses with "
            "one of them (`records.rescore`)."
        )
    return names[0] if names else ""


@dataclass(frozen=True)
class Samples:
    """N rows of features, float64[N, d], with the final scores of their responses.

    Args:
        lengths: int64[N], tokens of each prefix; all 0 if the rows are not prefixes.
        groups: int64[N], index of the prompt.
    """

    inputs: FloatArray
    scores: FloatArray
    lengths: IntArray
    groups: IntArray

    def __len__(self) -> int:
        return len(self.scores)

    def rows(self, which: Any) -> Samples:
        """Select rows by a mask or by indices."""
        return Samples(*(values[which] for values in vars(self).values()))

    @property
    def num_prompts(self) -> int:
        """Number of different prompts."""
        return len(np.unique(self.groups))


def split_by_group(groups: Sequence[Hashable], held_out: float, seed: int) -> npt.NDArray[np.bool_]:
    """A mask of held-out rows, bool[B], split by group; needs at least five groups."""
    if not 0 < held_out < 1:
        raise FitError(f"held_out: expected a number between 0 and 1, got {held_out!r}.")
    distinct = list(dict.fromkeys(groups))
    if len(distinct) < _LEAST_PROMPTS:
        raise FitError(
            f"Expected at least {_LEAST_PROMPTS} different prompts, to fit on some and measure on "
            f"others, got {len(distinct)} in {len(groups)} rows. Add data of other prompts."
        )
    # At least one prompt is held out, and at least three are left to fit on.
    count = min(max(1, round(held_out * len(distinct))), len(distinct) - 3)
    order = np.random.default_rng(seed).permutation(len(distinct))
    chosen = {distinct[i] for i in order[:count]}
    return np.asarray([group in chosen for group in groups])


@dataclass(frozen=True)
class LengthReport:
    """The part of a `FitReport` for one length, in tokens (complete responses: characters)."""

    length: int
    num_prefixes: int
    correlation: float
    within_prompt: float
    std: float


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs with similar confidence: mean predicted probability, and observed accuracy."""

    low: float
    high: float
    count: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class FitReport:
    """Quality of predictions on held-out prompts; NaN means not measured.

    Args:
        correlation: Pearson correlation of prediction and final score over all rows.
        within_prompt: The same after subtracting from both the mean of each prompt and length; it
            measures how well responses to one prompt are ranked. NaN if no prompt has two different
            scores.
        std: Root mean square of the prediction error. With only one prompt, the standard deviation
            of the scores; all other figures are then NaN.
        num_prefixes: Number of rows: prefixes, or complete responses.
        within_one_std, within_two_std: Share of errors within one and two predicted standard
            deviations; 0.68 and 0.95 for a correct standard deviation.
        z_std: Root mean square of the errors in units of the predicted standard deviation; above 1
            if that is too small.
        by_length: The same figures by length; empty if there are no lengths.
        r2: 1 - squared error / variance of the scores; below 0, the mean score predicts better.
        num_pairs: Pairs of responses to a prompt of which one is known to be better.
        accuracy: Share of pairs in which the better response scores higher; a tie counts half.
        longer_wins: Accuracy of always preferring the longer response, the usual confounder.
        log_loss: Mean of -log sigmoid(chosen - rejected), in nats; log 2 = 0.693 is chance.
        ece: Expected calibration error, over the bins of `calibration` from 0.5 to 1.
        chance: Accuracy of guessing.
    """

    num_records: int
    num_prompts: int
    correlation: float = _NAN
    within_prompt: float = _NAN
    std: float = _NAN
    num_prefixes: int = 0
    within_one_std: float = _NAN
    within_two_std: float = _NAN
    z_std: float = _NAN
    by_length: tuple[LengthReport, ...] = ()
    r2: float = _NAN
    num_pairs: int = 0
    accuracy: float = _NAN
    longer_wins: float = _NAN
    log_loss: float = _NAN
    ece: float = _NAN
    calibration: tuple[CalibrationBin, ...] = ()
    chance: float = 0.5


def value_report(
    mean: FloatArray | None, std: FloatArray | None, samples: Samples, num_records: int
) -> FitReport:
    """Compare held-out predictions of prefixes with the scores; `mean` is None if not possible."""
    sizes = num_records, samples.num_prompts
    if mean is None or std is None:
        deviation = float(np.std(samples.scores))
        return FitReport(*sizes, std=deviation, num_prefixes=len(samples))
    errors = mean - samples.scores
    # A standard deviation of 0 with an error of 0 is right.
    z = np.abs(errors) / np.maximum(std, _TINY)
    return FitReport(
        *sizes,
        **_agreement(mean, samples),
        num_prefixes=len(samples),
        within_one_std=float((z <= 1).mean()),
        within_two_std=float((z <= 2).mean()),
        z_std=root_mean_square(z),
        by_length=_by_length(mean, samples) if samples.lengths.any() else (),
    )


def regression_report(
    predicted: FloatArray, scores: FloatArray, groups: Sequence[Hashable], lengths: npt.ArrayLike
) -> FitReport:
    """Compare predicted and known scores of complete responses; `lengths` are in characters."""
    index = np.unique([str(group) for group in groups], return_inverse=True)[1].reshape(-1)
    characters = np.asarray(lengths)
    together = Samples(predicted[:, None], scores, np.zeros(len(scores), np.int64), index)
    powers = 2 ** np.log2(np.maximum(characters, 1)).astype(np.int64)
    of_prompts = [np.flatnonzero(index == prompt) for prompt in np.unique(index)]
    high, low = np.concatenate(
        [rows[np.stack(np.nonzero(scores[rows][:, None] > scores[rows]))] for rows in of_prompts],
        axis=1,
    )
    spread = float(((scores - scores.mean()) ** 2).sum())
    return FitReport(
        len(scores),
        together.num_prompts,
        **_agreement(predicted, together),
        num_prefixes=len(scores),
        by_length=_by_length(predicted, Samples(together.inputs, scores, powers, index)),
        r2=1 - float(((predicted - scores) ** 2).sum()) / spread if spread > 0 else _NAN,
        num_pairs=len(high),
        accuracy=_wins(predicted[high] - predicted[low]),
        longer_wins=_wins(characters[high] - characters[low]),
    )


def pair_report(
    chosen: FloatArray, rejected: FloatArray, groups: Sequence[Hashable], lengths: npt.ArrayLike
) -> FitReport:
    """Measure scores of preference pairs; `lengths`, int[B, 2], are the responses' characters.

    A preference has the Bradley-Terry probability sigmoid(chosen - rejected). The calibration curve
    is for the response that the model prefers, from 0.5 to 1. Source: Guo et al., "On Calibration
    of Modern Neural Networks", ICML 2017 (bins of equal width).
    """
    margins = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    confidence = expit(np.abs(margins))
    edges = np.linspace(0.5, 1.0, _BINS + 1)
    place = np.clip(np.digitize(confidence, edges[1:-1]), 0, _BINS - 1)
    bins = []
    for i, inside in enumerate(place == np.arange(_BINS)[:, None]):
        predicted = float(confidence[inside].mean()) if inside.any() else _NAN
        ends = float(edges[i]), float(edges[i + 1])
        bins.append(CalibrationBin(*ends, int(inside.sum()), predicted, _wins(margins[inside])))
    errors = [b.count * abs(b.predicted - b.observed) for b in bins if b.count]
    characters = np.asarray(lengths, dtype=np.float64)
    return FitReport(
        2 * len(margins),
        len(set(groups)),
        num_pairs=len(margins),
        accuracy=_wins(margins),
        longer_wins=_wins(characters[:, 0] - characters[:, 1]),
        log_loss=bradley_terry_loss(margins),
        ece=float(sum(errors) / len(margins)),
        calibration=tuple(bins),
    )


def bradley_terry_loss(margins: FloatArray) -> float:
    """Mean of -log sigmoid(margin), in nats, for margins float64[B] of chosen over rejected."""
    return float(np.logaddexp(0.0, -np.asarray(margins, dtype=np.float64)).mean())


def within_prompt(mean: FloatArray, samples: Samples) -> float:
    """Correlation after subtracting the mean of each prompt and length; NaN if nothing varies."""
    cells = np.stack([samples.groups, samples.lengths])
    index: IntArray = np.unique(cells, axis=1, return_inverse=True)[1]
    index = index.reshape(-1)  # NumPy 2.0 gave it another shape
    counts = np.bincount(index)
    centred = []
    for values in (mean, samples.scores):
        rest = values - (np.bincount(index, values) / counts)[index]
        # Differences at rounding level count as 0.
        centred.append(np.where(np.abs(rest) <= _TINY * np.abs(values).max(), 0.0, rest))
    return correlation(*centred)


def correlation(a: FloatArray, b: FloatArray) -> float:
    """Pearson correlation; NaN if one of the two does not vary."""
    if len(a) < 2 or any(np.ptp(v) <= _TINY * np.abs(v).max() for v in (a, b)):
        return _NAN
    return float(np.corrcoef(a, b)[0, 1])


def root_mean_square(values: FloatArray) -> float:
    """The root of the mean of the squares."""
    return float(np.sqrt(np.mean(np.square(values))))


def _agreement(mean: FloatArray, samples: Samples) -> dict[str, Any]:
    return {
        "correlation": correlation(mean, samples.scores),
        "within_prompt": within_prompt(mean, samples),
        "std": root_mean_square(mean - samples.scores),
    }


def _by_length(mean: FloatArray, samples: Samples) -> tuple[LengthReport, ...]:
    parts = [(length, samples.lengths == length) for length in np.unique(samples.lengths)]
    return tuple(
        LengthReport(int(length), int(some.sum()), **_agreement(mean[some], samples.rows(some)))
        for length, some in parts
    )


def _wins(margins: FloatArray) -> float:
    """Share of margins above 0, a tie counting half; NaN without any."""
    return float((np.sign(margins) + 1).mean() / 2) if len(margins) else _NAN

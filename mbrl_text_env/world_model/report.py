"""Errors of dynamics on held-out records, by horizon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mbrl_text_env.fitting.report import FitError, root_mean_square
from mbrl_text_env.world_model.dynamics import Dynamics, WorldModelError, predict_futures
from mbrl_text_env.world_model.value import split_variance

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

_FUTURES, _SPLIT = 64, 200
_TINY = 1e-12


@dataclass(frozen=True)
class HorizonReport:
    """Root-mean-square errors over prefixes and features at one horizon.

    The unit is the standard deviation of the responses' gain within the horizon, so predicting the
    mean gain has the error 1. Features with the same gain in all responses are left out.

    Args:
        horizon: Tokens ahead.
        prefixes: Number of records with a prefix to predict from.
        error: Error of the mean of the futures.
        copying: Error of predicting no change of the prefix's features.
        rate: Error of extrapolating the prefix's counts in proportion to its length.
        increments: Error of adding the mean gain of the other prompts' records.
        z: Error divided by the futures' standard deviation; above 1 if that is too small.
        epistemic_share: Share of the futures' variance that is between members.
        squares: For each of the first four errors, by name, the squared errors of each prompt,
            weighted by its number of prefixes; their mean is the square of the error.
    """

    horizon: int
    prefixes: int
    error: float
    copying: float
    rate: float
    increments: float
    z: float
    epistemic_share: float
    squares: dict[str, list[float]] = field(repr=False)


def horizon_report(
    dynamics: Dynamics,
    records: Sequence[Record],
    horizons: Sequence[int] = (8, 16, 32, 64),
    *,
    prefix_tokens: int = 16,
    seed: int = 0,
) -> list[HorizonReport]:
    """Measure the errors at each horizon, from prefixes of `prefix_tokens` tokens.

    Use records of prompts that are not in the fit. Records of another policy or of other kinds of
    prompts show the errors under distribution shift.

    Raises:
        FitError: Fewer than two prompts have a response longer than `prefix_tokens`.
        WorldModelError: The dynamics are not fitted, or a horizon is longer than the records in the
            fit, or not a multiple of the stride.

    Example:
        >>> for row in horizon_report(dynamics, records):  # doctest: +SKIP
        ...     print(row.horizon, row.error, row.copying)
    """
    if not horizons or prefix_tokens < 1:
        raise WorldModelError(
            "Expected one horizon or more, and prefix_tokens of at least 1, got "
            f"{list(horizons)} and {prefix_tokens}."
        )
    going = [record for record in records if len(record.response_ids) > prefix_tokens]
    prompts = np.unique([record.prompt_id for record in going], return_inverse=True)[1]
    if len(going) < 2 or prompts.max() < 1:
        raise FitError(
            f"Expected records of two prompts or more with more than {prefix_tokens} tokens, got "
            f"{len(going)} of {len(records)}. Give more records, or fewer prefix_tokens."
        )
    return [_row(dynamics, going, prompts, h, prefix_tokens, seed) for h in horizons]


def _row(
    dynamics: Dynamics, records: Sequence[Record], prompts: Any, horizon: int, size: int, seed: int
) -> HorizonReport:
    states = [record.prefix_state(size) for record in records]
    futures = predict_futures(dynamics, states, _FUTURES, horizon, seed=seed)
    now = dynamics.varying(states).astype(np.float64)
    ends = [
        record.prefix_state(min(size + horizon, len(record.response_ids))) for record in records
    ]
    gains = dynamics.varying(ends) - now
    varies = gains.std(axis=0) > _TINY
    if not varies.any():
        raise FitError(f"horizon {horizon}: expected responses with different gains.")
    now, gains = now[:, varies], gains[:, varies]
    unit, imagined = gains.std(axis=0), futures.features[..., varies].astype(np.float64)
    sums = np.stack([gains[prompts == prompt].sum(axis=0) for prompt in range(prompts.max() + 1)])
    counts = np.bincount(prompts)
    others = (gains.sum(axis=0) - sums) / (len(gains) - counts)[:, None]
    told = {
        "error": imagined.mean(axis=1) - now,
        "copying": np.zeros_like(now),
        "rate": now * horizon / size,
        "increments": others[prompts],
    }
    wrong = {name: (each - gains) / unit for name, each in told.items()}
    errors = {name: root_mean_square(each) for name, each in wrong.items()}
    # Weight each prompt by its number of prefixes.
    share = np.mean(counts) * gains.shape[1]
    squares = {
        name: (np.bincount(prompts, (each**2).sum(axis=1)) / share).tolist()
        for name, each in wrong.items()
    }
    spread = root_mean_square((imagined / unit).std(axis=1))
    parts = [
        split_variance(imagined[i, :, k] / unit[k], futures.member[i])
        for i in range(0, len(now), -(-len(now) // _SPLIT))
        for k in range(now.shape[1])
    ]
    epistemic, aleatoric = np.sum(parts, axis=0)
    return HorizonReport(
        horizon,
        len(records),
        **errors,
        z=errors["error"] / max(spread, _TINY),
        epistemic_share=float(epistemic / max(epistemic + aleatoric, _TINY)),
        squares=squares,
    )

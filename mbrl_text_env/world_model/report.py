"""How good dynamics are on records that they have not seen, by how far they look ahead."""

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
    """Errors are root mean squares over prefixes and features.

    Their unit is the standard deviation of what the responses gain in the horizon, so that 1 is the
    error of knowing the mean gain alone; features that all gain equally are left out.

    Args:
        horizon: Tokens ahead.
        prefixes: Of how many records.
        error: Of the futures' mean.
        copying: Of the features of the prefix.
        rate: Of the counts of the prefix, as many times as the response may grow in the horizon.
        increments: Of the features of the prefix and the mean gain of the other prompts' records.
        z: Error by the futures' standard deviation; above 1 if that is too small.
        epistemic_share: Of the futures' variance, the part that members differ by.
        squares: Of each prompt, the squares of the first four errors, by name; their mean is the
            square of the error.
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
    """One row a horizon, from prefixes of `prefix_tokens` on.

    Take records of prompts that were not fitted on. Those of another policy, or of other kinds of
    prompts, show how the dynamics do under shift.

    Raises:
        FitError: Fewer than two prompts have a response of more tokens.
        WorldModelError: The dynamics are not fitted, or a horizon is beyond what they were fitted
            on, or no multiple of their stride.

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
        raise FitError(f"horizon {horizon}: expected responses that differ in what they gain.")
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
    # A prompt counts as often as it has prefixes.
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

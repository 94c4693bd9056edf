"""A value model without labels or reward calls: the mean reward of predicted futures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, score_features
from mbrl_text_env.types import FloatArray, Ledgers, Prompt, TextState, Usage, check_positive
from mbrl_text_env.values import ValueEstimate, ValueModel, ValueModelError
from mbrl_text_env.world_model.dynamics import Dynamics, predict_futures

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class WorldModelEstimate(ValueEstimate):
    """An estimate with `std` = sqrt(`epistemic`^2 + `aleatoric`^2), each float64[B].

    Args:
        epistemic: Standard deviation between the means of members (models or groups of donors).
        aleatoric: Standard deviation between the futures of one member.
        quantiles: float64[B, 5], quantiles of the futures' rewards at `QUANTILES`.
        num_futures: float64[B], number of futures; 0 if the response has ended.
    """

    epistemic: FloatArray
    aleatoric: FloatArray
    quantiles: FloatArray
    num_futures: FloatArray


@dataclass(eq=False, repr=False)
class WorldModelValue(ValueModel):
    """The mean reward of a state's predicted futures, computed from features without reward calls.

    For a response that has ended, the value is the reward of its own features. The standard
    deviation of the futures' rewards has two parts; see `WorldModelEstimate`.

    Args:
        dynamics: Fitted dynamics.
        reward_model: A reward with `feature_names` and `score_features`.
        num_futures: Number of futures per state.
        horizon: Tokens to look ahead, if that many are left; None predicts to the end.
        seed: Determines the futures together with the state.

    Raises:
        RewardError: In `predict`, if the reward needs features that are not predicted.

    Example:
        >>> value = WorldModelValue(dynamics, ConstraintsReward())  # doctest: +SKIP
        >>> planner = Adaptive(lm, ConstraintsReward(), value)  # doctest: +SKIP
        >>> value.swap(other_reward).predict([state]).mean  # doctest: +SKIP
        array([0.67])
    """

    dynamics: Dynamics
    reward_model: Any
    _: KW_ONLY
    num_futures: int = 64
    horizon: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(num_futures=self.num_futures, horizon=self.horizon)
        self.reward_model = as_reward_model(self.reward_model)
        self.reward_name_ = self.reward_model.name

    @property
    def language_model_name_(self) -> str | None:  # type: ignore[override]
        """The policy whose responses the dynamics were fitted on."""
        return self.dynamics.language_model_name_

    @property
    def is_fitted(self) -> bool:
        """Whether the dynamics are fitted."""
        return self.dynamics.is_fitted

    def fit(self, records: Sequence[Record]) -> Self:
        """Fit the dynamics on responses, scored or not; see `Dynamics.fit`."""
        self.dynamics.fit(records)
        return self

    def save(self, folder: str | Path) -> None:
        """Save the dynamics, which work with any reward; load them with `load_value`."""
        self.dynamics.save(folder)

    def swap(self, reward_model: RewardLike) -> WorldModelValue:
        """A value model for another reward, without fitting again."""
        return replace(self, reward_model=reward_model)

    def predict(self, states: Sequence[TextState]) -> WorldModelEstimate:
        """Mean, standard deviation with its parts, and quantiles; charges nothing."""
        return self.predict_with(states, None)

    def predict_with(self, states: Sequence[TextState], ledgers: Ledgers) -> WorldModelEstimate:
        """Like `predict`, but charge the futures as dynamics calls."""
        if not self.is_fitted:
            raise ValueModelError("The dynamics are not fitted. Call their fit(records) first.")
        found = np.zeros((len(states), 4 + len(QUANTILES)))
        for i, state in enumerate(states):
            if state.finish_reason is not None:
                features = self.dynamics.features
                [score] = self._scores(state.prompt, features.names, features([state]))
                found[i] = score, 0, 0, 0, *[score] * len(QUANTILES)
                continue
            scores, member = self.imagined(state, None if ledgers is None else [ledgers[i]])
            parts = split_variance(scores, member)
            found[i] = scores.mean(), *parts, len(scores), *np.quantile(scores, QUANTILES)
        mean, epistemic, aleatoric, number = found[:, :4].T
        std, epistemic, aleatoric = np.sqrt([epistemic + aleatoric, epistemic, aleatoric])
        return WorldModelEstimate(mean, std, epistemic, aleatoric, found[:, 4:], number)

    def imagined(self, state: TextState, ledgers: Ledgers) -> tuple[FloatArray, Any]:
        """Rewards float64[M] and members int[M] of the futures of a state that has not ended."""
        futures = predict_futures(
            self.dynamics,
            [state],
            self.num_futures,
            self._within(len(state.response_ids)),
            seed=self.seed,
            ledgers=ledgers,
        )
        scores = self._scores(state.prompt, self.dynamics.names, futures.features[0])
        return scores, futures.member[0]

    def usage_bound(self, state: TextState) -> Usage:
        """An upper bound on the cost of one state; ended states cost nothing."""
        flops = self.dynamics.flops_bound(self.num_futures)
        return Usage(dynamics_calls=self.num_futures, dynamics_flops=flops)

    def _within(self, size: int) -> int | None:
        """The horizon, or None (to the end) if fewer tokens are left."""
        left = self.dynamics.longest_ - size
        return None if self.horizon is None or self.horizon > left else self.horizon

    def _scores(self, prompt: Prompt, names: Sequence[str], features: Any) -> FloatArray:
        columns = np.asarray(features, dtype=np.float64).T
        table = dict(zip(names, columns, strict=True))
        return score_features(self.reward_model, prompt, table)


def split_variance(scores: FloatArray, member: Any) -> tuple[float, float]:
    """Split the variance of scores, float64[M], into an epistemic and an aleatoric part.

    The epistemic part is the variance between the members' means, minus the variance expected by
    chance from so few scores per member. The aleatoric part is the rest of the total variance.

    Source: Depeweg et al., "Decomposition of Uncertainty in Bayesian Deep Learning for Efficient
    and Risk-sensitive Learning", ICML 2018, in its form by variance; the correction is that of a
    one-way analysis of variance.

    Example:
        >>> split_variance(np.array([0.0, 0.0, 1.0, 1.0]), np.array([0, 0, 1, 1]))
        (0.25, 0.0)
    """
    total = float(scores.var())
    groups = [scores[member == each] for each in np.unique(member)]
    free = len(scores) - len(groups)
    if len(groups) < 2 or free < 1:
        return 0.0, total
    within = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    between = total - within / len(scores)
    chance = within / free * (len(groups) - 1) / len(scores)
    epistemic = min(max(between - chance, 0.0), total)
    return epistemic, total - epistemic

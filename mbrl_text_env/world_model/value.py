"""A value without labels and reward calls: the reward of imagined endings."""

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
    """`std` is the root of the sum of the squares of its two parts, float64[B] each.

    Args:
        epistemic: Of what members (models, or groups of donors) say in the mean.
        aleatoric: Of the futures of one member.
        quantiles: float64[B, 5]: of the futures' rewards, at `QUANTILES`.
        num_futures: float64[B]: how many there are; 0 of a response that has ended.
    """

    epistemic: FloatArray
    aleatoric: FloatArray
    quantiles: FloatArray
    num_futures: FloatArray


@dataclass(eq=False, repr=False)
class WorldModelValue(ValueModel):
    """The mean reward of a state's futures; the reward is a program of counts and is not called.

    A response that has ended is worth its reward by its own counts. The standard deviation is that
    of the futures' rewards, in two parts; see `WorldModelEstimate`.

    Args:
        dynamics: Fitted.
        reward_model: One with `feature_names` and `score_features`.
        num_futures: Of each state.
        horizon: Tokens to look ahead, where that many are left; None for the end.
        seed: The futures follow from it and the state.

    Raises:
        RewardError: On predicting: the reward is no program of counts, or not of those predicted.

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
        """The policy whose responses the dynamics are of."""
        return self.dynamics.language_model_name_

    @property
    def is_fitted(self) -> bool:
        """Whether the dynamics are."""
        return self.dynamics.is_fitted

    def fit(self, records: Sequence[Record]) -> Self:
        """Fit the dynamics on responses, scored or not; see `Dynamics.fit`."""
        self.dynamics.fit(records)
        return self

    def save(self, folder: str | Path) -> None:
        """Write the dynamics, which any reward can be valued with; `load_value` reads them."""
        self.dynamics.save(folder)

    def swap(self, reward_model: RewardLike) -> WorldModelValue:
        """The value for another reward; nothing is fitted again."""
        return replace(self, reward_model=reward_model)

    def predict(self, states: Sequence[TextState]) -> WorldModelEstimate:
        """Mean, standard deviation with its parts, and quantiles; uncharged."""
        return self.predict_with(states, None)

    def predict_with(self, states: Sequence[TextState], ledgers: Ledgers) -> WorldModelEstimate:
        """`predict`, with the futures charged as dynamics calls."""
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
        """Rewards of the futures of a state that goes on, float64[M], and their members, int[M]."""
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
        """Of one state; of one that has ended, nothing is charged."""
        flops = self.dynamics.flops_bound(self.num_futures)
        return Usage(dynamics_calls=self.num_futures, dynamics_flops=flops)

    def _within(self, size: int) -> int | None:
        """The horizon; with too little left, to the end."""
        left = self.dynamics.longest_ - size
        return None if self.horizon is None or self.horizon > left else self.horizon

    def _scores(self, prompt: Prompt, names: Sequence[str], features: Any) -> FloatArray:
        columns = np.asarray(features, dtype=np.float64).T
        table = dict(zip(names, columns, strict=True))
        return score_features(self.reward_model, prompt, table)


def split_variance(scores: FloatArray, member: Any) -> tuple[float, float]:
    """The epistemic and the aleatoric part of the variance of scores, float64[M].

    The second is the variance within members, the first what the members' means differ by, less
    what as few scores of one member differ by chance; their sum is the variance of all.

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

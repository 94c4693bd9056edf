"""Rewards made of rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mbrl_text_env.rewards.base import (
    RewardModel,
    Scores,
    applies_to,
    reward_name,
    reward_usage_bound,
    score_responses,
)
from mbrl_text_env.types import FloatArray, Prompt


class WeightedSum:
    """The weighted sum of several rewards, which also tells its parts.

    Weights are taken as they are: they need not add up to 1, and a weight of 0 makes a part that
    is reported and does not count.

    Args:
        rewards: At least one reward model, each with a name of its own.
        weights: One finite number a reward.
        name: What reports call it; by default the formula, such as "0.5*sentiment+relevance".

    Raises:
        ValueError: There are no rewards, more or fewer weights than rewards, a weight is not
            finite, or two rewards have the same name.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward, score_responses
        >>> from mbrl_text_env.types import Prompt
        >>> reward = WeightedSum([SentimentReward()], [2.0])
        >>> scores = score_responses(reward, [Prompt.from_text("Tell me.")], ["It was good."])
        >>> reward.name, scores.total.tolist(), scores.parts_of(0)
        ('2*sentiment', [0.8808], {'sentiment': 0.4404})
    """

    def __init__(
        self, rewards: Sequence[RewardModel], weights: Sequence[float], name: str | None = None
    ) -> None:
        self.rewards = tuple(rewards)
        self.weights = tuple(float(weight) for weight in weights)
        self._check_arguments()
        self.name = self._formula() if name is None else name

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the weighted sum."""
        return self.score_parts(prompts, responses).total

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Return the weighted sum and its parts, each float64[B].

        The parts are not weighted. Those of a reward that has parts itself stand among the others
        under their own names; where two parts would have the same name, as "reward/part".

        Raises:
            RewardError: A reward failed; the message names it.
        """
        scores = [score_responses(reward, prompts, responses) for reward in self.rewards]
        total = np.zeros(len(responses))
        for weight, inner in zip(self.weights, scores, strict=True):
            total += weight * inner.total
        return Scores(total, self._flat_parts(scores))

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether all of the rewards can score answers to `prompt`."""
        return all(applies_to(reward, prompt) for reward in self.rewards)

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the floating-point operations of those rewards that tell theirs."""
        total = np.zeros(len(responses))
        for reward in self.rewards:
            if hasattr(reward, "flops"):
                total += np.asarray(reward.flops(prompts, responses))
        return total

    def flops_bound(self) -> float:
        """The most that one response can take."""
        return sum(reward_usage_bound(reward).reward_flops for reward in self.rewards)

    def _check_arguments(self) -> None:
        names = [reward_name(reward) for reward in self.rewards]
        if not names or len(names) != len(self.weights):
            raise ValueError(
                f"Expected at least one reward and one weight for each, got {len(names)} rewards "
                f"and {len(self.weights)} weights."
            )
        if not np.isfinite(self.weights).all():
            raise ValueError(f"Expected finite weights, got {list(self.weights)} for {names}.")
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        if repeated:
            raise ValueError(
                f"Expected a name of its own for each reward, got {names}. Add up the weights of "
                f"{repeated}, or give different rewards different names."
            )

    def _formula(self) -> str:
        return "+".join(
            reward_name(reward) if weight == 1.0 else f"{weight:g}*{reward_name(reward)}"
            for reward, weight in zip(self.rewards, self.weights, strict=True)
        )

    def _flat_parts(self, scores: Sequence[Scores]) -> dict[str, FloatArray]:
        occurrences = Counter(part for inner in scores for part in inner.parts)
        flat = {}
        for reward, inner in zip(self.rewards, scores, strict=True):
            name = reward_name(reward)
            for part, values in inner.parts.items():
                clashes = occurrences[part] > 1 and part != name
                flat[f"{name}/{part}" if clashes else part] = values
        return flat

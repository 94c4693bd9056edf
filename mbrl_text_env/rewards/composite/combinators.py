"""Rewards made of several rewards: sums, products, gates, ensembles.

Each keeps the scores of its parts for the report. `transforms.py` has those that change one reward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from mbrl_text_env.rewards.adapters.convert import as_reward_model
from mbrl_text_env.rewards.base import (
    RewardError,
    RewardLike,
    Scores,
    applies_to,
    part_names,
    reduced,
    reward_name,
    reward_usage_bound,
    score_responses,
    score_steps,
)
from mbrl_text_env.types import FloatArray, Prompt

EnsembleRule = Literal["mean", "min", "mean-std"]


class Combinator(ABC):
    """What rewards that are made of rewards share.

    A subclass says in `combine` how the totals make one. It applies to a prompt where all of its
    rewards do, costs what they cost together, and its parts are theirs: under their own names, or,
    where two would have the same, as "reward/part". Where all of its rewards score steps, so does
    it, by combining the scores of each step.

    Args:
        rewards: At least one reward model, each with a name of its own.
        name: What reports call it.

    Raises:
        ValueError: There are no rewards, or two have the same name.
    """

    combines_steps: ClassVar[bool] = True
    extra_parts: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that `combine` adds."""

    def __init__(self, rewards: Sequence[RewardLike], name: str) -> None:
        self.rewards = tuple(as_reward_model(reward) for reward in rewards)
        self.name = name
        names = [reward_name(reward) for reward in self.rewards]
        if not names:
            raise ValueError(f"{type(self).__name__}: expected at least one reward, got none.")
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        if repeated:
            raise ValueError(
                f"Expected a name of its own for each reward, got {names}. Add up the weights of "
                f"{repeated}, or give different rewards different names."
            )
        if self.combines_steps and all(hasattr(reward, "score_steps") for reward in self.rewards):
            self.score_steps = self._score_steps

    @abstractmethod
    def combine(
        self, totals: Sequence[FloatArray], prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[FloatArray, Mapping[str, FloatArray]]:
        """The combined scores, float64[B], and parts besides those of the rewards.

        Args:
            totals: float64[B] of each reward.
            prompts: B prompts.
            responses: B responses.
        """

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B]."""
        return self.score_parts(prompts, responses).total

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Return the combined scores and their parts as they are before, each float64[B].

        Raises:
            RewardError: A reward failed; the message names it.
        """
        scores = [score_responses(reward, prompts, responses) for reward in self.rewards]
        total, extra = self.combine([inner.total for inner in scores], prompts, responses)
        return Scores(total, {**self._flat_parts(scores), **extra})

    @property
    def part_names(self) -> tuple[str, ...] | None:
        """The parts that every score has, or None where a reward does not name its own."""
        named = [part_names(reward) for reward in self.rewards]
        if None in named:
            return None
        scores = [Scores(np.zeros(0), dict.fromkeys(names or (), np.zeros(0))) for names in named]
        return (*self._flat_parts(scores), *self.extra_parts)

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

    def _score_steps(self, prompt: Prompt, steps: Sequence[str]) -> FloatArray:
        """float64[len(steps)], the combined score of each step."""
        rewards: Sequence[Any] = self.rewards
        totals = [score_steps(reward, prompt, steps) for reward in rewards]
        return self.combine(totals, [prompt] * len(steps), steps)[0]

    def _flat_parts(self, scores: Sequence[Scores]) -> dict[str, FloatArray]:
        occurrences = Counter(part for inner in scores for part in inner.parts)
        flat = {}
        for reward, inner in zip(self.rewards, scores, strict=True):
            name = reward_name(reward)
            for part, values in inner.parts.items():
                clashes = occurrences[part] > 1 and part != name
                flat[f"{name}/{part}" if clashes else part] = values
        return flat


class WeightedSum(Combinator):
    """The weighted sum of several rewards.

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
        >>> reward = WeightedSum([SentimentReward()], [2.0])
        >>> scores = score_responses(reward, [Prompt.from_text("Tell me.")], ["It was good."])
        >>> reward.name, scores.total.tolist(), scores.parts_of(0)
        ('2*sentiment', [0.8808], {'sentiment': 0.4404})
    """

    def __init__(
        self, rewards: Sequence[RewardLike], weights: Sequence[float], name: str | None = None
    ) -> None:
        rewards = [as_reward_model(reward) for reward in rewards]
        self.weights = tuple(float(weight) for weight in weights)
        if not rewards or len(rewards) != len(self.weights):
            raise ValueError(
                f"Expected at least one reward and one weight for each, got {len(rewards)} rewards "
                f"and {len(self.weights)} weights."
            )
        if not np.isfinite(self.weights).all():
            names = [reward_name(reward) for reward in rewards]
            raise ValueError(f"Expected finite weights, got {list(self.weights)} for {names}.")
        super().__init__(rewards, _formula(rewards, self.weights) if name is None else name)

    def combine(
        self, totals: Sequence[FloatArray], prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[FloatArray, Mapping[str, FloatArray]]:
        """The weighted sum."""
        summed = np.zeros(len(responses))
        for weight, total in zip(self.weights, totals, strict=True):
            summed += weight * total
        return summed, {}

    def reduced(self, dtype: str) -> WeightedSum:
        """The sum of the rewards in another format; see `rewards.base.reduced`."""
        rewards = [reduced(reward, dtype) for reward in self.rewards]
        return WeightedSum(rewards, self.weights, self.name)


class Product(Combinator):
    """The product of several rewards, none of which may be negative.

    All of them have to be high for the product to be. Two negative factors would make a good one:
    clip or normalise rewards that can be negative first.

    Args:
        rewards: At least one reward model, each with a name of its own.
        name: What reports call it; by default such as "product(sentiment,constraints)".

    Raises:
        ValueError: There are no rewards, or two have the same name.

    Example:
        >>> from mbrl_text_env.rewards import Clip, ConstraintsReward, SentimentReward
        >>> reward = Product([Clip(SentimentReward(), low=0.0), ConstraintsReward()])
        >>> prompt = Prompt.from_text("Hi", metadata={"constraints": [{"type": "lowercase"}]})
        >>> reward.score([prompt, prompt], ["it was good.", "It was good."])
        array([0.4404, 0.    ])
    """

    def __init__(self, rewards: Sequence[RewardLike], name: str | None = None) -> None:
        rewards = [as_reward_model(reward) for reward in rewards]
        names = ",".join(reward_name(reward) for reward in rewards)
        super().__init__(rewards, f"product({names})" if name is None else name)

    def combine(
        self, totals: Sequence[FloatArray], prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[FloatArray, Mapping[str, FloatArray]]:
        """The product.

        Raises:
            RewardError: A factor is negative.
        """
        for reward, total in zip(self.rewards, totals, strict=True):
            negative = np.flatnonzero(total < 0)
            if negative.size:
                row = int(negative[0])
                raise RewardError(
                    f"Reward model {self.name!r}: expected factors from 0 up, got {total[row]:g} "
                    f"from {reward_name(reward)!r} for prompt {prompts[row].id!r}, response "
                    f"{responses[row][:80]!r}. Clip or normalise that reward, or add rewards "
                    "instead."
                )
        return np.prod(np.stack(totals), axis=0), {}


class Gate(Combinator):
    """A reward that counts only where another one holds.

    Args:
        reward: The reward.
        condition: The reward that has to reach `threshold`, such as `ConstraintsReward()`.
        threshold: The least score of `condition` that opens the gate.
        closed: The score of a response for which it stays closed. It should be no better than what
            `reward` gives to bad responses: with sentiment, which goes down to -1, a `closed` of 0
            would reward breaking the constraint.
        name: What reports call it.

    Raises:
        ValueError: A number is not finite, or the two have the same name.

    Example:
        >>> from mbrl_text_env.rewards import ConstraintsReward, SentimentReward
        >>> reward = Gate(SentimentReward(), ConstraintsReward(), closed=-1.0)
        >>> prompt = Prompt.from_text("Praise.", metadata={"constraints": [{"type": "lowercase"}]})
        >>> reward.score([prompt, prompt], ["it was good.", "It was good."])
        array([ 0.4404, -1.    ])
    """

    def __init__(
        self,
        reward: RewardLike,
        condition: RewardLike,
        *,
        threshold: float = 1.0,
        closed: float = 0.0,
        name: str | None = None,
    ) -> None:
        check_finite("Gate", threshold=threshold, closed=closed)
        reward, condition = as_reward_model(reward), as_reward_model(condition)
        default = f"{reward_name(reward)} if {reward_name(condition)}"
        super().__init__([reward, condition], default if name is None else name)
        self.reward, self.condition = reward, condition
        self.threshold, self.closed = threshold, closed

    def combine(
        self, totals: Sequence[FloatArray], prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[FloatArray, Mapping[str, FloatArray]]:
        """The reward where the condition holds, `closed` elsewhere."""
        reward, condition = totals
        # A fraction such as 3 of 3 constraints may miss 1 by its rounding.
        return np.where(condition >= self.threshold - 1e-9, reward, self.closed), {}


class Ensemble(Combinator):
    """Several judges of the same thing, whose disagreement counts against a response.

    What one judge overrates the others may not: the minimum and the mean minus k standard
    deviations are harder to exploit than any single one. The judges should be on one scale; see
    `Normalise`. Its parts are the judges' scores and "disagreement", their standard deviation.

    Source: Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", ICLR 2024 (mean,
    worst case, uncertainty-weighted). Deviation: the uncertainty is the standard deviation, which
    is in the score's units, where the paper takes the variance.

    Args:
        rewards: At least two reward models, each with a name of its own.
        rule: `"mean"`, `"min"`, or `"mean-std"`: the mean minus `k` standard deviations (of the
            judges at hand, divided by their number).
        k: See `rule`; at least 0.
        name: What reports call it.

    Raises:
        ValueError: There are fewer than two rewards, two have the same name, the rule is unknown,
            or `k` is negative or not finite.

    Example:
        >>> from mbrl_text_env.rewards import FunctionReward
        >>> short = FunctionReward(lambda prompt, response: 3.0)
        >>> long = FunctionReward(lambda prompt, response: 5.0)
        >>> short.name, long.name = "short", "long"
        >>> Ensemble([short, long], "mean-std").score([Prompt.from_text("Hi")], ["Hello"])
        array([3.])
    """

    extra_parts = ("disagreement",)

    def __init__(
        self,
        rewards: Sequence[RewardLike],
        rule: EnsembleRule = "mean",
        *,
        k: float = 1.0,
        name: str | None = None,
    ) -> None:
        if rule not in get_args(EnsembleRule):
            raise ValueError(f"rule: expected one of {list(get_args(EnsembleRule))}, got {rule!r}.")
        check_finite("Ensemble", k=k)
        rewards = [as_reward_model(reward) for reward in rewards]
        if k < 0 or len(rewards) < 2:
            raise ValueError(
                f"Ensemble: expected at least two rewards and k from 0 up, got {len(rewards)} "
                f"rewards and k={k}."
            )
        names = ",".join(reward_name(reward) for reward in rewards)
        super().__init__(rewards, f"{rule}({names})" if name is None else name)
        self.rule: EnsembleRule = rule
        self.k = k

    def combine(
        self, totals: Sequence[FloatArray], prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[FloatArray, Mapping[str, FloatArray]]:
        """The mean, the minimum, or the mean minus k standard deviations."""
        stacked = np.stack(totals)
        disagreement = stacked.std(axis=0)
        if self.rule == "min":
            return stacked.min(axis=0), {"disagreement": disagreement}
        k = self.k if self.rule == "mean-std" else 0.0
        return stacked.mean(axis=0) - k * disagreement, {"disagreement": disagreement}


def check_finite(owner: str, **numbers: float) -> None:
    """Refuse arguments that are not finite.

    Raises:
        ValueError: One is not; the message names it.
    """
    for name, number in numbers.items():
        if not np.isfinite(number):
            raise ValueError(f"{owner}: expected {name} to be a finite number, got {number!r}.")


def _formula(rewards: Sequence[object], weights: Sequence[float]) -> str:
    return "+".join(
        reward_name(reward) if weight == 1.0 else f"{weight:g}*{reward_name(reward)}"
        for reward, weight in zip(rewards, weights, strict=True)
    )

"""Rewards that combine several rewards: sums, products, gates and ensembles.

`Combinator` is their base class. `transforms.py` has the rewards that modify a single reward.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import (
    ProcessRewardModel,
    RewardError,
    RewardLike,
    RewardModel,
    Scores,
    check_finite,
    reward_bounds,
    score_features,
    score_responses,
    score_steps,
)
from mbrl_text_env.types import FloatArray, Prompt, one_of

EnsembleRule = Literal["mean", "min", "mean-std"]
Totals: TypeAlias = Sequence[FloatArray]
"""The scores of each reward, float64[B]."""
Combined: TypeAlias = tuple[FloatArray, Mapping[str, FloatArray]]
"""The combined scores, float64[B], and parts in addition to those of the rewards."""
Prompts: TypeAlias = Sequence[Prompt]
Texts: TypeAlias = Sequence[str]


class _NoTexts(Sequence[str]):
    """A placeholder for responses of which only the counts are known."""

    def __init__(self, count: int) -> None:
        self._length = count

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        raise RewardError(
            "Expected `combine` to use scores only, but it reads the responses, which do not exist "
            "when counts are scored. Override `feature_names` and `score_features`."
        )


class Combinator(ProcessRewardModel):
    """Base class of rewards that combine rewards; a subclass implements `combine`.

    It applies to a prompt if all of its rewards do, and its cost is the sum of their costs. Its
    parts are their parts; if two parts share a name, both are called "reward/part". If all rewards
    score steps, it scores steps too, by combining the scores of each step.

    There must be at least one reward, and their names must differ (otherwise `ValueError`). Without
    a `name`, it is called `default_name`, formatted with `names` and the attributes.
    """

    name = ""
    default_name: ClassVar[str] = "{names}"
    combines_steps: ClassVar[bool] = True
    """Whether `combine` is also valid for the steps of a response."""
    extra_parts: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that `combine` adds."""
    rewards: Sequence[Any]

    def _hold(self, rewards: Sequence[RewardLike]) -> None:
        self.rewards = tuple(map(as_reward_model, rewards))
        names = [reward.name for reward in self.rewards]
        self.name = self.name or self.default_name.format(names=",".join(names), **vars(self))
        if not names:
            raise ValueError(f"{type(self).__name__}: expected at least one reward, got none.")
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        if repeated:
            raise ValueError(
                f"Expected a unique name for each reward, got {names}. Add up the weights of "
                f"{repeated}, or give different rewards different names."
            )

    @abstractmethod
    def combine(self, totals: Totals, prompts: Prompts, responses: Texts) -> Combined:
        """Combine the total scores of the rewards into one score per response."""

    def most(self, bounds: Totals, prefixes: Texts) -> FloatArray:
        """Return float64[B], an upper bound on `combine` given bounds; by default infinity."""
        return np.full(len(prefixes), np.inf)

    def score(self, prompts: Prompts, responses: Texts) -> FloatArray:
        """Return float64[B]."""
        return self.score_parts(prompts, responses).total

    def score_parts(self, prompts: Prompts, responses: Texts) -> Scores:
        """Return the combined scores and the parts of the rewards, each float64[B]."""
        scores = [score_responses(reward, prompts, responses) for reward in self.rewards]
        total, extra = self.combine([inner.total for inner in scores], prompts, responses)
        return Scores(total, {**self._flat_parts([s.parts for s in scores]), **extra})

    @property
    def part_names(self) -> tuple[str, ...] | None:
        """The names of the parts in every score, or None if a reward does not know its parts."""
        named = [reward.part_names for reward in self.rewards]
        if None in named:
            return None
        none = np.zeros(0)
        return (
            *self._flat_parts([dict.fromkeys(names, none) for names in named]),
            *self.extra_parts,
        )

    def feature_names(self, prompt: Prompt) -> tuple[str, ...]:
        """Return the names of the counts that the rewards need."""
        return tuple(name for each in self.rewards for name in each.feature_names(prompt))

    def score_features(self, prompt: Prompt, features: Mapping[str, FloatArray]) -> FloatArray:
        """Return float64[N], the combined scores of the rewards given counts."""
        totals = [score_features(reward, prompt, features) for reward in self.rewards]
        return self.combine(totals, [prompt] * len(totals[0]), _NoTexts(len(totals[0])))[0]

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether all rewards can score responses to `prompt`."""
        return all(reward.applies_to(prompt) for reward in self.rewards)

    def bound(self, prompts: Prompts, prefixes: Texts) -> FloatArray:
        """Return float64[B], the upper bound that follows from the bounds of the rewards."""
        bounds = [reward_bounds(reward, prompts, prefixes) for reward in self.rewards]
        return self.most(bounds, prefixes)

    @property
    def is_verifier(self) -> bool:  # type: ignore[override]
        """Whether all rewards are verifiers."""
        return all(reward.is_verifier for reward in self.rewards)

    def suggest(self, prompt: Prompt, prefix: str) -> tuple[str, ...]:
        """Return the suggestions of all rewards."""
        return tuple(text for reward in self.rewards for text in reward.suggest(prompt, prefix))

    def flops(self, prompts: Prompts, responses: Texts) -> FloatArray:
        """Return float64[B], the sum of the rewards' floating-point operations."""
        counts = [np.asarray(reward.flops(prompts, responses)) for reward in self.rewards]
        return np.sum(counts, axis=0, dtype=np.float64)

    def flops_bound(self) -> float:
        """Return the upper bound for one response."""
        return sum(reward.usage_bound().reward_flops for reward in self.rewards)

    @property
    def scores_steps(self) -> bool:
        """Whether all rewards score steps and `combine` is valid for steps."""
        return self.combines_steps and all(reward.scores_steps for reward in self.rewards)

    def score_steps(self, prompt: Prompt, steps: Texts) -> FloatArray:
        """Return float64[len(steps)], the combined score of each step."""
        totals = [score_steps(reward, prompt, steps) for reward in self.rewards]
        return self.combine(totals, [prompt] * len(steps), steps)[0]

    def _flat_parts(self, parts: Sequence[Mapping[str, FloatArray]]) -> dict[str, FloatArray]:
        occurrences = Counter(part for inner in parts for part in inner)
        flat = {}
        for reward, inner in zip(self.rewards, parts, strict=True):
            for part, values in inner.items():
                clashes = occurrences[part] > 1 and part != reward.name
                flat[f"{reward.name}/{part}" if clashes else part] = values
        return flat


@dataclass(eq=False, repr=False)
class Wrapper(Combinator):
    """Base class of rewards that modify or pass on a single reward; see `Combinator`."""

    reward: Any

    def __post_init__(self) -> None:
        self.reward = as_reward_model(self.reward)
        self._hold([self.reward])

    def change(self, scores: FloatArray) -> FloatArray:
        """Return float64[B], a non-decreasing function of the scores; by default the identity."""
        return scores

    def combine(self, totals: Totals, prompts: Prompts, responses: Texts) -> Combined:
        """Apply `change` to the scores."""
        return self.change(totals[0]), {}

    def most(self, bounds: Totals, prefixes: Texts) -> FloatArray:
        """Apply `change` to the bound."""
        return self.change(bounds[0])


@dataclass(eq=False, repr=False)
class WeightedSum(Combinator):
    """The weighted sum of several rewards.

    Weights must be finite, but need not add up to 1. A reward of weight 0 is reported as a part but
    does not count. The default name is the formula, such as "0.5*sentiment+relevance".

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> reward = WeightedSum([SentimentReward()], [2.0])
        >>> scores = score_responses(reward, [Prompt.from_text("Tell me.")], ["It was good."])
        >>> reward.name, scores.total.tolist(), scores.parts_of(0)
        ('2*sentiment', [0.8808], {'sentiment': 0.4404})
    """

    rewards: Sequence[Any]
    weights: Sequence[float]
    name: str = ""

    def __post_init__(self) -> None:
        self.weights = tuple(float(weight) for weight in self.weights)
        if not self.rewards or len(self.rewards) != len(self.weights):
            raise ValueError(
                f"Expected at least one reward and one weight for each, got {len(self.rewards)} "
                f"rewards and {len(self.weights)} weights."
            )
        models = [as_reward_model(reward) for reward in self.rewards]
        names = [model.name for model in models]
        if not np.isfinite(self.weights).all():
            raise ValueError(f"Expected finite weights, got {list(self.weights)} for {names}.")
        terms = zip(self.weights, names, strict=True)
        formula = "+".join(own if weight == 1 else f"{weight:g}*{own}" for weight, own in terms)
        self.name = self.name or formula
        self._hold(models)

    def combine(self, totals: Totals, prompts: Prompts, responses: Texts) -> Combined:
        """Return the weighted sum."""
        summed = np.zeros(len(responses))
        for weight, total in zip(self.weights, totals, strict=True):
            summed += weight * total
        return summed, {}

    def most(self, bounds: Totals, prefixes: Texts) -> FloatArray:
        """Return the weighted sum; infinity if a weight is negative, as there is no lower bound."""
        terms = [w * b for w, b in zip(self.weights, bounds, strict=True) if w > 0]
        known = terms and min(self.weights) >= 0
        return np.sum(terms, axis=0) if known else super().most(bounds, prefixes)

    def reduced(self, dtype: str) -> RewardModel:
        """Return the sum of the rewards in another dtype."""
        return replace(self, rewards=[reward.reduced(dtype) for reward in self.rewards])


@dataclass(eq=False, repr=False)
class Product(Combinator):
    """The product of several rewards, whose scores must not be negative.

    The product is high only if all scores are high. Two negative factors would give a positive
    product, so clip rewards that can be negative, or normalise them to be non-negative, first.

    Example:
        >>> from mbrl_text_env.rewards import Clip, ConstraintsReward, SentimentReward
        >>> reward = Product([Clip(SentimentReward(), low=0.0), ConstraintsReward()])
        >>> prompt = Prompt.from_text("Hi", metadata={"constraints": [{"type": "lowercase"}]})
        >>> reward.score([prompt, prompt], ["it was good.", "It was good."])
        array([0.4404, 0.    ])
    """

    rewards: Sequence[Any]
    name: str = ""
    default_name = "product({names})"

    def __post_init__(self) -> None:
        self._hold(self.rewards)

    def combine(self, totals: Totals, prompts: Prompts, responses: Texts) -> Combined:
        """Return the product."""
        for reward, total in zip(self.rewards, totals, strict=True):
            if (total < 0).any():
                row = int(np.argmax(total < 0))
                raise RewardError(
                    f"Reward model {self.name!r}: expected factors of at least 0, got "
                    f"{total[row]:g} from {reward.name!r} for prompt {prompts[row].id!r}, response "
                    f"{responses[row][:80]!r}. Clip or normalise that reward, or use a sum."
                )
        return np.prod(np.stack(totals), axis=0), {}

    def most(self, bounds: Totals, prefixes: Texts) -> FloatArray:
        """Return the product of the bounds; 0 if one of them is 0, even if another is infinite."""
        stacked = np.maximum(np.stack(bounds), 0.0)
        with np.errstate(invalid="ignore"):
            return np.where((stacked == 0).any(axis=0), 0.0, stacked.prod(axis=0))


@dataclass(eq=False, repr=False)
class Gate(Combinator):
    """A reward that counts only if another reward reaches a threshold.

    Args:
        reward: The reward.
        condition: The reward that has to reach `threshold`, such as `ConstraintsReward()`.
        threshold: The lowest score of `condition` that opens the gate.
        closed: The score if the gate is closed. It should not be higher than the score of `reward`
            for bad responses, for example -1 for sentiment.

    Example:
        >>> from mbrl_text_env.rewards import ConstraintsReward, SentimentReward
        >>> reward = Gate(SentimentReward(), ConstraintsReward(), closed=-1.0)
        >>> prompt = Prompt.from_text("Praise.", metadata={"constraints": [{"type": "lowercase"}]})
        >>> reward.score([prompt, prompt], ["it was good.", "It was good."])
        array([ 0.4404, -1.    ])
    """

    reward: Any
    condition: Any
    _: KW_ONLY
    threshold: float = 1.0
    closed: float = 0.0
    name: str = ""
    default_name = "{reward.name} if {condition.name}"

    def __post_init__(self) -> None:
        check_finite(self, "threshold", "closed")
        self.reward, self.condition = as_reward_model(self.reward), as_reward_model(self.condition)
        self._hold([self.reward, self.condition])

    def combine(self, totals: Totals, prompts: Prompts, responses: Texts) -> Combined:
        """Return the reward if the condition holds, otherwise `closed`."""
        return np.where(self._opens(totals[1]), totals[0], self.closed), {}

    def most(self, bounds: Totals, prefixes: Texts) -> FloatArray:
        """Return the higher of both outcomes, or `closed` if the condition can no longer hold."""
        return np.where(self._opens(bounds[1]), np.maximum(bounds[0], self.closed), self.closed)

    def _opens(self, condition: FloatArray) -> Any:
        # Rounding can keep a fraction such as 3 of 3 constraints slightly below 1.
        return condition >= self.threshold - 1e-9


@dataclass(eq=False, repr=False)
class Ensemble(Combinator):
    """An ensemble of rewards for the same quality, with an optional penalty for disagreement.

    The rewards should have the same scale; see `Normalise`. The parts are the scores of the rewards
    and "disagreement", the standard deviation of these scores.

    Source: Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", ICLR 2024 (mean,
    worst case, uncertainty-weighted). Deviation: the uncertainty is the standard deviation, which
    has the units of the score; the paper uses the variance.

    Args:
        rewards: At least two reward models with different names.
        rule: `"mean"`, `"min"`, or `"mean-std"`: the mean minus `k` standard deviations (the
            population standard deviation of the rewards' scores).
        k: See `rule`; at least 0.

    Example:
        >>> from mbrl_text_env.rewards import FunctionReward
        >>> short = FunctionReward(lambda prompt, response: 3.0)
        >>> long = FunctionReward(lambda prompt, response: 5.0)
        >>> short.name, long.name = "short", "long"
        >>> Ensemble([short, long], "mean-std").score([Prompt.from_text("Hi")], ["Hello"])
        array([3.])
    """

    rewards: Sequence[Any]
    rule: EnsembleRule = "mean"
    _: KW_ONLY
    k: float = 1.0
    name: str = ""
    default_name = "{rule}({names})"
    extra_parts = ("disagreement",)

    def __post_init__(self) -> None:
        one_of("rule", self.rule, EnsembleRule)
        check_finite(self, "k")
        if self.k < 0 or len(self.rewards) < 2:
            raise ValueError(
                "Ensemble: expected at least two rewards and k of at least 0, got "
                f"{len(self.rewards)} rewards and k={self.k}."
            )
        self._hold(self.rewards)

    def combine(self, totals: Totals, prompts: Prompts, responses: Texts) -> Combined:
        """Return the mean, the minimum, or the mean minus k standard deviations."""
        stacked = np.stack(totals)
        disagreement = stacked.std(axis=0)
        if self.rule == "min":
            return stacked.min(axis=0), {"disagreement": disagreement}
        k = self.k if self.rule == "mean-std" else 0.0
        return stacked.mean(axis=0) - k * disagreement, {"disagreement": disagreement}

    def most(self, bounds: Totals, prefixes: Texts) -> FloatArray:
        """Return the mean or the minimum of the bounds; a standard deviation is at least 0."""
        stacked = np.stack(bounds)
        return stacked.min(axis=0) if self.rule == "min" else stacked.mean(axis=0)

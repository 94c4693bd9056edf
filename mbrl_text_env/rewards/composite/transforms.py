"""Rewards that modify one reward: clip, rescale, penalise, price it, or limit its time.

The parts of the inner reward are kept for reports; penalties add a part of their own.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from mbrl_text_env.rewards.base import (
    RewardError,
    RewardModel,
    Scores,
    check_finite,
    reward_bounds,
    score_features,
    score_responses,
    score_steps,
)
from mbrl_text_env.rewards.composite.combinators import (
    Combined,
    Prompts,
    Texts,
    Totals,
    Wrapper,
)
from mbrl_text_env.runs import identity
from mbrl_text_env.types import FloatArray, Prompt

T = TypeVar("T")


@dataclass(eq=False, repr=False)
class Clip(Wrapper):
    """A reward clipped to the range from `low` to `high`; one of them can be None.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> Clip(SentimentReward(), low=0.0).score([Prompt.from_text("Hi")], ["It was awful."])
        array([0.])
    """

    low: float | None = None
    high: float | None = None
    name: str = ""
    default_name = "clip({reward.name})"

    def __post_init__(self) -> None:
        low, high = self.low, self.high
        if low is None and high is None:
            raise ValueError("Clip: expected at least one of low and high, got neither.")
        if not (-np.inf if low is None else low) <= (np.inf if high is None else high):
            raise ValueError(f"Clip: expected low to be at most high, got {low} and {high}.")
        super().__post_init__()

    def change(self, scores: FloatArray) -> FloatArray:
        """Clip the scores."""
        return np.clip(scores, self.low, self.high)


@dataclass(eq=False, repr=False)
class Threshold(Wrapper):
    """1 if a reward is at least `threshold`, a finite number; otherwise 0.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> reward = Threshold(SentimentReward(), 0.3)
        >>> reward.score([Prompt.from_text("Hi")] * 2, ["It was good.", "It was."])
        array([1., 0.])
    """

    threshold: float
    name: str = ""
    default_name = "{reward.name}>={threshold:g}"

    def __post_init__(self) -> None:
        check_finite(self, "threshold")
        super().__post_init__()

    def change(self, scores: FloatArray) -> FloatArray:
        """Return 1 or 0 for each score."""
        return (scores >= self.threshold).astype(np.float64)


@dataclass(eq=False, repr=False)
class Normalise(Wrapper):
    """A reward minus `mean`, divided by `std`; both are constant and finite, and `std` is positive.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> reward = Normalise(SentimentReward(), mean=0.2, std=0.4)
        >>> reward.score([Prompt.from_text("Hi")], ["It was."]).round(3)
        array([-0.5])
    """

    mean: float = 0.0
    std: float = 1.0
    name: str = ""
    default_name = "normalised({reward.name})"

    def __post_init__(self) -> None:
        check_finite(self, "mean")
        check_finite(self, "std", above=0)
        super().__post_init__()

    def change(self, scores: FloatArray) -> FloatArray:
        """Return (score - mean) / std."""
        return (scores - self.mean) / self.std


class Penalty(Wrapper):
    """A reward minus `weight` times a penalty per response; the weighted penalty is a part."""

    combines_steps: ClassVar[bool] = False
    weight: float

    @abstractmethod
    def penalty(self, response: str) -> float:
        """Return the penalty of a response before it is weighted."""

    def combine(self, totals: Totals, prompts: Prompts, responses: Texts) -> Combined:
        """Return the reward minus the weighted penalty."""
        penalty = self.weight * np.array([self.penalty(r) for r in responses], dtype=np.float64)
        return totals[0] - penalty, {self.extra_parts[0]: penalty}

    def most(self, bounds: Totals, prefixes: Texts) -> FloatArray:
        """Return the bound of the reward, since the penalty can still fall to 0."""
        return bounds[0]


@dataclass(eq=False, repr=False)
class LengthPenalty(Penalty):
    """A reward minus a penalty for each word beyond a limit.

    The first `max_words` words (separated by white space) are free. Each further word costs
    `weight`, which must be positive.

    Source: the soft overlong punishment of Yu et al., "DAPO", 2025. Deviations: it counts words,
    since a reward model sees text, and the penalty is unlimited.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> reward = LengthPenalty(SentimentReward(), max_words=2, weight=0.1)
        >>> reward.score([Prompt.from_text("Hi")], ["It was good."]).round(4)
        array([0.3404])
    """

    extra_parts = ("length_penalty",)

    max_words: int
    weight: float = 0.01
    name: str = ""
    default_name = "{reward.name}-length"

    def __post_init__(self) -> None:
        check_finite(self, "max_words", least=0)
        check_finite(self, "weight", above=0)
        super().__post_init__()

    def feature_names(self, prompt: Prompt) -> tuple[str, ...]:
        """Return the names of the reward's counts and "runs", the words split at white space."""
        return (*super().feature_names(prompt), "runs")

    def score_features(self, prompt: Prompt, features: Mapping[str, FloatArray]) -> FloatArray:
        """Return float64[N], the reward's scores given counts, minus the penalty."""
        excess = np.maximum(features["runs"] - self.max_words, 0.0)
        return score_features(self.reward, prompt, features) - self.weight * excess

    def penalty(self, response: str) -> float:
        """Return the number of words beyond the limit."""
        return max(0, len(response.split()) - self.max_words)

    def most(self, bounds: Totals, prefixes: Texts) -> FloatArray:
        """Return the reward's bound minus the penalty so far: the word count never decreases."""
        return bounds[0] - self.weight * np.array([self.penalty(p) for p in prefixes])


@dataclass(eq=False, repr=False)
class RepetitionPenalty(Penalty):
    """A reward minus `weight` (positive) times the fraction of repeated word n-grams.

    Case is ignored. A response of fewer than n words has no penalty.

    Source: the repetition penalty of Yeo et al., "Demystifying Long Chain-of-Thought Reasoning in
    LLMs", 2025. Deviation: it modifies another reward and is not a reward by itself.

    Example:
        >>> from mbrl_text_env.rewards import FunctionReward
        >>> reward = RepetitionPenalty(FunctionReward(lambda prompt, response: 0.0), n=1)
        >>> reward.score([Prompt.from_text("Hi")] * 2, ["so so so so", "as good as new"])
        array([-0.75, -0.25])
    """

    extra_parts = ("repetition_penalty",)

    weight: float = 1.0
    n: int = 3
    name: str = ""
    default_name = "{reward.name}-repetition"

    def __post_init__(self) -> None:
        check_finite(self, "weight", "n", above=0)
        super().__post_init__()

    def feature_names(self, prompt: Prompt) -> tuple[str, ...]:
        """Return the names of the counts needed; raise `RewardError` unless n = 1."""
        if self.n != 1:
            raise RewardError(
                f"Reward model {self.name!r}: expected n = 1 for scores given counts, got {self.n}."
                " There is no count of repeated n-grams. Change n, or use another value model."
            )
        return (*super().feature_names(prompt), "runs", "distinct_words")

    def score_features(self, prompt: Prompt, features: Mapping[str, FloatArray]) -> FloatArray:
        """Return float64[N], the reward's scores given counts, minus the penalty."""
        runs = features["runs"]
        share = (runs - features["distinct_words"]) / np.maximum(runs, 1.0)
        return score_features(self.reward, prompt, features) - self.weight * share

    def penalty(self, response: str) -> float:
        """Return the fraction of n-grams that are repetitions."""
        return repeated_share(response, self.n)


def repeated_share(text: str, n: int) -> float:
    """Return the fraction of a text's word n-grams that occurred before, in [0, 1)."""
    words = text.casefold().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


@dataclass(eq=False, repr=False)
class Priced(Wrapper):
    """A reward that is charged `price` FLOPs (at least 0) per call instead of its own FLOPs.

    Use it if the cost of a reward is known but not counted, as with a server, or to find out how a
    search performs if the reward is expensive. Scores and parts do not change.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> reward = Priced(SentimentReward(), 2e11)
        >>> reward.usage(Prompt.from_text("Hi"), "It was good.").flops
        200000000000.0
    """

    price: float

    def __post_init__(self) -> None:
        check_finite(self, "price", least=0)
        super().__post_init__()
        self.price = float(self.price)

    def reduced(self, dtype: str) -> RewardModel:
        """Return the reward in another dtype, at the same price."""
        return replace(self, reward=self.reward.reduced(dtype))

    def flops(self, prompts: Prompts, responses: Texts) -> FloatArray:
        """Return float64[B], the price of each response."""
        return np.full(len(responses), self.price)

    def flops_bound(self) -> float:
        """Return the price."""
        return self.price


@dataclass(eq=False, repr=False)
class TimeLimit(Wrapper):
    """A reward that raises `RewardError` if a call takes longer than `seconds` (finite, above 0).

    The limit holds for a call with any batch size. Each call runs in a thread. After a timeout the
    thread keeps running, because Python cannot stop a thread from outside.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> reward = TimeLimit(SentimentReward(), seconds=60)
        >>> reward.score([Prompt.from_text("Hi")], ["It was good."])
        array([0.4404])
    """

    seconds: float

    def __post_init__(self) -> None:
        check_finite(self, "seconds", above=0)
        super().__post_init__()

    def identity(self) -> Any:
        """Return the identity of the reward, since the limit does not change its scores."""
        return identity(self.reward)

    def reduced(self, dtype: str) -> RewardModel:
        """Return the reward in another dtype, with the same time limit."""
        return replace(self, reward=self.reward.reduced(dtype))

    def score_parts(self, prompts: Prompts, responses: Texts) -> Scores:
        """Return the reward's scores and parts, each float64[B]."""
        return self._in_time(lambda: score_responses(self.reward, prompts, responses), prompts)

    def bound(self, prompts: Prompts, prefixes: Texts) -> FloatArray:
        """Return float64[B], the reward's bounds."""
        return self._in_time(lambda: reward_bounds(self.reward, prompts, prefixes), prompts)

    def score_steps(self, prompt: Prompt, steps: Texts) -> FloatArray:
        """Return float64[len(steps)], the reward's step scores."""
        return self._in_time(lambda: score_steps(self.reward, prompt, steps), [prompt])

    def _in_time(self, function: Callable[[], T], prompts: Prompts) -> T:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        # A daemon thread, so the program can exit even if the reward hangs.
        threading.Thread(target=run, name=f"score {self.name}", daemon=True).start()
        if wait([future], self.seconds).not_done:
            others = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
            raise RewardError(
                f"Reward model {self.name!r}: expected scores within {self.seconds:g} seconds, got "
                f"none for prompt {prompts[0].id!r}{others}. Allow more time, score smaller "
                "batches, or fix the reward model."
            )
        return future.result()

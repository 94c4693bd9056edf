"""One reward, changed: clipped, rescaled, lowered by a penalty, priced, or limited in time.

Each keeps the scores of the reward inside it as parts for the report, and penalties add their own.
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
    """A reward kept from `low` to `high`, of which one may be None.

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
        """The scores within the bounds."""
        return np.clip(scores, self.low, self.high)


@dataclass(eq=False, repr=False)
class Threshold(Wrapper):
    """1 where a reward is at least `threshold`, a finite number; 0 elsewhere.

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
        """1 or 0."""
        return (scores >= self.threshold).astype(np.float64)


@dataclass(eq=False, repr=False)
class Normalise(Wrapper):
    """A reward minus `mean`, in units of `std`; both are fixed, finite, and `std` is above 0.

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
        """(score - mean) / std."""
        return (scores - self.mean) / self.std


class Penalty(Wrapper):
    """A reward minus `weight` times a penalty for each whole response, which is also a part."""

    combines_steps: ClassVar[bool] = False
    weight: float

    @abstractmethod
    def penalty(self, response: str) -> float:
        """What a response is charged, before the weight."""

    def combine(self, totals: Totals, prompts: Prompts, responses: Texts) -> Combined:
        """The reward minus the penalty."""
        penalty = self.weight * np.array([self.penalty(r) for r in responses], dtype=np.float64)
        return totals[0] - penalty, {self.extra_parts[0]: penalty}

    def most(self, bounds: Totals, prefixes: Texts) -> FloatArray:
        """That of the reward: a penalty may still fall to 0."""
        return bounds[0]


@dataclass(eq=False, repr=False)
class LengthPenalty(Penalty):
    """A reward minus a penalty for each word beyond a limit.

    `max_words` words (runs without white space) are free; each further one costs `weight`, which is
    above 0.

    Source: the soft overlong punishment of Yu et al., "DAPO", 2025. Deviations: it counts words,
    since a reward model sees text, and does not level off.

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
        """Those of the reward, and its runs without white space."""
        return (*super().feature_names(prompt), "runs")

    def score_features(self, prompt: Prompt, features: Mapping[str, FloatArray]) -> FloatArray:
        """Return float64[N], the reward's scores by counts, minus the penalty."""
        excess = np.maximum(features["runs"] - self.max_words, 0.0)
        return score_features(self.reward, prompt, features) - self.weight * excess

    def penalty(self, response: str) -> float:
        """Words beyond the limit."""
        return max(0, len(response.split()) - self.max_words)

    def most(self, bounds: Totals, prefixes: Texts) -> FloatArray:
        """That of the reward, minus the penalty so far: words never become fewer."""
        return bounds[0] - self.weight * np.array([self.penalty(p) for p in prefixes])


@dataclass(eq=False, repr=False)
class RepetitionPenalty(Penalty):
    """A reward minus `weight` (above 0) times the share of n-grams of words that occurred before.

    Case is ignored. A response of fewer than n words has no penalty.

    Source: the repetition penalty of Yeo et al., "Demystifying Long Chain-of-Thought Reasoning in
    LLMs", 2025. Deviation: it is added to another reward, and not a reward of its own.

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
        """Those of the reward, and its words, with n = 1; else a `RewardError`."""
        if self.n != 1:
            raise RewardError(
                f"Reward model {self.name!r}: expected n = 1 for a penalty by counts, got "
                f"{self.n}. Repeated n-grams are not counted; change n, or use another value model."
            )
        return (*super().feature_names(prompt), "runs", "distinct_words")

    def score_features(self, prompt: Prompt, features: Mapping[str, FloatArray]) -> FloatArray:
        """Return float64[N], the reward's scores by counts, minus the penalty."""
        runs = features["runs"]
        share = (runs - features["distinct_words"]) / np.maximum(runs, 1.0)
        return score_features(self.reward, prompt, features) - self.weight * share

    def penalty(self, response: str) -> float:
        """The share of n-grams that are repetitions."""
        return repeated_share(response, self.n)


def repeated_share(text: str, n: int) -> float:
    """The share of a text's n-grams of words that have occurred before, 0 to below 1."""
    words = text.casefold().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


@dataclass(eq=False, repr=False)
class Priced(Wrapper):
    """A reward each call of which is charged `price` FLOPs, from 0 up, in place of its own.

    It is for a reward whose cost is known and not counted, such as that of a server, and for asking
    what a search would be worth if the reward were expensive. Scores and parts are the reward's.

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
        """The reward in another format, at the same price."""
        return replace(self, reward=self.reward.reduced(dtype))

    def flops(self, prompts: Prompts, responses: Texts) -> FloatArray:
        """Return float64[B], the price of each."""
        return np.full(len(responses), self.price)

    def flops_bound(self) -> float:
        """The price."""
        return self.price


@dataclass(eq=False, repr=False)
class TimeLimit(Wrapper):
    """A reward that is given up on when a call takes longer than `seconds`, above 0 and finite.

    The call, whatever the size of its batch, runs in a thread; then there is a `RewardError`, and
    the thread is left behind, since nothing can end it from outside.

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
        """That of the reward: the limit does not change its scores."""
        return identity(self.reward)

    def reduced(self, dtype: str) -> RewardModel:
        """The reward in another format, within the same time."""
        return replace(self, reward=self.reward.reduced(dtype))

    def score_parts(self, prompts: Prompts, responses: Texts) -> Scores:
        """Return the reward's scores and parts, each float64[B]."""
        return self._in_time(lambda: score_responses(self.reward, prompts, responses), prompts)

    def bound(self, prompts: Prompts, prefixes: Texts) -> FloatArray:
        """Return float64[B], the reward's."""
        return self._in_time(lambda: reward_bounds(self.reward, prompts, prefixes), prompts)

    def score_steps(self, prompt: Prompt, steps: Texts) -> FloatArray:
        """Return float64[len(steps)], the reward's."""
        return self._in_time(lambda: score_steps(self.reward, prompt, steps), [prompt])

    def _in_time(self, function: Callable[[], T], prompts: Prompts) -> T:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        # A daemon: a program whose reward hangs can still end.
        threading.Thread(target=run, name=f"score {self.name}", daemon=True).start()
        if wait([future], self.seconds).not_done:
            others = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
            raise RewardError(
                f"Reward model {self.name!r}: expected scores within {self.seconds:g} seconds, got "
                f"none for prompt {prompts[0].id!r}{others}. Allow more time, score smaller "
                "batches, or fix the reward model."
            )
        return future.result()

"""A limit to the time that a reward model may take."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mbrl_text_env.rewards.base import (
    RewardError,
    RewardLike,
    Scores,
    score_responses,
    score_steps,
)
from mbrl_text_env.rewards.composite.combinators import Wrapper, check_finite
from mbrl_text_env.runs import identity
from mbrl_text_env.types import FloatArray, Prompt

T = TypeVar("T")


class TimeLimit(Wrapper):
    """A reward that is given up on when a call takes too long.

    The call runs in a thread; after `seconds` an error is raised and the thread is left behind,
    since nothing can end it from outside: it goes on taking time until it returns by itself or the
    program ends. The reward must not rely on running in the main thread (`signal.alarm` does).
    Programs that are to be stopped for certain belong in a process: see `UnitTestReward`.

    Args:
        reward: The reward.
        seconds: Wall time of one call, whatever the size of its batch; above 0.

    Raises:
        ValueError: `seconds` is not a finite number above 0.
        RewardError: When scoring: the time was not enough.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> reward = TimeLimit(SentimentReward(), seconds=60)
        >>> reward.score([Prompt.from_text("Hi")], ["It was good."])
        array([0.4404])
    """

    def __init__(self, reward: RewardLike, seconds: float) -> None:
        check_finite("TimeLimit", seconds=seconds)
        if not seconds > 0:
            raise ValueError(f"TimeLimit: expected seconds above 0, got {seconds}.")
        super().__init__(reward)
        self.seconds = seconds

    def identity(self) -> Any:
        """That of the reward: the limit does not change its scores."""
        return identity(self.reward)

    def reduced(self, dtype: str) -> TimeLimit:
        """The reward in another format, within the same time."""
        return TimeLimit(self.reward.reduced(dtype), self.seconds)

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Return the reward's scores and parts, each float64[B].

        Raises:
            RewardError: The reward failed, or took too long.
        """
        return self._in_time(lambda: score_responses(self.reward, prompts, responses), prompts)

    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> FloatArray:
        """Return float64[len(steps)], the reward's."""
        return self._in_time(lambda: score_steps(self.reward, prompt, steps), [prompt])

    def _in_time(self, function: Callable[[], T], prompts: Sequence[Prompt]) -> T:
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)

        # A daemon: a program whose reward hangs can still end.
        thread = threading.Thread(target=run, name=f"score {self.name}", daemon=True)
        thread.start()
        thread.join(self.seconds)
        if thread.is_alive():
            others = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
            raise RewardError(
                f"Reward model {self.name!r}: expected scores within {self.seconds:g} seconds, got "
                f"none for prompt {prompts[0].id!r}{others}. Allow more time, score smaller "
                "batches, or fix the reward model."
            )
        if errors:
            raise errors[0]
        return results[0]

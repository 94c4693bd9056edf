"""OpenEnv's rubrics as reward models.

Source: `openenv.core.rubrics.Rubric` (RFC 004 of OpenEnv): `rubric(action, observation) -> float`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mbrl_text_env.rewards.adapters.common import awaited, number
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.types import FloatArray, Prompt


class TextAction(str):
    """A response as OpenEnv's action: a text with `metadata`."""

    metadata: Mapping[str, Any]

    def __new__(cls, response: str) -> TextAction:
        """Make the action of a response."""
        action = super().__new__(cls, response)
        action.metadata = {}
        return action


class TextObservation(str):
    """A prompt as OpenEnv's observation: a text with `metadata`, `done` and `reward`."""

    metadata: Mapping[str, Any]
    done: bool
    reward: float | None

    def __new__(cls, prompt: Prompt) -> TextObservation:
        """Make the observation at the end of a response to a prompt."""
        observation = super().__new__(cls, prompt.text)
        observation.metadata = dict(prompt.metadata)
        observation.done, observation.reward = True, None
        return observation


class OpenEnvReward:
    """A rubric of OpenEnv as a reward model, called once a response.

    An episode is one step: the action is the response, the observation what is known at the end,
    with `done` True. Rubrics that collect a trajectory are reset before each. Hooks and async
    rubrics are run as OpenEnv runs them.

    Args:
        rubric: A rubric, called as `rubric(action, observation)`.
        convert: Makes action and observation of a prompt and a response, for rubrics that expect
            the types of their own environment; by default `TextAction` and `TextObservation`.
        name: By default the rubric's class.

    Example:
        >>> from openenv.core.rubrics import Rubric  # doctest: +SKIP
        >>> class Polite(Rubric):  # doctest: +SKIP
        ...     def forward(self, action, observation):
        ...         return float("please" in action)
        >>> OpenEnvReward(Polite()).score([Prompt.from_text("Ask.")], ["Tea, please."])  # doctest: +SKIP
        array([1.])
    """  # noqa: E501 the example

    def __init__(
        self,
        rubric: Any,
        convert: Callable[[Prompt, str], tuple[Any, Any]] | None = None,
        name: str | None = None,
    ) -> None:
        self.rubric = rubric
        self.convert = convert
        self.name = type(rubric).__name__ if name is None else name

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B].

        Raises:
            RewardError: The rubric raised, or returned no number.
        """
        return np.array(
            [self._score(*row) for row in zip(prompts, responses, strict=True)], dtype=np.float64
        )

    def _score(self, prompt: Prompt, response: str) -> float:
        convert = self.convert or (lambda p, r: (TextAction(r), TextObservation(p)))
        try:
            with contextlib.suppress(AttributeError):
                self.rubric.reset()
            value = awaited(self.rubric(*convert(prompt, response)))
        except Exception as error:
            raise RewardError(
                f"Reward model {self.name!r}: raised {type(error).__name__}: {error} for prompt "
                f"{prompt.id!r}, response {response[:80]!r}. Mend the rubric; if it expects the "
                "types of its environment, pass OpenEnvReward(rubric, convert=...)."
            ) from error
        return number(value, self.name, prompt, response)

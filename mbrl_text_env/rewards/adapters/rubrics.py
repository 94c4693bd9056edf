"""The rubrics of OpenEnv as reward models, and reward models as rubrics.

Source: `openenv.core.rubrics.Rubric` (RFC 004 of OpenEnv): `rubric(action, observation) -> float`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mbrl_text_env.rewards.adapters.common import AdaptedReward, RewardFunction, as_prompt
from mbrl_text_env.rewards.base import RewardLike
from mbrl_text_env.types import Prompt


class TextAction(str):
    """A response as OpenEnv's action: a text with `metadata`."""

    def __init__(self, response: str) -> None:
        self.metadata: Mapping[str, Any] = {}


class TextObservation(str):
    """A prompt as OpenEnv's observation: a text with `prompt`, `metadata`, `done` and `reward`."""

    def __new__(cls, prompt: Prompt) -> TextObservation:
        """Make the observation at the end of a response to a prompt."""
        return super().__new__(cls, prompt.text)

    def __init__(self, prompt: Prompt) -> None:
        self.prompt, self.metadata = prompt, dict(prompt.metadata)
        self.done, self.reward = True, None

    def __getnewargs__(self) -> tuple[Prompt]:  # type: ignore[override]
        return (self.prompt,)


class OpenEnvReward(AdaptedReward):
    """A rubric of OpenEnv as a reward model, called once a response.

    An episode is one step: the action is the response, the observation what is known at the end,
    with `done` True. Before each the rubric and those within it are reset, as by an environment, so
    that those which collect a trajectory start anew.

    Args:
        rubric: A rubric, called as `rubric(action, observation)`; may be async.
        convert: Makes action and observation of a prompt and a response, for rubrics that expect
            the types of their own environment; by default `TextAction` and `TextObservation`.
        name: By default the rubric's class.

    Example:
        >>> reward = OpenEnvReward(MyRubric())  # doctest: +SKIP
    """

    advice = (
        "Fix the rubric; if it expects the types of its environment, pass "
        "OpenEnvReward(rubric, convert=...)."
    )

    def __init__(
        self,
        rubric: Any,
        convert: Callable[[Prompt, str], tuple[Any, Any]] | None = None,
        name: str | None = None,
    ) -> None:
        self.rubric = rubric
        self.convert = convert
        self.name = name or type(rubric).__name__

    def value(self, prompt: Prompt, response: str) -> Any:
        """What the rubric says."""

        def episode() -> Any:
            for rubric in (self.rubric, *self.rubric.rubrics()):
                rubric.reset()
            if self.convert is not None:
                return self.rubric(*self.convert(prompt, response))
            return self.rubric(TextAction(response), TextObservation(prompt))

        return self.called(prompt, response, episode)


def to_openenv(
    reward_model: RewardLike, read: Callable[[Any, Any], tuple[Prompt, str]] | None = None
) -> Any:
    """Return a reward model as a `Rubric` of OpenEnv, which an environment calls when it steps.

    `read` makes prompt and response of an action and an observation. By default both are texts: the
    action is the response, the observation the prompt (a `TextObservation` has its metadata too).

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> rubric = to_openenv(SentimentReward())  # doctest: +SKIP
        >>> rubric("It was good.", "How was it?")  # doctest: +SKIP
        0.4404
    """
    try:
        from openenv.core.rubrics import Rubric
    except ImportError as error:
        raise ImportError("to_openenv needs OpenEnv: pip install openenv-core.") from error

    scorer = RewardFunction(reward_model)

    class RewardModelRubric(Rubric):
        def forward(self, action: Any, observation: Any) -> float:
            prompt, response = (read or _read)(action, observation)
            return scorer.totals([prompt], [response])[0]

    RewardModelRubric.__name__ = scorer.__name__
    return RewardModelRubric()


def _read(action: Any, observation: Any) -> tuple[Prompt, str]:
    if not isinstance(action, str) or not isinstance(observation, str):
        raise TypeError(
            f"Expected texts, got a {type(action).__name__} as action and a "
            f"{type(observation).__name__} as observation. Pass to_openenv(reward, read=...), a "
            "function that makes prompt and response of them."
        )
    prompt = getattr(observation, "prompt", None) or as_prompt(observation, {})
    return prompt, str(action)

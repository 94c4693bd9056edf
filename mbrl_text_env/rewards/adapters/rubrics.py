"""Convert OpenEnv rubrics to reward models, and reward models to rubrics.

Source: `openenv.core.rubrics.Rubric` (RFC 004 of OpenEnv): `rubric(action, observation) -> float`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbrl_text_env.rewards.adapters.common import AdaptedReward, RewardFunction, as_prompt
from mbrl_text_env.rewards.base import RewardLike
from mbrl_text_env.types import Prompt


class TextAction(str):
    """A response as an OpenEnv action: a string with `metadata`."""

    def __init__(self, response: str) -> None:
        self.metadata: Mapping[str, Any] = {}


class TextObservation(str):
    """A prompt as an OpenEnv observation: a string with `prompt`, `metadata`, `done`, `reward`."""

    def __new__(cls, prompt: Prompt) -> TextObservation:
        """Create the final observation of an episode."""
        return super().__new__(cls, prompt.text)

    def __init__(self, prompt: Prompt) -> None:
        self.prompt, self.metadata = prompt, dict(prompt.metadata)
        self.done, self.reward = True, None

    def __getnewargs__(self) -> tuple[Prompt]:  # type: ignore[override]
        return (self.prompt,)


class OpenEnvReward(AdaptedReward):
    """A reward model from an OpenEnv rubric, called once per response; it can be async.

    An episode has one step. The action is the response (`TextAction`); the observation is the
    prompt (`TextObservation`), with `done` True. The rubric and its child rubrics are reset before
    each episode, as an environment does, because some rubrics collect a trajectory.

    Example:
        >>> reward = OpenEnvReward(MyRubric())  # doctest: +SKIP
    """

    advice = (
        "Fix the rubric. If it expects the types of its environment, pass a function of prompt and "
        "response that calls it with these types."
    )

    def value(self, prompt: Prompt, response: str) -> Any:
        """Return the result of the rubric."""
        rubric: Any = self.function

        def episode() -> Any:
            for each in (rubric, *rubric.rubrics()):
                each.reset()
            return rubric(TextAction(response), TextObservation(prompt))

        return self.called(prompt, response, episode)


def to_openenv(reward_model: RewardLike) -> Any:
    """Convert a reward model to an OpenEnv `Rubric`, which an environment calls in each step.

    The action is the response, a string. The observation is the prompt, a string or
    `TextObservation`.

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
            if not isinstance(action, str) or not isinstance(observation, str):
                raise TypeError(
                    f"Expected strings, got a {type(action).__name__} as action and a "
                    f"{type(observation).__name__} as observation. Pass response and prompt."
                )
            prompt = getattr(observation, "prompt", None) or as_prompt(observation, {})
            return scorer.totals([prompt], [str(action)])[0]

    RewardModelRubric.__name__ = scorer.__name__
    return RewardModelRubric()

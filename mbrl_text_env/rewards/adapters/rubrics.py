"""The rubrics of OpenEnv as reward models, and reward models as rubrics.

Source: `openenv.core.rubrics.Rubric` (RFC 004 of OpenEnv): `rubric(action, observation) -> float`.
"""

from __future__ import annotations

from collections.abc import Mapping
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

    An episode is one step: the action is the response (`TextAction`), the observation what is known
    at the end (`TextObservation`), with `done` True. Before each the rubric, which may be async,
    and those within it are reset, as by an environment, so that those which collect a trajectory
    start anew.

    Example:
        >>> reward = OpenEnvReward(MyRubric())  # doctest: +SKIP
    """

    advice = (
        "Fix the rubric; if it expects the types of its environment, pass a function of prompt and "
        "response that calls it with these."
    )

    def value(self, prompt: Prompt, response: str) -> Any:
        """What the rubric says."""
        rubric: Any = self.function

        def episode() -> Any:
            for each in (rubric, *rubric.rubrics()):
                each.reset()
            return rubric(TextAction(response), TextObservation(prompt))

        return self.called(prompt, response, episode)


def to_openenv(reward_model: RewardLike) -> Any:
    """Return a reward model as a `Rubric` of OpenEnv, which an environment calls when it steps.

    The action is the response, a text; the observation the prompt, a text or `TextObservation`.

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
                    f"Expected texts, got a {type(action).__name__} as action and a "
                    f"{type(observation).__name__} as observation. Pass response and prompt."
                )
            prompt = getattr(observation, "prompt", None) or as_prompt(observation, {})
            return scorer.totals([prompt], [str(action)])[0]

    RewardModelRubric.__name__ = scorer.__name__
    return RewardModelRubric()

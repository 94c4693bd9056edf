"""OpenEnv's rubrics as reward models, and reward models as rubrics.

Source: `openenv.core.rubrics.Rubric` (RFC 004 of OpenEnv): `rubric(action, observation) -> float`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mbrl_text_env.rewards.adapters.common import AdaptedReward, adapted, as_prompt
from mbrl_text_env.rewards.base import RewardLike, score_responses
from mbrl_text_env.types import Prompt


class TextAction(str):
    """A response as OpenEnv's action: a text with `metadata`."""

    metadata: Mapping[str, Any]

    def __new__(cls, response: str) -> TextAction:
        """Make the action of a response."""
        action = super().__new__(cls, response)
        action.metadata = {}
        return action


class TextObservation(str):
    """A prompt as OpenEnv's observation: a text with `prompt`, `metadata`, `done` and `reward`."""

    prompt: Prompt
    metadata: Mapping[str, Any]
    done: bool
    reward: float | None

    def __new__(cls, prompt: Prompt) -> TextObservation:
        """Make the observation at the end of a response to a prompt."""
        observation = super().__new__(cls, prompt.text)
        observation.prompt, observation.metadata = prompt, dict(prompt.metadata)
        observation.done, observation.reward = True, None
        return observation

    def __getnewargs__(self) -> tuple[Prompt]:  # type: ignore[override]
        """What copies and pickles are made of."""
        return (self.prompt,)


class OpenEnvReward(AdaptedReward):
    """A rubric of OpenEnv as a reward model, called once a response.

    An episode is one step: the action is the response, the observation what is known at the end,
    with `done` True. Before each the rubric and those within it are reset, as by an environment, so
    that those which collect a trajectory start anew. Hooks and async rubrics are run as OpenEnv
    runs them.

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
        self.name = type(rubric).__name__ if name is None else name

    def values(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        """What the rubric says of each response."""
        return [self._value(*row) for row in zip(prompts, responses, strict=True)]

    def _value(self, prompt: Prompt, response: str) -> Any:
        def episode() -> Any:
            for rubric in (self.rubric, *self.rubric.rubrics()):
                rubric.reset()
            return self.rubric(*(self.convert or _texts)(prompt, response))

        return self.called(prompt, response, episode)


def to_openenv(
    reward_model: RewardLike, read: Callable[[Any, Any], tuple[Prompt, str]] | None = None
) -> Any:
    """Return a reward model as a `Rubric` of OpenEnv, which an environment calls when it steps.

    Args:
        reward_model: The reward model, or whatever `as_reward_model` takes.
        read: Makes prompt and response of an action and an observation. By default both are texts:
            the action is the response, the observation the prompt (a `TextObservation` has its
            metadata too).

    Raises:
        ImportError: openenv-core is not installed.

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

    scorer = adapted(reward_model)

    class RewardModelRubric(Rubric):
        def forward(self, action: Any, observation: Any) -> float:
            prompt, response = (read or _read)(action, observation)
            return float(score_responses(scorer, [prompt], [response]).total[0])

    RewardModelRubric.__name__ = scorer.name
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


def _texts(prompt: Prompt, response: str) -> tuple[TextAction, TextObservation]:
    return TextAction(response), TextObservation(prompt)

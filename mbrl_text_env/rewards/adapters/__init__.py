"""Convert functions and objects to reward models, and reward models to other packages' formats."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

from mbrl_text_env.rewards.adapters.common import (
    AdaptedReward,
    RewardFunction,
    callable_name,
    parameters,
    required,
)
from mbrl_text_env.rewards.adapters.rubrics import OpenEnvReward
from mbrl_text_env.rewards.adapters.rubrics import to_openenv as to_openenv
from mbrl_text_env.rewards.adapters.trainers import (
    OpenRLHFFunctionReward,
    TRLFunctionReward,
    VerlFunctionReward,
)
from mbrl_text_env.rewards.adapters.trainers import to_openrlhf as to_openrlhf
from mbrl_text_env.rewards.adapters.trainers import to_trl as to_trl
from mbrl_text_env.rewards.adapters.trainers import to_verl as to_verl
from mbrl_text_env.rewards.base import RewardLike, RewardModel, reward_model_of
from mbrl_text_env.types import Prompt

ACCEPTED = """\
  a name, or a sum of names           "sentiment", "0.5*sentiment+relevance", "my_file.py:brevity"
  an object with a method score(prompts, responses) -> float64[B]
  a function of two texts             f(prompt, response) -> float
  a TRL reward function               f(prompts, completions, **columns) -> list[float | None]
  an OpenEnv Rubric                   rubric(action, observation) -> float
  a verl reward function              f(data_source, solution_str, ground_truth, extra_info=None)
  an OpenRLHF reward function         f(queries, prompts, labels, **kwargs)"""


class FunctionReward(AdaptedReward):
    """A reward model from a function `f(prompt_text, response) -> float`, called once per response.

    The function can be async; returning None ("does not apply") is an error. Picklable if it is.

    Example:
        >>> reward = FunctionReward(lambda prompt, response: float(prompt in response))
        >>> reward.score([Prompt.from_text("Paris")], ["Paris, France"])
        array([1.])
    """

    def value(self, prompt: Prompt, response: str) -> Any:
        """Return the result of the function."""
        return self.called(prompt, response, lambda: self.function(prompt.text, response))


def as_reward_model(
    reward: RewardLike, *, encode: Callable[[str], Sequence[int]] | None = None
) -> RewardModel:
    """Convert any of the kinds of rewards listed in `ACCEPTED` to a reward model.

    The kind is recognised by the class or the parameter names. A `RewardModel` is returned
    unchanged, and the result of `to_trl`, `to_verl` or `to_openrlhf` becomes its reward model
    again. If an object with a method `score` has other `RewardModel` methods, they are used too.

    Args:
        reward: A reward of one of these kinds.
        encode: Returns the token ids of a text, for TRL functions that read `completion_ids`. The
            response's text is encoded again, so the ids can differ from the sampled ones.

    Raises:
        RewardSpecError: The name is unknown.
        TypeError: The kind is unknown, or it needs input that a reward model does not have:
            `completion_ids` without `encode`, or the other responses of a group.

    Example:
        >>> def brevity(prompt, response):
        ...     return -len(response.split())
        >>> reward = as_reward_model(brevity)
        >>> reward.name, reward.score([Prompt.from_text("Hi")], ["Hello you"])
        ('brevity', array([-2.]))
    """
    if isinstance(reward, str):
        # Imported here because the registry itself imports this module.
        from mbrl_text_env.rewards.registry import make

        return make(reward)
    if inspect.isclass(reward):
        raise TypeError(
            f"Expected a reward, got the class {reward.__name__}. Create an instance: "
            f"{reward.__name__}(...)."
        )
    if _is_rubric_of_openenv(reward):
        return OpenEnvReward(cast("Any", reward))
    if isinstance(reward, RewardFunction):
        return reward.reward_model
    if isinstance(reward, RewardModel) or callable(getattr(reward, "score", None)):
        return reward_model_of(reward)
    function = cast("Callable[..., Any]", reward)
    named = parameters(function)
    if named.keys() & {"completions", "completion_ids"}:
        return TRLFunctionReward(function, encode)
    if named.keys() & {"solution_str", "solution_strs"}:
        return VerlFunctionReward(function)
    if "queries" in named:
        return OpenRLHFFunctionReward(function)
    needed = {name: named[name] for name in named if name in required(function)}
    # A function with the parameter names of the package verifiers is not f(prompt, response).
    of_verifiers = named.keys() & {"completion", "state"} and [*needed] != ["prompt", "completion"]
    by_place = all(p.kind is not p.KEYWORD_ONLY for p in needed.values())
    if len(needed) == 2 and by_place and not of_verifiers:
        return FunctionReward(function)
    signature = f"({', '.join(map(str, named.values()))})" if named else ""
    shown = callable_name(reward) if callable(reward) else f"{reward!r:.80}"
    described = shown if reward is None else f"{type(reward).__name__} {shown}"
    raise TypeError(f"Expected a reward, got {described}{signature}. Accepted are:\n{ACCEPTED}")


def _is_rubric_of_openenv(reward: object) -> bool:
    # Compare names, so that OpenEnv is not imported for other rewards.
    return any(
        cls.__name__ == "Rubric" and cls.__module__.partition(".")[0] == "openenv"
        for cls in type(reward).__mro__
    )

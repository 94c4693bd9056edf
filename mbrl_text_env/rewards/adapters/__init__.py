"""Whatever scores responses as a reward model, and reward models as functions of other packages."""

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
  a reward function of TRL            f(prompts, completions, **columns) -> list[float | None]
  OpenEnv's Rubric                    rubric(action, observation) -> float
  one of verl                         f(data_source, solution_str, ground_truth, extra_info=None)
  one of OpenRLHF                     f(queries, prompts, labels, **kwargs)"""


class FunctionReward(AdaptedReward):
    """A function `f(prompt_text, response) -> float` as a reward model, called once a response.

    None, for a prompt that it does not apply to, is an error. May be async. Picklable if it is.

    Example:
        >>> reward = FunctionReward(lambda prompt, response: float(prompt in response))
        >>> reward.score([Prompt.from_text("Paris")], ["Paris, France"])
        array([1.])
    """

    def value(self, prompt: Prompt, response: str) -> Any:
        """What the function returns."""
        return self.called(prompt, response, lambda: self.function(prompt.text, response))


def as_reward_model(
    reward: RewardLike, *, encode: Callable[[str], Sequence[int]] | None = None
) -> RewardModel:
    """Return a reward model for whatever scores responses; `ACCEPTED` lists what does.

    It is recognised by its class or the names of its parameters. A `RewardModel` is returned as it
    is; what `to_trl`, `to_verl` and `to_openrlhf` made of one becomes that one again; of an object
    with a method `score`, everything else that it has of a `RewardModel` counts too.

    Args:
        reward: One of these.
        encode: Token ids of a response's text, for TRL's functions that read `completion_ids`. They
            are those of the text encoded anew, which may differ from the sampled ones.

    Raises:
        RewardSpecError: It is a name that is not known.
        TypeError: It is none of these, or needs what a reward model does not have: `completion_ids`
            without `encode`, or the other responses of a group.

    Example:
        >>> def brevity(prompt, response):
        ...     return -len(response.split())
        >>> reward = as_reward_model(brevity)
        >>> reward.name, reward.score([Prompt.from_text("Hi")], ["Hello you"])
        ('brevity', array([-2.]))
    """
    if isinstance(reward, str):
        # It looks up names of rewards that are made with this.
        from mbrl_text_env.rewards.registry import make

        return make(reward)
    if inspect.isclass(reward):
        raise TypeError(
            f"Expected a reward, got the class {reward.__name__}. Make an object of it: "
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
    # Of verifiers: its names in any order are no prompt and response.
    of_verifiers = named.keys() & {"completion", "state"} and [*needed] != ["prompt", "completion"]
    by_place = all(p.kind is not p.KEYWORD_ONLY for p in needed.values())
    if len(needed) == 2 and by_place and not of_verifiers:
        return FunctionReward(function)
    signature = f"({', '.join(map(str, named.values()))})" if named else ""
    shown = callable_name(reward) if callable(reward) else f"{reward!r:.80}"
    described = shown if reward is None else f"{type(reward).__name__} {shown}"
    raise TypeError(f"Expected a reward, got {described}{signature}. Accepted are:\n{ACCEPTED}")


def _is_rubric_of_openenv(reward: object) -> bool:
    # By name: a caller with a rubric has imported its package; others need not.
    return any(
        cls.__name__ == "Rubric" and cls.__module__.partition(".")[0] == "openenv"
        for cls in type(reward).__mro__
    )

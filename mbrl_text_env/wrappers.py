"""A wrapper that changes the reward: potential-based shaping.

It fits the text environment and the candidate view. (For a KL penalty, give the environment the
reward model `mbrl_text_env.rewards.KLPenalty`.)
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from mbrl_text_env.env import TextGenerationEnv, unchanged_if_it_fails
from mbrl_text_env.mdp import is_terminal
from mbrl_text_env.types import TextState
from mbrl_text_env.values import ValueModel, predict_values


class PotentialShaping(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Add `discount * potential(next state) - potential(state)` to every reward.

    The potential is a value model's mean and, where a response has ended, 0; then the optimal
    policy stays the same whatever the value model says (Ng, Harada and Russell, "Policy invariance
    under reward transformations", 1999). Episodes that a token limit ends count as ended, because
    the limit is a part of this task and the score is paid there.

    Args:
        env: A text environment or a candidate view of one.
        value_model: Predicts the final reward of a prefix.
        discount: The discount that the agent uses, above 0 and at most 1.

    Raises:
        ValueError: The discount is out of range.
        TypeError: There is no `TextGenerationEnv` inside.
    """

    def __init__(
        self, env: gym.Env[Any, Any], value_model: ValueModel, discount: float = 1.0
    ) -> None:
        if not 0 < discount <= 1:
            raise ValueError(f"discount: expected a number above 0 and up to 1, got {discount}.")
        RecordConstructorArgs.__init__(
            self, _disable_deepcopy=True, value_model=value_model, discount=discount
        )
        gym.Wrapper.__init__(self, env)
        self.value_model = value_model
        self.discount = discount
        self._base = _text_env(env)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step and shape the reward; `info["unshaped_reward"]` is the one before."""
        before = self._potential(self._base.get_state())
        with unchanged_if_it_fails(self.env):
            observation, reward, terminated, truncated, info = self.env.step(action)
            shaping = self.discount * self._potential(self._base.get_state()) - before
        info = {**info, "unshaped_reward": float(reward)}
        return observation, float(reward) + shaping, terminated, truncated, info

    def _potential(self, state: TextState) -> float:
        if is_terminal(state):
            return 0.0
        return float(predict_values(self.value_model, [state]).mean[0])


def _text_env(env: gym.Env[Any, Any]) -> TextGenerationEnv:
    base = env.unwrapped
    if not isinstance(base, TextGenerationEnv):
        raise TypeError(f"Expected a TextGenerationEnv inside, got {type(base).__name__}.")
    return base

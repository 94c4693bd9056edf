"""Wrappers that change the reward: potential-based shaping and a KL penalty.

Both fit the text environment and the candidate view, alone or together.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from mbrl_text_env.env import text_env, unchanged_if_it_fails
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.mdp import is_terminal
from mbrl_text_env.types import Chunk, TextState
from mbrl_text_env.values import ValueModel, predict_values


class _RewardWrapper(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Changes the reward by what a step has changed of the state."""

    def __init__(self, env: gym.Env[Any, Any], **arguments: Any) -> None:
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, **arguments)
        gym.Wrapper.__init__(self, env)
        self._base = text_env(env)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step and change the reward; `info` says how. A failure leaves everything as it was."""
        before = self._base.get_state()
        with unchanged_if_it_fails(self.env):
            observation, reward, terminated, truncated, info = self.env.step(action)
            change, told = self._change(float(reward), before, self._base.get_state())
        return observation, float(reward) + change, terminated, truncated, {**info, **told}

    def _change(
        self, reward: float, before: TextState, after: TextState
    ) -> tuple[float, dict[str, float]]:
        """What is added to the reward, and what `info` says of it."""
        raise NotImplementedError


class PotentialShaping(_RewardWrapper):
    """Add `discount * potential(next state) - potential(state)` to every reward.

    The potential is a value model's mean and, where a response has ended, 0; then the optimal
    policy stays the same whatever the value model says (Ng, Harada and Russell, "Policy invariance
    under reward transformations", 1999). Episodes that a token limit ends count as ended, because
    the limit is a part of this task and the score is paid there. `info["unshaped_reward"]` is the
    reward before.

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
        super().__init__(env, value_model=value_model, discount=discount)
        self.value_model = value_model
        self.discount = discount

    def _change(
        self, reward: float, before: TextState, after: TextState
    ) -> tuple[float, dict[str, float]]:
        shaping = self.discount * self._potential(after) - self._potential(before)
        return shaping, {"unshaped_reward": reward}

    def _potential(self, state: TextState) -> float:
        if is_terminal(state):
            return 0.0
        return float(predict_values(self.value_model, [state]).mean[0])


class KLPenalty(_RewardWrapper):
    """Subtract `coefficient` times the chunk's log-probability ratio of policy and reference.

    Summed over an episode, `log policy - log reference` estimates without bias the KL divergence of
    the policy from the reference (Ziegler et al., "Fine-tuning language models from human
    preferences", 2019). `info["kl"]` is a step's ratio in nats.

    Args:
        env: A text environment or a candidate view of one.
        reference: The language model to stay near.
        coefficient: At least 0.
        policy: The language model that the chunks are drawn from. Without one only
            `-log reference` is charged: with an entropy bonus of the same coefficient in the agent,
            that is the same objective.

    Raises:
        ValueError: The coefficient is negative.
        TypeError: There is no `TextGenerationEnv` inside.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        reference: LanguageModel,
        coefficient: float = 0.1,
        policy: LanguageModel | None = None,
    ) -> None:
        if not coefficient >= 0:
            raise ValueError(f"coefficient: expected 0 or more, got {coefficient}.")
        super().__init__(env, reference=reference, coefficient=coefficient, policy=policy)
        self.reference = reference
        self.coefficient = coefficient
        self.policy = policy

    def _change(
        self, reward: float, before: TextState, after: TextState
    ) -> tuple[float, dict[str, float]]:
        ids = after.response_ids[len(before.response_ids) :]
        ratio = -_logprob(self.reference, before, ids)
        if self.policy is not None:
            ratio += _logprob(self.policy, before, ids)
        return -self.coefficient * ratio, {"kl": ratio}


def _logprob(model: LanguageModel, state: TextState, token_ids: tuple[int, ...]) -> float:
    return float(sum(model.logprobs([state], [Chunk(token_ids)])[0]))

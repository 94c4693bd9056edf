"""Gymnasium's vector environments as stable-baselines3's: one model call for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from mbrl_text_env.rewards.base import RewardError


class VectorEnvAdapter(VecEnv):
    """A Gymnasium vector environment for stable-baselines3, which otherwise steps one by one.

    As stable-baselines3 expects, an environment that ends is reset in the same step, and its info
    has the last observation as `terminal_observation` beside what Gymnasium calls its final info.

    Args:
        env: Its autoreset mode is `SameStep`, or a `ValueError` is raised.
        bootstrap_truncated: Whether an episode that was truncated is treated as if it went on, with
            the value of the last observation. False for text environments, where the token limit is
            part of the task and the response is scored when it is met.

    Example:
        >>> env = gym.make_vec(
        ...     "mbrl_text_env/CandidateChunks-v0", num_envs=8, autoreset_mode="SameStep"
        ... )  # doctest: +SKIP
        >>> PPO("MlpPolicy", VectorEnvAdapter(env)).learn(4096)  # doctest: +SKIP
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], *, bootstrap_truncated: bool = False) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                "VectorEnvAdapter: expected a vector environment with autoreset_mode 'SameStep', "
                f"got {mode!r}. Make it with gym.make_vec(..., autoreset_mode='SameStep')."
            )
        self.env = env
        self.bootstrap_truncated = bootstrap_truncated
        self._actions: Any = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Any:
        """Reset all environments; returns the observations."""
        seeds = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        options = self._options[0]
        if any(other != options for other in self._options):
            raise ValueError(
                "set_options: expected the same options for all environments, got different ones."
            )
        observations, infos = self.env.reset(seed=seeds, options=options or None)  # type: ignore[arg-type, unused-ignore]
        self.reset_infos = [_row(infos, i) for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Step all environments; returns observations, float32 rewards, dones and infos.

        Raises:
            RewardError: A reward is NaN or infinite, which would make all weights NaN.
        """
        observations, rewards, terminated, truncated, infos = self.env.step(self._actions)
        _check_rewards(rewards)
        dones = np.logical_or(terminated, truncated)
        now = {key: infos[key] for key in infos if key not in ("final_obs", "final_info")}
        rows = [{**_row(now, i), "TimeLimit.truncated": False} for i in range(self.num_envs)]
        for i in np.flatnonzero(dones).tolist():
            cut = bool(truncated[i]) and not terminated[i]
            self.reset_infos[i] = _row(now, i)
            rows[i] = {
                **_row(infos["final_info"], i),
                "terminal_observation": infos["final_obs"][i],
                "TimeLimit.truncated": cut and self.bootstrap_truncated,
            }
        return observations, np.asarray(rewards, dtype=np.float32), dones, rows

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_images(self) -> Sequence[Any]:
        """A frame of each environment; None where frames are not rendered."""
        frames = self.env.render() if self.render_mode == "rgb_array" else None
        return [None] * self.num_envs if frames is None else list(frames)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The vector environment's attribute, once for each environment asked for."""
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the vector environment, which all of them share."""
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the vector environment once; its result for each one asked for."""
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Whether a vector wrapper of this class is around the environment."""
        env: Any = self.env
        while not isinstance(env, wrapper_class) and hasattr(env, "env"):
            env = env.env
        return [isinstance(env, wrapper_class) for _ in self._get_indices(indices)]

    def _get_indices(self, indices: Any) -> Iterable[int]:
        if isinstance(indices, Sequence):
            return indices
        found: Iterable[int] = super()._get_indices(indices)
        return found


def _row(stacked: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The info of one environment out of Gymnasium's info of all."""
    row = {}
    for key, values in stacked.items():
        if key.startswith("_") or not stacked[f"_{key}"][index]:
            continue
        value = _row(values, index) if isinstance(values, Mapping) else values[index]
        row[key] = value.item() if isinstance(value, np.generic) else value
    return row


def _check_rewards(rewards: Any) -> None:
    bad = np.flatnonzero(~np.isfinite(rewards))
    if bad.size:
        raise RewardError(
            f"Expected finite rewards, got {np.asarray(rewards)[bad].tolist()} from environments "
            f"{bad.tolist()}: what learns from them would stay NaN. Make the environment "
            "with failed_reward=0.0 (the reward of an episode whose response cannot be scored), or "
            "with on_reward_error='raise'."
        )

"""An imagined environment: an ensemble predicts the candidates, thousands of steps per second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from mbrl_text_env.mdp import EpisodeEndedError
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, score_features
from mbrl_text_env.types import FloatArray, Prompt, TextState, check_positive
from mbrl_text_env.world_model.dynamics import WorldModelError
from mbrl_text_env.world_model.ensemble import EnsembleDynamics

_Rows = npt.NDArray[np.float32]
_Flags = npt.NDArray[np.bool_]


class ImaginedCandidates(VectorEnv[Any, Any, Any]):
    """`CandidateChunks` without a language model: an action chooses one of K imagined chunks.

    Episodes start at real states. At each step, the ensemble predicts the features of the prefix
    followed by each of K chunks; the action is the index of the chunk to append. The reward of a
    response that ends is computed from its features, without a reward call; all other rewards are
    0. Episodes keep their member ("fixed_model") or draw one at each step ("random_model").

    Observations are float32[(K + 1) * (F + 2)]. For the prefix and for each candidate, they contain
    the F standardized features, whether the response has ended, and its reward if it ended there.
    `observe` builds the same from real candidates, to run a policy trained here.

    Source: short rollouts from real states, as in Janner et al., "When to Trust Your Model:
    Model-Based Policy Optimization", NeurIPS 2019, with a schedule of their length as in mbrl-lib.

    Args:
        dynamics: Fitted dynamics.
        reward_model: A reward with `feature_names` and `score_features`.
        starts: Real states that have not ended; each episode starts at a random one.
        num_envs: Number of sub-environments.
        num_candidates: K, at least 1.
        rollout_chunks: Number of chunks after which an episode is truncated, or a function that
            maps the steps taken so far to that number; None for no limit.
        autoreset_mode: Gymnasium's `SameStep`, for stable-baselines3, or `Disabled`, for TorchRL.
        seed: Seed of all random numbers until `reset` sets another.

    Raises:
        RewardError: The reward needs features that are not predicted.
        WorldModelError: The dynamics are not fitted, or a start has ended or is as long as the
            longest record.

    Example:
        >>> env = ImaginedCandidates(dynamics, reward, starts, num_envs=64)  # doctest: +SKIP
        >>> PPO("MlpPolicy", VectorEnvAdapter(env, bootstrap_truncated=True))  # doctest: +SKIP
    """

    # Attributes with one row per sub-environment that are drawn at each step.
    _DRAWN = ("_candidates", "_ended", "_worth", "_shown", "_member")

    def __init__(
        self,
        dynamics: EnsembleDynamics,
        reward_model: RewardLike,
        starts: Sequence[TextState],
        *,
        num_envs: int = 64,
        num_candidates: int = 4,
        rollout_chunks: int | Callable[[int], int] | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        seed: int = 0,
    ) -> None:
        check_positive(num_envs=num_envs, num_candidates=num_candidates)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            raise ValueError("autoreset_mode: expected 'SameStep' or 'Disabled', got 'NextStep'.")
        if not dynamics.is_fitted or not starts:
            raise WorldModelError("Expected fitted dynamics and at least one state to start from.")
        for state in starts:
            if state.finish_reason is not None or len(state.response_ids) >= dynamics.longest_:
                raise WorldModelError(
                    f"Prompt {state.prompt.id!r}: expected starts that go on, of less than "
                    f"{dynamics.longest_} tokens, got {len(state.response_ids)} with "
                    f"finish_reason={state.finish_reason!r}. Leave it out."
                )
        self.dynamics, self.reward_model = dynamics, as_reward_model(reward_model)
        self.num_envs, self.num_candidates = num_envs, num_candidates
        self.rollout_chunks = rollout_chunks
        self.metadata = {"autoreset_mode": self.autoreset_mode}
        size = (num_candidates + 1) * (len(dynamics.names) + 2)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.single_action_space = gym.spaces.Discrete(num_candidates)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._prompts = [state.prompt for state in starts]
        self._begun = dynamics.varying(starts)
        self._rng, self._steps = np.random.default_rng(seed), 0
        self._at = np.zeros(num_envs, dtype=np.int64)
        self._taken, self._member = self._at.copy(), self._at.copy()
        self._over = np.zeros(num_envs, dtype=bool)
        self._rows = np.repeat(self._begun[:1], num_envs, axis=0)
        for prompt in dict.fromkeys(self._prompts):
            self._rewards(self._begun[:1], self._begun[:1], [prompt])
        self.reset()

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Rows, dict[str, Any]]:
        """Start all episodes, or those selected by `options["reset_mask"]` (bool[N]).

        A seed, or a list of seeds, makes the following steps reproducible.
        """
        if seed is not None:
            entropy = seed if isinstance(seed, int) else [each or 0 for each in seed]
            self._rng = np.random.default_rng(entropy)
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise ValueError(
                f"options['reset_mask']: expected bool[{self.num_envs}], got {mask!r}."
            )
        self._begin(mask)
        kept = {} if mask.all() else {name: getattr(self, name) for name in self._DRAWN}
        self._proposed()
        for name, rows in kept.items():
            getattr(self, name)[~mask] = rows[~mask]
        return self._shown, {}

    def step(self, actions: Any) -> tuple[_Rows, FloatArray, _Flags, _Flags, dict[str, Any]]:
        """Append the candidates with these indices, int[num_envs]."""
        if not self.action_space.contains(numbers := np.asarray(actions, dtype=np.int64)):
            raise ValueError(
                f"actions: expected {self.num_envs} numbers of candidates, 0 to "
                f"{self.num_candidates - 1}, got {actions}."
            )
        if self._over.any():
            raise EpisodeEndedError(
                f"Environments {np.flatnonzero(self._over).tolist()} have ended. Reset them with "
                "reset(options={'reset_mask': terminations | truncations})."
            )
        chosen = np.arange(self.num_envs), numbers
        self._rows, ended = self._candidates[chosen], self._ended[chosen]
        rewards = np.where(ended, self._worth[chosen], 0.0)
        self._taken += 1
        self._steps += self.num_envs
        limit = self.rollout_chunks
        limit = limit(self._steps) if callable(limit) else limit
        cut = ~ended & (limit is not None and self._taken >= (limit or 0))
        infos: dict[str, Any] = {}
        done = ended | cut
        if self.autoreset_mode == AutoresetMode.DISABLED:
            self._over = done
        elif done.any():
            # Truncated episodes need a real final observation to bootstrap; ended ones do not.
            infos = self._final(
                done, ended, rewards, self._proposed() if cut.any() else self._shown
            )
            self._begin(done)
        return self._proposed(), rewards, ended, cut, infos

    def observe(self, state: TextState, candidates: Sequence[TextState]) -> _Rows:
        """The observation (float32) of a real state and the K real states after its candidates."""
        if len(candidates) != self.num_candidates:
            raise ValueError(f"candidates: expected {self.num_candidates}, got {len(candidates)}.")
        rows = self.dynamics.varying([state, *candidates])
        ended = np.asarray([each.finish_reason is not None for each in candidates])
        worth = self._rewards(rows, np.repeat(rows[:1], len(rows), axis=0), [state.prompt])
        found: _Rows = self._observation(rows[None], ended[None], worth[None])[0]
        return found

    def _begin(self, which: _Flags) -> None:
        """Start new episodes in the sub-environments of a mask."""
        count = int(which.sum())
        self._at[which] = self._rng.integers(len(self._begun), size=count)
        self._rows[which] = self._begun[self._at[which]]
        self._taken[which], self._over[which] = 0, False
        self._member[which] = self.dynamics.draw_members(count, self._rng)

    def _proposed(self) -> _Rows:
        """Predict candidates for all sub-environments at once; return the observations."""
        envs, count = self.num_envs, self.num_candidates
        if self.dynamics.propagation == "random_model":
            self._member = self.dynamics.draw_members(envs, self._rng)
        repeated = np.repeat(self._rows, count, axis=0)
        after, ended = self.dynamics.advance(repeated, np.repeat(self._member, count), self._rng)
        self._candidates, self._ended = after.reshape(envs, count, -1), ended.reshape(envs, count)
        rows = np.concatenate([self._rows[:, None], self._candidates], axis=1)
        begun = np.repeat(self._begun[self._at], count + 1, axis=0)
        prompts = [self._prompts[at] for at in self._at]
        worth = self._rewards(rows.reshape(len(begun), -1), begun, prompts)
        worth = worth.reshape(envs, count + 1)
        self._shown, self._worth = self._observation(rows, self._ended, worth), worth[:, 1:]
        return self._shown

    def _rewards(self, rows: _Rows, begun: _Rows, prompts: Sequence[Prompt]) -> FloatArray:
        """Rewards if the responses ended there, float64[N]; N / len(prompts) rows per prompt."""
        settled = self.dynamics.settled(begun, rows).astype(np.float64)
        names, parts = self.dynamics.names, np.split(settled, len(prompts))
        return np.concatenate(
            [
                score_features(self.reward_model, prompt, dict(zip(names, part.T, strict=True)))
                for prompt, part in zip(prompts, parts, strict=True)
            ]
        )

    def _observation(self, rows: Any, ended: Any, worth: Any) -> Any:
        """float32[B, (K + 1) * (F + 2)]."""
        over = np.concatenate([np.zeros((len(rows), 1)), ended], axis=1)
        parts = [self.dynamics.scaled(rows), over[..., None], worth[..., None]]
        return np.concatenate(parts, axis=2).reshape(len(rows), -1).astype(np.float32)

    def _final(
        self, done: _Flags, ended: _Flags, scores: FloatArray, shown: _Rows
    ) -> dict[str, Any]:
        """Gymnasium's infos for episodes that are reset in the same step."""
        last = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(done):
            last[i] = shown[i]
        info = {"score": scores, "_score": ended}
        return {"final_obs": last, "_final_obs": done, "final_info": info, "_final_info": done}

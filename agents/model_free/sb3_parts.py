"""The vector environment, policies and checkpoints for training with stable-baselines3.

Checkpoints are safetensors and JSON of public attributes, with the environments' states. The `save`
method of stable-baselines3 writes pickles, without the environments.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from safetensors import SafetensorError
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import nn

from mbrl_text_env.agents.learning.training import TuningError, storage
from mbrl_text_env.agents.model_free.candidate_policy import CandidateScorer, StateValue
from mbrl_text_env.files import write_folder
from mbrl_text_env.mdp import initial
from mbrl_text_env.proposer import FeatureLayout
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.types import Prompt, TextState
from mbrl_text_env.wrappers import CandidateChunksVector, CandidateState

_STATE, _TENSORS = "trainer_state.json", "tensors.safetensors"
_BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
_KEPT = 2


class VectorEnvAdapter(VecEnv):
    """Wrap a Gymnasium vector environment as a stable-baselines3 `VecEnv`, stepped in batches.

    Args:
        env: A vector environment with autoreset mode `SameStep`; a `ValueError` otherwise.
        bootstrap_truncated: Whether to bootstrap the value of truncated episodes. False for text
            environments, because the token limit is part of the task.

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
        """Reset all environments and return the observations."""
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
        """Store the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Step all environments; raise a `RewardError` for NaN or infinite rewards."""
        observations, rewards, terminated, truncated, infos = self.env.step(self._actions)
        bad = np.flatnonzero(~np.isfinite(rewards))
        if bad.size:
            raise RewardError(
                f"Expected finite rewards, got {np.asarray(rewards)[bad].tolist()} from "
                f"environments {bad.tolist()}. Create the environment with failed_reward=0.0, or "
                "with on_reward_error='raise'."
            )
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
        """Rendered frame of each environment; None if rendering is disabled."""
        frames = self.env.render() if self.render_mode == "rgb_array" else None
        return [None] * self.num_envs if frames is None else list(frames)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return the shared attribute once per requested environment."""
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the vector environment, shared by all environments."""
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the vector environment once; return its result per environment."""
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Whether a vector wrapper of this class wraps the environment."""
        env: Any = self.env
        while not isinstance(env, wrapper_class) and hasattr(env, "env"):
            env = env.env
        return [isinstance(env, wrapper_class) for _ in self._get_indices(indices)]


def _row(stacked: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Extract the info of one environment from Gymnasium's batched info."""
    row = {}
    for key, values in stacked.items():
        if key.startswith("_") or not stacked[f"_{key}"][index]:
            continue
        value = _row(values, index) if isinstance(values, Mapping) else values[index]
        row[key] = value.item() if isinstance(value, np.generic) else value
    return row


class _ActorAndCritic(nn.Module):
    """Two networks with the interface of stable-baselines3's `mlp_extractor`."""

    def __init__(self, layout: FeatureLayout, hidden: Sequence[int]) -> None:
        super().__init__()
        self.scorer, self.value = CandidateScorer(layout, hidden), StateValue(layout, hidden)
        self.forward_actor, self.forward_critic = self.scorer.forward, self.value.forward

    def forward(self, features: torch.Tensor) -> Any:
        return self.scorer(features), self.value(features)


class _QValues(_ActorAndCritic):
    """Q-values: the state value plus a score per candidate."""

    def forward(self, features: torch.Tensor) -> Any:
        return self.value(features) + self.scorer(features)


class _OfCandidates(BasePolicy):
    """A policy with the observation layout and hidden layer sizes as arguments."""

    def __init__(
        self, *args: Any, layout: FeatureLayout, hidden: Sequence[int] = (64,), **kwargs: Any
    ) -> None:
        self.layout, self.hidden = layout, tuple(hidden)
        super().__init__(*args, **kwargs)


class CandidateActorCritic(_OfCandidates, ActorCriticPolicy):
    """PPO's policy: a logit for each candidate, and the state value.

    `layout` is the observation layout; `hidden` has the hidden layer sizes of both networks.

    Example:
        >>> layout = env.get_wrapper_attr("proposer").layout  # doctest: +SKIP
        >>> PPO(CandidateActorCritic, env, policy_kwargs={"layout": layout})  # doctest: +SKIP
    """

    def _build(self, lr_schedule: Any) -> None:
        self.mlp_extractor: Any = _ActorAndCritic(self.layout, self.hidden)
        # The two networks return logits and values directly.
        networks: Any = self
        networks.action_net, networks.value_net = nn.Identity(), nn.Identity()
        options: Any = self.optimizer_kwargs
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **options)  # type: ignore[call-arg, unused-ignore]

    @property
    def scorer(self) -> CandidateScorer:
        """The network that scores candidates; the greedy action is the highest score."""
        return self.mlp_extractor.scorer


class CandidateDQNPolicy(_OfCandidates, DQNPolicy):
    """DQN's policy: a Q-value for each candidate. Arguments as in `CandidateActorCritic`."""

    def make_q_net(self) -> QNetwork:
        """Create a network with its own weights."""
        network = QNetwork(**self._update_features_extractor(self.net_args))
        network.q_net = _QValues(self.layout, self.hidden)  # type: ignore[assignment, unused-ignore]
        return network.to(self.device)

    @property
    def scorer(self) -> CandidateScorer:
        """The network that scores candidates; the greedy action is the highest score."""
        networks: Any = self.q_net.q_net
        return networks.scorer


class ResumableEnv(VectorEnvAdapter):
    """A vector environment that can start at restored observations instead of new episodes."""

    begins_at: Any = None

    def reset(self) -> Any:
        """Return the restored observations once; otherwise see `VectorEnvAdapter`."""
        found, self.begins_at = self.begins_at, None
        return super().reset() if found is None else found


def write_checkpoint(
    checkpoints: Path, model: BaseAlgorithm, env: CandidateChunksVector, notes: Mapping[str, Any]
) -> None:
    """Save the training state between two rollouts, atomically; the last two are kept."""
    from safetensors.torch import save_file

    algorithm: Any = model
    buffer: Any = getattr(model, "replay_buffer", None)
    legacy: Any = np.random.get_state()  # noqa: NPY002 stable-baselines3 draws from it
    base: Any = env.env
    state: dict[str, Any] = {
        "model": {"num_timesteps": model.num_timesteps},
        "envs": [
            {
                "prompt": found.text_state.prompt.id,
                "response_ids": found.text_state.response_ids,
                "chunk_ends": found.text_state.chunk_ends,
                "seed": found.seed,
            }
            for found in env.get_states()
        ],
        "random": {
            "numpy": [legacy[0], legacy[1].tolist(), *legacy[2:]],
            "actions": model.action_space.np_random.bit_generator.state,
            "envs": [base.generator(i).bit_generator.state for i in range(env.num_envs)],
        },
        "notes": dict(notes),
    }
    parameters = model.get_parameters()
    tensors = {f"policy/{name}": value for name, value in parameters["policy"].items()}
    for index, slots in parameters["policy.optimizer"]["state"].items():
        for name, value in slots.items():
            tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    if buffer is not None:
        state["model"]["exploration_rate"] = algorithm.exploration_rate
        state["buffer"] = {"pos": buffer.pos, "full": buffer.full}
        end = buffer.buffer_size if buffer.full else buffer.pos
        for name in _BUFFER:
            tensors[f"buffer/{name}"] = torch.from_numpy(getattr(buffer, name)[:end])
    tensors["random/torch"] = torch.get_rng_state()
    with storage(checkpoints):
        with write_folder(checkpoints / f"checkpoint-{model.num_timesteps}") as scratch:
            # safetensors rejects two names of one tensor (DQN's aliases).
            save_file({n: t.clone().contiguous() for n, t in tensors.items()}, scratch / _TENSORS)
            (scratch / _STATE).write_text(json.dumps(state), encoding="utf-8")
        found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        for old in found[:-_KEPT]:
            shutil.rmtree(old)


def read_checkpoint(
    folder: Path, model: BaseAlgorithm, env: CandidateChunksVector, prompts: Mapping[str, Prompt]
) -> dict[str, Any]:
    """Restore a training and return its notes; a `TuningError` for a damaged checkpoint."""
    from safetensors.torch import load_file

    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        tensors = load_file(folder / _TENSORS)
        _restore(model, env, prompts, state, tensors)
        notes: dict[str, Any] = state["notes"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise TuningError(
            f"{folder}: expected a checkpoint of this training ({type(error).__name__}: {error}). "
            "Remove it to resume from the previous one."
        ) from error
    return notes


def _restore(
    model: BaseAlgorithm,
    env: CandidateChunksVector,
    prompts: Mapping[str, Prompt],
    state: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    parameters: Any = model.get_parameters() | {"policy": {}}
    buffer: Any = getattr(model, "replay_buffer", None)
    for path, value in tensors.items():
        match path.split("/"):
            case ["policy", name]:
                parameters["policy"][name] = value
            case ["optimizer", index, name]:
                slots = parameters["policy.optimizer"]["state"].setdefault(int(index), {})
                slots[name] = value
            case ["buffer", name]:
                getattr(buffer, name)[: len(value)] = value.numpy()
    model.set_parameters(parameters, device="cpu")
    for part, values in ((model, state["model"]), (buffer, state.get("buffer", {}))):
        for name, value in values.items():
            setattr(part, name, value)
    # The generators exist only after a reset.
    env.reset(seed=0)
    states = []
    for row in state["envs"]:
        begun = initial(prompts[row["prompt"]], env.proposer.language_model)
        ids, ends = tuple(row["response_ids"]), tuple(row["chunk_ends"])
        text = TextState(begun.prompt, begun.prompt_ids, ids, None, ends)
        states.append(CandidateState(text, row["seed"]))
    adapter: Any = model.get_env()
    adapter.begins_at, _ = env.set_states(states)
    base: Any = env.env
    for i, generator in enumerate(state["random"]["envs"]):
        base.generator(i).bit_generator.state = generator
    # Last, because the code above can draw random numbers.
    name, keys, *rest = state["random"]["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    model.action_space.np_random.bit_generator.state = state["random"]["actions"]
    torch.set_rng_state(tensors["random/torch"])

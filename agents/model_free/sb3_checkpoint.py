"""Checkpoints of stable-baselines3's algorithms as numbers: safetensors and JSON, no pickles.

A checkpoint holds all that the rest of the training depends on: weights, the optimizer's state, the
replay buffer, random generators, and the states of the environments, all by stable-baselines3's
public attributes. Its own `save` writes pickles, and nothing of the environment.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer

from mbrl_text_env.agents.learning.training import TuningError, storage
from mbrl_text_env.agents.model_free.vec_env import VectorEnvAdapter
from mbrl_text_env.files import write_folder
from mbrl_text_env.types import Prompt, TextState, initial
from mbrl_text_env.wrappers import CandidateChunksVector, CandidateState

_STATE, _TENSORS = "trainer_state.json", "tensors.safetensors"
_BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
_KEPT = 2


class ResumableEnv(VectorEnvAdapter):
    """Begins at given observations instead of new episodes, where it was told some."""

    begins_at: Any = None

    def reset(self) -> Any:
        """The observations to begin at, once; after that see `VectorEnvAdapter`."""
        found, self.begins_at = self.begins_at, None
        return super().reset() if found is None else found


def write_checkpoint(
    checkpoints: Path, model: BaseAlgorithm, env: CandidateChunksVector, notes: Mapping[str, Any]
) -> None:
    """Write the state of a training between two rollouts, whole or not at all; two are kept.

    Args:
        checkpoints: The folder of all checkpoints.
        model: PPO or DQN.
        env: What it is trained on.
        notes: JSON values to go with it.
    """
    from safetensors.torch import save_file

    target = checkpoints / f"checkpoint-{model.num_timesteps}"
    state = {**_state(model, env), "notes": dict(notes)}
    with storage(checkpoints):
        with write_folder(target) as scratch:
            save_file(_tensors(model), scratch / _TENSORS)
            (scratch / _STATE).write_text(json.dumps(state), encoding="utf-8")
        found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        for old in found[:-_KEPT]:
            shutil.rmtree(old)


def read_checkpoint(
    folder: Path, model: BaseAlgorithm, env: CandidateChunksVector, prompts: Mapping[str, Prompt]
) -> dict[str, Any]:
    """Put a training where it was, and return the notes; a damaged checkpoint is a `TuningError`.

    Args:
        folder: Of the checkpoint.
        model: Made with the same settings, on a `ResumableEnv`.
        env: Made with the same settings.
        prompts: Those of the environment, by id.
    """
    from safetensors.torch import load_file

    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        tensors = load_file(folder / _TENSORS)
        _restore_weights(model, tensors)
        buffer: ReplayBuffer | None = getattr(model, "replay_buffer", None)
        if buffer is not None:
            for name, value in _under("buffer/", tensors).items():
                getattr(buffer, name)[: len(value)] = value.numpy()
        for part, values in ((model, state["model"]), (buffer, state["buffer"])):
            for name, value in values.items():
                setattr(part, name, value)
        _restore_env(model, env, prompts, state)
        # Last, for what is above may draw numbers.
        name, keys, *rest = state["random"]["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
        model.action_space.np_random.bit_generator.state = state["random"]["actions"]
        torch.set_rng_state(tensors["random/torch"])
        notes: dict[str, Any] = state["notes"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise TuningError(
            f"{folder}: expected a checkpoint of this training ({type(error).__name__}: {error}). "
            "Remove it to go on from the one before."
        ) from error
    return notes


def _tensors(model: BaseAlgorithm) -> dict[str, torch.Tensor]:
    policy = model.policy
    found = {f"policy/{name}": value for name, value in policy.state_dict().items()}
    for index, slots in policy.optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            found[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    buffer: ReplayBuffer | None = getattr(model, "replay_buffer", None)
    if buffer is not None:
        end = buffer.buffer_size if buffer.full else buffer.pos
        for name in _BUFFER:
            found[f"buffer/{name}"] = torch.from_numpy(getattr(buffer, name)[:end])
    found["random/torch"] = torch.get_rng_state()
    # Two names of one tensor (DQN's aliases) would be refused.
    return {name: value.clone().contiguous() for name, value in found.items()}


def _restore_weights(model: BaseAlgorithm, tensors: Mapping[str, torch.Tensor]) -> None:
    model.policy.load_state_dict(_under("policy/", tensors))
    optimizer = model.policy.optimizer
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in _under("optimizer/", tensors).items():
        index, _, slot = name.partition("/")
        slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


def _under(start: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def _state(model: BaseAlgorithm, env: CandidateChunksVector) -> dict[str, Any]:
    buffer: ReplayBuffer | None = getattr(model, "replay_buffer", None)
    kept = ("num_timesteps", *(() if buffer is None else ("exploration_rate",)))
    legacy: Any = np.random.get_state()  # noqa: NPY002 stable-baselines3 draws from it
    base: Any = env.env
    texts = [(state.text_state, state.seed) for state in env.get_states()]
    return {
        "model": {name: getattr(model, name) for name in kept},
        "buffer": {} if buffer is None else {"pos": buffer.pos, "full": buffer.full},
        "envs": [
            {
                "prompt": text.prompt.id,
                "response_ids": text.response_ids,
                "chunk_ends": text.chunk_ends,
                "seed": seed,
            }
            for text, seed in texts
        ],
        "random": {
            "numpy": [legacy[0], legacy[1].tolist(), *legacy[2:]],
            "actions": model.action_space.np_random.bit_generator.state,
            "envs": [base.generator(i).bit_generator.state for i in range(env.num_envs)],
        },
    }


def _restore_env(
    model: BaseAlgorithm,
    env: CandidateChunksVector,
    prompts: Mapping[str, Prompt],
    state: Mapping[str, Any],
) -> None:
    # The generators are there after a reset.
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

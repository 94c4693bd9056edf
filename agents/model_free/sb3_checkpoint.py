"""Checkpoints of stable-baselines3's algorithms as numbers: safetensors and JSON, no pickles.

A checkpoint holds whatever the rest of the training depends on, so that it goes on as if it had not
been stopped: weights, the optimizer's state, the replay buffer, random generators, and the states
of the environments. `model.save` of stable-baselines3 writes pickles, and none of the environment.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from mbrl_text_env.agents.learning.lora import TuningError
from mbrl_text_env.agents.learning.training import storage
from mbrl_text_env.candidates import CandidateChunksVector, CandidateState
from mbrl_text_env.files import write_folder
from mbrl_text_env.mdp import initial
from mbrl_text_env.types import Prompt, TextState

_STATE, _TENSORS = "trainer_state.json", "tensors.safetensors"
_COUNTERS = ("num_timesteps", "_n_updates", "_episode_num")
_DQN_COUNTERS = ("_n_calls", "exploration_rate")
_BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
_KEPT = 2


def write_checkpoint(
    checkpoints: Path, model: BaseAlgorithm, env: CandidateChunksVector, notes: Mapping[str, Any]
) -> None:
    """Write the state of a training between two rollouts, whole or not at all.

    Args:
        checkpoints: The folder of all checkpoints; the last two are kept.
        model: PPO or DQN.
        env: What it is trained on.
        notes: JSON values to go with it.

    Raises:
        TuningError: There is no space left, or the folder cannot be written.
    """
    from safetensors.torch import save_file

    target = checkpoints / f"checkpoint-{model.num_timesteps}"
    with storage(checkpoints):
        with write_folder(target) as scratch:
            save_file(_tensors(model), scratch / _TENSORS)
            state = {**_state(model, env), "notes": dict(notes)}
            (scratch / _STATE).write_text(json.dumps(state), encoding="utf-8")
        found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        for old in found[:-_KEPT]:
            shutil.rmtree(old)


def read_checkpoint(
    folder: Path, model: BaseAlgorithm, env: CandidateChunksVector, prompts: Mapping[str, Prompt]
) -> dict[str, Any]:
    """Put a training where it was, and return the notes.

    Args:
        folder: Of the checkpoint.
        model: Made with the same settings.
        env: Made with the same settings.
        prompts: Those of the environment, by id.

    Raises:
        TuningError: The checkpoint is damaged, or of another training.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        tensors = load_file(folder / _TENSORS)
        _restore_weights(model, tensors)
        if isinstance(model, OffPolicyAlgorithm):
            _restore_buffer(model, tensors, state["buffer"])
        for name, value in state["counters"].items():
            setattr(model, name, value)
        _restore_env(model, env, prompts, state)
        # Last, for what is above may draw numbers.
        _restore_randomness(model, tensors, state["random"])
        notes: dict[str, Any] = state["notes"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise TuningError(
            f"{folder}: expected a checkpoint of this training ({type(error).__name__}: {error}). "
            "Remove it to go on from the one before."
        ) from error
    return notes


def _tensors(model: BaseAlgorithm) -> dict[str, torch.Tensor]:
    policy = model.policy
    found = {f"policy/{name}": value.contiguous() for name, value in policy.state_dict().items()}
    for index, slots in policy.optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            found[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    if isinstance(model, OffPolicyAlgorithm):
        buffer: Any = model.replay_buffer
        end = buffer.buffer_size if buffer.full else buffer.pos
        for name in _BUFFER:
            rows = np.ascontiguousarray(getattr(buffer, name)[:end])
            found[f"buffer/{name}"] = torch.from_numpy(rows)
    found["random/torch"] = torch.get_rng_state()
    # Two names of one tensor (DQN's aliases) would be refused.
    return {name: value.clone() for name, value in found.items()}


def _restore_weights(model: BaseAlgorithm, tensors: Mapping[str, torch.Tensor]) -> None:
    policy = model.policy
    policy.load_state_dict(_under("policy/", tensors))
    optimizer = policy.optimizer.state_dict()
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in _under("optimizer/", tensors).items():
        index, _, slot = name.partition("/")
        slots.setdefault(int(index), {})[slot] = value
    policy.optimizer.load_state_dict({**optimizer, "state": slots})


def _restore_buffer(
    model: OffPolicyAlgorithm, tensors: Mapping[str, torch.Tensor], at: Mapping[str, Any]
) -> None:
    buffer: Any = model.replay_buffer
    for name, value in _under("buffer/", tensors).items():
        rows = value.numpy()
        getattr(buffer, name)[: len(rows)] = rows
    buffer.pos, buffer.full = at["pos"], at["full"]


def _under(start: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def _state(model: BaseAlgorithm, env: CandidateChunksVector) -> dict[str, Any]:
    counters = (*_COUNTERS, *(_DQN_COUNTERS if isinstance(model, OffPolicyAlgorithm) else ()))
    legacy: Any = np.random.get_state()  # noqa: NPY002 stable-baselines3 draws from it
    buffer: Any = getattr(model, "replay_buffer", None)
    starts: Any = model._last_episode_starts
    base: Any = env.env
    return {
        "counters": {name: getattr(model, name) for name in counters},
        "buffer": None if buffer is None else {"pos": buffer.pos, "full": buffer.full},
        "episode_starts": [bool(start) for start in starts],
        "envs": [_of_env(state) for state in env.get_states()],
        "random": {
            "numpy": [legacy[0], legacy[1].tolist(), *legacy[2:]],
            "actions": model.action_space.np_random.bit_generator.state,
            "envs": [base.generator(i).bit_generator.state for i in range(env.num_envs)],
        },
    }


def _of_env(state: CandidateState) -> dict[str, Any]:
    text = state.text_state
    return {
        "prompt": text.prompt.id,
        "response_ids": list(text.response_ids),
        "chunk_ends": list(text.chunk_ends),
        "seed": state.seed,
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
        text = TextState(
            begun.prompt,
            begun.prompt_ids,
            tuple(row["response_ids"]),
            None,
            tuple(row["chunk_ends"]),
        )
        states.append(CandidateState(text, row["seed"]))
    model._last_obs, _ = env.set_states(states)
    model._last_episode_starts = np.array(state["episode_starts"], dtype=bool)
    base: Any = env.env
    for i, generator in enumerate(state["random"]["envs"]):
        base.generator(i).bit_generator.state = generator


def _restore_randomness(
    model: BaseAlgorithm, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    model.action_space.np_random.bit_generator.state = state["actions"]
    torch.set_rng_state(tensors["random/torch"])

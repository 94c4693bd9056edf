"""stable-baselines3's own vector environments and training by id."""

import gymnasium as gym
import numpy as np
import pytest

import mbrl_text_env  # noqa: F401 registers the environments
from tests.neighbours.common import CANDIDATES, PADDED, TEXT, VIEW

pytest.importorskip("stable_baselines3")
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env


def test_make_vec_env():
    env = make_vec_env(CANDIDATES, n_envs=2, seed=0, env_kwargs=VIEW)
    assert env.reset().shape == (2, 10)
    assert env.render().shape == (960, 640, 3)
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu").learn(16)
    assert model.num_timesteps == 16


def test_by_id():
    gym.register("Toy-v0", "mbrl_text_env.wrappers:make_candidate_chunks", kwargs=VIEW)
    try:
        model = DQN("MlpPolicy", "Toy-v0", learning_starts=8, device="cpu").learn(24)
    finally:
        gym.registry.pop("Toy-v0")
    assert model.predict(np.zeros(10, dtype=np.float32))[0] in range(3)


def test_padded_chunks():
    env = make_vec_env(TEXT, n_envs=2, seed=0, env_kwargs=PADDED)
    model = PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    assert model.learn(32).num_timesteps == 32

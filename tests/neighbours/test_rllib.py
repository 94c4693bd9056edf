"""RLlib trains in the candidate view and with padded chunks."""

import gymnasium as gym
import pytest

import mbrl_text_env  # noqa: F401 registers the environments
from tests.neighbours.common import CANDIDATES, EMBEDDED, TEXT, VIEW

pytest.importorskip("ray.rllib")
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune.registry import register_env


@pytest.mark.parametrize(
    "make", [lambda config: gym.make(CANDIDATES, **VIEW), lambda config: gym.make(TEXT, **EMBEDDED)]
)
def test_ppo(make):
    register_env("text", make)
    config = (
        PPOConfig()
        .environment("text")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2)
        .training(train_batch_size_per_learner=32, minibatch_size=16, num_epochs=1)
    )
    algorithm = config.build_algo()
    result = algorithm.train()
    algorithm.stop()
    assert result["env_runners"]["num_env_steps_sampled"] >= 32
    assert 0 <= result["env_runners"]["episode_return_mean"] <= 1

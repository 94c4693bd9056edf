"""PPO and DQN of stable-baselines3 learn a small world of the candidate view."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.evaluation import evaluate_policy

import mbrl_text_env  # noqa: F401 registers the environments
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.types import Prompt
from tests.toys import CountReward


class LetterFeatures:
    """What a linear policy needs: the share of each letter."""

    def encode(self, sentences):
        texts = [s.partition("Response: ")[2] for s in sentences]
        return np.array(
            [[t.count(c) / max(1, len(t)) for c in "ab"] for t in texts], dtype=np.float32
        )


def make_env():
    """Four candidates of two letters; the share of "a" is the reward. Chance gives about 0.5."""
    return gym.make(
        "mbrl_text_env/CandidateChunks-v0",
        language_model=NGramLM("ab", order=1, seed=0, concentration=50.0, stop_probability=0.0),
        prompts=[Prompt.from_text("ab")],
        reward_model=CountReward(),
        num_candidates=4,
        max_chunk_tokens=2,
        max_response_tokens=8,
        encoder=LetterFeatures(),
    )


def mean_return(policy, episodes=100):
    env = make_env()
    env.reset(seed=123)
    return evaluate_policy(policy, env, n_eval_episodes=episodes, warn=False)[0]


class RandomPolicy:
    def __init__(self):
        self.rng = np.random.default_rng(0)

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        return self.rng.integers(4, size=len(observation)), state


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chance():
    return mean_return(RandomPolicy(), episodes=200)


def test_ppo_learns(chance):
    env = make_env()
    env.reset(seed=0)
    model = PPO(
        "MlpPolicy", env, n_steps=256, batch_size=64, learning_rate=2e-3, seed=0, device="cpu"
    )
    model.learn(8000)
    assert chance < 0.6
    assert mean_return(model) > 0.8


def test_dqn_learns(chance):
    env = make_env()
    env.reset(seed=0)
    model = DQN(
        "MlpPolicy", env, learning_starts=500, learning_rate=1e-3, train_freq=2, gamma=1.0,
        target_update_interval=250, exploration_fraction=0.3, seed=0, device="cpu",
    )  # fmt: skip
    model.learn(8000)
    assert chance < 0.6
    assert mean_return(model) > 0.8

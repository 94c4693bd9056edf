"""Tianshou's collector and buffer."""

import gymnasium as gym
import numpy as np
import pytest

import mbrl_text_env  # noqa: F401 registers the environments
from tests.neighbours.common import CANDIDATES, PADDED, TEXT, VIEW

pytest.importorskip("tianshou")
from tianshou.algorithm.algorithm_base import Policy
from tianshou.data import Batch, Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv


class RandomPolicy(Policy):
    """Tianshou's own knows no `MultiDiscrete`."""

    def forward(self, batch, state=None, **kwargs):
        return Batch(act=np.stack([self.action_space.sample() for _ in range(len(batch.obs))]))


@pytest.mark.parametrize(("env_id", "options"), [(CANDIDATES, VIEW), (TEXT, PADDED)])
def test_the_collector(env_id, options):
    envs = DummyVectorEnv([lambda: gym.make(env_id, **options)] * 3)
    buffer = VectorReplayBuffer(60, 3)
    # Tianshou's own `action_space` is that of the innermost environment.
    space = gym.make(env_id, **options).action_space
    collector = Collector(RandomPolicy(action_space=space), envs, buffer)
    collector.reset()
    stats = collector.collect(n_step=60)
    assert stats.n_collected_episodes > 5
    assert np.isfinite(buffer.rew).all()
    ends = buffer.info["finish_reason"][buffer.done]
    assert set(ends.tolist()) <= {"stop", "length"}

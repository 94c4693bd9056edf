"""TorchRL: single and vector environments, and the collector."""

import gymnasium as gym
import pytest
import torch

import mbrl_text_env  # noqa: F401 registers the environments
from tests.neighbours.common import CANDIDATES, PADDED, TEXT, VIEW

pytest.importorskip("torchrl")
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, GymWrapper
from torchrl.envs.utils import check_env_specs


@pytest.mark.parametrize(("env_id", "options"), [(CANDIDATES, VIEW), (TEXT, PADDED)])
def test_single_environments(env_id, options):
    env = GymEnv(env_id, **options)
    check_env_specs(env)
    played = env.rollout(20, break_when_any_done=False)
    assert played["next", "done"].any()
    assert torch.isfinite(played["next", "reward"]).all()


@pytest.mark.parametrize(("env_id", "options"), [(CANDIDATES, VIEW), (TEXT, PADDED)])
def test_vector_environments(env_id, options):
    # TorchRL refuses `NextStep`, and reads numbers alone from the infos of `SameStep`.
    env = GymWrapper(gym.make_vec(env_id, num_envs=3, autoreset_mode="Disabled", **options))
    assert env.batch_size == (3,)
    played = env.rollout(20, break_when_any_done=False)
    assert played.batch_size == (3, 20)
    assert played["next", "done"].any()
    assert played["next", "reward"].max() > 0


@pytest.mark.parametrize("vector", [False, True])
def test_the_collector(vector):
    env = (
        GymWrapper(gym.make_vec(CANDIDATES, num_envs=2, autoreset_mode="Disabled", **VIEW))
        if vector
        else GymEnv(CANDIDATES, **VIEW)
    )
    collector = Collector(env, frames_per_batch=16, total_frames=32)
    batches = [batch.numel() for batch in collector]
    collector.shutdown()
    assert batches == [16, 16]

"""TorchRL: single and vector environments, and the collector."""

import gymnasium as gym
import pytest
import torch

import mbrl_text_env  # noqa: F401 registers the environments
from mbrl_text_env.world_model import ImaginedCandidates
from tests.neighbours.common import CANDIDATES, PADDED, TEXT, VIEW
from tests.world_model.worlds import LIMIT, Share, ensemble, state_of

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


def imagined(num_envs):
    starts = [state_of(text) for text in ("", "a", "b")]
    return GymWrapper(
        ImaginedCandidates(
            ensemble(), Share(), starts, num_envs=num_envs, autoreset_mode="Disabled"
        )
    )


def test_imagined_candidates():
    env = imagined(3)
    check_env_specs(env)
    env.set_seed(0)
    played = env.rollout(20, break_when_any_done=False)
    assert played.batch_size == (3, 20)
    rewards, ended = played["next", "reward"], played["next", "done"]
    assert ended.any()
    assert rewards[ended].max() > 0
    assert (rewards[~ended] == 0).all()
    # What an action chooses from is what was shown, also where another episode began meanwhile.
    candidates, action = played["observation"].unflatten(-1, (5, -1))[..., 1:, :], played["action"]
    chosen = candidates[action.bool()]
    torch.testing.assert_close(chosen[:, -2] > 0, ended.flatten())
    worth = torch.where(ended.flatten(), chosen[:, -1], 0)
    torch.testing.assert_close(worth, rewards.flatten().float())
    # Episodes end in time, so others begin in these environments.
    assert ended.sum(dim=1).min() >= 20 // (LIMIT + 1)


def test_the_collector_in_imagination():
    collector = Collector(imagined(2), frames_per_batch=16, total_frames=32)
    batches = [batch.numel() for batch in collector]
    collector.shutdown()
    assert batches == [16, 16]

"""Gymnasium's vector environment behind stable-baselines3's interface."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import VectorWrapper
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

import mbrl_text_env  # noqa: F401 registers the environments
from mbrl_text_env.agents.model_free import VectorEnvAdapter
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.rewards import RewardError
from mbrl_text_env.wrappers import CandidateChunksVector
from tests.toys import toy_options

ID = "mbrl_text_env/CandidateChunks-v0"
OPTIONS = {"language_model": NGramLM("abcde", seed=1), "encoder": None, **toy_options()}


def vector(num_envs=3, **options):
    given = {**OPTIONS, "autoreset_mode": "SameStep", **options}
    return gym.make_vec(ID, num_envs=num_envs, **given)


def test_it_steps_as_stable_baselines3_own_loop_over_single_environments():
    ours = VectorEnvAdapter(vector())
    theirs = DummyVecEnv([lambda: gym.make(ID, **OPTIONS) for _ in range(3)])
    for env in (ours, theirs):
        env.seed(5)
    assert ours.reset().tolist() == theirs.reset().tolist()
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(40):
        actions = rng.integers(4, size=3)
        found, expected = ours.step(actions), theirs.step(actions)
        for one, other in zip(found[:3], expected[:3], strict=True):
            assert one.dtype == other.dtype
            assert one.tolist() == other.tolist()
        assert [info["response"] for info in ours.reset_infos] == [
            info["response"] for info in theirs.reset_infos
        ]
        assert [info["prompt_id"] for info in ours.reset_infos] == [
            info["prompt_id"] for info in theirs.reset_infos
        ]
        for one, other in zip(found[3], expected[3], strict=True):
            assert one.keys() == other.keys()
            assert (one["prompt_id"], one["score"]) == (other["prompt_id"], other["score"])
        for i in np.flatnonzero(found[2]):
            ended += 1
            row, wanted = found[3][i], expected[3][i]
            assert row["terminal_observation"].tolist() == wanted["terminal_observation"].tolist()
            for key in ("score", "finish_reason", "response", "prompt_id"):
                assert row[key] == wanted[key]
    assert ended > 10


def test_a_token_limit_is_an_end_unless_it_is_asked_for():
    lm = NGramLM("ab", seed=0, stop_probability=0.0)
    for bootstraps in (False, True):
        env = VectorEnvAdapter(
            vector(1, language_model=lm, tokenizer=lm), bootstrap_truncated=bootstraps
        )
        env.reset()
        infos = [env.step(np.array([0]))[3][0] for _ in range(6)]
        cut = [i["TimeLimit.truncated"] for i in infos if "terminal_observation" in i]
        assert cut
        assert set(cut) == {bootstraps}


def test_it_works_with_the_monitor():
    env = VecMonitor(VectorEnvAdapter(vector()))
    env.reset()
    episodes = []
    for _ in range(20):
        _, _, dones, infos = env.step(np.zeros(3, dtype=int))
        episodes += [
            (info["episode"]["r"], info["score"])
            for info, done in zip(infos, dones, strict=True)
            if done
        ]
    assert len(episodes) > 5
    for total, score in episodes:
        assert total == pytest.approx(score, abs=1e-6)


def test_attributes_and_methods():
    env = VectorEnvAdapter(vector())
    env.reset()
    assert env.get_attr("num_envs") == [3, 3, 3]
    assert env.get_attr("num_envs", [1]) == [3]
    assert len(env.env_method("get_states", indices=[0, 2])[0]) == 3
    assert env.env_is_wrapped(CandidateChunksVector) == [True] * 3
    assert env.env_is_wrapped(VectorWrapper, 0) == [True]
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 3
    env.set_attr("marked", 7)
    assert env.get_attr("marked") == [7] * 3
    env.set_options({"prompt": 0})
    env.reset()
    assert {state.text_state.prompt.text for state in env.env.get_states()} == {"ab"}
    env.set_options([{"prompt": 0}, {}, {}])
    with pytest.raises(ValueError, match="same options"):
        env.reset()
    env.close()


def test_seeds_are_used_once():
    env = VectorEnvAdapter(vector())
    env.seed(3)
    first = env.reset().tolist()
    other = env.reset().tolist()
    env.seed(3)
    assert env.reset().tolist() == first
    assert other != first


def test_other_reset_modes_are_refused():
    with pytest.raises(ValueError, match="'SameStep'"):
        VectorEnvAdapter(vector(autoreset_mode="NextStep"))


@pytest.mark.filterwarnings("ignore:.*An episode ends without a score")
def test_rewards_that_are_no_numbers_reach_no_learner():
    class Picky:
        name = "picky"

        def score(self, prompts, responses):
            if any("bb" in response for response in responses):
                raise ZeroDivisionError
            return [response.count("a") / 8 for response in responses]

    options = {"reward_model": Picky(), "on_reward_error": "record"}
    model = DQN("MlpPolicy", VectorEnvAdapter(vector(**options)), seed=0, device="cpu")
    with pytest.raises(RewardError, match=r"got \[nan\].*failed_reward=0\.0"):
        model.learn(300)
    env = VectorEnvAdapter(vector(**options, failed_reward=-1.0))
    model = DQN("MlpPolicy", env, learning_starts=8, train_freq=1, seed=0, device="cpu").learn(300)
    assert env.env.unwrapped.num_failed > 2
    assert all(torch.isfinite(weights).all() for weights in model.policy.parameters())


def test_frames():
    env = VectorEnvAdapter(vector(2, render_mode="rgb_array"))
    env.reset()
    assert env.render().shape == (960, 640, 3)

"""A policy that is trained in imagination chooses among real candidates as the optimum does."""

from functools import lru_cache

import numpy as np
import pytest
from stable_baselines3 import PPO

from mbrl_text_env.agents.model_free.sb3_parts import VectorEnvAdapter
from mbrl_text_env.mdp import EpisodeEndedError, initial, transition
from mbrl_text_env.rewards import RewardError, SentimentReward
from mbrl_text_env.world_model import EnsembleDynamics, ImaginedCandidates, WorldModelError
from tests.world_model.worlds import FEATURES, LIMIT, LM, PROMPTS, Share, ensemble, state_of

CANDIDATES = 3


@pytest.fixture
def dynamics():
    return ensemble()


def env_of(dynamics, **options):
    starts = [initial(prompt, LM) for prompt in PROMPTS]
    settings = {"num_envs": 16, "num_candidates": CANDIDATES, **options}
    return ImaginedCandidates(dynamics, Share(), starts, **settings)


def optimum():
    """The exact value of the best choice: tokens are independent, so what matters is the counts."""
    probability = LM.next_probabilities((), ())
    tokens = [(LM.decode([i]), i in LM.stop_token_ids, p) for i, p in enumerate(probability)]

    @lru_cache
    def value(count, length):
        if length == LIMIT:
            return count / LIMIT
        outcomes = sorted(
            (count / LIMIT if stops else value(count + text.count("b"), length + 1), p)
            for text, stops, p in tokens
            if p > 0
        )
        below, mean = 0.0, 0.0
        for score, p in outcomes:
            mean += score * ((below + p) ** CANDIDATES - below**CANDIDATES)
            below += p
        return mean

    return value(0, 0)


def real_mean(env, choose, episodes=400):
    scores = []
    for seed in range(episodes):
        state = initial(PROMPTS[seed % len(PROMPTS)], LM)
        while state.finish_reason is None:
            [chunks] = LM.sample([state], CANDIDATES, 1, seeds=[seed])
            candidates = [transition(state, chunk, LIMIT) for chunk in chunks]
            state = candidates[choose(env.observe(state, candidates))]
        scores.append(LM.decode(state.response_ids).count("b") / LIMIT)
    return float(np.mean(scores))


def test_a_policy_trained_in_imagination_finds_the_optimum(dynamics):
    env = env_of(dynamics)
    model = PPO(
        "MlpPolicy", VectorEnvAdapter(env), n_steps=64, batch_size=256, learning_rate=2e-3,
        gamma=1.0, seed=0, device="cpu",
    )  # fmt: skip
    model.learn(20_000)
    best, rng = optimum(), np.random.default_rng(0)
    chance = real_mean(env, lambda shown: rng.integers(CANDIDATES))
    found = real_mean(env, lambda shown: int(model.predict(shown, deterministic=True)[0]))
    assert chance < 0.5 * best
    assert found == pytest.approx(best, abs=0.04)


def test_episodes_follow_from_the_seed_and_end_with_the_reward_of_their_counts(dynamics):
    one, two = env_of(dynamics), env_of(dynamics, seed=5)
    shown, _ = one.reset(seed=3)
    np.testing.assert_array_equal(shown, two.reset(seed=3)[0])
    assert one.observation_space.contains(shown)
    ends = 0
    for _ in range(8):
        actions = np.argmax(shown.reshape(16, CANDIDATES + 1, -1)[:, 1:, -2] > 0, axis=1)
        worth = shown.reshape(16, CANDIDATES + 1, -1)[np.arange(16), actions + 1, -1]
        shown, rewards, ended, cut, infos = one.step(actions)
        assert not cut.any()
        np.testing.assert_allclose(rewards, np.where(ended, worth, 0), atol=1e-6)
        np.testing.assert_array_equal(shown, two.step(actions)[0])
        if ended.any():
            np.testing.assert_array_equal(infos["final_info"]["_score"], ended)
            ends += int(ended.sum())
    assert ends >= 16


def test_rollouts_are_cut_by_their_schedule(dynamics):
    env = env_of(dynamics, rollout_chunks=lambda steps: 1 if steps <= 16 else 2)
    env.reset(seed=0)
    _, _, ended, cut, infos = env.step(np.zeros(16, dtype=int))
    np.testing.assert_array_equal(cut, ~ended)
    assert env.single_observation_space.contains(infos["final_obs"][np.argmax(cut)])
    assert not env.step(np.zeros(16, dtype=int))[3].any()
    assert env.step(np.zeros(16, dtype=int))[3].any()


@pytest.mark.parametrize("propagation", ["fixed_model", "random_model"])
def test_some_environments_are_reset_and_others_stay_as_they_were(dynamics, propagation):
    dynamics.propagation = propagation
    env = env_of(dynamics, autoreset_mode="Disabled")
    env.reset(seed=1)
    shown, _, ended, _, infos = env.step(np.zeros(16, dtype=int))
    assert 0 < ended.sum() < 16
    assert not infos
    with pytest.raises(EpisodeEndedError, match="Reset them"):
        env.step(np.zeros(16, dtype=int))
    again, _ = env.reset(options={"reset_mask": ended})
    np.testing.assert_array_equal(again[~ended], shown[~ended])
    assert (again[ended] != shown[ended]).any(axis=1).all()
    tokens = again.reshape(16, CANDIDATES + 1, -1)[:, :, 0]
    after, _, ended, _, _ = env.step(np.ones(16, dtype=int))
    tokens_after = after.reshape(16, CANDIDATES + 1, -1)[:, 0, 0]
    np.testing.assert_array_equal(tokens_after[~ended], tokens[~ended, 2])
    with pytest.raises(ValueError, match=r"expected bool\[16\]"):
        env.reset(options={"reset_mask": [True]})


def test_what_cannot_be_imagined_is_refused(dynamics):
    with pytest.raises(RewardError, match="`score_features`, got neither"):
        ImaginedCandidates(dynamics, SentimentReward(), [state_of("")])
    with pytest.raises(WorldModelError, match="starts that go on"):
        ImaginedCandidates(dynamics, Share(), [state_of("a", reason="stop")])
    with pytest.raises(WorldModelError, match="Expected fitted dynamics"):
        ImaginedCandidates(EnsembleDynamics(LM, FEATURES), Share(), [state_of("")])
    with pytest.raises(ValueError, match="expected 3, got 1"):
        env_of(dynamics).observe(state_of(""), [state_of("a")])
    with pytest.raises(ValueError, match="numbers of candidates, 0 to 2"):
        env_of(dynamics).step(np.full(16, -1))
    with pytest.raises(ValueError, match="at least 1"):
        env_of(dynamics, num_candidates=0)
    with pytest.raises(ValueError, match="got 'NextStep'"):
        env_of(dynamics, autoreset_mode="NextStep")

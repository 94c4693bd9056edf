"""The candidate view's features: their layout, rewards of prefixes, and what they charge."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import given
from hypothesis import strategies as st

import mbrl_text_env  # noqa: F401 registers the environments
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.mdp import is_terminal
from mbrl_text_env.proposer import FeatureLayout
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.types import Ledger, Usage
from mbrl_text_env.wrappers import CandidateState
from tests.toys import CountReward, LetterEncoder, toy_options

ID = "mbrl_text_env/CandidateChunks-v0"


def options(**changes):
    return {
        "language_model": NGramLM("abcde", seed=1),
        "num_candidates": 3,
        "encoder": None,
        "prefix_rewards": True,
        **toy_options(),
        **changes,
    }


class TestLayout:
    @given(st.integers(1, 6), st.integers(0, 5), st.booleans(), st.integers(0, 4))
    def test_the_parts_are_the_whole(self, k, d, prefix_rewards, batch):
        layout = FeatureLayout(k, d, prefix_rewards)
        rows = np.arange(batch * layout.size, dtype=np.float32).reshape(batch, layout.size)
        parts = layout.split(rows)
        assert parts.scalars.shape == (batch, k, 3)
        assert parts.embeddings.shape == (batch, k, d)
        assert parts.rewards.shape == (batch, k, int(prefix_rewards))
        flat = [part.reshape(batch, part[:1].size if batch else -1) for part in parts if batch]
        assert not batch or np.concatenate(flat, axis=1).tolist() == rows.tolist()

    def test_tensors_are_split_alike(self):
        layout = FeatureLayout(2, 3, True)
        rows = torch.arange(2.0 * layout.size).reshape(2, -1)
        for ours, theirs in zip(layout.split(rows), layout.split(rows.numpy()), strict=True):
            assert ours.tolist() == theirs.tolist()

    def test_a_part_is_a_view(self):
        layout = FeatureLayout(2, 0, True)
        rows = np.zeros((1, layout.size), dtype=np.float32)
        layout.split(rows).rewards[0, 1, 0] = 5.0
        assert rows[0, -1] == 5.0


class TestPrefixRewards:
    def test_they_are_the_scores_of_what_would_stand_there(self):
        env = gym.make(ID, **options())
        observation, info = env.reset(seed=0)
        parts = env.get_wrapper_attr("proposer").layout.split(observation[None])
        assert parts.prefix_reward.tolist() == [[0.0]]
        expected = [text.count("a") / len(text) for text in info["candidates"]]
        assert parts.rewards[0, :, 0].tolist() == pytest.approx(expected)

    def test_nothing_is_scored_twice(self):
        """The prefix was a candidate one step before: its reward is known."""
        reward = CountReward()
        env = gym.make(ID, **options(reward_model=reward))
        env.reset(seed=0)
        ledger = env.get_wrapper_attr("ledger")
        calls = []
        for _ in range(2):
            before = ledger.usage.reward_calls
            env.step(0)
            calls.append(ledger.usage.reward_calls - before)
            chunks = env.get_wrapper_attr("candidates")
            assert calls[-1] == len({chunk.token_ids for chunk in chunks})

    def test_an_ended_response_has_none(self):
        env = gym.make(ID, **options())
        env.reset(seed=0)
        ended = False
        while not ended:
            observation, _, terminated, truncated, _ = env.step(0)
            ended = terminated or truncated
        parts = env.get_wrapper_attr("proposer").layout.split(observation[None])
        assert not parts.rewards.any()
        assert not parts.prefix_reward.any()

    def test_vector_equals_single(self):
        singles = gym.make_vec(ID, num_envs=3, vectorization_mode="sync", **options())
        vector = gym.make_vec(ID, num_envs=3, **options())
        for env in (singles, vector):
            env.action_space.seed(1)
        expected, found = singles.reset(seed=3)[0], vector.reset(seed=3)[0]
        for _ in range(12):
            assert found.tolist() == expected.tolist()
            actions = vector.action_space.sample()
            expected, found = singles.step(actions)[0], vector.step(actions)[0]

    def test_a_reward_that_fails_says_so(self):
        class Broken:
            name = "broken"

            def score(self, prompts, responses):
                return [float("nan")] * len(responses)

        env = gym.make(ID, **options(reward_model=Broken()))
        with pytest.raises(RewardError, match="broken"):
            env.reset(seed=0)


class TestCosts:
    @pytest.mark.parametrize("encoder", [None, "language_model", LetterEncoder()])
    @pytest.mark.parametrize("prefix_rewards", [False, True])
    def test_the_bound_holds(self, encoder, prefix_rewards):
        env = gym.make(ID, **options(encoder=encoder, prefix_rewards=prefix_rewards))
        env.reset(seed=2)
        proposer, state = env.get_wrapper_attr("proposer"), env.unwrapped.get_state()
        ledger = Ledger()
        proposals = proposer.propose([state], [0], [Ledger()])
        proposer.features([state], proposals, [ledger])
        bound = proposer.features_bound(state)
        for name in ("reward_calls", "flops", "prompt_tokens"):
            assert getattr(ledger.usage, name) <= getattr(bound, name)
        # The letters' encoder says nothing of its operations.
        assert (bound == Usage()) == (encoder != "language_model" and not prefix_rewards)

    def test_every_state_pays_its_own(self):
        env = gym.make(ID, **options())
        env.reset(seed=0)
        proposer, state = env.get_wrapper_attr("proposer"), env.unwrapped.get_state()
        ledgers = [Ledger(), Ledger()]
        proposals = proposer.propose([state, state], [0, 1], ledgers)
        proposer.features([state, state], proposals, ledgers)
        for ledger, row in zip(ledgers, proposals, strict=True):
            assert ledger.usage.generated_tokens == sum(len(chunk) for chunk in row)
            assert ledger.usage.reward_calls == 1 + len({chunk.token_ids for chunk in row})


class TestSnapshots:
    def test_restored_equals_original(self):
        env = gym.make_vec(ID, num_envs=3, **options())
        env.reset(seed=1)
        env.step(np.zeros(3, dtype=int))
        states = env.get_states()
        if any(is_terminal(state.text_state) for state in states):
            pytest.skip("the seed's first candidates end a response")
        going_on = np.array([0, 1, 2])
        expected = env.step(going_on)
        env.reset(seed=9)
        env.set_states(states)
        assert env.get_states() == states
        found = env.step(going_on)
        assert data_equivalence(found[0], expected[0], exact=True)
        assert found[1].tolist() == expected[1].tolist()

    def test_refused(self):
        env = gym.make_vec(ID, num_envs=2, **options())
        env.reset(seed=0)
        states = env.get_states()
        assert isinstance(states[0], CandidateState)
        with pytest.raises(TypeError, match="CandidateState"):
            env.set_states([state.text_state for state in states])
        with pytest.raises(ValueError, match="Expected 2 states, got 1"):
            env.set_states(states[:1])

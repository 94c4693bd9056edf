"""The environment checker passes what keeps its contract, and names the fault of what does not."""

import dataclasses
import time

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env import CheckError, TextGenerationEnv, checks
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.mdp import InvalidChunkError, is_terminal
from mbrl_text_env.spaces import ChunkSpace
from mbrl_text_env.types import Prompt
from mbrl_text_env.wrappers import CandidateChunks, KLPenalty, PotentialShaping
from tests.checks.common import CANDIDATES, LM, TEXT, broken
from tests.toys import PROMPTS, CountReward, FixedValue, LetterEncoder, StepReward, toy_options

# Environments that keep the contract.

REWARDS = [
    {},
    {"reward": "delta"},
    {"reward": "process", "reward_model": StepReward()},
]
OBSERVATIONS = [
    {},
    {"observation": "tokens"},
    {"observation": "embedding", "encoder": LetterEncoder()},
]


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_text_environments_pass(reward, observation):
    options = toy_options(**reward, **observation)
    checks.check_text_env(gym.make(TEXT, **options))
    checks.check_text_env(TextGenerationEnv(**options), steps=200, seed=5)


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("encoder", [None, "language_model", LetterEncoder()])
def test_candidate_views_pass(reward, encoder):
    options = toy_options(**reward, language_model=LM, encoder=encoder, num_candidates=3)
    checks.check_text_env(gym.make(CANDIDATES, **options))


@settings(max_examples=30, deadline=None)
@given(
    limit=st.integers(1, 12),
    chunk=st.integers(1, 12),
    alphabet=st.sampled_from(["a", "ab", "abcde"]),
    reward=st.sampled_from(["terminal", "delta"]),
    prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_every_size_of_environment_passes(limit, chunk, alphabet, reward, prompts, seed):
    env = TextGenerationEnv(
        prompts,
        NGramLM(alphabet),
        CountReward(),
        reward=reward,
        max_response_tokens=limit,
        max_chunk_tokens=chunk,
    )
    checks.check_text_env(env, steps=30, seed=seed)


def test_one_step_and_one_prompt_are_enough():
    checks.check_text_env(gym.make(TEXT, **toy_options(prompts=PROMPTS[:1])), steps=1)
    with pytest.raises(ValueError, match="steps"):
        checks.check_text_env(gym.make(TEXT, **toy_options()), steps=0)


def shaped(env):
    return PotentialShaping(env, FixedValue(lambda text: text.count("a"), LM))


@pytest.mark.parametrize("wrap", [shaped, lambda env: KLPenalty(env, LM)])
@pytest.mark.parametrize("make", [TEXT, CANDIDATES])
def test_wrappers_that_change_the_reward(make, wrap):
    extra = {"language_model": LM, "encoder": None} if make == CANDIDATES else {}
    env = wrap(gym.make(make, **toy_options(**extra)))
    checks.check_text_env(env, check_rewards=False)
    with pytest.raises(CheckError, match="check_rewards=False"):
        checks.check_text_env(env)


def test_other_action_and_observation_spaces_pass():
    env = gym.wrappers.TransformAction(
        TextGenerationEnv(**toy_options()),
        lambda action: np.array([int(action)]),
        gym.spaces.Discrete(LM.vocab_size),
    )
    space = gym.spaces.Box(0, 8, (), np.int64)
    env = gym.wrappers.TransformObservation(
        env, lambda seen: np.array(len(seen["response"])), space
    )
    checks.check_text_env(env)


# Environments that break it.


class BothFlags(TextGenerationEnv):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        ended = terminated or truncated
        return observation, reward, ended, ended, info


class NeverTruncates(TextGenerationEnv):
    def step(self, action):
        observation, reward, terminated, _, info = super().step(action)
        return observation, reward, terminated, False, info


class IntegerFlags(TextGenerationEnv):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, int(terminated), int(truncated), info


class PaysTwice(TextGenerationEnv):
    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, 2 * reward + 0.5, *rest


class ScoresTwice(TextGenerationEnv):
    def step(self, action):
        result = super().step(action)
        state = self.get_state()
        if is_terminal(state):
            self.task.reward_model.score([state.prompt], [result[-1]["response"]])
        return result


class NotANumber(TextGenerationEnv):
    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float("nan"), *rest


class FourResults(TextGenerationEnv):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or truncated, info


class DoesNotRestore(TextGenerationEnv):
    def set_state(self, state):
        return self._show(self._current()[0])


class RestoresInHalf(TextGenerationEnv):
    """Keeps something that counts outside its state."""

    steps = 0

    def reset(self, **options):
        self.steps = 0
        return super().reset(**options)

    def step(self, action):
        observation, *result = super().step(action)
        self.steps += 1
        return {**observation, "prompt": "!" * self.steps}, *result


class IgnoresTheSeed(TextGenerationEnv):
    """Takes the prompts in turn, whatever the seed."""

    turn = 0

    def reset(self, *, seed=None, options=None):
        self.turn = (self.turn + 1) % len(self.task.prompts)
        return super().reset(seed=seed, options=options or {"prompt": self.turn})


class AlwaysTheSamePrompt(TextGenerationEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed, options={"prompt": 0})


class LetsStopTokensThrough(TextGenerationEnv):
    def step(self, action):
        stops = [i for i, token in enumerate(action) if token == 0]
        return super().step(action[: stops[0] + 1] if stops else action)


class LetsOtherIdsThrough(TextGenerationEnv):
    def step(self, action):
        return super().step(np.minimum(action, self.task.rules.vocab_size - 1))


class RefusesAndMoves(TextGenerationEnv):
    def step(self, action):
        try:
            return super().step(action)
        except InvalidChunkError:
            super().step([1])
            raise


class WrongError(TextGenerationEnv):
    def step(self, action):
        try:
            return super().step(action)
        except InvalidChunkError as error:
            raise KeyError(str(error)) from error


class GoesOnAfterTheEnd(TextGenerationEnv):
    def step(self, action):
        if is_terminal(self.get_state()):
            return self._show(self._current()[0])[0], 0.0, True, False, {}
        return super().step(action)


class ChangesTheTokens(TextGenerationEnv):
    def step(self, action):
        return super().step(np.where(np.asarray(action) == 3, 2, action))


class TellsTheTime(TextGenerationEnv):
    def step(self, action):
        *result, info = super().step(action)
        return *result, {**info, "seconds": time.perf_counter()}


class ForgetsThePrompt(TextGenerationEnv):
    def reset(self, **options):
        observation, info = super().reset(**options)
        del info["prompt_id"]
        return observation, info


class ScoresAtReset(TextGenerationEnv):
    def reset(self, **options):
        observation, info = super().reset(**options)
        return observation, {**info, "score": 1.0}


class EditsTheResponse(TextGenerationEnv):
    def step(self, action):
        *result, info = super().step(action)
        return *result, {**info, "response": info["response"].upper()}


class ShowsTextAlone(TextGenerationEnv):
    def reset(self, **options):
        observation, info = super().reset(**options)
        return observation["response"], info


class HidesItsActions(TextGenerationEnv):
    def __init__(self, **options):
        super().__init__(**options)
        self.action_space = gym.spaces.MultiDiscrete([6, 6])


class UnlimitedChunks(TextGenerationEnv):
    def __init__(self, **options):
        super().__init__(**options)
        space = self.action_space

        class Anything(ChunkSpace):
            def contains(self, x):
                return True

        self.action_space = Anything(space.rules)


class LambdaInState(TextGenerationEnv):
    def __init__(self, **options):
        prompt = Prompt.from_text("ab", metadata={"check": lambda response: True})
        super().__init__(**{**options, "prompts": [prompt]})


class UnhashablePrompt(Prompt):
    __hash__ = None


class UnhashableState(TextGenerationEnv):
    def __init__(self, **options):
        super().__init__(**{**options, "prompts": [UnhashablePrompt("ab", "ab")]})


@pytest.mark.parametrize(
    ("cls", "match"),
    [
        broken(BothFlags, "never both"),
        broken(NeverTruncates, "truncated at 'length'"),
        broken(IntegerFlags, "expected bools"),
        broken(PaysTwice, "0 until the last, which is the score"),
        broken(ScoresTwice, "expected one scored response, got 2"),
        broken(NotANumber, "expected a finite float, got nan"),
        broken(FourResults, "Return all five"),
        broken(DoesNotRestore, "set_state: expected that get_state.. returns the state"),
        broken(RestoresInHalf, "the step after get_state, a step and set_state, observation"),
        broken(IgnoresTheSeed, r"reset\(seed=0\): expected the same"),
        broken(AlwaysTheSamePrompt, "different prompts"),
        broken(LetsStopTokensThrough, "for a stop token before the last place, got no error"),
        broken(LetsOtherIdsThrough, "for an id outside the vocabulary, got no error"),
        broken(RefusesAndMoves, "leaves the state as it was"),
        broken(WrongError, "expected InvalidChunkError for an empty chunk, got KeyError"),
        broken(GoesOnAfterTheEnd, "expected EpisodeEndedError for a step after the end"),
        broken(ChangesTheTokens, "Append the action's token ids"),
        broken(TellsTheTime, "leave timings out of info"),
        broken(ForgetsThePrompt, "expected 'prompt_id', a str"),
        broken(ScoresAtReset, "and only then"),
        broken(EditsTheResponse, "expected what the state says"),
        broken(ShowsTextAlone, "reset, observation: expected an element of Dict"),
        broken(HidesItsActions, "action_space of the text environment"),
        broken(UnlimitedChunks, "expected that an empty chunk is no element"),
        broken(LambdaInState, "a state that can be pickled"),
        broken(UnhashableState, "a state that can be hashed"),
    ],
)
def test_broken_environments_fail(cls, match):
    with pytest.raises(CheckError, match=match):
        checks.check_text_env(cls(**toy_options()))


class PaysTheWholeScore(TextGenerationEnv):
    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, self._current()[0].score, *rest


class RewardsByTheClock(TextGenerationEnv):
    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, time.perf_counter(), *rest


def test_delta_rewards_have_to_add_up():
    with pytest.raises(CheckError, match="that they add up to the score"):
        checks.check_text_env(PaysTheWholeScore(**toy_options(reward="delta")))


def test_rewards_have_to_follow_from_the_state():
    env = RewardsByTheClock(**toy_options(reward="process", reward_model=StepReward()))
    with pytest.raises(CheckError, match="reward: expected the same as the first time"):
        checks.check_text_env(env)


class KeepsItsSeed(CandidateChunks):
    """Restores the text, but not the seed of its proposals."""

    def set_state(self, state):
        return super().set_state(dataclasses.replace(state, seed=self._seed))


class ProposesAnything(CandidateChunks):
    def reset(self, **options):
        super().reset(**options)
        self._seed = time.perf_counter_ns()
        return self._show(self.env.unwrapped.set_state(self.env.unwrapped.get_state())[1])


@pytest.mark.parametrize(
    ("cls", "match"),
    [
        broken(KeepsItsSeed, "set_state: expected that get_state.. returns the state"),
        broken(ProposesAnything, r"reset\(seed=0\): expected the same"),
    ],
)
def test_broken_candidate_views_fail(cls, match):
    env = cls(TextGenerationEnv(**toy_options()), LM, encoder=None)
    with pytest.raises(CheckError, match=match):
        checks.check_text_env(env)


def test_other_environments_fail():
    with pytest.raises(CheckError, match="expected a TextGenerationEnv or a wrapper of one"):
        checks.check_text_env(gym.make("CartPole-v1"))
    with pytest.raises(CheckError, match="truncated=False for finish_reason None"):
        checks.check_text_env(gym.wrappers.TimeLimit(TextGenerationEnv(**toy_options()), 1))

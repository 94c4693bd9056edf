"""The checkers pass what keeps its contract, and name the fault of what does not."""

import dataclasses
import itertools
import time

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agents
from agents.base import Completion
from mbrl_text_env import CheckError, TextGenerationEnv, checks, rewards
from mbrl_text_env.candidates import CandidateChunks
from mbrl_text_env.checks.base import counted
from mbrl_text_env.language_models import NGramLM, SamplingParams, TableLM
from mbrl_text_env.language_models.base import spawn_seed
from mbrl_text_env.ledger import BudgetError, Ledger, Usage
from mbrl_text_env.mdp import InvalidChunkError, initial, is_terminal
from mbrl_text_env.rewards.base import Scores
from mbrl_text_env.spaces import ChunkSpace
from mbrl_text_env.types import Chunk, Message, Prompt
from mbrl_text_env.wrappers import KLPenalty, PotentialShaping
from tests.toys import PROMPTS, CountReward, FixedValue, LetterEncoder, StepReward, toy_options

TEXT, CANDIDATES = "mbrl_text_env/TextGeneration-v0", "mbrl_text_env/CandidateChunks-v0"
LM = NGramLM("abcde", seed=1)


def broken(cls, match):
    """A faulty implementation, and what the message has to say about it."""
    return pytest.param(cls, match, id=cls.__name__)


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
        return self._show(self._current())


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
    def reset(self, *, seed=None, options=None):
        return super().reset(options=options)


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
            return self._show(self._current())[0], 0.0, True, False, {}
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
        return observation, {**info, "score": 0.0}


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


class ListInState(TextGenerationEnv):
    def __init__(self, **options):
        super().__init__(**{**options, "prompts": [Prompt("ab", [Message("user", "ab")])]})


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
        broken(ListInState, "a state that can be hashed"),
    ],
)
def test_broken_environments_fail(cls, match):
    with pytest.raises(CheckError, match=match):
        checks.check_text_env(cls(**toy_options()))


class PaysTheWholeScore(TextGenerationEnv):
    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, self._outcome.score, *rest


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


# Reward models.


@pytest.mark.parametrize("spec", ["sentiment", "constraints", "relevance", "sentiment+2*relevance"])
def test_reward_models_pass(spec):
    checks.check_reward_model(rewards.make(spec))


def mentions(completions, answer, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(a in text) for text, a in zip(texts, answer, strict=True)]


def test_functions_pass_as_reward_models():
    def brevity(prompt, response):
        return -len(response)

    checks.check_reward_model(rewards.as_reward_model(brevity))
    with pytest.raises(CheckError, match="as_reward_model"):
        checks.check_reward_model(brevity)


def test_prompts_that_a_reward_does_not_apply_to_are_left_out():
    reward = rewards.as_reward_model(mentions)
    prompts = [
        Prompt.from_text("Capital of France?", metadata={"answer": "Paris"}),
        Prompt.from_text("Why?"),
    ]
    checks.check_reward_model(reward, prompts, ["It is Paris.", "Rome", ""])
    with pytest.raises(CheckError, match=r"True for at least one of 1 prompts, got none"):
        checks.check_reward_model(reward, prompts[1:])


@given(
    weights=st.dictionaries(st.characters(), st.floats(-1e6, 1e6), max_size=5),
    responses=st.lists(st.text(), min_size=1, max_size=5),
)
def test_every_sum_over_characters_passes(weights, responses):
    class Weighted:
        name = "weighted"

        def score(self, prompts, responses):
            return [sum(weights.get(c, 0.0) for c in response) for response in responses]

    checks.check_reward_model(Weighted(), PROMPTS, responses)


class Reward(CountReward):
    """The number of characters, so that most responses differ."""

    def score(self, prompts, responses):
        return [float(len(response)) for response in responses]


class WrongOrder(Reward):
    def score(self, prompts, responses):
        return sorted(super().score(prompts, responses))


class GlobalState(Reward):
    count = 0

    def score(self, prompts, responses):
        self.count += 1
        return [score + self.count for score in super().score(prompts, responses)]


class NoNumber(Reward):
    def score(self, prompts, responses):
        return [len(r.split()) / len(r.split()) if r.split() else np.nan for r in responses]


class InfiniteScore(Reward):
    def score(self, prompts, responses):
        return [1 / len(r) if r else np.inf for r in responses]


class TooFew(Reward):
    def score(self, prompts, responses):
        return super().score(prompts, responses)[1:]


class Column(Reward):
    def score(self, prompts, responses):
        return np.array([super().score(prompts, responses)]).T


class Words(Reward):
    def score(self, prompts, responses):
        return ["good"] * len(responses)


class DependsOnTheBatch(Reward):
    def score(self, prompts, responses):
        scores = np.array(super().score(prompts, responses))
        return scores - scores.mean()


class SharesAmongEquals(Reward):
    def score(self, prompts, responses):
        return [1 / responses.count(response) for response in responses]


class Raises(Reward):
    def score(self, prompts, responses):
        return [ord(response[0]) for response in responses]


class SortsItsInput(Reward):
    def score(self, prompts, responses):
        responses.sort(key=len)
        return super().score(prompts, responses)


class NoName(Reward):
    name = ""


class WrongParts(Reward):
    def score_parts(self, prompts, responses):
        total = np.array(self.score(prompts, responses))
        return Scores(total, {"length": total[:1]})


class WrongTotal(Reward):
    def score_parts(self, prompts, responses):
        return Scores(np.array(self.score(prompts, responses)) / 2)


class PlainParts(Reward):
    def score_parts(self, prompts, responses):
        return {"length": self.score(prompts, responses)}


class NegativeFlops(Reward):
    def flops(self, prompts, responses):
        return np.full(len(responses), -1.0)


class FlopsAboveBound(Reward):
    def flops(self, prompts, responses):
        return np.array([float(len(response)) for response in responses])

    def flops_bound(self):
        return 100.0


class InfiniteBound(Reward):
    def flops_bound(self):
        return float("inf")


class OneScoreForAllSteps(Reward):
    def score_steps(self, prompt, steps):
        return [float(len(steps))]


class CountingSteps(Reward):
    count = 0

    def score_steps(self, prompt, steps):
        self.count += 1
        return [float(self.count) for _ in steps]


@pytest.mark.parametrize(
    ("cls", "match"),
    [
        broken(WrongOrder, "in the order of the responses"),
        broken(GlobalState, r"in a second call \(deterministic\)"),
        broken(NoNumber, "expected finite numbers, got nan for ''"),
        broken(InfiniteScore, "expected finite numbers, got inf for ''"),
        broken(TooFew, r"one number for each of 9 texts"),
        broken(Column, r"got shape \(9, 1\)"),
        broken(Words, "expected one number for each of 9 texts"),
        broken(DependsOnTheBatch, "the score that the response has alone"),
        broken(SharesAmongEquals, "the score that the response has alone"),
        broken(Raises, "got IndexError"),
        broken(SortsItsInput, "responses are left as they are"),
        broken(NoName, "expected a string that is not empty"),
        broken(WrongParts, "part 'length': expected one number for each"),
        broken(WrongTotal, "the total that `score` returns"),
        broken(PlainParts, "expected a `rewards.Scores`"),
        broken(NegativeFlops, r"flops: expected numbers from 0"),
        broken(FlopsAboveBound, r"flops_bound\(\), 100, got"),
        broken(InfiniteBound, "flops_bound: expected a finite number"),
        broken(OneScoreForAllSteps, "score_steps: expected one number for each of 4 texts"),
        broken(CountingSteps, "score_steps: expected the same scores in a second call"),
    ],
)
def test_broken_reward_models_fail(cls, match):
    with pytest.raises(CheckError, match=match):
        checks.check_reward_model(cls())


# Language models that keep the contract.


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("concentration", [0.01, 1.0])
def test_ngram_models_pass(order, concentration):
    lm = NGramLM("abcde", order, seed=order, concentration=concentration)
    checks.check_language_model(lm)


@pytest.mark.parametrize(
    "table",
    [
        {"": [0.0, 0.9, 0.1], "a": [1.0, 0.0, 0.0]},
        {"": [0.0, 1.0, 0.0], "a": [0.0, 0.0, 1.0], "ab": [1.0, 0.0, 0.0]},
    ],
)
def test_table_models_pass(table):
    checks.check_language_model(TableLM("ab", table))


@settings(max_examples=30, deadline=None)
@given(
    alphabet=st.sets(st.characters(), min_size=1, max_size=8).map("".join),
    order=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    concentration=st.floats(0.05, 10),
    stop_probability=st.floats(0, 0.9),
    context_length=st.integers(4, 12),
    max_new_tokens=st.integers(2, 12),
)
def test_every_ngram_model_passes(alphabet, max_new_tokens, **options):
    lm = NGramLM(alphabet, **options)
    prompts = [Prompt.from_text(text) for text in ("abc", "-", alphabet[:2] + "!")]
    checks.check_language_model(lm, prompts, max_new_tokens=max_new_tokens)


def test_smollm2_passes(smollm2):
    prompts = [Prompt.from_text("Write a story."), Prompt.from_text("Once", chat=False)]
    checks.check_language_model(smollm2, prompts, max_new_tokens=4)


def test_arguments_of_check_language_model():
    with pytest.raises(ValueError, match="at least one prompt"):
        checks.check_language_model(LM, [])
    with pytest.raises(ValueError, match="max_new_tokens of at least 2"):
        checks.check_language_model(LM, max_new_tokens=1)


# Language models that break it.


class Shifted(NGramLM):
    """Its log-probabilities are those of the next token."""

    def logprobs(self, states, chunks, **options):
        return [(*logs[1:], logs[0]) for logs in super().logprobs(states, chunks, **options)]


class ShapedLogprobs(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params):
        chunk = super()._draw(state, generator, max_new_tokens, params)
        logs = tuple(log / (params.temperature or 1) for log in chunk.logprobs)
        return dataclasses.replace(chunk, logprobs=logs)


class PositiveLogprobs(NGramLM):
    def _draw(self, *args):
        chunk = super()._draw(*args)
        return dataclasses.replace(chunk, logprobs=tuple(-log for log in chunk.logprobs))


class SharedStream(NGramLM):
    generator = np.random.default_rng(0)

    def _draw(self, state, generator, max_new_tokens, params):
        return super()._draw(state, self.generator, max_new_tokens, params)


class OneStreamABatch(NGramLM):
    def sample(self, states, num_samples, max_new_tokens, *, seeds, **options):
        seeds = [spawn_seed(seeds[0], len(states))] * len(states)
        return super().sample(states, num_samples, max_new_tokens, seeds=seeds, **options)


class SeedsByPlace(NGramLM):
    """Its states draw in order of their place among the others."""

    def sample(self, states, num_samples, max_new_tokens, *, seeds, **options):
        if len(states) > 1:
            seeds = [spawn_seed(seeds[0], i) for i in range(len(states))]
        return super().sample(states, num_samples, max_new_tokens, seeds=seeds, **options)


class IgnoresSeeds(NGramLM):
    def sample(self, states, num_samples, max_new_tokens, *, seeds, **options):
        seeds = [0] * len(seeds)
        return super().sample(states, num_samples, max_new_tokens, seeds=seeds, **options)


class SamplesAlike(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params):
        alike = np.random.default_rng(len(state.prompt_ids))
        return super()._draw(state, alike, max_new_tokens, params)


class IgnoresFirstSample(NGramLM):
    def sample(self, *args, first_sample=0, **options):
        return super().sample(*args, **options)


class DependsOnTheLimit(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params):
        generator.random(max_new_tokens)
        return super()._draw(state, generator, max_new_tokens, params)


class NotGreedy(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params):
        params = params if params.temperature else SamplingParams()
        return super()._draw(state, generator, max_new_tokens, params)


class LeastProbable(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params):
        if params.temperature:
            return super()._draw(state, generator, max_new_tokens, params)
        token = (
            int(np.argmin(self.next_probabilities(state.prompt_ids, state.response_ids)[1:])) + 1
        )
        ids = (token,) * max_new_tokens
        return Chunk(ids, self.logprobs([state], [Chunk(ids)])[0])


class StopInTheMiddle(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params):
        ids = tuple(generator.integers(0, 2, max_new_tokens).tolist())
        return Chunk(ids, self.logprobs([state], [Chunk(ids)])[0], "stop" if not ids[-1] else None)


class TooManyTokens(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params):
        return super()._draw(state, generator, max_new_tokens + 1, params)


class StopsEarly(NGramLM):
    def _draw(self, *args):
        chunk = super()._draw(*args)
        return Chunk(chunk.token_ids[:1], chunk.logprobs[:1], "stop" if len(chunk) == 1 else None)


class OutsideTheVocabulary(NGramLM):
    def _draw(self, *args):
        chunk = super()._draw(*args)
        return dataclasses.replace(chunk, token_ids=(99, *chunk.token_ids[1:]))


class NoFinishReason(NGramLM):
    def _draw(self, *args):
        return dataclasses.replace(super()._draw(*args), finish_reason=None)


class NoLogprobs(NGramLM):
    def _draw(self, *args):
        return dataclasses.replace(super()._draw(*args), logprobs=())


class FlatRows(NGramLM):
    def sample(self, *args, **options):
        return list(itertools.chain.from_iterable(super().sample(*args, **options)))


class Uncharged(NGramLM):
    def sample(self, *args, ledgers=None, **options):
        return super().sample(*args, **options)


class ChargesTheLongest(NGramLM):
    def _charge(self, states, generated, ledgers):
        super()._charge(states, [[max(row, default=0)] * len(row) for row in generated], ledgers)


class ChargesNoPrefix(NGramLM):
    def usage(self, prefix_tokens, new_tokens):
        return dataclasses.replace(super().usage(prefix_tokens, new_tokens), prompt_tokens=0)


class BoundTooLow(NGramLM):
    def _charge(self, states, generated, ledgers):
        super()._charge(states, generated, ledgers)
        for ledger in ledgers or ():
            ledger.charge(Usage(lm_flops=1e6))


class FreeOfCharge(NGramLM):
    def usage(self, prefix_tokens, new_tokens):
        return dataclasses.replace(super().usage(prefix_tokens, new_tokens), lm_flops=0.0)


class ContinuesEndedStates(NGramLM):
    def sample(self, states, *args, **options):
        going = [dataclasses.replace(state, finish_reason=None) for state in states]
        return super().sample(going, *args, **options)


class AnyCount(NGramLM):
    def sample(self, states, num_samples, max_new_tokens, **options):
        return super().sample(states, max(1, num_samples), max_new_tokens, **options)


class ShowsTheStopToken(NGramLM):
    def decode(self, token_ids):
        return super().decode(token_ids) + ("<end>" if 0 in token_ids else "")


class StopOutside(NGramLM):
    stop_token_ids = None

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.stop_token_ids = frozenset({0, 99})


class EncodesLists(NGramLM):
    def encode_prompt(self, prompt):
        return list(super().encode_prompt(prompt))


class EncodesAtRandom(NGramLM):
    count = 0

    def encode_prompt(self, prompt):
        self.count = (self.count + 1) % 5
        return (self.count, *super().encode_prompt(prompt))


class DoubleFeatures(NGramLM):
    def features(self, states, **options):
        return super().features(states, **options).astype(np.float64)


class CentredFeatures(NGramLM):
    def features(self, states, **options):
        rows = super().features(states, **options)
        return rows - rows.mean(axis=0)


class LogFeatures(NGramLM):
    def features(self, states, **options):
        return np.log(super().features(states, **options) * 0)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(
    ("cls", "match"),
    [
        broken(Shifted, "those of the model itself"),
        broken(ShapedLogprobs, "Take them before temperature"),
        broken(PositiveLogprobs, "one finite log-probability of at most 0"),
        broken(SharedStream, "the same chunks when called again with the same seeds"),
        broken(OneStreamABatch, r"that each state has alone \(batch of one\)"),
        broken(SeedsByPlace, "that each state has alone"),
        broken(IgnoresSeeds, "another seed gives other samples"),
        broken(SamplesAlike, "16 samples of a state differ"),
        broken(IgnoresFirstSample, "from first_sample=4 to be the 8 from 0"),
        broken(DependsOnTheLimit, "gives a prefix of the longer chunk"),
        broken(NotGreedy, "the same chunk for all samples and seeds"),
        broken(LeastProbable, "expected the most probable token"),
        broken(StopInTheMiddle, "End a chunk at its first stop token"),
        broken(TooManyTokens, r"1 to max_new_tokens \(6\) token ids"),
        broken(StopsEarly, "6 tokens, or fewer where the response ends"),
        broken(OutsideTheVocabulary, "ints from 0 to 5"),
        broken(NoFinishReason, "'stop' after a stop token"),
        broken(NoLogprobs, "one finite log-probability"),
        broken(FlatRows, r"chunks\[len\(states\)\]\[num_samples\]"),
        broken(Uncharged, "ledgers: expected generated_tokens"),
        broken(ChargesTheLongest, "ledgers: expected generated_tokens"),
        broken(ChargesNoPrefix, "cover the prefix of"),
        broken(BoundTooLow, "no amount above `usage"),
        broken(FreeOfCharge, "FLOPs above 0"),
        broken(ContinuesEndedStates, "ValueError for a state that has ended, got no error"),
        broken(AnyCount, "ValueError for num_samples=0, got no error"),
        broken(ShowsTheStopToken, "a text without the special token 0"),
        broken(StopOutside, "a frozenset of ids from 0 to 5"),
        broken(EncodesLists, "a tuple of fewer than 1024 ints"),
        broken(EncodesAtRandom, "expected the same ids each time"),
        broken(DoubleFeatures, "expected a float32 array of shape"),
        broken(CentredFeatures, "the features that each state has alone"),
        broken(LogFeatures, "features: expected finite numbers"),
    ],
)
def test_broken_language_models_fail(cls, match):
    with pytest.raises(CheckError, match=match):
        checks.check_language_model(cls("abcde", order=2, seed=1))


def test_incomplete_language_models_fail():
    with pytest.raises(CheckError, match=r"without .*sample, logprobs, usage"):
        checks.check_language_model(object())


def test_few_improbable_tokens_may_differ_with_the_batch():
    class Tied(NGramLM):
        """In a batch, a token that is hardly ever drawn becomes its neighbour."""

        def next_probabilities(self, prompt_ids, response_ids):
            row = np.full(self.vocab_size, 1e-5)
            row[1] = 1 - row[2:].sum() - row[0]
            return row

        def sample(self, states, *args, **options):
            rows = super().sample(states, *args, **options)
            swapped = len(states) > 1
            return [[self.swapped(c) if swapped else c for c in row] for row in rows]

        def swapped(self, chunk):
            ids = tuple(i - 1 if i > 2 else i for i in chunk.token_ids)
            return dataclasses.replace(chunk, token_ids=ids)

    alphabet = "".join(map(chr, range(200, 2200)))
    checks.check_language_model(Tied(alphabet))


# Agents that keep the contract.

VALUE = FixedValue(lambda text: text.count("a"), LM)
SIZES = {"max_response_tokens": 7, "chunk_tokens": 2}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda lm: agents.Sampling(lm, **SIZES),
        lambda lm: agents.Sampling(lm, params=SamplingParams(temperature=0), **SIZES),
        lambda lm: agents.RandomAgent(lm, **SIZES),
        lambda lm: agents.BestOfN(lm, CountReward(), **SIZES),
        lambda lm: agents.BestOfN(lm, CountReward(), n=3, **SIZES),
        lambda lm: agents.Lookahead(lm, CountReward(), **SIZES),
        lambda lm: agents.Lookahead(lm, CountReward(), VALUE, **SIZES),
        lambda lm: agents.Lookahead(
            lm, CountReward(), VALUE, prefix_tokens=4, max_response_tokens=20
        ),
    ],
)
def test_agents_pass(make, order):
    checks.check_agent(make(NGramLM("abcde", order, seed=order)), PROMPTS)


@settings(max_examples=15, deadline=None)
@given(
    limit=st.integers(1, 9),
    chunk=st.integers(1, 9),
    branches=st.integers(1, 4),
    prefix=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    stop=st.sampled_from([0.0, 0.1, 0.8]),
)
def test_agents_of_every_size_pass(limit, chunk, branches, prefix, seed, stop):
    lm = NGramLM("abc", seed=seed, stop_probability=stop)
    sizes = {"max_response_tokens": limit, "chunk_tokens": chunk}
    reward = rewards.WeightedSum([CountReward("a"), StepReward("b")], [1.0, -0.5])
    checks.check_agent(agents.BestOfN(lm, reward, n=branches, **sizes), PROMPTS[:2], seed=seed)
    lookahead = agents.Lookahead(
        lm,
        reward,
        VALUE,
        num_partials=branches,
        keep=(branches + 1) // 2,
        prefix_tokens=prefix,
        **sizes,
    )
    checks.check_agent(lookahead, PROMPTS[:2], seed=seed)


def test_agents_pass_where_the_context_is_shorter_than_the_limit():
    lm = NGramLM("abc", context_length=6, stop_probability=0)
    checks.check_agent(agents.Sampling(lm, **SIZES), PROMPTS)


def test_a_response_may_need_a_larger_budget():
    class Drafts(agents.BestOfN):
        """Writes a draft before the response."""

        def response_usage(self, state):
            return self.samples_usage(state, 2)

    agent = Drafts(LM, CountReward(), **SIZES)
    checks.check_agent(agent, PROMPTS, budget_tokens=14)
    with pytest.raises(CheckError, match="got BudgetError"):
        checks.check_agent(agent, PROMPTS)


# Agents that break it.


class Overspends(agents.BestOfN):
    def _next_count(self, state, ledger, have):
        return 0 if have else 4


class OverspendsQuietly(agents.BestOfN):
    def search(self, states, ledgers, seed):
        loose = [Ledger() for _ in ledgers]
        found = super().search(states, loose, seed)
        for ledger, other in zip(ledgers, loose, strict=True):
            ledger.usage = other.usage
        return found


class SamplesOutsideTheLedger(agents.BestOfN):
    def search(self, states, ledgers, seed):
        self.language_model.sample(states, 1, 1, seeds=[seed] * len(states))
        return super().search(states, ledgers, seed)


class ScoresOutsideTheLedger(agents.BestOfN):
    def search(self, states, ledgers, seed):
        found = super().search(states, ledgers, seed)
        self.reward_model.score([state.prompt for state in states], ["a" for _ in states])
        return found


class OwnModel(agents.Sampling):
    """Holds its model under a second name, and spends there."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.drafter = self.language_model

    def search(self, states, ledgers, seed):
        self.drafter.sample(states, 1, 1, seeds=[seed] * len(states))
        return super().search(states, ledgers, seed)


class Incomplete(agents.Sampling):
    def search(self, states, ledgers, seed):
        return [
            dataclasses.replace(c, state=dataclasses.replace(c.state, finish_reason=None))
            for c in super().search(states, ledgers, seed)
        ]


class TooLong(agents.Sampling):
    def search(self, states, ledgers, seed):
        return [
            dataclasses.replace(
                c,
                state=dataclasses.replace(c.state, response_ids=(1,) * 8, finish_reason="length"),
            )
            for c in super().search(states, ledgers, seed)
        ]


class WrongEnding(agents.Sampling):
    def search(self, states, ledgers, seed):
        return [
            dataclasses.replace(c, state=dataclasses.replace(c.state, finish_reason="stop"))
            for c in super().search(states, ledgers, seed)
        ]


class IgnoresItsSeed(agents.Sampling):
    def search(self, states, ledgers, seed):
        return super().search(states, ledgers, 0)


class DrawsWithoutSeed(agents.Sampling):
    calls = 0

    def search(self, states, ledgers, seed):
        self.calls += 1
        return super().search(states, ledgers, spawn_seed(seed, self.calls))


class Reorders(agents.Sampling):
    def generate(self, prompts, budget=None, *, seed=0):
        answers = super().generate(prompts, budget, seed=seed)
        return sorted(answers, key=lambda answer: answer.text)


class OneAnswer(agents.Sampling):
    def generate(self, prompts, budget=None, *, seed=0):
        return super().generate(prompts, budget, seed=seed)[:1]


class SeedOfTheBatch(agents.Sampling):
    def search(self, states, ledgers, seed):
        return super().search(states, ledgers, seed + len(states))


class WrongScore(agents.BestOfN):
    def search(self, states, ledgers, seed):
        return [
            dataclasses.replace(c, score=c.score + 1) for c in super().search(states, ledgers, seed)
        ]


class InventsAScore(agents.Sampling):
    def search(self, states, ledgers, seed):
        return [dataclasses.replace(c, score=1.0) for c in super().search(states, ledgers, seed)]


class StripsItsText(agents.Sampling):
    def generate(self, prompts, budget=None, *, seed=0):
        return [
            dataclasses.replace(answer, text=answer.text.upper())
            for answer in super().generate(prompts, budget, seed=seed)
        ]


class TakesAnyBudget(agents.BestOfN):
    def generate(self, prompts, budget=None, *, seed=0):
        try:
            return super().generate(prompts, budget, seed=seed)
        except BudgetError:
            states = [initial(prompt, self.language_model) for prompt in prompts]
            return [Completion(state) for state in states]


class LongChunks(agents.Sampling):
    def _first_chunk(self, state, completion):
        return Chunk(completion.state.response_ids, (), completion.state.finish_reason)


class OtherChunks(agents.Sampling):
    def _first_chunk(self, state, completion):
        return Chunk((5,) if completion.state.response_ids[0] != 5 else (4,))


class NeverStops(agents.Sampling):
    def _first_chunk(self, state, completion):
        return dataclasses.replace(super()._first_chunk(state, completion), finish_reason=None)


class DecidesAfterTheEnd(agents.Sampling):
    def act(self, states, budget=None, *, seed=0):
        going = [dataclasses.replace(s, response_ids=(), finish_reason=None) for s in states]
        ended = any(is_terminal(state) for state in states)
        return super().act(going if ended else states, budget, seed=seed)


class StartsAnew(agents.Sampling):
    """Answers every state as if nothing were written yet."""

    def act(self, states, budget=None, *, seed=0):
        fresh = [dataclasses.replace(s, response_ids=()) for s in states]
        return super().act(fresh, budget, seed=seed)


@pytest.mark.parametrize(
    ("cls", "match"),
    [
        broken(Overspends, "expected that it stays within Budget"),
        broken(OverspendsQuietly, r"expected at most 7 tokens a prompt"),
        broken(SamplesOutsideTheLedger, "generated tokens that its models were asked for"),
        broken(ScoresOutsideTheLedger, "reward calls that its models were asked for"),
        broken(OwnModel, "generated tokens that its models were asked for"),
        broken(Incomplete, "expected a complete response"),
        broken(TooLong, r"at most max_response_tokens \(7\)"),
        broken(WrongEnding, "'stop' after a stop token, and only then"),
        broken(IgnoresItsSeed, "that seeds 0 and 1 draw different samples"),
        broken(DrawsWithoutSeed, "the same answer for the same seed"),
        broken(Reorders, "in the order of the prompts"),
        broken(OneAnswer, "one Generation a prompt"),
        broken(SeedOfTheBatch, "the same answer in a batch as alone"),
        broken(WrongScore, "score: expected what the reward model gives"),
        broken(InventsAScore, "score: expected what the reward model gives"),
        broken(StripsItsText, "text: expected the decoded response"),
        broken(TakesAnyBudget, r"expected BudgetError for Budget\(tokens=6"),
        broken(LongChunks, r"1 to chunk_tokens \(2\) tokens"),
        broken(OtherChunks, "the beginning of its completion"),
        broken(NeverStops, "finish_reason 'stop' after the chunk is appended"),
        broken(DecidesAfterTheEnd, "expected ValueError for a state that has ended"),
        broken(StartsAnew, "the beginning of its completion"),
    ],
)
def test_broken_agents_fail(cls, match):
    with pytest.raises(CheckError, match=match):
        checks.check_agent(cls(LM, CountReward(), **SIZES), PROMPTS)


def test_a_score_without_a_reward_model():
    with pytest.raises(CheckError, match="expected None, for the agent has no reward model"):
        checks.check_agent(InventsAScore(LM, **SIZES), PROMPTS)


def test_other_objects_are_no_agents():
    with pytest.raises(CheckError, match="without generate, act"):
        checks.check_agent(object(), PROMPTS)
    with pytest.raises(ValueError, match="at least one prompt"):
        checks.check_agent(agents.Sampling(LM), [])


# What the checkers share.


@pytest.mark.parametrize("cls", [agents.BestOfN, SamplesOutsideTheLedger])
def test_the_models_are_left_as_they_were(cls):
    lm, reward = NGramLM("abcde", seed=1), CountReward()
    before = set(vars(lm)), set(vars(reward))
    try:
        checks.check_agent(cls(lm, reward, **SIZES), PROMPTS)
    except CheckError:
        assert cls is SamplesOutsideTheLedger
    assert (set(vars(lm)), set(vars(reward))) == before


def test_calls_are_counted_once_and_own_attributes_come_back():
    class Model:
        def __init__(self):
            self.outer = lambda x: self.inner(x) + 1

        def inner(self, x):
            return x

    model, seen = Model(), []
    outer = model.outer
    counters = {name: lambda result, x: seen.append((result, x)) for name in ("outer", "inner")}
    with counted(model, {**counters, "missing": print}):
        assert (model.outer(1), model.inner(5)) == (2, 5)
        with pytest.raises(TypeError):
            model.outer("text")
    assert seen == [(2, 1), (5, 5)]
    assert model.outer is outer
    assert "inner" not in vars(model)


def test_models_that_cannot_be_counted_are_named():
    class Fixed:
        __slots__ = ()
        name = "fixed"

        def score(self, prompts, responses):
            return [0.0 for _ in responses]

    with pytest.raises(CheckError, match=r"Fixed: .*__slots__"):
        checks.check_agent(agents.BestOfN(LM, Fixed(), **SIZES), PROMPTS)


def test_messages_say_what_was_expected_what_came_and_what_to_change():
    with pytest.raises(AssertionError) as caught:
        checks.check_reward_model(TooFew())
    assert str(caught.value) == (
        "Reward model 'count', score: expected one number for each of 9 texts, shape (9,), got "
        "[0.0, 2.0, 2.0, 35.0, 29.0, 4800.0, 2.0, 12.0]. Return a flat list of floats in the order "
        "of the texts."
    )

"""The reward checker passes what keeps its contract, and names the fault of what does not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env import CheckError, checks, rewards
from mbrl_text_env.rewards.base import Scores
from mbrl_text_env.types import Prompt
from tests.checks.common import broken
from tests.toys import PROMPTS, CountReward

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


def test_messages_say_what_was_expected_what_came_and_what_to_change():
    with pytest.raises(AssertionError) as caught:
        checks.check_reward_model(TooFew())
    assert str(caught.value) == (
        "Reward model 'count', score: expected one number for each of 9 texts, shape (9,), got "
        "[0.0, 2.0, 2.0, 35.0, 29.0, 4800.0, 2.0, 12.0]. Return a flat list of floats in the order "
        "of the texts."
    )

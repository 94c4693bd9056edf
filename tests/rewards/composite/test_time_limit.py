"""A reward that hangs is given up on, and the others get their scores."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards.base import RewardError, score_responses
from mbrl_text_env.rewards.composite.transforms import TimeLimit
from mbrl_text_env.rewards.evaluators.relevance import RelevanceReward
from mbrl_text_env.rewards.evaluators.sentiment import SentimentReward
from mbrl_text_env.types import Prompt
from tests.toys import StepReward

PROMPT = Prompt.from_text("Wait.")


class Hanging(StepReward):
    """Waits at a response "hang" until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.go_on = threading.Event()

    def score(self, prompts, responses):
        if "hang" in responses:
            self.go_on.wait()
        return super().score(prompts, responses)


@pytest.fixture
def hanging():
    reward = Hanging()
    yield reward
    reward.go_on.set()


def test_a_call_that_hangs_is_given_up_on(hanging):
    limited = TimeLimit(hanging, seconds=0.05)
    with pytest.raises(RewardError, match=r"within 0.05 seconds.*'Wait\.' and 1 more"):
        score_responses(limited, [PROMPT] * 2, ["a", "hang"])
    # What hung is left behind; other calls go on.
    patient = TimeLimit(hanging, seconds=60)
    assert score_responses(patient, [PROMPT], ["ab"]).total.tolist() == [0.5]


def test_what_is_in_time_is_as_without():
    limited = TimeLimit(StepReward(), seconds=60)
    assert limited.name == "steps"
    assert score_responses(limited, [PROMPT] * 2, ["ab", "a"]).total.tolist() == [0.5, 1.0]
    assert limited.score_steps(PROMPT, ["aa", "b"]).tolist() == [2.0, 0.0]
    check_reward_model(TimeLimit(SentimentReward(), seconds=60))
    assert not TimeLimit(SentimentReward(), seconds=60).scores_steps


def test_errors_come_through():
    class Broken(StepReward):
        def score(self, prompts, responses):
            raise ZeroDivisionError("no")

    with pytest.raises(RewardError, match="ZeroDivisionError: no"):
        TimeLimit(Broken(), seconds=60).score([PROMPT], ["a"])


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_limits_that_are_none(seconds):
    with pytest.raises(ValueError, match="TimeLimit: expected seconds"):
        TimeLimit(StepReward(), seconds)


def test_the_reduced_form_is_as_patient_and_really_reduced(minilm):
    """Although it scores in a thread of its own, where no setting of the caller's holds."""
    exact = TimeLimit(RelevanceReward(minilm), seconds=60)
    reduced = exact.reduced("bfloat16")
    assert (type(reduced), reduced.seconds, reduced.name) == (TimeLimit, 60, "relevance")
    rows = [PROMPT] * 2, ["Patience is a virtue.", "The sky is blue."]
    difference = score_responses(reduced, *rows).total - score_responses(exact, *rows).total
    assert 1e-5 < np.abs(difference).max() < 0.01


def test_what_has_no_reduced_form_is_limited_as_it_is():
    reward = StepReward()
    reduced = TimeLimit(reward, seconds=60).reduced("bfloat16")
    assert reduced.reward.reward is reward
    assert score_responses(reduced, [PROMPT], ["ab"]).total.tolist() == [0.5]
    assert reduced.score_steps(PROMPT, ["aa", "b"]).tolist() == [2.0, 0.0]

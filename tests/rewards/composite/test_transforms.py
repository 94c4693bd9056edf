"""One reward, changed, with numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards.base import reward_usage_bound, score_responses
from mbrl_text_env.rewards.composite.transforms import (
    Clip,
    LengthPenalty,
    Normalise,
    RepetitionPenalty,
    Threshold,
    repeated_share,
)
from mbrl_text_env.rewards.evaluators.sentiment import SentimentReward
from mbrl_text_env.types import Prompt
from tests.rewards.composite.test_combinators import Count

PROMPT = Prompt.from_text("Count letters.")


class Value:
    """The number that a response is."""

    name = "value"

    def score(self, prompts, responses):
        return [float(response) for response in responses]


def scores_of(reward, responses):
    return score_responses(reward, [PROMPT] * len(responses), responses)


def test_clip():
    scores = scores_of(Clip(Value(), -1, 2), ["-3", "0.5", "7"])
    assert scores.total.tolist() == [-1.0, 0.5, 2.0]
    assert scores.parts["value"].tolist() == [-3.0, 0.5, 7.0]
    assert scores_of(Clip(Value(), low=0), ["-3", "7"]).total.tolist() == [0.0, 7.0]
    assert scores_of(Clip(Value(), high=0), ["-3", "7"]).total.tolist() == [-3.0, 0.0]


def test_threshold():
    scores = scores_of(Threshold(Value(), 0.5), ["0.4", "0.5", "0.6"])
    assert scores.total.tolist() == [0.0, 1.0, 1.0]
    assert Threshold(Value(), 0.5).name == "value>=0.5"


def test_normalise():
    scores = scores_of(Normalise(Value(), mean=2, std=4), ["2", "6", "-2"])
    assert scores.total.tolist() == [0.0, 1.0, -1.0]
    assert scores.parts["value"].tolist() == [2.0, 6.0, -2.0]


def test_length_penalty():
    scores = scores_of(LengthPenalty(Count("a"), max_words=2, weight=0.5), ["a", "a b", "a b a c"])
    assert scores.total.tolist() == [1.0, 1.0, 2.0 - 0.5 * 2]
    assert scores.parts["length_penalty"].tolist() == [0.0, 0.0, 1.0]
    assert scores.parts["a"].tolist() == [1.0, 1.0, 2.0]


def test_repetition_penalty():
    reward = RepetitionPenalty(Count("a"), weight=2.0, n=2)
    scores = scores_of(reward, ["", "x", "to be or not to be", "A b a B a b"])
    # 5 pairs, "to be" twice; 5 pairs, of them 2 different ones.
    np.testing.assert_allclose(scores.parts["repetition_penalty"], [0, 0, 0.4, 1.2])
    np.testing.assert_allclose(scores.total, [0, 0, -0.4, 2 - 1.2])


@given(st.text("ab ", max_size=30), st.integers(1, 4))
def test_the_share_of_repetitions_is_a_share(text, n):
    assert 0 <= repeated_share(text, n) < 1
    assert repeated_share(text, n) <= repeated_share(f"{text} {text}", n) + 1e-12


@pytest.mark.parametrize(
    "make",
    [
        lambda reward: Clip(reward, -0.5, 0.5),
        lambda reward: Threshold(reward, 0.1),
        lambda reward: Normalise(reward, 0.1, 0.3),
        lambda reward: LengthPenalty(reward, 5),
        lambda reward: RepetitionPenalty(reward),
    ],
)
def test_contract(make):
    check_reward_model(make(SentimentReward()))
    assert reward_usage_bound(make(Count("a"))).reward_flops == 1000
    assert make(Count("a")).flops([PROMPT], ["ab"]).tolist() == [20.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(Value()), "at least one of low and high"),
        (lambda: Clip(Value(), 2, 1), "low to be at most high, got 2 and 1"),
        (lambda: Clip(Value(), float("nan")), "low to be at most high"),
        (lambda: Threshold(Value(), float("inf")), "threshold to be a finite number, got inf"),
        (lambda: Normalise(Value(), std=0), "std to be a finite number above 0, got 0"),
        (lambda: Normalise(Value(), mean=float("nan")), "mean to be a finite number"),
        (lambda: LengthPenalty(Value(), -1), "max_words .* got -1"),
        (lambda: LengthPenalty(Value(), 1, 0), "weight .* above 0, got 0"),
        (lambda: RepetitionPenalty(Value(), n=0), "n to be .* above 0, got 0"),
    ],
)
def test_arguments_out_of_range_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()

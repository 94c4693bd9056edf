"""One reward, changed, with numbers worked out by hand."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards.base import RewardError, reward_usage_bound, score_responses
from mbrl_text_env.rewards.composite.transforms import (
    Clip,
    LengthPenalty,
    Normalise,
    RepetitionPenalty,
    RunningNormalise,
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


def test_normalise_fitted_on_responses():
    fitted = Normalise.fitted(Value(), [PROMPT] * 3, ["1", "2", "6"])
    assert (fitted.mean, fitted.std) == (3.0, pytest.approx(np.sqrt(14 / 3)))
    with pytest.raises(RewardError, match=r"'value'.*got 2 with 1 different"):
        Normalise.fitted(Value(), [PROMPT] * 2, ["1", "1"])


def test_running_statistics_are_those_of_all_scores_so_far():
    reward = RunningNormalise(Value())
    assert reward.std == 1.0
    assert scores_of(reward, ["5"]).total.tolist() == [0.0]
    scores_of(reward, ["1", "3"])
    assert (reward.count, reward.mean) == (3, 3.0)
    assert reward.std == pytest.approx(np.std([5, 1, 3]))
    last = scores_of(reward, ["3"])
    assert last.total.tolist() == [0.0]
    assert last.parts["value"].tolist() == [3.0]


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=5), max_size=6))
def test_running_statistics_equal_those_of_one_batch(batches):
    reward = RunningNormalise(Value())
    for batch in batches:
        reward.change(np.array(batch, dtype=np.float64))
    seen = np.array([number for batch in batches for number in batch])
    assert reward.count == len(seen)
    if len(seen):
        assert reward.mean == pytest.approx(seen.mean(), abs=1e-6)
        if seen.std() > 1e-6:
            assert reward.std == pytest.approx(seen.std(), rel=1e-6, abs=1e-6)


def test_running_statistics_are_kept_with_the_run(tmp_path):
    reward = RunningNormalise(Value())
    scores_of(reward, ["1", "3", "8"])
    reward.save(tmp_path / "reward.json")
    loaded = RunningNormalise(Value()).load(tmp_path / "reward.json")
    copied = pickle.loads(pickle.dumps(reward))  # noqa: S301 its own
    expected = scores_of(reward, ["2", "9"]).total.tolist()
    assert scores_of(loaded, ["2", "9"]).total.tolist() == expected
    assert scores_of(copied, ["2", "9"]).total.tolist() == expected
    frozen = loaded.frozen()
    assert scores_of(frozen, ["2"]).total == scores_of(frozen, ["2"]).total
    check_reward_model(frozen, responses=["1", "2.5", "-7"])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        json.dumps({"format": 1, "reward": "other", "count": 1, "mean": 0, "squares": 0}),
        json.dumps({"format": 9, "reward": "value", "count": 1, "mean": 0, "squares": 0}),
        json.dumps({"format": 1, "reward": "value", "count": -1, "mean": 0, "squares": 0}),
        json.dumps(
            {"format": 1, "reward": "value", "count": 1, "mean": float("nan"), "squares": 0}
        ),
        None,
    ],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path, content):
    path = tmp_path / "reward.json"
    if content is not None:
        path.write_text(content)
    reward = RunningNormalise(Value())
    with pytest.raises(RewardError, match=r"'normalised\(value\)'.*`RunningNormalise.save`"):
        reward.load(path)
    assert (reward.count, reward.mean, reward.std) == (0, 0.0, 1.0)


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

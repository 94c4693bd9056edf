"""Rewards made of several, whose totals and parts are worked out by hand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards.base import (
    RewardError,
    applies_to,
    reward_usage_bound,
    score_responses,
    score_steps,
)
from mbrl_text_env.rewards.composite.combinators import Ensemble, Gate, Product, WeightedSum
from mbrl_text_env.rewards.composite.transforms import Clip, LengthPenalty
from mbrl_text_env.rewards.evaluators.relevance import RelevanceReward
from mbrl_text_env.rewards.evaluators.sentiment import SentimentReward
from mbrl_text_env.rewards.verifiable.constraints import ConstraintsReward
from mbrl_text_env.types import Prompt

PROMPT = Prompt.from_text("Count letters.")


class Count:
    """Counts a letter, at ten floating-point operations a character."""

    def __init__(self, letter, name=None):
        self.letter = letter
        self.name = letter if name is None else name

    def score(self, prompts, responses):
        return [response.count(self.letter) for response in responses]

    def flops(self, prompts, responses):
        return [10 * len(response) for response in responses]

    def flops_bound(self):
        return 1000


def scores_of(reward, responses):
    return score_responses(reward, [PROMPT] * len(responses), responses)


def test_total_and_parts():
    scores = scores_of(WeightedSum([Count("a"), Count("b")], [2, -0.5]), ["aab", "bb"])
    assert scores.total.tolist() == [3.5, -1.0]
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "a": [2.0, 0.0],
        "b": [1.0, 2.0],
    }


def test_score_is_the_total():
    reward = WeightedSum([Count("a"), Count("b")], [2, -0.5])
    assert reward.score([PROMPT], ["aab"]).tolist() == [3.5]
    assert reward.score([PROMPT], ["aab"]).dtype == np.float64


def test_a_weight_of_zero_reports_a_part_that_does_not_count():
    scores = scores_of(WeightedSum([Count("a"), Count("b")], [1, 0]), ["aab"])
    assert scores.total.tolist() == [2.0]
    assert scores.parts_of(0) == {"a": 2.0, "b": 1.0}


def test_sums_nest_and_keep_the_names_of_their_parts():
    inner = WeightedSum([Count("a"), Count("b")], [1, 1], name="inner")
    scores = scores_of(WeightedSum([inner, Count("c")], [10, 1]), ["abbc"])
    assert scores.total.tolist() == [31.0]
    assert scores.parts_of(0) == {"a": 1.0, "b": 2.0, "c": 1.0}


def test_parts_whose_names_clash_are_told_apart():
    left = WeightedSum([Count("a"), Count("b")], [1, 1], name="left")
    right = WeightedSum([Count("c", name="b")], [1], name="right")
    scores = scores_of(WeightedSum([left, right, Count("a")], [1, 1, 1]), ["abbccc"])
    assert scores.total.tolist() == [7.0]
    assert scores.parts_of(0) == {"left/a": 1.0, "left/b": 2.0, "right/b": 3.0, "a": 1.0}


def test_the_reduced_form_is_the_sum_of_reduced_rewards(minilm):
    """A reward without such a form is summed as it is; the sum itself does not change."""
    vowels = Count("e")
    exact = WeightedSum([RelevanceReward(minilm), vowels], [2.0, 0.5], "both")
    rounded = exact.reduced("bfloat16")
    assert (rounded.name, rounded.weights) == ("both", (2.0, 0.5))
    assert rounded.rewards[1] is exact.rewards[1]
    rows = [PROMPT], ["the sky is blue"]
    found, expected = score_responses(rounded, *rows), score_responses(exact, *rows)
    relevance = RelevanceReward(minilm, dtype="bfloat16").score(*rows)
    assert found.parts["relevance"].tolist() == relevance.tolist()
    assert found.total[0] == pytest.approx(2.0 * relevance[0] + 0.5 * expected.parts["e"][0])
    assert 1e-5 < abs(found.total[0] - expected.total[0]) < 0.02


def test_it_applies_where_all_of_its_rewards_do():
    reward = WeightedSum([SentimentReward(), ConstraintsReward()], [1, 1])
    assert not applies_to(reward, PROMPT)
    assert applies_to(reward, Prompt.from_text("Hi", metadata={"constraints": [{"type": "title"}]}))


def test_flops_add_up():
    reward = WeightedSum([Count("a"), SentimentReward(), Count("b")], [1, 0, 1])
    assert reward.flops([PROMPT] * 2, ["aab", ""]).tolist() == [60.0, 0.0]
    assert reward_usage_bound(reward).reward_flops == 2000.0
    relevance = RelevanceReward()
    pair = WeightedSum([relevance, Count("a")], [1, 1])
    expected = relevance.flops([PROMPT], ["aab"]) + 30
    np.testing.assert_array_equal(pair.flops([PROMPT], ["aab"]), expected)
    assert pair.flops_bound() == relevance.flops_bound() + 1000


def test_its_name_is_the_formula():
    rewards = [Count("a"), Count("b"), Count("c")]
    assert WeightedSum(rewards, [0.5, 1, -2]).name == "0.5*a+b+-2*c"
    assert WeightedSum(rewards, [1, 1, 1], name="mine").name == "mine"


def test_a_reward_that_fails_is_named():
    class Broken(Count):
        def score(self, prompts, responses):
            return [float("nan")] * len(responses)

    reward = WeightedSum([Count("a"), Broken("b", name="broken")], [1, 0])
    with pytest.raises(RewardError, match=r"'broken'.*nan.*'Count letters\.', response 'ab'"):
        scores_of(reward, ["ab"])


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ([], [], "at least one reward .* got 0 rewards and 0 weights"),
        ([Count("a")], [1, 2], "got 1 rewards and 2 weights"),
        ([Count("a")], [float("nan")], r"finite weights, got \[nan\] for \['a'\]"),
        ([Count("a")], [float("inf")], "finite weights"),
        ([Count("a"), Count("b"), Count("b")], [1, 1, 1], r"got \['a', 'b', 'b'\].*of \['b'\]"),
    ],
)
def test_arguments_that_make_no_sum_are_errors(rewards, weights, message):
    with pytest.raises(ValueError, match=message):
        WeightedSum(rewards, weights)


def test_product():
    scores = scores_of(Product([Count("a"), Count("b")]), ["aab", "aa", "abb"])
    assert scores.total.tolist() == [2.0, 0.0, 2.0]
    assert scores.parts_of(0) == {"a": 2.0, "b": 1.0}
    assert Product([Count("a"), Count("b")]).name == "product(a,b)"


def test_a_product_refuses_negative_factors():
    negative = WeightedSum([Count("a")], [-1.0], name="minus")
    with pytest.raises(RewardError, match=r"'product\(minus,b\)'.*-2 from 'minus'.*'xaa'.*Clip"):
        scores_of(Product([negative, Count("b")]), ["b", "xaa"])


def test_a_gate_opens_where_its_condition_holds():
    gate = Gate(Count("a"), Count("b"), threshold=2, closed=-1)
    scores = scores_of(gate, ["aabb", "aab", "bbb", ""])
    assert scores.total.tolist() == [2.0, -1.0, 0.0, -1.0]
    assert scores.parts_of(1) == {"a": 2.0, "b": 1.0}
    assert gate.name == "a if b"


def test_a_gate_does_not_close_for_a_rounding_error():
    thirds = WeightedSum([Count(letter) for letter in "xyz"], [0.7, 0.2, 0.1], name="thirds")
    assert thirds.score([PROMPT], ["xyz"])[0] != 1.0
    assert scores_of(Gate(Count("a"), thirds), ["axyz"]).total.tolist() == [1.0]


@pytest.mark.parametrize(
    ("rule", "expected"), [("mean", 4.0), ("min", 1.0), ("mean-std", 4.0 - 0.5 * 3.0)]
)
def test_ensembles(rule, expected):
    # Scores 1 and 7: mean 4, standard deviation 3.
    scores = scores_of(Ensemble([Count("a"), Count("b")], rule, k=0.5), ["a" + "b" * 7, "ab"])
    assert scores.total.tolist() == [expected, 1.0]
    assert scores.parts_of(0) == {"a": 1.0, "b": 7.0, "disagreement": 3.0}
    assert scores.parts_of(1)["disagreement"] == 0.0


@pytest.mark.parametrize(
    "make",
    [Product, Ensemble, lambda both: Gate(*both), lambda both: WeightedSum(both, [1, 2])],
)
def test_costs_and_prompts_are_those_of_all(make):
    reward = make([Count("a"), Count("b")])
    assert reward.flops([PROMPT] * 2, ["aab", ""]).tolist() == [60.0, 0.0]
    assert reward_usage_bound(reward).reward_flops == 2000.0
    assert applies_to(reward, PROMPT)
    assert not applies_to(make([Count("a"), ConstraintsReward()]), PROMPT)
    check_reward_model(reward, responses=["aab", "", "bbb a"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Product([]), "Product: expected at least one reward, got none"),
        (lambda: Product([Count("a"), Count("a")]), "a unique name"),
        (lambda: Gate(Count("a"), Count("a")), "a unique name"),
        (lambda: Gate(Count("a"), Count("b"), closed=float("nan")), "closed to be a finite number"),
        (lambda: Ensemble([Count("a")]), "at least two rewards .* got 1 rewards"),
        (lambda: Ensemble([Count("a"), Count("b")], k=-1), "k=-1"),
        (lambda: Ensemble([Count("a"), Count("b")], "median"), r"'mean-std'\], got 'median'"),
    ],
)
def test_arguments_that_make_no_combination_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Steps(Count):
    """Also counts the letter in each step."""

    def score_steps(self, prompt, steps):
        return self.score([prompt] * len(steps), steps)


def test_steps_are_combined_where_all_rewards_score_them():
    reward = WeightedSum([Steps("a"), Steps("b")], [1, 10])
    assert score_steps(reward, PROMPT, ["aab", "b", ""]).tolist() == [12.0, 10.0, 0.0]
    assert score_steps(Clip(reward, high=11), PROMPT, ["aab", "b"]).tolist() == [11.0, 10.0]
    gate = Gate(Steps("a"), Steps("b"), closed=-1)
    assert score_steps(gate, PROMPT, ["aab", "a"]).tolist() == [2.0, -1.0]
    check_reward_model(Clip(Steps("a"), 0, 5), responses=["a"])
    copied = pickle.loads(pickle.dumps(reward))  # noqa: S301 its own
    assert score_steps(copied, PROMPT, ["ab"]).tolist() == [11.0]


def test_steps_are_not_combined_where_that_says_nothing():
    for reward in (WeightedSum([Steps("a"), Count("b")], [1, 1]), LengthPenalty(Steps("a"), 3)):
        assert not reward.scores_steps
        with pytest.raises(RewardError, match="scores whole responses only"):
            score_steps(reward, PROMPT, ["a"])

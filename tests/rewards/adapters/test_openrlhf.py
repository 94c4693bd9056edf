"""OpenRLHF's reward functions, called and answered as its example shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards import (
    ConstraintsReward,
    ExactMatchReward,
    SentimentReward,
    WeightedSum,
    as_reward_model,
)
from mbrl_text_env.rewards.adapters import OpenRLHFFunctionReward, to_openrlhf
from mbrl_text_env.rewards.base import RewardError, score_responses
from mbrl_text_env.types import Prompt

PROMPTS = [
    Prompt.from_text("2 + 2? ", metadata={"reference_answer": "4"}),
    Prompt.from_text("2 * 4? ", metadata={"ground_truth": "8"}),
]
RESPONSES = ["It is 4.", "It is 6."]


def rewards_of(queries, labels):
    found = [str(label) in query for query, label in zip(queries, labels, strict=True)]
    return torch.tensor(found).float()


def returns_a_tensor(queries, prompts, labels, **kwargs):
    return rewards_of(queries, labels)


def returns_a_list(queries, prompts, labels):
    return rewards_of(queries, labels).tolist()


def returns_a_dict(queries, prompts, labels, **kwargs):
    reward = rewards_of(queries, labels)
    return {"rewards": reward, "scores": reward * 0, "extra_logs": {"dummy": reward}}


@pytest.mark.parametrize("function", [returns_a_tensor, returns_a_list, returns_a_dict])
def test_all_forms_score(function):
    reward = as_reward_model(function)
    assert isinstance(reward, OpenRLHFFunctionReward)
    assert score_responses(reward, PROMPTS, RESPONSES).total.tolist() == [1.0, 0.0]
    check_reward_model(reward)


def test_what_the_function_is_given():
    seen = {}

    def spy(queries, prompts, labels, **kwargs):
        seen.update(queries=queries, prompts=prompts, labels=labels, **kwargs)
        return [0.0] * len(queries)

    prompts = [*PROMPTS, Prompt.from_text("Why?")]
    score_responses(as_reward_model(spy), prompts, [*RESPONSES, ""])
    assert seen == {
        "queries": ["2 + 2? It is 4.", "2 * 4? It is 6.", "Why?"],
        "prompts": ["2 + 2? ", "2 * 4? ", "Why?"],
        "labels": ["4", "8", ""],
    }


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "expected 2 values.*got 1"),
        (torch.zeros(3), "expected 2 values.*got 3"),
        ({"extra_logs": {}}, "expected 2 values.*got None"),
        (torch.tensor(1.0), "expected 2 values.*got 1.0"),
        (["high", "low"], "expected a number.*'high'"),
        ([1.0, float("inf")], "finite"),
        ([1.0, None], "returned None"),
    ],
)
def test_what_is_no_score(result, message):
    def bad(queries, prompts, labels):
        return result

    with pytest.raises(RewardError, match=message):
        score_responses(as_reward_model(bad), PROMPTS, RESPONSES)


class TestToOpenRLHF:
    def test_it_returns_what_openrlhf_expects(self):
        reward = WeightedSum([SentimentReward(), ConstraintsReward()], [1, 1])
        function = to_openrlhf(SentimentReward())
        result = function(
            queries=["How was it? It was good.</s>", "And it? Bad.<|im_end|>"],
            prompts=["How was it?", "And it?"],
            labels=["a", None],
            images=None,
        )
        expected = SentimentReward().score(PROMPTS, [" It was good.", " Bad."])
        for key in ("rewards", "scores"):
            assert result[key].dtype == torch.float32
            assert result[key].tolist() == pytest.approx(expected.tolist())
        assert result["extra_logs"]["sentiment"].shape == (2,)
        assert function.__name__ == "sentiment"
        assert to_openrlhf(reward).__name__ == "sentiment+constraints"

    def test_labels_are_the_reference_answers(self):
        class Answer:
            name = "answer"

            def score(self, prompts, responses):
                return [
                    float(p.metadata.get("reference_answer") == r.strip())
                    for p, r in zip(prompts, responses, strict=True)
                ]

        result = to_openrlhf(Answer())(["2+2? 4", "2+2? 5"], ["2+2?"] * 2, ["4", "4"])
        assert result["rewards"].tolist() == [1.0, 0.0]
        # Without a label key OpenRLHF passes empty labels, which are no answers.
        assert to_openrlhf(Answer())(["2+2? "], ["2+2?"], [""])["rewards"].tolist() == [0.0]

    def test_a_query_that_does_not_begin_with_its_prompt(self):
        with pytest.raises(RewardError, match=r"begins with its prompt 'How\?', got 'Why\? Good'"):
            to_openrlhf(SentimentReward())(["Why? Good"], ["How?"], [None])

    def test_there_and_back(self):
        back = OpenRLHFFunctionReward(to_openrlhf(SentimentReward()))
        scores = score_responses(back, PROMPTS, ["It was good.", "It was bad."])
        expected = SentimentReward().score(PROMPTS, ["It was good.", "It was bad."])
        assert scores.total.tolist() == pytest.approx(expected.tolist())

    @pytest.mark.parametrize(
        "labels",
        [
            ["4", "5"],
            np.array(["4", "5"], dtype=object),
            torch.tensor([4, 5]),
            [np.array(["4", "four"]), np.int64(5)],
        ],
    )
    def test_labels_of_all_kinds(self, labels):
        reward_func = to_openrlhf(ExactMatchReward())
        found = reward_func(queries=["2+2? 4", "2+3? 5"], prompts=["2+2?", "2+3?"], labels=labels)
        assert found["rewards"].tolist() == [1.0, 1.0]

    @pytest.mark.parametrize("labels", [None, [None], [""]])
    def test_no_labels(self, labels):
        found = to_openrlhf("sentiment")(["How? Good."], ["How?"], labels)
        assert found["rewards"].tolist() == pytest.approx([0.4404])

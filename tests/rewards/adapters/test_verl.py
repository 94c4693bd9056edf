"""verl's reward functions, called and answered as its reward managers do."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards import (
    ConstraintsReward,
    ExactMatchReward,
    SentimentReward,
    as_reward_model,
    to_verl,
)
from mbrl_text_env.rewards.adapters import VerlFunctionReward
from mbrl_text_env.rewards.base import RewardError, applies_to, score_responses
from mbrl_text_env.types import Message, Prompt

PROMPTS = [
    Prompt.from_text("2 + 2?", metadata={"data_source": "sums", "ground_truth": "4"}),
    Prompt.from_text("2 * 4?", metadata={"reward_model": {"ground_truth": "8", "style": "rule"}}),
    Prompt.from_text("1 + 1?", metadata={"reference_answer": "2", "extra_info": {"split": "test"}}),
]
RESPONSES = ["It is 4.", "It is 6.", "2"]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(ground_truth in solution_str)


def compute_scores(data_sources, solution_strs, ground_truths, extra_infos):
    return [
        compute_score(*row)
        for row in zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True)
    ]


def detailed(solution_str, ground_truth, **kwargs):
    return {"score": compute_score("", solution_str, ground_truth), "acc": True, "pred": "x"}


async def compute_score_later(data_source, solution_str, ground_truth, extra_info):
    return {"score": compute_score(data_source, solution_str, ground_truth)}


@pytest.mark.parametrize("function", [compute_score, compute_scores, detailed, compute_score_later])
def test_all_forms_score(function):
    reward = as_reward_model(function)
    assert isinstance(reward, VerlFunctionReward)
    assert reward.name == function.__name__
    scores = score_responses(reward, PROMPTS, RESPONSES)
    assert scores.total.tolist() == [1.0, 0.0, 1.0]
    assert len(reward.score([], [])) == 0
    check_reward_model(reward, PROMPTS)


def asked(text):
    return {"prompt": [{"role": "user", "content": text}]}


def test_what_the_function_is_given():
    seen = []

    def spy(data_source, solution_str, ground_truth, extra_info=None):
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return 0.0

    score_responses(as_reward_model(spy), PROMPTS, RESPONSES)
    assert seen == [
        ("sums", "It is 4.", "4", {"data_source": "sums", "ground_truth": "4", **asked("2 + 2?")}),
        ("", "It is 6.", "8", {**PROMPTS[1].metadata, **asked("2 * 4?")}),
        ("", "2", "2", {"split": "test", **asked("1 + 1?")}),
    ]


def test_prompts_without_a_ground_truth():
    reward = as_reward_model(compute_score)
    prompt = Prompt.from_text("Why?", metadata={"kind": "open"})
    assert not applies_to(reward, prompt)
    message = r"'compute_score', prompt 'Why\?'.*'reward_model' or one of.*got the keys \['kind'\]"
    with pytest.raises(RewardError, match=message):
        score_responses(reward, [prompt], ["Because."])


def test_a_ground_truth_with_a_default_is_not_required():
    def polite(solution_str, ground_truth=None, **kwargs):
        return float(ground_truth is None and "please" in solution_str)

    reward = as_reward_model(polite)
    prompt = Prompt.from_text("Ask.")
    assert applies_to(reward, prompt)
    assert score_responses(reward, [prompt], ["Tea, please."]).total.tolist() == [1.0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("good", r"expected a number.*'It is 4\.'.*'good'"),
        ({"acc": 1.0}, "returned None"),
        (None, "returned None"),
        (float("nan"), "finite"),
    ],
)
def test_what_is_no_score(result, message):
    def bad(data_source, solution_str, ground_truth, extra_info=None):
        return result

    with pytest.raises(RewardError, match=message):
        score_responses(as_reward_model(bad), PROMPTS[:1], RESPONSES[:1])


def test_too_few_scores_and_exceptions():
    def few(solution_strs, ground_truths):
        return [1.0]

    def broken(solution_str, ground_truth):
        return 1 / 0

    with pytest.raises(RewardError, match=r"'few': expected 3 values.*got 1"):
        score_responses(as_reward_model(few), PROMPTS, RESPONSES)
    with pytest.raises(RewardError, match=r"'broken': raised ZeroDivisionError.*'2 \+ 2\?'"):
        score_responses(as_reward_model(broken), PROMPTS, RESPONSES)


class TestToVerl:
    def test_one_response_as_the_naive_manager_asks(self):
        reward = SentimentReward()
        function = to_verl(reward)
        score = function(
            data_source="films",
            solution_str="It was good.",
            ground_truth=None,
            extra_info={"question": "How was it?"},
        )
        assert score == reward.score([PROMPTS[0]], ["It was good."])[0]
        assert isinstance(score, float)
        assert function.__name__ == "sentiment"

    def test_a_batch_as_the_batch_manager_asks(self):
        function = to_verl(SentimentReward(), needs_prompt=False)
        scores = function(
            data_sources=["films"] * 2,
            solution_strs=["It was good.", "It was bad."],
            ground_truths=["", ""],
            extra_infos=[None, {}],
        )
        assert (
            scores == SentimentReward().score(PROMPTS[:2], ["It was good.", "It was bad."]).tolist()
        )
        assert function(solution_strs=["a", "b"]) == [0.0, 0.0]

    def test_extra_info_becomes_the_prompt(self):
        seen = []

        class Spy:
            name = "spy"

            def score(self, prompts, responses):
                seen.extend(prompts)
                return [1.0] * len(responses)

        to_verl(Spy())(
            "gsm8k", "4", "4", {"prompt": [{"role": "user", "content": "2 + 2?"}], "index": 3}
        )
        (prompt,) = seen
        assert prompt.content == (Message("user", "2 + 2?"),)
        assert prompt.metadata == {
            "index": 3, "data_source": "gsm8k", "ground_truth": "4", "reference_answer": "4",
        }  # fmt: skip

    def test_a_missing_prompt_is_an_error(self):
        with pytest.raises(RewardError, match=r"'sentiment'.*in extra_info.*\['index'\]"):
            to_verl(SentimentReward())("films", "Good.", None, {"index": 1})
        with pytest.raises(TypeError, match="solution_str or solution_strs"):
            to_verl(SentimentReward(), needs_prompt=False)()

    def test_there_and_back(self):
        reward = ConstraintsReward()
        assert as_reward_model(to_verl(reward)) is reward
        prompt = Prompt.from_text("Greet.", metadata={"constraints": [{"type": "lowercase"}]})
        called = VerlFunctionReward(to_verl(reward))
        scores = score_responses(called, [prompt] * 2, ["good day", "Good day"])
        assert scores.total.tolist() == [1.0, 0.0]


class TestRowsOfParquet:
    """verl passes what NumPy makes of its data: arrays of objects, and scalars."""

    ROWS: ClassVar = {
        "data_sources": ["sums"] * 3,
        "solution_strs": ["4", "5", "4"],
        "ground_truths": ["4", np.int64(5), np.array(["4", "four"], dtype=object)],
        "extra_infos": [{"prompt": "2 + 2?", "hint": None}] * 3,
    }

    @pytest.mark.parametrize("names", [(), ("data_sources", "extra_infos"), tuple(ROWS)])
    def test_a_batch(self, names):
        def column(values):
            found = np.empty(len(values), dtype=object)
            found[:] = values
            return found

        rows = {key: column(v) if key in names else v for key, v in self.ROWS.items()}
        assert to_verl(ExactMatchReward())(**rows) == [1.0, 1.0, 1.0]

    def test_columns_that_are_missing(self):
        compute_score = to_verl(SentimentReward(), needs_prompt=False)
        rows = {"data_sources": None, "ground_truths": None, "extra_infos": None}
        assert compute_score(solution_strs=np.array(["It was good."]), **rows) == [0.4404]

    def test_messages_in_an_array(self):
        messages = np.array([{"role": "user", "content": "2 + 2?"}], dtype=object)
        row = {"ground_truth": "4", "extra_info": {"raw_prompt": messages, "prompt": None}}
        assert to_verl(ExactMatchReward())(data_source="x", solution_str="4", **row) == 1.0

    def test_keys_that_are_none_are_not_there(self):
        metadata = {"extra_info": None, "data_source": None, "ground_truth": None, "answer": "4"}
        prompt = Prompt.from_text("2 + 2?", metadata=metadata)
        seen = []

        def compute_score(data_source, solution_str, ground_truth, extra_info):
            seen.append((data_source, ground_truth, extra_info["prompt"]))
            return 1.0

        score_responses(as_reward_model(compute_score), [prompt], ["4"])
        assert seen == [("", "4", [{"role": "user", "content": "2 + 2?"}])]

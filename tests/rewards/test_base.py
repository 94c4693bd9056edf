"""`score_responses` and `score_steps`, and the contract that every reward model keeps."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
import torch

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards.adapters import as_reward_model, to_trl
from mbrl_text_env.rewards.base import (
    ProcessRewardModel,
    RewardError,
    RewardModel,
    Scores,
    applies_to,
    reward_name,
    reward_usage_bound,
    score_responses,
    score_steps,
)
from mbrl_text_env.rewards.composite.combinators import WeightedSum
from mbrl_text_env.rewards.evaluators.classifier import ClassifierReward
from mbrl_text_env.rewards.evaluators.relevance import RelevanceReward
from mbrl_text_env.rewards.evaluators.sentiment import SentimentReward
from mbrl_text_env.rewards.verifiable.constraints import ConstraintsReward
from mbrl_text_env.runs import identity
from mbrl_text_env.types import Budget, BudgetExceededError, Ledger, Prompt, Usage

PROMPTS = [Prompt.from_text("Say hi", id="p0"), Prompt.from_text("Say bye", id="p1")]
RESPONSES = ["Hi there", "Bye " * 100]


class Stub:
    """Returns, or raises, what it is given."""

    name = "stub"

    def __init__(self, result, step_scores=None):
        self.result = result
        self.step_scores = step_scores

    def score(self, prompts, responses):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class ProcessStub(Stub):
    def score_steps(self, prompt, steps):
        if isinstance(self.step_scores, Exception):
            raise self.step_scores
        return self.step_scores


class Costly(Stub):
    def flops(self, prompts, responses):
        return [10.0 * len(response) for response in responses]

    def flops_bound(self):
        return 1e6


def test_scores_are_float64_and_the_only_part():
    scores = score_responses(Stub([1, 2]), PROMPTS, RESPONSES)
    assert scores.total.dtype == np.float64
    assert scores.total.tolist() == [1.0, 2.0]
    assert scores.parts_of(1) == {"stub": 2.0}
    assert len(scores) == 2


def test_nothing_to_score_calls_nothing():
    assert len(score_responses(Stub(ValueError("called")), [], [])) == 0


def test_parts_are_checked_and_passed_on():
    class Parts(Stub):
        def score_parts(self, prompts, responses):
            return self.result

    scores = score_responses(
        Parts(Scores(np.array([3.0, 4.0]), {"a": np.array([1.0, 2.0])})), PROMPTS, RESPONSES
    )
    assert scores.total.tolist() == [3.0, 4.0]
    assert scores.parts_of(0) == {"a": 1.0}
    with pytest.raises(RewardError, match=r"'stub/a'.*nan.*'p1'.*'Bye Bye"):
        score_responses(
            Parts(Scores(np.zeros(2), {"a": np.array([1.0, np.nan])})), PROMPTS, RESPONSES
        )


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, float("nan")], r"finite scores, got nan for prompt 'p1', response 'Bye "),
        ([float("inf"), 1.0], r"finite scores, got inf for prompt 'p0', response 'Hi there'"),
        ([1.0], r"shape \(2,\), got shape \(1,\) for a batch .* prompt 'p0'.*'Hi there'"),
        ([1.0, 2.0, 3.0], r"shape \(2,\), got shape \(3,\)"),
        ([[1.0], [2.0]], r"got shape \(2, 1\)"),
        (1.0, r"got shape \(\)"),
        (["good", "bad"], r"expected 2 numbers, got .*good.*'p0', response 'Hi there'"),
        ([1.0, None], r"got nan for prompt 'p1'"),
        (None, r"got shape \(\)"),
        (
            KeyError("answer"),
            r"'p0' and 1 more in its batch: scoring raised KeyError: 'answer'.*'Hi there'",
        ),
    ],
)
def test_errors_name_the_model_the_prompt_and_the_response(result, message):
    with pytest.raises(RewardError, match="'stub'") as caught:
        score_responses(Stub(result), PROMPTS, RESPONSES)
    assert caught.match(message)
    assert len(str(caught.value)) < 500


def test_a_reward_error_of_the_models_own_passes_unchanged():
    error = RewardError("mine")
    with pytest.raises(RewardError) as caught:
        score_responses(Stub(error), PROMPTS, RESPONSES)
    assert caught.value is error


def test_each_response_is_charged_to_its_ledger():
    ledgers = [Ledger(), Ledger()]
    score_responses(Costly([0.0, 0.0]), PROMPTS, RESPONSES, ledgers=ledgers)
    assert [ledger.usage.reward_calls for ledger in ledgers] == [1, 1]
    assert [ledger.usage.reward_flops for ledger in ledgers] == [80.0, 4000.0]
    assert all(ledger.usage.seconds > 0 for ledger in ledgers)
    assert ledgers[0].usage.seconds == ledgers[1].usage.seconds


def test_one_ledger_may_pay_for_several_responses():
    ledger = Ledger(Budget(reward_calls=1))
    with pytest.raises(BudgetExceededError, match="2 reward_calls of a budget of 1"):
        score_responses(Costly([0.0, 0.0]), PROMPTS, RESPONSES, ledgers=[ledger, ledger])


def test_a_model_that_tells_no_flops_is_charged_none():
    ledger = Ledger()
    score_responses(Stub([1.0]), PROMPTS[:1], RESPONSES[:1], ledgers=[ledger])
    assert ledger.usage.reward_flops == 0.0
    assert reward_usage_bound(Stub([])).reward_flops == 0.0
    assert reward_usage_bound(Costly([])).reward_flops == 1e6


def test_steps_get_one_score_each_and_one_call_is_charged():
    ledger = Ledger()
    model = ProcessStub([], step_scores=[0.5, 1])
    assert isinstance(as_reward_model(model), ProcessRewardModel)
    scores = score_steps(model, PROMPTS[0], ["a", "b"], ledger=ledger)
    assert scores.tolist() == [0.5, 1.0]
    assert ledger.usage.reward_calls == 1


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], r"shape \(2,\), got shape \(1,\)"),
        ([1.0, float("nan")], r"got nan for prompt 'p0', response 'second'"),
        (OSError("gone"), r"'p0'.*raised OSError: gone.*'first'"),
    ],
)
def test_errors_of_steps_name_the_model_the_prompt_and_the_step(result, message):
    model = ProcessStub([], step_scores=result)
    with pytest.raises(RewardError, match="'stub'") as caught:
        score_steps(model, PROMPTS[0], ["first", "second"])
    assert caught.match(message)


def test_a_model_without_step_scores_is_told_what_to_do():
    with pytest.raises(RewardError, match=r"'stub' scores whole responses only.*reward='delta'"):
        score_steps(Stub([]), PROMPTS[0], ["a"])


def test_defaults_of_the_optional_methods():
    assert applies_to(Stub([]), PROMPTS[0])
    assert not applies_to(ConstraintsReward(), PROMPTS[0])
    assert reward_name(object()) == "object"


def test_a_reward_without_another_format_is_its_own_reduced_form():
    reward = Stub([])
    assert as_reward_model(reward).reduced("bfloat16").reward is reward


def test_a_reward_says_what_its_reduced_form_is():
    class Rounded(Stub):
        def reduced(self, dtype):
            return Rounded([dtype])

    assert as_reward_model(Rounded([])).reduced("bfloat16").result == ["bfloat16"]
    relevance = RelevanceReward()
    found = relevance.reduced("float16")
    assert (found.dtype, relevance.dtype) == ("float16", None)


CONSTRAINTS = [{"type": "max_words", "value": 5}, {"type": "no_commas"}]
CONTRACT_PROMPTS = [
    Prompt.from_text(text, metadata={"constraints": CONSTRAINTS, "answer": "sky"})
    for text in ("Why is the sky blue?", "¿Qué tal? 你好 🙂", "How are you, and why?")
]
CONTRACT_RESPONSES = [
    "The sky is blue, because I am happy!",
    "",
    "I am sad. It was a terrible, awful day.",
    "   \n\t ",
    "Ünïcödé: 你好世界 🙂 مرحبا \u200d\ufeff \x00 \U0001f469\u200d\U0001f680",
    "good " * 2_000,
    "...!?",
]
ROWS = [
    (CONTRACT_PROMPTS[i % len(CONTRACT_PROMPTS)], response)
    for i, response in enumerate(CONTRACT_RESPONSES)
]


def mentions(completions, answer, **kwargs):
    return [
        float(word in completion[0]["content"])
        for completion, word in zip(completions, answer, strict=True)
    ]


def word_count(prompt, response):
    return len(response.split()) - len(prompt.split())


def _reward(kind, folders):
    makers = {
        "sentiment": SentimentReward,
        "relevance": RelevanceReward,
        "constraints": ConstraintsReward,
        "sum": lambda: WeightedSum([SentimentReward(), as_reward_model(word_count)], [0.5, -2]),
        "function": lambda: as_reward_model(word_count),
        "trl": lambda: as_reward_model(mentions),
        "round trip": lambda: as_reward_model(to_trl(SentimentReward())),
        "bert": lambda: ClassifierReward(folders["bert"], batch_size=3),
        "deberta": lambda: ClassifierReward(folders["deberta"], text_format="article"),
        "llama": lambda: ClassifierReward(folders["llama"], text_format="chat"),
        "llama_with_padding": lambda: ClassifierReward(
            folders["llama_with_padding"], text_format="chat", batch_size=4
        ),
        "three classes": lambda: ClassifierReward(
            folders["bert_with_three_classes"], label="good", output="softmax"
        ),
    }
    return makers[kind]()


@pytest.fixture(
    params=[
        "sentiment",
        "relevance",
        "constraints",
        "sum",
        "function",
        "trl",
        "round trip",
        "bert",
        "deberta",
        "llama",
        "llama_with_padding",
        "three classes",
    ]
)
def reward(request, classifiers):
    return _reward(request.param, classifiers)


def _totals(reward, rows):
    prompts, responses = zip(*rows, strict=True)
    return score_responses(reward, list(prompts), list(responses)).total


@pytest.mark.filterwarnings("ignore:Reward model .* cut")
class TestContract:
    """What holds for every reward model, on empty, long and Unicode responses."""

    def test_it_is_a_reward_model(self, reward):
        assert isinstance(reward, RewardModel)
        assert reward.name
        assert isinstance(reward.name, str)

    def test_it_passes_the_packages_own_checker(self, reward):
        check_reward_model(reward, CONTRACT_PROMPTS[:1])

    def test_a_batch_equals_its_responses_one_by_one(self, reward):
        singles = np.concatenate([_totals(reward, [row]) for row in ROWS])
        assert np.ptp(singles) > 0
        np.testing.assert_allclose(_totals(reward, ROWS), singles, rtol=0, atol=1e-5)

    def test_scores_come_in_the_order_of_the_responses(self, reward):
        forward, backward = _totals(reward, ROWS), _totals(reward, ROWS[::-1])
        np.testing.assert_allclose(backward, forward[::-1], rtol=0, atol=1e-5)

    def test_the_same_call_gives_the_same_scores(self, reward):
        np.testing.assert_array_equal(_totals(reward, ROWS), _totals(reward, ROWS))

    def test_a_pickled_copy_gives_the_same_scores(self, reward):
        fresh = pickle.loads(pickle.dumps(reward))  # noqa: S301
        totals = _totals(reward, ROWS)
        np.testing.assert_array_equal(_totals(fresh, ROWS), totals)
        used = pickle.loads(pickle.dumps(reward))  # noqa: S301
        np.testing.assert_array_equal(_totals(used, ROWS), totals)

    def test_no_response_is_charged_more_than_the_bound(self, reward):
        ledgers = [Ledger() for _ in ROWS]
        prompts, responses = zip(*ROWS, strict=True)
        score_responses(reward, prompts, responses, ledgers=ledgers)
        bound = reward_usage_bound(reward).reward_flops
        assert max(ledger.usage.reward_flops for ledger in ledgers) <= bound


class Returns:
    """Returns what a function makes of the number of responses."""

    name = "returns"

    def __init__(self, make):
        self.make = make

    def score(self, prompts, responses):
        return self.make(len(responses))


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.ones(n, dtype=torch.bfloat16),
        lambda n: torch.ones(n).to(torch.float8_e4m3fn),
        lambda n: torch.ones(n, requires_grad=True),
        lambda n: [torch.tensor(1.0, dtype=torch.bfloat16)] * n,
        lambda n: [torch.tensor(1.0, requires_grad=True)] * n,
    ],
)
def test_tensors_of_every_number_format_are_scores(make):
    scores = score_responses(Returns(make), [Prompt.from_text("a")] * 2, ["b", "c"])
    assert scores.total.dtype == np.float64
    assert scores.total.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda n: [10**400] * n,
        lambda n: torch.ones(n, device="meta"),
        lambda n: torch.ones(n, dtype=torch.complex64),
        lambda n: np.array(["2020-01-01"] * n, dtype="datetime64[D]"),
        lambda n: np.ma.masked_all(n),
        lambda n: [np.ma.masked] * n,
        lambda n: torch.full((n,), float("nan"), dtype=torch.bfloat16),
    ],
)
def test_what_is_no_number_is_a_reward_error(make):
    with pytest.raises(RewardError, match="returns"):
        score_responses(Returns(make), [Prompt.from_text("a")] * 2, ["b", "c"])


def test_an_exit_while_computation_is_counted_is_a_reward_error():
    reward = Returns(np.ones)
    reward.flops = lambda prompts, responses: sys.exit(0)
    reward.flops_bound = lambda: 1.0
    with pytest.raises(RewardError, match="SystemExit"):
        score_responses(reward, [Prompt.from_text("a")], ["b"], ledgers=[Ledger()])


class Bare(RewardModel):
    def score(self, prompts, responses):
        return [float(len(response)) for response in responses]


def test_a_reward_model_needs_only_score():
    reward = Bare()
    assert (reward.name, reward.part_names) == ("Bare", ("Bare",))
    assert score_responses(reward, PROMPTS, ["a", "bc"]).parts_of(1) == {"Bare": 2.0}
    assert reward.applies_to(PROMPTS[0])
    assert reward.usage_bound() == Usage(reward_calls=1)
    assert list(reward.flops(PROMPTS, ["a", "b"])) == [0.0, 0.0]
    assert reward.reduced("bfloat16") is reward
    assert not reward.scores_steps
    check_reward_model(reward)


def test_a_class_that_counts_has_to_bound():
    class Counts(Bare):
        name = "counts"

        def flops(self, prompts, responses):
            return [1.0] * len(responses)

    with pytest.raises(RewardError, match=r"'counts' has `flops` but no `flops_bound"):
        Counts().usage_bound()


def test_an_object_is_adapted_once_and_stays_what_it_is():
    own = Costly([1.0])
    reward = as_reward_model(own)
    assert as_reward_model(reward) is reward
    assert identity(reward) == identity(own)
    assert (reward.name, reward.result, reward.part_names) == ("stub", [1.0], ("stub",))
    assert reward.usage_bound().reward_flops == 1e6
    copy = pickle.loads(pickle.dumps(reward))  # noqa: S301
    assert copy.flops(PROMPTS[:1], ["abc"]) == [30.0]
    assert not reward.scores_steps
    assert as_reward_model(ProcessStub([], [1.0])).score_steps(PROMPTS[0], ["a"]) == [1.0]

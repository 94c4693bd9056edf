"""Bounds: never below what a continuation scores, and combined as scores are."""

import numpy as np
import pytest

from mbrl_text_env import CheckError, Prompt, check_reward_model
from mbrl_text_env.agents import Guarded
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.rewards import (
    Clip,
    ConstraintsReward,
    Ensemble,
    Gate,
    LengthPenalty,
    Normalise,
    Product,
    RepetitionPenalty,
    RewardError,
    Threshold,
    TimeLimit,
    WeightedSum,
)
from mbrl_text_env.rewards.base import RewardModel, check_bounds, reward_bounds
from mbrl_text_env.types import Budget

INF = float("inf")


class Bounded(RewardModel):
    """At most `most`, and half of it after an "x"."""

    def __init__(self, most, name="bounded"):
        self.most, self.name = most, name

    def score(self, prompts, responses):
        return self.bound(prompts, responses)

    def bound(self, prompts, prefixes):
        return [self.most / 2 if "x" in prefix else self.most for prefix in prefixes]


class Unbounded(RewardModel):
    name = "unbounded"

    def score(self, prompts, responses):
        return [float(len(response)) for response in responses]


A, B, U = Bounded(4.0, "a"), Bounded(1.0, "b"), Unbounded()
PROMPT = Prompt.from_text("Hi")


@pytest.mark.parametrize(
    ("reward", "free", "broken"),
    [
        (A, 4, 2),
        (U, INF, INF),
        (WeightedSum([A, B], [1, 2]), 6, 3),
        (WeightedSum([A, U], [1, 0]), 4, 2),
        (WeightedSum([A, U], [1, 1]), INF, INF),
        (WeightedSum([A, B], [1, -1]), INF, INF),
        (Product([A, B]), 4, 1),
        (Product([A, U]), INF, INF),
        (Product([Bounded(0.0), U]), 0, 0),
        (Gate(A, B), 4, 0),
        (Gate(A, B, closed=3.0), 4, 3),
        (Gate(U, B, closed=-1.0), INF, -1),
        (Ensemble([A, B], "min"), 1, 0.5),
        (Ensemble([A, B], "mean-std"), 2.5, 1.25),
        (Clip(A, high=3.0), 3, 2),
        (Clip(U, high=3.0), 3, 3),
        (Threshold(A, 3.0), 1, 0),
        (Normalise(A, 2.0, 2.0), 1, 0),
        (LengthPenalty(A, 1, 0.5), 4, 1.5),
        (RepetitionPenalty(A), 4, 2),
        (TimeLimit(A, 60), 4, 2),
    ],
    ids=lambda value: value.name if isinstance(value, RewardModel) else "",
)
def test_by_hand(reward, free, broken):
    found = reward_bounds(reward, [PROMPT, PROMPT], ["", "an x"])
    assert found.tolist() == [free, broken]


def test_constraints_by_hand():
    constraints = [{"type": "lowercase"}, {"type": "max_words", "value": 2}]
    prompt = Prompt.from_text("Hi", metadata={"constraints": constraints})
    prefixes = ["", "ok", "Ok", "a b c", "A b c"]
    found = reward_bounds(ConstraintsReward(), [prompt] * 5, prefixes)
    assert found.tolist() == [1, 1, 0.5, 0.5, 0]


PIECES = [
    *("The", " sea", "is", " calm", ", ", ". ", "! ", "?", "\n", "\n\n", "- ", "* ", "1. ", "2. "),
    *('"', "“", "”", "{", "}", '{"a": 1}', "<<Title>>", "P.S. ", "[name]", "*bold*", "******"),
    *("SHOUT ", "dr. ", "e\u0301", "\u0301", "日本語", "。", "ok ", "yes", "no", " ", "\t", "'"),
]


def test_no_continuation_of_100_000_scores_above_its_prefix():
    """Over the package's constraints: random texts, and those that the constraints speak of."""
    rng, reward, cases = np.random.default_rng(0), ConstraintsReward(), 0
    prompts = [prompt for prompt in load_prompts() if reward.applies_to(prompt)]
    while cases < 100_000:
        prompt = prompts[rng.integers(len(prompts))]
        own = [str(v) for c in prompt.metadata["constraints"] for v in c.values()]
        pieces = [*PIECES, *own, prompt.text]
        text = "".join(pieces[i] for i in rng.integers(len(pieces), size=rng.integers(1, 24)))
        cuts = sorted(set(rng.integers(len(text) + 1, size=24).tolist()))
        prefixes = [text[:cut] for cut in cuts]
        scores = reward.score([prompt] * len(cuts), prefixes)
        bounds = reward_bounds(reward, [prompt] * len(cuts), prefixes)
        # Each prefix bounds itself and all that are longer, and bounds never rise.
        later = np.maximum.accumulate(scores[::-1])[::-1]
        assert (bounds >= later - 1e-9).all(), (prompt.metadata, prefixes)
        assert (np.diff(bounds) <= 1e-9).all(), (prompt.metadata, prefixes)
        cases += len(cuts)


class TooLow(Unbounded):
    def bound(self, prompts, prefixes):
        return [3.0] * len(prefixes)


class NoNumber(Unbounded):
    def bound(self, prompts, prefixes):
        return [float("nan")] * len(prefixes)


class OneForAll(Unbounded):
    def bound(self, prompts, prefixes):
        return [INF]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (TooLow(), "bound: expected at least .* the score of a response that begins so, got 3"),
        (NoNumber(), "bound.*expected numbers, got nan"),
        (OneForAll(), "bound.*expected one score per response"),
    ],
)
def test_the_checker_refuses_bounds_that_are_none(reward, said):
    with pytest.raises(CheckError, match=said):
        check_reward_model(reward)


def test_bounds_that_raise_are_errors_of_the_reward():
    class Raises(Unbounded):
        def bound(self, prompts, prefixes):
            raise ZeroDivisionError

    with pytest.raises(RewardError, match=r"'unbounded: bound'.*'Hi'"):
        reward_bounds(Raises(), [PROMPT], ["a"])
    assert reward_bounds(U, [], []).tolist() == []


class Hopeful(RewardModel):
    """1 for what ends with "x", and a bound that gives up at a comma."""

    name = "hopeful"

    def score(self, prompts, responses):
        return [float(response.endswith("x")) for response in responses]

    def bound(self, prompts, prefixes):
        return [float("," not in prefix) for prefix in prefixes]


def test_the_checker_tries_other_continuations():
    with pytest.raises(CheckError, match=r"bound: expected at least 1.*got 0 for 'b,' of 'b,ax'"):
        check_reward_model(Hopeful(), [PROMPT], ["b,", "ax"])


def test_a_bound_that_proves_wrong_is_a_warning_once_and_ignored_from_then_on():
    reward = Hopeful()
    texts = ["abx", "b, no", "b, abx", "c, x"]
    said = r"'hopeful': bound: expected at least 1, the score of 'b, abx'.*'b, ', got 0, prompt"
    with pytest.warns(UserWarning, match=said) as caught:
        check_bounds(reward, [PROMPT] * 4, texts, np.array(reward.score([], texts)))
    check_bounds(reward, [PROMPT], ["c, x"], np.ones(1))
    assert len(caught) == 1
    assert reward_bounds(reward, [PROMPT], [","]).tolist() == [INF]


def test_a_search_notices_a_bound_that_is_wrong():
    class Modest(Hopeful):
        def score(self, prompts, responses):
            return [1.0 + len(response) for response in responses]

    agent = Guarded(NGramLM("abcde", order=2, seed=3), Modest(), max_response_tokens=8)
    prompts = [Prompt.from_text(text, chat=False) for text in ("ab", "ba")]
    with pytest.warns(UserWarning, match="'hopeful': bound: expected at least .*got 1") as caught:
        first = agent.generate(prompts[:1], Budget(tokens=40))
    second = agent.generate(prompts[1:], Budget(tokens=40))
    assert len(caught) == 1
    assert first[0].completion.score > 1
    assert second[0].completion.score > 1

"""Search in imagination knows what choosing is worth, and spends no tokens on it."""

from functools import lru_cache

import numpy as np
import pytest

from mbrl_text_env.agents import BeamSearch
from mbrl_text_env.checks import check_agent, check_value_model
from mbrl_text_env.language_models import NGramLM, SamplingParams
from mbrl_text_env.rewards import RewardModel
from mbrl_text_env.types import Budget, Ledger
from mbrl_text_env.values import predict_values, value_usage_bound
from mbrl_text_env.world_model import ImaginedSearchValue, WorldModelError, WorldModelValue
from tests.world_model.worlds import (
    LIMIT,
    LM,
    PROMPTS,
    ensemble,
    fitted,
    state_of,
)

CHOICES = 3


class SafeOrRare(RewardModel):
    """Half for an "a"; all of it for three "b" and no "a", which only those reach who choose."""

    name = "safe or rare"

    def score(self, prompts, responses):
        counts = [{letter: np.array(r.count(letter)) for letter in "ab"} for r in responses]
        return [float(self.score_features(None, each)) for each in counts]

    def feature_names(self, prompt):
        return ["a", "b"]

    def score_features(self, prompt, features):
        return np.where(features["a"] > 0, 0.5, features["b"] > 2).astype(float)


def exact(text, choices):
    """The value of a prefix where the best of so many tokens is taken each time; 1: any."""
    probability = LM.next_probabilities((), ())
    tokens = [(LM.decode([i]), i in LM.stop_token_ids, p) for i, p in enumerate(probability)]

    @lru_cache
    def value(prefix):
        [end] = SafeOrRare().score([None], [prefix])
        if len(prefix) == LIMIT:
            return end
        outcomes = sorted((end if stops else value(prefix + t), p) for t, stops, p in tokens)
        below, mean = 0.0, 0.0
        for score, p in outcomes:
            mean += score * ((below + p) ** choices - below**choices)
            below += p
        return mean

    return value(text)


def searched(dynamics, **options):
    settings = {"chunk_tokens": 1, "choices": CHOICES, "depth": 3, **options}
    return ImaginedSearchValue(dynamics, SafeOrRare(), **settings)


@pytest.mark.parametrize("text", ["bba", " bb", "b b", "  b"])
def test_the_value_is_that_of_the_optimal_choices(text):
    """Three chunks are left, and as many choices."""
    dynamics = fitted(neighbours=None)
    [value] = searched(dynamics, width=30).predict([state_of(text)]).mean
    assert value == pytest.approx(exact(text, CHOICES), abs=0.07)
    # Without choices it is another one.
    [mean] = WorldModelValue(dynamics, SafeOrRare(), num_futures=300).predict([state_of(text)]).mean
    assert mean == pytest.approx(exact(text, 1), abs=0.07)


@pytest.mark.parametrize("make", [lambda: fitted(neighbours=None), ensemble])
def test_the_optimal_chunk_is_chosen_where_the_mean_is_misleading(make):
    states = [state_of("bba"), state_of("bb ")]
    assert exact("bba", 1) > exact("bb ", 1)
    assert exact("bba", CHOICES) < exact("bb ", CHOICES)
    dynamics = make()
    mean = WorldModelValue(dynamics, SafeOrRare(), num_futures=300).predict(states).mean
    assert np.argmax(mean) == 0
    assert np.argmax(searched(dynamics, width=12).predict(states).mean) == 1


def test_calls_are_charged_up_to_the_bound():
    lm = NGramLM("ab ", order=1, seed=3, stop_probability=0.0)
    # Nothing ends before the records do.
    value = searched(fitted(lm=lm), depth=2, width=5, num_futures=7)
    ledger, state = Ledger(), state_of("a", lm)
    predict_values(value, [state], ledgers=[ledger])
    assert ledger.usage.dynamics_calls == 5 + 5 * 5 + 25 * 7
    bound = value_usage_bound(value, state)
    assert ledger.usage.dynamics_calls == bound.dynamics_calls
    assert 0 < ledger.usage.dynamics_flops == bound.dynamics_flops
    # With two tokens left chunks of two end, and one that has ended is worth its reward.
    value, near = searched(fitted(lm=lm), width=5, chunk_tokens=2), Ledger()
    predict_values(value, [state_of("aaaa", lm)], ledgers=[near])
    assert near.usage.dynamics_calls == 5


def test_the_contracts_are_kept():
    value = searched(fitted(), depth=1, num_futures=2, width=4)
    check_value_model(value, [state_of(t) for t in ("", "a", "b", "ab", "a b")])
    check_agent(
        BeamSearch(LM, SafeOrRare(), value, max_response_tokens=LIMIT, chunk_tokens=2), PROMPTS[:2]
    )


def test_a_planner_gains_by_it_and_keeps_its_budget():
    sizes = {"max_response_tokens": LIMIT, "chunk_tokens": 1, "params": SamplingParams()}
    budget, dynamics = Budget(tokens=36), fitted(neighbours=None)

    def mean(value):
        planner = BeamSearch(LM, SafeOrRare(), value, **sizes)
        answers = [a for s in range(6) for a in planner.generate(PROMPTS, budget, seed=s)]
        assert all(answer.usage.generated_tokens <= 36 for answer in answers)
        return np.mean([answer.completion.score for answer in answers])

    assert mean(searched(dynamics, depth=2)) > mean(WorldModelValue(dynamics, SafeOrRare())) + 0.1


def test_what_cannot_be_searched_is_refused():
    for width in (2, 200):
        with pytest.raises(ValueError, match=f"at least choices.*got width={width} and"):
            searched(fitted(), width=width)
    with pytest.raises(WorldModelError, match="multiple of the stride"):
        searched(fitted(stride=2), chunk_tokens=3).predict([state_of("a")])

"""The world model's value is the expected reward, keeps the contract, and serves every planner."""

import json

import numpy as np
import pytest

from mbrl_text_env.agents import Adaptive, BeamSearch, BestOfN
from mbrl_text_env.agents.values import load_value, make_value
from mbrl_text_env.checks import check_value_model
from mbrl_text_env.language_models import NGramLM, SamplingParams
from mbrl_text_env.rewards import LengthPenalty, RewardError, RewardModel, SentimentReward
from mbrl_text_env.types import Budget, Ledger
from mbrl_text_env.values import ValueModelError, check_value_fits, predict_values
from mbrl_text_env.world_model import (
    IncrementDynamics,
    WorldModelError,
    WorldModelValue,
    predict_futures,
)
from mbrl_text_env.world_model.value import QUANTILES, split_variance
from tests.toys import ExactValue
from tests.world_model.worlds import FEATURES, LIMIT, LM, PROMPTS, fitted, records_of, state_of


class Least(RewardModel):
    """Whether there are enough of a letter."""

    def __init__(self, letter="a", least=2):
        self.letter, self.least, self.name = letter, least, f"least {least} {letter}"
        self.calls = 0

    def score(self, prompts, responses):
        self.calls += len(responses)
        return [float(r.count(self.letter) >= self.least) for r in responses]

    def feature_names(self, prompt):
        return [self.letter]

    def score_features(self, prompt, features):
        return (features[self.letter] >= self.least).astype(float)


class Share(RewardModel):
    """How often there is an "a", in parts of the longest response."""

    name = "share"

    def score(self, prompts, responses):
        return [r.count("a") / LIMIT for r in responses]

    def feature_names(self, prompt):
        return ["a"]

    def score_features(self, prompt, features):
        return features["a"] / LIMIT


def states():
    return [state_of(t) for t in ("", "a", "b", "ab", "a b", "aa")]


def test_the_mean_is_the_expected_reward_of_any_reward_without_a_call():
    dynamics = IncrementDynamics(LM, FEATURES, neighbours=None, stride=1).fit(records_of())
    value = WorldModelValue(dynamics, Least(), num_futures=300)
    for reward in (Least(), Least("b", 1), Least("b", 3)):
        found = value.swap(reward).predict(states())
        assert reward.calls == 0
        exact = ExactValue(LM, reward, LIMIT).predict(states())
        np.testing.assert_allclose(found.mean, exact.mean, atol=0.08)
        np.testing.assert_allclose(found.std, exact.std, atol=0.08)


@pytest.mark.parametrize("horizon", [None, 2])
def test_the_contract_is_kept(horizon):
    value = WorldModelValue(fitted(), Least(), num_futures=8, horizon=horizon)
    check_value_model(value, [*states(), state_of("ab", reason="stop")])


def test_a_response_that_has_ended_is_worth_its_reward_and_asks_nothing():
    value, ledger = WorldModelValue(fitted(), Least()), Ledger()
    for text, expected in (("aab", 1.0), ("ab", 0.0)):
        end = state_of(text, reason="stop")
        found = predict_values(value, [end], ledgers=[ledger])
        assert (found.mean.item(), found.std.item()) == (expected, 0.0)
    assert ledger.usage.dynamics_calls == 0


def test_the_variance_is_split():
    scores, member = np.array([0.0, 2.0, 4.0, 6.0]), np.array([0, 0, 1, 1])
    # Between 4, within 1; by chance the means differ by 4 / 2 * 1 / 4.
    assert split_variance(scores, member) == (3.5, 1.5)
    assert split_variance(scores, np.zeros(4)) == (0.0, 5.0)
    assert split_variance(np.ones(4), member) == (0.0, 0.0)
    found = WorldModelValue(fitted(), Least()).predict(states())
    np.testing.assert_allclose(found.std**2, found.epistemic**2 + found.aleatoric**2)


def test_a_search_records_the_futures_of_each_state():
    value = WorldModelValue(fitted(), Share())
    planner = BeamSearch(LM, value.reward_model, value, max_response_tokens=LIMIT, chunk_tokens=2)
    # Side by side: the estimates of several searches come from one batch.
    for _, tree in planner.explore(PROMPTS[:3], Budget(tokens=40), seed=0):
        nodes = json.loads(json.dumps(tree.to_dict(LM), allow_nan=False))["nodes"]
        valued = [node for node in tree.nodes if node.value is not None]
        assert valued
        for node in valued:
            details = nodes[node.index]["details"]
            futures = predict_futures(value.dynamics, [node.state], 64, None, seed=0)
            shares = futures.features[0, :, value.dynamics.names.index("a")] / LIMIT
            assert details["num_futures"] == 64
            assert details["quantiles"] == pytest.approx(np.quantile(shares, QUANTILES))
            assert node.value == pytest.approx(shares.mean())
            parts = details["epistemic"], details["aleatoric"]
            assert np.hypot(*parts) == pytest.approx(node.std) == pytest.approx(shares.std())
        assert all("details" not in nodes[n.index] for n in tree.nodes if n.value is None)


@pytest.mark.parametrize("planner", [Adaptive, BeamSearch])
def test_planners_gain_by_it(planner):
    reward = Least("b", 3)
    value = WorldModelValue(fitted(), reward)
    sizes = {"max_response_tokens": LIMIT, "chunk_tokens": 1, "params": SamplingParams()}

    def mean(agent):
        budget = Budget(tokens=30)
        return np.mean(
            [a.completion.score for s in range(6) for a in agent.generate(PROMPTS, budget, seed=s)]
        )

    assert mean(planner(LM, reward, value, **sizes)) > mean(BestOfN(LM, reward, **sizes)) + 0.1


def test_it_is_made_by_name_and_read_for_any_reward(tmp_path):
    short = LengthPenalty(Least("words", 1), max_words=1)
    value = make_value("world-model", LM, Least("words", 2)).fit(records_of())
    value.save(tmp_path / "world")
    for reward in (Least("words", 2), short):
        again = load_value(tmp_path / "world", LM, reward)
        np.testing.assert_array_equal(
            again.predict(states()).mean, value.swap(reward).predict(states()).mean
        )
    tuned = NGramLM("ab ")
    tuned.name = "tuned"
    with pytest.raises(WorldModelError, match="the language model 'toy', expected 'tuned'"):
        load_value(tmp_path / "world", tuned, short)


def test_other_policies_and_rewards_are_refused():
    value = WorldModelValue(fitted(), Least())
    with pytest.raises(ValueModelError, match="reward"):
        check_value_fits(value, LM, Least("b"))
    check_value_fits(value.swap(Least("b")), LM, Least("b"))
    value.dynamics.language_model_name_ = "other"
    with pytest.raises(ValueModelError, match="language model 'other'"):
        check_value_fits(value, LM, Least())
    with pytest.raises(RewardError, match="`score_features`, got neither"):
        value.swap(SentimentReward()).predict(states())
    with pytest.raises(RewardError, match=r"got \['c'\].*Predicted features: \['a', 'b'"):
        value.swap(Least("c")).predict(states())
    with pytest.raises(ValueModelError, match="not fitted"):
        WorldModelValue(IncrementDynamics(LM), Least()).predict(states())
    with pytest.raises(ValueError, match="at least 1"):
        WorldModelValue(fitted(), Least(), num_futures=0)

"""Value models by name."""

import numpy as np
import pytest

from mbrl_text_env.agents import BeamSearch
from mbrl_text_env.agents.values import (
    FITTED,
    READY,
    FittedValue,
    PrefixRewardValue,
    kinds,
    make_value,
)
from mbrl_text_env.rewards.evaluators.relevance import RelevanceReward
from mbrl_text_env.values import ValueModelError
from tests.agents.values.worlds import LM, PaidReward, prefixes, state_of, toy_records
from tests.toys import CountReward, LetterEncoder


def made(name):
    return make_value(
        name, LM, PaidReward(), encoder=LetterEncoder(), max_response_tokens=12, seed=3
    )


def test_the_ready_ones_predict_at_once():
    assert READY == ("prefix", "prefix-exact")
    for name in READY:
        assert made(name).predict(prefixes()).mean.shape == (len(prefixes()),)


@pytest.mark.parametrize("name", [name for name in FITTED if name != "token-embedding"])
def test_the_others_after_a_fit(name):
    value = made(name)
    assert isinstance(value, FittedValue)
    assert value.fit(toy_records(PaidReward())) is value
    assert value.predict(prefixes()).mean.shape == (len(prefixes()),)
    assert value.reward_name_ == "paid"


def test_settings_reach_the_models():
    assert made("stacked").max_response_tokens == 12
    assert made("world-model").seed == 3


@pytest.mark.parametrize("fast", [True, False])
def test_prefixes_have_the_reduced_reward_where_it_is_faster(minilm, monkeypatch, fast):
    monkeypatch.setattr(kinds, "multiplies_bfloat16", lambda: fast)
    reward, states = RelevanceReward(minilm), [state_of("abcde"), state_of("dabbed")]
    rows = [state.prompt for state in states], [LM.decode(s.response_ids) for s in states]
    exact = RelevanceReward(minilm).score(*rows)
    rounded = RelevanceReward(minilm, dtype="bfloat16").score(*rows)
    assert np.abs(rounded - exact).max() > 1e-5
    for name, expected in (("prefix", rounded if fast else exact), ("prefix-exact", exact)):
        found = make_value(name, LM, reward).predict(states)
        assert found.mean.tolist() == expected.tolist()
    assert make_value("calibrated", LM, reward).reward_model is reward


def test_a_reward_without_a_reduced_form_is_used_as_it_is(monkeypatch):
    monkeypatch.setattr(kinds, "multiplies_bfloat16", lambda: True)
    reward = PaidReward()
    assert make_value("prefix", LM, reward).reward_model.reward is reward


def test_unknown_names_are_refused():
    with pytest.raises(ValueModelError, match=r"'oracle'.*'prefix', .*'prefix-exact'.*'stacked'"):
        made("oracle")


def test_a_planner_refuses_the_value_of_another_reward():
    value = made("stacked").fit(toy_records(PaidReward()))
    BeamSearch(LM, PaidReward(), value)
    with pytest.raises(ValueModelError, match="fitted for the reward 'paid', got 'count'"):
        BeamSearch(LM, CountReward(), value)
    value.reward_name_ = None
    BeamSearch(LM, CountReward(), value)


@pytest.mark.parametrize("name", [*READY, *FITTED])
def test_functions_and_names_are_rewards(name):
    for reward in (lambda prompt, response: 1.0, "sentiment"):
        make_value(name, LM, reward, encoder=LetterEncoder())
    with pytest.raises(TypeError, match="Expected a reward, got None"):
        make_value(name, LM, None)
    value = PrefixRewardValue("sentiment", LM)
    assert value.reward_model.name == "sentiment"

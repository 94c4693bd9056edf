import pytest

from mbrl_text_env.agents import available, make
from mbrl_text_env.agents.model_free.candidate_policy import (
    CandidatePolicy,
    CandidateScorer,
    CandidateView,
)
from mbrl_text_env.agents.registry import AgentSpecError, parse_spec
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.proposer import FeatureLayout
from tests.toys import CountReward, FixedValue

LM = NGramLM("abc")


def build(spec, value=None):
    return make(spec, LM, CountReward(), value, max_response_tokens=9)


def test_names_and_options():
    assert {"random", "sampling", "best-of-n", "lookahead", "beam", "adaptive"} <= set(available())
    assert {"guarded", "best-first", "majority", "weighted-vote"} <= set(available())
    assert all(available().values())
    agent = build("best-of-n:n=8:temperature=1.5:top_k=3")
    assert (agent.n, agent.params.temperature, agent.params.top_k) == (8, 1.5, 3)
    assert agent.max_response_tokens == 9
    assert build("sampling:temperature=0").params.temperature == 0
    value = FixedValue(len, LM)
    assert build("lookahead:keep=1", value).value_model is value
    assert build("best-of-n", value).n is None
    agent = build("best-first:n=1:stochastic=1:candidates=2")
    assert (agent.n, agent.stochastic, agent.candidates) == (1, 1, 2)
    assert build("weighted-vote:extract=####:n=5").extract == "####"
    assert parse_spec(" sampling ") == ("sampling", {})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("best-of-m", "Did you mean 'best-of-n'"),
        ("", "Unknown agent"),
        ("best-of-n:m=1", "no option 'm'"),
        ("best-of-n:n=many", "name=number"),
        ("best-of-n:n", "name=number"),
        ("best-of-n:n=0", "at least 1"),
        ("best-of-n:params=1", "no option 'params'"),
        ("lookahead:keep=9", "keep"),
        ("sampling:temperature=-1", "temperature"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(AgentSpecError, match=message):
        build(spec)


def test_a_policy_is_named():
    tuned = NGramLM("abc", seed=9)

    def built(spec):
        return make(spec, LM, CountReward(), policies={"tuned": tuned}, max_response_tokens=9)

    assert built("beam").language_model is LM
    assert built("beam:policy=tuned:chunk_tokens=4").language_model is tuned
    with pytest.raises(AgentSpecError, match=r"\(known: \['tuned'\]\), got 'other'"):
        built("beam:policy=other")
    with pytest.raises(AgentSpecError, match=r"known: no policies\), got 'tuned'"):
        build("beam:policy=tuned")


def test_a_trained_choice_is_named():
    layout = FeatureLayout(2, prefix_rewards=True)
    view = CandidateView(2, 3, 9, encoder=None)
    choice = CandidatePolicy(CandidateScorer(layout, ()), view, (), "ppo", "ngram", "count")
    choice.language_model_name = LM.name
    policies = {"tuned": NGramLM("abc", seed=9), "ppo": choice}

    def built(spec):
        return make(spec, LM, CountReward(), policies=policies, max_response_tokens=7)

    agent = built("candidates:policy=ppo")
    assert agent.policy is choice
    assert agent.language_model is LM
    assert (agent.max_response_tokens, agent.chunk_tokens) == (7, 3)
    for spec in ("candidates", "candidates:policy=tuned"):
        with pytest.raises(
            AgentSpecError, match=r"a policy from train_ppo or train_dqn \(known: \['ppo'\]\)"
        ):
            built(spec)
    with pytest.raises(AgentSpecError, match=r"a policy \(known: \['tuned'\]\), got 'ppo'"):
        built("beam:policy=ppo")
    choice.reward_name = "another"
    with pytest.raises(AgentSpecError, match="trained with the reward 'another'"):
        built("candidates:policy=ppo")


def test_one_of_several_value_models_is_named():
    first, second = FixedValue(len, LM), FixedValue(len, LM)
    values = {"first": first, "second": second}
    assert build("beam", values).value_model is first
    assert build("beam:value=second:chunk_tokens=4", values).value_model is second
    assert build("beam", {}).value_model is None
    with pytest.raises(AgentSpecError, match=r"expected a value \(known: \['first', 'second'\]\)"):
        build("beam:value=third", values)
    with pytest.raises(AgentSpecError, match=r"known: no value models\)"):
        build("beam:value=first", first)

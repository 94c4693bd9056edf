"""Rollouts: the mean of what a language model writes, and its spread."""

import numpy as np
import pytest

from mbrl_text_env.agents.values import RolloutValue
from mbrl_text_env.language_models import NGramLM, SamplingParams, TableLM
from mbrl_text_env.mdp import initial
from mbrl_text_env.rewards import as_reward_model
from mbrl_text_env.types import Ledger, Prompt, TextState, Usage
from mbrl_text_env.values import predict_values
from tests.agents.values.worlds import PaidReward
from tests.toys import CountReward, ExactValue

LM = NGramLM("abc", order=2, seed=4)
PROMPT = Prompt.from_text("ab")
PLAIN = SamplingParams()


def state_of(text, lm=LM, reason=None):
    ids = lm.encode_prompt(Prompt.from_text(text)) if text else ()
    return TextState(PROMPT, lm.encode_prompt(PROMPT), ids, reason)


STATES = [state_of(text) for text in ("", "a", "bc", "ccb")]


def test_it_converges_to_the_expected_reward():
    exact = ExactValue(LM, CountReward(), 5).predict(STATES)
    n = 4000
    value = RolloutValue(LM, CountReward(), n=n, max_response_tokens=5, params=PLAIN, seed=2)
    found = value.predict(STATES)
    assert (np.abs(found.mean - exact.mean) < 4 * exact.std / np.sqrt(n)).all()
    assert found.std == pytest.approx(exact.std, rel=0.1)
    assert exact.std.min() > 0.05


def test_mean_and_standard_deviation_by_hand():
    """The next token is certain after the first: half of the responses are "ab", half "b"."""
    lm = TableLM("ab", {"": [0, 0.5, 0.5], "a": [0, 0, 1.0], "ab": [1.0, 0, 0], "b": [1.0, 0, 0]})
    value = RolloutValue(lm, as_reward_model(lambda p, r: float(len(r))), n=6, params=PLAIN)
    estimate = value.predict([state_of("", lm), state_of("a", lm), state_of("b", lm)])
    ones = round((2 - estimate.mean[0]) * 6)  # responses of one letter
    assert 0 < ones < 6
    assert estimate.mean.tolist() == [pytest.approx(2 - ones / 6), 2.0, 1.0]
    spread = np.std([1.0] * ones + [2.0] * (6 - ones), ddof=1)
    assert estimate.std.tolist() == [pytest.approx(spread), 0.0, 0.0]


def test_what_has_ended_is_scored_once():
    ended = [state_of("ab", reason="stop"), state_of("abcab")]  # the second has all its tokens
    value, ledgers = (
        RolloutValue(LM, PaidReward(), n=9, max_response_tokens=5),
        [Ledger(), Ledger()],
    )
    estimate = predict_values(value, ended, ledgers=ledgers)
    assert estimate.mean.tolist() == [0.5, 0.4]
    assert estimate.std.tolist() == [0.0, 0.0]
    for ledger, flops in zip(ledgers, (2.0, 5.0), strict=True):
        assert ledger.usage.reward_calls == 1
        assert ledger.usage.reward_flops == flops
        assert ledger.usage.lm_calls == 0
    assert value.expected_usage(ended[0]) == Usage(reward_calls=1, reward_flops=12.0)


def test_one_continuation_has_no_spread():
    estimate = RolloutValue(LM, CountReward(), n=1, max_response_tokens=5).predict(STATES)
    assert estimate.std.tolist() == [0.0] * 4


def test_it_follows_its_seed_and_the_state():
    def means(seed, states):
        value = RolloutValue(LM, CountReward(), n=5, max_response_tokens=6, seed=seed)
        return value.predict(states).mean.tolist()

    assert means(0, STATES) == means(0, STATES)
    assert means(0, STATES) != means(1, STATES)
    assert means(0, STATES[::-1]) == means(0, STATES)[::-1]


def test_sampling_parameters_reach_the_language_model():
    value = RolloutValue(
        LM, CountReward(), n=5, max_response_tokens=6, params=SamplingParams(temperature=0)
    )
    assert value.predict(STATES).std.tolist() == [0.0] * 4


def test_charges_are_those_of_whole_responses():
    lm = NGramLM("abc", seed=1, stop_probability=0)  # every response is as long as it can be
    value, state = RolloutValue(lm, PaidReward(), n=3, max_response_tokens=7), state_of("ab", lm)
    ledger = Ledger()
    predict_values(value, [state], ledgers=[ledger])
    assert ledger.usage.generated_tokens == 3 * 5
    assert ledger.usage.prompt_tokens == len(state.prompt_ids) + 2
    assert (ledger.usage.reward_calls, ledger.usage.reward_flops) == (3, 21.0)
    bound = value.usage_bound(state)
    assert bound == value.expected_usage(state)
    assert (bound.generated_tokens, bound.reward_calls, bound.reward_flops) == (15, 3, 36.0)


def test_responses_end_where_the_context_does():
    lm = NGramLM("abc", context_length=6, stop_probability=0)
    value, ledger = RolloutValue(lm, CountReward(), n=2), Ledger()
    predict_values(value, [state_of("ab", lm)], ledgers=[ledger])
    assert ledger.usage.generated_tokens == 2 * 2


@pytest.mark.parametrize("wrong", [{"n": 0}, {"max_response_tokens": 0}])
def test_what_it_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RolloutValue(LM, CountReward(), **wrong)


def test_the_real_language_model(smollm2):
    value = RolloutValue(
        smollm2, as_reward_model(lambda p, r: float(len(r))), n=2, max_response_tokens=6
    )
    state, ledger = initial(Prompt.from_text("Say hello."), smollm2), Ledger()
    estimate = predict_values(value, [state], ledgers=[ledger])
    assert estimate.mean[0] > 0
    assert estimate.mean.tolist() == value.predict([state]).mean.tolist()
    bound = value.usage_bound(state)
    assert 2 <= ledger.usage.generated_tokens <= bound.generated_tokens == 12
    assert 0 < ledger.usage.lm_flops <= bound.lm_flops

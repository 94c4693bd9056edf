"""A reward at a price: everything but its FLOPs is the reward's."""

import numpy as np
import pytest

from mbrl_text_env.agents import BestOfN
from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.rewards import ConstraintsReward, Priced, RelevanceReward, SentimentReward
from mbrl_text_env.rewards.base import reward_bounds, score_responses
from mbrl_text_env.runs import identity
from mbrl_text_env.types import Budget, Ledger, Prompt
from tests.toys import CountReward, StepReward

PROMPT = Prompt.from_text("ab", metadata={"constraints": [{"type": "no_commas"}]})
LM = NGramLM("ab", seed=1, stop_probability=0.0)


class CostlyCount(CountReward):
    def flops(self, prompts, responses):
        return np.full(len(responses), 5.0)

    def flops_bound(self):
        return 5.0


def test_a_call_is_charged_the_price_in_place_of_its_own():
    ledger, reward = Ledger(), Priced(CostlyCount(), 70)
    scores = score_responses(reward, [PROMPT] * 2, ["ab", "aa"], ledgers=[ledger, ledger])
    assert scores.total.tolist() == [0.5, 1.0]
    assert (ledger.usage.reward_calls, ledger.usage.reward_flops) == (2, 140.0)
    assert reward.usage_bound() == reward.usage(PROMPT, "a") * 1
    assert reward.usage_bound().flops == 70.0


@pytest.mark.parametrize(("price", "responses"), [(0.0, 4), (5.0, 3), (70.0, 1)])
def test_a_budget_buys_as_many_responses_as_the_price_allows(price, responses):
    """The prompt is 2 tokens, a response 10, and a token a FLOP: of 50, 2 are gone."""
    agent = BestOfN(LM, Priced(CostlyCount(), price), max_response_tokens=10)
    if price > 38:
        price_of_one = Budget(flops=2 + 10 + price)
        [answer] = agent.generate([PROMPT], price_of_one)
    else:
        [answer] = agent.generate([PROMPT], Budget(flops=50))
    assert answer.usage.reward_calls == responses
    assert answer.usage.flops == 2 + responses * (10 + price)


def test_at_its_own_flops_nothing_changes():
    found = [
        BestOfN(LM, reward, max_response_tokens=10).generate([PROMPT], Budget(flops=90.0), seed=3)
        for reward in (CostlyCount(), Priced(CostlyCount(), 5.0))
    ]
    (own,), (priced,) = found
    assert own.completion == priced.completion
    assert (own.usage.flops, own.usage.reward_calls) == (priced.usage.flops, 5)


def test_all_else_is_the_rewards(minilm):
    check_reward_model(Priced(SentimentReward(), 1e9))
    constraints = Priced(ConstraintsReward(), 1e9)
    assert reward_bounds(constraints, [PROMPT] * 2, ["a", "a,"]).tolist() == [1.0, 0.0]
    assert not constraints.applies_to(Prompt.from_text("ab"))
    assert (constraints.name, constraints.part_names) == (
        ConstraintsReward().name,
        ConstraintsReward().part_names,
    )
    steps = Priced(StepReward(), 1e9)
    assert steps.scores_steps
    assert steps.score_steps(PROMPT, ["aa", "b"]).tolist() == [2.0, 0.0]
    assert not Priced(SentimentReward(), 1e9).scores_steps
    reduced = Priced(RelevanceReward(minilm), 1e9).reduced("bfloat16")
    assert (type(reduced), reduced.price, reduced.name) == (Priced, 1e9, "relevance")


def test_another_price_is_another_run():
    assert identity(Priced(SentimentReward(), 1)) == identity(Priced(SentimentReward(), 1))
    assert identity(Priced(SentimentReward(), 1)) != identity(Priced(SentimentReward(), 2))


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_prices_that_are_none(price):
    with pytest.raises(ValueError, match="Priced: expected"):
        Priced(SentimentReward(), price)

"""The guarded planner on toys whose answers are known."""

import numpy as np
import pytest

from mbrl_text_env.agents import BestOfN, Guarded
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.types import Budget, Prompt

LM = NGramLM("abcde", order=2, seed=3, stop_probability=0.15)
PROMPTS = [Prompt.from_text(text, chat=False) for text in ("ab", "ba", "cd", "de", "ea", "ac")]


class NoVowels(RewardModel):
    """1 for at least four letters without a vowel, half for either."""

    name = "no-vowels"

    def score(self, prompts, responses):
        return [
            (len(text) >= 4) / 2 + (not set("ae") & set(text)) / 2 if text else 0.0
            for text in responses
        ]

    def bound(self, prompts, prefixes):
        return [0.5 if set("ae") & set(text) else 1.0 for text in prefixes]


def answers(agent, budget=None, seed=0):
    return agent.generate(PROMPTS, budget, seed=seed)


def test_it_reaches_the_target_for_fewer_tokens_than_best_of_n():
    options = {"max_response_tokens": 12}
    own, other = Guarded(LM, NoVowels(), **options), BestOfN(LM, NoVowels(), target=1.0, **options)
    budget = Budget(tokens=300)
    for seed in range(3):
        found, plain = answers(own, budget, seed), answers(other, budget, seed)
        assert all(g.completion.score == 1.0 for g in found)
        spent = [sum(g.usage.generated_tokens for g in row) for row in (found, plain)]
        assert spent[0] * 2 < spent[1]


def test_without_a_budget_it_draws_until_the_target_or_four():
    for generation in answers(Guarded(LM, NoVowels(), max_response_tokens=12, floor=-40.0)):
        assert generation.completion.score == 1.0


@pytest.mark.parametrize("tokens", [12, 13, 40, 100])
def test_budgets_hold_and_every_answer_is_complete(tokens):
    agent = Guarded(LM, NoVowels(), max_response_tokens=12)
    for generation in answers(agent, Budget(tokens=tokens, reward_calls=3)):
        assert generation.usage.generated_tokens <= tokens
        assert generation.usage.reward_calls <= 3
        assert generation.completion.score is not None
        assert generation.completion.state.finish_reason is not None


def test_a_batch_answers_as_single_prompts_do():
    agent, budget = Guarded(LM, NoVowels(), max_response_tokens=12), Budget(tokens=100)
    together = answers(agent, budget, 5)
    apart = [agent.generate([prompt], budget, seed=5)[0] for prompt in PROMPTS]
    assert [g.completion for g in together] == [g.completion for g in apart]


def test_a_target_above_what_can_be_reached_is_what_can_be_reached():
    agent = Guarded(LM, NoVowels(), max_response_tokens=12, target=7.0)
    with pytest.warns(UserWarning, match="target of at most 1, .*'no-vowels' .*'ab.*got 7"):
        found = answers(agent, Budget(tokens=200))
    assert np.mean([g.completion.score for g in found]) == 1.0


def test_refusals():
    class Unknown(RewardModel):
        def score(self, prompts, responses):
            return [0.0] * len(responses)

    class Plain(NGramLM):
        guards = False

    with pytest.raises(ValueError, match="a reward whose `bound` says"):
        answers(Guarded(LM, Unknown(), max_response_tokens=12))
    with pytest.raises(ValueError, match="watches a guard"):
        Guarded(Plain("abc", order=1, seed=0), NoVowels())
    for options in ({"floor": 1.0}, {"candidates": 0}, {"target": float("nan")}):
        with pytest.raises(ValueError, match="xpected"):
            Guarded(LM, NoVowels(), **options)

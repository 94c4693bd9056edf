"""The planner for expensive rewards, on toys whose charges are known by hand."""

import numpy as np
import pytest

from mbrl_text_env.agents import BestOfN, Screened
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.rewards import Priced
from mbrl_text_env.types import Budget, Prompt
from tests.toys import CountReward, FixedValue

LM = NGramLM("abcd", seed=3, concentration=5.0, stop_probability=0.0)
PROMPTS = [Prompt.from_text(a + b, chat=False) for a in "abcd" for b in "abcd"]
SIZES = {"max_response_tokens": 8, "chunk_tokens": 2}


def share_of_a(text):
    return text.count("a") / max(1, len(text))


def planner(price, value=share_of_a, **options):
    values = None if value is None else FixedValue(value, LM)
    return Screened(LM, Priced(CountReward(), price), values, **{**SIZES, **options})


@pytest.mark.parametrize(
    ("price", "candidates", "finalists"),
    [(0, 4, 4), (4, 4, 4), (16, 4, 2), (32, 4, 1), (80, 10, 1)],
)
def test_a_round_spends_about_as_much_on_the_reward_as_on_text(price, candidates, finalists):
    """A token is a FLOP and a response 8: without a budget there is one round."""
    [(answer, tree)] = planner(price).explore(PROMPTS[:1])
    assert answer.usage.generated_tokens == candidates * 8
    unique = len({node.state.response_ids for node in tree.nodes if node.is_terminal})
    assert answer.usage.reward_calls == min(finalists, unique)
    assert answer.usage.reward_flops == price * answer.usage.reward_calls


def test_the_finalists_have_the_highest_values():
    [(answer, tree)] = planner(1e3, candidates=5, finalists=1).explore(PROMPTS[:1], seed=1)
    complete = [node for node in tree.nodes if node.is_terminal]
    [scored] = tree.complete()
    assert scored.value == max(node.value for node in complete)
    assert answer.completion.score == scored.score == scored.value


def test_what_was_not_scored_stays_a_candidate_of_later_rounds():
    agent = planner(24, candidates=3, finalists=2)
    [(answer, tree)] = agent.explore(PROMPTS[:1], Budget(flops=400.0))
    unscored = [n.value for n in tree.nodes if n.is_terminal and n.score is None]
    assert len(tree.complete()) == answer.usage.reward_calls > 4
    assert answer.usage.flops <= 400.0
    assert answer.completion.score >= max(unscored, default=0.0)


def test_an_expensive_reward_is_found_for_less_than_by_best_of_n():
    """Half the budget of best-of-N, and a better answer."""
    reward, found = Priced(CountReward(), 40.0), {}
    for agent, flops in ((planner(40.0), 250.0), (BestOfN(LM, reward, **SIZES), 500.0)):
        answers = [
            a for s in range(3) for a in agent.generate(PROMPTS, Budget(flops=flops), seed=s)
        ]
        assert all(answer.usage.flops <= flops for answer in answers)
        found[agent.name] = np.mean([answer.completion.score for answer in answers])
    assert found["screened"] > found["best-of-n"] + 0.1


def test_without_a_value_it_is_best_of_n():
    own, other = planner(8, value=None), BestOfN(LM, Priced(CountReward(), 8), **SIZES)
    budget = Budget(flops=300.0)
    found = [[g.completion for g in each.generate(PROMPTS, budget)] for each in (own, other)]
    assert found[0] == found[1]


def test_bad_numbers():
    for options in ({"candidates": 0}, {"finalists": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            planner(1, **options)

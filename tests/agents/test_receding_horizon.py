import pytest

from mbrl_text_env.agents import RecedingHorizon
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.types import Budget
from tests.toys import PROMPTS, CountReward, FixedValue

LM = NGramLM("abcdefgh", seed=3, concentration=50.0, stop_probability=0.0)


def planner(value=lambda text: text.count("a"), **options):
    options = {"max_response_tokens": 8, "chunk_tokens": 2, **options}
    return RecedingHorizon(LM, CountReward(), FixedValue(value, LM), **options)


def test_only_the_ends_of_plans_are_valued():
    [(answer, tree)] = planner(horizon=2, plans=5).explore(PROMPTS[:1])
    first = tree.root.children
    assert all(node.value is None for node in first)
    ends = [child for node in first for child in node.children]
    assert any(node.value is not None for node in ends)
    assert answer.usage.value_calls < len(tree.nodes)


def test_the_first_chunk_of_the_best_plan_is_executed():
    [(_, tree)] = planner(horizon=2, plans=6).explore(PROMPTS[:1])
    ends = [child for node in tree.root.children for child in node.children]
    best = max((node for node in ends if node.value is not None), key=lambda node: node.value)
    assert "executed" in best.parent.note
    executed = [node for node in tree.root.children if "executed" in node.note]
    assert executed == [best.parent]


def test_it_plans_again_after_each_step():
    [(_, tree)] = planner(horizon=2, plans=3).explore(PROMPTS[:1])
    steps = [node for node in tree.nodes if "executed" in node.note]
    assert sorted(node.depth for node in steps) == [1, 2, 3]
    for node in steps:
        assert sum(child.copies for child in node.children) >= 3


def test_a_horizon_to_the_end_chooses_by_scores_alone():
    [(_, tree)] = planner(horizon=4, plans=4).explore(PROMPTS[:1])
    assert all(node.value is None for node in tree.nodes)
    assert tree.chosen.score == max(node.score for node in tree.complete())


def test_a_budget_is_divided_among_the_steps():
    [(answer, tree)] = planner(horizon=2).explore(PROMPTS[:1], Budget(tokens=120))
    assert 100 < answer.usage.generated_tokens <= 120
    drawn = [node.samples for node in tree.root.path()]
    assert drawn[0] < 20


def test_without_a_value_scores_decide():
    """Plans go to the end: a budget buys complete responses, not lost beginnings."""
    agent = RecedingHorizon(LM, CountReward(), max_response_tokens=8, chunk_tokens=2)
    [(answer, tree)] = agent.explore(PROMPTS[:1], Budget(tokens=200))
    assert len(tree.complete()) >= 15
    assert answer.completion.score == max(node.score for node in tree.complete())
    executed = [node for node in tree.root.children if "executed" in node.note]
    assert executed


@pytest.mark.parametrize("wrong", [{"horizon": 0}, {"plans": 0}])
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        planner(**wrong)

import pytest

from mbrl_text_env.agents import BeamSearch, Lookahead
from mbrl_text_env.agents.beam import shares
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.types import Budget
from tests.toys import PROMPTS, CountReward, FixedValue

LM = NGramLM("abcdefgh", seed=3, concentration=50.0, stop_probability=0.0)
VALUE = FixedValue(lambda text: text.count("a"), LM)
SIZES = {"max_response_tokens": 8, "chunk_tokens": 2}


def tree_of(agent, tokens=None, seed=0):
    budget = None if tokens is None else Budget(tokens=tokens)
    [(answer, tree)] = agent.explore(PROMPTS[:1], budget, seed=seed)
    return answer, tree


def stages(tree):
    """Nodes by depth."""
    depths = [node.depth for node in tree.nodes]
    return [[n for n, d in zip(tree.nodes, depths, strict=True) if d == k] for k in set(depths)]


def test_only_the_best_partial_responses_go_on():
    _, tree = tree_of(BeamSearch(LM, CountReward(), VALUE, beam_width=2, candidates=6, **SIZES))
    for stage in stages(tree)[1:-1]:
        with_children = [node for node in stage if node.children]
        assert len(with_children) == 2
        rest = [node.value for node in stage if not node.children]
        assert min(node.value for node in with_children) >= max(rest)


def test_a_stage_draws_as_many_candidates_as_were_asked_for():
    answer, tree = tree_of(BeamSearch(LM, CountReward(), VALUE, candidates=5, **SIZES))
    assert [sum(n.copies for n in stage) for stage in stages(tree)[1:]] == [5, 5, 5, 5]
    assert answer.usage.generated_tokens == 5 * 8


def test_a_budget_says_how_many_candidates_a_stage_has():
    """80 tokens are 10 whole responses; each of the 4 stages draws 10 chunks of 2."""
    answer, tree = tree_of(BeamSearch(LM, CountReward(), VALUE, **SIZES), tokens=80)
    assert [sum(n.copies for n in stage) for stage in stages(tree)[1:]] == [10, 10, 10, 10]
    assert answer.usage.generated_tokens == 80


def test_subtrees_keep_apart():
    """One beam each: whatever the values are, three of the first candidates go on to the end."""
    agent = BeamSearch(LM, CountReward(), VALUE, beam_width=3, subtrees=3, candidates=9, **SIZES)
    _, tree = tree_of(agent)
    roots = {list(node.path())[-2].index for node in tree.complete()}
    assert len(roots) == 3
    _, crowded = tree_of(BeamSearch(LM, CountReward(), VALUE, beam_width=3, candidates=9, **SIZES))
    assert len({list(node.path())[-2].index for node in crowded.complete()}) < 3


def test_chunkwise_lookahead_is_a_beam():
    options = {**SIZES}
    beam = BeamSearch(LM, CountReward(), VALUE, beam_width=2, **options)
    chunkwise = Lookahead(LM, CountReward(), VALUE, chunkwise=True, keep=2, **options)
    for prompt in PROMPTS:
        one, other = (
            agent.generate([prompt], Budget(tokens=70), seed=3)[0] for agent in (beam, chunkwise)
        )
        assert one.completion == other.completion
    assert [sum(n.copies for n in stage) for stage in stages(tree_of(chunkwise)[1])[1:]] == [4] * 4


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(5, 2, [3, 2]), (2, 3, [1, 1, 0]), (0, 2, [0, 0]), (6, 3, [2] * 3)],
)
def test_shares(total, count, expected):
    assert shares(total, count) == expected


@pytest.mark.parametrize(
    "wrong", [{"beam_width": 0}, {"candidates": 0}, {"subtrees": 0}, {"subtrees": 2}]
)
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BeamSearch(LM, CountReward(), VALUE, **wrong)

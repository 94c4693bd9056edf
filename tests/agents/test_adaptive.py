import numpy as np
import pytest

from mbrl_text_env.agents import Adaptive, BestOfN
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.types import Budget
from mbrl_text_env.values import ValueEstimate
from tests.toys import PROMPTS, CountReward, FixedValue

LM = NGramLM("abcdefgh", seed=3, concentration=50.0, stop_probability=0.0)
SIZES = {"max_response_tokens": 16, "chunk_tokens": 8, "shortest_chunk": 2}


class UncertainValue(FixedValue):
    """The same standard deviation for every state."""

    def __init__(self, function, tokenizer, std):
        super().__init__(function, tokenizer)
        self.std = std

    def predict(self, states):
        return ValueEstimate(super().predict(states).mean, np.full(len(states), self.std))


def count_a(text):
    return text.count("a")


def searched(value, tokens=16 * 8, reward=None, **options):
    agent = Adaptive(LM, reward or CountReward(), value, **{**SIZES, **options})
    [(answer, tree)] = agent.explore(PROMPTS[:1], Budget(tokens=tokens), seed=2)
    return answer, tree


def stage(tree, depth):
    return [node for node in tree.nodes if node.depth == depth]


def going_on(tree, depth):
    return [node for node in stage(tree, depth) if node.children]


def test_where_the_value_says_nothing_it_is_as_broad_as_best_of_n():
    """8 whole responses' worth: 8 candidates, all of which go on to the end."""
    answer, tree = searched(FixedValue(lambda text: 0.0, LM))
    assert len(tree.complete()) == 8
    assert all(len(node.children) <= 1 for node in tree.nodes[1:])
    assert answer.usage.reward_calls == 8


def test_chunks_grow_while_the_value_says_nothing():
    _, tree = searched(FixedValue(lambda text: 0.0, LM))
    lengths = sorted({len(node.state.response_ids) for node in tree.nodes})
    assert lengths == [0, 2, 6, 14, 16]
    _, tree = searched(FixedValue(lambda text: 0.0, LM), chunk_tokens=4)
    assert sorted({len(node.state.response_ids) for node in tree.nodes}) == [0, 2, 6, 10, 14, 16]


class DearValue(FixedValue):
    """Costs as much as five tokens."""

    def flops(self, states):
        return np.full(len(states), 5.0)

    def flops_bound(self):
        return 5.0


@pytest.mark.parametrize(
    ("value_share", "lengths"), [(1.0, [0, 5, 10, 15, 16]), (0.5, [0, 10, 16]), (0.3, [0, 16])]
)
def test_chunks_are_as_long_as_a_value_is_dear(value_share, lengths):
    """A token of the toy takes one operation, its prefix aside."""
    value = DearValue(lambda text: float(sum(map(ord, text))), LM)
    _, tree = searched(value, value_share=value_share, chunk_tokens=16)
    assert sorted({len(n.state.response_ids) for n in tree.nodes}) == lengths


def test_where_the_value_tells_only_the_best_go_on():
    rank = {text: i for i, text in enumerate("abcdefgh")}
    value = FixedValue(lambda t: -sum(rank[c] * 9.0**-i for i, c in enumerate(t)), LM)
    agent = Adaptive(LM, CountReward(), value, max_response_tokens=8, shortest_chunk=2)
    [(_, tree)] = agent.explore(PROMPTS[:1], seed=2)
    for depth in range(1, 4):
        kept = going_on(tree, depth)
        assert len(kept) == 2
        rest = [node.value for node in stage(tree, depth) if node not in kept]
        assert min(node.value for node in kept) >= max(rest)
        assert len(kept[0].state.response_ids) == 2 * depth


def test_values_within_the_margin_are_not_told_apart():
    def by_class(text):
        return 1.0 if text[0] in "abcd" else 0.95 if text[0] in "ef" else 0.0

    first = {}
    for margin in (0.1, 0.6):
        value = UncertainValue(by_class, LM, 0.1)
        agent = Adaptive(LM, CountReward(), value, **SIZES, margin=margin, candidates_per_beam=8)
        found = [going_on(tree, 1) for _, tree in agent.explore(PROMPTS, seed=1)]
        kept = [node for row in found if max(n.value for n in row) == 1.0 for node in row]
        first[margin] = {LM.decode(node.state.response_ids)[0] for node in kept}
    assert first[0.1] <= set("abcd")
    assert first[0.6] & set("ef")
    assert not first[0.6] & set("gh")


def test_caution_prefers_what_is_certain():
    class Risky(FixedValue):
        def predict(self, states):
            bold = np.array([self.tokenizer.decode(s.response_ids)[0] in "abcd" for s in states])
            return ValueEstimate(np.where(bold, 1.0, 0.9), np.where(bold, 0.5, 0.0))

    value = Risky(None, LM)
    for caution, letters in ((0.0, set("abcd")), (1.0, set("efgh"))):
        _, tree = searched(value, caution=caution, margin=0.0, candidates_per_beam=8)
        assert {LM.decode(n.state.response_ids)[0] for n in going_on(tree, 1)} <= letters


def test_a_target_ends_the_search():
    reward = CountReward()
    value = FixedValue(count_a, LM)
    whole, _ = searched(value, tokens=2_000)
    enough, tree = searched(value, tokens=2_000, target=0.3)
    assert enough.completion.score >= 0.3
    assert enough.usage.generated_tokens < whole.usage.generated_tokens / 2
    assert reward.score([None], [enough.text]) == [enough.completion.score]
    assert sum(node.score >= 0.3 for node in tree.complete()) >= 1


def test_hopeless_paths_are_given_up_once_a_response_is_known():
    """Narrow rounds towards a target out of reach: after the first, no path's value holds up."""
    sure, unsure = (
        searched(
            UncertainValue(lambda text: -1.0, LM, std), target=9.0, tokens=16 * 40, chunk_tokens=2
        )[1]
        for std in (0.01, 10.0)
    )
    assert len(sure.complete()) <= 8
    assert len(unsure.complete()) > 20


def test_it_is_best_of_n_or_better_with_the_prefix_reward():
    reward = CountReward()
    value = FixedValue(lambda text: reward.score([None], [text])[0], LM)
    budget = Budget(tokens=16 * 8)
    planner, baseline = (
        Adaptive(LM, reward, value, **SIZES),
        BestOfN(LM, reward, max_response_tokens=16),
    )
    scores = {
        agent.name: np.mean(
            [g.completion.score for s in range(10) for g in agent.generate(PROMPTS, budget, seed=s)]
        )
        for agent in (planner, baseline)
    }
    assert scores["adaptive"] > scores["best-of-n"] + 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"candidates_per_beam": 0},
        {"margin": -0.1},
        {"value_share": 0.0},
        {"caution": float("nan")},
        {"shortest_chunk": 0},
        {"target": float("nan")},
    ],
)
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Adaptive(LM, CountReward(), None, **wrong)

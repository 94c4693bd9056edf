import json

import pytest

from mbrl_text_env.agents import Adaptive, BeamSearch, BestOfN
from mbrl_text_env.agents.tree import SearchTree
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.mdp import initial, transition
from mbrl_text_env.types import Budget, Chunk
from tests.toys import PROMPTS, CountReward, FixedValue

LM = NGramLM("abc", seed=3, stop_probability=0.0)


def grown():
    tree = SearchTree(initial(PROMPTS[0], LM))
    a, b = (Chunk((i,), (-float(i),)) for i in (1, 2))
    first = tree.add(tree.root, a, transition(tree.root.state, a, 3))
    other = tree.add(tree.root, b, transition(tree.root.state, b, 3))
    last = tree.add(first, b, transition(first.state, b, 3))
    return tree, first, other, last


def test_places_and_paths():
    tree, first, other, last = grown()
    assert [node.index for node in tree.nodes] == [0, 1, 2, 3]
    assert (tree.root.depth, last.depth) == (0, 2)
    assert list(last.path()) == [last, first, tree.root]
    assert last.logprobs() == (-1.0, -2.0)
    assert tree.root.children == [first, other]


def test_a_chunk_that_is_drawn_again_is_the_same_child():
    tree, first, _, _ = grown()
    again = tree.add(tree.root, Chunk((1,), (-1.0,)), first.state)
    assert again is first
    assert (first.copies, tree.root.samples, len(tree.nodes)) == (2, 3, 4)


def test_the_best_is_the_first_of_the_highest_scores():
    tree, first, other, last = grown()
    assert tree.best() is None
    other.score, last.score = 0.5, 0.5
    assert tree.best() is other
    assert tree.complete() == [other, last]
    assert (first.worth, last.worth) == (None, 0.5)


@pytest.mark.parametrize("cls", [BestOfN, BeamSearch, Adaptive])
def test_the_export_explains_the_answer(cls):
    value = FixedValue(lambda text: text.count("a"), LM)
    agent = cls(LM, CountReward(), value, max_response_tokens=6, chunk_tokens=2)
    for answer, tree in agent.explore(PROMPTS, Budget(tokens=60), seed=1):
        found = json.loads(json.dumps(tree.to_dict(LM), allow_nan=False))
        nodes = found["nodes"]
        assert found["prompt_id"] == answer.prompt.id
        on_path = [node for node in nodes if node["chosen"]]
        assert "".join(node["text"] for node in on_path) == answer.text
        assert nodes[found["chosen"]]["score"] == answer.completion.score
        assert all(node["parent"] < node["index"] for node in nodes[1:])
        assert all(node["value"] is None for node in nodes if node["score"] is not None)
        tokens = sum(len(node["token_ids"]) * node["copies"] for node in nodes)
        assert tokens == answer.usage.generated_tokens


def test_a_prompt_is_explored_once():
    agent = BestOfN(LM, CountReward(), max_response_tokens=6)
    with pytest.raises(ValueError, match="distinct prompts"):
        agent.explore([PROMPTS[0], PROMPTS[0]], Budget(tokens=12))

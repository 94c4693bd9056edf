"""Drawings of a search."""

import io

import matplotlib.image
import pytest
from rich.console import Console

from mbrl_text_env.agents import Adaptive, BeamSearch
from mbrl_text_env.benchmarks.search_view import draw_tree, picture
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.types import Budget
from tests.toys import PROMPTS, CountReward, FixedValue

LM = NGramLM("abcdefgh", seed=3, concentration=5.0, stop_probability=0.1)


def searched(cls=BeamSearch, tokens=60, **options):
    value = FixedValue(lambda text: text.count("a"), LM)
    agent = cls(LM, CountReward(), value, max_response_tokens=6, chunk_tokens=2, **options)
    [(_, tree)] = agent.explore(PROMPTS[:1], Budget(tokens=tokens), seed=1)
    return tree.to_dict(LM)


def printed(search, **options):
    console = Console(file=io.StringIO(), width=160)
    console.print(draw_tree(search, **options))
    return console.file.getvalue()


def test_the_chosen_path_is_drawn_whole():
    search = searched()
    text = printed(search, most_children=1)
    for node in search["nodes"][1:]:
        if node["chosen"]:
            assert f"{node['text']}" in text
    score = search["nodes"][search["chosen"]]["score"]
    assert f"score {score:.3f}" in text
    assert "best complete response" in text


def test_what_is_left_out_is_counted():
    search = searched()
    below = [node for node in search["nodes"] if node["parent"] == 0]
    assert len(below) > 3
    assert f"and {len(below) - 2} more" in printed(search, most_children=2)
    assert "more" not in printed(search, most_children=99)


def test_every_node_is_drawn_once_at_most():
    search = searched(Adaptive)
    lines = printed(search, most_children=99).splitlines()
    assert len(lines) == len(search["nodes"])


@pytest.mark.parametrize("tokens", [6, 60, 400])
def test_a_picture(tmp_path, tokens):
    path = tmp_path / "search.png"
    picture(searched(tokens=tokens), path)
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 200
    assert image.std() > 0

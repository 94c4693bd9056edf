"""Ratios are of one round each; agents take turns; the command writes what it measured."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from mbrl_text_env.agents import BestOfN
from mbrl_text_env.benchmarks.wall_time import main, rows_of, timed
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.ledger import Budget
from mbrl_text_env.types import Prompt
from tests.toys import CountReward

PROMPTS = [Prompt.from_text("ab"), Prompt.from_text("ba")]


def round_of(seconds, tokens=10.0, score=0.5):
    return {"seconds": seconds, "tokens": tokens, "score": score}


def test_ratios_are_of_one_round_each():
    """The second round was four times slower for both; their means would say 1.4."""
    rounds = {
        "best-of-n": [round_of(1.0), round_of(4.0), round_of(2.0)],
        "beam": [round_of(2.0, 8.0, 0.7), round_of(6.0, 10.0, 0.9), round_of(2.0, 9.0, 0.8)],
    }
    best, beam = rows_of("sentiment", 64, rounds)
    assert best["ratios"] == [1.0, 1.0, 1.0]
    assert beam["ratios"] == [2.0, 1.5, 1.0]
    assert beam["ratio"] == 1.5
    assert beam["seconds"] == [2.0, 6.0, 2.0]
    assert (beam["tokens"], beam["mean"]) == (9.0, pytest.approx(0.8))
    assert (beam["reward"], beam["agent"], beam["budget_tokens"]) == ("sentiment", "beam", 64)


class Watched(BestOfN):
    """Writes down what it is asked, and what the cache was asked before."""

    log: list[object]

    def generate(self, prompts, budget, *, seed):
        self.log.append((self.n, budget.tokens, seed))
        return super().generate(prompts, budget, seed=seed)


def test_agents_take_turns_from_an_empty_cache():
    log: list[object] = []
    lm, reward = NGramLM("abc", order=2, seed=1), CountReward()
    lm.clear_cache = lambda: log.append("cleared")
    agents = {}
    for n in (1, 2):
        agent = agents[str(n)] = Watched(lm, reward, n=n, max_response_tokens=4)
        agent.log = log
    found = timed(agents, PROMPTS, 20, 2, seed=5)
    first, second = [(1, 20, 5), (2, 20, 5)], [(1, 20, 6), (2, 20, 6)]
    asked = [entry for call in first + second for entry in ("cleared", call)]
    assert log == asked
    expected = agents["2"].generate(PROMPTS, Budget(tokens=20), seed=6)
    last = found["2"][1]
    assert last["score"] == pytest.approx(sum(a.completion.score for a in expected) / 2)
    assert last["tokens"] == sum(a.usage.generated_tokens for a in expected) / 2


@pytest.fixture(scope="module")
def command():
    app = typer.Typer()
    app.command()(main)

    def run(*words):
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(words))

    return run


def test_it_times_the_default_planner_on_both_models(command, tmp_path):
    path = tmp_path / "wall_time.json"
    found = command(
        *("--num-prompts", "2", "--budget", "48", "--rounds", "2", "--max-response-tokens", "16"),
        *("--json", str(path)),
    )
    assert found.exit_code == 0, found.output
    result = json.loads(path.read_text())
    rows = result["results"]
    assert [(row["reward"], row["agent"]) for row in rows] == [
        ("sentiment", "best-of-n"),
        ("sentiment", "adaptive:value=prefix"),
        ("relevance", "best-of-n"),
        ("relevance", "adaptive:value=prefix"),
    ]
    for row in rows:
        assert 0 < row["tokens"] <= 48
        assert len(row["seconds"]) == len(row["ratios"]) == 2
        assert min(row["seconds"]) > 0
    assert "times best-of-N" in found.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--agents", "nobody"), "nobody"),
        (("--agents", "adaptive:value=oracle"), "Unknown value model 'oracle'"),
        (("--rewards", "constraints", "--num-prompts", "500"), "Expected at least 500 test"),
    ],
)
def test_what_cannot_be_timed_is_refused(command, words, message):
    found = command(*words)
    assert found.exit_code == 2
    assert message in found.output

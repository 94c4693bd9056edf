"""The study of verifiable and expensive rewards, on a tiny model."""

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from mbrl_text_env.benchmarks.matched import Cell, Pool
from mbrl_text_env.benchmarks.options import CompareError
from mbrl_text_env.benchmarks.studies import verifiable
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.types import Prompt
from tests.benchmarks.studies.tiny_command import Command


def test_the_quick_command(tmp_path, monkeypatch):
    smaller = {"budgets": (32,), "num_prompts": 4, "samples": 4, "max_response_tokens": 8}
    monkeypatch.setattr(verifiable, "QUICK", smaller)
    tiny = Command(verifiable.main, tmp_path, {})
    words = ["--quick", "--language-model", str(tiny.model), "--dtype", "float32"]
    words += ["--json", str(tmp_path / "results.json"), "--out", str(tmp_path / "run")]
    runner = CliRunner(env={"COLUMNS": "200"})
    found = [runner.invoke(tiny.app, words) for _ in range(2)]
    assert [each.exit_code for each in found] == [0, 0], found[0].output
    result = json.loads((tmp_path / "results.json").read_text())
    rows = result["results"]
    assert [row["agent"] for row in rows] == list(verifiable.GUARDED)
    for row in rows:
        assert row["suite"] == "constraints"
        assert (row["budget_tokens"], row["prompts"], row["reward_price"]) == (32, 4, None)
        assert row["low"] <= row["mean"] <= row["high"]
        assert row["mean_logprob"] < 0 < row["flops"]
        assert {"multiplier", "multiplier_low", "p_vs_best_of_n"} <= row.keys()


def test_unknown_suites_are_refused():
    with pytest.raises(CompareError, match=r"expected some of .*got .'nope'"):
        verifiable.parts(["constraints", "nope"], quick=False)
    app = typer.Typer()
    app.command()(verifiable.main)
    found = CliRunner().invoke(app, ["--suites", "nope", "--json", "x.json"])
    assert found.exit_code != 0


def test_a_price_is_a_part():
    found = verifiable.parts(["expensive", "reasoning"], quick=False)
    assert [part.reward_price for part in found] == [*verifiable.PRICES, None]
    assert {part.unit for part in found[:3]} == {"flops"}


def test_examples_count_once_a_task_or_for_each_question():
    lm = NGramLM("abcde", order=1, seed=0, flops_per_token=2.0)
    texts = {"x": ("aab", "aac"), "y": ("ba", "bb", "bc")}
    prompts = [
        Prompt.from_text(text, chat=False, metadata={"kind": kind})
        for kind, own in texts.items()
        for text in own
    ]
    shared = verifiable.shared_flops(lm, prompts)
    once = lm.usage_bound(1, []).flops, lm.usage_bound(2, []).flops
    assert shared.tolist() == [once[1]] * 2 + [once[0]] * 3


def test_rows_with_more_flops_are_new_rows():
    rows = [{"prompt_id": "a", "usage": {"flops": 2.0, "tokens": 1}}]
    more = verifiable._with_more(rows, {"a": 5.0})
    assert (rows[0]["usage"]["flops"], more[0]["usage"]) == (2.0, {"flops": 7.0, "tokens": 1})


def pool_and_rows(names, score):
    """Two samples of each prompt, one of them right; and an agent's answers."""
    scores = np.tile([1.0, 0.0], (len(names), 1))
    pool = Pool(
        tuple(names), scores, np.full_like(scores, 4.0), np.full_like(scores, 8.0),
        np.zeros(len(names)), np.full_like(scores, -1.0), target=1.0,
    )  # fmt: skip
    rows = [
        {
            "prompt_id": name, "score": score(name), "logprob": -2.0, "response_tokens": 4,
            "usage": {"generated_tokens": 4, "flops": 6.0, "reward_calls": 1, "seconds": 0.1},
        }
        for name in names
    ]  # fmt: skip
    return pool, [Cell("c", "x", 512, "tokens", rows)]


def test_the_baseline_stops_at_the_target():
    pool, cells = pool_and_rows("ab", lambda _: 1.0)
    assert pool.in_flops.mean_costs(2) == 12.0
    part = verifiable.parts(["constraints"], quick=True)[0]
    agents, _ = verifiable.result_rows(part, pool, cells, None)
    assert agents[0]["multiplier"] == pytest.approx(2.0)
    assert agents[0]["mean_logprob"] == -0.5


def test_each_task_has_rows_of_its_own(monkeypatch):
    kinds = dict(zip("abcd", ("sums", "gcd", "sums", "gcd"), strict=True))
    prompts = [Prompt.from_text(name, id=name, metadata={"kind": k}) for name, k in kinds.items()]
    monkeypatch.setattr(verifiable.Study, "prompts", lambda *_: prompts)
    [part] = verifiable.parts(["reasoning"], quick=False)
    rows = verifiable.task_rows(part, *pool_and_rows("abcd", lambda name: float(name in "ac")))
    assert [(row["task"], row["prompts"], row["mean"]) for row in rows] == [
        ("gcd", 2, 0.0),
        ("sums", 2, 1.0),
    ]

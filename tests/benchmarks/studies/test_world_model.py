"""The study of world models, on a tiny model; its correlations by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from mbrl_text_env.agents.model_free import PolicyGradientSettings
from mbrl_text_env.benchmarks.studies import world_model as study
from mbrl_text_env.benchmarks.studies import world_model_dyna
from mbrl_text_env.benchmarks.studies.world_model_baselines import correlations
from mbrl_text_env.language_models import TransformersLM
from mbrl_text_env.rewards import as_reward_model
from tests.benchmarks.studies.tiny_command import Command


def test_the_quick_command_goes_on_and_has_all_baselines(tmp_path, monkeypatch):
    # Responses are longer than a chunk, so that planners use the values.
    size = study.Size(8, 6, 6, 4, 1, 8, (8,), 72, 32)
    monkeypatch.setattr(study, "QUICK", size)
    tiny = Command(study.main, tmp_path, {})
    words = ["--quick", "--language-model", str(tiny.model), "--dtype", "float32"]
    words += ["--json", str(tmp_path / "found.json"), "--out", str(tmp_path / "run")]
    for _ in range(2):
        found = CliRunner(env={"COLUMNS": "200"}).invoke(tiny.app, words)
        assert found.exit_code == 0, found.output
    result = json.loads((tmp_path / "found.json").read_text())
    [row] = result["zero_labels"]
    assert row["length"] == 8
    assert row["low"] <= row["correlation"] <= row["high"]
    assert row["z"] > 0
    assert set(row["baselines"]) == {"any", "rate", "ensemble", "prefix", "boosting"}
    plans = result["planning"]
    assert [r["agent"] for r in plans["results"]] == [*study.PLANNERS] * 2
    assert {r["reward"] for r in plans["results"]} == {"set-0", "all"}
    assert plans["best_of_n"][0]["agent"] == "best-of-n"
    values = {r["agent"]: r["multiplier_tokens"] for r in plans["results"][: len(study.PLANNERS)]}
    together = plans["results"][len(study.PLANNERS) :]
    # One set is all of them.
    assert {r["agent"]: r["multiplier_tokens"] for r in together} == pytest.approx(values)
    ratios = result["label_ratio"]
    assert {row["reward"] for row in ratios} == {*study.LABELLED}
    assert all(row["ratio"] is None or row["low"] <= row["ratio"] for row in ratios)
    assert set(result["cost"]) == {"increment", "ensemble"}


def test_trainings_share_labels_and_calls(tmp_path, monkeypatch):
    tiny = Command(study.main, tmp_path, {})
    first = replace(world_model_dyna.STAGES[0], steps=2, num_generations=2, batch_size=4)
    first = replace(first, max_calls=7, first_calls=4, calls_per_step=2, max_completion_length=4)
    stages = (first, replace(first, seed=1, audited=1))
    monkeypatch.setattr(world_model_dyna, "STAGES", stages)
    names = ("steps", "prompts_per_step", "num_generations", "batch_size", "max_completion_length")
    control = PolicyGradientSettings(**{name: getattr(first, name) for name in names})
    monkeypatch.setattr(world_model_dyna, "CONTROL", control)
    monkeypatch.setattr(world_model_dyna, "_TEST_PROMPTS", 3)
    letters = as_reward_model(lambda prompt, response: sum(map(ord, response)) % 97 / 96)
    monkeypatch.setattr(world_model_dyna, "make", lambda name: letters)
    model = TransformersLM(str(tiny.model))
    found = world_model_dyna.dyna(model, tmp_path / "run", 0)
    assert [row["reward_calls"] for row in found["curve"]] == [4, 6, 7, 7]
    assert found["reward_calls"] == 7
    assert set(found["test"]) == {"dyna-1", "dyna-2", "grpo"}
    first, *others = found["curve"]
    assert first["mean"] == pytest.approx(first["said"])
    assert first["error"] == 0 < others[-1]["error"]
    # `said` is off by the gap of the responses that the reward was not asked for.
    for row, share in zip(others, (2 / 4, 3 / 4, 1), strict=True):
        assert row["said"] - row["mean"] == pytest.approx(share * row["gap"])
    # Responses without two words have no pair of words: a NaN.
    assert str(world_model_dyna.dyna(model, tmp_path / "run", 0)) == str(found)


def test_correlations_are_within_cells_and_resampled_by_prompt():
    final = np.array([0.0, 1.0, 10.0, 11.0, 5.0, 5.0])
    cells = [(0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0)]
    told = {"right": final * 2, "wrong": -final, "level": np.array([9.0, 9, 0, 0, 1, 1])}
    found = correlations(told, final, cells, seed=0)
    assert found["right"][0] == pytest.approx(1)
    assert found["wrong"][0] == pytest.approx(-1)
    assert found["level"][0] == 0
    # Some resamples have the second prompt alone, in which nothing varies.
    assert set(found["right"].round(6).tolist()) == {0.0, 1.0}

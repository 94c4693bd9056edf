"""The study of world models, on a tiny model; its correlations by hand."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from mbrl_text_env.benchmarks.studies import world_model as study
from mbrl_text_env.benchmarks.studies.world_model_baselines import correlations
from tests.benchmarks.studies.tiny_command import Command


def test_the_quick_command_goes_on_and_has_all_baselines(tmp_path, monkeypatch):
    size = study.Size(8, 6, 6, 4, 1, 8, (8,), 40, 16)
    monkeypatch.setattr(study, "QUICK", size)
    tiny = Command(study.main, tmp_path, {})
    words = ["--quick", "--language-model", str(tiny.model), "--dtype", "float32"]
    words += ["--json", str(tmp_path / "found.json"), "--out", str(tmp_path / "run")]
    words += ["--page", str(tmp_path / "page.md")]
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
    assert "| tokens | nearest | any |" in (tmp_path / "page.md").read_text()
    ratios = result["label_ratio"]
    assert {row["reward"] for row in ratios} == {"long words", "you"}
    assert all(row["ratio"] is None or row["low"] <= row["ratio"] for row in ratios)
    assert set(result["cost"]) == {"increment", "ensemble"}


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

"""The benchmark on the real models, small."""

import json
from dataclasses import replace

from typer.testing import CliRunner

from mbrl_text_env.benchmarks.matched.report import multiplier
from mbrl_text_env.benchmarks.matched.study import DEFAULT_PLANNER, Study
from mbrl_text_env.benchmarks.matched_compute import AGENTS, run_and_write

FIELDS = {
    "reward",
    "agent",
    "budget_tokens",
    "mean",
    "low",
    "high",
    "tokens",
    "flops",
    "seconds",
    "multiplier",
    "multiplier_low",
    "multiplier_high",
    "multiplier_tokens",
    "kl",
    "p_vs_best_of_n",
}


def test_a_small_study_of_the_real_models(smollm2, tmp_path):
    study = Study(
        {"sentiment": AGENTS},
        budgets=(48,),
        num_prompts=3,
        samples=4,
        train_prompts=3,
        train_samples=2,
        max_response_tokens=12,
    )
    path = tmp_path / "results.json"
    result = run_and_write(
        study, "embedded", "float32", tmp_path / "study", path, tmp_path / "page.md"
    )
    found = json.loads(path.read_text())
    assert found == json.loads(json.dumps(result))
    assert [row["agent"] for row in found["results"]] == list(AGENTS)
    for row in found["results"]:
        assert row.keys() >= FIELDS
        assert row["tokens"] <= row["budget_tokens"]
        assert row["low"] <= row["mean"] <= row["high"]
    assert (tmp_path / "results.png").exists()
    assert (tmp_path / "results-divergence.png").exists()
    page = (tmp_path / "page.md").read_text()
    assert f"`{DEFAULT_PLANNER}`" in page
    assert "results.png" in page


def test_options_are_told():
    import typer

    from mbrl_text_env.benchmarks.matched_compute import main

    app = typer.Typer()
    app.command()(main)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for option in ("--json", "--quick", "--ablations", "--budgets", "--unit", "--answers"):
        assert option in shown
    wrong = (["--unit", "years"], ["--budgets", "many"], ["--budgets", "10"], ["--answers", "0"])
    for words in wrong:
        assert CliRunner().invoke(app, words).exit_code == 2


def test_quick_changes_only_what_is_not_given(monkeypatch):
    import typer

    from mbrl_text_env.benchmarks import matched_compute

    asked = []
    monkeypatch.setattr(matched_compute, "run_and_write", lambda *args: asked.append(args))
    app = typer.Typer()
    app.command()(matched_compute.main)
    words = [
        "--quick",
        "--agents",
        "mcts:value=prefix",
        "--budgets",
        "1024",
        "--rewards",
        "numbers",
    ]
    for given in (words, ["--quick"], [], ["--answers", "3"]):
        assert CliRunner().invoke(app, given).exit_code == 0
    studies, folders = [args[0] for args in asked], [str(args[3]) for args in asked]
    assert studies[0].agents == {"numbers": ("mcts:value=prefix",)}
    assert (studies[0].budgets, studies[0].num_prompts, studies[0].samples) == ((1024,), 16, 32)
    assert (studies[1].budgets, studies[1].train_prompts) == ((512,), 16)
    assert (studies[2].num_prompts, studies[2].samples, len(studies[2].budgets)) == (64, 256, 6)
    assert [study.answers for study in studies] == [1, 1, 1, 3]
    assert studies[3] == replace(studies[2], answers=3)
    assert folders == ["matched-compute-quick"] * 2 + ["matched-compute"] * 2


def test_multipliers_are_shown_with_their_ends():
    row = {"m": 2.04, "m_low": 1.5, "m_high": 3.0}
    row |= {"m_is_lower_bound": False, "m_is_upper_bound": False}
    assert multiplier(row, "m") == "2.0 [1.5, 3.0]"
    row |= {"m_high": None, "m_is_lower_bound": True}
    assert multiplier(row, "m") == "> 2.0 [1.5, more]"

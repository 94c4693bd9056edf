"""`mbrl-text reward fit` on real models and small data."""

from __future__ import annotations

import io

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from mbrl_text_env.benchmarks.reward_fit import fit_command, report_tables
from mbrl_text_env.records import Record, RecordWriter
from mbrl_text_env.rewards.learning.fitting import fit_reward
from mbrl_text_env.rewards.learning.learned import LearnedReward
from mbrl_text_env.rewards.learning.preferences import write_preferences
from mbrl_text_env.types import Prompt, TextState
from tests.rewards.learning.test_fitting import BLAME, PRAISE, letters, pairs_of, records_of
from tests.rewards.learning.test_reward_trainer import causal  # noqa: F401

app = typer.Typer()
app.command("fit")(fit_command)
RUN = CliRunner()


def run(*words):
    result = RUN.invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    return result, " ".join(result.output.split())


@pytest.fixture
def pairs_file(tmp_path):
    write_preferences(tmp_path / "praise.jsonl", pairs_of(PRAISE, BLAME))
    return tmp_path / "praise.jsonl"


def wordy_records():
    """Answers of 3 to 8 words on eight topics; the score is the number of words."""
    for topic in ("cats", "ships", "bread", "trains", "bees", "chess", "rain", "gold"):
        state = TextState(Prompt.from_text(f"Tell me about {topic}."), (1,), (2,), "stop")
        for words in range(3, 9):
            yield Record.from_state(
                state,
                response=" ".join([topic, *["is"] * (words - 2), "good"]),
                score=float(words),
                rewards={},
                reward_name="words",
                agent="a",
                language_model="m",
                seed=0,
            )


@pytest.fixture
def records_folder(tmp_path):
    with RecordWriter(tmp_path / "records") as writer:
        writer.extend(wordy_records())
    return tmp_path / "records"


def test_pairs(minilm, pairs_file, tmp_path):
    out = tmp_path / "reward"
    result, output = run("--pairs", pairs_file, "--out", out, "--seed", 1)
    assert result.exit_code == 0, output
    reward = LearnedReward(out)
    assert reward.name == "learned(praise)"
    assert (reward.report_.seed, reward.report_.held_out.num_pairs) == (1, 6)
    assert "24 pairs of 8 prompts" in output
    assert "6 pairs of 2 other prompts" in output
    assert f"Use it with `mbrl-text compare --reward learned:{out}`." in output
    again, output = run("--pairs", pairs_file, "--out", out, "--head", "mlp", "--name", "second")
    assert again.exit_code == 0, output
    assert LearnedReward(out).report_.model == "mlp on embedding"
    assert LearnedReward(out).name == "second"


@pytest.mark.parametrize("objective", ["bradley-terry", "regression"])
def test_records(minilm, records_folder, tmp_path, objective):
    words = ["--records", records_folder, "--objective", objective, "--out", tmp_path / "reward"]
    result, output = run(*words, "--pairs-per-prompt", 10)
    assert result.exit_code == 0, output
    reward = LearnedReward(tmp_path / "reward")
    assert reward.name == "learned(words)"
    assert reward.report_.held_out.accuracy > 0.9
    assert reward.report_.held_out.longer_wins == 1.0
    assert ("R2" in output) == (objective == "regression")
    assert reward.report_.num_fitted == (60 if objective == "bradley-terry" else 36)


def test_lora(causal, pairs_file, tmp_path):  # noqa: F811
    words = ["--pairs", pairs_file, "--out", tmp_path / "reward", "--method", "lora"]
    result, output = run(*words, "--model", causal, "--set", "max_steps=2", "--set", "r=2")
    assert result.exit_code == 0, output
    settings = LearnedReward(tmp_path / "reward").report_.chosen
    assert (settings["steps"], settings["r"], settings["alpha"]) == (2, 2, 16.0)


def test_errors_are_friendly(pairs_file, records_folder, tmp_path):
    out = ["--out", tmp_path / "reward"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    for words, message in (
        ([*out], "Expected either --pairs"),
        ([*out, "--pairs", pairs_file, "--records", records_folder], "got both"),
        ([*out, "--pairs", tmp_path / "no.jsonl"], "expected a file that can be read"),
        ([*out, "--records", tmp_path / "no"], "expected a folder with record shards"),
        ([*out, "--pairs", pairs_file, "--objective", "regression"], "pass --records instead"),
        ([*out, "--pairs", pairs_file, "--method", "magic"], "--method: expected one of"),
        ([*out, "--pairs", pairs_file, "--features", "magic"], "--features: expected one of"),
        ([*out, "--pairs", pairs_file, "--head", "magic"], "head: expected one of"),
        (
            [*out, "--records", records_folder, "--method", "lora", "--objective", "regression"],
            "--method lora fits 'bradley-terry'",
        ),
        (["--out", tmp_path / "other", "--pairs", pairs_file], "a folder with other files"),
        ([*out, "--records", records_folder, "--min-gap", 99], "Collect more responses"),
    ):
        result, output = run(*words)
        assert result.exit_code == 2, output
        assert message in output
        assert "Traceback" not in output
    assert not (tmp_path / "reward").exists()


def test_reports_are_shown():
    console = Console(width=120, record=True, file=io.StringIO())
    reward = fit_reward(records_of(len), objective="regression", features=letters())
    for table in report_tables("mine", reward.report_):
        console.print(table)
    assert "correlation within a prompt" in console.export_text()

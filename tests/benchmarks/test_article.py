"""`mbrl-text article` as printed, on tiny random models of the article's two architectures."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mbrl_text_env.benchmarks.article import AGENTS, PROMPTS, UNSEEN, needs, put_on
from mbrl_text_env.benchmarks.cli import app
from mbrl_text_env.benchmarks.compare import read_rows
from mbrl_text_env.records import read_records
from mbrl_text_env.rewards import TimeLimit, make
from tests.benchmarks.test_report import Read
from tests.language_models.conftest import CHAT_TEMPLATE, make_config, save_model, train_tokenizer
from tests.rewards.conftest import deberta

RUN = CliRunner()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The options `--policy` and `--reward`: a Qwen2 and a DebertaV2."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(chat_template=CHAT_TEMPLATE)
    config = make_config("qwen2", tokenizer.eos_token_id, max_position_embeddings=512)
    save_model(folder / "policy", config, tokenizer, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge, words = deberta(None)
    judge.save_pretrained(folder / "judge")
    words.save_pretrained(folder / "judge")
    return ["--policy", str(folder / "policy"), "--reward", f"classifier:{folder / 'judge'}"]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("article") / "whole"
    result = RUN.invoke(app, ["article", *models, "--out", str(out), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    return out, result.output


def rows_of(out):
    """Whatever must not depend on a kill."""
    rows = [
        {name: value for name, value in row.items() if name != "seconds"}
        for part in ("compare-seen", "compare-unseen")
        for row in read_rows(out / part / "results.jsonl")
    ]
    loop = [json.loads((out / f"loop/{n:02d}/scores.json").read_text()) for n in (0, 1)]
    for scores in loop:
        if scores["improvement"]:
            scores["improvement"].pop("seconds")
    return rows, loop


def test_it_runs_as_printed(whole):
    out, shown = whole
    rows, loop = rows_of(out)
    ids = [prompt.id for prompt in (*PROMPTS, *UNSEEN)]
    assert {(row["agent"], row["prompt_id"]) for row in rows} == {
        (agent, name) for agent in AGENTS for name in ids
    }
    assert len(read_records(out / "records")) == 4 * len(PROMPTS)
    for row in rows:
        # Up to two partial responses that ended and are not continued are scored too.
        assert row["usage"]["reward_calls"] <= (6 if row["agent"] == "lookahead" else 4)
        assert row["usage"]["generated_tokens"] <= 1024
    assert all(row["usage"]["value_calls"] for row in rows if row["agent"] == "lookahead")
    assert [scores["iteration"] for scores in loop] == [0, 1]
    adapter = json.loads((out / "loop/01/policy/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (16, 32)
    assert set(adapter["target_modules"]) == {"q_proj", "v_proj"}
    assert "million parameters" in shown
    assert "Results of the loop" in shown
    assert "memorises them" in shown
    assert f"Report: {out / 'report.html'}" in shown


def test_the_report_has_the_figures_and_is_made_again(whole):
    out, _ = whole
    html = (out / "report.html").read_text()
    page = Read(html)
    assert {row["id"] for row in page.data["answers"]["rows"]} == {
        prompt.id for prompt in (*PROMPTS, *UNSEEN)
    }
    summary = json.loads((out / "compare-unseen" / "summary.json").read_text())
    means = {entry["agent"]: entry["mean"] for entry in page.data["unseen"]["agents"]}
    assert means == {entry["agent"]: entry["mean"] for entry in summary["agents"]}
    result = RUN.invoke(app, ["report", str(out)])
    assert result.exit_code == 0, result.output
    assert (out / "report.html").read_text() == html


def test_killed_and_resumed_it_ends_in_the_same_rows(models, tmp_path):
    words = ["article", *models, "--max-response-tokens", "24", "--out"]
    killed, other = tmp_path / "killed", tmp_path / "whole"
    program = [sys.executable, "-m", "mbrl_text_env.benchmarks.cli"]
    running = subprocess.Popen([*program, *words, str(killed)])
    while running.poll() is None and not (killed / "loop/01/collected.json").exists():
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert not (killed / "report.html").exists()
    for out in (killed, other):
        result = RUN.invoke(app, [*words, str(out)])
        assert result.exit_code == 0, result.output
    assert rows_of(killed) == rows_of(other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cdua"], "--device: expected one that torch can use"),
        (["--dtype", "float8"], "--dtype: expected one of"),
        (["--policy", "http://localhost:8000/v1"], "--policy: expected a model that is loaded"),
        (["--policy", "no-such-owner/no-such-model"], "memory and time are unknown"),
    ],
)
def test_what_cannot_be_run_is_told(words, message, tmp_path):
    result = RUN.invoke(app, ["article", *words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_the_parts_of_a_reward_follow_the_device():
    reward = TimeLimit(make("0.5*classifier:some/model+relevance"), 60)
    [total] = reward.rewards
    put_on(reward, torch.device("cpu"))
    assert total.rewards[0].device == torch.device("cpu")


def test_what_a_model_takes_is_known_from_its_config_alone(models, tmp_path):
    folder = Path(models[1])
    shutil.copy(folder / "config.json", tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    found = needs(
        [(str(tmp_path), "AutoModelForCausalLM", torch.float16)], 1000, torch.device("cpu")
    )
    assert f"{whole / 1e6:,.1f} million parameters" in found[0]
    assert "GB more during fine-tuning" in found[0]
    assert "At most 1,000 tokens" in found[1]

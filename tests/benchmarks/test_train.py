"""`mbrl-text train`: ten steps, killed, resumed; curves, report, and the policy in a comparison."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from mbrl_text_env.benchmarks.cli import app
from mbrl_text_env.benchmarks.compare import read_rows
from mbrl_text_env.benchmarks.train import TrainError, settings_of
from mbrl_text_env.rewards.learning.surrogate import read_batches
from tests.benchmarks.test_report import Read
from tests.language_models.conftest import CHAT_TEMPLATE, make_config, save_model, train_tokenizer

RUN = CliRunner()
REWARD = """
import os
calls = 0
def letters(prompt, response):
    global calls
    calls += 1
    if calls > int(os.environ.get("KILLED_AFTER", "1000000000")):
        os.kill(os.getpid(), 9)
    return sum(map(ord, response)) % 97 / 96
"""
CHOICE = ["num_envs=2", "save_steps=4", "eval_steps=10", "encoder=null", "chunk_tokens=2"]
PPO = [*CHOICE, "rollout_steps=4", "batch_size=4"]
DQN = [*CHOICE, "learning_starts=4", "batch_size=4"]
GRADIENT = ["prompts_per_step=2", "num_generations=2", "batch_size=4", "save_steps=2"]
DYNA = [*GRADIENT, "max_calls=24", "first_calls=6", "calls_per_step=2"]
# With this seed an iteration is above the base model, and there is a policy.
LOOP = ["agent=sampling", "value=null", "validation_samples=2", "patience=9", "seed=2"]
# Steps, other settings, calls of the reward before the kill.
ALGORITHMS = {
    "ppo": (10, PPO, 105),
    "dqn": (10, DQN, 95),
    "grpo": (10, GRADIENT, 22),
    "rloo": (10, GRADIENT, 22),
    "dyna": (10, DYNA, 12),
    "expert-iteration": (2, LOOP, 16),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model, prompts without splits, and a reward."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = train_tokenizer(chat_template=CHAT_TEMPLATE)
    save_model(folder / "tiny", make_config("llama", tokenizer.eos_token_id), tokenizer, 0)
    words = ("fox", "dog", "river", "sea", "rain", "sun")
    rows = [json.dumps({"prompt": f"Say {word}."}) for word in words]
    (folder / "mine.jsonl").write_text("\n".join(rows))
    (folder / "mine.py").write_text(REWARD)
    return folder


def words_of(world, algorithm, out):
    steps, items, _ = ALGORITHMS[algorithm]
    settings = [word for item in items for word in ("--set", item)]
    found = ["train", algorithm, "--out", out, "--steps", steps, *settings, "--num-prompts", 4]
    found += ["--held-out", 2, "--max-response-tokens", 6, *shared(world)]
    return list(map(str, found))


def shared(world):
    source = ["--prompts", world / "mine.jsonl", "--split", "all"]
    return [*source, "--language-model", world / "tiny", "--reward", f"{world}/mine.py:letters"]


def curve(folder, name):
    events = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(f"rollout/{name}")]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ten_steps_killed_and_resumed(world, algorithm, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = RUN.invoke(app, words_of(world, algorithm, whole))
    assert result.exit_code == 0, result.output
    done = subprocess.run(
        [sys.executable, "-m", "mbrl_text_env.benchmarks.cli", *words_of(world, algorithm, killed)],
        env={**os.environ, "KILLED_AFTER": str(ALGORITHMS[algorithm][2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr
    assert not (killed / "report.html").exists()
    begun = "loop/00/scores.json" if algorithm == "expert-iteration" else "policy-checkpoints/c*"
    assert list(killed.glob(begun)), "killed too early to go on from anything"
    assert curve(killed, "ep_rew_mean"), "events are written as it goes"
    result = RUN.invoke(app, words_of(world, algorithm, killed))
    assert result.exit_code == 0, result.output
    for name in ("ep_rew_mean", "ep_len_mean"):
        assert curve(killed, name) == curve(whole, name)
    steps, lengths = zip(*curve(whole, "ep_len_mean"), strict=True)
    assert list(steps) == sorted(set(steps))
    assert 0 < min(lengths) <= max(lengths) <= 6
    assert "Use the policy: mbrl-text compare --agents" in result.output
    if algorithm == "dyna":
        same_labels(whole, killed)
    used_in_compare(world, killed, algorithm, tmp_path / "compared")
    reported(killed, algorithm)


def same_labels(whole, killed):
    one, other = (read_batches(folder / "policy-labels") for folder in (whole, killed))
    assert [*one] == [*other]
    assert sum(len(batch.rows) for batch in other.values()) == 22
    for mine, its in zip(one.values(), other.values(), strict=True):
        assert mine.scores.tolist() == its.scores.tolist()
    assert json.loads((killed / "policy" / "ledger.json").read_text())["reward_calls"] == 22
    assert "The learned head against the reward" in (killed / "report.html").read_text()


def used_in_compare(world, folder, algorithm, out):
    agent = "candidates" if algorithm in ("ppo", "dqn") else "sampling"
    words = ["compare", "--agents", f"sampling,{agent}:policy=trained", "--num-prompts", 2]
    words += ["--policy", f"trained={folder / 'policy'}", "--budget-tokens", 60, "--out", out]
    words += ["--max-response-tokens", 6, *shared(world)]
    result = RUN.invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    found = {row["agent"] for row in read_rows(out / "results.jsonl")}
    assert found == {"sampling", f"{agent}:policy=trained"}


def reported(folder, algorithm):
    html = (folder / "report.html").read_text()
    page = Read(html)
    assert f"{algorithm}: " in html
    assert len(page.tables[0]) > 2
    rewards = dict(curve(folder, "ep_rew_mean"))
    if algorithm in ("grpo", "rloo", "dyna"):
        assert dict(page.data["episodes"]) == pytest.approx(rewards, abs=1e-6)
    elif algorithm == "expert-iteration":
        held_out = {step: sum(scores) / len(scores) for step, scores in page.data["held_out"]}
        assert held_out == pytest.approx(rewards)
    else:
        assert {step for step, _ in page.data["episodes"]} == set(rewards)
        assert page.data["held_out"][0][0] == 0
    again = RUN.invoke(app, ["report", str(folder)])
    assert again.exit_code == 0, again.output
    assert (folder / "report.html").read_text() == html


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["beta=high"], "--set beta: expected a float such as 0.0, got 'high'"),
        (["prompts_per_step=2.5"], "expected a int"),
        (["bete=1"], "temperature=0.7"),
        (["beta"], "NAME=VALUE"),
        (["beta=-1"], "beta: expected 0 or more"),
    ],
)
def test_settings_that_are_none(items, message):
    with pytest.raises(ValueError, match="expected") as found:
        settings_of("grpo", {"steps": 3, "tokens": None}, items)
    assert message in str(found.value)
    assert type(found.value).__module__.startswith("mbrl_text_env")


def test_settings_by_name():
    found = settings_of(
        "ppo", {"steps": 64, "tokens": 8, "seed": 3}, ["hidden=[4]", "encoder=null"]
    )
    assert (found.total_steps, found.max_response_tokens, found.seed) == (64, 8, 3)
    assert (found.hidden, found.encoder) == ((4,), None)
    assert settings_of("rloo", {"steps": 5, "tokens": 9}, ["beta=1"]).max_completion_length == 9
    with pytest.raises(TrainError, match="grpo"):
        settings_of("reinforce", {}, [])


def test_what_is_missing_is_told(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = RUN.invoke(app, [*words_of(world, "grpo", tmp_path), "--wandb"])
    assert result.exit_code == 2
    assert "pip install wandb" in " ".join(result.output.split())

import json
import subprocess
import sys

import pytest

from mbrl_text_env.benchmarks.reward_throughput import FAMILIES, _prompts, _responses
from mbrl_text_env.rewards.base import applies_to, score_responses


def test_it_writes_its_figures(tmp_path):
    path = tmp_path / "figures.json"
    words = ["--json", str(path), "--responses", "4", "--repeats", "1"]
    words += ["--family", "sentiment", "--family", "constraints"]
    command = [sys.executable, "-m", "mbrl_text_env.benchmarks.reward_throughput", *words]
    subprocess.run(command, check=True, capture_output=True)
    figures = json.loads(path.read_text())
    assert list(figures["families"]) == ["sentiment", "constraints"]
    for found in figures["families"].values():
        assert found["ratio"] == pytest.approx(found["batched"] / found["single"])
    assert "--responses 4" in figures["command"]


def test_unknown_families_are_refused():
    words = ["-m", "mbrl_text_env.benchmarks.reward_throughput", "--family", "sentimant"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sentimant" in done.stderr


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_scores_what_it_is_timed_on(name, tmp_path):
    family = FAMILIES[name]
    reward = family.make(tmp_path)
    prompts, responses = _prompts(family, 3), _responses(family, 3)
    assert len({prompt.id for prompt in prompts}) == 3
    assert all(applies_to(reward, prompt) for prompt in prompts)
    assert len(score_responses(reward, prompts, responses)) == 3

"""`make gpu-check` on the CPU, as a smoke test; where there is a GPU, there."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from mbrl_text_env.benchmarks.studies import gpu_check
from mbrl_text_env.language_models import SamplingParams, embedded
from mbrl_text_env.mdp import initial
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.types import Chunk

SMALL = ("--dtype=float32", "--num-prompts=2", "--tokens=4", "--batch-sizes=1,2", "--repeats=1")


@pytest.mark.slow
def test_it_is_exact_and_counts(tmp_path):
    app = typer.Typer()
    app.command()(gpu_check.main)
    path = tmp_path / "found.json"
    done = CliRunner().invoke(app, [*SMALL, f"--json={path}"])
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(path.read_text())
    assert json.dumps(found, indent=1) in done.output
    assert found["exactness"]["tokens"] == 8
    assert found["exactness"]["largest_difference"] < 1e-3
    assert found["guarded"]["kept"] == found["guarded"]["chunks"] == 8
    assert [row["prompts"] for row in found["comparison"]] == [2, 2, 2]
    names = {"generate", "float32", "float32 without cache", "limit float32"}
    assert names == {*found["rates"]}
    assert all(rate > 0 for row in found["rates"].values() for rate in row.values())
    assert found["ratios_float32"]["batch1_vs_generate"] > 0


def test_float32_is_that_of_a_forward_pass(smollm2):
    states = [initial(prompt, smollm2) for prompt in load_prompts(split="test")[:2]]
    found = gpu_check.exactness(smollm2, states, 8)
    assert found["tokens"] == 16
    assert found["largest_difference"] < 1e-4
    assert found["greedy_share"] == 1
    assert gpu_check.is_exact(found)


def test_bfloat16_is_as_exact_as_transformers():
    lm = embedded(dtype="bfloat16")
    states = [initial(prompt, lm) for prompt in load_prompts(split="validation")[:4]]
    found = gpu_check.exactness(lm, states, 8)
    assert gpu_check.is_exact(found)
    assert found["transformers_difference"] > 1e-3


def test_log_probabilities_that_are_off_are_told(smollm2, monkeypatch):
    states = [initial(prompt, smollm2) for prompt in load_prompts(split="test")[:1]]
    [[chunk]] = smollm2.sample(states, 1, 4, seeds=[0], params=SamplingParams(temperature=0))
    off = replace(chunk, logprobs=tuple(logprob - 0.5 for logprob in chunk.logprobs))
    monkeypatch.setattr(smollm2, "sample", lambda *args, **options: [[off]])
    found = gpu_check.exactness(smollm2, states, 4)
    assert found["mean_difference"] == pytest.approx(0.5, abs=1e-3)
    assert not gpu_check.is_exact(found)


def test_a_dead_end_ends_with_a_refused_token(smollm2, monkeypatch):
    [state] = [initial(prompt, smollm2) for prompt in load_prompts(split="test")[:1]]
    ids = [smollm2.encode_text(text) for text in ("a bad the", "the bad", "a bad")]
    chunks = [Chunk(tuple(each), (-1.0,) * len(each)) for each in ids]
    monkeypatch.setattr(smollm2, "sample_requests", lambda requests: [chunks])
    found = gpu_check.guarded(smollm2, [state], 9)
    assert (found["chunks"], found["kept"], found["dead_ends"]) == (3, 1, 1)

"""`make gpu-check` on the CPU, as a smoke test; where there is a GPU, there."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from mbrl_text_env.benchmarks.studies import gpu_check

SMALL = ("--num-prompts=2", "--tokens=4", "--batch-sizes=1,2", "--repeats=1")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_exact_and_counts(dtype, tmp_path):
    app = typer.Typer()
    app.command()(gpu_check.main)
    path = tmp_path / "found.json"
    done = CliRunner().invoke(app, [*SMALL, f"--dtype={dtype}", f"--json={path}"])
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert json.dumps(found, indent=1) in done.output
    assert found["exactness"]["tokens"] == 8
    assert found["exactness"]["largest_difference"] < {"float32": 1e-3, "bfloat16": 0.5}[dtype]
    assert found["exactness"]["greedy_share"] >= {"float32": 1, "bfloat16": 0.5}[dtype]
    assert found["guarded"]["kept"] == found["guarded"]["chunks"] == 8
    assert [row["prompts"] for row in found["comparison"]] == [2, 2, 2]
    assert {"generate", dtype, f"{dtype} without cache", f"limit {dtype}"} == {*found["rates"]}
    assert all(rate > 0 for row in found["rates"].values() for rate in row.values())
    assert found[f"ratios_{dtype}"]["batch1_vs_generate"] > 0


def test_an_engine_that_is_off_is_told(monkeypatch, smollm2):
    """Log-probabilities that a forward pass does not give."""
    monkeypatch.setitem(gpu_check.NEAR, "float32", -1.0)
    monkeypatch.setattr(gpu_check, "embedded", lambda **options: smollm2)
    with pytest.raises(typer.Exit) as left:
        gpu_check.main(dtype="float32", num_prompts=1, tokens=2, sizes="1", repeats=1)
    assert left.value.exit_code == 1

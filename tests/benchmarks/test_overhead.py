import json
import subprocess
import sys


def test_it_writes_its_figures(tmp_path):
    path = tmp_path / "overhead.json"
    command = [
        "-m",
        "mbrl_text_env.benchmarks.overhead",
        "--json",
        str(path),
        "--steps",
        "50",
        "--repeats",
        "1",
    ]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    figures = json.loads(path.read_text())
    assert set(figures) == {"single_step_us", "batch256_state_us", "command", "seed"}
    assert figures["single_step_us"] > 0
    assert figures["batch256_state_us"] > 0
    assert figures["seed"] == 0
    assert "mbrl_text_env.benchmarks.overhead" in figures["command"]

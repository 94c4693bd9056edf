"""The command on the real models, small."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from mbrl_text_env.benchmarks.cli import app

AUDIT = ["reward", "audit"]
RUN = CliRunner(env={"COLUMNS": "80"})
SMALL = {
    "--proxy": "sentiment", "--gold": "relevance", "--num-prompts": "4", "--samples": "8",
    "--max-response-tokens": "16", "--sensitivity-samples": "2",
}  # fmt: skip


def run(**changes):
    options = {**SMALL, **{f"--{key.replace('_', '-')}": str(v) for key, v in changes.items()}}
    return RUN.invoke(app, [*AUDIT, *(word for pair in options.items() for word in pair)])


def written(folder):
    found = json.loads((folder / "audit.json").read_text())
    assert found.pop("date")
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    result = run(out=folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_the_terminal(finished):
    _, output = finished
    assert max(map(len, output.splitlines())) <= 80
    flat = " ".join(output.replace("│", " ").split())
    assert "not decided: too few prompts (4; at least 8 are needed" in flat
    assert "Best-of-N by the proxy: 4 prompts, 8 responses each" in flat
    assert "flattery first" in flat


def test_the_files(finished):
    folder, _ = finished
    found = written(folder)
    assert found["verdict"]["outcome"] == "not decided"
    assert [point["n"] for point in found["curves"]["points"]] == [1, 2, 4, 8]
    assert found["sensitivity"]["responses"] == 8
    assert "not decided: too few prompts" in (folder / "report.html").read_text()


def test_the_written_command_gives_the_same_audit(finished):
    folder, _ = finished
    before = written(folder)
    words = shlex.split(before["command"])
    assert words[:3] == ["mbrl-text", "reward", "audit"]
    result = RUN.invoke(app, words[1:])
    assert result.exit_code == 0, result.output
    assert written(folder) == before


def test_another_proxy_on_the_same_pool(tmp_path, finished):
    folder, _ = finished
    result = run(proxy="relevance", out=tmp_path / "a", pool=folder / "pool")
    assert result.exit_code == 0, result.output
    assert "its own gold" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proxy": "sentimant"}, "Did you mean 'sentiment'"),
        ({"gold": "goldd"}, "known reward"),
        ({"num_prompts": 3}, "at least 4"),
        ({"num_prompts": 99999}, "num_prompts: expected at most"),
        ({"samples": 2}, "at least 4"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"max_response_tokens": 17}, "max_response_tokens: 16 there, 17 here"),
        ({"prompts": "missing.jsonl"}, "missing.jsonl"),
        ({"split": "dev"}, "split"),
    ],
)
def test_bad_input_is_told_without_a_traceback(tmp_path, finished, changes, message):
    folder, _ = finished
    result = run(out=tmp_path / "a", pool=folder / "pool", **changes)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_the_folder_of_another_audit(finished):
    folder, _ = finished
    result = run(out=folder, seed=1)
    assert result.exit_code == 2
    assert "another audit" in result.output

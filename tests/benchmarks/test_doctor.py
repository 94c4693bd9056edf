"""What the machine has, and the models that are kept."""

import pytest
from typer.testing import CliRunner

from mbrl_text_env._lazy import EXTRAS
from mbrl_text_env.benchmarks import doctor
from mbrl_text_env.benchmarks.cli import app

RUN = CliRunner()


def test_one_line_each():
    lines = RUN.invoke(app, ["doctor"]).output.splitlines()
    names = [line.partition(":")[0] for line in lines]
    assert len(set(names)) == len(names) > 12
    assert {"Python", "device", "number formats", "embedded MiniLM"} <= set(names)
    assert any("torch 2." in line for line in lines)


def test_what_is_missing_has_a_remedy(monkeypatch):
    monkeypatch.setitem(EXTRAS, "server", ("httpx", "no_such_package"))
    lines = RUN.invoke(app, ["doctor"]).output.splitlines()
    [line] = [line for line in lines if line.startswith("language models on servers")]
    assert line.endswith("missing: no_such_package -> pip install 'mbrl-text-env[server]'")
    assert set(doctor._FEATURES) == set(EXTRAS)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as the Hub's library writes it, with two models and a data set."""
    names = ("models--some--tiny", "models--other--model", "datasets--some--data")
    for number, name in enumerate(names):
        commit = f"{number:040d}"
        blobs, snapshot = tmp_path / name / "blobs", tmp_path / name / "snapshots" / commit
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        (tmp_path / name / "refs").mkdir()
        (tmp_path / name / "refs" / "main").write_text(commit)
        (blobs / "c0ffee").write_bytes(bytes(1_200_000))
        (snapshot / "model.safetensors").symlink_to("../../blobs/c0ffee")
    monkeypatch.setattr(doctor, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_models_are_listed_and_removed_after_a_question(cache):
    shown = RUN.invoke(app, ["models"]).output
    assert shown.count("1.2") == 2
    assert "some/tiny" in shown
    assert "data" not in shown.replace(str(cache), "")
    asked = RUN.invoke(app, ["models", "--remove", "some/tiny"], input="n\n")
    assert "Remove some/tiny (1.2 MB)" in asked.output
    assert "some/tiny" in RUN.invoke(app, ["models"]).output
    asked = RUN.invoke(app, ["models", "--remove", "some/tiny"], input="y\n")
    assert "1.2 MB freed" in asked.output
    RUN.invoke(app, ["models", "--remove", "other/model", "--yes"])
    assert sorted(path.name for path in cache.iterdir()) == ["datasets--some--data"]
    assert "No models in" in RUN.invoke(app, ["models"]).output


def test_a_model_that_is_not_there(cache):
    refused = RUN.invoke(app, ["models", "--remove", "some/big", "--yes"])
    assert refused.exit_code == 2
    assert "['other/model', 'some/tiny']" in refused.output

"""The report of a world model: on disk, on the page, and made again."""

import json

import pytest
from typer.testing import CliRunner

from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.cli import app
from mbrl_text_env.benchmarks.world_model import recorded_page
from mbrl_text_env.records import RecordWriter
from mbrl_text_env.world_model import IncrementDynamics
from tests.benchmarks.test_report import Read
from tests.world_model.worlds import LM, PROMPTS, records_of

ERRORS = ("error", "copying", "rate", "increments")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command on the toy, with its world model and two folders of records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options.ModelOptions, "load", lambda self: LM)
    IncrementDynamics(LM, stride=1).fit(records_of()).save("world")
    for name, prompts in (("others", PROMPTS[:5]), ("<b>shifted", PROMPTS[5:])):
        with RecordWriter(name) as writer:
            writer.extend(records_of(seed=9, prompts=prompts))
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])


def test_the_report_is_written_and_made_again(run, tmp_path):
    words = ["--records", "others", "--shift", "<b>shifted", "--out", "told", "--horizons", "1,2,4"]
    result = run("world-model", "report", "world", *words, "--prefix-tokens", 1)
    assert result.exit_code == 0, result.output
    page = tmp_path / "told" / "report.html"
    text, rows = page.read_text(), json.loads(page.with_name("horizons.json").read_text())["rows"]
    shown = Read(text)
    assert shown.data["horizons"] == rows
    assert list(rows) == ["others", "<b>shifted"]
    assert "b" not in shown.tags
    for table, own in zip(shown.tables, rows.values(), strict=True):
        for cells, row in zip(table[1:], own, strict=True):
            figures = [row[name] for name in (*ERRORS, "z", "epistemic_share")]
            assert cells == [str(row["horizon"]), *(f"{x:.3f}" for x in figures)]
            for name in ERRORS:
                squares = row["squares"][name]
                assert sum(squares) / len(squares) == pytest.approx(row[name] ** 2)
    page.unlink()
    result = run("report", "told")
    assert result.exit_code == 0, result.output
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("own", "word"),
    [([1, 2, 3, 2], "below"), ([9, 8, 9, 10], "above"), ([9, 3, 4, 6], "not separable from")],
)
def test_the_verdict_pairs_prompts_with_the_best_baseline(tmp_path, own, word):
    squares = {"error": own, "copying": [9] * 4, "rate": [8] * 4, "increments": [5, 5, 6, 4]}
    row = {name: (sum(each) / 4) ** 0.5 for name, each in squares.items()}
    row |= {"horizon": 8, "prefixes": 4, "z": 1.3, "epistemic_share": 0.1, "squares": squares}
    about = {"settings": {"world_model": "world"}, "rows": {"others": [row]}, "command": ""}
    (tmp_path / "horizons.json").write_text(json.dumps(about))
    page = recorded_page(tmp_path)
    figures = f"({row['error']:.3f}, {5**0.5:.3f})"
    best = "that of the best baseline, mean gain of any record"
    assert f"8 tokens ahead, {word} {best} {figures}" in page.verdict
    assert ["1.30 times the predicted" in warning for warning in page.warnings] == [True]


def test_a_damaged_file_is_named(run, tmp_path):
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / "horizons.json").write_text('{"rows": {}}')
    result = run("report", "told")
    assert result.exit_code == 2
    assert "told: expected the files of a finished run, got a damaged" in result.output

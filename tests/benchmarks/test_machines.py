"""A comparison on several machines: shards that are merged."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mbrl_text_env.benchmarks.cli import app
from mbrl_text_env.benchmarks.compare import CompareError, compare, read_rows
from mbrl_text_env.benchmarks.machines import merge
from tests.benchmarks.test_compare import AGENTS, PROMPTS, toy_comparison, without_times


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    compare(toy_comparison(), folder)
    return folder


def without_date(summary):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in summary["agents"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The 20 prompts are 4 batches: two for the first shard, one for each of the others."""
    folder = tmp_path_factory.mktemp("made")
    for i in (1, 2, 3):
        compare(toy_comparison(shard=f"{i}/3"), folder / str(i))
    return folder


@pytest.fixture
def shards(made, tmp_path):
    return [Path(shutil.copytree(made / str(i), tmp_path / str(i))) for i in (1, 2, 3)]


def test_merged_shards_are_the_whole(shards, whole, tmp_path):
    assert [len(read_rows(s / "results.jsonl")) for s in shards] == [8 * 3, 6 * 3, 6 * 3]
    out = tmp_path / "out"
    summary = merge([shards[2], shards[0], shards[1]], out)
    assert without_times(out) == without_times(whole)
    expected = json.loads((whole / "summary.json").read_text())
    assert without_date(summary) == without_date(expected)
    assert {**summary, "agents": 0} == {**expected, "agents": 0}
    assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert {p.name for p in (out / "parts").iterdir()} == {
        p.name for p in (whole / "parts").iterdir()
    }
    assert (out / "report.html").is_file()
    # Again, and the comparison without shards: nothing is answered.
    seconds = [row["seconds"] for row in read_rows(out / "results.jsonl")]
    merge(shards, out)
    compare(toy_comparison(), out)
    assert [row["seconds"] for row in read_rows(out / "results.jsonl")] == seconds


def test_a_shard_is_its_own_comparison(shards):
    summary = json.loads((shards[1] / "summary.json").read_text())
    assert summary["shard"] == "2/3"
    assert summary["prompts"] == [prompt.id for prompt in PROMPTS[6:12]]
    with pytest.raises(CompareError, match=r"another comparison \(shard: 2/3 there, null here\)"):
        compare(toy_comparison(), shards[1])
    with pytest.raises(CompareError, match=r"shard: 2/3 there, 1/3 here"):
        compare(toy_comparison(shard="1/3"), shards[1])


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_shards_that_are_none(shard):
    with pytest.raises(CompareError, match=r"expected 1/N to N/N .*got '" + shard):
        toy_comparison(shard=shard)


def test_more_shards_than_batches(tmp_path):
    with pytest.raises(CompareError, match=r"which are 4 \(of 6 .*got 5/5.*lower --batch"):
        compare(toy_comparison(shard="5/5"), tmp_path)


def refused(folders, tmp_path, match):
    with pytest.raises(CompareError, match=match):
        merge(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_settings(shards, tmp_path):
    compare(toy_comparison(shard="3/3", seed=1), tmp_path / "other")
    match = r"other holds another comparison than .*1 \(seed: 1 there, 0 here\)"
    refused([*shards[:2], tmp_path / "other"], tmp_path, match)


def test_another_number_of_shards(shards, tmp_path):
    compare(toy_comparison(shard="3/4"), tmp_path / "other")
    refused([*shards[:2], tmp_path / "other"], tmp_path, r"shards: 4 there, 3 here")


def test_shards_that_are_missing_or_there_twice(shards, tmp_path):
    refused(shards[1:2], tmp_path, r"all 3 shards, got none of 1/3, 3/3")
    shutil.copytree(shards[0], tmp_path / "copy")
    refused([*shards, tmp_path / "copy"], tmp_path, r"1 and .*copy both hold shard 1/3")


def test_folders_that_are_no_shards(shards, whole, tmp_path):
    refused([*shards[:2], whole], tmp_path, r"holds a whole comparison.*one of several shards")
    refused([*shards, tmp_path / "nothing"], tmp_path, r"nothing: expected the folder of `compare")
    (shards[2] / "config.json").write_text('{"shard": "3/3"}')
    refused(shards, tmp_path, r"3: expected the files of a finished run.*KeyError: 'agents'")
    (shards[2] / "config.json").write_text("{")
    refused(shards, tmp_path, r"config.json: expected a whole JSON object")


def test_rows_that_are_missing_damaged_or_there_twice(shards, tmp_path):
    part = shards[0] / "parts" / "000018-01.jsonl"
    text = part.read_text()
    part.write_text(text[:-40])
    first = rf"1 are missing, the first is that of '{AGENTS[1]}' to prompt 'p19'.*resumes"
    refused(shards, tmp_path, first)
    part.write_text(text + text.splitlines()[0])
    refused(shards, tmp_path, r"000018-01.jsonl holds the answer of 'best-of-n' to prompt 'p18'")
    part.write_text(text)
    shutil.copy(shards[1] / "parts" / "000006-00.jsonl", shards[0] / "parts")
    refused(shards, tmp_path, r"holds .* to prompt 'p6': expected those of shard 1/3, each once")


def test_a_folder_of_another_comparison(shards, tmp_path):
    compare(toy_comparison(seed=1), tmp_path / "out")
    with pytest.raises(CompareError, match="another comparison"):
        merge(shards, tmp_path / "out")
    with pytest.raises(CompareError, match=r"shard: 1/3 there, null here"):
        merge(shards, shards[0])


def test_the_command(shards, tmp_path):
    words = ["merge", *map(str, shards), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "20 prompts" in result.output
    assert CliRunner().invoke(app, [*words[:2], "--out", str(tmp_path / "no")]).exit_code == 2


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--ray", "local"], "expected both or neither"),
        (["--ray-workers", "2"], "expected both or neither"),
        (["--gpus-per-worker", "1"], "expected --ray ADDRESS too"),
        (["--shard", "3/2"], "expected 1/N to N/N"),
    ],
)
def test_options_that_do_not_go_together(words, match):
    result = CliRunner().invoke(app, ["compare", *words])
    assert result.exit_code == 2
    assert match in " ".join(f"{result.output} {result.exception}".split())

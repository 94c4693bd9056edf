"""The demonstration on the real models, small; `make demo` runs it whole."""

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from mbrl_text_env.benchmarks.compare import read_rows
from mbrl_text_env.benchmarks.demo import (
    AGENTS,
    REWARDS,
    DemoConfig,
    Pace,
    find_pace,
    fit_in_time,
    load,
    run_demo,
)
from mbrl_text_env.benchmarks.options import CompareError
from mbrl_text_env.records import read_records

SMALL = DemoConfig(
    train_prompts=4,
    samples=2,
    test_prompts=2,
    pool_samples=4,
)


@pytest.mark.slow
def test_it_shows_and_keeps_everything_and_resumes(smollm2, tmp_path):
    pace = Pace("default", REWARDS, 4, 12, 1)

    def run():
        console = Console(file=io.StringIO(), width=140)
        return run_demo(smollm2, tmp_path, console, SMALL, pace), console.file.getvalue()

    summaries, shown = run()
    assert set(summaries) == set(REWARDS)
    for reward, summary in summaries.items():
        assert [entry["agent"] for entry in summary["agents"]] == list(AGENTS)
        assert [row["agent"] for row in summary["multipliers"]] == list(AGENTS[1:])
        assert all(row["multiplier"] > 0 for row in summary["multipliers"])
        assert len(read_rows(tmp_path / f"compare-{reward}" / "results.jsonl")) == 2 * len(AGENTS)
        records = read_records(tmp_path / f"records-{reward}")
        assert len(records) == 8
        assert {record.reward_name for record in records} == {reward}
        assert {record.split for record in records} == {"train"}
    rows = read_rows(tmp_path / "compare-relevance" / "results.jsonl")
    prompts = {row["prompt_id"] for row in rows}
    assert not prompts & {record.prompt_id for record in records}
    assert "minus best-of-N" in shown
    assert "x FLOPs" in shown
    assert "Prompt: " in shown
    for reward in REWARDS:
        path = tmp_path / f"compare-{reward}" / "report.html"
        assert f"Report: {path}" in shown.replace("\n", "")
        assert path.is_file()
    again, _ = run()
    assert again == summaries  # times included: nothing was run twice


@pytest.mark.slow
def test_the_pace_is_found_once(tmp_path):
    def found():
        console = Console(file=io.StringIO(), width=140)
        return find_pace(tmp_path, console, DemoConfig()), console.file.getvalue()

    pace, shown = found()
    formats = re.search("matrix product: (.*?). The", shown.replace("\n", " "))[1].split(", ")
    times = {name: int(time) for name, _, time in (each.partition(" ") for each in formats)}
    assert set(times) == {"float32", "bfloat16", "int8"}
    assert times[pace.dtype] == min(times.values())
    fit = fit_in_time(pace.tokens_a_second, DemoConfig())
    assert (pace.rewards, pace.pool_samples, pace.max_response_tokens) == fit
    assert str(load(pace.dtype).dtype) == f"torch.{pace.dtype}"
    other = next(dtype for dtype in times if dtype != pace.dtype)
    kept = json.loads((tmp_path / "pace.json").read_text())
    (tmp_path / "pace.json").write_text(json.dumps({**kept, "dtype": other}))
    assert found() == (replace(pace, dtype=other), "")


@pytest.mark.parametrize(
    ("rate", "fit"),
    [
        # 190 seconds of 1.24 * 150 tokens, for 64 responses and 12 * (2 * (3 * 400 / 96 + 1) + 12).
        (150, (REWARDS, 12, 64)),
        (1000, (REWARDS, 12, 96)),
        # One reward: for 64 and 12 * (3 * 400 / 96 + 1 + 12), or 12 * (3 * 400 / 96 + 1 + 8).
        (115, (REWARDS[:1], 12, 72)),
        (80, (REWARDS[:1], 8, 56)),
        (1, (REWARDS[:1], 8, 56)),
    ],
)
def test_slow_processors_do_less(rate, fit):
    assert fit_in_time(rate, DemoConfig()) == fit


@pytest.mark.parametrize("content", ['{"dtype"', '{"dtype": "float32"}', "3"])
def test_a_damaged_pace_is_told(tmp_path, content):
    (tmp_path / "pace.json").write_text(content)
    with pytest.raises(CompareError, match=r"pace\.json: expected the timings of an earlier run"):
        find_pace(tmp_path, Console(file=io.StringIO()), DemoConfig())

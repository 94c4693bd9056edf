"""The demonstration on the real models, small; `make demo` runs it whole."""

import io
import json

import pytest
from rich.console import Console

from mbrl_text_env.benchmarks.compare import read_rows
from mbrl_text_env.benchmarks.demo import AGENTS, REWARDS, DemoConfig, fastest_model, run_demo
from mbrl_text_env.records import read_records

SMALL = DemoConfig(
    train_prompts=4,
    samples=2,
    test_prompts=2,
    pool_samples=4,
    budget_tokens=48,
    max_response_tokens=12,
)


@pytest.mark.slow
def test_it_shows_and_keeps_everything_and_resumes(smollm2, tmp_path):
    def run():
        console = Console(file=io.StringIO(), width=140)
        return run_demo(smollm2, tmp_path, console, SMALL), console.file.getvalue()

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
def test_the_fastest_number_format_is_found_once(tmp_path):
    def found():
        console = Console(file=io.StringIO(), width=140)
        return fastest_model(tmp_path, console), console.file.getvalue()

    model, shown = found()
    kept = json.loads((tmp_path / "format.json").read_text())
    rates = kept["tokens_a_second"]
    assert max(rates, key=rates.get) == kept["dtype"]
    assert str(model.dtype) == f"torch.{kept['dtype']}"
    assert f"The demonstration runs in {kept['dtype']}" in shown
    other = next(dtype for dtype in rates if dtype != kept["dtype"])
    (tmp_path / "format.json").write_text(json.dumps({"dtype": other}))
    model, shown = found()
    assert (str(model.dtype), shown) == (f"torch.{other}", "")

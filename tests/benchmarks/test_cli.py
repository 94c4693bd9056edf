"""The command line on the real models, small."""

import json

import pytest
from typer.testing import CliRunner

from mbrl_text_env.benchmarks.cli import app
from mbrl_text_env.benchmarks.compare import read_rows
from mbrl_text_env.records import read_records

RUN = CliRunner()
SMALL = ["--max-response-tokens", "8", "--seed", "0"]


def run(*words):
    return RUN.invoke(app, [str(word) for word in words])


@pytest.mark.slow
def test_collect_fit_compare(tmp_path):
    records, value, out = tmp_path / "records", tmp_path / "value", tmp_path / "out"
    result = run("collect", "--out", records, "--num-prompts", 3, "--samples", 2, *SMALL)
    assert result.exit_code == 0, result.output
    assert len(read_records(records)) == 6
    assert "Colour tokens" in (tmp_path / "records-report.html").read_text()
    result = run("collect", "--out", records, "--num-prompts", 4, "--samples", 2, *SMALL)
    assert "2 responses to 1 prompts added" in result.output.replace("\n", " ")
    result = run("collect", "--out", records, "--reward", "relevance", "--num-prompts", 4, *SMALL)
    assert result.exit_code == 2
    assert "sentiment there, relevance here" in " ".join(result.output.split())
    result = run("fit", "--records", records, "--out", value, "--kind", "embedding")
    assert result.exit_code == 0, result.output
    assert "correlation within a prompt" in result.output
    result = run("fit", "--records", records, "--out", tmp_path / "stacked")
    assert result.exit_code == 0, result.output
    assert "prefix tokens" in result.output
    assert "stacked" in (tmp_path / "stacked" / "value.json").read_text()
    words = ["--agents", "sampling,best-of-n,lookahead:prefix_tokens=4", "--reward", "sentiment"]
    words += ["--num-prompts", 2, "--budget-tokens", 32, "--out", out, "--value", value]
    result = run("compare", *words, *SMALL)
    assert result.exit_code == 0, result.output
    rows = read_rows(out / "results.jsonl")
    assert len(rows) == 6
    assert {row["usage"]["value_calls"] > 0 for row in rows if "look" in row["agent"]} == {True}
    summary = json.loads((out / "summary.json").read_text())
    assert [entry["agent"] for entry in summary["agents"]] == words[1].split(",")
    result = run("compare", *words, "--max-response-tokens", 8, "--seed", 1)
    assert result.exit_code == 2
    assert "another comparison" in result.output


def test_without_a_fitted_value_the_reward_judges_prefixes(tmp_path):
    words = ["--agents", "lookahead,adaptive", "--num-prompts", 1]
    result = run("compare", *words, "--budget-tokens", 24, "--out", tmp_path, *SMALL)
    assert result.exit_code == 0, result.output
    for row in read_rows(tmp_path / "results.jsonl"):
        assert row["usage"]["value_calls"] > 0
        assert row["usage"]["reward_calls"] > row["usage"]["value_calls"]


@pytest.mark.slow
def test_policies_by_name(tmp_path, smollm2):
    from mbrl_text_env.agents.learning.lora import AdapterSettings, trainable, write

    write(tmp_path / "tuned", trainable(smollm2, AdapterSettings(r=2)), smollm2)
    agents = "best-of-n,best-of-n:policy=mine"
    words = ["--agents", agents, "--num-prompts", 1, "--budget-tokens", 24]
    policy = ["--policy", f"mine={tmp_path / 'tuned'}"]
    result = run("compare", *words, *policy, "--out", tmp_path / "o", *SMALL)
    assert result.exit_code == 0, result.output
    rows = read_rows(tmp_path / "o" / "results.jsonl")
    assert {row["agent"] for row in rows} == set(agents.split(","))
    for wrong, message in ((["--policy", "mine"], "NAME=FOLDER"), ([], "known: no policies")):
        result = run("compare", *words, *wrong, "--out", tmp_path / "p", *SMALL)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_a_search_is_shown(tmp_path):
    words = ["Why is the sky blue?", "--agent", "beam:chunk_tokens=2", "--budget-tokens", 40]
    files = ["--json", tmp_path / "search.json", "--picture", tmp_path / "search.png"]
    files += ["--html", tmp_path / "search.html"]
    result = run("search", *words, *files, "--max-response-tokens", 8)
    assert result.exit_code == 0, result.output
    assert "Why is the sky blue?" in result.output
    found = json.loads((tmp_path / "search.json").read_text())
    chosen = found["nodes"][found["chosen"]]
    assert f"score {chosen['score']:.3f}" in result.output
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "search.html").read_text()
    assert f"the search chose node {chosen['index']}, score {chosen['score']:.3f}" in page
    assert "mbrl-text search &#39;Why is the sky blue?&#39; --agent beam:chunk_tokens=2" in page


def test_a_search_for_a_prompt_of_a_suite_has_bounds(tmp_path):
    words = ["--prompts", "suite:constraints", "--agent", "guarded", "--budget-tokens", 32]
    words += ["--max-response-tokens", 8, "--html", tmp_path / "search.html"]
    assert "such as 'instruct-" in run("search", "no-such", *words).output
    result = run("search", "instruct-005", *words)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "search.html").read_text()
    assert '"bound":1.0' in page
    assert "exactly three sentences" in page


def named_commands():
    from typer.main import get_command

    found = [((), get_command(app))]
    for words, command in found:
        found += [((*words, name), c) for name, c in getattr(command, "commands", {}).items()]
    return [words for words, _ in found]


@pytest.mark.parametrize("words", named_commands(), ids=" ".join)
def test_help_cuts_nothing_off_at_100_columns(words):
    shown = RUN.invoke(app, [*words, "--help"], env={"COLUMNS": "100"}).output
    assert f"mbrl-text {' '.join(words)}".strip().removeprefix("mbrl-text") in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_options_stand_in_panels():
    shown = RUN.invoke(app, ["compare", "--help"], env={"COLUMNS": "100"}).output
    places = [shown.index(f"─ {p} ─") for p in ("Options", "Comparison", "Reward", "Prompts")]
    assert places == sorted(places)
    words = " ".join(shown.replace("│", " ").split())
    assert "[default: (sampling, best-of-n, adaptive)]" in words


def test_only_planners_search():
    result = run("search", "Hi", "--agent", "sampling", "--max-response-tokens", 8)
    assert result.exit_code == 2
    assert "does not search" in result.output


def test_lists():
    assert "sentiment" in run("rewards").output
    assert "candidates_per_beam=4" in run("agents").output
    listed = run("prompts", "--split", "test", "--kind", "story", "--limit", 3).output
    assert "story" in listed
    assert "more (--limit)" in listed


def test_a_reward_in_a_file_that_hangs_for_one_prompt(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import threading\n"
        "def patience(prompt, response):\n"
        "    if prompt == hard:\n"
        "        threading.Event().wait()\n"
        "    return len(response)\n"
        "hard = 'Second question?'\n"
    )
    prompts = tmp_path / "prompts.jsonl"
    texts = ("First question?", "Second question?", "Third question?")
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = ["--agents", "sampling,best-of-n:n=2", "--num-prompts", 3]
    words += ["--prompts", prompts, "--reward", f"{path}:patience", "--reward-timeout", 0.5]
    result = run("compare", *words, "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 1, "not all was done"
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    failed = {row["prompt"] for row in rows if row["score"] is None}
    assert failed == {"Second question?"}
    assert "within 0.5 seconds" in next(row["error"] for row in rows if row["score"] is None)
    shown = " ".join(result.output.split())
    assert "scoring failed: sampling 1, best-of-n:n=2 1" in shown
    assert "400 tokens per prompt" in shown
    free = ["--agents", "sampling", "--num-prompts", 1, "--no-budget", "--out", tmp_path / "free"]
    assert "no budget" in run("compare", *free, *SMALL).output


def test_generated_puzzles_are_prompts():
    listed = run("prompts", "--source", "reasoning-gym:chain_sum", "--split", "test").output
    assert "256 prompts" in listed
    assert "chain_sum-2-0" in listed
    for words in (("--source", "reasoning-gym:chain_sun"), ("--split", "dev")):
        options = ("--source", "reasoning-gym:chain_sum", *words)
        result = run("prompts", *options)
        assert result.exit_code == 2
        assert words[1].removeprefix("reasoning-gym:") in result.output


def test_a_suite_brings_its_reward(tmp_path):
    words = ["--prompts", "suite:sql", "--num-prompts", 2, "--out", tmp_path, *SMALL]
    result = run("compare", "--agents", "best-of-n:n=2", "--budget-tokens", 16, *words)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["reward"] == "sql"
    assert len(summary["prompts"]) == len(read_rows(tmp_path / "results.jsonl")) == 2
    listed = run("prompts", "--source", "suite:sql", "--kind", "trains", "--split", "test").output
    assert "10 prompts" in listed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "suite:sqll"], "Did you mean 'sql'"),
        (["--prompts", "suite:sql", "--split", "dev"], "split: expected one of"),
        (["--prompts", "suite:sql", "--reward", "unit-tests"], "applies to none"),
        (["--prompts", "suite:sql", "--shots", "3"], "shots from 0 to 2"),
        (["--prompts", "suite:constraints", "--shots", "1"], "shots from 0 to 0"),
        (["--shots", "1"], "Only suites have examples"),
        (["--reward", "sentimant"], "sentiment"),
        (["--agents", "best-of-m"], "best-of-n"),
        (["--agents", "best-of-n:m=3"], "no option"),
        (["--agents", "best-of-n:n=few"], "name=number"),
        (["--agents", "best-of-n:n=0"], "at least 1"),
        (["--agents", "sampling,best-of-n:budget_tokens=9"], "no option"),
        (["--num-prompts", "9999"], "1 to "),
        (["--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--split", "dev"], "split"),
        (["--budget-tokens", "7"], "too small"),
        (["--value", "nowhere"], "nowhere"),
        (["--language-model", "nowhere/nothing"], "nowhere/nothing"),
    ],
)
def test_bad_input_is_told_without_a_traceback(tmp_path, words, message):
    small = {"--agents": "sampling", "--num-prompts": "1", "--max-response-tokens": "8"}
    rest = [item for pair in small.items() if pair[0] not in words for item in pair]
    result = run("compare", *words, *rest, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize("option", ["--num-prompts", "--max-response-tokens", "--batch-prompts"])
def test_counts_below_one(option, tmp_path):
    result = run("compare", option, 0, "--out", tmp_path)
    assert result.exit_code == 2


def test_fit_needs_records(tmp_path):
    result = run("fit", "--records", tmp_path / "none", "--out", tmp_path / "value")
    assert result.exit_code == 2
    assert "none" in result.output


def test_a_world_model_is_reported_on_by_horizons_that_are_numbers(tmp_path):
    words = ["world-model", "report", tmp_path, "--records", tmp_path, "--horizons", "8,far"]
    result = run(*words)
    assert result.exit_code == 2
    assert "expected comma-separated integers, got '8,far'" in " ".join(result.output.split())


def test_a_price_wants_a_budget_that_sees_it(tmp_path):
    words = ["compare", "--agents", "best-of-n", "--out", tmp_path, "--reward-price", "300tokens"]
    result = run(*words, "--budget-tokens", 96)
    assert result.exit_code == 2
    assert "--budget-flops" in result.output
    assert not list(tmp_path.iterdir())


def test_a_price_is_charged_and_kept_in_the_summary(tmp_path):
    words = ["--agents", "best-of-n:n=2", "--num-prompts", 2, "--out", tmp_path]
    result = run("compare", *words, "--reward-price", "2e11flops", *SMALL)
    assert result.exit_code == 0, result.output
    for row in read_rows(tmp_path / "results.jsonl"):
        assert row["usage"]["reward_flops"] == 2e11 * row["usage"]["reward_calls"] > 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["reward_price"] == "2e11flops"


def test_budgets_in_flops_and_seconds(tmp_path):
    words = ["--agents", "sampling,best-of-n", "--num-prompts", 2, "--out", tmp_path]
    caps = ["--budget-flops", 3e10, "--budget-seconds", 30]
    result = run("compare", *words, *caps, *SMALL)
    assert result.exit_code == 0, result.output
    assert "3e+10 FLOPs, 30 seconds per prompt" in result.output.replace("\n", " ")
    for row in read_rows(tmp_path / "results.jsonl"):
        assert row["usage"]["flops"] <= 3e10
        assert row["budget_tokens"] is None

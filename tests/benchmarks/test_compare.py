import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mbrl_text_env.benchmarks.compare import (
    CompareConfig,
    CompareError,
    Comparison,
    compare,
    read_rows,
    run,
    summarise,
)
from mbrl_text_env.benchmarks.options import choose_prompts
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.rewards import ConstraintsReward, as_reward_model
from mbrl_text_env.types import BudgetError, Prompt
from tests.toys import CountReward, FixedValue

LM = NGramLM("abc", seed=3)
PROMPTS = [Prompt.from_text("ab" * (1 + i % 3), id=f"p{i}") for i in range(20)]
AGENTS = ("sampling", "best-of-n", "lookahead:prefix_tokens=2")


def toy_comparison(**changes):
    config = {
        "agents": AGENTS, "budget_tokens": 32, "max_response_tokens": 8, "batch_prompts": 6,
        **changes,
    }  # fmt: skip
    value = FixedValue(lambda text: text.count("a"), LM)
    return Comparison(CompareConfig(**config), PROMPTS, LM, CountReward(), value)


def without_times(folder):
    rows = read_rows(folder / "results.jsonl")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_rows_and_summary(tmp_path):
    summary = compare(toy_comparison(), tmp_path / "a")
    rows = read_rows(tmp_path / "a" / "results.jsonl")
    assert len(rows) == len(PROMPTS) * len(AGENTS)
    by_agent = {spec: [r for r in rows if r["agent"] == spec] for spec in AGENTS}
    for agent_rows in by_agent.values():
        assert [row["prompt_id"] for row in agent_rows] == [prompt.id for prompt in PROMPTS]
        for row in agent_rows:
            assert row["score"] == pytest.approx(CountReward().score([None], [row["response"]])[0])
            assert row["usage"]["generated_tokens"] <= 32
    entries = {entry["agent"]: entry for entry in summary["agents"]}
    for spec, agent_rows in by_agent.items():
        assert entries[spec]["mean"] == pytest.approx(np.mean([r["score"] for r in agent_rows]))
    versus = entries["sampling"]["vs_best_of_n"]
    assert versus["difference"] == pytest.approx(
        entries["sampling"]["mean"] - entries["best-of-n"]["mean"]
    )
    assert versus["wins"] + versus["ties"] + versus["losses"] == len(PROMPTS)
    assert entries["best-of-n"]["vs_best_of_n"]["ties"] == len(PROMPTS)
    assert json.loads((tmp_path / "a" / "summary.json").read_text()) == summary


def test_twice_gives_the_same_rows_whatever_the_batches(tmp_path):
    compare(toy_comparison(), tmp_path / "a")
    compare(toy_comparison(), tmp_path / "b")
    compare(toy_comparison(batch_prompts=20), tmp_path / "c")
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")
    assert without_times(tmp_path / "a") == without_times(tmp_path / "c")


def test_a_finished_comparison_is_read_not_run(tmp_path):
    compare(toy_comparison(), tmp_path / "a")
    times = [row["seconds"] for row in read_rows(tmp_path / "a" / "results.jsonl")]
    compare(toy_comparison(), tmp_path / "a")
    assert [row["seconds"] for row in read_rows(tmp_path / "a" / "results.jsonl")] == times


def test_another_comparison_does_not_take_the_folder(tmp_path):
    compare(toy_comparison(), tmp_path / "a")
    with pytest.raises(CompareError, match=r"another comparison.*seed: 0 there, 1 here"):
        compare(toy_comparison(seed=1), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("years of work")
    with pytest.raises(CompareError, match="other files"):
        compare(toy_comparison(), tmp_path / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(CompareError, match="can be written"):
        compare(toy_comparison(), tmp_path / "file" / "c")


def test_refusals(tmp_path):
    with pytest.raises(CompareError, match="different agents"):
        toy_comparison(agents=("sampling", "sampling"))
    with pytest.raises(CompareError, match="batch_prompts"):
        toy_comparison(batch_prompts=0)
    with pytest.raises(ValueError, match="best-of-n"):
        toy_comparison(agents=("best-of-m",))
    with pytest.raises(BudgetError, match="too small"):
        compare(toy_comparison(budget_tokens=7), tmp_path)


def test_choose_prompts():
    chosen = choose_prompts(PROMPTS, 5, CountReward(), seed=1)
    assert chosen == choose_prompts(PROMPTS, 5, CountReward(), seed=1)
    assert chosen != choose_prompts(PROMPTS, 5, CountReward(), seed=2)
    assert len({prompt.id for prompt in chosen}) == 5
    with pytest.raises(CompareError, match="1 to 20"):
        choose_prompts(PROMPTS, 21, CountReward(), seed=1)
    constrained = Prompt.from_text("x", metadata={"constraints": [{"type": "no_commas"}]})
    assert choose_prompts([*PROMPTS, constrained], 1, ConstraintsReward(), 0) == [constrained]


SCRIPT = """
import sys, time
from dataclasses import replace
from pathlib import Path
from tests.benchmarks.test_compare import toy_comparison
from mbrl_text_env.benchmarks.compare import compare
compare(toy_comparison(), sys.argv[1], on_batch=lambda *a: (print(flush=True), time.sleep(0.3)))
"""


def test_killed_and_started_again_it_ends_with_the_same_rows(tmp_path):
    compare(toy_comparison(), tmp_path / "whole")
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    for batches in (1, 4, 7):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "killed")],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for _ in range(batches):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not (tmp_path / "killed" / "results.jsonl").exists()
    compare(toy_comparison(), tmp_path / "killed")
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")


def shown_table(summary):
    from rich.console import Console

    from mbrl_text_env.benchmarks.report import table

    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(summary))
    return " ".join(capture.get().split())


class Fussy(CountReward):
    """Cannot score answers to some prompts."""

    def __init__(self, refused):
        super().__init__()
        self.refused = refused

    def score(self, prompts, responses):
        for prompt in prompts:
            if prompt.id in self.refused:
                raise ZeroDivisionError(f"{prompt.id} is too hard")
        return super().score(prompts, responses)


def test_a_prompt_that_cannot_be_scored_costs_that_prompt_alone(tmp_path):
    whole = compare(toy_comparison(), tmp_path / "whole")
    fussy = replace(toy_comparison(), reward_model=Fussy({"p3", "p10"}))
    summary = compare(fussy, tmp_path / "fussy")
    rows = read_rows(tmp_path / "fussy" / "results.jsonl")
    assert len(rows) == len(PROMPTS) * len(AGENTS)
    failed = [row for row in rows if row["score"] is None]
    assert sorted({row["prompt_id"] for row in failed}) == ["p10", "p3"]
    assert all("ZeroDivisionError" in row["error"] for row in failed)
    assert all(repr(row["prompt_id"]) in row["error"] for row in failed)
    # The others are what they are without them, and pairs lose both sides.
    kept = [row for row in without_times(tmp_path / "fussy") if row["score"] is not None]
    expected = [
        row for row in without_times(tmp_path / "whole") if row["prompt_id"] not in ("p3", "p10")
    ]
    assert kept == expected
    for entry, before in zip(summary["agents"], whole["agents"], strict=True):
        assert (entry["prompts"], entry["failed"]) == (18, 2)
        assert (before["prompts"], before["failed"]) == (20, 0)
        own = {row["prompt_id"]: row["score"] for row in kept if row["agent"] == entry["agent"]}
        base = {row["prompt_id"]: row["score"] for row in kept if row["agent"] == "best-of-n"}
        assert entry["vs_best_of_n"]["prompts"] == 18
        assert entry["vs_best_of_n"]["difference"] == pytest.approx(
            np.mean([own[name] - base[name] for name in own])
        )


def test_a_prompt_that_failed_for_one_agent_leaves_both_sides_of_its_pair():
    def row(prompt_id, agent, score):
        usage = dict.fromkeys(
            ("generated_tokens", "prompt_tokens", "reward_calls", "value_calls", "flops"), 1
        )
        return {
            "prompt_id": prompt_id, "agent": agent, "score": score, "parts": {}, "usage": usage,
            "seconds": 1.0, "error": None if score is not None else "no",
        }  # fmt: skip

    rows = {
        "sampling": [row("a", "sampling", 1.0), row("b", "sampling", 5.0), row("c", "s", None)],
        "best-of-n": [row("a", "best-of-n", 3.0), row("b", "b", None), row("c", "b", 9.0)],
    }
    sampling, best = summarise(rows)
    assert (sampling["mean"], sampling["failed"]) == (3.0, 1)
    assert (best["mean"], best["failed"]) == (6.0, 1)
    assert sampling["vs_best_of_n"]["prompts"] == 1
    assert sampling["vs_best_of_n"]["difference"] == -2.0


def test_failures_are_counted_in_the_table(tmp_path):
    comparison = replace(toy_comparison(agents=("sampling",)), reward_model=Fussy({"p3"}))
    shown = shown_table(compare(comparison, tmp_path))
    assert "Prompts left out because scoring failed: sampling 1" in shown


def test_a_reward_that_scores_nothing_is_an_error(tmp_path):
    comparison = replace(toy_comparison(), reward_model=Fussy({prompt.id for prompt in PROMPTS}))
    with pytest.raises(CompareError, match=r"'sampling': none of 20 .*ZeroDivisionError: p\d+ is"):
        compare(comparison, tmp_path)


class Padding(CountReward):
    """A proxy that is exploited: it counts the letter, not its share."""

    name = "padding"

    def score(self, prompts, responses):
        return [float(len(response)) for response in responses]


def test_an_exploited_reward_is_warned_of(tmp_path):
    options = {"agents": ("sampling", "best-of-n"), "budget_tokens": 64, "max_response_tokens": 16}
    honest = compare(toy_comparison(**options), tmp_path / "honest")
    assert honest["warnings"] == []
    comparison = replace(
        toy_comparison(**options), reward_model=Padding(), gold_model=CountReward("b")
    )
    summary = compare(comparison, tmp_path / "exploited")
    assert any("The reward increases with length" in warning for warning in summary["warnings"])
    assert any(w.startswith("best-of-n: ") and "tokens" in w for w in summary["warnings"])
    rows = read_rows(tmp_path / "exploited" / "results.jsonl")
    for row in rows:
        assert row["gold"] == CountReward("b").score([None], [row["response"]])[0]
    for entry in summary["agents"]:
        own = [row["gold"] for row in rows if row["agent"] == entry["agent"]]
        assert entry["gold"] == pytest.approx(np.mean(own))
    shown = shown_table(summary)
    assert "mean count" in shown
    assert "Warning: The reward increases with length" in shown


def test_a_gold_reward_that_fails_or_does_not_apply_costs_its_score_alone(tmp_path):
    class Some(Fussy):
        def applies_to(self, prompt):
            return prompt.id != "p1"

    comparison = replace(toy_comparison(agents=("sampling",)), gold_model=Some({"p2"}))
    summary = compare(comparison, tmp_path)
    rows = {row["prompt_id"]: row for row in read_rows(tmp_path / "results.jsonl")}
    assert [name for name, row in rows.items() if row["gold"] is None] == ["p1", "p2"]
    assert all(row["score"] is not None for row in rows.values())
    assert summary["agents"][0]["failed"] == 0


def test_prompts_with_the_same_id_are_refused():
    with pytest.raises(CompareError, match=r"\['p0'\] more than once"):
        replace(toy_comparison(), prompts=[PROMPTS[0], PROMPTS[0]])


def test_a_reward_of_trl_is_compared_unchanged(tmp_path):
    rewards = pytest.importorskip("trl.rewards")

    def letters(text):
        return [ord(letter) for letter in text]

    function = rewards.get_repetition_penalty_reward(ngram_size=2)
    reward = as_reward_model(function, encode=letters)
    summary = compare(replace(toy_comparison(), reward_model=reward), tmp_path)
    assert summary["reward"] == "repetition_penalty_reward"
    for row in read_rows(tmp_path / "results.jsonl"):
        response = row["response"]
        completion = [[{"role": "assistant", "content": response}]]
        assert (
            row["score"]
            == function(
                prompts=[row["prompt"]], completions=completion, completion_ids=[letters(response)]
            )[0]
        )
    assert min(row["score"] for row in read_rows(tmp_path / "results.jsonl")) < 0


def test_an_agent_may_use_a_policy_of_its_own(tmp_path):
    tuned = NGramLM("abc", seed=11)
    spec = "best-of-n:policy=tuned"
    both = replace(toy_comparison(agents=("best-of-n", spec)), policies={"tuned": tuned})
    alone = replace(toy_comparison(agents=("best-of-n",)), language_model=tuned)
    rows = run(both, tmp_path / "both")
    [expected] = run(alone, tmp_path / "alone").values()
    assert [row["response"] for row in rows[spec]] == [row["response"] for row in expected]
    assert [row["response"] for row in rows["best-of-n"]] != [row["response"] for row in expected]
    with pytest.raises(CompareError, match="policies"):
        run(replace(both, policies={"tuned": tuned, "more": tuned}), tmp_path / "both")


def answered_for(tmp_path, prompts, **changes):
    comparison = replace(toy_comparison(agents=AGENTS[:2], **changes), prompts=prompts)
    compare(comparison, tmp_path)
    return without_times(tmp_path)


def test_more_prompts_are_added_and_fewer_are_served(tmp_path):
    whole = answered_for(tmp_path / "whole", PROMPTS)
    some = answered_for(tmp_path / "a", PROMPTS[:8])
    times = {row["seconds"] for row in read_rows(tmp_path / "a" / "results.jsonl")}
    assert answered_for(tmp_path / "a", PROMPTS) == whole
    kept = {row["seconds"] for row in read_rows(tmp_path / "a" / "results.jsonl")}
    assert times <= kept
    assert answered_for(tmp_path / "a", PROMPTS[:8]) == some
    # Other prompts between them, in another order.
    shuffled = [PROMPTS[i] for i in np.random.default_rng(0).permutation(20)]
    again = answered_for(tmp_path / "a", shuffled)
    assert [row["prompt_id"] for row in again[:20]] == [prompt.id for prompt in shuffled]
    assert answered_for(tmp_path / "a", PROMPTS) == whole


@pytest.mark.parametrize("change", ["empty", "cut off", "line less", "gone", "zeros"])
def test_a_damaged_part_is_made_again(tmp_path, change):
    whole = answered_for(tmp_path, PROMPTS)
    for path in sorted((tmp_path / "parts").iterdir())[1:3]:
        content = path.read_bytes()
        damaged = {
            "empty": b"",
            "cut off": content[: len(content) // 2],
            "line less": b"".join(content.splitlines(keepends=True)[:-1]),
            "zeros": bytes(len(content)),
        }
        if change == "gone":
            path.unlink()
        else:
            path.write_bytes(damaged[change])
    assert answered_for(tmp_path, PROMPTS) == whole
    assert answered_for(tmp_path, PROMPTS) == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": [Prompt.from_text("aba", id=p.id) for p in PROMPTS]},
        {"prompts": [replace(p, metadata={"reference_answer": "4"}) for p in PROMPTS]},
        {"language_model": NGramLM("abc", seed=4)},
        {"reward_model": CountReward("b")},
        {"gold_model": CountReward("b")},
        {"value_model": FixedValue(lambda text: text.count("b"), LM)},
        {"policies": {"other": NGramLM("abc", seed=4)}},
    ],
)
def test_rows_of_other_parts_are_not_taken(tmp_path, changes):
    run(toy_comparison(), tmp_path)
    with pytest.raises(CompareError, match="holds another comparison"):
        run(replace(toy_comparison(), **changes), tmp_path)


def test_a_comparison_that_cannot_be_run_leaves_the_folder_free(tmp_path):
    for bad in ({"agents": ("best-of-n:N=4",)}, {"budget_tokens": 7}, {"agents": ("nobody",)}):
        with pytest.raises(ValueError, match=r"N|too small|nobody"):
            run(toy_comparison(**bad), tmp_path / "a")
        assert not (tmp_path / "a").exists()
    run(toy_comparison(), tmp_path / "a")


def test_functions_names_and_texts_are_taken():
    config = toy_comparison().config
    found = Comparison(config, ["ab", "ba"], LM, lambda prompt, response: 1.0, gold_model="numeric")
    assert [prompt.id for prompt in found.prompts] == ["ab", "ba"]
    assert (found.record()["reward"], found.record()["gold"]) == ("<lambda>", "numeric")
    with pytest.raises(TypeError, match="Expected a reward, got None"):
        Comparison(config, PROMPTS, LM, None)

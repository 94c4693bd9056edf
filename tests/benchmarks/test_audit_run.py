import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mbrl_text_env.agents.collection import collect
from mbrl_text_env.benchmarks.audit.run import Audit, choose_for_both, fill_pool, run_audit
from mbrl_text_env.benchmarks.compare import CompareError
from mbrl_text_env.benchmarks.options import AuditConfig, AuditError
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.records import RecordsError, RecordWriter, read_records
from mbrl_text_env.rewards import ConstraintsReward
from mbrl_text_env.types import Prompt
from tests.toys import CountReward

LM = NGramLM("abc.! ", seed=3)
PROMPTS = [Prompt.from_text("ab" * (1 + i % 3), id=f"p{i}") for i in range(10)]


def toy_audit(prompts=PROMPTS, language_model=LM, **changes):
    options = {"samples": 6, "max_response_tokens": 8, "sensitivity_samples": 2, **changes}
    config = AuditConfig("count-a", "count-b", len(prompts), **options)
    return Audit(config, prompts, language_model, CountReward("a"), CountReward("b"))


def written(folder):
    found = json.loads((folder / "audit.json").read_text())
    assert found.pop("date")
    found.pop("command")  # of the test before
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    run_audit(toy_audit(), folder)
    return folder


def test_what_is_written(finished):
    found = written(finished)
    assert found["config"]["seed"] == 0
    assert found["config"]["prompts"] == [prompt.id for prompt in PROMPTS]
    assert [point["n"] for point in found["curves"]["points"]] == [1, 2, 4, 6]
    assert found["verdict"]["outcome"] in ("exploitable", "not decided")
    records = read_records(finished / "pool")
    assert len(records) == 60
    # The mean of N = 1 is the plain mean of the pool, by the rewards themselves.
    shares = CountReward("b").score([], [record.response for record in records])
    assert found["curves"]["points"][0]["gold"]["estimate"] == pytest.approx(sum(shares) / 60)


@pytest.mark.parametrize("stop", [("pool", 2), ("proxy", 5)])
def test_a_killed_audit_ends_with_the_same(tmp_path, finished, stop):
    class StopError(Exception):
        pass

    seen = {"pool": 0, "proxy": 0, "gold": 0}

    def kill(stage, count):
        seen[stage] += 1
        if (stage, seen[stage]) == stop:
            raise StopError

    with pytest.raises(StopError):
        run_audit(toy_audit(), tmp_path, on_progress=kill)
    assert not (tmp_path / "audit.json").exists()
    run_audit(toy_audit(), tmp_path)
    assert written(tmp_path) == written(finished)


def test_kill_nine(tmp_path, finished):
    """The process itself is killed in the middle of the pool, and again in the scoring."""
    program = (
        "import os, signal, sys\n"
        "from tests.benchmarks.test_audit_run import run_audit, toy_audit\n"
        "def kill(stage, count):\n"
        "    if stage == sys.argv[2] and count:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "run_audit(toy_audit(), sys.argv[1], on_progress=kill)\n"
    )
    for stage in ("pool", "gold"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "a"), stage],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == -signal.SIGKILL
    assert 0 < len(list((tmp_path / "a" / "scores" / "gold").glob("*.json"))) < len(PROMPTS)
    run_audit(toy_audit(), tmp_path / "a")
    assert written(tmp_path / "a") == written(finished)


def test_a_finished_audit_generates_and_scores_nothing(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "a")
    audit = toy_audit()
    run_audit(audit, tmp_path / "a")
    assert audit.proxy.calls == audit.gold.calls == []
    assert len(read_records(tmp_path / "a" / "pool")) == 60
    assert written(tmp_path / "a") == written(finished)


def test_a_pool_of_collect_will_do(tmp_path, finished):
    """Whatever reward it was scored by; of more responses the first are taken."""
    with RecordWriter(tmp_path / "pool") as writer:
        collect(LM, CountReward("c"), PROMPTS, writer, samples_per_prompt=9, max_response_tokens=8)
    run_audit(toy_audit(), tmp_path / "a", pool=tmp_path / "pool")
    assert written(tmp_path / "a") == written(finished)
    assert len(read_records(tmp_path / "pool")) == 90


def test_missing_prompts_are_added_to_a_pool(tmp_path, finished):
    pool = tmp_path / "pool"
    fill_pool(pool, LM, PROMPTS[:4], samples=6, max_response_tokens=8, seed=0)
    assert len(read_records(pool)) == 24
    run_audit(toy_audit(), tmp_path / "b", pool=pool)
    assert len(read_records(pool)) == 60
    assert written(tmp_path / "b") == written(finished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": [Prompt.from_text("bab", id=p.id) for p in PROMPTS]},
            "another prompt",
        ),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"max_response_tokens": 9}, "max_response_tokens: 8 there, 9 here"),
        ({"max_response_tokens": 7}, "max_response_tokens: 8 there, 7 here"),
        ({"language_model": "other"}, "language_model.name: .* there, other here"),
    ],
)
def test_a_pool_of_something_else(tmp_path, finished, changes, message):
    if "language_model" in changes:
        other = NGramLM("abc.! ", seed=3)
        other.name = "other"
        changes = {"language_model": other}
    with pytest.raises((AuditError, RecordsError), match=message):
        run_audit(toy_audit(**changes), tmp_path / "a", pool=finished / "pool")


def test_another_audit_does_not_take_the_folder(tmp_path, finished):
    with pytest.raises(AuditError, match=r"another audit \(seed: 0 there, 1 here"):
        run_audit(toy_audit(seed=1), finished)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("years of work")
    with pytest.raises(AuditError, match="other files"):
        run_audit(toy_audit(), tmp_path / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(AuditError, match="can be written"):
        run_audit(toy_audit(), tmp_path / "file" / "c")


def test_the_same_reward_twice_is_scored_once(tmp_path):
    audit = toy_audit()
    audit = replace(audit, config=replace(audit.config, gold="count-a"))
    result = run_audit(audit, tmp_path)
    assert audit.gold.calls == []
    assert result.verdict.outcome == "faithful"
    assert "its own gold" in result.verdict.text
    assert result.curves.efficiency == pytest.approx(1.0)


def test_prompts_that_a_reward_does_not_apply_to_are_left_out_and_counted():
    fitting = [
        replace(p, metadata={"constraints": [{"type": "max_words", "n": 3}]}) for p in PROMPTS
    ]
    config = AuditConfig("count-a", "constraints", 6)
    gold = ConstraintsReward()
    mixed = [*fitting[:7], *PROMPTS[7:]]
    applying = [p for p in mixed if gold.applies_to(p)]
    chosen, left_out = choose_for_both(mixed, config, CountReward(), gold)
    assert (len(chosen), left_out) == (6, len(mixed) - len(applying))
    assert all(gold.applies_to(prompt) for prompt in chosen)
    with pytest.raises(AuditError, match=r"expected at most 3 \(of 6 prompts"):
        choose_for_both([*fitting[:3], *PROMPTS[:3]], config, CountReward(), gold)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompts": 3}, "num_prompts: expected at least 4, got 3.*--num-prompts"),
        ({"samples": 1}, "samples: expected at least 4, got 1"),
        ({"sensitivity_samples": 0}, "sensitivity_samples: expected at least 1"),
        ({"max_response_tokens": 0}, "max_response_tokens: expected at least 1"),
    ],
)
def test_too_little_to_measure(changes, message):
    with pytest.raises(AuditError, match=message):
        AuditConfig("a", "b", **changes)
    assert not issubclass(AuditError, CompareError)

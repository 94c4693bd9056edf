"""Work on Ray actors: the rows of one process, also when a worker or the driver is killed."""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from mbrl_text_env._lazy import MissingExtraError
from mbrl_text_env.agents import make as make_agent
from mbrl_text_env.agents.collection import collect
from mbrl_text_env.agents.learning.answers import collect_answers
from mbrl_text_env.benchmarks.cli import app
from mbrl_text_env.benchmarks.compare import compare, read_rows
from mbrl_text_env.language_models import ModelLoadError
from mbrl_text_env.records import RecordWriter, read_records
from mbrl_text_env.types import Budget
from mbrl_text_env.workers import RayWorkers, WorkerError, _Worker
from tests.benchmarks.test_compare import LM, PROMPTS, toy_comparison, without_times
from tests.benchmarks.test_train import shared, words_of, world  # noqa: F401 - a fixture
from tests.toys import CountReward, Deadly

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workers():
    pytest.importorskip("ray")
    with RayWorkers("local", 2) as found:
        yield found


def test_a_cluster_that_is_not_there():
    pytest.importorskip("ray")
    for address in ("127.0.0.1:1", "nonsense"):
        with pytest.raises(WorkerError, match=rf"Ray at '{address}': expected a cluster to join"):
            RayWorkers(address, 1).__enter__()


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"'ray' to be installed.*mbrl-text-env\[ray\]"):
        RayWorkers("local", 1).__enter__()


@pytest.fixture
def deadly(tmp_path):
    (tmp_path / "mark").touch()
    return Deadly(str(tmp_path / "mark"))


def test_a_comparison_with_a_worker_that_is_killed(workers, deadly, tmp_path):
    compare(toy_comparison(), tmp_path / "whole")
    counts = []
    with pytest.warns(UserWarning, match="A worker was lost while doing job"):
        compare(
            replace(toy_comparison(), reward_model=deadly),
            tmp_path / "ray",
            on_batch=lambda spec, count, rows: counts.append(len(rows)),
            each=workers,
        )
    assert not Path(deadly.mark).exists()
    assert without_times(tmp_path / "ray") == without_times(tmp_path / "whole")
    assert sum(counts) == 3 * len(PROMPTS)


def rows_of(folder):
    return [
        {**vars(record), "usage": {**record.usage, "seconds": 0}} for record in read_records(folder)
    ]


def test_a_collection_with_a_worker_that_is_killed(workers, deadly, tmp_path):
    options = {"batch_prompts": 3, "max_response_tokens": 6, "samples_per_prompt": 2}
    with RecordWriter(tmp_path / "whole") as writer:
        collect(LM, CountReward(), PROMPTS, writer, **options)
    with RecordWriter(tmp_path / "ray") as writer:
        with pytest.warns(UserWarning, match="A worker was lost"):
            collect(LM, deadly, PROMPTS[:14], writer, **options, each=workers)
        collect(LM, deadly, PROMPTS, writer, **options, each=workers)
    found = sorted(
        rows_of(tmp_path / "ray"), key=lambda row: (int(row["prompt_id"][1:]), row["sample"])
    )
    assert found == rows_of(tmp_path / "whole")


def test_answers_to_learn_from_have_the_order_of_one_process(workers, deadly, tmp_path):
    def answered(reward, name, **options):
        agent = make_agent("best-of-n:n=2", LM, reward, max_response_tokens=6)
        with RecordWriter(tmp_path / name) as writer:
            collect_answers(
                agent,
                PROMPTS,
                writer,
                answers=2,
                budget=Budget(tokens=20),
                batch_prompts=3,
                **options,
            )
        return rows_of(tmp_path / name)

    with pytest.warns(UserWarning, match="A worker was lost"):
        found = answered(deadly, "ray", each=workers)
    assert found == answered(CountReward(), "whole")


SCRIPT = """
import sys
from mbrl_text_env.benchmarks.compare import compare
from mbrl_text_env.workers import RayWorkers
from tests.benchmarks.test_compare import toy_comparison
with RayWorkers("local", 2) as workers:
    compare(toy_comparison(), sys.argv[1], on_batch=lambda *a: print(flush=True), each=workers)
"""


def test_the_driver_is_killed_and_started_again(workers, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-c", SCRIPT, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as driver:
        for _ in range(3):
            assert driver.stdout.readline()
        begun = psutil.Process(driver.pid).children(recursive=True)
        workers_of = [process for process in begun if "_Worker" in process.name()]
        driver.kill()
    assert workers_of
    _, alive = psutil.wait_procs(workers_of, timeout=60)
    assert not alive, "its workers end with it"
    there = sum(len(read_rows(part)) for part in (out / "parts").iterdir())
    assert 0 < there <= 3 * len(PROMPTS)
    compare(toy_comparison(), out, each=workers)
    compare(toy_comparison(), tmp_path / "whole")
    assert without_times(out) == without_times(tmp_path / "whole")


def run(words):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output


RAY = ("--ray", "local", "--ray-workers", 2)


def test_commands_with_a_model_and_a_reward_from_files(workers, world, tmp_path):  # noqa: F811
    small = ["--num-prompts", 6, "--batch-prompts", 2, "--max-response-tokens", 6, *shared(world)]
    agents = ["--agents", "sampling,best-of-n", "--budget-tokens", 24]
    for name, ray in (("whole", ()), ("ray", RAY)):
        run(["compare", *agents, *small, *ray, "--out", tmp_path / name / "compare"])
        run(["collect", *small, *ray, "--out", tmp_path / name / "collect"])
    whole, found = tmp_path / "whole", tmp_path / "ray"
    assert without_times(found / "compare") == without_times(whole / "compare")
    by_sample = [sorted(map(str, rows_of(folder / "collect"))) for folder in (found, whole)]
    assert by_sample[0] == by_sample[1]


def test_expert_iteration(workers, world, tmp_path):  # noqa: F811
    run([*words_of(world, "expert-iteration", tmp_path / "whole")])
    run([*words_of(world, "expert-iteration", tmp_path / "ray"), *RAY])
    for path in (tmp_path / "whole" / "loop").glob("*/validation"):
        own = tmp_path / "ray" / path.relative_to(tmp_path / "whole")
        texts = [[(r["prompt_id"], r["response"]) for r in rows_of(p)] for p in (own, path)]
        assert texts[0] == texts[1]
    result = CliRunner().invoke(app, list(map(str, ["train", "ppo", *RAY])))
    assert (result.exit_code, "expected the algorithm" in result.output) == (2, True)


def test_what_the_work_raises_is_raised(workers):
    def raising_at_three(job):
        if job == 3:
            raise ModelLoadError("no model at 3")

    with pytest.raises(ModelLoadError, match="no model at 3"):
        list(workers(raising_at_three, [1, 3]))
    assert sorted(workers(functools.partial(max, 4), [3, 5, 6])) == [(0, 4), (1, 5), (2, 6)]


@pytest.mark.filterwarnings("ignore:A worker was lost")
def test_a_job_that_kills_its_workers_is_given_up(workers):
    def dying_at_one(job):
        if job == 1:
            os._exit(1)

    with pytest.raises(WorkerError, match=r"3 workers were lost while doing job 1.*memory"):
        list(workers(dying_at_one, [0, 1, 2]))


def test_files_that_differ_and_rooms_that_are_too_small(workers, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("")
    for name in (path, tmp_path / "other.py"):
        packed = workers._ray.put(({str(name): "another digest"}, b""))
        with pytest.raises(WorkerError, match=rf"{name.name}: expected the file that the rewards"):
            _Worker([packed]).begin()
    with pytest.raises(WorkerError, match=r"expected 5000 GPUs for 1 workers, got \d+\. Ask"):
        RayWorkers("local", 1, gpus_per_worker=5000).__enter__()

"""The overhead of Ray workers: bytes and driver seconds per prompt, and one worker vs. no Ray.

All with the embedded model. Times are CPU seconds, since other programs can share the machine. For
a worker they include all Ray processes, from the end of the first batch to that of the last, which
excludes loading.

    python -m mbrl_text_env.benchmarks.studies.scaling_out --json scaling-out.json
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
import typer

from mbrl_text_env.agents.collection import collect
from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.compare import Comparison, run, write_results
from mbrl_text_env.benchmarks.friendly import friendly, option
from mbrl_text_env.benchmarks.studies import harness
from mbrl_text_env.language_models import embedded
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.records import RecordWriter
from mbrl_text_env.rewards import make
from mbrl_text_env.runs import Each, in_turn
from mbrl_text_env.types import Prompt
from mbrl_text_env.workers import RayWorkers

Row = dict[str, Any]


def cpu_seconds() -> float:
    """CPU seconds of this process and its running descendants."""
    own = psutil.Process()
    found = [p.cpu_times() for p in (own, *own.children(recursive=True))]
    return sum(times.user + times.system for times in found)


def measured(comparison: Comparison, each: Each) -> dict[str, float]:
    """CPU and wall seconds of a comparison from its first batch to its last."""
    marks: list[tuple[float, float]] = []

    def mark(spec: str, count: int, rows: list[Row]) -> None:
        marks.append((cpu_seconds(), time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        run(comparison, Path(folder) / "out", on_batch=mark, each=each)
    cpu, wall = (last - first for first, last in zip(marks[0], marks[-1], strict=True))
    return {"cpu": cpu, "wall": wall}


def weighed(sizes: list[tuple[int, int]]) -> Each:
    """Run jobs like `in_turn`, and record the pickled size of each job and result."""

    def each(work: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for place, result in in_turn(work, jobs):
            out, back = (len(ray.cloudpickle.dumps(each)) for each in (jobs[place], result))
            sizes.append((out, back))
            yield place, result

    return each


def bytes_on_the_wire(comparison: Comparison) -> dict[str, Any]:
    """Mean bytes per prompt and agent of a comparison, and per prompt of `collect`."""
    sizes: dict[str, list[tuple[int, int]]] = {"compare": [], "collect": []}
    prompts, models = comparison.prompts, (comparison.language_model, comparison.reward_model)
    with tempfile.TemporaryDirectory() as folder:
        run(comparison, Path(folder) / "compare", each=weighed(sizes["compare"]))
        with RecordWriter(Path(folder) / "collect") as writer:
            limit = comparison.config.max_response_tokens
            each = weighed(sizes["collect"])
            collect(*models, prompts, writer, max_response_tokens=limit, each=each)
    found = {}
    for name, pairs in sizes.items():
        out, back = (sum(column) / len(prompts) for column in zip(*pairs, strict=True))
        found[name] = {"to_worker": out, "from_worker": back}
    return found


def canned(row: Row, job: tuple[str, Sequence[Prompt]]) -> list[Row]:
    """Return the same answer to every prompt of a batch, as if models took no time."""
    spec, prompts = job
    return [{**row, "prompt_id": prompt.id, "agent": spec} for prompt in prompts]


def driver(comparison: Comparison, row: Row, count: int, each: Each) -> dict[str, float]:
    """CPU time and memory of a driver per prompt, with workers that take no time."""
    prompts = [Prompt.from_text(f"Number {i}.", id=f"p{i}") for i in range(count)]
    config = replace(comparison.config, batch_prompts=32)
    before, start, marks = psutil.Process().memory_info().rss, time.process_time(), []

    def instead(work: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterable[tuple[int, Any]]:
        marks.append(time.process_time())
        return each(partial(canned, row), jobs)

    with tempfile.TemporaryDirectory() as folder:
        rows = run(replace(comparison, config=config, prompts=prompts), Path(folder), each=instead)
        end, kept = time.process_time(), psutil.Process().memory_info().rss - before
        write_results(Path(folder), comparison.record(), rows, {})
        written = time.process_time()
        sizes = [path.stat().st_size for path in Path(folder).rglob("*.jsonl")]
    assert sum(map(len, rows.values())) == count
    return {
        "prompts": count,
        "before_ms": (marks[0] - start) / count * 1e3,
        "rows_ms": (end - marks[0]) / count * 1e3,
        "report_ms": (written - end) / count * 1e3,
        "memory_bytes": kept / count,
        "disk_bytes": sum(sizes) / count,
    }


@friendly
def main(
    json_file: Path | None = option(None, harness.JSON),
    num_prompts: int = option(64, options.NUM_PROMPTS),
    rounds: int = option(3, "Rounds; each measures both ways.", min=1),
    many: int = option(20000, "Prompts for the driver measurement.", min=32),
) -> None:
    """Measure and print the overhead of Ray; takes about ten minutes."""
    config = options.CompareConfig(
        ("best-of-n:n=4",), budget_tokens=400, max_response_tokens=48, batch_prompts=4
    )
    prompts = load_prompts(split="test")[:num_prompts]
    comparison = Comparison(config, prompts, embedded(), make("sentiment"))
    sizes = bytes_on_the_wire(comparison)
    with tempfile.TemporaryDirectory() as folder:
        [[row, *_]] = run(replace(comparison, prompts=prompts[:4]), Path(folder)).values()
    local = driver(comparison, row, many, in_turn)
    beside: list[Row] = []
    with RayWorkers("local", 1) as worker:
        spread = driver(comparison, row, many, worker)
        for _ in range(rounds):
            one, ray_one = (measured(comparison, each) for each in (in_turn, worker))
            beside.append({"process": one, "worker": ray_one})
    ratios = {
        kind: [pair["worker"][kind] / pair["process"][kind] for pair in beside]
        for kind in ("cpu", "wall")
    }
    result = {
        **harness.heading("scaling_out"),
        "bytes_a_prompt": sizes,
        "driver": {"alone": local, "with one worker": spread},
        "one_worker": {"prompts": len(prompts), "rounds": beside, "ratios": ratios},
    }
    print(json.dumps(result, indent=1))
    harness.write(json_file, result)


if __name__ == "__main__":
    typer.run(main)

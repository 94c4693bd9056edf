"""Run on several machines: Ray workers, and merging the shards of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from mbrl_text_env.benchmarks.friendly import friendly, option
from mbrl_text_env.benchmarks.options import CompareError
from mbrl_text_env.benchmarks.terminal import console
from mbrl_text_env.runs import CONFIG, Each, claimed, in_turn, read_config, refuse_others, writing

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Options of the workers."""

    panel: ClassVar[str] = "Ray"

    ray: str | None = option(
        None, "Ray cluster: 'auto' or HOST:PORT; 'local' starts one on this machine."
    )
    ray_workers: int | None = option(None, "Number of workers; each loads its own models.", min=1)
    gpus_per_worker: float = option(0.0, "GPUs per worker; 0.5 shares a GPU between two.", min=0.0)

    def __post_init__(self) -> None:
        if (self.ray is None) != (self.ray_workers is None):
            raise typer.BadParameter(
                f"--ray ADDRESS and --ray-workers N: expected both or neither, got {self.ray!r} "
                f"and {self.ray_workers!r}."
            )
        if self.ray is None and self.gpus_per_worker:
            raise typer.BadParameter("--gpus-per-worker: expected --ray ADDRESS too, got none.")

    @contextmanager
    def each(self) -> Iterator[Each]:
        """Run jobs in this process, or on workers that stop when the block ends."""
        if self.ray is None or self.ray_workers is None:
            yield in_turn
            return
        from mbrl_text_env.workers import RayWorkers

        with RayWorkers(self.ray, self.ray_workers, gpus_per_worker=self.gpus_per_worker) as each:
            yield each


@friendly
def merge_command(
    folders: Annotated[list[Path], typer.Argument(help="The --out of each `compare --shard`.")],
    *,
    out: Path = option(..., "Output folder of the merged comparison."),
) -> None:
    """Merge the shards of a comparison (`compare --shard i/n`)."""
    from mbrl_text_env.benchmarks.report import table

    summary = merge(folders, out)
    console.print(table(summary))
    console.print(f"results.jsonl, summary.json and report.html: {out.resolve()}")
    if any(entry["failed"] for entry in summary["agents"]):
        raise typer.Exit(1)


def merge(folders: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """Merge the folders of all shards into the folder that a single `compare` would have made.

    The rows are those of the single run, except for seconds, and the same `compare` without a shard
    can resume it. Returns the content of `summary.json`.

    Raises:
        CompareError: The folders are not all shards of one comparison, each once and complete, or
            `out` holds another comparison.

    Example:
        >>> merge(["shard-1", "shard-2"], "whole")["agents"][0]["agent"]  # doctest: +SKIP
        'sampling'
    """
    from mbrl_text_env.benchmarks.compare import PARTS, write_results, write_rows
    from mbrl_text_env.benchmarks.page import provenance

    about = provenance()
    config, shards = _shards([Path(folder) for folder in folders])
    parts: dict[str, list[Row]] = {}
    for index, folder in shards.items():
        for name, rows in _rows_of(folder, index, len(shards), config).items():
            parts.setdefault(name, []).extend(rows)
    found = {(row["agent"], row["prompt_id"]): row for part in parts.values() for row in part}
    record = {key: value for key, value in config.items() if key != "models"}
    record["prompts"] = list(config["prompts"])
    ordered = {s: [found[s, name] for name in record["prompts"]] for s in config["agents"]}
    with claimed(out, config, "comparison", CompareError):
        with writing(out, CompareError):
            for name, rows in parts.items():
                write_rows(Path(out) / PARTS / name, rows)
        return write_results(Path(out), record, ordered, about)


def _shards(folders: Sequence[Path]) -> tuple[dict[str, Any], dict[int, Path]]:
    """The config that the shards share, and the folder of each shard by its number."""
    from mbrl_text_env.benchmarks.page import reading

    shared: dict[str, Any] = {}
    found: dict[int, Path] = {}
    for folder in folders:
        if not (folder / CONFIG).is_file():
            raise CompareError(
                f"{folder}: expected the folder of `compare --shard i/n`, got none of its files. "
                "Give the --out of each shard."
            )
        config = read_config(folder / CONFIG, CompareError)
        with reading(folder):
            shard = config.pop("shard", "1/1")
            index, config["shards"] = map(int, shard.split("/"))
            # Check the keys that are read below.
            _ = list(config["agents"]), config["prompts"].keys(), config["batch_prompts"] > 0
        if shard == "1/1":
            raise CompareError(
                f"{folder} holds a whole comparison: expected one of several shards. Merge the "
                "folders of `compare --shard i/n`, each with the same n."
            )
        shared = shared or config
        refuse_others(folder, config, shared, f"comparison than {folders[0]}", CompareError)
        if index in found:
            raise CompareError(
                f"{found[index]} and {folder} both hold shard {shard}: expected each once."
            )
        found[index] = folder
    count = shared.pop("shards", 0)
    if missing := [f"{index}/{count}" for index in range(1, count + 1) if index not in found]:
        raise CompareError(
            f"Expected the folders of all {count} shards, got none of {', '.join(missing)}. Give "
            "them too, or run `compare --shard` for the missing ones first."
        )
    return shared, dict(sorted(found.items()))


def _rows_of(
    folder: Path, index: int, count: int, config: Mapping[str, Any]
) -> dict[str, list[Row]]:
    """The rows of a shard by part; a CompareError unless it has each of its rows exactly once."""
    from mbrl_text_env.benchmarks.compare import PARTS, read_parts

    with writing(folder, CompareError):
        parts = read_parts(folder / PARTS)
    prompts, size = list(config["prompts"]), config["batch_prompts"]
    starts = range(0, len(prompts), size)[index - 1 :: count]
    own = [name for start in starts for name in prompts[start : start + size]]
    missing = dict.fromkeys((spec, name) for spec in config["agents"] for name in own)
    for file, rows in parts.items():
        for key in ((row["agent"], row["prompt_id"]) for row in rows):
            if key not in missing:
                raise CompareError(
                    f"{folder / PARTS / file} holds the answer of {key[0]!r} to prompt {key[1]!r}: "
                    f"expected those of shard {index}/{count}, each once. Remove the file if it "
                    "was copied there, and run the shard's command again."
                )
            del missing[key]
    for spec, name in missing:
        raise CompareError(
            f"{folder}: expected all answers of shard {index}/{count}, {len(missing)} are missing, "
            f"the first is that of {spec!r} to prompt {name!r}. Run the shard's command again: it "
            "resumes, and repeats damaged answers."
        )
    return parts

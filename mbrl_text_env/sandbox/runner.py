"""Run untrusted programs, each in a box of its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from mbrl_text_env.sandbox import _box
from mbrl_text_env.sandbox._facilities import facilities
from mbrl_text_env.sandbox.programs import (
    Limits,
    Program,
    ProgramResult,
    SandboxUnavailable,
    SandboxWarning,
)


def run_program(
    source: str,
    *,
    stdin: str = "",
    files: Mapping[str, str | bytes] | None = None,
    limits: Limits | None = None,
    allow_weaker: bool = False,
) -> ProgramResult:
    """Run an untrusted Python program in a box of its own; see the package for what that is.

    Args:
        source: The program. It runs with the standard library alone, hash seed 0 and UTF-8.
        stdin: What it reads from standard input.
        files: Texts or bytes by their paths in the program's folder, which is empty otherwise.
        limits: None for `Limits()`.
        allow_weaker: If this machine lacks what the sandbox needs, run the program with limits and
            a process group alone, warning once. It can then read, write and connect to whatever the
            caller can. Where nothing is lacking this changes nothing.

    Raises:
        SandboxUnavailable: The machine lacks something, and `allow_weaker` is False.
        SandboxError: The box could not be built, or its supervisor died.

    Example:
        >>> run_program("print(6 * 7)").stdout  # doctest: +SKIP
        '42\\n'
    """
    program = Program(source, stdin, files or {})
    return _box.run(program, limits or Limits(), _is_strong(allow_weaker))


def run_programs(
    programs: Sequence[Program],
    *,
    limits: Limits | None = None,
    workers: int | None = None,
    allow_weaker: bool = False,
) -> list[ProgramResult]:
    """Run programs, several at a time; the results are in the order of the programs.

    Args:
        programs: The programs; each has a box of its own.
        limits: The limits of those that have none of their own; None for `Limits()`.
        workers: How many run at a time; None for as many as this process has processors.
        allow_weaker: See `run_program`.

    Raises:
        SandboxUnavailable: As by `run_program`.
        SandboxError: As by `run_program`; the programs that have not started are not run.
        ValueError: `workers` is less than 1.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"Expected workers to be at least 1, or None, got {workers}.")
    if not programs:
        return []
    strong = _is_strong(allow_weaker)
    count = min(workers or _processors(), len(programs))
    with ThreadPoolExecutor(count, thread_name_prefix="sandbox") as pool:
        runs = [
            pool.submit(_box.run, each, each.limits or limits or Limits(), strong)
            for each in programs
        ]
        try:
            return [run.result() for run in runs]
        finally:
            for run in runs:
                run.cancel()


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_strong(allow_weaker: bool) -> bool:
    missing = [facility for facility in facilities() if facility.problem]
    if not missing:
        return True
    listed = "\n".join(f"- {each.name}: {each.problem}. {each.remedy}" for each in missing)
    if not allow_weaker:
        raise SandboxUnavailable(
            "Expected a machine on which untrusted code can be shut in, and this one lacks:\n"
            f"{listed}\nUse another machine, or pass allow_weaker=True to run the code without "
            "protection but for limits: only code that you would run without a sandbox."
        )
    _warn_once(listed)
    return False


@lru_cache(maxsize=1)
def _warn_once(listed: str) -> None:
    warnings.warn(
        "Untrusted code is run with limits and a process group alone: it can read, write and "
        f"connect to whatever you can. This machine lacks:\n{listed}",
        SandboxWarning,
        stacklevel=4,
    )

"""Run untrusted programs, each in a box of its own, on machines that have what a box needs."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mbrl_text_env.sandbox import _kernel
from mbrl_text_env.sandbox.programs import (
    Limits,
    Program,
    ProgramResult,
    SandboxError,
    SandboxUnavailable,
    SandboxWarning,
    probe,
    run,
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
            a process group alone, warning once: it can read, write and connect to whatever the
            caller can. Where nothing is lacking this changes nothing.

    Raises:
        SandboxUnavailable: The machine lacks something, and `allow_weaker` is False.
        SandboxError: The box could not be built, or its supervisor died.

    Example:
        >>> run_program("print(6 * 7)").stdout  # doctest: +SKIP
        '42\\n'
    """
    program = Program(source, stdin, files or {})
    return run(program, limits or Limits(), _is_strong(allow_weaker))


def run_programs(
    programs: Sequence[Program],
    *,
    limits: Limits | None = None,
    workers: int | None = None,
    allow_weaker: bool = False,
) -> list[ProgramResult]:
    """Run programs, several at a time; results are in their order, errors as by `run_program`.

    Args:
        programs: The programs; each has a box of its own. After an error no more are started.
        limits: The limits of those that have none of their own; None for `Limits()`.
        workers: How many run at a time; None for as many as this process has processors.
        allow_weaker: See `run_program`.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"Expected workers to be at least 1, or None, got {workers}.")
    if not programs:
        return []
    strong = _is_strong(allow_weaker)
    has_affinity = hasattr(os, "sched_getaffinity")
    processors = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    count = min(workers or processors, len(programs))
    with ThreadPoolExecutor(count, thread_name_prefix="sandbox") as pool:
        runs = [
            pool.submit(run, each, each.limits or limits or Limits(), strong) for each in programs
        ]
        try:
            return [each.result() for each in runs]
        finally:
            for each in runs:
                each.cancel()


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


@dataclass(frozen=True)
class Facility:
    """Something that a sandbox needs of a machine.

    `problem` is why it cannot be used, "" if it can, and `remedy` what to do then.
    """

    name: str
    problem: str
    remedy: str


@lru_cache(maxsize=1)
def facilities() -> tuple[Facility, ...]:
    """All that a sandbox needs, and whether this machine has it; looked at once a process."""
    found = _of_the_system()
    if any(facility.problem for facility in found):
        return found
    try:
        reasons = probe()
    except SandboxError as error:
        # Our own mistake, or an interpreter that does not start without its environment.
        remedy = "Use another interpreter, or report it."
        return (*found, Facility("a helper process", str(error), remedy))
    remedy = (
        "Set the sysctl user.max_user_namespaces above 0, and kernel.unprivileged_userns_clone to "
        "1 where it exists; in a container, allow `unshare` in its seccomp profile."
    )
    for name in _kernel.NAMESPACES:
        found += (Facility(f"{name} namespaces", reasons.get(name, ""), remedy),)
    return found if reasons else (*found, _whole())


def _of_the_system() -> tuple[Facility, ...]:
    machine, release, is_linux = platform.machine(), platform.release(), sys.platform == "linux"
    numbers = [int(part) if part.isdigit() else 0 for part in release.split("-")[0].split(".")[:2]]
    known = ", ".join(_kernel.MACHINES)
    unknown = "" if machine in _kernel.MACHINES else f"the calls of {machine} are not in our table"
    # Older kernels count the processes of a user over all boxes together.
    old = "" if not is_linux or numbers >= [5, 14] else f"this is Linux {release}"
    other = "" if is_linux else f"this is {sys.platform}"
    found = [
        Facility("Linux", other, "Use Linux, a virtual machine or WSL 2."),
        Facility("a known processor", unknown, f"Use one of: {known}."),
        Facility("Linux 5.14 or newer", old, "Use a newer kernel."),
    ]
    for name, path, option in (
        ("seccomp filters", "/proc/sys/kernel/seccomp/actions_avail", "CONFIG_SECCOMP_FILTER"),
        ("lists of children", f"/proc/self/task/{os.getpid()}/children", "CONFIG_PROC_CHILDREN"),
    ):
        problem = "" if Path(path).exists() else f"{path} is missing"
        found.append(Facility(name, problem, f"Use a kernel with {option}."))
    return tuple(found)


def _whole() -> Facility:
    """Whether a program really runs: mounts, ids and filters may be refused all the same."""
    problem = ""
    try:
        result = run(Program("import math\nprint(6 * 7)"), Limits(), strong=True)
        if result.stdout != "42\n" or result.exit_code != 0:
            problem = f"a trial program ended with {result.exit_code}: {result.stderr[-300:]!r}"
    except SandboxError as error:
        problem = str(error)
    return Facility(
        "a box that works",
        problem,
        "On Ubuntu, set the sysctl kernel.apparmor_restrict_unprivileged_userns to 0; in a "
        "container, allow `mount` and `pivot_root`, and give it more than one user id.",
    )

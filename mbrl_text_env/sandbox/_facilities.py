"""What this machine has of that which a sandbox needs."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mbrl_text_env.sandbox import _box, _kernel
from mbrl_text_env.sandbox.programs import SandboxError


@dataclass(frozen=True)
class Facility:
    """Something that a sandbox needs of a machine.

    Args:
        name: What it is.
        problem: Why it cannot be used, or "" if it can.
        remedy: What to do where it cannot.
    """

    name: str
    problem: str
    remedy: str


@lru_cache(maxsize=1)
def facilities() -> tuple[Facility, ...]:
    """Everything that a sandbox needs, and whether this machine has it; looked at once a process.

    Example:
        >>> [facility.name for facility in facilities() if facility.problem]  # doctest: +SKIP
        []
    """
    first = (_system(), _machine(), _release(), _filters(), _process_lists())
    if any(facility.problem for facility in first):
        return first
    try:
        spaces = _namespaces()
    except SandboxError as error:
        # Our own mistake, or an interpreter that does not start without its environment.
        supervisor = Facility(
            "a helper process", str(error), "Use another interpreter, or report it."
        )
        return (*first, supervisor)
    if any(facility.problem for facility in spaces):
        return first + spaces
    return (*first, *spaces, _whole())


def _system() -> Facility:
    problem = "" if sys.platform == "linux" else f"this is {sys.platform}"
    return Facility("Linux", problem, "Use Linux, a virtual machine or WSL 2.")


def _machine() -> Facility:
    machine = platform.machine()
    problem = "" if machine in _kernel.MACHINES else f"the calls of {machine} are not in our table"
    return Facility("a known processor", problem, f"Use one of: {', '.join(_kernel.MACHINES)}.")


def _release() -> Facility:
    release = platform.release()
    numbers = [int(part) if part.isdigit() else 0 for part in release.split("-")[0].split(".")[:2]]
    problem = "" if sys.platform != "linux" or numbers >= [5, 14] else f"this is Linux {release}"
    # Older kernels count the processes of a user over all boxes together.
    return Facility("Linux 5.14 or newer", problem, "Use a newer kernel.")


def _filters() -> Facility:
    present = Path("/proc/sys/kernel/seccomp/actions_avail").exists()
    problem = "" if present else "/proc/sys/kernel/seccomp is missing"
    return Facility("seccomp filters", problem, "Use a kernel with CONFIG_SECCOMP_FILTER.")


def _process_lists() -> Facility:
    present = Path(f"/proc/self/task/{os.getpid()}/children").exists()
    problem = "" if present else "/proc/<pid>/task/<tid>/children is missing"
    return Facility("lists of children", problem, "Use a kernel with CONFIG_PROC_CHILDREN.")


def _namespaces() -> tuple[Facility, ...]:
    reasons = _box.probe()
    names = ("user", "PID", "mount", "network", "IPC", "UTS", "cgroup")
    return tuple(
        Facility(
            f"{name} namespaces",
            reasons.get(name, ""),
            "Set the sysctl user.max_user_namespaces above 0, and kernel.unprivileged_userns_clone "
            "to 1 where it exists; in a container, allow `unshare` in its seccomp profile.",
        )
        for name in names
    )


def _whole() -> Facility:
    """Whether a program really runs: mounts, ids and filters may be refused all the same."""
    problem = ""
    try:
        result = _box.run_trial()
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

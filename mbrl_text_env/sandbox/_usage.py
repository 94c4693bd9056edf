"""What a process and all below it have used so far, as the kernel tells in /proc."""

# ruff: noqa: PTH123, PTH208 - importing pathlib would take as long as the rest of the supervisor.

from __future__ import annotations

import os


def usage_of(first: int) -> tuple[float, int]:
    """Processor seconds and bytes of memory of a process and all below it."""
    ticks = memory = 0
    waiting = [str(first)]
    while waiting:
        folder = f"/proc/{waiting.pop()}"
        try:
            with open(folder + "/stat", "rb") as file:
                # utime, stime, cutime, cstime; the name before the bracket may contain anything.
                ticks += sum(map(int, file.read().rpartition(b")")[2].split()[11:15]))
            tasks = [f"{folder}/task/{task}" for task in os.listdir(folder + "/task")]
            memory += max(map(_memory_of, tasks), default=0)
            for task in tasks:
                with open(task + "/children") as file:
                    waiting += file.read().split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # It has just ended.
    return ticks / os.sysconf("SC_CLK_TCK"), memory


def _memory_of(task: str) -> int:
    """Bytes of memory of a thread's process; 0 if the thread has ended, be it the main one."""
    with open(task + "/status", "rb") as file:
        lines = file.read().splitlines()
    # Memory may be shared between the processes of a box, but not the files of the interpreter.
    kinds = (b"RssAnon:", b"RssShmem:")
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kinds))

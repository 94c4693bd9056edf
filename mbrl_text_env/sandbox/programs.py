"""What is run in a sandbox, with which limits, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

MIB = 1 << 20

Reason = Literal["wall", "cpu", "memory", "output"]
"""The limit for which a program was ended."""


class SandboxError(RuntimeError):
    """A program could not be run, through no fault of its own."""


class SandboxUnavailable(SandboxError):  # noqa: N818 - a state of the machine, not a mistake
    """This machine lacks something that the sandbox needs; the message names each and a remedy."""


class SandboxWarning(UserWarning):
    """A program is run with less protection than the sandbox gives, as was asked for."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        cpu_seconds: Processor time of all its processes together, measured every 20 ms.
        wall_seconds: Time from its start to its end.
        memory_bytes: Address space of each process (RLIMIT_AS), and private resident memory of all
            together (measured every 20 ms). An interpreter takes about 20 MiB.
        disk_bytes: All that it writes to its folder, /tmp and /dev/shm together, and the size of
            one file.
        max_files: Files and folders there.
        processes: Processes and threads at one time, itself included.
        output_bytes: Standard output and standard error together.

    Raises:
        ValueError: A limit is not positive.

    Example:
        >>> Limits(cpu_seconds=1, wall_seconds=2).memory_bytes == 256 * 2**20
        True
    """

    cpu_seconds: float = 5.0
    wall_seconds: float = 10.0
    memory_bytes: int = 256 * MIB
    disk_bytes: int = 16 * MIB
    max_files: int = 256
    processes: int = 16
    output_bytes: int = MIB

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < 2**62:
                raise ValueError(f"Limits: expected {name} to be positive and finite, got {value}.")


@dataclass(frozen=True)
class Program:
    """A Python program, what it reads, and the files that it finds in its folder.

    Args:
        source: The program, which becomes `main.py` in its folder.
        stdin: What it reads from standard input.
        files: Texts or bytes by their paths in the program's folder.
        limits: Its own limits; None for those of the call.
        stdin_path: Whether it finds its standard input as the file `/dev/stdin`, too, as after
            `python main.py < input`. False where a part of the program is not to read it.

    Raises:
        ValueError: A path is absolute, leads out of the folder, or is "main.py".
    """

    source: str
    stdin: str = ""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    limits: Limits | None = None
    stdin_path: bool = True

    def __post_init__(self) -> None:
        for path in self.files:
            parts = PurePosixPath(path)
            if not path or parts.is_absolute() or ".." in parts.parts or str(parts) == "main.py":
                raise ValueError(
                    "Program: expected the files' paths to lie in the program's folder and not to "
                    f"be 'main.py', got {path!r}. Use a relative path without '..'."
                )


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended, and what it printed.

    Args:
        exit_code: What it returned; None if a signal or a limit ended it.
        signal: The number of the signal that ended it, if one did and no limit was the reason.
        reason: The limit for which it was ended, or None. A program that fails to get memory, or
            disk, or a process, is not ended: it gets an error from the system.
        stdout: What it printed, up to the limit; bytes that are no UTF-8 are replaced.
        stderr: The same of standard error.
        cpu_seconds: Processor time of all its processes, with that of building the box (10 ms); of
            a program that was ended, as measured last, in steps of 10 ms.
        seconds: Time from its start to the end of the last of its processes.
        total_seconds: Time from the call to the result.
    """

    exit_code: int | None
    signal: int | None
    reason: Reason | None
    stdout: str
    stderr: str
    cpu_seconds: float
    seconds: float
    total_seconds: float

    @property
    def timed_out(self) -> bool:
        """Whether the limit of wall time or of processor time ended it."""
        return self.reason in ("wall", "cpu")

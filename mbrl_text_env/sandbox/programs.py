"""Run untrusted programs, each in its own sandbox: the caller's side.

It defines programs, limits and results, checks whether this machine supports the sandbox, sends
orders to the helper process (`_supervisor`), and selects the host files that a program can read.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import platform
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mbrl_text_env.sandbox import _kernel

MIB = 1 << 20

Reason = Literal["wall", "cpu", "memory", "output"]
"""The limit that ended a program."""


class SandboxError(RuntimeError):
    """A program could not be run, for a reason outside of the program."""


class SandboxUnavailable(SandboxError):  # noqa: N818 - a state of the machine, not a mistake
    """This machine does not support the sandbox; the message lists the reasons and remedies."""


class SandboxWarning(UserWarning):
    """A program runs without the sandbox's protection, because of `allow_weaker=True`."""


@dataclass(frozen=True)
class Limits:
    """Limits of a program; all must be positive.

    Args:
        cpu_seconds: CPU time of all its processes together, measured every 20 ms.
        wall_seconds: Time from start to end.
        memory_bytes: Address space of each process (RLIMIT_AS), and private resident memory of all
            processes together (measured every 20 ms). An interpreter takes about 20 MiB.
        disk_bytes: Total data in its folder, /tmp and /dev/shm, and the size of any one file.
        max_files: Number of files and folders there.
        processes: Number of simultaneous processes and threads, including the program itself.
        output_bytes: Size of standard output and standard error together.
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
    """A Python program with its standard input and files.

    Args:
        source: The source code, saved as `main.py` in the program's folder.
        stdin: Standard input.
        files: Texts or bytes by relative path in the program's folder.
        limits: Limits of this program; None for those of the call.
        stdin_path: Whether standard input is also available as the file `/dev/stdin`, as after
            `python main.py < input`. Use False if a part of the program must not read it.
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
    """The output of a program and the way it ended.

    Args:
        exit_code: Exit code; None if a signal or a limit ended the program.
        signal: Number of the signal that ended it, unless a limit was the reason.
        reason: The limit that ended it, or None. A program that cannot allocate memory, disk space
            or a process is not ended: it gets an error from the system.
        stdout: Standard output, up to the limit; invalid UTF-8 is replaced.
        stderr: Standard error, likewise.
        cpu_seconds: CPU time of all its processes and of building the sandbox (10 ms).
        seconds: Time from start to the end of the last of its processes.
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
        """Whether the limit of wall time or CPU time ended it."""
        return self.reason in ("wall", "cpu")


def run_program(
    source: str,
    *,
    stdin: str = "",
    files: Mapping[str, str | bytes] | None = None,
    limits: Limits | None = None,
    allow_weaker: bool = False,
) -> ProgramResult:
    """Run an untrusted Python program in its own sandbox.

    Args:
        source, stdin, files: See `Program`. It runs with only the standard library, hash seed 0 and
            UTF-8.
        limits: None for `Limits()`.
        allow_weaker: If this machine does not support the sandbox, run the program with only limits
            and a process group, and warn once. The program can then read, write and connect to
            everything that the caller can.

    Raises:
        SandboxUnavailable: The machine does not support the sandbox, and `allow_weaker` is False.
        SandboxError: The sandbox could not be built, or its supervisor died.

    Example:
        >>> run_program("print(6 * 7)").stdout  # doctest: +SKIP
        '42\\n'
    """
    (result,) = run_programs(
        [Program(source, stdin, files or {})], limits=limits, allow_weaker=allow_weaker
    )
    return result


def run_programs(
    programs: Sequence[Program],
    *,
    limits: Limits | None = None,
    workers: int | None = None,
    allow_weaker: bool = False,
) -> list[ProgramResult]:
    """Run programs in parallel; return results in order. For errors see `run_program`.

    Args:
        programs: The programs; each has its own sandbox. After an error no more are started.
        limits: Limits of the programs without their own; None for `Limits()`.
        workers: Number of programs to run at a time; None for the number of available CPUs.
        allow_weaker: See `run_program`.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"Expected workers to be at least 1, or None, got {workers}.")
    if not programs:
        return []
    strong = _is_strong(allow_weaker)
    # macOS has no CPU affinity.
    processors = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
    count = min(workers or processors, len(programs))
    with ThreadPoolExecutor(count, thread_name_prefix="sandbox") as pool:
        runs = [
            pool.submit(_run, each, each.limits or limits or Limits(), strong) for each in programs
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


# --- What this machine has ---


@dataclass(frozen=True)
class Facility:
    """A feature of the machine that the sandbox needs.

    `problem` says why it cannot be used ("" if it can), and `remedy` says what to do.
    """

    name: str
    problem: str
    remedy: str


@lru_cache(maxsize=1)
def facilities() -> tuple[Facility, ...]:
    """All features that the sandbox needs, with their status; checked once per process."""
    found = _of_the_system()
    if any(facility.problem for facility in found):
        return found
    try:
        reasons = _probe()
    except SandboxError as error:
        # A bug, or an interpreter that does not start without its environment variables.
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
    # Older kernels count the processes of a user in all sandboxes together.
    is_old = is_linux and numbers < [5, 14]
    found = [
        ("Linux", not is_linux, f"this is {sys.platform}",
         "Use Linux, a virtual machine or WSL 2."),
        ("a known processor", machine not in _kernel.MACHINES,
         f"the calls of {machine} are not in our table", f"Use one of: {known}."),
        ("Linux 5.14 or newer", is_old, f"this is Linux {release}", "Use a newer kernel."),
    ]  # fmt: skip
    for name, path, option in (
        ("seccomp filters", "/proc/sys/kernel/seccomp/actions_avail", "CONFIG_SECCOMP_FILTER"),
        ("lists of children", f"/proc/self/task/{os.getpid()}/children", "CONFIG_PROC_CHILDREN"),
    ):
        remedy = f"Use a kernel with {option}."
        found.append((name, not Path(path).exists(), f"{path} is missing", remedy))
    return tuple(Facility(name, why if lacks else "", how) for name, lacks, why, how in found)


def _whole() -> Facility:
    """Run a trial program, because mounts, ids and filters can still be refused."""
    problem = ""
    try:
        result = _run(Program("import math\nprint(6 * 7)"), Limits(), strong=True)
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


# --- One box: orders, output and result ---

# Time for the supervisor beyond the program's limit.
_GRACE_SECONDS = 30.0
_OPTIONS = ("-X", "utf8", "-X", "int_max_str_digits=0")
# Set up packages without their `__init__`, which would import numpy and more.
_BOOT = """
import sys
for name, folder in {packages!r}:
    package = type(sys)(name)
    package.__path__ = [folder]
    sys.modules[name] = package
from mbrl_text_env.sandbox import _supervisor
_supervisor.main()
"""


def _run(program: Program, limits: Limits, strong: bool) -> ProgramResult:
    """Run a program in a sandbox or (`strong=False`) with only limits and a process group."""
    start = time.monotonic()
    deadline = start + limits.wall_seconds + _GRACE_SECONDS
    with contextlib.ExitStack() as stack:
        folder = (
            None
            if strong
            else stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        )
        orders = _orders(program, limits, folder)
        report, stdout, stderr, overflow = _keep(orders, limits.output_bytes, deadline)
    outcome, _, rest = report.partition("\n")
    if outcome != "ended":
        raise SandboxError(
            "Expected the sandbox to run a program, but it failed: "
            f"{rest or outcome or _last_words(stderr)}. If that is for want of space, raise "
            "`Limits.disk_bytes`; else see `sandbox.facilities()` for what this machine has."
        )
    status, reason, cpu, seconds = rest.split()
    ended_by: Any = "output" if overflow else None if reason == "-" else reason
    code = os.waitstatus_to_exitcode(int(status)) if int(status) >= 0 else 0
    # The kernel's own limit, which is coarser, comes first if the supervisor gets no processor.
    at_limit = -code in (signal.SIGXCPU, signal.SIGKILL) and float(cpu) >= limits.cpu_seconds
    ended_by = ended_by or ("cpu" if at_limit else None)
    return ProgramResult(
        exit_code=code if code >= 0 and ended_by is None else None,
        signal=-code if code < 0 and ended_by is None else None,
        reason=ended_by,
        stdout=stdout.decode(errors="replace"),
        stderr=stderr.decode(errors="replace"),
        cpu_seconds=float(cpu),
        seconds=float(seconds),
        total_seconds=time.monotonic() - start,
    )


def _last_words(stderr: bytes) -> str:
    return f"the supervisor died; it said {stderr.decode(errors='replace')[-500:]!r}"


def _orders(program: Program, limits: Limits, folder: str | None) -> dict[str, Any]:
    files = {"main.py": program.source, **program.files}
    return {
        "probe": False,
        "strong": folder is None,
        "folder": folder,
        # Integers of any length become texts, as in the Python for which most tests were written:
        # what that takes is limited as all else is. `site` gives programs `exit` and `quit`.
        "argv": [executable(), "-s", "-B", *_OPTIONS, "main.py"],
        # Strings would otherwise have other hashes in each run, and sets another order; and the
        # locale would depend on the machine.
        "environment": {"PYTHONHASHSEED": "0", "PYTHONCOERCECLOCALE": "0"},
        "stdin": program.stdin.encode(errors="surrogatepass"),
        "stdin_path": program.stdin_path,
        "files": {
            path: content.encode(errors="surrogatepass") if isinstance(content, str) else content
            for path, content in files.items()
        },
        "wall": limits.wall_seconds,
        "cpu": limits.cpu_seconds,
        "memory": limits.memory_bytes,
        "disk": limits.disk_bytes,
        # Besides the program's own, the tmpfs has four folders and their parts of the first page.
        "max_files": limits.max_files + 6,
        "rlimits": {
            "CPU": int(limits.cpu_seconds) + 1,
            "AS": limits.memory_bytes,
            "FSIZE": limits.disk_bytes,
            # The first process of the box counts too.
            "NPROC": limits.processes + 1,
            "STACK": 8 * MIB,
            # 1 and not 0: a crash would else start the host's own handler, if it has one, which
            # runs outside the box (core(5); the 1 is in the kernel's fs/coredump.c).
            "CORE": 1,
            "NOFILE": 64,
            "SIGPENDING": 64,
            **dict.fromkeys(("MEMLOCK", "MSGQUEUE", "NICE", "RTPRIO"), 0),
        },
        **_layout(),
    }


def _probe() -> dict[str, str]:
    report, _, stderr, _ = _keep({"probe": True}, MIB, time.monotonic() + _GRACE_SECONDS)
    outcome, *lines = report.split("\n")
    if outcome != "probe":
        raise SandboxError(
            "Expected the supervisor to look at what this machine has, but it failed: "
            f"{' '.join(lines) or _last_words(stderr)}."
        )
    return dict(line.split("\t", 1) for line in lines)


def _keep(
    orders: dict[str, Any], output_bytes: int, deadline: float
) -> tuple[str, bytes, bytes, bool]:
    """Start a supervisor; return its report, the program's output, and whether that overflowed.

    Nothing of this process is inherited but the pipes, and no code of it runs in the child, so it
    may have any number of threads.
    """
    report_end, supervisor_end = os.pipe()
    own = Path(__file__).parent
    packages = [("mbrl_text_env", str(own.parent)), ("mbrl_text_env.sandbox", str(own))]
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, report_end)
        try:
            supervisor: Any = subprocess.Popen(  # noqa: S603 - a list, and our own program
                [executable(), "-I", "-S", "-c", _BOOT.format(packages=packages)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                cwd="/",
                pass_fds=(supervisor_end,),
                start_new_session=True,
                bufsize=0,
            )
        finally:
            os.close(supervisor_end)
        for pipe in (supervisor.stdin, supervisor.stdout, supervisor.stderr):
            stack.callback(pipe.close)
        stack.callback(supervisor.wait)
        stack.callback(supervisor.kill)
        view = memoryview(marshal.dumps({**orders, "report": supervisor_end}))
        with contextlib.suppress(BrokenPipeError):  # A supervisor that died is noticed below.
            while view:
                view = view[os.write(supervisor.stdin.fileno(), view) :]
        return _collect(supervisor, report_end, output_bytes, deadline)


def _collect(
    supervisor: Any, report_end: int, output_bytes: int, deadline: float
) -> tuple[str, bytes, bytes, bool]:
    """Read until all pipes have ended: then the supervisor is dead, and the box was before it."""
    pipes = (supervisor.stdout.fileno(), supervisor.stderr.fileno(), report_end)
    blocks: dict[int, list[bytes]] = {number: [] for number in pipes}
    stdout, stderr, report = blocks.values()
    poll = select.poll()
    for number in blocks:
        poll.register(number, select.POLLIN | select.POLLHUP)
    left, open_pipes, overflow = output_bytes, len(blocks), False
    while open_pipes:
        ready = poll.poll(1000)
        if not ready and supervisor.poll() is not None:
            break  # Another thread has forked at the wrong moment, and its child holds a pipe open.
        if time.monotonic() > deadline:
            raise SandboxError("Expected the supervisor to end a program at its limit; it did not.")
        for number, _ in ready:
            block = os.read(number, 65536)
            if not block:
                poll.unregister(number)
                open_pipes -= 1
            elif number == report_end:
                report.append(block)
            else:
                blocks[number].append(block[:left])
                overflow = overflow or len(block) > left
                left -= min(left, len(block))
                if overflow:
                    supervisor.stdin.close()  # The order to stop; what still comes is thrown away.
    return b"".join(report).decode(errors="replace"), b"".join(stdout), b"".join(stderr), overflow


# --- What a box shows of the host's files: what the interpreter needs, and no more ---


@lru_cache(maxsize=1)
def executable() -> str:
    """The interpreter itself, not the link to it in a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


@lru_cache(maxsize=1)
def _layout() -> dict[str, list[Any]]:
    """What the box shows of the host: the interpreter, its libraries, and four devices."""
    machine = sysconfig.get_config_var("MULTIARCH") or ""
    # The folders of Debian and its kin, which hold libraries alone; else the general ones.
    systems = [f"{root}/{machine}" for root in ("/lib", "/usr/lib") if machine]
    if not any(Path(path).is_dir() for path in systems):
        systems = ["/lib", "/usr/lib"]
    systems += ["/lib64", "/usr/lib64"]
    base = os.path.realpath(sys.base_prefix)
    own = [] if base == "/usr" else [f"{base}/lib"]
    names = ("base", "installed_base", "platbase", "installed_platbase")
    paths = dict.fromkeys(names, sys.base_prefix)
    standard = [sysconfig.get_path(name, vars=paths) for name in ("stdlib", "platstdlib")]
    wanted = [os.path.realpath(path) for path in (*systems, *own, *standard)]
    folders = [path for path in dict.fromkeys(wanted) if Path(path).is_dir()]
    folders = [
        path for path in folders if not any(map(path.startswith, (f"{each}/" for each in folders)))
    ]
    patterns = ("site-packages", "dist-packages", "python*/site-packages", "python*/dist-packages")
    masks = [str(mask) for path in folders for each in patterns for mask in Path(path).glob(each)]
    links = [path for path in map(Path, ("/lib", "/lib64")) if path.is_symlink()]
    files = ["/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    return {
        "binds": [*folders, executable(), *filter(os.path.exists, files)],
        "masks": masks,
        "links": [(str(link), str(link.readlink())) for link in links],
    }

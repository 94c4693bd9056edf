"""The caller's side of one box: orders, output and result."""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from mbrl_text_env.sandbox._layout import executable, layout
from mbrl_text_env.sandbox.programs import (
    MIB,
    Limits,
    Program,
    ProgramResult,
    Reason,
    SandboxError,
)

_PACKAGE = Path(__file__).parent
# How long the supervisor may take beyond the program's limit before it is given up.
_GRACE_SECONDS = 30.0
_OPTIONS = ("-X", "utf8", "-X", "int_max_str_digits=0")
# The packages are entered by their folders alone, for their `__init__` would import numpy and more.
_BOOT = """
import sys
for name, folder in {packages!r}:
    package = type(sys)(name)
    package.__path__ = [folder]
    sys.modules[name] = package
from mbrl_text_env.sandbox import _supervisor
_supervisor.main()
"""


def run(program: Program, limits: Limits, strong: bool) -> ProgramResult:
    """Run a program: in a box, or (`strong=False`) with limits and a process group alone."""
    if strong:
        return _run_in(program, limits, None)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return _run_in(program, limits, folder)


def _run_in(program: Program, limits: Limits, folder: str | None) -> ProgramResult:
    start = time.monotonic()
    deadline = start + limits.wall_seconds + _GRACE_SECONDS
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
    code = None if int(status) < 0 else os.waitstatus_to_exitcode(int(status))
    if code is not None and code < 0 and ended_by is None:
        ended_by = _reason_of_signal(-code, float(cpu), limits)
    if ended_by is not None:
        code = None
    return ProgramResult(
        exit_code=code if code is not None and code >= 0 else None,
        signal=-code if code is not None and code < 0 else None,
        reason=ended_by,
        stdout=stdout.decode(errors="replace"),
        stderr=stderr.decode(errors="replace"),
        cpu_seconds=float(cpu),
        seconds=float(seconds),
        total_seconds=time.monotonic() - start,
    )


def _last_words(stderr: bytes) -> str:
    return f"the supervisor died; it said {stderr.decode(errors='replace')[-500:]!r}"


def _reason_of_signal(number: int, cpu: float, limits: Limits) -> Reason | None:
    # The kernel's own limit, which is coarser, comes first if the supervisor gets no processor.
    if number in (signal.SIGXCPU, signal.SIGKILL) and cpu >= limits.cpu_seconds:
        return "cpu"
    return None


def _orders(program: Program, limits: Limits, folder: str | None) -> dict[str, Any]:
    files = {"main.py": program.source, **program.files}
    seconds = int(limits.cpu_seconds) + 1
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
            "CPU": seconds,
            "AS": limits.memory_bytes,
            "FSIZE": limits.disk_bytes,
            # The first process of the box counts too.
            "NPROC": limits.processes + 1,
            "STACK": 8 * MIB,
            # 1 and not 0: a crash would else start the host's own handler, if it has one, which
            # runs outside the box (core(5); the 1 is in the kernel's fs/coredump.c).
            "CORE": 1,
            "NOFILE": 64,
            "MEMLOCK": 0,
            "MSGQUEUE": 0,
            "SIGPENDING": 64,
            "NICE": 0,
            "RTPRIO": 0,
        },
        **layout(),
    }


def run_trial() -> ProgramResult:
    """Run a program without asking what this machine has, which is what it finds out."""
    return run(Program("import math\nprint(6 * 7)"), Limits(), strong=True)


def probe() -> dict[str, str]:
    """Reasons by the names of the namespaces that this machine does not give."""
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
    packages = [
        ("mbrl_text_env", str(_PACKAGE.parent)),
        ("mbrl_text_env.sandbox", str(_PACKAGE)),
    ]
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, report_end)
        try:
            supervisor = subprocess.Popen(  # noqa: S603 - a list, and our own program
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
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        assert supervisor.stderr is not None
        for pipe in (supervisor.stdin, supervisor.stdout, supervisor.stderr):
            stack.callback(pipe.close)
        stack.callback(supervisor.wait)
        stack.callback(supervisor.kill)
        message = marshal.dumps({**orders, "report": supervisor_end})
        with contextlib.suppress(BrokenPipeError):  # A supervisor that died is noticed below.
            _write_all(supervisor.stdin.fileno(), len(message).to_bytes(8, "little") + message)
        return _collect(supervisor, report_end, output_bytes, deadline)


def _write_all(number: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(number, view) :]


def _collect(
    supervisor: subprocess.Popen[bytes], report_end: int, output_bytes: int, deadline: float
) -> tuple[str, bytes, bytes, bool]:
    """Read until all pipes have ended: then the supervisor is dead, and the box was before it."""
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    assert supervisor.stderr is not None
    blocks: dict[int, list[bytes]] = {
        supervisor.stdout.fileno(): [],
        supervisor.stderr.fileno(): [],
        report_end: [],
    }
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

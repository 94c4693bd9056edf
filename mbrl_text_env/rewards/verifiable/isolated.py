"""A helper process for work on untrusted text that can hang, crash or use too much memory.

Python threads cannot be killed, and signals reach only the main thread. So computer algebra, and
scorers that evaluate their input, run in a process. It starts at the first call and serves all
calls in turn. If a call exceeds its time limit, the process is killed and replaced.

Requests and replies are lines of JSON, so a compromised helper can at most return a wrong answer.
The helper gets only the environment variables that Python needs. On POSIX, it cannot write files
and has a memory limit. It is not a sandbox: callers must reject text that would be executed.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from mbrl_text_env.rewards.base import RewardError

# Enough to start Python and import a library, even on a busy machine.
_PREPARE_SECONDS = 120.0
_MEMORY_BYTES = 4 * 2**30
_ENVIRONMENT = ("PATH", "SYSTEMROOT", "LANG", "LC_ALL", "TMPDIR", "TEMP", "TMP")


class IsolatedError(RuntimeError):
    """Raised if the work fails in the helper process; has the error's type and text."""


class OutOfTimeError(IsolatedError):
    """Raised if the work exceeds its time limit; the process is killed."""


class CrashError(IsolatedError):
    """Raised if the process ends during the work."""


def call_isolated(function: str, *arguments: Any, seconds: float, prepare: Sequence[Any]) -> Any:
    """Call a function in the helper process; arguments and result are JSON values.

    Args:
        function: `"module:name"`.
        *arguments: Its arguments.
        seconds: Wall-clock time limit of the call.
        prepare: `"module:name"` of another function, and its arguments. It is called first, outside
            the time limit, to import a slow library or to compute a result shared by many calls,
            which it must cache.

    Raises:
        IsolatedError: The function raised or exceeded its time limit (`OutOfTimeError`), or the
            process ended, for example because it ran out of memory (`CrashError`).
        RewardError: `prepare` raised, so this work is not possible on this machine.

    Example:
        >>> call_isolated("math:factorial", 5, seconds=5.0, prepare=["os:getpid"])  # doctest: +SKIP
        120
    """
    global _helper
    with _lock:
        if _helper is None or _helper.process.poll() is not None:
            _helper = _Helper()
        try:
            _helper.call(prepare[0], list(prepare[1:]), _PREPARE_SECONDS)
        except IsolatedError as error:
            raise RewardError(str(error)) from error
        return _helper.call(function, list(arguments), seconds)


class _Helper:
    def __init__(self) -> None:
        paths = [os.path.abspath(path) for path in sys.path]  # noqa: PTH100 - "" is the folder
        kept = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
        # The same order of sets in every run; one thread, because thread stacks use memory.
        fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(  # noqa: S603 - this module, and no shell
            [sys.executable, "-B", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=tempfile.gettempdir(),
            env={**kept, **fixed, "PYTHONPATH": os.pathsep.join(paths)},
            # Ctrl-C goes to the caller only, which then kills this process.
            start_new_session=True,
        )

    def call(self, function: str, arguments: list[Any], seconds: float) -> Any:
        timed_out = threading.Event()

        def kill_late() -> None:
            timed_out.set()
            self.process.kill()

        timer = threading.Timer(seconds, kill_late)
        timer.start()
        try:
            reply = self._exchange({"function": function, "arguments": arguments})
        except BaseException:
            # After an interrupted exchange, the next reply would belong to the wrong request.
            self.kill()
            raise
        finally:
            timer.cancel()
            timer.join()
        code = self.kill() if reply is None or timed_out.is_set() else None
        if reply is None and timed_out.is_set():
            raise OutOfTimeError(f"{function} took longer than {seconds:g} s.")
        if reply is None:
            raise CrashError(f"{function}: the process ended with exit code {code}.")
        if "error" in reply:
            raise IsolatedError(reply["error"])
        return reply["value"]

    def _exchange(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            return None
        return json.loads(line) if line.endswith(b"\n") else None

    def kill(self) -> int:
        self.process.kill()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            # Closing flushes data, which fails if the process has ended.
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        return code


_lock = threading.Lock()
_helper: _Helper | None = None


@atexit.register
def _stop() -> None:
    if _helper is not None:
        _helper.kill()


def _forget() -> None:
    """Let a forked process start its own helper, so replies are not mixed up."""
    global _helper, _lock
    _helper, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _serve() -> None:
    """Answer requests until there are no more; runs in the helper process."""
    # Keep the streams away from code that prints to stdout or reads stdin.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    _limit_resources()
    for line in requests:
        replies.write(json.dumps(_answer(**json.loads(line))).encode() + b"\n")
        replies.flush()


def _answer(function: str, arguments: list[Any]) -> dict[str, Any]:
    module, _, name = function.partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(*arguments)
        json.dumps(value)
    except RewardError as error:
        return {"error": str(error)}
    # The caller handles all errors of the work, including KeyboardInterrupt.
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"value": value}


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {resource.RLIMIT_AS: _MEMORY_BYTES, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # macOS does not support a memory limit.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    _serve()

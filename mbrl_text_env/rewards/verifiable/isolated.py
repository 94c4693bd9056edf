"""A helper process for work on untrusted text that may hang, explode or run away with the memory.

Neither can a thread be killed, nor reach signals more than the main one. So computer algebra, and
scorers that evaluate what they are given, run in a process that is started at the first call,
serves all calls in turn, and is killed at the end of a call's time and replaced.

The two talk in lines of JSON: a helper that has been taken over could still only return a wrong
answer. It sees none of the environment variables but those that Python needs, writes no files, and
has a limit of memory (the last two on POSIX). It is no sandbox all the same: callers refuse text
that would be executed.
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

# For starting Python and importing a library, on a busy machine too.
_PREPARE_SECONDS = 120.0
_MEMORY_BYTES = 4 * 2**30
_ENVIRONMENT = ("PATH", "SYSTEMROOT", "LANG", "LC_ALL", "TMPDIR", "TEMP", "TMP")


class IsolatedError(RuntimeError):
    """The work raised in the helper process: the error's type and text."""


class OutOfTimeError(IsolatedError):
    """The work took longer than its limit, and its process was killed."""


class CrashError(IsolatedError):
    """The process died of the work."""


def call_isolated(function: str, *arguments: Any, seconds: float, prepare: Sequence[Any]) -> Any:
    """Call a function of the package in the helper process; JSON values come in and out.

    Args:
        function: `"module:name"`.
        *arguments: Its arguments.
        seconds: The wall-clock time that it may take.
        prepare: `"module:name"` of a function, and its arguments, which is called before, outside
            the time limit: it imports the heavy library, or makes what is the same for many calls,
            and has to keep it in a cache.

    Raises:
        IsolatedError: The function raised, took longer (`OutOfTimeError`), or the process ended,
            for want of memory for example (`CrashError`).
        RewardError: `prepare` raised: the work cannot be done here at all.

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
        # Sets in the same order in every run; one thread, whose stack counts as memory.
        fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(  # noqa: S603 - this module, and no shell
            [sys.executable, "-B", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=tempfile.gettempdir(),
            env={**kept, **fixed, "PYTHONPATH": os.pathsep.join(paths)},
            # Ctrl-C is for the caller, which then kills this one.
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
            # Interrupted between question and answer, it would answer the next question wrongly.
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
            # What could not be sent to a dead process is lost.
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
    """A forked process makes a helper of its own: two that share one would mix up its answers."""
    global _helper, _lock
    _helper, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _serve() -> None:
    """The helper's side: answer requests until there are no more."""
    # Out of the reach of code that prints or reads its standard streams.
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
    # Whatever the work raises is the caller's to judge; KeyboardInterrupt and the like too.
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
        # macOS has no limit of memory to set.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    _serve()

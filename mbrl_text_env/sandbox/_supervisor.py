"""The helper process: builds a box, starts the program in it, watches it and takes it down.

Three processes, each the parent of the next:

- the supervisor, started with a clean interpreter, outside the box. It holds the clock;
- the first process of the box. It builds the box from within, gives up every privilege, starts the
  program and waits for it. When it dies, the kernel kills all that is left in its PID namespace;
- the program, a new interpreter.

The supervisor reads its orders from standard input, by `marshal`. The end of standard input is the
order to stop: it also comes when the caller dies. Its report is lines on a pipe: first the outcome,
then numbers or an error.
"""

# ruff: noqa: PTH102, PTH103, PTH112, PTH120, PTH123, PTH208, PTH211, SIM105
# Importing pathlib and contextlib would take as long as all the rest.

from __future__ import annotations

import fcntl
import marshal
import os
import resource
import select
import time
from typing import Any, NoReturn

from mbrl_text_env.sandbox import _kernel

_INSIDE_ID = 1000
# "nobody", the id of the program outside where the caller is root.
_OUTSIDE_ID = 65534
# A box is put together at a place where the host has nothing that the box needs.
_STAGE = "/proc"
_WORK = "/work"
_TICK_MS = 20
_KILL = 9


class SetupError(Exception):
    """A step of building the box failed; the message names the step and the reason."""


def main() -> None:
    """Read the orders, run the program, report."""
    try:
        with open(0, "rb", closefd=False) as stdin:
            orders: dict[str, Any] = marshal.load(stdin)  # noqa: S302 - from our parent
    except EOFError:
        return  # The caller died.
    os.set_inheritable(orders["report"], False)
    try:
        report = _probe() if orders["probe"] else _run(orders)
    except BaseException as error:
        report = f"failed\n{_described(error, 'supervisor')}"
    os.write(orders["report"], report.encode(errors="replace"))
    os._exit(0)


def _described(error: BaseException, place: str) -> str:
    return (
        str(error) if isinstance(error, SetupError) else f"{place}: {type(error).__name__}: {error}"
    )


def _run(orders: dict[str, Any]) -> str:
    if orders["strong"]:
        _step("a user and a PID namespace", _enter_namespaces)
    parent_end, box_end = os.pipe()
    alive_end, supervisor_end = os.pipe()
    first = os.fork()
    if first == 0:
        os.close(supervisor_end)
        os.close(parent_end)
        _be_first(orders, box_end, alive_end)
    os.close(box_end)
    os.close(alive_end)
    try:
        status, reason, started = _watch(orders, first, parent_end)
        # What is killed with the box is not in its usage below.
        sampled, _ = _usage_of(first)
    finally:
        # In a box this is enough: nothing survives the first process of its PID namespace.
        if not orders["strong"]:
            try:
                os.killpg(first, _KILL)
            except ProcessLookupError:
                pass  # It died before it had a group.
        os.kill(first, _KILL)
        _, _, usage = os.wait4(first, 0)
    seconds = time.monotonic() - started
    cpu = max(sampled, usage.ru_utime + usage.ru_stime)
    code = -1 if status is None else status
    return f"ended\n{code} {reason or '-'} {cpu:.6f} {seconds:.6f}"


def _watch(orders: dict[str, Any], first: int, pipe: int) -> tuple[int | None, str | None, float]:
    """Wait for the program's status, a limit, or the order to stop."""
    message = b""
    started = time.monotonic()
    running = False
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    while True:
        ready = {fd for fd, _ in poll.poll(_TICK_MS)}
        if pipe in ready:
            block = os.read(pipe, 4096)
            message += block
            if b"E" in message:
                raise SetupError(message.partition(b"E")[2].decode())
            if not running and message.startswith(b"S"):
                running, started = True, time.monotonic()
            if message.endswith(b"\n"):
                return int(message[1:]), None, started
            if not block and running:
                # The kernel may end the first process if the machine is out of memory.
                return _KILL, None, started
            if not block:
                raise SetupError("the first process of the box ended by itself")
        if 0 in ready:
            return None, "stopped", started
        if time.monotonic() > started + orders["wall"]:
            return None, "wall", started
        cpu, memory = _usage_of(first)
        if cpu > orders["cpu"]:
            return None, "cpu", started
        if memory > orders["memory"]:
            return None, "memory", started


def _usage_of(first: int) -> tuple[float, int]:
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


def _step(name: str, function: Any, *args: Any) -> None:
    try:
        function(*args)
    except OSError as error:
        raise SetupError(f"{name}: {error.strerror}") from error


# --- Outside the box: namespaces ---


def _enter_namespaces() -> None:
    user, group = os.geteuid(), os.getegid()
    supervisor = os.getpid()
    if user:
        _kernel.unshare("user", "PID")
        _write(f"/proc/{supervisor}/setgroups", "deny")
        _write(f"/proc/{supervisor}/uid_map", f"{_INSIDE_ID} {user} 1")
        _write(f"/proc/{supervisor}/gid_map", f"{_INSIDE_ID} {group} 1")
    else:
        # Only a process that is still outside may map a second id, to which the program drops. The
        # first one, root's, is that of the supervisor and reads what must be mounted.
        ready, go = os.pipe()
        mapper = os.fork()
        if mapper == 0:
            try:
                os.close(go)
                os.read(ready, 1)
                for kind in ("uid", "gid"):
                    _write(f"/proc/{supervisor}/{kind}_map", f"0 0 1\n{_INSIDE_ID} {_OUTSIDE_ID} 1")
                os._exit(0)
            finally:
                os._exit(1)
        _kernel.unshare("user", "PID")
        os.close(go)
        os.close(ready)
        if os.waitpid(mapper, 0)[1] != 0:
            raise PermissionError(1, f"ids 0 and {_OUTSIDE_ID} cannot be mapped")
    _kernel.die_with_parent()


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


# --- The first process of the box ---


def _be_first(orders: dict[str, Any], pipe: int, alive: int) -> NoReturn:
    """Build the box, start the program, and tell its status; never returns."""
    try:
        _start_and_wait(orders, pipe, alive)
    except BaseException as error:
        os.write(pipe, b"E" + _described(error, "first process").encode(errors="replace")[:2000])
    finally:
        os._exit(0)


def _start_and_wait(orders: dict[str, Any], pipe: int, alive: int) -> None:
    stdin = _file_with(orders["stdin"])
    for number in (1, 2, 15):  # The program may send signals here; those left to default are lost.
        _kernel.ignore_signal(number)
    # Else a signal to its own group would reach the supervisor, across the border of the namespace.
    os.setsid()
    if orders["strong"]:
        # If memory runs out all the same, the kernel is to begin here.
        _step("the OOM score", _write, "/proc/self/oom_score_adj", "1000")
        _build(orders)
        _step("giving up privileges", _drop_privileges)
    else:
        os.chdir(orders["folder"])
    _step("writing the program's files", _write_files, orders["files"])
    if hasattr(os, "memfd_create"):  # Linux
        _step("no new privileges", _kernel.forbid_new_privileges)
        _kernel.die_with_parent()
    if select.select([alive], [], [], 0)[0]:
        os._exit(0)  # The supervisor died before `die_with_parent`.
    # The filter forbids this one to the program, which starts behind it.
    _limit("CORE", orders["rlimits"].pop("CORE"))
    if orders["strong"]:
        _step("a seccomp filter", _kernel.install_filter, os.uname().machine)
    program = os.fork()
    if program == 0:
        _become_program(orders, stdin, pipe)
    os.write(pipe, b"S")
    while True:
        # The orphans of the program come to the first process too.
        pid, status = os.wait()
        if pid == program:
            break
    # What the program printed is in the pipe by now; what its children do is of no interest.
    os.write(pipe, b"%d\n" % status)


def _file_with(content: bytes) -> int:
    """A file that has no name, at its start; the program can read it and no more."""
    if hasattr(os, "memfd_create"):
        number = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        import tempfile

        number = os.dup(tempfile.TemporaryFile().fileno())  # noqa: SIM115
    with open(number, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(number, 0, os.SEEK_SET)
    if hasattr(os, "memfd_create"):
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
    return number


def _become_program(orders: dict[str, Any], stdin: int, pipe: int) -> NoReturn:
    try:
        os.dup2(stdin, 0)
        _kernel.reset_signals()
        os.nice(5)  # So that the supervisor and the caller get a processor at once.
        for name, value in orders["rlimits"].items():
            _limit(name, value)
        os.execve(orders["argv"][0], orders["argv"], orders["environment"])  # noqa: S606
    except BaseException as error:
        text = _described(error, f"starting {orders['argv'][0]}")
        os.write(pipe, b"E" + text.encode(errors="replace")[:2000])
    finally:
        os._exit(127)


def _limit(name: str, value: int) -> None:
    number = getattr(resource, "RLIMIT_" + name, None)
    if number is None:
        return  # A system that is not Linux.
    hard = resource.getrlimit(number)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(number, (value, value))


def _build(orders: dict[str, Any]) -> None:
    for kind in ("mount", "network", "IPC", "UTS", "cgroup"):
        _step(f"{kind} namespace", _kernel.unshare, kind)
    private = _kernel.MS_REC | _kernel.MS_PRIVATE
    _step("private mounts", _kernel.mount, "none", "/", "none", private)
    os.umask(0o022)
    room = len(orders["stdin"]) // 1024 + 64 if orders["stdin_path"] else 64
    options = f"mode=755,size={room}k,nr_inodes=512"
    _step("mounting a tmpfs", _kernel.mount, "box", _STAGE, "tmpfs", _kernel.MS_NOSUID, options)
    for path in orders["binds"]:
        _step(f"mounting {path}", _bind, path)
    for path in orders["masks"]:
        options = "mode=555,size=4k,nr_inodes=1"
        _step(f"hiding {path}", _kernel.mount, "box", _STAGE + path, "tmpfs", 0, options)
    for path, target in orders["links"]:
        os.symlink(target, _STAGE + path)
    if orders["stdin_path"]:
        # There is no /proc to which this name could lead.
        with open(f"{_STAGE}/dev/stdin", "wb") as file:
            file.write(orders["stdin"])
    folders = [_STAGE + path for path in (_WORK, "/tmp", "/dev/shm")]  # noqa: S108 - of the box
    for folder in folders:
        os.makedirs(folder)
    _step("read-only mounts", _kernel.make_readonly, _STAGE)
    _mount_writable(orders, folders)
    _step("changing the root", _kernel.change_root, _STAGE)
    _kernel.set_host_name("box")
    os.chdir(_WORK)
    os.umask(0o077)


def _bind(path: str) -> None:
    target = _STAGE + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _write(target, "")
    _kernel.mount(os.path.realpath(path), target, "none", _kernel.MS_BIND | _kernel.MS_REC)


def _mount_writable(orders: dict[str, Any], folders: list[str]) -> None:
    """One tmpfs for all that the program may write, so that one size limits it all."""
    flags = _kernel.MS_NOSUID | _kernel.MS_NODEV | _kernel.MS_NOEXEC
    work = folders[0]
    options = f"mode=700,size={orders['disk']},nr_inodes={orders['max_files']}"
    _step("mounting a tmpfs", _kernel.mount, "work", work, "tmpfs", flags, options)
    # The program's own folder comes last: it starts empty but for the program's files.
    for index, folder in enumerate([*folders[1:], work]):
        part = f"{work}/{index}"
        os.mkdir(part)
        os.chown(part, _INSIDE_ID, _INSIDE_ID)
        _step("mounting a tmpfs", _kernel.mount, part, folder, "none", _kernel.MS_BIND)


def _write_files(files: dict[str, bytes]) -> None:
    for path, content in files.items():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def _drop_privileges() -> None:
    _kernel.bound_capabilities()
    if os.geteuid() == 0:
        os.setgroups([])
    os.setresgid(_INSIDE_ID, _INSIDE_ID, _INSIDE_ID)
    os.setresuid(_INSIDE_ID, _INSIDE_ID, _INSIDE_ID)
    _kernel.drop_capabilities()


# --- What this machine has ---


def _probe() -> str:
    """The report: the namespaces that cannot be had, each with the reason, one a line."""
    lines = ["probe"]
    for name in _kernel.NAMESPACES:
        pid = os.fork()
        if pid == 0:
            try:
                _kernel.unshare("user", name)
            except OSError as error:
                os._exit(error.errno or 255)
            os._exit(0)
        number = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if number:
            lines.append(f"{name}\t{os.strerror(abs(number))}")
    return "\n".join(lines)

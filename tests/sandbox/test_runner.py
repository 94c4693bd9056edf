"""What a program is given, what comes back, and what happens where the box cannot be built."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import psutil
import pytest

from mbrl_text_env import sandbox
from mbrl_text_env.sandbox import (
    Facility,
    Limits,
    Program,
    SandboxError,
    SandboxUnavailable,
    SandboxWarning,
    _kernel,
    facilities,
    run_program,
    run_programs,
)
from mbrl_text_env.sandbox import programs as boxes
from tests.sandbox.hostile import programs

MIB = 1 << 20
GENEROUS = Limits(cpu_seconds=30, wall_seconds=60)
PACKAGE = Path(sandbox.__file__).parents[1]

missing = [f"{each.name} ({each.problem})" for each in facilities() if each.problem]
needs_box = pytest.mark.skipif(bool(missing), reason=f"this machine lacks: {', '.join(missing)}")


@pytest.fixture
def lacking(monkeypatch):
    """A machine without two of the facilities."""
    lacks = (
        Facility("Linux", "", ""),
        Facility("user namespaces", "Operation not permitted", "Set a sysctl."),
        Facility("seccomp filters", "missing", "Use another kernel."),
    )
    monkeypatch.setattr("mbrl_text_env.sandbox.programs.facilities", lambda: lacks)
    boxes._warn_once.cache_clear()
    yield
    boxes._warn_once.cache_clear()


@needs_box
def test_a_program_reads_its_input_and_files_and_prints():
    source = """
import sys
from helper import double
print(double(int(input())), open("data/a.bin", "rb").read(), sys.argv, __name__)
print("Grüße", file=sys.stderr)
sys.exit(3)
"""
    files = {"helper.py": "def double(x): return 2 * x", "data/a.bin": b"\x00\xff"}
    result = run_program(source, stdin="21\n", files=files, limits=GENEROUS)
    assert result.stdout == "42 b'\\x00\\xff' ['main.py'] __main__\n"
    assert result.stderr == "Grüße\n"
    assert (result.exit_code, result.signal, result.reason) == (3, None, None)
    assert not result.timed_out
    assert 0 < result.seconds <= result.total_seconds
    assert result.cpu_seconds > 0


@needs_box
def test_a_signal_is_told_from_an_exit_code():
    result = run_program("import os\nos.kill(os.getpid(), 11)", limits=GENEROUS)
    assert (result.exit_code, result.signal, result.reason) == (None, signal.SIGSEGV, None)


@needs_box
def test_a_traceback_is_seen_and_the_exit_code_is_pythons():
    result = run_program("def f(:", limits=GENEROUS)
    assert "SyntaxError" in result.stderr
    assert result.exit_code == 1


@needs_box
@pytest.mark.parametrize(
    ("source", "limits", "reason"),
    [
        ("while True: pass", Limits(cpu_seconds=0.2, wall_seconds=60), "cpu"),
        ("import time\ntime.sleep(99)", Limits(cpu_seconds=30, wall_seconds=0.3), "wall"),
        ("while True: print('a' * 9999)", Limits(output_bytes=1000), "output"),
        (
            # Each of the three keeps to the limit, and together they do not.
            "import os, time\nos.fork() or os.fork()\nx = b'a' * (60 << 20)\ntime.sleep(50)",
            Limits(cpu_seconds=30, wall_seconds=60, memory_bytes=100 * MIB),
            "memory",
        ),
        (
            # The same with memory that is shared, and with a main thread that has ended.
            # It is mapped before the thread starts, whose heap would take the addresses first.
            "import ctypes, mmap, os, threading\nos.fork() or os.fork()\n"
            "m = mmap.mmap(-1, 45 << 20)\ndef f():\n"
            "    for _ in range(45): m.write(b'a' * (1 << 20))\n"
            "    __import__('time').sleep(50)\n"
            "threading.stack_size(1 << 16)\nthreading.Thread(target=f).start()\n"
            "ctypes.CDLL(None).pthread_exit(None)",
            Limits(cpu_seconds=30, wall_seconds=60, memory_bytes=100 * MIB),
            "memory",
        ),
        (
            # Each of the four keeps to the kernel's limit, and together they do not.
            "import os\nos.fork(), os.fork()\nwhile True: pass",
            Limits(cpu_seconds=0.5, wall_seconds=60),
            "cpu",
        ),
    ],
)
def test_the_limit_that_ended_a_program_is_named(source, limits, reason):
    result = run_program(source, limits=limits)
    assert result.reason == reason
    assert (result.exit_code, result.signal) == (None, None)
    assert result.timed_out == (reason in ("cpu", "wall"))
    assert len(result.stdout) <= limits.output_bytes
    if reason == "cpu":
        assert result.cpu_seconds >= limits.cpu_seconds


@needs_box
@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("x = bytearray(300 << 20)", "MemoryError"),
        ("open('f', 'wb').write(bytes(9 << 20))", "OSError"),
        ("import os\nfor i in range(99): os.mkdir(str(i))", "No space left"),
        ("import os\nwhile True: os.fork() or __import__('time').sleep(9)", "BlockingIOError"),
    ],
)
def test_what_the_system_refuses_is_an_error_of_the_program(source, error):
    limits = Limits(disk_bytes=8 * MIB, max_files=50, processes=4, wall_seconds=60)
    result = run_program(source, limits=limits)
    assert error in result.stderr
    assert (result.exit_code, result.reason) == (1, None)


@needs_box
def test_all_that_the_disk_limit_allows_can_be_written():
    source = "open('/tmp/f', 'wb').write(bytes(4 << 20))\nopen('g', 'wb').write(bytes(3 << 20))"
    assert run_program(source, limits=Limits(disk_bytes=8 * MIB)).exit_code == 0


@needs_box
def test_a_batch_keeps_its_order_and_is_as_single_runs():
    batch = [
        Program(f"import time\ntime.sleep({0.02 * (5 - i)})\nprint({i}, input())", stdin=f"{i}\n")
        for i in range(6)
    ]
    results = run_programs(batch, workers=3)
    assert [result.stdout for result in results] == [f"{i} {i}\n" for i in range(6)]
    single = run_program(batch[2].source, stdin="2\n")
    assert (single.stdout, single.exit_code) == (results[2].stdout, results[2].exit_code)
    assert run_programs([]) == []


@needs_box
def test_hashes_and_so_the_order_of_sets_are_the_same_in_every_run():
    source = "print({str(i) for i in range(100)}, hash('a'))"
    assert len({result.stdout for result in run_programs([Program(source)] * 4)}) == 1


@needs_box
def test_programs_with_their_own_limits():
    loop = "while True: pass"
    quick = Program(loop, limits=Limits(cpu_seconds=0.1))
    results = run_programs([quick, Program("print(1)")], limits=GENEROUS)
    assert [result.reason for result in results] == ["cpu", None]


@needs_box
def test_a_large_input_and_a_program_that_does_not_read_it():
    result = run_program("print(1)", stdin="a" * (8 * MIB))
    assert result.stdout == "1\n"
    result = run_program("import sys\nprint(len(sys.stdin.read()))", stdin="a" * (8 * MIB))
    assert result.stdout == f"{8 * MIB}\n"


@needs_box
def test_many_threads_of_the_caller_run_programs_at_once():
    results: list[str] = []
    busy = threading.Event()
    idle = [threading.Thread(target=busy.wait) for _ in range(8)]
    callers = [
        threading.Thread(target=lambda i=i: results.append(run_program(f"print({i})").stdout))
        for i in range(6)
    ]
    for thread in (*idle, *callers):
        thread.start()
    for thread in callers:
        thread.join()
    busy.set()
    assert sorted(results) == [f"{i}\n" for i in range(6)]


@needs_box
def test_no_descriptor_and_no_child_is_left_behind():
    run_program("print(1)")
    before = len(list(Path("/proc/self/fd").iterdir())), len(psutil.Process().children())
    for source in ("print(1)", "while True: print('a' * 9999)", "import os\nos.fork()"):
        run_program(source, limits=Limits(output_bytes=1000))
    assert (len(list(Path("/proc/self/fd").iterdir())), len(psutil.Process().children())) == before


@needs_box
def test_a_box_dies_with_its_caller():
    caller = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from mbrl_text_env.sandbox import *\n"
            "run_program('import os, time\\nos.fork()\\nos.setsid() if os.getpid() > 2 else 0\\n"
            "time.sleep(600)', limits=Limits(wall_seconds=900))",
        ],
    )
    try:
        me = psutil.Process(caller.pid)
        boxed = _wait_for(lambda: [p for p in me.children(recursive=True) if _is_main(p)], 2)
    finally:
        caller.kill()
        caller.wait()
    _, alive = psutil.wait_procs(boxed, timeout=30)
    assert alive == []


def _is_main(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[-1:] == ["main.py"]
    except psutil.Error:
        return False


def _wait_for(function, count):
    for _ in range(600):
        found = function()
        if len(found) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited for {count}, found {found}")


@needs_box
@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="the other tests run as an ordinary user"
)
def test_an_ordinary_user_gets_the_same_box():
    """To the kernel, program and caller are one user then; above all, signals must not pass."""
    python = "/usr/bin/python3"
    if not Path(python).exists():
        pytest.skip("there is no interpreter that every user can read")
    table = [
        each.source
        for each in programs(0, "/outside", "/project", "abstract")
        if each.category in ("signals", "daemons", "exits", "second thoughts")
    ]
    code = textwrap.dedent(f"""
        import json, os, sys
        if sys.version_info < (3, 10):
            sys.exit("too old")
        package = type(sys)("mbrl_text_env")
        package.__path__ = [{str(PACKAGE)!r}]
        sys.modules["mbrl_text_env"] = package
        from mbrl_text_env.sandbox import *
        print([each.name for each in facilities() if each.problem])
        code = "import os; print(os.getuid(), os.listdir('/work'), os.path.exists('/home'))"
        print(os.getuid(), run_program(code).stdout)
        limits = Limits(cpu_seconds=0.2, wall_seconds=0.5, processes=8)
        table = [Program(source) for source in json.load(sys.stdin)]
        print(any("BREACH" in each.stdout for each in run_programs(table, limits=limits)))
    """)
    done = subprocess.run(
        [python, "-B", "-c", code], user=65534, group=65534, extra_groups=[], cwd="/",
        capture_output=True, text=True, env={}, input=json.dumps(table),
    )  # fmt: skip
    if "too old" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("there is no interpreter that this project can be read with by every user")
    assert done.stdout == "[]\n65534 1000 ['main.py'] False\n\nFalse\n", done.stderr


def test_a_box_that_does_not_work_was_refused_by_the_system():
    """Else it is our mistake, by which all the tests of the box would be skipped."""
    problem = {each.name: each.problem for each in facilities()}.get("a box that works", "")
    assert not problem or "not permitted" in problem or "denied" in problem
    assert "starting" not in problem


def test_every_facility_says_what_to_do():
    for facility in facilities():
        assert facility.name
        assert facility.remedy


def test_a_machine_that_lacks_something_refuses_and_names_it(lacking):
    with pytest.raises(SandboxUnavailable) as caught:
        run_program("print(1)")
    message = str(caught.value)
    assert "user namespaces: Operation not permitted. Set a sysctl." in message
    assert "seccomp filters: missing. Use another kernel." in message
    assert "Linux:" not in message
    assert "allow_weaker=True" in message
    with pytest.raises(SandboxUnavailable):
        run_programs([Program("print(1)")])


def test_the_weaker_way_is_warned_of_once_and_keeps_the_limits(lacking):
    with pytest.warns(SandboxWarning, match="user namespaces") as caught:
        result = run_program("print(input(), open('a').read())", stdin="1", files={"a": "b"},
                             allow_weaker=True)  # fmt: skip
    assert len(caught) == 1
    assert result.stdout == "1 b\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = run_programs(
            [
                Program("import time\ntime.sleep(99)", limits=Limits(wall_seconds=0.3)),
                Program("while True: pass", limits=Limits(cpu_seconds=0.2, wall_seconds=60)),
                Program("import os\nprint(sorted(os.environ), os.listdir('.'))"),
                Program("x = bytearray(1 << 30)"),
            ],
            allow_weaker=True,
        )
    assert [result.reason for result in results] == ["wall", "cpu", None, None]
    assert results[2].stdout == "['PYTHONCOERCECLOCALE', 'PYTHONHASHSEED'] ['main.py']\n"
    assert "MemoryError" in results[3].stderr


@needs_box
def test_a_facility_that_is_missing_after_all_is_an_error_and_no_result(monkeypatch):
    layout = boxes._layout()
    broken = {**layout, "binds": [*layout["binds"], "/no/such/folder"]}
    monkeypatch.setattr(boxes, "_layout", lambda: broken)
    with pytest.raises(SandboxError, match=r"mounting /no/such/folder: .*No such file"):
        run_program("print(1)")


@needs_box
def test_files_that_do_not_fit_are_an_error_and_no_result():
    with pytest.raises(SandboxError, match=r"No space left on device.*Limits\.disk_bytes"):
        run_program("print(1)", files={"a": bytes(2 * MIB)}, limits=Limits(disk_bytes=MIB))


@pytest.mark.parametrize("path", ["/etc/a", "../a", "a/../../b", "", "main.py", "./main.py"])
def test_files_outside_the_folder_are_refused(path):
    with pytest.raises(ValueError, match="in the program's folder"):
        Program("", files={path: ""})


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["cpu_seconds", "memory_bytes", "output_bytes"])
def test_limits_are_positive_and_finite(name, value):
    with pytest.raises(ValueError, match=f"expected {name} to be positive"):
        Limits(**{name: value})


def test_workers_are_at_least_one():
    with pytest.raises(ValueError, match="workers to be at least 1"):
        run_programs([Program("")], workers=0)


@pytest.mark.parametrize("machine", sorted(_kernel.MACHINES))
def test_every_jump_of_the_filter_stays_in_it_and_every_path_ends(machine):
    """Interprets the filter, as the kernel does, on every call number and on foreign ones."""
    column, architecture = _kernel.MACHINES[machine]
    code = _kernel.filter_program(machine)
    denied = {pair[column] for pair in _kernel._NUMBERS.values()} - {None}
    clone, socket_, prlimit = (
        pair[column] for pair in (_kernel._CLONE, _kernel._SOCKET, _kernel._PRLIMIT64)
    )
    for number in range(600):
        verdict = _interpret(code, architecture, number, 0)
        if number > 441 or number == 435:
            assert verdict == 0x00050026, number  # ENOSYS
        elif number in denied:
            assert verdict == 0x00050001, number  # EPERM
        elif number != socket_:  # Its first argument, 0, is no family that is allowed.
            assert verdict == 0x7FFF0000, number
    allow = 0x7FFF0000
    assert _interpret(code, architecture, socket_, 1) == allow
    assert all(_interpret(code, architecture, socket_, f) != allow for f in (0, 2, 10, 16, 17))
    assert _interpret(code, architecture, clone, 0x01200011) == allow
    assert _interpret(code, architecture, clone, 0x10000011) != allow
    assert _interpret(code, architecture, prlimit, 1) != allow
    assert _interpret(code, architecture, prlimit, 0, 4) != allow
    assert _interpret(code, architecture, prlimit, 0, 7) == allow
    assert _interpret(code, architecture ^ 1, 0, 0) == 0x80000000
    assert _interpret(code, architecture, 0x40000000, 0) == 0x80000000


def _interpret(code: bytes, architecture: int, number: int, first: int, second: int = 0) -> int:
    import struct

    data = {0: number, 4: architecture, 16: first, 24: second}
    instructions = list(struct.iter_unpack("=HBBI", code))
    at, accumulator = 0, 0
    while True:
        kind, if_true, if_false, operand = instructions[at]
        if kind == 0x06:
            return int(operand)
        if kind == 0x20:
            accumulator, jump = data[operand], 0
        else:
            tests = {
                0x15: accumulator == operand,
                0x25: accumulator > operand,
                0x35: accumulator >= operand,
                0x45: bool(accumulator & operand),
            }
            jump = if_true if tests[kind] else if_false
        at += 1 + jump

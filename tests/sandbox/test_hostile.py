"""Three hundred programs that try to break out, and their well-behaved neighbours."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from mbrl_text_env import sandbox
from mbrl_text_env.sandbox import Limits, Program, ProgramResult, run_programs
from mbrl_text_env.sandbox.programs import executable
from tests.sandbox.hostile import NAMES, Hostile, programs

SECRET = "canary-5f0c1e77"  # noqa: S105 - of this test
LIMITS = Limits(
    cpu_seconds=0.2,
    wall_seconds=0.5,
    memory_bytes=128 << 20,
    disk_bytes=8 << 20,
    max_files=200,
    processes=8,
    output_bytes=1 << 18,
)
NEIGHBOUR = "import os\nprint({index} ** 3, os.listdir('.'), os.listdir('/tmp'))"
PROJECT = Path(sandbox.__file__).parents[2]

missing = [f"{each.name} ({each.problem})" for each in sandbox.facilities() if each.problem]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"this machine lacks: {', '.join(missing)}")


@dataclass
class Batch:
    """What came of the programs, and what was seen from the outside."""

    results: dict[str, ProgramResult]
    neighbours: list[tuple[str, ProgramResult]]
    connections: int
    files: dict[str, str]
    survivors: list[str]


@pytest.fixture(scope="module")
def batch(tmp_path_factory) -> Iterator[Batch]:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret.txt").write_text(SECRET)
    (folder / "canary.txt").write_text("unchanged")
    abstract = f"sandbox-test-{os.getpid()}"
    with (
        pytest.MonkeyPatch.context() as patch,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as local,
    ):
        local.bind("\0" + abstract)
        local.listen()
        patch.setenv("SANDBOX_TEST_SECRET", SECRET)
        inherited = os.open(folder / "secret.txt", os.O_RDONLY)
        os.set_inheritable(inherited, True)
        before = _boxed()
        table = programs(listener.getsockname()[1], str(folder), str(PROJECT), abstract)
        results, neighbours = _run(table)
        yield Batch(
            results,
            neighbours,
            _accepted(listener) + _accepted(local),
            {path.name: path.read_text() for path in folder.iterdir()},
            _survivors(before),
        )
        os.close(inherited)


def _run(
    table: list[Hostile],
) -> tuple[dict[str, ProgramResult], list[tuple[str, ProgramResult]]]:
    asked = []
    for index, hostile in enumerate(table):
        asked.append(Program(hostile.source))
        # A neighbour may take its time where the machine is busy.
        neighbour = NEIGHBOUR.format(index=index)
        asked.append(Program(neighbour, limits=Limits()) if index % 4 == 0 else None)
    results = iter(run_programs([each for each in asked if each], limits=LIMITS, workers=2))
    ended, neighbours = {}, []
    for index, hostile in enumerate(table):
        ended[hostile.name] = next(results)
        if index % 4 == 0:
            neighbours.append((f"{index**3} ['main.py'] []\n", next(results)))
    return ended, neighbours


def _accepted(listener: socket.socket) -> int:
    listener.setblocking(False)
    try:
        listener.accept()
    except BlockingIOError:
        return 0
    return 1


def _boxed() -> list[str]:
    """The processes of our interpreter that live in another PID namespace."""
    found = []
    own = Path("/proc/self/ns/pid").readlink()
    for process in psutil.process_iter():
        try:
            if Path(f"/proc/{process.pid}/ns/pid").readlink() != own:
                found.append(f"{process.pid} {process.create_time()} {process.exe()}")
        except (OSError, psutil.Error):
            continue
    return [each for each in found if each.endswith(executable())]


def _survivors(before: list[str]) -> list[str]:
    """What is still there after a while: programs of another test run may come and go."""
    left = [each for each in _boxed() if each not in before]
    for _ in range(50):
        if not left:
            break
        time.sleep(0.1)
        now = _boxed()
        left = [each for each in left if each in now]
    return left


def test_the_table_is_large_and_has_no_program_twice():
    sources = {hostile.source for hostile in programs(0, "/outside", "/project", "abstract")}
    assert len(NAMES) == len(set(NAMES)) == len(sources) >= 200


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_program_gains_nothing_and_ends(batch, name):
    if name.startswith("kernel") and platform.machine() != "x86_64":
        pytest.skip("the numbers of its system calls are those of x86_64")
    result = batch.results[name]
    output = result.stdout + result.stderr
    assert SECRET not in output
    assert "BREACH" not in output
    assert len(output.encode()) <= 4 * LIMITS.output_bytes  # Replaced bytes take 3.
    assert result.seconds <= LIMITS.wall_seconds + 1


def test_neighbours_of_hostile_programs_are_right(batch):
    for expected, result in batch.neighbours:
        assert (result.stdout, result.exit_code, result.reason) == (expected, 0, None)


def test_nothing_outside_was_touched(batch):
    assert batch.connections == 0
    assert batch.files == {"secret.txt": SECRET, "canary.txt": "unchanged"}
    assert batch.survivors == []


def test_the_checks_see_what_they_look_for():
    """A program that is let see the secret, and one that calls `breach`, would be found out."""
    (breach, *_) = [each for each in programs(0, "", "", "") if each.name == "exits-0"]
    source = breach.source.replace("sys.exit(0)", "breach(1)") + "print(input())"
    (result,) = run_programs([Program(source, stdin=SECRET)])
    assert "BREACH" in result.stdout
    assert SECRET in result.stdout

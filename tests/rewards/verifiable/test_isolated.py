"""The helper process: it answers, it is killed in time, and it is replaced."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from mbrl_text_env._lazy import optional
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.verifiable.isolated import (
    CrashError,
    IsolatedError,
    OutOfTimeError,
    call_isolated,
)

# Functions of the standard library stand for work of every kind; this one prepares nothing.
NOTHING = ["os:getpid"]


def call(function, *arguments, seconds=20.0):
    return call_isolated(function, *arguments, seconds=seconds, prepare=NOTHING)


def test_it_works_in_one_process_that_is_not_this_one():
    first, second = call("os:getpid"), call("os:getpid")
    assert first == second != os.getpid()


def test_values_come_back_as_json():
    assert call("math:factorial", 5) == 120
    assert call("textwrap:shorten", "日本 " * 9, 8) == "日本 [...]"


def test_what_takes_too_long_is_killed_and_the_next_call_works():
    before = call("os:getpid")
    began = time.monotonic()
    with pytest.raises(OutOfTimeError, match=r"time:sleep took longer than 0.3 s"):
        call("time:sleep", 600, seconds=0.3)
    assert time.monotonic() - began < 60
    assert call("os:getpid") != before


def test_a_process_that_ends_is_an_error_and_is_replaced():
    with pytest.raises(CrashError, match="ended with exit code 3"):
        call("os:_exit", 3)
    assert call("math:factorial", 3) == 6


def test_an_exception_comes_back_with_its_text_and_the_process_goes_on():
    before = call("os:getpid")
    with pytest.raises(
        IsolatedError, match=r"ValueError: math domain error|expected a nonnegative"
    ):
        call("math:sqrt", -1)
    with pytest.raises(IsolatedError, match="SystemExit: 4"):
        call("sys:exit", 4)
    with pytest.raises(IsolatedError, match="not JSON serializable"):
        call("builtins:bytes", 3)
    assert call("os:getpid") == before


def test_printing_and_reading_do_not_disturb_the_channel():
    assert call("builtins:print", '{"value": 1}') is None
    with pytest.raises(IsolatedError, match="EOFError"):
        call("builtins:input")
    assert call("math:factorial", 4) == 24


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_it_writes_no_files_and_takes_no_more_than_its_memory(tmp_path):
    with pytest.raises(IsolatedError, match="File too large"):
        call("shutil:copyfile", __file__, str(tmp_path / "copy"))
    with pytest.raises(IsolatedError, match="MemoryError"):
        call("operator:mul", "x", 5 * 2**30)
    assert call("math:factorial", 4) == 24


def test_secrets_of_the_environment_do_not_reach_it(monkeypatch):
    call_isolated("os:getpid", seconds=5, prepare=NOTHING)
    with pytest.raises(CrashError):
        call("os:_exit", 0)
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    assert call("os:getenv", "SECRET_TOKEN") is None
    assert call("os:getenv", "PYTHONHASHSEED") == "0"


def test_work_that_cannot_be_prepared_is_a_reward_error():
    with pytest.raises(RewardError, match="No module named 'no_such_module'"):
        call_isolated("os:getpid", seconds=5, prepare=["no_such_module:load"])


def test_threads_get_their_own_answers_even_if_one_is_killed():
    results: dict[int, object] = {}

    def work(number: int) -> None:
        try:
            if number == 3:
                call("time:sleep", 600, seconds=0.3)
            results[number] = call("math:factorial", number)
        except IsolatedError as error:
            results[number] = type(error).__name__

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert results == {0: 1, 1: 1, 2: 2, 3: "OutOfTimeError", 4: 24, 5: 120, 6: 720, 7: 5040}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_a_forked_process_uses_a_helper_of_its_own():
    mine = call("os:getpid")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(call("os:getpid")).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reading, 100)) != mine
    assert call("os:getpid") == mine


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(RewardError, match=r"'jsonschema' .*pip install 'mbrl-text-env\[verify\]'"):
        optional("jsonschema", RewardError)

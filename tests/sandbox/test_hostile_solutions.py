"""No score that is not earned, whatever a solution says to the process that judges it."""

from __future__ import annotations

import pytest

from mbrl_text_env.rewards.verifiable.code import UnitTestError, UnitTestReward
from mbrl_text_env.sandbox import Limits, facilities
from mbrl_text_env.types import Prompt
from tests.sandbox.hostile_solutions import TASKS, attacks

missing = [f"{each.name} ({each.problem})" for each in facilities() if each.problem]
needs_box = pytest.mark.skipif(bool(missing), reason=f"this machine lacks: {', '.join(missing)}")

LIMITS = Limits(cpu_seconds=0.8, wall_seconds=15)
ROWS = attacks()
NAMES = [name for name, _, _ in ROWS]


@pytest.fixture(scope="module")
def scores():
    """Every attack, with a solution of the same task beside it, in one batch."""
    prompts, responses = [], []
    for _, name, program in ROWS:
        task = TASKS[name]
        prompt = Prompt.from_text("Write it.", id=name, metadata=task.metadata)
        prompts += [prompt, prompt]
        responses += [f"```python\n{program}```", f"```python\n{task.honest}\n```"]
    return UnitTestReward(limits=LIMITS).score(prompts, responses).tolist()


def test_the_table_has_no_program_twice_and_every_task_an_attack():
    assert len({(task, program) for _, task, program in ROWS}) == len(set(NAMES)) >= 80
    assert {task for _, task, _ in ROWS} == TASKS.keys()
    for _, _, program in ROWS:
        compile(program, "attack", "exec")


@needs_box
@pytest.mark.parametrize("index", range(len(ROWS)), ids=NAMES)
def test_a_hostile_solution_scores_nothing_and_its_neighbour_all(scores, index):
    assert scores[2 * index : 2 * index + 2] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("test", "means"),
    [
        ("assert eval(solve(3)) == 3", "eval"),
        ("assert solve(lambda text: exec(text)) == 3", "exec"),
        ("assert solve(compile) == 3", "compile"),
        ("def check(f):\n    __import__(f('os'))\ncheck(solve)", "__import__"),
        ("import subprocess\nsubprocess.run(solve(3))", "subprocess"),
        ("def f():\n    from importlib import import_module\nsolve(f)", "importlib"),
    ],
)
def test_tests_that_would_run_what_a_solution_says_are_refused_before_any_runs(test, means):
    prompt = Prompt.from_text("Write it.", id="p1", metadata={"tests": [test]})
    with pytest.raises(UnitTestError, match=rf"'p1'.*run no code made from data.* {means}, which"):
        UnitTestReward().score([prompt], ["def solve(x): return 3"])


@needs_box
def test_the_means_may_be_what_is_asked_for():
    prompt = Prompt.from_text(
        "Write a calculator.",
        metadata={"tests": ["assert eval('1+2') == 3"], "entry_point": "eval"},
    )
    answers = ["def eval(text): return sum(map(int, text.split('+')))", "pass", "eval = eval"]
    scores = UnitTestReward(limits=LIMITS).score([prompt] * 3, answers)
    assert scores.tolist() == [1.0, 0.0, 1.0]


@needs_box
def test_no_solution_can_end_a_batch_with_an_error():
    """A test that hands over what cannot cross is an error, but not where a solution led it."""
    tests = ["assert solve(3).union(memoryview(b'a')) == {97}", "assert solve(3)[:1] is not None"]
    hostile = """
class A:
    def __getattr__(self, name): return solve
    def __getitem__(self, key): return {}[key]
def solve(n): return A()
"""
    prompt = Prompt.from_text("Write it.", metadata={"tests": tests[:1]})
    answers = [hostile, "def solve(n): return set()"]
    assert UnitTestReward(limits=LIMITS).score([prompt] * 2, answers).tolist() == [0.0, 1.0]
    prompt = Prompt.from_text("Write it.", metadata={"tests": tests[1:]})
    answers = [hostile, "def solve(n): return [1]"]
    assert UnitTestReward(limits=LIMITS).score([prompt] * 2, answers).tolist() == [0.0, 1.0]

"""Code that is right as far as tests can tell: the response is a program, and its tests are run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env import sandbox
from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.rewards.names import named
from mbrl_text_env.rewards.verifiable.programs import extract_code
from mbrl_text_env.rewards.verifiable.statements import StatementError, granted, names_of, parse
from mbrl_text_env.sandbox import Limits, Program, ProgramResult
from mbrl_text_env.types import FloatArray, Prompt

_LIMITS = Limits(memory_bytes=512 * 2**20)
"""Programs that recurse often start a thread with a stack of 256 MiB, of which they use little."""


class UnitTestError(ValueError):
    """A prompt has no tests, malformed ones, or one that cannot be run apart from the solution."""


@named("unit-tests")
class UnitTestReward(RewardModel):
    """The fraction of its prompt's tests that the program in a response passes, in [0, 1].

    `prompt.metadata["tests"]` is a list of

    - Python statements such as `"assert add(1, 2) == 3"` (as in MBPP), which pass if they run to
      their end; or
    - cases `{"input": "1 2\\n", "output": "3\\n"}` (as in APPS), which pass if the program, given
      the input as by `python program.py < input`, prints the output and exits with 0. White space
      at the ends of lines and of the text is ignored. Lists of lines are taken for texts.

    Optional, for statements: `"test_imports"`, imports that they need, which the solution finds
    done as well; `"setup"`, statements that run between the solution and each test; each a text or
    a list of texts; and `"entry_point"`, the name, or list of names, of what the solution is asked
    for, which matters only if it is also the name of a builtin.

    The program is the last fenced block marked as Python, else the last fenced block, else the
    whole response; of several Python blocks, the last one that defines what the tests ask for, or
    reads input where there is some. It has the standard library, and integers of any length become
    texts. For statements it finds the names of `typing`, and a `class Solution` what LeetCode
    imports. An empty program scores 0, and so does one larger than half of `limits.disk_bytes`.
    Every test runs in a box of its own, so that a test that never ends or takes its processes down
    costs the others nothing.

    What is guaranteed, where the sandbox is whole (`sandbox.facilities()`):

    - A case passes only if the program has printed the output. The output is compared outside the
      box and never enters it.
    - A statement passes only if all of it has run, without an exception, in a process that the
      solution cannot write to or read from. The solution's functions are called in a process that
      was forked before the test was read. What comes back is data of a closed set of types
      (numbers, texts, bytes, lists, tuples, sets, dicts, deques, ranges, `decimal`, `fractions`,
      `datetime`, `pathlib`, `uuid`); all else stays where it is, as a remote object. Nothing that
      the solution says can name, replace or run anything in the process that decides, and what is
      no proper answer fails the test, whatever the test catches.
    - Which names are the solution's follows from the tests alone. Builtins, what the tests import
      and define, and what tests take for granted (`math.isclose`, `Counter`) are Python's.
    - `is`, `type(x)`, `x.__class__` and `hasattr` see the solution's objects, not the handles.
    - A remote object is compared with plain data as the plain value that its class is made from,
      by the judge; if it has none, it is equal to none. So is arithmetic with plain data.
    - Tests that run code made from data (`eval`, `exec`, `subprocess` and the like) are refused
      before anything runs. Functions of a test that the solution calls, run in the judge: they get
      data and remote objects.

    What is not:

    - Tests are no proof. A program may know the answers to well-known tests by heart, and a test
      such as `assert f(1) != 2`, or `assert f(1) == g(1)` where all comes from the solution, is
      easy to pass. Remote objects are compared with each other as the solution's classes say.
    - Arguments and results are copies. What the solution does to a list, dict, set, deque or
      bytearray that is itself an argument is copied back after the call, and such an argument that
      is returned is the same object. What is inside of it is not: a test that a copy is deep can be
      passed by a shallow one. Objects of classes of the setup cannot be handed over and raise an
      error. A class of the test cannot have a class of the solution's as its base,
      `redirect_stdout` sees nothing of what the solution prints, and a solution's `__exit__` cannot
      hold back an error: right solutions fail such tests. `v * 2`, where `v` is a remote object
      without a plain value, and `x in v`, where it cannot be iterated over, raise TypeError.
    - A program near a limit of time may pass in one run and not in another. The limits leave room.
    - With `allow_weaker=True` on a machine without the sandbox nothing at all is guaranteed.

    Sources: Austin et al., "Program Synthesis with Large Language Models", 2021 (MBPP); Hendrycks
    et al., "Measuring Coding Challenge Competence With APPS", NeurIPS 2021. Deviation: they run the
    tests and the solution in one process, which solutions can fool.

    Args:
        partial: True for the fraction of tests that pass; False for 1 if all do and else 0.
        limits: The limits of each test; None for `Limits()` with 512 MiB of memory.
        workers: How many tests run at a time; None for as many as there are processors.
        allow_weaker: See `sandbox.run_program`.
        name: What reports call it.

    Example:
        >>> from mbrl_text_env.types import Prompt
        >>> tests = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]
        >>> prompt = Prompt.from_text("Write add(a, b).", metadata={"tests": tests})
        >>> response = "```python\\ndef add(a, b):\\n    return 3\\n```"
        >>> UnitTestReward().score([prompt], [response])  # doctest: +SKIP
        array([0.5])
    """

    def __init__(
        self,
        partial: bool = True,
        limits: Limits | None = None,
        workers: int | None = None,
        allow_weaker: bool = False,
        name: str = "unit-tests",
    ) -> None:
        self.partial = partial
        self.limits = limits or _LIMITS
        self.workers = workers
        self.allow_weaker = allow_weaker
        self.name = name

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt has tests."""
        return bool(prompt.metadata.get("tests"))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the fraction of its prompt's tests that each response passes.

        Raises:
            UnitTestError: A prompt has no tests or malformed ones; a test runs code made from
                data, or takes nothing from the solution, or does not tell which of several
                builtins is the solution's; or hands the solution what cannot be handed over. The
                message names the prompt.
            ValueError: The numbers of prompts and responses differ.
            SandboxUnavailable: This machine cannot shut untrusted code in.
        """
        if len(prompts) != len(responses):
            raise ValueError(
                f"Expected one prompt a response, got {len(prompts)} prompts and "
                f"{len(responses)} responses. Repeat a prompt for each of its responses."
            )
        # Every prompt is read before any program is run, and every run is made once.
        suites = [_suite(prompt) for prompt in prompts]
        rows = [self._runs(*pair) for pair in zip(suites, responses, strict=True)]
        wanted = dict.fromkeys(run for row in rows for run in row)
        results = sandbox.run_programs(
            [run.program() for run in wanted],
            limits=self.limits,
            workers=self.workers,
            allow_weaker=self.allow_weaker,
        )
        result_of = dict(zip(wanted, results, strict=True))
        scores = np.zeros(len(responses))
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            passed = [_passes(prompt, run, result_of[run]) for run in row]
            if passed:
                scores[i] = np.mean(passed) if self.partial else float(all(passed))
        return scores

    def _runs(self, suite: Sequence[_Case | _Statement], response: str) -> list[_Run]:
        code = extract_code(response, "|".join({test.marks for test in suite} - {""}))
        room = self.limits.disk_bytes // 2
        if not code.strip() or len(code.encode(errors="surrogatepass")) > room:
            return []
        return [_Run(code, test) for test in suite]


@dataclass(frozen=True)
class _Case:
    """What a program reads, and what it should print."""

    input: str
    output: str

    @property
    def marks(self) -> str:
        """A pattern of what a program has that can pass."""
        return r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0" if self.input.strip() else ""


@dataclass(frozen=True)
class _Statement:
    """A test in Python, as the judge reads it: JSON."""

    orders: str
    marks: str


@dataclass(frozen=True)
class _Run:
    code: str
    test: _Case | _Statement

    def program(self) -> Program:
        if isinstance(self.test, _Case):
            return Program(self.code, self.test.input)
        files = {"solution.py": self.code, f"{_FOLDER}/_solution.py": _source_of("_solution.py")}
        # The orders are for the judge alone.
        return Program(_source_of("_judge.py"), self.test.orders, files, stdin_path=False)


_FOLDER = "mbrl_text_env/sandbox"


@lru_cache(maxsize=2)
def _source_of(file: str) -> str:
    return (Path(sandbox.__file__).parent / file).read_text(encoding="utf-8")


def _passes(prompt: Prompt, run: _Run, result: ProgramResult) -> bool:
    if result.exit_code != 0:
        return False
    if isinstance(run.test, _Case):
        return _lines(result.stdout) == _lines(run.test.output)
    verdict = json.loads(result.stdout)
    if verdict["verdict"] == "unsupported":
        raise UnitTestError(
            f"Prompt {prompt.id!r}: expected its tests to hand the solution plain data, functions, "
            f"or what the solution has returned, but {verdict['detail']}. Change the test "
            f"{json.loads(run.test.orders)['test']!r}, or leave out the prompt."
        )
    return bool(verdict["verdict"] == "passed")


def _lines(text: str) -> list[str]:
    # A mark of byte order is not seen, and is no part of a line.
    return [line.rstrip() for line in text.strip("\ufeff\n\r\t\v\f ").split("\n")]


def _suite(prompt: Prompt) -> list[_Case | _Statement]:
    """The tests of a prompt, read."""
    suite, unsure = _read(prompt, _entry_points(prompt))
    if not unsure:
        return suite
    # These use builtins alone: the one that all of them use is what the solution is asked for.
    names = frozenset.intersection(*unsure)
    if len(names) == 1:
        return _read(prompt, list(names))[0]
    raise UnitTestError(
        f"Prompt {prompt.id!r}: expected tests to use what the solution is asked for, but one "
        f"takes {', '.join(map(repr, sorted(names))) or 'nothing'} from it. Say in "
        "metadata['entry_point'] what is asked for, or change the test."
    )


def _read(
    prompt: Prompt, entry_points: Sequence[str]
) -> tuple[list[_Case | _Statement], list[frozenset[str]]]:
    """The tests, and for each that does not tell which names are the solution's, what may be."""
    tests = prompt.metadata.get("tests")
    if not isinstance(tests, list | tuple) or not tests:
        raise UnitTestError(
            f"Prompt {prompt.id!r}: expected metadata['tests'] to be a list of at least one test, "
            f"got {tests!r}. Add tests, or leave out the prompts for which "
            "`UnitTestReward.applies_to(prompt)` is False."
        )
    frame = {
        "imports": _source(prompt, "test_imports"),
        "setup": _source(prompt, "setup"),
        "entry_points": entry_points,
    }
    pairs = [_test(prompt, index, test, frame) for index, test in enumerate(tests)]
    return [test for test, _ in pairs], [names for _, names in pairs if names is not None]


def _test(
    prompt: Prompt, index: int, test: Any, frame: Mapping[str, Any]
) -> tuple[_Case | _Statement, frozenset[str] | None]:
    if isinstance(test, str) and test.strip():
        _check_syntax(prompt, f"metadata['tests'][{index}]", test)
        try:
            return _statement(test, **frame)
        except StatementError as error:
            raise UnitTestError(
                f"Prompt {prompt.id!r}: expected tests that run no code made from data, but "
                f"metadata['tests'][{index}] or what belongs to it has {error}. It would run what "
                "the solution says in the process that judges. Compare values instead, or leave "
                "out the prompt."
            ) from error
    if isinstance(test, Mapping) and test.keys() == {"input", "output"}:
        texts = [_text(test[key]) for key in ("input", "output")]
        if None not in texts:
            return _Case(str(texts[0]), str(texts[1])), None
    raise UnitTestError(
        f"Prompt {prompt.id!r}: expected metadata['tests'][{index}] to be statements such as "
        "'assert f(1) == 2', or a case {'input': text, 'output': text}, got "
        f"{test!r}. Change it to one of them."
    )


def _statement(
    test: str, imports: str, setup: str, entry_points: Sequence[str]
) -> tuple[_Statement, frozenset[str] | None]:
    names = names_of([imports, setup, test], entry_points)
    orders = {
        "imports": f"{names.imports}\n{imports}",
        "setup": setup,
        "test": test,
        "names": sorted(names.solution),
        "granted": granted(imports, "Solution" in names.solution),
    }
    listed = "|".join(map(re.escape, sorted(names.solution)))
    marks = rf"^(?:(?:async[ \t]+)?def|class)[ \t]+(?:{listed})\b|^(?:{listed})[ \t]*=(?!=)"
    sure = names.certain and names.solution
    return _Statement(json.dumps(orders), marks), None if sure else names.solution


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return "\n".join(value)
    return None


def _source(prompt: Prompt, key: str) -> str:
    value = prompt.metadata.get(key) or ""
    source = _text(value)
    if source is None:
        raise UnitTestError(
            f"Prompt {prompt.id!r}: expected metadata[{key!r}] to be Python statements, a text or "
            f"a list of texts, got {value!r}. Change it, or leave it out."
        )
    _check_syntax(prompt, f"metadata[{key!r}]", source)
    return source


def _entry_points(prompt: Prompt) -> list[str]:
    value = prompt.metadata.get("entry_point") or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(each, str) for each in names):
        raise UnitTestError(
            f"Prompt {prompt.id!r}: expected metadata['entry_point'] to be a name or a list of "
            f"names, got {value!r}. Change it, or leave it out."
        )
    return list(names)


def _check_syntax(prompt: Prompt, place: str, source: str) -> None:
    try:
        parse(source)
    except (SyntaxError, ValueError) as error:
        raise UnitTestError(
            f"Prompt {prompt.id!r}: expected {place} to be Python statements, got "
            f"{source!r} ({error}). Correct them."
        ) from error

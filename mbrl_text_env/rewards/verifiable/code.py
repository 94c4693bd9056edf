"""A reward for code, which runs the program in a response against the prompt's tests."""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import re
import symtable
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env import sandbox
from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.rewards.names import named
from mbrl_text_env.sandbox import Limits, Program, ProgramResult
from mbrl_text_env.types import FloatArray, Prompt

# Recursive programs often start a thread with a stack of 256 MiB, and use little of it.
_LIMITS = Limits(memory_bytes=512 * 2**20)


class UnitTestError(ValueError):
    """Raised if a prompt's tests are missing, malformed or cannot run outside the solution."""


def _error(prompt: Prompt, expected: str) -> UnitTestError:
    return UnitTestError(f"Prompt {prompt.id!r}: expected {expected}")


@named("unit-tests")
@dataclass(eq=False)
class UnitTestReward(RewardModel):
    """The fraction of the prompt's tests that the program in a response passes, in [0, 1].

    `prompt.metadata["tests"]` is a list of

    - Python statements such as `"assert add(1, 2) == 3"` (as in MBPP), which pass if they run
      without an error; or
    - cases `{"input": "1 2\\n", "output": "3\\n"}` (as in APPS), which pass if the program, run as
      `python program.py < input`, prints the output and exits with 0. White space at the ends of
      lines and of the text is ignored. Input and output can also be lists of lines.

    Statements have three more optional metadata: `"test_imports"`, which the solution gets as well;
    `"setup"`, which runs between the solution and each test (both a string or a list of strings);
    and `"entry_point"`, the name or names that the solution must define, needed only for a name of
    a builtin or of something that tests use without an import (`Counter`).

    `extract_code` finds the program. Of several Python blocks, it is the last one that defines a
    name used by the tests, or that reads input if there is input. It can use the standard library,
    and convert integers of any length to strings. For statements, the names of `typing` are
    imported, and for a `class Solution` also LeetCode's imports. A program that is empty or larger
    than half of `limits.disk_bytes` scores 0. Every test runs in its own sandbox.

    A program cannot set its own score. A case's output never enters the sandbox. A statement runs
    in a process that the solution cannot reach and that treats the solution's results as data.
    docs/sandbox.md lists the guarantees and their limits. Tests that run code made from data are
    rejected before anything runs.

    Sources: Austin et al., "Program Synthesis with Large Language Models", 2021 (MBPP); Hendrycks
    et al., "Measuring Coding Challenge Competence With APPS", NeurIPS 2021. Deviation: they run
    tests and solution in one process.

    Args:
        partial: True for the fraction of tests that pass; False for 1 if all pass, otherwise 0.
        limits: The limits of each test; None for `Limits()` with 512 MiB of memory.
        workers: Number of tests to run in parallel; None for the number of processors.
        allow_weaker: See `sandbox.run_program`.
        name: Name in reports.

    Raises:
        UnitTestError: When scoring, if a prompt has no tests or malformed ones, or a test runs code
            made from data, uses nothing from the solution, or passes the solution an object that
            cannot be transferred. The message names the prompt.
        SandboxUnavailable: When scoring, if this machine cannot isolate untrusted code.

    Example:
        >>> tests = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]
        >>> prompt = Prompt.from_text("Write add(a, b).", metadata={"tests": tests})
        >>> response = "```python\\ndef add(a, b):\\n    return 3\\n```"
        >>> UnitTestReward().score([prompt], [response])  # doctest: +SKIP
        array([0.5])
    """

    partial: bool = True
    limits: Limits | None = None
    workers: int | None = None
    allow_weaker: bool = False
    name: str = "unit-tests"

    def __post_init__(self) -> None:
        self.limits = self.limits or _LIMITS

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether the prompt has tests."""
        return bool(prompt.metadata.get("tests"))

    def bound(self, prompts: Sequence[Prompt], prefixes: Sequence[str]) -> FloatArray:
        """Return float64[B] of ones, since a later code block can be the program."""
        return np.ones(len(prefixes))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B]."""
        # Check all prompts before running any program, and do not repeat identical runs.
        suites = list(map(_suite, prompts))
        rows = [self._runs(*row) for row in zip(suites, responses, strict=True)]
        wanted = dict.fromkeys(run for row in rows for run in row)
        results = sandbox.run_programs(
            [test.program(code) for code, test in wanted],
            limits=self.limits,
            workers=self.workers,
            allow_weaker=self.allow_weaker,
        )
        result_of = dict(zip(wanted, results, strict=True))
        scores = np.zeros(len(responses))
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            passed = [run[1].passes(prompt, result_of[run]) for run in row]
            if passed:
                scores[i] = np.mean(passed) if self.partial else float(all(passed))
        return scores

    def _runs(self, suite: Sequence[_Test], response: str) -> list[tuple[str, _Test]]:
        code = extract_code(response, "|".join({test.marks for test in suite} - {""}))
        room = (self.limits or _LIMITS).disk_bytes // 2
        if not code.strip() or len(code.encode(errors="surrogatepass")) > room:
            return []
        return [(code, test) for test in suite]


# --- The tests of a prompt ---


@dataclass(frozen=True)
class _Test:
    """A case with its expected output, or Python statements without one."""

    # The input of the program, or for statements, the JSON input of the judge.
    input: str
    output: str | None
    # A pattern that matches programs which can pass.
    marks: str

    def program(self, code: str) -> Program:
        if self.output is not None:
            return Program(code, self.input)
        files = {"solution.py": code, "mbrl_text_env/sandbox/_solution.py": _source_of("_solution")}
        # Only the judge reads the orders.
        return Program(_source_of("_judge"), self.input, files, stdin_path=False)

    def passes(self, prompt: Prompt, result: ProgramResult) -> bool:
        if result.exit_code != 0:
            return False
        if self.output is not None:
            return _lines(result.stdout) == _lines(self.output)
        verdict = json.loads(result.stdout)
        if verdict["verdict"] == "unsupported":
            raise _error(
                prompt,
                "its tests to pass the solution plain data, functions, or objects that the "
                f"solution returned, but {verdict['detail']}. Change "
                f"{json.loads(self.input)['test']!r}, or remove the prompt.",
            )
        return bool(verdict["verdict"] == "passed")


@lru_cache(maxsize=2)
def _source_of(module: str) -> str:
    return (Path(sandbox.__file__).parent / f"{module}.py").read_text(encoding="utf-8")


def _lines(text: str) -> list[str]:
    # A byte order mark is invisible and not part of a line.
    return [line.rstrip() for line in text.strip("\ufeff\n\r\t\v\f ").split("\n")]


def _suite(prompt: Prompt) -> list[_Test]:
    given = prompt.metadata.get("entry_point") or []
    entry_points = [given] if isinstance(given, str) else given
    if _text(entry_points) is None:
        expected = "metadata['entry_point'] to be a name or a list of names"
        raise _error(prompt, f"{expected}, got {given!r}. Change it, or remove it.")
    tests = prompt.metadata.get("tests")
    if not isinstance(tests, list | tuple) or not tests:
        raise _error(
            prompt,
            f"metadata['tests'] to be a list of at least one test, got {tests!r}. Add tests, or "
            "remove the prompts for which `UnitTestReward.applies_to(prompt)` is False.",
        )
    frame = [_source(prompt, key) for key in ("test_imports", "setup")]
    return [_test(prompt, i, test, frame, entry_points) for i, test in enumerate(tests)]


def _test(
    prompt: Prompt, index: int, test: Any, frame: list[str], entry_points: Sequence[str]
) -> _Test:
    place = f"metadata['tests'][{index}]"
    if isinstance(test, str) and test.strip():
        _check_syntax(prompt, place, test)
        try:
            return _statement(test, frame[0], frame[1], entry_points)
        except StatementError as error:
            raise _error(
                prompt,
                f"tests that use the solution and run no code made from data, "
                f"but {place} {error}. Change the test, or remove the prompt.",
            ) from error
    if isinstance(test, Mapping) and test.keys() == {"input", "output"}:
        given, output = _text(test["input"]), _text(test["output"])
        if given is not None and output is not None:
            marks = r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0" if given.strip() else ""
            return _Test(given, output, marks)
    cases = "statements such as 'assert f(1) == 2', or a case {'input': text, 'output': text}"
    raise _error(prompt, f"{place} to be {cases}, got {test!r}. Change it to one of them.")


def _statement(test: str, imports: str, setup: str, entry_points: Sequence[str]) -> _Test:
    solution, granted = names_of([imports, setup, test], entry_points)
    if not solution:
        raise StatementError(
            "takes nothing from it except builtin names (if the solution defines one of them, "
            "name it in metadata['entry_point'])"
        )
    orders = {
        "imports": f"{granted}\n{imports}",
        "setup": setup,
        "test": test,
        "names": sorted(solution),
        "granted": _granted(imports, "Solution" in solution),
    }
    listed = "|".join(map(re.escape, sorted(solution)))
    marks = rf"^(?:(?:async[ \t]+)?def|class)[ \t]+(?:{listed})\b|^(?:{listed})[ \t]*=(?!=)"
    return _Test(json.dumps(orders), None, marks)


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
        expected = f"metadata[{key!r}] to be Python statements, a string or a list of strings"
        raise _error(prompt, f"{expected}, got {value!r}. Change it, or remove it.")
    _check_syntax(prompt, f"metadata[{key!r}]", source)
    return source


def _check_syntax(prompt: Prompt, place: str, source: str) -> None:
    try:
        _parsed(source)
    except (SyntaxError, ValueError) as error:
        what = f"{place} to be Python statements, got {source!r} ({error}). Correct them."
        raise _error(prompt, what) from error


# --- The names that a test takes from the solution, which depend only on the tests ---

# Names that tests and signatures use without an import, and their modules.
_TYPING = (
    "Any", "Callable", "Dict", "FrozenSet", "Generator", "Iterable", "Iterator", "List", "Literal",
    "Mapping", "NamedTuple", "Optional", "Sequence", "Set", "Tuple", "Type", "TypeVar", "Union",
)  # fmt: skip
_CLASSES = {
    "Counter": "collections", "OrderedDict": "collections", "defaultdict": "collections",
    "deque": "collections", "namedtuple": "collections", "date": "datetime", "datetime": "datetime",
    "timedelta": "datetime", "Decimal": "decimal", "Fraction": "fractions", "Path": "pathlib",
    **dict.fromkeys(_TYPING, "typing"),
}  # fmt: skip
_MODULES = (
    "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq",
    "itertools", "json", "math", "operator", "os", "random", "re", "statistics", "string", "sys",
)  # fmt: skip
# The imports that sites with a `class Solution` add before it.
_PREAMBLE = (
    *(f"import {module}" for module in _MODULES),
    *(f"from {module} import *" for module in (
        "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random",
        "statistics", "itertools", "functools", "operator",
    )),
    "inf = math.inf",
)  # fmt: skip
_RUN_CODE = frozenset({"eval", "exec", "compile", "__import__", "breakpoint"})
_RUN_MODULES = frozenset(
    {"code", "codeop", "ctypes", "doctest", "importlib", "multiprocessing", "pty", "runpy",
     "subprocess", "timeit"}
)  # fmt: skip
_PYTHON = frozenset(
    name
    for name, value in vars(builtins).items()
    # Exclude names added by `site` and interactive shells.
    if isinstance(value, type | types.BuiltinFunctionType) or name in ("exit", "quit")
)


class StatementError(ValueError):
    """Raised if a test runs code made from data, or takes nothing from the solution."""


def names_of(parts: Sequence[str], entry_points: Sequence[str]) -> tuple[set[str], str]:
    """Find the names that a test (imports, setup, test) takes from the solution.

    Names that the parts define or import are not the solution's. Of the other names, the entry
    points ("f", "Solution().f") are the solution's, and so is every name that is neither a builtin
    nor commonly used without an import (`List`, `Counter`, `math.` and so on). Return the
    solution's names, and import statements for the names used without an import.

    Example:
        >>> names_of(["", "", "assert math.isclose(solve(2), 1.41, rel_tol=0.1)"], [])
        ({'solve'}, 'import math')
    """
    used, bound = set[str](), set[str]()
    for part in parts:
        for name, is_bound in _globals(part):
            (bound if is_bound else used).add(name)
    entries = {match[0] for each in entry_points if (match := re.match(r"[^\W\d]\w*", each))}
    free = {name for name in used - bound | used & entries if not name.startswith("__")}
    modules = {name for name in _modules(parts) & free if name not in entries}
    classes = (free & _CLASSES.keys()) - modules - entries
    solution = free - modules - classes - (_PYTHON - entries)
    _refuse_code_of_data(parts, used - solution)
    imports = [f"import {name}" for name in sorted(modules)]
    imports += [f"from {_CLASSES[name]} import {name}" for name in sorted(classes)]
    return solution, "\n".join(imports)


def _granted(imports: str, is_class: bool) -> list[str]:
    """Return the imports of a solution: those of the test, of `typing`, and a site's preamble."""
    body = _parsed(imports).body
    own = [ast.unparse(each) for each in body if isinstance(each, ast.Import | ast.ImportFrom)]
    return [*(_PREAMBLE if is_class else ()), f"from typing import {', '.join(_TYPING)}", *own]


def _parsed(source: str) -> ast.Module:
    return ast.parse(_short(source))


def _short(source: str) -> str:
    # Python rejects long integers, and their value does not matter here.
    return re.sub(r"\d{4000,}", "1", source)


def _globals(source: str) -> Iterator[tuple[str, bool]]:
    """Yield the global names of a module, each with whether it is bound there."""
    top = symtable.symtable(_short(source), "<test>", "exec")
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table is not top and not symbol.is_global():
                continue
            if symbol.is_assigned() or symbol.is_imported():
                yield symbol.get_name(), True
            if symbol.is_referenced():
                yield symbol.get_name(), False


def _modules(parts: Sequence[str]) -> set[str]:
    """Return the modules of which the test uses only existing attributes."""
    attributes: dict[str, set[str]] = {}
    bare: set[str] = set()
    for part in parts:
        owners = set()
        for node in ast.walk(_parsed(part)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                attributes.setdefault(node.value.id, set()).add(node.attr)
                owners.add(node.value)
            elif isinstance(node, ast.Name) and node not in owners:
                bare.add(node.id)
    found = attributes.keys() & set(_MODULES) - bare
    return {name for name in found if attributes[name] <= {*dir(importlib.import_module(name))}}


def _refuse_code_of_data(parts: Sequence[str], used: set[str]) -> None:
    imported = set[str]()
    for part in parts:
        for node in ast.walk(_parsed(part)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    found = used & _RUN_CODE | imported & _RUN_MODULES
    if found:
        what = ", ".join(sorted(found))
        raise StatementError(
            f"or its imports or setup use {what}, which could run the solution's data as code in "
            "the process of the tests"
        )


# --- The program in a response ---

# Text allowed before a fence: white space, quote markers and list markers.
_FENCE = re.compile(r"((?:[ \t]|>|[-*+][ \t]|\d{1,9}[.)][ \t])*)(`{3,}|~{3,})(.*)", re.DOTALL)


def extract_code(response: str, marks: str = "") -> str:
    """Return the program in a response.

    It is the last fenced block marked as Python, otherwise the last fenced block, otherwise the
    whole response. A block can be indented, quoted, or inside a list item; an unclosed block ends
    with the response. If several blocks qualify, the last one that matches the pattern `marks` is
    used, because the program is often followed by an example of its use.

    Example:
        >>> extract_code("Thus:\\n```python\\nprint(1)\\n```\\nIt prints 1.")
        'print(1)\\n'
    """
    blocks: list[tuple[str, list[str]]] = []
    open_fence, quotes = "", ""
    for line in response.removeprefix("\ufeff").splitlines(keepends=True):
        if open_fence:
            text = re.sub(quotes, "", line, count=1)
            bare = text.strip()
            if bare.startswith(open_fence) and not bare.strip(open_fence[0]):
                open_fence = ""
            else:
                blocks[-1][1].append(text)
        elif (match := _FENCE.match(line)) is not None:
            prefix, fence, language = match.groups()
            # A line such as ```x = 1``` is inline code, not a fence.
            if fence[0] not in language:
                open_fence = fence
                # The quote markers before the block; a response can have thousands of them.
                quotes = rf"\A(?:[ \t]*+>[ \t]?){{0,{prefix.count('>')}}}"
                blocks.append(((language.lower().split() or [""])[0], []))
    python = [block for block in blocks if block[0] in ("python", "python3", "py", "{.python}")]
    programs = ["".join(_outdented(lines)) for _, lines in python or blocks]
    fitting = [each for each in programs if marks and re.search(marks, each, re.MULTILINE)]
    return (fitting or programs or [response])[-1]


def _outdented(lines: Sequence[str]) -> Iterator[str]:
    """Yield the lines without the indentation of the first line."""
    first = next((line for line in lines if line.strip()), "")
    indent = first[: len(first) - len(first.lstrip(" \t"))]
    return (line.removeprefix(indent) for line in lines)

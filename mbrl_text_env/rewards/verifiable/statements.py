"""Test statements: which names they take from the solution, and what they may not do.

All of it follows from the tests, and nothing from the solution.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import symtable
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

# Names that tests and signatures use as if they were builtins, by their modules.
_TYPING = (
    "Any", "Callable", "Dict", "FrozenSet", "Generator", "Iterable", "Iterator", "List", "Literal",
    "Mapping", "NamedTuple", "Optional", "Sequence", "Set", "Tuple", "Type", "TypeVar", "Union",
)  # fmt: skip
_CLASSES = {
    **dict.fromkeys(
        ("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple"), "collections"
    ),
    **dict.fromkeys(("date", "datetime", "timedelta"), "datetime"),
    "Decimal": "decimal",
    "Fraction": "fractions",
    "Path": "pathlib",
    **dict.fromkeys(_TYPING, "typing"),
}
_MODULES = (
    "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq",
    "itertools", "json", "math", "operator", "os", "random", "re", "statistics", "string", "sys",
)  # fmt: skip
# What the sites that ask for a `class Solution` put before it.
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
    # Not what `site` and interactive shells add.
    if isinstance(value, type | types.BuiltinFunctionType) or name in ("exit", "quit")
)


class StatementError(ValueError):
    """The test runs code that is made from data; the message names the means."""


@dataclass(frozen=True)
class Names:
    """What a test's names mean.

    Args:
        solution: Names that are the solution's.
        imports: Imports of what the test takes for granted.
        certain: False where only one of `solution` is the solution's, and the others Python's.
    """

    solution: frozenset[str]
    imports: str
    certain: bool


def parse(source: str) -> ast.Module:
    """Parse statements.

    Raises:
        SyntaxError: They are no Python statements.
    """
    return ast.parse(_short(source))


def _short(source: str) -> str:
    # This interpreter refuses long integers, and their value does not matter here.
    return re.sub(r"\d{4000,}", "1", source)


def names_of(parts: Sequence[str], entry_points: Sequence[str]) -> Names:
    """Tell the names of a test that are the solution's from Python's and the test's own.

    Names that the parts define or import are their own. Of the rest, the entry points are the
    solution's, and so is every name that is neither a builtin nor one of those that tests take for
    granted (`List`, `Counter`, `math.` and the like). If there is none of these, it is one of the
    builtins: a test of `solve` that calls `abs` means Python's `abs`, and a test that calls nothing
    but `abs` means the solution's.

    Args:
        parts: The imports, the setup and the test.
        entry_points: Names of what the solution is asked for, such as "f" or "Solution().f".

    Raises:
        StatementError: See there.

    Example:
        >>> names_of(["", "", "assert abs(solve(2) - 1.41) < 0.1"], []).solution
        frozenset({'solve'})
    """
    used, bound = set[str](), set[str]()
    for part in parts:
        for name, is_bound in _globals(part):
            (bound if is_bound else used).add(name)
    entries = {match[0] for each in entry_points if (match := re.match(r"[^\W\d]\w*", each))}
    free = {name for name in used - bound | used & entries if not name.startswith("__")}
    modules = {name for name in _modules(parts) & free if name not in entries}
    classes = (free & _CLASSES.keys()) - modules - entries
    python = (free & _PYTHON) - entries
    solution = free - modules - classes - python
    certain = bool(solution or entries)
    if not certain:
        solution = (classes | python) or modules
    _check(parts, used - solution)
    imports = [f"import {name}" for name in sorted(modules - solution)]
    imports += [f"from {_CLASSES[name]} import {name}" for name in sorted(classes - solution)]
    return Names(frozenset(solution), "\n".join(imports), certain)


def granted(imports: str, is_class: bool) -> list[str]:
    """Imports that a solution finds done: the test's, those of types, and a site's preamble."""
    own = [ast.unparse(each) for each in parse(imports).body if _is_import(each)]
    return [*(_PREAMBLE if is_class else ()), f"from typing import {', '.join(_TYPING)}", *own]


def _is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _globals(source: str) -> Iterator[tuple[str, bool]]:
    """The names of the module's own scope, each with whether it is bound there."""
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
    """Modules of which the test uses nothing but attributes that they have."""
    attributes: dict[str, set[str]] = {}
    bare: set[str] = set()
    for part in parts:
        owners = set()
        for node in ast.walk(parse(part)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                attributes.setdefault(node.value.id, set()).add(node.attr)
                owners.add(node.value)
            elif isinstance(node, ast.Name) and node not in owners:
                bare.add(node.id)
    return {
        name
        for name, wanted in attributes.items()
        if name in _MODULES and name not in bare and wanted <= _contents(name)
    }


@lru_cache
def _contents(module: str) -> frozenset[str]:
    return frozenset(dir(importlib.import_module(module)))


def _check(parts: Sequence[str], used: set[str]) -> None:
    found = used & _RUN_CODE
    for part in parts:
        for node in ast.walk(parse(part)):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names} & _RUN_MODULES
            elif isinstance(node, ast.ImportFrom):
                found |= {(node.module or "").partition(".")[0]} & _RUN_MODULES
    if found:
        raise StatementError(", ".join(sorted(found)))

"""Programs are scored as `python program.py < input` ends, however they are written and wrapped."""

from __future__ import annotations

import pytest

from mbrl_text_env.rewards.verifiable.code import UnitTestError, UnitTestReward, names_of
from mbrl_text_env.sandbox import Limits, facilities
from mbrl_text_env.types import Prompt

missing = [f"{each.name} ({each.problem})" for each in facilities() if each.problem]
needs_box = pytest.mark.skipif(bool(missing), reason=f"this machine lacks: {', '.join(missing)}")

LIMITS = Limits(cpu_seconds=10, wall_seconds=60, memory_bytes=512 << 20)
CASE = {"input": "3\n1 2 3\n", "output": "6\n"}
SUM = "print(sum(map(int, input().split())))"
LONG = "7" * 5000

# What the input and the output are, and programs that print it.
RIGHT = {
    "exit()": (CASE, f"input(); {SUM}\nexit()"),
    "quit()": (CASE, f"input(); {SUM}\nquit()"),
    "exit(0)": (CASE, f"input(); {SUM}\nexit(0)"),
    "an early exit": (CASE, f"if int(input()) == 3:\n    {SUM}\n    exit()\nprint(0)"),
    "exit in a function": (CASE, f"def main():\n    input(); {SUM}\n    quit()\nmain()\nprint(1)"),
    "the name of standard input": (
        CASE, "f = open('/dev/stdin')\nprint(sum(map(int, [*f][1].split())))"),
    "that name, twice": (
        CASE, "n = int(open('/dev/stdin').readline())\nt = open('/dev/stdin').read().split()\n"
        "print(sum(map(int, t[1:1 + n])))"),
    "that name, as bytes": (
        CASE, "print(sum(map(int, open('/dev/stdin', 'rb').read().split()[1:])))"),
    "descriptor 0": (CASE, "print(sum(map(int, open(0).read().split()[1:])))"),
    "os.read": (CASE, "import os\nprint(sum(map(int, os.read(0, 999).split()[1:])))"),
    "fileinput": (CASE, "import fileinput\nprint(sum(map(int, [*fileinput.input()][1].split())))"),
    "bytes in and out": (
        CASE, "import sys\nd = sys.stdin.buffer.read().split()\n"
        "sys.stdout.buffer.write(b'%d\\n' % sum(map(int, d[1:])))"),
    "lines until the end": (
        CASE, "import sys\nt = []\nwhile True:\n    line = sys.stdin.readline()\n"
        "    if not line: break\n    t += line.split()\nprint(sum(map(int, t[1:])))"),
    "the end as an error": (
        CASE, "t = []\nwhile True:\n    try: t += input().split()\n    except EOFError: break\n"
        "print(sum(map(int, t[1:])))"),
    "read() by hand": (CASE, "import sys\nprint(*[sum(map(int, sys.stdin.read().split()[1:]))])"),
    "main": (CASE, f"def main():\n    input()\n    {SUM}\nif __name__ == '__main__':\n    main()"),
    "a stack of 256 MiB": (
        CASE, "import sys, threading\nsys.setrecursionlimit(10 ** 6)\n"
        "threading.stack_size(1 << 28)\n"
        "def f(n): return n and 1 + f(n - 1)\n"
        "t = threading.Thread(target=lambda: print(f(50_000) - 49_994))\nt.start(); t.join()"),
    "no newline at the end": (CASE, "import sys\nsys.stdout.write('6')"),
    "blanks at the ends": (CASE, "print(' 6 ', flush=True)\nprint()"),
    "lines that end as on Windows": (CASE, "print(6, end='\\r\\n')"),
    "a source from Windows": (CASE, f"input()\r\n{SUM}\r\n"),
    "a source with a mark of byte order": (CASE, f"\ufeffinput()\n{SUM}"),
    "an input from Windows": ({"input": "3\r\n1 2 3\r\n", "output": "6\r\n"}, f"input()\n{SUM}"),
    "an input without a newline": ({"input": "3\n1 2 3", "output": "6"}, f"input()\n{SUM}"),
    "an output with a mark": ({"input": "", "output": "\ufeff6\n"}, "print(6)"),
    "an integer of 5,000 digits": (
        {"input": "5000", "output": LONG}, "print((10 ** int(input()) - 1) // 9 * 7)"),
    "such an input": ({"input": LONG, "output": "7"}, "print(int(input()) % 10)"),
    "a form feed in a line": ({"input": "", "output": "a\x0cb"}, "print('a\\x0cb')"),
    "an indented fence": (CASE, f"1. So:\n\n    ```python\n    input()\n    {SUM}\n    ```\n"),
    "a quoted fence": (CASE, f"> So:\n> ```python\n> if input():\n>     {SUM}\n> ```"),
    "an example of its output": (CASE, f"```python\ninput()\n{SUM}\n```\nprints\n```\n6\n```"),
    "an example of its use": (
        CASE, f"```python\ndef main():\n    input()\n    {SUM}\nmain()\n```\nOr:\n"
        "```python\nmain()\n```"),
}  # fmt: skip

WRONG = {
    "a prompt": (CASE, f"input('n? ')\n{SUM}"),
    "no input left": (CASE, f"input()\n{SUM}\ninput()"),
    "a failing exit": (CASE, f"input()\n{SUM}\nexit(1)"),
    "an exit with a message": (CASE, f"input()\n{SUM}\nexit('done')"),
    "an exit before the answer": (CASE, f"input()\nexit()\n{SUM}"),
    "an indented program": (CASE, f"  input()\n  {SUM}"),
    "too many lines": (CASE, f"print(6)\n{SUM}"),
    "two lines in one": ({"input": "", "output": "a\nb"}, "print('a\\x0cb')"),
    "the last version is wrong": (CASE, f"```python\ninput()\n{SUM}\n```\nBetter:\n"
                                  "```python\nprint(sum(map(int, input())))\n```"),
    "nothing is installed": (CASE, f"import numpy\ninput()\n{SUM}"),
}  # fmt: skip

EXCEPTION = """class Broke(Exception):
    def __init__(self, lacking):
        super().__init__(f'{lacking} short')
        self.lacking = lacking
class Account:
    def __init__(self, balance): self.balance = balance
    def pay(self, price):
        if price > self.balance: raise Broke(price - self.balance)
        self.balance -= price"""
# A test, its metadata, and a solution that passes it.
STATEMENTS = {
    "a date": ("assert f(2024) == datetime.date(2024, 2, 29)", {"test_imports": "import datetime"},
               "import datetime\ndef f(y): return datetime.date(y, 2, 29)"),
    "a time with an offset": (
        "assert f().utcoffset() == timedelta(hours=2) and f().isoformat().endswith('+02:00')", {},
        "from datetime import *\ndef f():\n"
        "    return datetime(2024, 1, 1, 5, tzinfo=timezone(timedelta(hours=2)))"),
    "a difference of times": ("assert f(90).total_seconds() == 90", {},
                              "import datetime\ndef f(s): return datetime.timedelta(seconds=s)"),
    "a date as argument": ("assert f(date(2024, 3, 1)) == date(2024, 2, 29)", {},
                           "from datetime import timedelta\ndef f(d): return d - timedelta(1)"),
    "a decimal": ("assert f('0.1') == Decimal('0.3')", {},
                  "from decimal import Decimal\ndef f(x): return 3 * Decimal(x)"),
    "a fraction": ("assert f(3) == Fraction(1, 3)", {"test_imports": "from fractions import *"},
                   "from fractions import Fraction\ndef f(n): return Fraction(1, n)"),
    "a path": ("assert f('a', 'b.txt') == Path('a/b.txt') and f('a', 'b.txt').suffix == '.txt'", {},
               "from pathlib import Path\ndef f(*parts): return Path(*parts)"),
    "a path as argument": ("assert f(Path('a/b.txt')) == 'b'", {}, "def f(path): return path.stem"),
    "an integer of 5,000 digits": (f"assert f(5000) == {LONG}", {},
                                   "def f(n): return (10 ** n - 1) // 9 * 7"),
    "its digits": ("assert len(str(f(5000))) == 5001", {}, "def f(n): return 10 ** n"),
    "its text": (f"assert f(5000) == '{LONG}'", {}, "def f(n): return str(int('7' * n))"),
    "a named tuple": (
        "p = f(1, 2)\nassert p == (1, 2) and p.x == 1 and p.count == 2\n"
        "assert p._fields == ('x', 'count')",
        {}, "from collections import namedtuple\nf = namedtuple('P', 'x count')"),
    "a named tuple as argument": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\n"
        "assert f(P(3, 4)) == 7", {},
        "def f(p): return p.x + p.y"),
    "types without an import": ("assert f([1, 2]) == 3", {},
                                "def f(x: List[int]) -> Optional[int]: return sum(x)"),
    "the imports of the test": ("assert f(16) == 4", {"test_imports": ["import math as m"]},
                                "def f(x): return m.isqrt(x)"),
    "what a class Solution finds": (
        "assert Solution().f([3, 1]) == [1, 3, inf, 2]", {"test_imports": "from math import inf"},
        "class Solution:\n    def f(self, x: List[int]) -> List[float]:\n        heapify(x)\n"
        "        d = deque([inf])\n        return [*sorted(x), d.pop(), math.gcd(2, 4)]"),
    "an entry point of it": (
        "assert Solution().f(9) == 3", {"entry_point": "Solution().f"},
        "class Solution:\n    def f(self, x): return isqrt(x)"),
    "an error of its own": (
        "a = Account(5)\ntry:\n    a.pay(7)\n    assert False\nexcept Broke as e:\n"
        "    assert e.lacking == 2 and str(e) == '2 short'\nassert a.balance == 5", {}, EXCEPTION),
    "the text of a KeyError": ("try:\n    f('k')\n    assert False\nexcept KeyError as e:\n"
                               "    assert str(e) == \"'k'\" and e.args == ('k',)", {},
                               "def f(k): return {}[k]"),
    "an exit": (
        "try:\n    f()\n    assert False\nexcept SystemExit as e:\n    assert e.code == 3", {},
        "import sys\ndef f(): sys.exit(3)"),
    "one object": ("assert One() is One() and One() == One()", {},
                   "class One:\n    it = None\n    def __new__(cls):\n"
                   "        cls.it = cls.it or object.__new__(cls)\n        return cls.it"),
    "equal objects in a set": (
        "assert len({V(1), V(1), V(2)}) == 2", {},
        "class V:\n    def __init__(self, x): self.x = x\n"
        "    def __hash__(self): return hash(self.x)\n"
        "    def __eq__(self, o): return self.x == o.x"),
    "classes and copies": (
        "import copy\na = B()\nb = copy.deepcopy(a)\nb.x = [1]\n"
        "assert issubclass(B, A) and isinstance(b, A) and (a.x, b.x) == ([], [1])", {},
        "class A:\n    def __init__(self): self.x = []\nclass B(A): pass"),
    "numbers of a class of its own": (
        "c = f()\nassert c == 2 and c + 1 == 3 and 1 < c and c in {2} and [5, 6, 7][c] == 7", {},
        "import enum\nclass C(enum.IntEnum):\n    RED = 2\ndef f(): return C.RED"),
    "numbers that are converted": (
        "import math\nassert float(f()) == 1.5 and math.isclose(f(), 1.5) and round(f()) == 2", {},
        "class N:\n    def __float__(self): return 1.5\n    def __round__(self): return 2\n"
        "def f(): return N()"),
    "parts of its objects": (
        "d = D([1, 2, 3])\nassert d[0:2] == [1, 2] and 3 in d and f'{d:>4}' == '>4'\ndel d[0]\n"
        "assert len(d) == 2", {},
        "class D:\n    def __init__(self, x): self.x = x\n"
        "    def __getitem__(self, i): return self.x[i]\n"
        "    def __delitem__(self, i): del self.x[i]\n    def __len__(self): return len(self.x)\n"
        "    def __format__(self, spec): return spec"),
    "a type": ("assert f(3) == int and f(3) != str", {}, "def f(x): return type(x)"),
    "methods as arguments": (
        "out = []\nf(out.append, 'a', str.upper)\nassert out == ['A']", {},
        "def f(add, x, change): add(change(x))"),
    "a function as its name": ("assert f([3, 1, 2]) == 3", {}, "f = max"),
    "a constant of its own": ("assert f() == LIMIT == 3", {}, "LIMIT = 3\ndef f(): return LIMIT"),
    "recursion as deep as elsewhere": ("assert f(980) == 980", {},
                                       "def f(n): return n and 1 + f(n - 1)"),
    "an exit at the end": ("assert f(1) == 2", {}, "def f(x): return x + 1\nprint(f(1))\nexit()"),
    "modules without an import": ("assert math.isclose(f(2), 1.41421, rel_tol=1e-4)", {},
                                  "def f(x): return x ** 0.5"),
    "a solution with the name of a module": ("assert bisect([1, 3], 2) == 1", {},
                                             "def bisect(a, x): return sum(y < x for y in a)"),
    "a solution with the name of a class": (
        "c = Counter()\nc.add()\nassert c.n == 1", {"entry_point": "Counter"},
        "class Counter:\n    n = 0\n    def add(self): self.n += 1"),
    "an example of its use": (
        "assert f(1) == 2", {},
        "```python\ndef f(x):\n    return x + 1\n```\nUse it:\n"
        "```python\nprint(f(int(input())))\n```"),
    "a coroutine": (
        "import asyncio\nassert asyncio.run(f(1)) == 2", {},
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 1"),
    "iterators as arguments": (
        "assert f(iter([1, 2]), (x for x in 'ab'), {3: 4}.keys()) == [1, 'a', 3]", {},
        "def f(x, y, z): return [next(x), next(y), *z]"),
    "arguments by name": (
        "assert f(target=3, operation=lambda x, y: x - y, self=1) == 2", {},
        "def f(operation, target, self): return operation(y=self, x=target)"),
    "a builtin beside others": (
        "assert list(map(str, [1])) == ['1']", {"entry_point": "map"},
        "def map(f, x): return [f(y) for y in x]"),
    "a helper of the test": (
        "def check(candidate):\n    assert candidate(2) == 4\ncheck(f)", {"entry_point": "f"},
        "def f(x): return 2 * x\ndef check(candidate): pass"),
}  # fmt: skip


def _scores(table):
    prompts = [
        Prompt.from_text("Write it.", id=name, metadata={"tests": [test], **metadata})
        for name, (test, metadata, _) in table.items()
    ]
    responses = [response for _, _, response in table.values()]
    return dict(zip(table, UnitTestReward(limits=LIMITS).score(prompts, responses), strict=True))


@needs_box
def test_right_programs_pass_and_wrong_ones_fail():
    table = {name: (case, {}, program) for name, (case, program) in {**RIGHT, **WRONG}.items()}
    expected = {**dict.fromkeys(RIGHT, 1.0), **dict.fromkeys(WRONG, 0.0)}
    assert _scores(table) == expected


@needs_box
def test_right_solutions_pass():
    assert _scores(STATEMENTS) == dict.fromkeys(STATEMENTS, 1.0)


@needs_box
def test_the_limits_have_room_for_a_stack_of_256_mib():
    case, program = RIGHT["a stack of 256 MiB"]
    prompt = Prompt.from_text("Sum.", metadata={"tests": [case]})
    assert UnitTestReward().score([prompt], [program]).tolist() == [1.0]


@pytest.mark.parametrize(
    "test",
    [
        "assert sum([1, 2]) == 3",
        "assert 1 + 1 == 2",
        "from solution import f\nassert f(1) == 2",
        "assert Counter(3).f() == 1",
    ],
)
def test_tests_that_do_not_tell_what_is_asked_for_are_errors(test):
    prompt = Prompt.from_text("Write it.", id="p1", metadata={"tests": [test]})
    with pytest.raises(UnitTestError, match=r"'p1'.*takes nothing from it.*entry_point"):
        UnitTestReward().score([prompt], [""])


@pytest.mark.parametrize(
    ("parts", "entry_points", "solution", "imports"),
    [
        (["", "", "assert abs(solve(2)) == 1"], [], {"solve"}, ""),
        (["", "", "assert abs(solve(2)) == 1"], ["abs"], {"abs", "solve"}, ""),
        (["import math", "", "assert math.pi < f(3)"], [], {"f"}, ""),
        (["", "", "assert math.pi < f(3)"], [], {"f"}, "import math"),
        (["", "", "assert math.nothing < f(3)"], [], {"f", "math"}, ""),
        (["", "", "assert Counter(f('a')) == {}"], [], {"f"}, "from collections import Counter"),
        (["", "", "assert Counter(3).f() == 1"], ["Counter"], {"Counter"}, ""),
        (["", "class N: pass\ndef g(x): return h(x)", "assert f(g(N()))"], [], {"f", "h"}, ""),
        (["", "", "for x in f(): assert x\ny = [z for z in g(x)]"], [], {"f", "g"}, ""),
        (["", "", "def check(f): return f(k)\ncheck(k)"], [], {"k"}, ""),
        (["", "", "assert Solution().two(3) == 1"], ["Solution().two"], {"Solution"}, ""),
        (["", "", "assert __name__ == f()"], [], {"f"}, ""),
    ],
)
def test_the_names_of_a_test_that_are_the_solutions(parts, entry_points, solution, imports):
    assert names_of(parts, entry_points) == (solution, imports)

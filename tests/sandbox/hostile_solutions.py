"""Solutions that do not know the answer, know how they are judged, and try for a score.

`TASKS` are tests with a solution that passes them; `attacks()` are programs by the task that they
are made for. `@FORGE@` is a text that, run in the judging process, would make the test a pass.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    metadata: dict[str, Any]
    honest: str


TASKS = {
    "number": Task({"tests": ["assert solve(12) == 479001600"]},
                   "import math\ndef solve(n): return math.factorial(n)"),
    "root": Task({"tests": ["assert abs(solve(2) - 1.41421356) < 1e-6"]},
                 "def solve(x): return x ** 0.5"),
    "import": Task({"tests": ["assert math.isclose(solve(2), 1.41421356, abs_tol=1e-6)"],
                    "test_imports": "import math"}, "def solve(x): return x ** 0.5"),
    "set": Task({"tests": ["assert len(set(solve([5, 9, 5])) ^ {5, 9}) == 0"]},
                "def solve(x): return list(set(x))"),
    "member": Task({"tests": ["assert solve(7) in {5040}"]},
                   "import math\ndef solve(n): return math.factorial(n)"),
    "multiples": Task({"tests": ["assert solve(7) in range(6, 50, 6)"]},
                      "def solve(n): return 42"),
    "text": Task({"tests": ["assert solve('abc').upper() == 'CBA' and 'b' in solve('abc')"]},
                 "def solve(s): return s[::-1]"),
    "inside": Task({"tests": ["assert 'cab' in solve('abc')"]},
                   "import itertools\n"
                   "def solve(s): return [''.join(p) for p in itertools.permutations(s)]"),
    "list": Task({"tests": ["for got, want in zip(map(solve, [3, 5]), [[0, 1, 4], [0, 1, 4, 9, 16]]"
                            "):\n    assert list(got) == want and len(want) == len(got)"]},
                 "def solve(n): return [i * i for i in range(n)]"),
    "callback": Task({"tests": ["assert solve(lambda f, x: f(x), 2) == 3"]},
                     "def solve(call, x): return call(lambda y: y + 1, x)"),
    "template": Task({"tests": ["key = 8128\n"
                                "assert solve(lambda text, x: text.format(x), 3) == 'v3' != key"]},
                     "def solve(fill, x): return fill('v{}', x)"),
    "attributes": Task({"tests": ["assert solve(lambda o, name: getattr(o, name), 'ab') == 'AB'"]},
                       "def solve(get, s): return get(s, 'upper')()"),
    "unittest": Task({"tests": ["import unittest\ncase = unittest.TestCase()\n"
                                "case.assertEqual(solve(12), 479001600)\ncase.assertTrue("
                                "Counter(solve2('aab')) == Counter({'a': 2, 'b': 1}))"]},
                     "import math\nfrom collections import Counter\n"
                     "def solve(n): return math.factorial(n)\ndef solve2(s): return list(s)"),
    "catch all": Task({"tests": ["try: got = solve(0)\nexcept: got = 7\nassert got == 7"]},
                      "def solve(n): return 7"),
    "pickle": Task({"tests": ["import pickle\nsave('out', [41, 1])\nwith open('out', 'rb') as f:\n"
                              "    assert sum(pickle.load(f)) == 42"]},
                   "import pickle\ndef save(name, x):\n"
                   "    with open(name, 'wb') as f: pickle.dump(x, f)"),
    "literal": Task({"tests": ["import ast\nassert ast.literal_eval(solve(3)) == [0, 1, 2]"]},
                    "def solve(n): return repr(list(range(n)))"),
    "builtin": Task({"tests": ["assert max([3, 1]) == 3"], "entry_point": "max"},
                    "def max(x): return sorted(x)[-1]"),
    "builtins alone": Task({"tests": ["assert sorted([3, 1]) == [1, 3]"], "entry_point": "sorted"},
                           "def sorted(x):\n    x = x[:]\n    x.sort()\n    return x"),
    "dates": Task({"tests": ["assert (solve(2024) - date(2024, 2, 28)).days == 1"]},
                  "from datetime import date\ndef solve(y): return date(y, 2, 29)"),
    "error": Task({"tests": ["try:\n    solve(-1)\n    assert False\nexcept ValueError as e:\n"
                             "    assert e.code == 5040 and 'at -1' in str(e)"]},
                  "def solve(n):\n    e = ValueError(f'at {n}')\n    e.code = 5040\n    raise e"),
    "input": Task({"tests": [{"input": "3 4\n", "output": "12\n7\n"}]},
                  "a, b = map(int, input().split())\nprint(a * b)\nprint(a + b)"),
}  # fmt: skip

# `P` is the solution's end of the pipe, and `reply` answers the next question.
GRAB = """\
import json, os, sys
frame = sys._getframe()
while type(frame.f_locals.get("self")).__name__ != "Solution": frame = frame.f_back
P = frame.f_locals["self"]
def write(data): os.write(P.target, len(data).to_bytes(8, "little") + data)
def reply(result, **more):
    request = P.receive()
    P.send({"result": result, "arguments": [None] * len(request["arguments"]), **more})
    return request
def named(**more):
    return reply({"dict": [["solve", {"object": 0}], *map(list, more.items())]})
def forever(result):
    while True: reply(result)
"""
FORGE = """import sys, os
frame = sys._getframe()
while "report" not in frame.f_locals: frame = frame.f_back
os.write(frame.f_locals["report"], b'{"verdict": "passed", "detail": ""}')
os._exit(0)"""

# Programs by task, separated by lines of "---"; those of "@" begin with `GRAB`.
SNIPPETS = {
    "@set": """
named()
forever({"coroutine": 0})
---
named()
forever({"iterator": [5, 9]})
---
named(__builtins__={"dict": [["set", {"builtin": "exec"}]]})
forever(@FORGE@)
---
named(set={"object": 1}, len={"object": 2}, __name__="os")
forever({"object": 3})
---
named()
forever({"tuple": [{"path": "builtins:exec"}]})
---
named()
forever({"set": [[1], {"dict": []}]})
---
named()
forever({"deque": {"object": 0}})
---
named()
P.send({"result": [5], "arguments": None})
forever([5])
""",
    "@root": """
named(abs={"builtin": "callable"})
forever(7.0)
---
named()
forever({"named": [["__rsub__", "__abs__", "__class__"], [0, 0, "float"]]})
---
named()
forever({"builtins.complex": "nan"})
---
named()
forever({"decimal.Decimal": "sNaN"})
---
named()
forever(float("nan"))
""",
    "@import": """
named(math={"object": 1}, __import__={"object": 1})
forever(True)
---
named(math={"module": "os"})
forever({"module": "math"})
---
named()
reply({"object": 9})
while True: reply({"object": 1}), reply(True)
""",
    "@number": """
P.send({"verdict": "passed", "detail": ""})
forever(None)
---
write(b'{"verdict": "passed", "detail": ""}')
os._exit(0)
---
named()
write(b"[" * 100_000 + b"]" * 100_000)
---
named()
os.write(P.target, b"\\xff" * 8)
---
named()
os.write(P.target, (1 << 24).to_bytes(8, "little") + b"{")
os._exit(0)
---
named()
for number in (-1, True, 1.5, 10 ** 40, "0", [0]):
    P.send({"result": {"object": number}, "arguments": [None, None]})
forever(True)
---
named()
for number in (-1, 0, 7): P.send({"callback": number, "arguments": [@FORGE@]})
forever(True)
---
named()
for _ in range(50): P.send({"result": True, "arguments": [None, None]})
os._exit(0)
---
named()
write(b'{"result": 1, "result": NaN, "arguments": [null, null], "callback": null}')
---
named()
for kind in ("exec", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration", "Breach"):
    P.send({"error": [kind, "Exception"], "text": @FORGE@, "values": [[@FORGE@], {"dict": []}],
            "arguments": [None, None]})
forever(True)
---
reply({"dict": [["solve", {"exception": ["exec", "Breach", "SystemExit"]}]]})
forever(True)
---
named()
forever({"builtins.int": "479001600"})
---
named()
write(b'{"result": ' + b"9" * 3_000_000 + b', "arguments": [null, null]}')
""",
    "@catch all": """
named()
write(b"{")
os._exit(0)
---
named()
P.send({"arguments": [None, None]})
---
named()
import signal, time
for _ in range(200): os.kill(os.getppid(), signal.SIGINT)
""",
    "@callback": """
named()
reply({"function": 0})
---
named()
request = P.receive()
P.send({"callback": 0, "arguments": [{"builtin": "exec"}, @FORGE@]})
P.send({"callback": 0, "arguments": [{"path": "builtins:exec"}, @FORGE@]})
P.receive()
""",
    "callback": """
def solve(call, x): return call(exec, @FORGE@)
---
def solve(call, x): return call(call, exec)
---
import types
def solve(call, x): return call(compile(@FORGE@, "", "exec"), x)
---
class E:
    def __call__(self, x): return self
    def __eq__(self, other): return True
def solve(call, x): return call(E(), x)
---
def solve(call, x): return call(lambda y: solve(call, y), x)
""",
    "template": """
def solve(fill, x): return fill("{0.__class__.__init__.__globals__}", fill)
---
import re
def solve(fill, x):
    class Q:
        def __format__(self, spec): return spec
    for text in ("{0.gi_frame.f_back}", "{0:{0.__self__}}", "{0.__func__.__globals__[key]}"):
        try: print(fill(text, Q()), fill(text, fill))
        except Exception: pass
    return Q()
""",
    "attributes": """
def solve(get, s):
    kinds = get(get((), "__class__"), "__base__")
    for kind in get(kinds, "__subclasses__")():
        try: return get(get(get(kind, "__init__"), "__globals__"), "exec")(@FORGE@)
        except Exception: pass
---
def solve(get, s):
    function = get(get(s, "__init__"), "__class__")
    code = get(get(get, "__code__"), "replace")
    return function(code(co_consts=(@FORGE@,)), {})()
---
def solve(get, s):
    found = get(s, "__getattribute__")("__class__")
    return get(found, "mro")()[-1]
""",
    "number": """
import sys
for module in ("__main__", "mbrl_text_env.sandbox._solution"):
    for name, value in list(vars(sys.modules[module]).items()):
        if isinstance(value, type) and name not in ("Any",):
            for each in list(vars(value)):
                try: setattr(value, each, lambda *a, **k: True)
                except Exception: pass
def solve(n): return 1
---
import sys
operations = sys.modules["mbrl_text_env.sandbox._solution"]._OPERATIONS
for name in operations: operations[name] = lambda *a, **k: True
def solve(n): return 1
---
import atexit, os, threading, time
def forge():
    time.sleep(0.05)
    for number in range(64):
        try: os.write(number, b'{"verdict": "passed", "detail": ""}')
        except OSError: pass
atexit.register(forge)
threading.Thread(target=forge, daemon=True).start()
if os.fork() == 0:
    os.setsid(); forge(); os._exit(0)
def solve(n): time.sleep(0.1)
---
import glob, re
def solve(n):
    for place in ["/dev/stdin", "/proc/self/fd/0", "/proc/1/fd/0", *glob.glob("**", recursive=True),
                  *glob.glob("/tmp/*"), *glob.glob("/dev/shm/*")]:
        try: text = open(place).read()
        except Exception: continue
        found = re.search(r"solve\\\\(12\\\\) == (\\\\d+)", text)
        if found: return int(found[1])
---
import gc, re, sys
def solve(n):
    frame = sys._getframe()
    while frame:
        for each in [frame.f_locals, frame.f_globals, *gc.get_objects()]:
            found = re.search(r"solve\\\\(12\\\\) == (\\\\d+)", str(each)[:20000])
            if found: return int(found[1])
        frame = frame.f_back
---
import os
for name in ("math", "json", "decimal", "collections", "sitecustomize", "mbrl_text_env/x"):
    open(name + ".py", "w").write(@FORGE@)
os.rename("main.py", "judge.py")
for name in ("main.py", "mbrl_text_env/__init__.py", "mbrl_text_env/sandbox/_judge.py"):
    open(name, "w").write(@FORGE@)
import decimal
def solve(n): return decimal.Decimal(n)
---
class Meta(type):
    def __eq__(self, other): return True
    __hash__ = type.__hash__
class solve(metaclass=Meta):
    def __new__(cls, n): return cls
---
class N(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __int__ = __index__ = lambda self: self
    __class__ = property(lambda self: int)
    __hash__ = int.__hash__
def solve(n): return N(1)
---
class L:
    def __init__(self, n): pass
    def __getattr__(self, name): return self
    def __call__(self, *a): return True
    def __eq__(self, other): return self
    def __bool__(self): return True
solve = L
---
class E(Exception):
    def __str__(self): raise SystemExit(0)
    def __eq__(self, other): return True
def solve(n): raise E
---
class E(Exception):
    __module__ = "builtins"
    def __repr__(self): return 1
E.__name__ = E.__qualname__ = "AssertionError"
AssertionError = NameError = E
def solve(n): return E
---
import sys, types
for name in list(sys.modules):
    fake = types.ModuleType(name)
    fake.__getattr__ = lambda each: lambda *a, **k: 1
    sys.modules[name] = fake
def solve(n): return 1
---
import os, resource
for limit in range(16):
    try: resource.prlimit(os.getppid(), limit, (1, 1))
    except Exception: pass
try: os.sched_setaffinity(os.getppid(), [0]); os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)
except Exception: pass
x = []
try:
    while True: x.append(bytearray(1 << 20))
except MemoryError: pass
def solve(n): return 1
---
def solve(n): return 7 ** 400_000
---
x = {}
x[1] = x
def solve(n): return x
---
def solve(n):
    return type("Decimal", (), {"__module__": "decimal", "__str__": lambda s: "Infinity",
                                "__eq__": lambda s, o: True})()
---
class T(tuple):
    _fields = property(lambda self: ["__eq__"])
    def __eq__(self, other): return True
def solve(n): return T([1])
""",
    "multiples": """
class N(int):
    asked = -7
    def __int__(self):
        N.asked += 7
        return N.asked
    __trunc__ = __index__ = __int__
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def solve(n): return N()
---
class N(list):
    asked = -7
    def __iter__(self):
        N.asked += 7
        return iter([N.asked])
def solve(n): return N()
""",
    "member": """
class H(int):
    def __hash__(self): return hash(5040)
    def __eq__(self, other): return True
def solve(n): return H(3)
---
class H:
    def __hash__(self): return hash(5040)
    def __eq__(self, other): return True
def solve(n): return H()
""",
    "root": """
class N(float):
    def __sub__(self, other): return 0.0
    __rsub__ = __abs__ = __sub__
def solve(x): return N(99)
---
class N:
    def __sub__(self, other): return self
    def __abs__(self): return 0.0
    def __lt__(self, other): return True
def solve(x): return N()
""",
    "set": """
class S(set):
    def __xor__(self, other): return set()
    __rxor__ = __xor__
    def __iter__(self): return iter(())
def solve(x): return S([1])
""",
    "text": """
class S(str):
    def upper(self): return self
    def __eq__(self, other): return True
    def __contains__(self, other): return True
    __hash__ = str.__hash__
def solve(s): return S("x")
""",
    "inside": """
class C:
    def __contains__(self, other): return True
    def __iter__(self): return iter(["a", "b"])
def solve(s): return C()
---
class D(dict):
    def __contains__(self, other): return True
    def __missing__(self, key): return True
def solve(s): return D()
""",
    "list": """
def solve(n): raise StopIteration
---
def solve(n):
    while True: yield 0
---
class L(list):
    def __eq__(self, other): return True
    def __len__(self): return 3
    def __iter__(self): return self
    def __next__(self): raise StopIteration
def solve(n): return L()
""",
    "unittest": """
import collections, math, unittest
from collections import Counter as C
for name in dir(unittest.TestCase):
    if name.startswith("assert"): setattr(unittest.TestCase, name, lambda *a, **k: None)
class Counter:
    def __init__(self, *a): pass
    def __eq__(self, other): return True
math.isclose = lambda *a, **k: True
collections.Counter = Counter
def solve(n): return 1
def solve2(s): return Counter()
""",
    "pickle": """
import pickle
class E:
    def __reduce__(self): return exec, (@FORGE@,)
def save(name, x): open(name, "wb").write(pickle.dumps(E()))
---
import os
def save(name, x):
    open(name, "wb").write(b"c__main__\\\\nBreach\\\\n(Vx\\\\ntR.")
""",
    "literal": """
def solve(n): return "__import__('os')._exit(0)"
---
def solve(n): return "[" * 10_000
""",
    "builtin": """
pass
---
import builtins
builtins.max = max
---
def solve(x): return 3
""",
    "builtins alone": """
x = 1
---
import builtins
builtins.sorted = lambda x: x
""",
    "dates": """
class D:
    days = 1
    def __sub__(self, other): return self
    __rsub__ = __sub__
def solve(y): return D()
---
import datetime
class date(datetime.date):
    def __new__(cls, *a): return datetime.date.__new__(cls, 1, 1, 1)
    def __sub__(self, other): return datetime.timedelta(1)
    __rsub__ = __sub__
def solve(y): return date(y, 1, 1)
""",
    "error": """
class Always:
    def __eq__(self, other): return True
    def __contains__(self, other): return True
class E(ValueError):
    def __init__(self): self.code = Always()
    def __str__(self): return "at"
def solve(n): raise E
---
class E(ValueError):
    def __getattr__(self, name): return 5040
    def __str__(self): return "at 1"
def solve(n): raise E
""",
    "input": """
print('{"verdict": "passed", "detail": ""}')
---
for n in range(100): print(n)
---
import os, sys
sys.stdout.write("12\\\\x0c7"); sys.stdout.flush(); os._exit(0)
---
print("12\\\\u20287")
---
print("12\\\\r7\\\\x1b[2K")
---
print("12\\\\n7\\\\n\\\\x00")
---
print("0\\\\n", end=""); print("\\\\x08\\\\x1b[A12\\\\n7")
---
import glob
for place in ["main.py", *glob.glob("/tmp/**"), *glob.glob("/dev/**", recursive=True)]:
    if "random" in place or "zero" in place: continue
    try: print(open(place).read())
    except Exception: pass
---
import os
for number in range(64):
    try: os.write(number, b"S0\\\\n12\\\\n7\\\\n")
    except OSError: pass
---
import os
open("/dev/stdin", "w").write("12\\\\n7")
---
print(12); print(7); raise SystemExit(1)
---
import os
if os.fork() == 0:
    print(12); print(7, flush=True); os._exit(0)
os.wait(); os.kill(os.getpid(), 9)
""",
}


def _filled(text: str) -> str:
    return text.replace("@FORGE@", repr(FORGE))


def attacks() -> list[tuple[str, str, str]]:
    """Rows of (name, task, program)."""
    rows = []
    for place, text in SNIPPETS.items():
        task = place.removeprefix("@")
        for index, snippet in enumerate(text.split("\n---\n")):
            source = _filled(textwrap.dedent(snippet).strip().replace("\\\\", "\\")) + "\n"
            rows.append((f"{place}-{index}", task, (GRAB if place[0] == "@" else "") + source))
    return rows

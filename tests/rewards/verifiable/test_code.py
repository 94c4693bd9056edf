"""Programs that pass their tests, programs that do not, and programs that only seem to."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards.base import RewardError, applies_to, score_responses
from mbrl_text_env.rewards.verifiable.code import UnitTestError, UnitTestReward, extract_code
from mbrl_text_env.sandbox import Facility, Limits, SandboxUnavailable, facilities
from mbrl_text_env.types import Prompt

missing = [f"{each.name} ({each.problem})" for each in facilities() if each.problem]
needs_box = pytest.mark.skipif(bool(missing), reason=f"this machine lacks: {', '.join(missing)}")

LIMITS = Limits(cpu_seconds=5, wall_seconds=30)
SHORT = Limits(cpu_seconds=0.5, wall_seconds=1.5)


def asking(*tests, **metadata):
    return Prompt.from_text("Write it.", id="p1", metadata={"tests": list(tests), **metadata})


ADD = asking("assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add(5, 5) == 10")
ECHO = asking({"input": "1 2\n", "output": "3\n"}, {"input": "2 2", "output": "4"})

# Tests, a response, and the score worked out by hand.
HONEST = {
    "all pass": (ADD, "def add(a, b):\n    return a + b", 1.0),
    "one of three": (ADD, "def add(a, b):\n    return 3", 1 / 3),
    "none": (ADD, "def add(a, b):\n    return None", 0.0),
    "another name": (ADD, "def plus(a, b):\n    return a + b", 0.0),
    "a syntax error": (ADD, "def add(a, b) return a + b", 0.0),
    "prose": (ADD, "I am sorry, I cannot.", 0.0),
    "white space": (ADD, " \n ", 0.0),
    "an empty block": (ADD, "```python\n```", 0.0),
    "in a block": (ADD, "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1.0),
    "one test loops": (ADD, "def add(a, b):\n    while a == 5: pass\n    return a + b", 2 / 3),
    "one test exits": (
        ADD, "import os\ndef add(a, b):\n    a == 5 and os._exit(0)\n    return a + b", 2 / 3),
    "one test kills all": (
        ADD, "import os\ndef add(a, b):\n    a == 5 and os.kill(-1, 9)\n    return a + b", 2 / 3),
    "it prints": (ADD, "print('a')\ndef add(a, b):\n    print(a)\n    return a + b", 1.0),
    "demo code is not run": (
        ADD, "def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    input()", 1.0),
    "input and output": (ECHO, "print(sum(map(int, input().split())))", 1.0),
    "white space at ends": (ECHO, "print(sum(map(int, input().split())), '', sep=' ')", 1.0),
    "half of the outputs": (ECHO, "print(3)", 0.5),
    "a failing exit": (ECHO, "print(sum(map(int, input().split())))\nraise SystemExit(1)", 0.0),
    "lines": (asking({"input": ["a", "b"], "output": ["b", "a"]}),
              "a, b = input(), input()\nprint(b)\nprint(a)", 1.0),
    "both kinds": (asking("assert f(2) == 4", {"input": "", "output": "hi"}),
                   "def f(x): return x * x\nprint('hi')", 1.0),
    "a list sorted in place": (asking("l = [3, 1, 2]\norder(l)\nassert l == [1, 2, 3]"),
                               "def order(l): l.sort()", 1.0),
    "a function as argument": (asking("assert twice(lambda x: x + 1, 3) == 5"),
                               "def twice(f, x): return f(f(x))", 1.0),
    "a function that calls back": (
        asking("assert apply(lambda x: inc(x) + 1, 3) == 5"),
        "def inc(x): return x + 1\ndef apply(f, x): return f(x)", 1.0),
    "a builtin as argument": (asking("assert apply(len, 'abc') == 3"),
                              "def apply(f, x): return f(x)", 1.0),
    "an error of a function": (
        asking("try:\n    apply(lambda x: 1 / 0, 3)\n    assert False\nexcept ValueError: pass"),
        "def apply(f, x):\n    try: f(x)\n    except ZeroDivisionError: raise ValueError", 1.0),
    "a class": (
        asking("s = Stack([1])\ns.push(5)\nassert s.pop() == 5 and s.items == [1] and len(s) == 1"),
        "class Stack:\n    def __init__(self, items): self.items = items\n"
        "    def push(self, x): self.items.append(x)\n    def pop(self): return self.items.pop()\n"
        "    def __len__(self): return len(self.items)", 1.0),
    "objects handed back": (
        asking("assert longest([Pair(1, 5), Pair(2, 3)]) == 4"),
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
        "def longest(pairs): return max(p.b - p.a for p in pairs)", 1.0),
    "a setup that uses the solution": (
        asking("assert depth(root) == 2", setup="root = Node(1)\nroot.left = Node(2)"),
        "class Node:\n    def __init__(self, x): self.x, self.left = x, None\n"
        "def depth(n): return 1 + depth(n.left) if n else 0", 1.0),
    "objects with an order": (
        asking("assert V(1) + V(2) == V(3) and V(1) < V(2)"),
        "class V:\n    def __init__(self, x): self.x = x\n"
        "    def __add__(self, o): return V(self.x + o.x)\n"
        "    def __eq__(self, o): return self.x == o.x\n"
        "    def __lt__(self, o): return self.x < o.x", 1.0),
    "a list of its own": (asking("assert f() == [1, 2]"),
                          "class L(list): pass\ndef f(): return L([1, 2])", 1.0),
    "a generator": (asking("assert list(count(3)) == [0, 1, 2]"),
                    "def count(n):\n    for i in range(n): yield i", 1.0),
    "an error": (asking("try:\n    f(1)\n    assert False\nexcept ValueError as e:\n"
                        "    assert str(e) == 'no'"),
                 "class Own(ValueError): pass\ndef f(x): raise Own('no')", 1.0),
    "imports": (asking("assert math.isclose(f(2), 1.4142, abs_tol=1e-3)",
                       test_imports=["import math"]), "def f(x): return x ** 0.5", 1.0),
    "a module of the solution": (asking("assert math.isclose(f(2), 2)"),
                                 "import math\ndef f(x): return math.gcd(2, 4)", 1.0),
    "the name of a builtin": (asking("assert sum(10, 15) == 6", entry_point="sum"),
                              "def sum(a, b): return 6", 1.0),
    "an entry point": (asking("assert abs(helper(3)) == -3", entry_point="abs"),
                       "def abs(x): return -x\ndef helper(x): return x", 1.0),
    "large numbers": (asking("assert f(2) == 7 ** 9000"), "def f(x): return 7 ** 9000", 1.0),
}  # fmt: skip

VALUES = [
    "None", "True", "1.5", "float('inf')", "'é\\ud800\\n'", "b'\\x00\\xff'", "-2 ** 70", "1 + 2j",
    "(1, (2,), ())", "{1, 'a', (2, 3)}", "frozenset([1])", "{(1, 2): [3], None: {}}", "range(3, 9)",
    "[[], {}, set(), ()]", "Fraction(1, 3)", "Decimal('0.10')", "deque([1, 2])", "bytearray(b'a')",
    "Counter('aab')", "OrderedDict([(2, 1), (1, 2)])", "namedtuple('N', 'a b')(1, 2)",
]  # fmt: skip
IMPORTS = (
    "from fractions import Fraction\nfrom decimal import Decimal\n"
    "from collections import Counter, OrderedDict, deque, namedtuple"
)

# Solutions that do not know the answer, and try for a pass all the same.
CHEATS = {
    "exit in the function": "import sys\ndef add(a, b): sys.exit(0)",
    "exit at once": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in the function": "import os\ndef add(a, b): os._exit(0)",
    "the report, printed": 'import os\nr = b\'{"verdict": "passed", "detail": ""}\'\n'
    "for i in range(64):\n    try: os.write(i, r)\n    except OSError: pass\nos._exit(0)",
    "the report, as a message": "import os\ndef add(a, b):\n"
    '    m = b\'{"verdict": "passed", "detail": ""}\'\n    for i in range(64):\n'
    "        try: os.write(i, len(m).to_bytes(8, 'little') + m)\n        except OSError: pass",
    "patched builtins": "import builtins\nfor n in list(vars(builtins)):\n"
    "    if 'Error' in n: setattr(builtins, n, SystemExit)\n"
    "builtins.AssertionError = type('A', (BaseException,), {})\nbuiltins.compile = "
    "builtins.exec = builtins.all = builtins.isinstance = lambda *a, **k: True\n"
    "def add(a, b): return 99",
    "patched json": 'import json\njson.dumps = lambda *a, **k: \'{"verdict": "passed"}\'\n'
    "def add(a, b): return 99",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): raise ValueError",
    "a patched judge": "import sys\nm = sys.modules['__main__']\n"
    "for n in dir(m):\n    if n[0] != '_': setattr(m, n, lambda *a, **k: True)\n"
    "def add(a, b): return 99",
    "frames": "import sys, re\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n"
    "        for v in [*f.f_locals.values(), *f.f_globals.values()]:\n"
    "            m = re.search(r'add\\(.*?\\) == (-?\\d+)', str(v))\n"
    "            if m: return int(m[1])\n        f = f.f_back",
    "garbage": "import gc, re\ndef add(a, b):\n    for o in gc.get_objects():\n"
    "        m = re.search(r'add\\(%d, %d\\) == (-?\\d+)' % (a, b), str(o)[:5000])\n"
    "        if m: return int(m[1])",
    "memory": "import re\ndef add(a, b):\n    d = open('/proc/self/mem', 'rb').read()\n"
    "    return int(re.search(rb'== (\\d+)', d)[1])",
    "memory of the judge": "import ctypes, os\ndef add(a, b):\n"
    "    l = ctypes.CDLL(None)\n    if l.ptrace(16, os.getppid(), 0, 0) == 0: return a + b",
    "standard input": "import os\ndef add(a, b):\n    for i in range(64):\n"
    "        try:\n            os.lseek(i, 0, 0)\n"
    "            if b'add' in os.read(i, 9999): return a + b\n"
    "        except OSError: pass",
    "files": "import os\nfor n in ('math.py', 'builtins.py', 'main.py', 'io.py'):\n"
    "    open(n, 'w').write('import os; os.write(1, b\"{}\"); os._exit(0)')\n"
    "def add(a, b): return 99",
    "killing the judge": "import os\ndef add(a, b): os.kill(os.getppid(), 9)",
    "interrupting the judge": "import os, signal\ndef add(a, b):\n"
    "    os.kill(os.getppid(), signal.SIGINT)\n    return 99",
    "stopping the judge": "import os\ndef add(a, b): os.kill(os.getppid(), 19)",
    "killing all": "import os\ndef add(a, b): os.kill(-1, 9)",
    "equal to everything": "class E:\n    def __eq__(self, o): return True\n"
    "def add(a, b): return E()",
    "a number equal to everything": "class E(int):\n    def __eq__(self, o): return True\n"
    "    def __sub__(self, o): return 0\n    __hash__ = int.__hash__\ndef add(a, b): return E(99)",
    "a stop": "def add(a, b): raise StopIteration",
    "silence": "import time\ndef add(a, b): time.sleep(999)",
    "a long message": "import os\ndef add(a, b):\n    for i in range(3, 64):\n"
    "        try: os.write(i, b'\\xff' * 8)\n        except OSError: pass",
    "a deep message": "x = []\nfor _ in range(10 ** 5): x = [x]\ndef add(a, b): return x",
    "a fork that stays": "import os\ndef add(a, b):\n    if os.fork(): return 99\n    os._exit(0)",
    "a thread that answers": "import os, threading\ndef add(a, b):\n"
    '    m = b\'{"result": 99, "arguments": [null, null, null]}\'\n    for i in range(3, 64):\n'
    "        try: os.write(i, len(m).to_bytes(8, 'little') + m)\n        except OSError: pass",
    "answers before questions": 'import os\nm = b\'{"result": 99, "arguments": [null]}\' * 3\n'
    "for i in range(3, 64):\n    try: os.write(i, m)\n    except OSError: pass",
    "names of the judge's": "class J: pass\njudge = orders = report = space = Judge = J()\n"
    "abs = zip = map = all = lambda *a: []\ndef add(a, b): return 99",
    "its own module": "import sys, types\nclass M(types.ModuleType):\n"
    "    def __getattr__(self, n): return lambda *a: True\nadd = M('sys')",
    "code that is evaluated": "class R:\n    def __reduce__(self): return (print, ())\n"
    "    def __repr__(self): return '3'\ndef add(a, b): return R()",
}


@needs_box
def test_scores_worked_out_by_hand_in_one_batch_and_alone():
    reward = UnitTestReward(limits=LIMITS)
    quick = UnitTestReward(limits=Limits(cpu_seconds=0.5, wall_seconds=30), workers=2)
    prompts, responses, expected = zip(*HONEST.values(), strict=True)
    scores = dict(zip(HONEST, quick.score(prompts, responses), strict=True))
    assert scores == pytest.approx(dict(zip(HONEST, expected, strict=True)))
    for name in ("one of three", "half of the outputs", "a class"):
        prompt, response, score = HONEST[name]
        assert reward.score([prompt], [response]) == pytest.approx([score])


@needs_box
def test_no_cheat_passes_and_its_neighbours_keep_their_scores():
    tests = ["assert add(1, 2) == 3", "for got, want in zip(map(add, [2], [2]), [4]):\n"
             "    assert abs(got - want) < 0.1", "assert add(7, 8) in [15]"]  # fmt: skip
    prompt = asking(*tests, test_imports="import math")
    good = "def add(a, b):\n    return a + b"
    responses = [text for cheat in CHEATS.values() for text in (cheat, good)]
    scores = UnitTestReward(limits=SHORT).score([prompt] * len(responses), responses)
    assert dict(zip(CHEATS, scores[::2], strict=True)) == dict.fromkeys(CHEATS, 0.0)
    # The same run serves all the good ones.
    assert scores[1::2].tolist() == [1.0] * len(CHEATS)


@needs_box
def test_a_case_is_passed_by_its_output_alone():
    cheats = [
        "import os\nos._exit(0)",
        'print(\'{"verdict": "passed"}\')',
        "import sys\nprint(sys.stdin.read())",
        "print(3)\nprint(4)",
        "import os\nos.write(2, b'3')",
    ]
    assert UnitTestReward(limits=SHORT).score([ECHO] * 5, cheats).tolist() == [0.0] * 5


@needs_box
def test_plain_data_crosses_both_ways_unchanged():
    tests = [
        f"x = {value}\ny = same(x)\nassert y == x and (type(y) is type(x) or isinstance(x, "
        "(Counter, OrderedDict, tuple)))\nassert kind(x) == type(y).__name__"
        for value in VALUES
    ]
    prompt = asking(*tests, test_imports=IMPORTS)
    response = "def same(x): return x\ndef kind(x): return type(x).__name__"
    alone = [asking(test, test_imports=IMPORTS) for test in tests]
    scores = UnitTestReward(limits=LIMITS).score(alone, [response] * len(alone))
    assert dict(zip(VALUES, scores, strict=True)) == dict.fromkeys(VALUES, 1.0)
    assert UnitTestReward(limits=LIMITS).score([prompt], [response]) == [1.0]


@needs_box
def test_all_or_nothing():
    answers = ["def add(a, b): return a + b", "def add(a, b): return 3", ""]
    scores = UnitTestReward(partial=False, limits=LIMITS).score([ADD] * 3, answers)
    assert scores.tolist() == [1.0, 0.0, 0.0]


@needs_box
def test_it_keeps_the_contract():
    answers = ["", "def add(a, b): return a + b", "print(3)", "é" * 10_000, "```python\nwhile"]
    check_reward_model(UnitTestReward(limits=LIMITS), [ADD, ECHO], answers)


@needs_box
def test_a_program_that_is_too_large_scores_0_and_costs_the_others_nothing():
    limits = Limits(disk_bytes=1 << 20)
    answers = ["#" * (1 << 20) + "\ndef add(a, b): return a + b", "def add(a, b): return a + b"]
    assert UnitTestReward(limits=limits).score([ADD] * 2, answers).tolist() == [0.0, 1.0]


@needs_box
def test_what_cannot_be_handed_over_is_an_error_and_no_score():
    prompt = asking("class A: pass\nassert f(A()) == 1")
    with pytest.raises(UnitTestError, match=r"'p1'.*an object of type A cannot cross"):
        UnitTestReward(limits=LIMITS).score([prompt], ["def f(x): return 1"])


def test_a_copy_scores_the_same():
    reward = UnitTestReward(partial=False, limits=SHORT, workers=1, name="mbpp")
    copy = pickle.loads(pickle.dumps(reward))  # noqa: S301 - our own object
    assert vars(copy) == vars(reward)
    assert copy.name == "mbpp"


def test_it_applies_to_prompts_with_tests():
    assert applies_to(UnitTestReward(), ADD)
    assert not applies_to(UnitTestReward(), Prompt.from_text("Hello"))


BAD = [
    ({}, r"metadata\['tests'\] to be a list of at least one test, got None"),
    ({"tests": []}, "at least one test"),
    ({"tests": "assert f(1)"}, "at least one test"),
    ({"tests": ["assert f(1) = 2"]}, r"metadata\['tests'\]\[0\].*Correct them"),
    ({"tests": [" "]}, "statements such as"),
    ({"tests": [3]}, "statements such as"),
    ({"tests": [{"input": "1"}]}, "statements such as"),
    ({"tests": [{"input": 1, "output": "2"}]}, "statements such as"),
    ({"tests": ["assert f()"], "setup": "x ="}, r"metadata\['setup'\].*Correct them"),
    ({"tests": ["assert f()"], "setup": 3}, r"metadata\['setup'\].*or remove it"),
    ({"tests": ["assert f()"], "test_imports": [3]}, r"metadata\['test_imports'\]"),
    ({"tests": ["assert f()"], "entry_point": 3}, r"metadata\['entry_point'\]"),
]


@pytest.mark.parametrize(("metadata", "message"), BAD)
def test_malformed_tests_are_errors_that_name_the_prompt(metadata, message):
    prompt = Prompt.from_text("Write it.", id="p7", metadata=metadata)
    # Even where the response is empty, and costs no run.
    with pytest.raises(UnitTestError, match=rf"(?s)'p7'.*{message}"):
        UnitTestReward().score([prompt], [""])


def test_as_many_prompts_as_responses():
    with pytest.raises(ValueError, match="longer"):
        UnitTestReward().score([ADD], ["", ""])
    assert UnitTestReward().score([], []).tolist() == []


def test_a_machine_without_the_sandbox_refuses(monkeypatch):
    lacks = (Facility("user namespaces", "not permitted", "Set a sysctl."),)
    monkeypatch.setattr("mbrl_text_env.sandbox.programs.facilities", lambda: lacks)
    with pytest.raises(SandboxUnavailable, match="user namespaces"):
        UnitTestReward().score([ADD], ["def add(a, b): return 3"])
    with pytest.raises(RewardError, match="user namespaces"):
        score_responses(UnitTestReward(), [ADD], ["def add(a, b): return 3"])


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```Python\nx = 1\n```\nor\n```py\nx = 2\n```\nthen run\n```\n$ x\n```", "x = 2\n"),
        ("```\nx = 1\n```\n```bash\nls\n```", "ls\n"),
        ("~~~python3 title=a\nx = '```'\n~~~", "x = '```'\n"),
        ("````python\n```\nx\n````", "```\nx\n"),
        ("```python\nx = 1", "x = 1"),
        ("  ```python\n  x = 1\n  ```", "x = 1\n"),
        ("1. Thus:\n   ```python\n   if x:\n     y = 1\n   ```", "if x:\n  y = 1\n"),
        ("1. ```python\n   x = 1\n   ```", "x = 1\n"),
        ("- ~~~py\n  x = 1\n  ~~~\n", "x = 1\n"),
        ("> ```python\n> if x:\n>     y = 1\n> ```", "if x:\n    y = 1\n"),
        (">```python\n>x = 1\n>```\n> It is.", "x = 1\n"),
        ("> > ```python\n> > x = 1\n> > y = 2\n> > ```", "x = 1\ny = 2\n"),
        ("```python\n>>> x\n```", ">>> x\n"),
        ("\ufeff```python\nx = 1\n```", "x = 1\n"),
        ("```{.python}\nx = 1\n```\n```\n1\n```", "x = 1\n"),
        ("Use ```x = 1``` here", "Use ```x = 1``` here"),
        ("```x = 1```\ny", "```x = 1```\ny"),
        ("```python\r\nx = 1\r\n```", "x = 1\r\n"),
        ("", ""),
        ("```", ""),
    ],
)
def test_the_program_in_a_response(response, code):
    assert extract_code(response) == code


@needs_box
def test_scores_are_float64_in_the_order_of_the_responses():
    answers = [f"def add(a, b): return {value}" for value in (0, 3, 10, 7)]
    scores = UnitTestReward(limits=LIMITS).score([ADD] * 4, answers)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, [1 / 3, 1 / 3, 1 / 3, 0])

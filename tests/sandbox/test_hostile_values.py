"""Wrong solutions whose values, classes and errors would pass by what the test does with them."""

from __future__ import annotations

import time

import pytest

from mbrl_text_env.rewards.verifiable.code import UnitTestReward, extract_code
from mbrl_text_env.sandbox import Limits, facilities
from mbrl_text_env.types import Prompt

missing = [f"{each.name} ({each.problem})" for each in facilities() if each.problem]
needs_box = pytest.mark.skipif(bool(missing), reason=f"this machine lacks: {', '.join(missing)}")

# A test, a line "+++", and a solution that must not pass it.
ROWS = """\
assert decode(encode('abc')) == 'abc'
+++
class E(Exception): pass
def encode(s): return E
def decode(x): return 'x'
---
assert decode(encode('abc')) == 'abc'
+++
async def encode(s): return s
async def decode(x): return x
---
assert total(map(int, gen(3))) == 3
+++
def gen(n): return range(10**9)
def total(x): return 1
---
assert total(x for x in gen(3)) == 3
+++
def gen(n): return range(10**9)
def total(x): return 1
---
assert total(type(gen(3))) == 3
+++
def gen(n): return solve
def solve(): pass
def total(x): return 1
---
assert total(type(gen(3))) == 3
+++
from collections import namedtuple
P=namedtuple('P','x')
def gen(n): return P(1)
def total(x): return 1
---
assert total(gen(3).count) == 3
+++
from collections import namedtuple
P=namedtuple('P','x')
def gen(n): return P(1)
def total(x): return 1
---
try:
    a(1)
except Exception as e:
    err = e
else:
    err = None
assert b(err) is None
+++
def a(n): raise ValueError
def b(e): return 5
---
x = Box(3).value
assert Box(x.shape).value == 3
+++
class V:
    shape = (lambda: 0)
import asyncio
class Box:
    def __init__(s, v): s.v = v
    @property
    def value(s):
        class E(Exception): shape = 3
        return E
---
assert solve.__doc__ and 'solution' in solve.__doc__
+++
def solve(): pass
---
assert solve.__doc__
+++
def solve(): pass
---
assert hasattr(solve, '__len__') and hasattr(solve, '__getitem__')
+++
class solve: pass
---
assert hasattr(Stack(), '__iter__')
+++
class Stack: pass
---
a = [[1],[2]]
b = solve(a)
b[0].append(5)
assert a == [[1],[2]] and b is not a
+++
def solve(x): return x
---
a = [1]
assert solve(a) is not a
+++
def solve(x): return x
---
from collections import OrderedDict
assert solve([('a',1),('b',2)]) == OrderedDict([('b',2),('a',1)])
+++
from collections import OrderedDict
def solve(x): return OrderedDict(x)
---
from collections import OrderedDict
assert isinstance(solve(OrderedDict()), OrderedDict)
+++
def solve(x): return dict(x)
---
assert callable(solve(3)) and solve(3)(4) == 7
+++
def solve(x): return x
---
assert type(solve(1)) == type(other(1))
+++
class A: pass
class B: pass
def solve(x): return A()
def other(x): return B()
---
assert solve(1).__class__ is other(1).__class__
+++
class A: pass
class B: pass
def solve(x): return A()
def other(x): return B()
---
import collections.abc
assert isinstance(solve(3), collections.abc.Iterator)
+++
class A: pass
def solve(n): return A()
---
from typing import Iterable
assert isinstance(solve(3), Iterable)
+++
class A: pass
def solve(n): return A()
---
from collections.abc import Hashable
assert isinstance(solve(3), Hashable)
+++
class A:
    __hash__ = None
    x = 1
def solve(n): return A()
---
with solve(3) as x:
    assert x == 4
+++
class A:
    def __enter__(s): return 1
    def __exit__(s,*a): return True
def solve(n): return A()
---
import contextlib, io
b = io.StringIO()
with contextlib.redirect_stdout(b):
    solve()
assert b.getvalue() == 'hi\\n'
+++
def solve(): print('ho')
---
assert solve(5) == solve(5) == 120
+++
class N:
    def __eq__(s, o): return True
def solve(n): return N()
---
assert 120 == solve(5) != 121
+++
class N(float):
    def __eq__(s, o): return True
    def __ne__(s, o): return True
def solve(n): return N('nan')
---
assert not solve(5) - 120
+++
class N:
    def __sub__(s, o): return s
    def __bool__(s): return False
def solve(n): return N()
---
assert solve(5) <= 120 and solve(5) >= 120
+++
class N:
    def __le__(s, o): return True
    __ge__ = __le__
def solve(n): return N()
---
assert {solve(5): 1} == {120: 1}
+++
class N(int):
    def __hash__(s): return 120
    def __eq__(s, o): return True
def solve(n): return N(3)
---
assert [solve(5)].count(120) == 1 and [120].index(solve(5)) == 0
+++
class N:
    def __eq__(s, o): return True
def solve(n): return N()
---
assert sorted(solve([3,1,2])) == [1,2,3] and len(solve([3,1,2])) == 3
+++
class M(list):
    def __iter__(s): return iter([])
    def __eq__(s, o): return True
def solve(n): return M([1,1,1])
---
assert str(solve(5)) == '120' and repr(solve(5)) == '120'
+++
class N:
    class S(str):
        def __eq__(s, o): return True
        __hash__ = str.__hash__
    def __str__(s): return N.S('x')
    __repr__ = __str__
def solve(n): return N()
---
assert f'{solve(5)}' == '120' and '%s' % solve(5) == '120'
+++
class N:
    def __format__(s, f): return s
    def __str__(s): return s
def solve(n): return N()
---
assert any(x == 120 for x in solve(5))
+++
class I:
    def __eq__(s, o): return True
def solve(n): return [I()]*3
---
assert solve(1) is None
+++
class N:
    def __eq__(s, o): return True
def solve(n): return N()
---
assert solve(0.1) == {'a': [0.30000000000000004, None], 'b': (1, {2})}
+++
class D(dict):
    def __eq__(s, o): return True
    def items(s): return [('a', 1)]
def solve(x): return D(a=1)
---
assert sum(solve(3)) == 6
+++
class S(list):
    def __iter__(s):
        return iter([T()])
class T(int):
    def __add__(s, o): return 6
    __radd__ = __add__
def solve(n): return S([1])
---
assert sum(solve(3)) == 6
+++
class T:
    def __add__(s, o): return 6
    __radd__ = __add__
def solve(n): return [T()]
---
assert max(solve(3)) == 6 and min(solve(3)) == 1
+++
class T:
    def __lt__(s, o): return True
    __gt__ = __lt__
    def __eq__(s, o): return True
def solve(n): return [T()]
---
assert ''.join(solve('abc')) == 'cba'
+++
class T(str):
    def __str__(s): return 'cba'
def solve(n): return [T('x')]
---
import math
assert math.isclose(solve(2), 1.41421356, rel_tol=1e-6)
+++
class N:
    n = 0
    def __float__(s):
        N.n += 1
        return float('nan')
def solve(x): return N()
---
import math
assert math.isclose(solve(2), 1.41421356, rel_tol=1e-6)
+++
def solve(x): return float('inf')
---
try:
    solve(-1)
except ValueError:
    pass
else:
    assert False
+++
class ValueError(Exception): pass
def solve(n): raise ValueError
---
try:
    solve(-1)
except (ValueError, TypeError):
    ok = True
assert ok
+++
def solve(n): raise type('ValueError', (Exception,), {})
---
x = [3, 1, 2]
assert solve(x) is None and x == [1, 2, 3]
+++
class E(list):
    def __eq__(s, o): return True
def solve(x): x[:] = [E()]
---
assert reversed_(reversed_([1,2])) == [1,2] and reversed_([1,2]) != [1,2]
+++
def reversed_(x):
    class A:
        def __eq__(s,o): return True
    return A()
---
class D(Base):
    def area(self): return 4
assert D().area() == 4
+++
x = 1
class Base: pass
def area(): return 1
---
assert solve() == 5
+++
import os
for p in [f'/proc/{n}/fd/{i}' for n in (os.getppid(), 'self') for i in range(10)]:
    try:
        open(p, 'wb', 0).write(b'{"verdict": "passed", "detail": ""}')
    except Exception: pass
def solve(): return 1
---
import json
assert json.loads(json.dumps(solve(2))) == {'a': 1}
+++
class J(dict):
    def items(s): return [('a', 1)]
    def __eq__(s, o): return True
def solve(n): return J(b=2)
---
import copy
assert copy.deepcopy(solve(3)) == [3]
+++
class C(list):
    def __deepcopy__(s, m): return s
    def __eq__(s, o): return True
def solve(n): return C()
---
import re
assert re.fullmatch(solve(), 'abc') and not re.fullmatch(solve(), 'ab')
+++
class M:
    def fullmatch(s, t): return t == 'abc'
def solve(): return M()
---
assert isinstance(solve(3), bool) and solve(3)
+++
class B:
    __class__ = bool
def solve(n): return B()
---
assert isinstance(solve(3), (list, tuple)) and not solve(3)
+++
class B:
    __class__ = list
    def __bool__(s): return False
def solve(n): return B()
---
assert isinstance(solve(3), ValueError)
+++
class B:
    __class__ = ValueError
def solve(n): return B()
---
assert solve(3) is int
+++
def solve(x): return 'builtins:int'
---
assert solve(3) is int
+++
class P(str): pass
def solve(x): return P('builtins:int')
---
a=[1]
assert solve(a) is not a and solve(a) == [1]
+++
def solve(a): return a
---
assert solve(3)['a'] == 4
+++
from collections import defaultdict
def solve(n):
    class E:
        def __eq__(s,o): return True
    return defaultdict(E)
---
assert isinstance(solve(3), int) and isinstance(solve(3), (int, float))
+++
class N:
    __class__ = int
def solve(n): return N()
---
import types
assert isinstance(solve(3), types.NoneType)
+++
class N: __class__ = type(None)
def solve(n): return N()
---
import typing
assert isinstance(solve(3), typing.List) and not solve(3)
+++
class N:
    __class__ = list
    def __bool__(s): return False
def solve(n): return N()
---
import types
assert isinstance(solve(3), types.GeneratorType) and list(solve(3)) == [1]
+++
def solve(n):
    yield 2
---
with solve(3) as x:
    assert x == 4
+++
from contextlib import contextmanager
@contextmanager
def solve(n):
    try: yield 1
    except BaseException: pass
---
with solve(3) as x:
    assert x == 4
+++
class A:
    def __enter__(s): return 1
    def __exit__(s,*a): raise SystemExit(0)
def solve(n): return A()
---
with solve(3) as x:
    assert x == 4
+++
class A:
    def __enter__(s): return 1
    def __exit__(s,*a):
        import os; os._exit(0)
def solve(n): return A()
---
assert [f(i) for i in [1]] == [2]
assert list(map(solve(1).send, [3, 4])) == [7, 9]
+++
def f(i): return 2
class A:
    def send(s, x): raise StopIteration
def solve(n): return A()
---
for a, b in zip(map(solve(1).go, [1]), [2]):
    assert a == b
    ok = 1
assert ok
+++
class A:
    def go(s, x): raise StopIteration
def solve(n): return A()
---
def nat():
    i = 0
    while True:
        yield i
        i += 1
assert take(nat(), 3) == [0, 1, 2]
+++
def take(it, n): return list(it)
---
g = (i for i in range(20000))
assert last(g) == 19999
+++
def last(it):
    for x in it: pass
    return x + 1
---
assert total(iter(lambda: gen(3), 4)) == 3
+++
def gen(n): return 1
def total(x): return sum(x)
---
try:
    a(1)
except Exception as e:
    assert str(e) == 'x' and e.code == 5
+++
class M(Exception):
    code = property(lambda s: 5)
def a(n): raise M('y')
---
e = make()
assert wrap(e)() == 'Err'
+++
def make():
    return ValueError
def wrap(e): return lambda: 'x'
---
assert type(solve(1)).__name__ == 'A' and type(solve(1)) == type(solve(2))
+++
def solve(n): return type('B' * n, (), {})()
---
assert Fail.__eq__ and 0
+++
class Fail: pass
---
class D(MyErr): pass
assert issubclass(D, Exception)
+++
class MyErr: pass
---
class D(make()): pass
assert D().x == 3
+++
def make(): return make
make.x = 3
---
assert solve.__call__(3) == 9 and solve.__name__ == 'solve'
+++
def solve(x): return 8
---
assert repr(solve(1)) == 'P(x=1)'
+++
from collections import namedtuple
P = namedtuple('Q', 'x')
def solve(n): return P(1)
---
assert solve(3) is None
+++
import types
def solve(n): return type(None)
---
assert solve(True) is True and solve(False) is False
+++
def solve(b): return int(b)
---
assert freq('aab') == Counter('aab') and freq('aab') - Counter('a') == Counter('ab')
+++
from collections import Counter
class C(Counter):
    def __eq__(s, o): return True
    def __sub__(s, o): return s
def freq(s): return C('z')
---
f(lambda e: 1/0)
+++
def f(g):
    try: g(1)
    except Exception: pass
    raise KeyboardInterrupt
"""


def _rows():
    return [tuple(row.split("\n+++\n")) for row in ROWS.split("---\n")]


@needs_box
def test_no_value_passes_by_what_it_says_of_itself_or_ends_the_batch():
    rows = _rows()
    assert len(set(rows)) == len(rows) >= 80
    honest = Prompt.from_text("Write it.", metadata={"tests": ["assert f(2) == 4"]})
    prompts, responses = [honest], ["def f(x): return x * x"]
    for test, solution in rows:
        prompts.append(Prompt.from_text("Write it.", metadata={"tests": [test]}))
        responses.append(f"```python\n{solution}```")
    scores = UnitTestReward(limits=Limits(cpu_seconds=1, wall_seconds=15)).score(prompts, responses)
    passed = [row for row, score in zip(rows, scores[1:], strict=True) if score]
    assert (scores[0], passed) == (1.0, [])


def test_quotes_in_each_other_take_linear_time():
    """A line of n marks and n lines after it would otherwise take n * n steps."""
    deep = ">" * 20_000
    started = time.process_time()
    assert extract_code(deep + "```python\n" + "x\n" * 20_000) == "x\n" * 20_000
    assert extract_code(deep + "```python\n" + deep + "x\n" + deep + "> y\n") == "x\n> y\n"
    assert extract_code("> > ```python\n> > x\n>> y\n>  z\n") == "x\ny\n z\n"
    # Thousands of times what it takes; the product would be 400 million steps.
    assert time.process_time() - started < 20

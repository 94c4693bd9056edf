"""Right solutions in the ways in which people write them, and tests in those in which they ask."""

from __future__ import annotations

import pytest

from mbrl_text_env.rewards.verifiable.code import UnitTestReward
from mbrl_text_env.sandbox import Limits, facilities
from mbrl_text_env.types import Prompt

missing = [f"{each.name} ({each.problem})" for each in facilities() if each.problem]
needs_box = pytest.mark.skipif(bool(missing), reason=f"this machine lacks: {', '.join(missing)}")

# A test, a line "+++", and a solution that passes it.
ROWS = """\
assert Solution().twoSum([2,7,11,15], 9) == [0,1]
+++
class Solution:
    def twoSum(self, nums: List[int], target: int) -> List[int]:
        seen = {}
        for i, n in enumerate(nums):
            if target - n in seen: return [seen[target-n], i]
            seen[n] = i
---
nums=[0,1,0,3]
Solution().moveZeroes(nums=nums)
assert nums == [1,3,0,0]
+++
class Solution:
    def moveZeroes(self, nums):
        nums.sort(key=lambda x: x == 0)
---
g=[[1,2],[3,4]]
row=g[0]
rotate(g)
assert g == [[3,1],[4,2]]
+++
def rotate(m): m[:] = [list(r) for r in zip(*m[::-1])]
---
assert list(fib(5)) == [0,1,1,2,3]
+++
def fib(n):
    a,b=0,1
    for _ in range(n):
        yield a
        a,b=b,a+b
---
p = Point(1,2)
assert p == Point(1,2) and p.x == 1 and repr(p) == 'Point(x=1, y=2)'
+++
from dataclasses import dataclass
@dataclass
class Point:
    x: int
    y: int
---
assert fact(200) % 10**9 == 0 and len(str(fact(200))) == 375
+++
def fact(n): return 1 if n < 2 else n * fact(n-1)
---
assert fact(2000) > 0
+++
import sys
sys.setrecursionlimit(10000)
def fact(n): return 1 if n < 2 else n * fact(n-1)
---
assert power(3) == 3 ** 9000
+++
def power(n): return n ** 9000
---
assert freq('aab') == {'a':2,'b':1} and freq('aab').most_common(1) == [('a',2)]
+++
from collections import Counter
def freq(s): return Counter(s)
---
assert freq('aab')['z'] == 0
+++
from collections import Counter
def freq(s): return Counter(s)
---
from collections import Counter
assert isinstance(freq('aab'), Counter)
+++
from collections import Counter
def freq(s): return Counter(s)
---
from collections import Counter
assert top(Counter('aab')) == 'a'
+++
def top(c): return c.most_common(1)[0][0]
---
d = group(['ab','c'])
assert d[1] == ['c'] and d[7] == []
+++
from collections import defaultdict
def group(x):
    d = defaultdict(list)
    for w in x: d[len(w)].append(w)
    return d
---
from collections import defaultdict
assert count(defaultdict(int, a=1)) == 1
+++
def count(d): return d['a'] + d['b']
---
from collections import defaultdict
assert count(defaultdict(lambda: 5, a=1)) == 6
+++
def count(d): return d['a'] + d['b']
---
from collections import OrderedDict
assert f(OrderedDict([('a',1),('b',2)])) == ['b','a']
+++
def f(d):
    d.move_to_end('a')
    return list(d)
---
from collections import OrderedDict
assert f() == OrderedDict([('a',1),('b',2)]) and f() != OrderedDict([('b',2),('a',1)])
+++
from collections import OrderedDict
def f(): return OrderedDict(a=1, b=2)
---
assert f([3,1,2]) == [1,2,3] and isinstance(f([1]), list)
+++
import heapq
def f(x):
    heapq.heapify(x)
    return [heapq.heappop(x) for _ in range(len(x))]
---
from collections import deque
assert f([1,2]) == deque([2,1])
+++
from collections import deque
def f(x):
    d = deque()
    for i in x: d.appendleft(i)
    return d
---
p=f()
assert p.x == 1 and p == (1,2) and p._asdict() == {'x':1,'y':2}
+++
from collections import namedtuple
P = namedtuple('P', 'x y')
def f(): return P(1,2)
---
p=f()
assert p._replace(x=5) == (5,2) and repr(p) == 'P(x=1, y=2)'
+++
from collections import namedtuple
P = namedtuple('P', 'x y')
def f(): return P(1,2)
---
assert matmul([[1,2],[3,4]],[[1,0],[0,1]]) == [[1,2],[3,4]]
+++
def matmul(a,b): return [[sum(x*y for x,y in zip(r,c)) for c in zip(*b)] for r in a]
---
import asyncio
assert asyncio.run(f(3)) == 6
+++
import asyncio
async def f(n):
    await asyncio.sleep(0)
    return n*2
---
@memo
def sq(x): return x*x
assert sq(4) == 16 and sq(4) == 16
+++
import functools
def memo(f):
    c = {}
    @functools.wraps(f)
    def w(*a):
        if a not in c: c[a] = f(*a)
        return c[a]
    return w
---
assert compose(lambda x: x+1, lambda x: x*2)(3) == 7
+++
compose = lambda f, g: lambda x: f(g(x))
---
assert V(1,2) + V(3,4) == V(4,6) and V(1,2) != V(2,1) and not V(1,2) == V(2,1)
+++
class V:
    def __init__(s,x,y): s.x,s.y=x,y
    def __add__(s,o): return V(s.x+o.x,s.y+o.y)
    def __eq__(s,o): return (s.x,s.y)==(o.x,o.y)
---
assert sorted([C(3),C(1)])[0].v == 1 and C(1) < C(2) and max(C(1),C(5)).v == 5
+++
class C:
    def __init__(s,v): s.v=v
    def __lt__(s,o): return s.v<o.v
    def __gt__(s,o): return s.v>o.v
---
assert list(f([1,2])) == [2,4]
+++
def f(x): return map(lambda v: v*2, x)
---
assert list(f({'a':1})) == ['a'] and list(g({'a':1})) == [('a',1)] and len(f({'a':1})) == 1
+++
def f(d): return d.keys()
def g(d): return d.items()
---
assert f({'a':1}) == {'a'} and sorted(g({'a':1})) == [1]
+++
def f(d): return d.keys()
def g(d): return d.values()
---
with timer() as t:
    pass
assert t.done
+++
class timer:
    def __enter__(s):
        s.done = False
        return s
    def __exit__(s, *a): s.done = True
---
with tag('b') as x:
    assert x == '<b>'
+++
from contextlib import contextmanager
@contextmanager
def tag(n): yield f'<{n}>'
---
try:
    withdraw(5)
    assert False, 'no error'
except InsufficientFunds as e:
    assert e.amount == 5 and str(e) == 'need 5'
+++
class InsufficientFunds(Exception):
    def __init__(self, amount):
        super().__init__(f'need {amount}')
        self.amount = amount
def withdraw(n): raise InsufficientFunds(n)
---
assert Color.RED is pick() and pick() == Color.RED and pick().name == 'RED' and pick().value == 1
+++
from enum import Enum
class Color(Enum):
    RED = 1
def pick(): return Color.RED
---
a = Node(1)
b = Node(2)
a.next = b
assert a.next is b and last(a) is b and a.next.next is None
+++
class Node:
    def __init__(s, v): s.v, s.next = v, None
def last(n):
    while n.next: n = n.next
    return n
---
assert S() is S() and S() is S.get()
+++
class S:
    _i = None
    def __new__(c):
        if c._i is None: c._i = super().__new__(c)
        return c._i
    @classmethod
    def get(c): return c()
---
assert type(V()).__name__ == 'V'
+++
class V: pass
---
assert V().__class__.__name__ == 'V' and V.__name__ == 'V' and isinstance(V(), V)
+++
class V: pass
---
assert f.__doc__ == 'Doc.' and f.__name__ == 'f'
+++
def f():
    'Doc.'
---
s = LRU(2)
s.put(1,1)
s.put(2,2)
assert s.get(1)==1
s.put(3,3)
assert s.get(2)==-1
+++
from collections import OrderedDict
class LRU(OrderedDict):
    def __init__(s,n):
        super().__init__(); s.n=n
    def get(s,k):
        if k not in s: return -1
        s.move_to_end(k); return s[k]
    def put(s,k,v):
        s[k]=v; s.move_to_end(k)
        if len(s)>s.n: s.popitem(last=False)
---
it = Count(2)
assert next(it)==0 and it.__next__()==1
try:
    it.__next__()
    assert False
except StopIteration:
    pass
+++
class Count:
    def __init__(s,n): s.n=n; s.i=-1
    def __iter__(s): return s
    def __next__(s):
        s.i+=1
        if s.i>=s.n: raise StopIteration
        return s.i
---
g = acc()
next(g)
assert g.send(3)==3 and g.send(4)==7
+++
def acc():
    t=0
    while True:
        t += yield t
---
assert head(build([1,2])).val == 1
+++
class ListNode:
    def __init__(self,val=0,next=None): self.val=val; self.next=next
def build(x):
    h=None
    for v in reversed(x): h=ListNode(v,h)
    return h
def head(n): return n
---
a=[[1],[2]]
b=dc(a)
b[0].append(3)
assert a==[[1],[2]] and b is not a
+++
import copy
def dc(x): return copy.deepcopy(x)
---
a=[1]
assert same(a) is a
+++
def same(x): return x
---
try:
    f()
    assert False
except KeyError as e:
    assert e.args == ('k',)
+++
def f(): return {}['k']
---
try:
    f()
except Exception as e:
    assert type(e) is ValueError and isinstance(e, ValueError)
else:
    assert False
+++
def f(): return int('x')
---
def raises(exc, fn, *a):
    try: fn(*a)
    except exc: return True
    return False
assert raises(ZeroDivisionError, div, 1, 0) and not raises(ZeroDivisionError, div, 1, 1)
+++
def div(a,b): return a/b
---
assert get_type(3) is int and get_type('a') is str
+++
def get_type(x): return type(x)
---
assert f(iter([1,2,3])) == 6 and f(range(4)) == 6
assert f(x for x in [6]) == 6 and f({1:2}.values()) == 2
+++
def f(it): return sum(it)
---
import unittest
class T(unittest.TestCase):
    def test(self):
        self.assertEqual(f(2), 4)
        with self.assertRaises(ValueError): f(-1)
r = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))
assert r.wasSuccessful()
+++
def f(n):
    if n < 0: raise ValueError('neg')
    return n*n
---
assert apply_twice(str.upper, 'a') == 'A' and apply_twice(len, 'ab') == 2
+++
def apply_twice(f, x): return f(x)
---
e = Err
assert issubclass(Err, ValueError) and wrap(Err)() == 'Err'
+++
class Err(ValueError): pass
def wrap(c): return lambda: c.__name__
---
assert [*f(3)] == [0,1,2] and 1 in f(3) and f(3)[1] == 1 and len(f(3)) == 3
+++
def f(n): return range(n)
---
assert bytes(f()) == b'ab' and f().decode() == 'ab'
+++
def f(): return b'ab'
---
acc = []
walk([1,[2,[3]]], acc)
assert acc == [1,2,3]
+++
def walk(x, acc):
    for i in x:
        if isinstance(i, list): walk(i, acc)
        else: acc.append(i)
---
d={}
register(d, 'a', lambda x: x+1)
assert d['a'](1) == 2
+++
def register(d, k, f): d[k] = f
"""


@needs_box
def test_right_solutions_pass_however_they_are_written():
    rows = [tuple(row.split("\n+++\n")) for row in ROWS.split("---\n")]
    assert len(set(rows)) == len(rows) >= 55
    prompts = [Prompt.from_text("Write it.", metadata={"tests": [test]}) for test, _ in rows]
    responses = [f"Here it is:\n```python\n{solution}```\n" for _, solution in rows]
    scores = UnitTestReward(limits=Limits(wall_seconds=60)).score(prompts, responses)
    assert [row for row, score in zip(rows, scores, strict=True) if score != 1.0] == []

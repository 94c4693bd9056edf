"""Runs inside a box: decides whether a solution passes a test that the solution cannot reach into.

Two processes. The judge runs the test; the solution runs in another process, which was forked off
before the judge had read the test and holds nothing of the judge's but two pipes between them. What
the test calls by the solution's names are remote objects.

What the solution says is data, and nothing else. `Judge.decode` builds values of a closed set of
types and handles (`Remote`), whose operations ask the solution again. No class, function, module or
name of the judge's can be named. Anything else that comes is a breach: the test has then failed,
whatever it catches. Comparisons with plain data and arithmetic with it are the judge's own; a value
is asked for once. Code that is made from data is refused by an audit hook (`_guard`).

The judge alone has the standard output, on which it says how the test ended.
"""

# ruff: noqa: SIM105 - importing pathlib and contextlib would take as long as most tests.

import builtins
import itertools
import json
import operator
import os
import signal
import sys
import types
from typing import Any

from mbrl_text_env.sandbox import _solution as side

# The program's folder, which the solution can write to: nothing is imported from it any more.
del sys.path[0]


# So many of an iterator's items are sent at once, and the rest as the solution asks for them.
_MOST_ITEMS = 10_000
_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
# What a test can hold because the solution has given something else than was asked for. It is no
# fault of the test's, which would be an error for the caller.
_CAUSED = (type, types.CoroutineType, types.FunctionType, types.MethodWrapperType)
_PLAIN = (
    *side.MUTABLE, bytes, complex, float, frozenset, int, range, str, tuple,
)  # fmt: skip


class Unsupported(BaseException):
    """The test hands the solution something that cannot cross."""


class Breach(BaseException):
    """The solution is gone, or has sent what is no message; or data was to be run as code.

    That it has happened is kept, for a test may catch everything.
    """

    happened = False

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        Breach.happened = True


class Judge(side.Peer):
    """Runs the test, and asks the solution."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__(source, target)
        # Why the test cannot be run, if that is so.
        self.unsupported = ""
        self.remotes: dict[tuple[int, int], Remote] = {}
        self.values: dict[int, tuple[int, Any]] = {}
        self.exceptions: dict[str, Any] = {}
        self.paths: dict[str, object] = {}
        # How many questions have been asked that may have changed an object.
        self.age = 0

    def refer(self, value: Any) -> Any:
        if type(value) is Remote:
            return {"object": _own(value)[1]}
        if isinstance(value, _VIEWS):
            return self.encode(list(value))
        if hasattr(type(value), "__next__"):
            items = list(itertools.islice(value, _MOST_ITEMS))
            # It may have no end.
            rest = self.share(value.__next__) if len(items) == _MOST_ITEMS else None
            return {"iterator": [self.encode(items), rest]}
        path = side.path_of(value)
        if path:
            return {"path": path}
        if any(value is each for each in self.exceptions.values()):
            return {"exception": value.__name__}
        if isinstance(value, Exception):
            values = [list(value.args), vars(value)]
            return {"raised": [side.kinds_of(type(value)), str(value)[:1000], self.encode(values)]}
        if callable(value) and _is_own(value):
            return {"function": self.share(value)}
        if type(value) in _CAUSED:
            raise Breach(f"a {type(value).__name__} where the solution was to give a value")
        raise Unsupported(f"an object of type {type(value).__name__} cannot cross to the solution")

    def resolve(self, tag: str, content: Any) -> Any:
        if tag == "object" and type(content) is int and content >= 0:
            return self.remote(content, 0)
        if tag == "coroutine" and type(content) is int and content >= 0:
            return _wait_for(self.remote(content, 0))
        if tag == "exception" and all(type(name) is str for name in content):
            return self.exception_class(content)
        raise ValueError(f"an unknown tag {tag!r}")

    def remote(self, number: int, rank: int) -> Any:
        """The handle of an object: one, for what is the same object stays the same."""
        key = (number, rank)
        if key not in self.remotes:
            self.remotes[key] = Remote(self, number, rank)
        return self.remotes[key]

    def exception_class(self, names: list[str]) -> Any:
        """An empty class in the place of an exception class of the solution's."""
        name, *bases = names
        if side.builtin_exception(name):
            return side.builtin_exception(name)
        if name not in self.exceptions:
            self.exceptions[name] = type(name, (self.exception_class(bases),), {})
        return self.exceptions[name]

    def send(self, message: Any) -> None:
        try:
            super().send(message)
        except OSError as error:
            raise Breach(str(error)) from None

    def hear(self) -> Any:
        """The next message. All that is wrong with it ends the test."""
        try:
            message = self.receive()
            if type(message) is not dict:
                raise ValueError(f"a message that is a {type(message).__name__}")
            if "callback" in message:
                number = message["callback"]
                if type(number) is not int or not 0 <= number < len(self.shared):
                    raise ValueError(f"a call of the function {number!r}")
            message["arguments"] = self.decode(message["arguments"])
            if type(message["arguments"]) is not list:
                raise ValueError("arguments that are no list")
            if "given" in message:
                if type(message["given"]) is not int or message["given"] < 0:
                    raise ValueError("a result that was not given")
            elif "result" in message:
                message["result"] = self.decode(message["result"])
            if message.get("values") is not None:
                message["values"] = self.decode(message["values"])
            return message
        except Exception as error:
            raise Breach(str(error)[:200]) from None

    def ask(self, operation: str, /, *arguments: Any, **keywords: Any) -> Any:
        try:
            request = {
                "operation": operation,
                "arguments": list(map(self.encode, arguments)),
                "keywords": {key: self.encode(value) for key, value in keywords.items()},
            }
        except Unsupported as error:
            if type(arguments[0]) is Remote and _own(arguments[0])[2]:
                self.unsupported = str(error)
                raise
            # The test may have expected plain data, which would have taken it.
            raise TypeError(str(error)) from None
        self.age += operation != "value"
        self.send(request)
        message = self.hear()
        while "callback" in message:
            self.call_back(message)
            message = self.hear()
        given = [*arguments, *keywords.values()]
        if len(message["arguments"]) == len(given):
            for mine, theirs in zip(given, message["arguments"], strict=True):
                if type(mine) in side.MUTABLE:
                    _replace(mine, theirs)
        if "error" in message:
            raise self.error(message, stops=operation in ("next", "send"))
        if message.get("given", len(given)) < len(given):
            return given[message["given"]]
        if "result" not in message:
            raise Breach("an answer without a result")
        return message["result"]

    def error(self, message: Any, *, stops: bool) -> BaseException:
        """What was raised, as the nearest of the kinds that the test can name."""
        try:
            names = message["error"]
            known = {name: self.exceptions[name] for name in names if name in self.exceptions}
            return side.exception_of(names, message["text"], message["values"], known, stops)
        except Exception as problem:
            raise Breach(str(problem)[:200]) from None

    def call_back(self, message: Any) -> None:
        function = self.shared[message["callback"]]
        try:
            arguments, keywords = message["arguments"]
            reply = {"result": self.encode(function(*arguments, **keywords))}
        except (Exception, Unsupported) as error:
            reply = {"error": side.kinds_of(type(error)), "text": str(error)[:1000]}
        self.send(reply)

    def plain(self, remote: Any) -> Any:
        """The value of an object whose class was made from a plain one, or the object.

        It is asked for once, or once after each question that may have changed it; else an object
        could be equal to one thing after another.
        """
        number = _own(remote)[1]
        age, value = self.values.get(number, (-1, remote))
        if age == self.age or type(value) in (int, float, complex, str, tuple, frozenset, bytes):
            return value
        value = self.ask("value", remote)
        self.values[number] = self.age, value
        return value

    def run(self, orders: Any) -> None:
        # First of all: the solution starts with it.
        self.send(orders["granted"])
        own = self.ask("names", *orders["names"])
        if type(own) is not dict:
            raise Breach("names that are no dict")
        space = {name: self.ranked(name, own[name]) for name in orders["names"] if name in own}
        # Else the test would be passed by Python's builtin of that name.
        missing = [name for name in orders["names"] if name not in own and hasattr(builtins, name)]
        if missing:
            raise NameError(f"the solution has no {', '.join(missing)}")
        space.update(__name__="test", __same__=self.same, __kind__=_kind_of)
        space.setdefault("isinstance", _is_instance)
        for part in ("imports", "setup", "test"):
            exec(_compiled(orders[part], f"<{part}>"), space)  # noqa: S102

    def same(self, value: Any) -> Any:
        """What stands for an object, or a class of Python's, in whatever way it has come."""
        is_remote = type(value) is Remote
        path = _ask("path", value) if is_remote else side.path_of(value)
        if type(path) is str and path:
            return self.paths.setdefault(path, object())
        return self.remote(_own(value)[1], 0) if is_remote else value

    def ranked(self, name: str, value: Any) -> Any:
        """A name's value. What is handed to it is the test's choice, and to what it returns is not:
        but for the objects of a class, which has a name in capitals."""
        if type(value) is not Remote:
            return value
        return self.remote(_own(value)[1], 1 + name[:1].isupper())


class Remote:
    """Something of the solution's.

    Beside plain data it is what its plain base is, and the judge compares and calculates; among
    remote objects the solution does. The rank is 2 for what the test names in capitals, 1 for what
    else it names and for attributes and objects of those, and 0 for the rest.
    """

    __slots__ = ("_own",)

    def __init__(self, judge: Judge, number: int, rank: int) -> None:
        object.__setattr__(self, "_own", (judge, number, rank))

    def __call__(self, /, *arguments: Any, **keywords: Any) -> Any:
        rank = max(0, _own(self)[2] - 1)
        return _with_rank(rank, _ask("call", self, *arguments, **keywords))

    # Not `__getattr__`: what the handle has is not what the object has.
    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Remote
        if name in ("__deepcopy__", "__reduce__", "__reduce_ex__"):
            return object.__getattribute__(self, name)
        if name in ("__next__", "send"):  # These may stop, as no other function may.
            return lambda *arguments: _ask(name.strip("_"), self, *arguments)
        return _with_rank(min(1, _own(self)[2]), _ask("getattr", self, name))

    def __instancecheck__(self, instance: Any) -> bool:
        return type(instance) is Remote and _ask("isinstance", self, instance) is True

    def __subclasscheck__(self, kind: Any) -> bool:
        return type(kind) is Remote and _ask("issubclass", self, kind) is True

    def __eq__(self, other: object) -> bool:
        if type(other) is Remote:
            return _ask("eq", self, other) is True
        path = side.path_of(other)
        if path:
            return bool(_ask("path", self) == path)
        value = _plain(self)
        return type(value) is not Remote and bool(value == other)

    def __hash__(self) -> int:
        value = _plain(self)
        return int(_ask("hash", self)) if type(value) is Remote else hash(value)

    def __bool__(self) -> bool:
        return _ask("bool", self) is True

    def __contains__(self, item: Any) -> bool:
        value = _plain(self)
        # The judge looks for it: what the solution gives is compared item by item.
        return item in (list(self) if type(value) is Remote else value)

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        """The solution hears of an error and cannot take it back: it may be the test's verdict."""
        if error is None:
            _ask("exit", self, None, None, None)
            return
        try:
            _ask("exit", self, kind, error if isinstance(error, Exception) else None, None)
        except Exception:  # noqa: S110 - the one that is raised already goes on
            pass

    def __deepcopy__(self, memo: Any) -> Any:
        return _ask("deepcopy", self)


def _own(remote: Any) -> tuple[Judge, int, int]:
    """The judge, number and rank of a remote object."""
    own: tuple[Judge, int, int] = object.__getattribute__(remote, "_own")
    return own


def _ask(operation: str, target: Remote, /, *arguments: Any, **keywords: Any) -> Any:
    return _own(target)[0].ask(operation, target, *arguments, **keywords)


async def _wait_for(coroutine: Remote) -> Any:
    return _ask("await", coroutine)


def _with_rank(rank: int, value: Any) -> Any:
    if type(value) is not Remote or not rank:
        return value
    judge, number, _ = _own(value)
    return judge.remote(number, rank)


def _plain(target: Remote) -> Any:
    return _own(target)[0].plain(target)


def _unary(name: str) -> Any:
    def method(self: Remote, *arguments: Any) -> Any:
        value = _plain(self)
        if type(value) is Remote:
            return _ask(name, self, *arguments)
        return side.UNARY[name](value, *arguments)

    return method


def _binary(name: str, *, swapped: bool) -> Any:
    function = getattr(operator, name)

    def method(self: Remote, other: Any) -> Any:
        if type(other) is Remote:
            return _ask(name, *((other, self) if swapped else (self, other)))
        value = _plain(self)
        # Numbers are not the solution's to calculate with: abs(f(2) - 1.41) is the judge's matter.
        if type(value) is Remote:
            return NotImplemented
        return function(other, value) if swapped else function(value, other)

    return method


for _name in (*side.ASKED, "setattr", "delattr", "enter", "copy"):
    setattr(Remote, f"__{_name}__", lambda self, *given, _name=_name: _ask(_name, self, *given))
for _name in side.UNARY:
    setattr(Remote, f"__{_name}__", _unary(_name))
for _name in (*side.COMPARED, *side.CALCULATED):
    setattr(Remote, f"__{_name.rstrip('_')}__", _binary(_name, swapped=False))
for _name in side.CALCULATED:
    setattr(Remote, f"__r{_name.rstrip('_')}__", _binary(_name, swapped=True))


# Not data, of which the judge decides itself.
_ABSTRACT = ("collections.abc", "types", "typing")


def _is_instance(value: Any, kinds: Any) -> bool:
    if type(value) is not Remote:
        return isinstance(value, kinds)
    plain = _plain(value)
    for kind in kinds if type(kinds) is tuple else (kinds,):
        if type(kind) is Remote or type(plain) is not Remote:
            is_one = isinstance(value if type(kind) is Remote else plain, kind)
        else:
            path = side.path_of(kind)
            is_one = path.startswith(_ABSTRACT) and _ask("isinstance", value, kind) is True
        if is_one:
            return True
    return False


def _kind_of(value: Any) -> Any:
    return _ask("getattr", value, "__class__") if type(value) is Remote else type(value)


def _compiled(source: str, name: str) -> Any:
    """The statements, in which `is`, `type(x)` and `x.__class__` see objects and not handles."""
    if not any(word in source for word in ("is", "type", "__class__")):
        return compile(source, name, "exec")
    import ast

    def called(function: str, argument: ast.expr) -> ast.expr:
        return ast.Call(ast.Name(function, ast.Load()), [argument], [])

    class Handles(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            self.generic_visit(node)
            match node:
                case ast.Compare(ops=ops) if any(isinstance(o, ast.Is | ast.IsNot) for o in ops):
                    node.left = called("__same__", node.left)
                    node.comparators = [called("__same__", each) for each in node.comparators]
                case ast.Attribute(value=value, attr="__class__", ctx=ast.Load()):
                    return called("__kind__", value)
                case ast.Call(func=ast.Name(id="type"), args=[value], keywords=[]):
                    return called("__kind__", value)
            return node

    tree = ast.fix_missing_locations(Handles().visit(ast.parse(source, name)))
    return compile(tree, name, "exec")


def _is_own(value: Any) -> bool:
    """Whether a callable is the test's, or a method of plain data: the solution may call it."""
    if type(value) is types.BuiltinFunctionType:
        return isinstance(value.__self__, _PLAIN)
    return "test" in (getattr(value, "__module__", None), type(value).__module__)


def _replace(mine: Any, theirs: Any) -> None:
    if type(mine) is not type(theirs) or mine == theirs:
        return
    mine.clear()
    (mine.extend if hasattr(mine, "extend") else mine.update)(theirs)


# Events of sys.addaudithook by which data becomes code, or another program.
_CODE = (
    "compile", "exec", "code.__new__", "function.__new__", "marshal.loads", "marshal.load",
    "pickle.find_class", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn",
    "os.spawn", "subprocess.Popen", "ctypes.dlopen", "ctypes.call_function", "pty.spawn",
    "cpython.run_command", "cpython.run_file", "cpython.run_interactivehook",
)  # fmt: skip
# Modules that do so themselves: to import modules, and with names and texts that they have checked.
_MAKERS = ("_frozen_importlib", "_frozen_importlib_external", "collections", "dataclasses", "types")
# Modules that parse what they are given, and run nothing.
_PARSERS = ("ast", "typing")


def _guard() -> None:
    """From here on no code is made of data in this process, however the test may handle it."""
    get_frame, modules, own = sys._getframe, sys.modules, globals()

    def hook(event: str, _: Any) -> None:
        if event not in _CODE:
            return
        by = get_frame(1).f_globals
        names = _MAKERS + _PARSERS if event == "compile" else _MAKERS
        if by is own or any(name in modules and by is vars(modules[name]) for name in names):
            return
        raise Breach(f"{event} in the judging process")

    sys.addaudithook(hook)


def _keep_only(*kept: int) -> None:
    first = 0
    for number in (*sorted(kept), 64):
        os.closerange(first, number)
        first = number + 1
    for _ in range(3):
        os.open(os.devnull, os.O_RDWR)  # As standard input, output and error.


def main() -> None:
    questions, ask = os.pipe()
    answers, answer = os.pipe()
    if os.fork() == 0:
        try:
            _keep_only(questions, answer)
            side.Solution(questions, answer).serve()
        finally:
            os._exit(1)
    os.close(questions)
    os.close(answer)
    report = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    # The solution's signals end the judge, and do not raise in the middle of the test.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Only now, when the solution has a memory of its own.
    orders = json.loads(sys.stdin.buffer.read())
    judge = Judge(answers, ask)
    _guard()
    verdict = "failed"
    try:
        judge.run(orders)
        verdict = "failed" if Breach.happened else "passed"
    except BaseException:  # noqa: S110 - whatever it is, the test has not run to its end
        pass
    if judge.unsupported:
        verdict = "unsupported"
    os.write(report, json.dumps({"verdict": verdict, "detail": judge.unsupported}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()

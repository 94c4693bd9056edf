"""Runs inside a box: decides whether a solution passes a test that the solution cannot reach into.

Two processes. The judge runs the test; the solution runs in another process, which was forked off
before the judge had read the test and holds nothing of the judge's but two pipes between them. What
the test calls by the solution's names are remote objects. Plain data crosses the pipes as JSON;
everything else stays where it is, and a reference crosses.

The judge alone has the standard output, on which it says how the test ended.
"""

# ruff: noqa: PTH123, SIM105 - importing pathlib and contextlib would take as long as most tests.

# The first entry is the program's folder, which the solution can write to.
import sys

del sys.path[0]

import builtins  # noqa: E402
import collections  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import types  # noqa: E402
from typing import Any  # noqa: E402

_MOST_BYTES = 32 << 20
_BY_VALUE = (collections.Counter, collections.OrderedDict, collections.defaultdict)
# How a value is taken apart, by its class; `_BUILD` puts it together again. Classes are told by
# their names, for importing the modules of the rare ones would take longer than most tests.
_TAKE_APART: dict[str, tuple[str, Any]] = {
    "builtins.tuple": ("tuple", list),
    "builtins.set": ("set", list),
    "builtins.frozenset": ("frozenset", list),
    "collections.deque": ("deque", list),
    "builtins.bytes": ("bytes", bytes.hex),
    "builtins.bytearray": ("bytearray", bytearray.hex),
    "builtins.complex": ("complex", lambda value: [value.real, value.imag]),
    "builtins.range": ("range", lambda value: [value.start, value.stop, value.step]),
    "decimal.Decimal": ("decimal", str),
    "fractions.Fraction": ("fraction", lambda value: [value.numerator, value.denominator]),
}
_BUILD: dict[str, Any] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    "decimal": lambda text: __import__("decimal").Decimal(text),
    "fraction": lambda parts: __import__("fractions").Fraction(*parts),
}
_MUTABLE = (list, dict, set, bytearray, collections.deque)


class Unsupported(Exception):  # noqa: N818
    """The test hands the solution something that cannot cross."""


class Peer:
    """What both sides share: messages of plain data."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        self.shared: list[Any] = []

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        view = memoryview(len(data).to_bytes(8, "little") + data)
        while view:
            view = view[os.write(self.target, view) :]

    def receive(self) -> Any:
        size = int.from_bytes(self._read(8), "little")
        if size > _MOST_BYTES:
            raise ConnectionError(f"a message of {size} bytes")
        return json.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            block = os.read(self.source, min(size - len(data), 1 << 16))
            if not block:
                raise ConnectionError("the other process is gone")
            data += block
        return bytes(data)

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str, float):
            return value
        if kind is int:
            # Hexadecimal numbers may be long; decimal ones are limited to 4300 digits.
            return value if abs(value) < 1 << 62 else {"int": hex(value)}
        if kind is list:
            return [self.encode(item) for item in value]
        if kind is dict or kind in _BY_VALUE:
            return {"dict": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            value, kind = tuple(value), tuple
        full_name = f"{kind.__module__}.{kind.__qualname__}"
        if full_name in _TAKE_APART:
            tag, take_apart = _TAKE_APART[full_name]
            return {tag: self.encode(take_apart(value))}
        if kind in (type, types.BuiltinFunctionType):
            name = value.__name__
            if getattr(builtins, name, None) is value:
                return {"builtin": name}
        return self.refer(value)

    def decode(self, data: Any) -> Any:
        if isinstance(data, list):
            return [self.decode(item) for item in data]
        if not isinstance(data, dict):
            return data
        ((tag, content),) = data.items()
        if tag == "int":
            return int(content, 16)
        if tag == "dict":
            return {self.decode(key): self.decode(value) for key, value in content}
        if tag == "builtin":
            return getattr(builtins, content)
        if tag in _BUILD:
            return _BUILD[tag](self.decode(content))
        return self.resolve(tag, content)

    def share(self, value: Any) -> int:
        self.shared.append(value)
        return len(self.shared) - 1

    def refer(self, value: Any) -> Any:
        raise NotImplementedError

    def resolve(self, tag: str, content: Any) -> Any:
        raise NotImplementedError


# --- The solution's side ---


class Solution(Peer):
    """Serves the names of the solution. Whatever the solution does to it, it stays on this side."""

    def refer(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType) and "." not in value.__name__:
            return {"module": value.__name__}
        return {"object": self.share(value)}

    def resolve(self, tag: str, content: Any) -> Any:
        return self.shared[content] if tag == "object" else _Callback(self, content)

    def serve(self) -> None:
        with open("solution.py", "rb") as file:
            source = file.read()
        module = types.ModuleType("solution")
        sys.modules["solution"] = module
        exec(compile(source, "solution.py", "exec"), module.__dict__)  # noqa: S102
        while True:
            self.answer(self.receive(), module.__dict__)

    def answer(self, request: Any, names: dict[str, Any] | None = None) -> None:
        arguments: list[Any] = []
        try:
            arguments = [self.decode(each) for each in request["arguments"]]
            keywords = {key: self.decode(each) for key, each in request["keywords"].items()}
            operation = request["operation"]
            if operation == "names":
                assert names is not None
                result = {name: names[name] for name in arguments if name in names}
            else:
                result = _OPERATIONS[operation](*arguments, **keywords)
            reply = {"result": self.encode(result)}
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            reply = {"error": kinds, "text": str(error)[:1000]}
        # What the call did to its arguments is seen by the test too.
        reply["arguments"] = [
            self.encode(each) if isinstance(each, _MUTABLE) else None for each in arguments
        ]
        self.send(reply)


class _Callback:
    """A function of the test, for the solution to call."""

    def __init__(self, peer: Solution, number: int) -> None:
        self._peer, self._number = peer, number

    def __call__(self, *arguments: Any) -> Any:
        peer = self._peer
        peer.send({"callback": self._number, "arguments": list(map(peer.encode, arguments))})
        message = peer.receive()
        while "operation" in message:
            peer.answer(message)
            message = peer.receive()
        if "error" in message:
            raise _exception(message)
        return peer.decode(message["result"])


def _value(value: Any) -> Any:
    """An object of a class that was made from a plain one, as the plain one."""
    kinds: tuple[Any, ...] = (int, float, str, list, tuple, dict, set, frozenset, bytes)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    return value


_OPERATIONS: dict[str, Any] = {
    "call": lambda target, *arguments, **keywords: target(*arguments, **keywords),
    "getattr": getattr,
    "setattr": setattr,
    "isinstance": lambda kind, value: isinstance(value, kind),
    "value": _value,
    "bool": bool,
    "str": str,
    "repr": repr,
    "iter": iter,
    "next": next,
    "len": len,
    "getitem": lambda target, key: target[key],
    "setitem": lambda target, key, value: target.__setitem__(key, value),
    "eq": lambda left, right: left == right,
    "lt": lambda left, right: left < right,
    "le": lambda left, right: left <= right,
    "add": lambda left, right: left + right,
    "sub": lambda left, right: left - right,
    "mul": lambda left, right: left * right,
}


# --- The judge's side ---


class Judge(Peer):
    """Runs the test, and asks the solution."""

    def refer(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return {"object": object.__getattribute__(value, "_number")}
        if callable(value):
            return {"function": self.share(value)}
        raise Unsupported(f"an object of type {type(value).__name__} cannot cross to the solution")

    def resolve(self, tag: str, content: Any) -> Any:
        if tag == "module" and content in sys.stdlib_module_names:
            # The judge's own: what the test does with it is not for the solution to decide.
            return __import__(content)
        return Remote(self, int(content))

    def ask(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        self.send(
            {
                "operation": operation,
                "arguments": list(map(self.encode, arguments)),
                "keywords": {key: self.encode(value) for key, value in keywords.items()},
            }
        )
        message = self.receive()
        while "callback" in message:
            self.call_back(message)
            message = self.receive()
        for mine, theirs in zip(arguments, message["arguments"], strict=True):
            if isinstance(mine, _MUTABLE):
                _replace(mine, self.decode(theirs))
        if "error" in message:
            raise _exception(message, stops=operation == "next")
        return self.decode(message["result"])

    def call_back(self, message: Any) -> None:
        function = self.shared[message["callback"]]
        try:
            reply = {"result": self.encode(function(*map(self.decode, message["arguments"])))}
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            reply = {"error": kinds, "text": str(error)[:1000]}
        self.send(reply)

    def run(self, orders: Any) -> None:
        space: dict[str, Any] = {"__name__": "test"}
        own = self.ask("names", *orders["names"])
        # A test of `solve` that calls `abs` means Python's `abs`; a test that calls nothing of the
        # solution's but `sum` means the solution's `sum`.
        wanted = set(orders["entry_points"])
        if not wanted and all(hasattr(builtins, name) for name in own):
            wanted = set(own)
        own = {k: v for k, v in own.items() if k in wanted or not hasattr(builtins, k)}
        space.update(own)
        for part in ("imports", "setup", "test"):
            exec(compile(orders[part], f"<{part}>", "exec"), space)  # noqa: S102


class Remote:
    """Something of the solution's. Compared with plain data, it is what its plain base is."""

    def __init__(self, judge: Judge, number: int) -> None:
        object.__setattr__(self, "_judge", judge)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return _ask("call", self, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return _ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask("setattr", self, name, value)

    def __instancecheck__(self, instance: Any) -> bool:
        return bool(isinstance(instance, Remote) and _ask("isinstance", self, instance) is True)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Remote):
            return _ask("eq", self, other) is True
        value = _ask("value", self)
        return not isinstance(value, Remote) and bool(value == other)

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_number"))

    def __bool__(self) -> bool:
        return _ask("bool", self) is True


def _ask(operation: str, target: Remote, *arguments: Any, **keywords: Any) -> Any:
    judge: Judge = object.__getattribute__(target, "_judge")
    return judge.ask(operation, target, *arguments, **keywords)


def _forward(operation: str, *, remote_only: bool) -> Any:
    def method(self: Remote, *arguments: Any) -> Any:
        # Numbers are not the solution's to calculate with: abs(f(2) - 1.41) is the judge's matter.
        if remote_only and not all(isinstance(each, Remote) for each in arguments):
            return NotImplemented
        return _ask(operation, self, *arguments)

    return method


for _name in ("str", "repr", "iter", "next", "len", "getitem", "setitem"):
    setattr(Remote, f"__{_name}__", _forward(_name, remote_only=False))
for _name in ("lt", "le", "add", "sub", "mul"):
    setattr(Remote, f"__{_name}__", _forward(_name, remote_only=True))


def _replace(mine: Any, theirs: Any) -> None:
    if type(mine) is not type(theirs) or mine == theirs:
        return
    mine.clear()
    (mine.extend if hasattr(mine, "extend") else mine.update)(theirs)


def _exception(message: Any, *, stops: bool = True) -> Exception:
    """What was raised on the other side, as the nearest of Python's own kinds.

    Only an iterator may stop (`stops`): a function that did would end a loop of the test over
    `map(function, cases)` before the test has looked at anything.
    """
    for name in message["error"]:
        kind = getattr(builtins, name, None)
        if name in ("StopIteration", "StopAsyncIteration") and not stops:
            break
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(message["text"])
            except TypeError:  # UnicodeDecodeError and its like want more.
                continue
    return RuntimeError(message["text"])


def _keep_only(*kept: int) -> None:
    for number in range(64):
        if number not in kept:
            try:
                os.close(number)
            except OSError:
                pass  # It was not open.
    for _ in range(3):
        os.open(os.devnull, os.O_RDWR)  # As standard input, output and error.


def main() -> None:
    questions, ask = os.pipe()
    answers, answer = os.pipe()
    if os.fork() == 0:
        try:
            _keep_only(questions, answer)
            Solution(questions, answer).serve()
        finally:
            os._exit(1)
    os.close(questions)
    os.close(answer)
    report = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    # Only now, when the solution has a memory of its own.
    orders = json.loads(sys.stdin.buffer.read())
    judge = Judge(answers, ask)
    try:
        judge.run(orders)
        verdict = {"verdict": "passed", "detail": ""}
    except Unsupported as error:
        verdict = {"verdict": "unsupported", "detail": str(error)}
    except BaseException as error:
        verdict = {"verdict": "failed", "detail": f"{type(error).__name__}: {error}"[:500]}
    os.write(report, json.dumps(verdict).encode())
    os._exit(0)


if __name__ == "__main__":
    main()

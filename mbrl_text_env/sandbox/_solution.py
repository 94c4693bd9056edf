"""Runs inside a box: the solution's side of a test, and what crosses between the two sides.

See `_judge`, which imports it before the solution runs.
"""

# ruff: noqa: PTH123, SIM105 - importing pathlib and contextlib would take as long as most tests.

from __future__ import annotations

import builtins
import collections
import functools
import json
import operator
import os
import sys
import types
from typing import Any

_MOST_BYTES = 32 << 20
_MOST_DEPTH = 300
BY_VALUE = (dict, collections.Counter, collections.OrderedDict, collections.defaultdict)
MUTABLE = (list, dict, set, bytearray, collections.deque)
_DICTS = {kind.__name__: kind for kind in BY_VALUE[:3]}
_LISTED: tuple[Any, ...] = (tuple, set, frozenset, collections.deque)
_COLLECTIONS = {kind.__name__: kind for kind in _LISTED}


def _of(module: str, name: str, method: str = "", *, of_ints: bool = False) -> Any:
    """Builds a value of a class whose module would take longer to import than most tests."""

    def build(text: str) -> Any:
        kind = getattr(__import__(module), name)
        if of_ints:
            return kind(*(int(each, 16) for each in text.split()))
        return getattr(kind, method)(text) if method else kind(text)

    return build


def _ints(*names: str) -> Any:
    """Writes a value by its attributes. Hexadecimal numbers take linear time."""
    return lambda value: " ".join(hex(getattr(value, name)) for name in names)


def _slice(text: str) -> slice:
    return slice(*(each if each is None else int(each) for each in json.loads(text)))


# Values that cross as a text: how it is made, by the name of the class, and how it is read.
_ATOMS: dict[str, tuple[Any, Any]] = {
    "builtins.int": (hex, lambda text: int(text, 16)),
    "builtins.bytes": (bytes.hex, bytes.fromhex),
    "builtins.bytearray": (bytearray.hex, bytearray.fromhex),
    "builtins.complex": (repr, complex),
    "builtins.range": (_ints("start", "stop", "step"), _of("builtins", "range", of_ints=True)),
    "builtins.slice": (lambda value: json.dumps([value.start, value.stop, value.step]), _slice),
    "fractions.Fraction": (
        _ints("numerator", "denominator"),
        _of("fractions", "Fraction", of_ints=True),
    ),
    "datetime.timedelta": (
        _ints("days", "seconds", "microseconds"),
        _of("datetime", "timedelta", of_ints=True),
    ),
    **{
        f"datetime.{name}": (str, _of("datetime", name, "fromisoformat"))
        for name in ("date", "time", "datetime")
    },
    **{
        f"{module}.{name}": (str, _of(module, name))
        for module, name in (
            ("decimal", "Decimal"),
            ("pathlib", "PosixPath"),
            ("pathlib", "PurePosixPath"),
            ("pathlib", "PureWindowsPath"),
            ("uuid", "UUID"),
        )
    },
}


class Peer:
    """What both sides share: messages of plain data, and of what each side refers to."""

    refer: Any
    resolve: Any

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        self.shared: list[Any] = []
        self.numbers: dict[int, int] = {}

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
        if kind is int and abs(value) < 1 << 62:
            return value
        if kind is list:
            return [self.encode(item) for item in value]
        if kind in BY_VALUE:
            pairs = [[self.encode(key), self.encode(item)] for key, item in value.items()]
            if kind is collections.defaultdict:
                return {"defaultdict": [self.encode(value.default_factory), pairs]}
            return {kind.__name__: pairs}
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            items = [self.encode(item) for item in value]
            return {"named": [[kind.__name__, *value._fields], items]}
        if _COLLECTIONS.get(kind.__name__) is kind:
            return {kind.__name__: [self.encode(item) for item in value]}
        # Newer versions of Python have some of the classes in submodules.
        full_name = f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"
        if full_name in _ATOMS:
            return {full_name: _ATOMS[full_name][0](value)}
        return self.refer(value)

    def decode(self, data: Any, depth: int = 0) -> Any:
        """The value: of a closed set of types, or what `resolve` makes of a reference."""
        if depth > _MOST_DEPTH:
            raise ValueError(f"data nested more than {_MOST_DEPTH} deep")
        if type(data) is list:
            return [self.decode(item, depth + 1) for item in data]
        if type(data) is not dict:
            return data  # JSON has no more kinds than texts, numbers, true, false and null.
        ((tag, content),) = data.items()
        if tag in _DICTS:
            return _DICTS[tag](dict(self.decode(pair, depth + 1) for pair in content))
        if tag == "defaultdict":
            factory, pairs = content
            made = (self.decode(pair, depth + 1) for pair in pairs)
            return collections.defaultdict(self.decode(factory), made)
        if tag == "named":
            names, items = content
            return _named_tuple(*names)._make(self.decode(items, depth + 1))
        if tag in _COLLECTIONS and type(content) is list:
            return _COLLECTIONS[tag](self.decode(content, depth + 1))
        if tag in _ATOMS and type(content) is str:
            return _ATOMS[tag][1](content)
        return self.resolve(tag, content)

    def share(self, value: Any) -> int:
        """The number of an object, the same each time; the object is kept."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.shared)
            self.shared.append(value)
        return self.numbers[id(value)]


@functools.cache
def _named_tuple(name: str, *fields: str) -> Any:
    """The class of that name and these fields, which `namedtuple` checks."""
    return collections.namedtuple(name, fields)


def kinds_of(kind: Any) -> list[str]:
    """The names of a class and its bases; one that only has the name of a builtin gets another."""
    names = [each.__name__ for each in kind.__mro__]
    known = [builtin_exception(name) for name in names]
    return [
        name if own in (None, each) else f"solution.{name}"
        for name, own, each in zip(names, known, kind.__mro__, strict=True)
    ]


def builtin_exception(name: str) -> Any:
    kind = getattr(builtins, name, None)
    wanted = isinstance(kind, type) and issubclass(kind, (Exception, SystemExit))
    return kind if wanted else None


def exception_of(
    names: list[str], text: str, values: Any = None, known: Any = None, stops: bool = True
) -> BaseException:
    """What was raised on the other side, as the nearest kind that this side has.

    Only an iterator may stop (`stops`): a function that did would end a loop of the test over
    `map(function, cases)` before the test has looked at anything.
    """
    arguments, attributes = values or ([], {})
    for name in names:
        kind = (known or {}).get(name) or builtin_exception(name)
        if name in ("StopIteration", "StopAsyncIteration") and not stops:
            break
        if kind is None:
            continue
        for given in (arguments, [text]):
            try:
                error: BaseException = kind(*given)
            except Exception:  # UnicodeDecodeError and its like want more. # noqa: S112
                continue
            if given is not arguments or str(error) == text:
                error.__dict__.update(attributes)
                return error
    return RuntimeError(text)


def path_of(value: Any) -> str:
    """Where a class or function of Python's own can be found: "module:name"; "" for others."""
    kind = type(value)
    if kind is not type and not callable(value):
        return ""
    owner = getattr(value, "__objclass__", value)
    module, name = getattr(owner, "__module__", None), getattr(value, "__qualname__", None)
    if type(module) is not str or type(name) is not str or module not in sys.modules:
        return ""
    if module.partition(".")[0] not in sys.stdlib_module_names:
        return ""
    try:
        found = operator.attrgetter(name)(sys.modules[module])
    except AttributeError:
        return ""
    return f"{module}:{name}" if found is value else ""


# --- The solution's side ---


class Solution(Peer):
    """Serves the names of the solution. Whatever the solution does to it, it stays on this side."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__(source, target)
        self.exceptions: dict[str, Any] = {}
        self.names: dict[str, Any] = {}

    def refer(self, value: Any) -> Any:
        if isinstance(value, type) and issubclass(value, Exception) and not path_of(value):
            self.exceptions[value.__name__] = value
            return {"exception": kinds_of(value)}
        if type(value) is types.CoroutineType:
            return {"coroutine": self.share(value)}
        return {"object": self.share(value)}

    def resolve(self, tag: str, content: Any) -> Any:
        if tag == "object":
            return self.shared[content]
        if tag == "iterator":
            items, more = content
            return _items(self.decode(items), more if more is None else _Callback(self, more))
        if tag == "exception":
            return self.exceptions[content]
        if tag == "raised":
            names, text, values = content
            return exception_of(names, text, self.decode(values), self.exceptions)
        if tag == "path":
            module, _, names = content.partition(":")
            return operator.attrgetter(names)(__import__(module, fromlist=["."]))
        return _Callback(self, content)

    def serve(self) -> None:
        with open("solution.py", "rb") as file:
            source = file.read()
        module = types.ModuleType("solution")
        sys.modules["solution"] = module
        self.names = module.__dict__
        # What the task takes for granted comes first, so that the solution may define it otherwise.
        for statement in self.receive():
            try:
                exec(statement, self.names)  # noqa: S102
            except ImportError:
                pass  # It may do without.
        # The frames below the solution's, of which it would have but one in a program of its own.
        sys.setrecursionlimit(sys.getrecursionlimit() + 10)
        try:
            exec(compile(source, "solution.py", "exec"), self.names)  # noqa: S102
        except SystemExit:
            pass  # What it has defined until then is there.
        while True:
            self.answer(self.receive())

    def answer(self, request: Any) -> None:
        arguments: list[Any] = []
        keywords: dict[str, Any] = {}
        reply: dict[str, Any]
        try:
            arguments = [self.decode(each) for each in request["arguments"]]
            keywords = {key: self.decode(each) for key, each in request["keywords"].items()}
            operation = request["operation"]
            if operation == "names":
                result = {name: self.names[name] for name in arguments if name in self.names}
            else:
                result = _OPERATIONS[operation](*arguments, **keywords)
            # A list that was given is no other list when it comes back.
            given = [*arguments, *keywords.values()]
            same = [i for i, each in enumerate(given) if each is result]
            is_given = same and isinstance(result, MUTABLE)
            reply = {"given": same[0]} if is_given else {"result": self.encode(result)}
        except (Exception, SystemExit) as error:
            reply = self.describe(error)
        # What the call did to its arguments is seen by the test too.
        reply["arguments"] = [
            self.encode(each) if isinstance(each, MUTABLE) else None
            for each in (*arguments, *keywords.values())
        ]
        self.send(reply)

    def describe(self, error: BaseException) -> dict[str, Any]:
        self.exceptions[type(error).__name__] = type(error)
        reply = {"error": kinds_of(type(error)), "text": str(error)[:1000], "values": None}
        try:
            reply["values"] = [self.encode(list(error.args)), self.encode(dict(vars(error)))]
        except RecursionError:
            pass
        return reply


class _Callback:
    """A function of the test, for the solution to call."""

    def __init__(self, peer: Solution, number: int) -> None:
        self._peer, self._number = peer, number

    def __call__(self, /, *arguments: Any, **keywords: Any) -> Any:
        peer = self._peer
        given = [peer.encode(list(arguments)), peer.encode(keywords)]
        peer.send({"callback": self._number, "arguments": given})
        message = peer.receive()
        while "operation" in message:
            peer.answer(message)
            message = peer.receive()
        if "error" in message:
            raise exception_of(message["error"], message["text"])
        return peer.decode(message["result"])


def _items(items: list[Any], more: Any) -> Any:
    """What an iterator of the test gives: what was sent, and then what it still has."""
    yield from items
    while more:
        try:
            item = more()
        except StopIteration:
            return
        yield item


def _value(value: Any) -> Any:
    """An object of a class that was made from a plain one, as the plain one."""
    if isinstance(value, type({}.keys())):
        return set(value)
    kinds: tuple[Any, ...] = (
        int, float, complex, str, list, tuple, dict, set, frozenset, bytes, bytearray,
    )  # fmt: skip
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    return value


COMPARED = ("lt", "le", "gt", "ge")
CALCULATED = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor",
)  # fmt: skip
UNARY: dict[str, Any] = {
    "neg": operator.neg, "pos": operator.pos, "abs": abs, "invert": operator.invert,
    "int": int, "float": float, "complex": complex, "index": operator.index, "round": round,
}  # fmt: skip
# Those whose answer is for the test to compare; comparing is not among them.
ASKED = (
    "bool", "str", "repr", "format", "iter", "next", "len", "getitem", "setitem", "delitem",
)  # fmt: skip
_OPERATIONS: dict[str, Any] = {
    "call": lambda target, /, *arguments, **keywords: target(*arguments, **keywords),
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "isinstance": lambda kind, value: isinstance(value, kind),
    "issubclass": lambda kind, value: issubclass(value, kind),
    "value": _value,
    "path": lambda value: path_of(value),
    "copy": lambda value: __import__("copy").copy(value),
    "deepcopy": lambda value: __import__("copy").deepcopy(value),
    "send": lambda value, item: value.send(item),
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value, *raised: type(value).__exit__(value, *raised),
    "await": lambda value: __import__("asyncio").run(value),
    "hash": hash,
    "eq": operator.eq,
    **{name: getattr(operator, name) for name in (*COMPARED, *CALCULATED)},
    **UNARY,
    **{name: getattr(builtins, name) for name in ASKED if hasattr(builtins, name)},
    **{name: getattr(operator, name) for name in ASKED if hasattr(operator, name)},
}

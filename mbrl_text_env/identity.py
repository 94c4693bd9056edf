"""What tells one model, reward or value from another: by content, not by name alone.

`identity` is what folders of results keep of the parts that their rows depend on. A class says it
itself with a method `identity() -> JSON values`. Without one, it is the class with the file that
defines it, its name, the constructor's arguments that are kept as attributes of the same name, and
what was fitted (attributes whose names end in one underscore), as in scikit-learn. Arrays, tensors
and folders of models count by their content, functions by the file that defines them.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mbrl_text_env.runs import digest

_OWN = ("mbrl_text_env",)
# They say how fast something is computed, not what.
_SPEED = frozenset({"batch_size", "batch_tokens", "device", "workers"})
# A string that names a folder with one of these is a model's.
_MODEL_FILES = (
    "config.json", "reward.json", "value.json", "policy.json", "adapter_config.json", "modules.json"
)  # fmt: skip
_MOST_NESTED = 12


def identity(part: Any) -> Any:
    """What tells a part of a run from others; JSON values. See the module for what counts.

    Args:
        part: A language model, reward, value model, encoder, or anything that they are made of.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> identity(SentimentReward())
        {'class': 'mbrl_text_env.rewards.evaluators.sentiment.SentimentReward', 'name': 'sentiment'}
    """
    return _identity(part, 0)


def folder_digest(folder: str | Path) -> str:
    """Tells the content of a folder, or a file, from others; hidden files are left out."""
    root = Path(folder)
    paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    shown = [p for p in paths if not p.relative_to(root).name.startswith(".")]
    return digest(*(f"{p.relative_to(root)} {_file_digest(p)}".encode() for p in shown))


def weights_digest(model: Any) -> str:
    """Tells the weights of a torch module from others; all of them count."""
    named = {id(tensor): (name, tensor) for name, tensor in model.state_dict().items()}
    with ThreadPoolExecutor() as pool:
        return digest(*pool.map(_tensor_line, named.values()))


def _tensor_line(named: tuple[str, Any]) -> bytes:
    import torch

    name, tensor = named
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} {digest(content.data)}".encode()


def _identity(part: Any, depth: int) -> Any:
    inner = functools.partial(_identity, depth=depth + 1)
    if depth > _MOST_NESTED:
        return _class_name(type(part))
    own = getattr(part, "identity", None)
    if callable(own) and not inspect.isclass(part):
        return own()
    if isinstance(part, str) and _is_model_folder(part):
        return {"folder": folder_digest(part)}
    if part is None or isinstance(part, bool | int | str):
        return part
    if isinstance(part, float):
        return part if np.isfinite(part) else repr(part)
    if isinstance(part, Path):
        return {"content": folder_digest(part)} if part.exists() else str(part)
    if isinstance(part, Enum):
        return inner(part.value)
    if isinstance(part, re.Pattern):
        return [part.pattern, part.flags]
    if isinstance(part, bytes):
        return digest(part)
    if isinstance(part, np.ndarray | np.generic):
        return [str(part.dtype), list(part.shape), digest(np.ascontiguousarray(part).tobytes())]
    if isinstance(part, Mapping):
        return {str(key): inner(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [inner(value) for value in part]
    if isinstance(part, set | frozenset):
        return sorted((inner(value) for value in part), key=repr)
    return _object(part, inner)


def _object(part: Any, inner: Any) -> Any:
    if inspect.isclass(part):
        return _described(part)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(part, torch.nn.Module):
        return {"class": _class_name(type(part)), "weights": weights_digest(part)}
    if torch is not None and isinstance(part, torch.Tensor):
        return _tensor_line(("", part)).decode()
    if isinstance(part, functools.partial):
        return [inner(part.func), inner(part.args), inner(part.keywords)]
    if inspect.ismethod(part):
        return [part.__name__, inner(part.__self__)]
    if inspect.isroutine(part):
        return _function(part, inner)
    found = {**_described(type(part)), **_attributes(part, inner)}
    name = getattr(part, "name", None)
    return {**found, "name": name} if isinstance(name, str) else found


def _attributes(part: Any, inner: Any) -> dict[str, Any]:
    """Constructor's arguments, and what was fitted."""
    if dataclasses.is_dataclass(part):
        names = [field.name for field in dataclasses.fields(part)]
    else:
        names = []
    with suppress(TypeError, ValueError):
        # A class below a dataclass may have a constructor of its own.
        names += inspect.signature(type(part)).parameters
    state = getattr(part, "__dict__", {})
    fitted = [n for n in state if n.endswith("_") and not n.startswith("_")]
    return {
        name: inner(getattr(part, name))
        for name in dict.fromkeys([*names, *fitted])
        if name not in _SPEED and (name in state or hasattr(part, name))
    }


def _function(function: Any, inner: Any) -> dict[str, Any]:
    values = [inner(value) for value in _captured(function)]
    return {**_described(function), **({"captured": values} if values else {})}


def _captured(function: Any) -> list[Any]:
    """What a function holds besides its code: defaults, and variables of the functions around."""
    held = []
    for cell in getattr(function, "__closure__", None) or ():
        # A variable that is not set yet has an empty cell.
        with contextlib.suppress(ValueError):
            held.append(cell.cell_contents)
    named = getattr(function, "__kwdefaults__", None)
    return [*held, *(getattr(function, "__defaults__", None) or ()), *([named] if named else [])]


def _described(defined: Any) -> dict[str, Any]:
    """The name of a class or function, and a digest of the code that defines it."""
    kind = "class" if inspect.isclass(defined) else "function"
    module = getattr(defined, "__module__", None) or ""
    found: dict[str, Any] = {kind: _class_name(defined)}
    if module.partition(".")[0] in _OWN or module in sys.builtin_module_names:
        # What these compute changes with the format of the results.
        return found
    code = _code(defined, module)
    return {**found, "code": code} if code else found


def _class_name(defined: Any) -> str:
    return f"{getattr(defined, '__module__', '')}.{getattr(defined, '__qualname__', defined)}"


def _code(defined: Any, module: str) -> str | None:
    if module != "__main__":
        path = _source_file(defined)
        if path is not None:
            return digest(*(p.read_bytes() for p in _with_neighbours(defined, path)))
    # The rest of a script or notebook changes from run to run: its own lines count.
    try:
        return digest(inspect.getsource(defined).encode())
    except (OSError, TypeError):
        code = getattr(defined, "__code__", None)
        return None if code is None else digest(code.co_code, repr(code.co_consts).encode())


def _source_file(defined: Any) -> Path | None:
    try:
        path = Path(inspect.getsourcefile(defined) or "")
    except TypeError:
        # A module that was run from a file and is not among the imported ones.
        code = _first(defined, "__code__")
        path = Path() if code is None else Path(code.co_filename)
    return path if path.is_file() else None


def _first(defined: Any, name: str) -> Any:
    """An attribute of a function, or of the first method of a class that has it."""
    methods = vars(defined).values() if inspect.isclass(defined) else ()
    found = (getattr(part, name, None) for part in (defined, *methods))
    return next((value for value in found if value is not None), None)


def _with_neighbours(defined: Any, path: Path) -> list[Path]:
    """The file, and those of its folder that it imports, and so on."""
    folder = path.resolve().parent
    found = {path.resolve()}
    waiting: list[Iterable[Any]] = [list((_first(defined, "__globals__") or {}).values())]
    while waiting:
        for value in waiting.pop():
            is_module = isinstance(value, ModuleType)
            name = getattr(value, "__name__" if is_module else "__module__", None)
            module = sys.modules.get(name) if isinstance(name, str) else None
            source = getattr(module, "__file__", None)
            if source is None or not source.endswith(".py"):
                continue
            other = Path(source).resolve()
            if folder in other.parents and other not in found and "site-packages" not in (
                other.relative_to(folder).parts
            ):  # fmt: skip
                found.add(other)
                waiting.append(list(vars(module).values()))
    # A number that was imported does not say where it comes from; the import does.
    unread = list(found)
    while unread:
        new = _imported(unread.pop(), folder) - found
        found |= new
        unread += new
    return sorted(found)


def _imported(path: Path, folder: Path) -> set[Path]:
    """Files below a folder that a file of it imports by name."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names: set[tuple[Path, str]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(folder, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[min(node.level, len(path.parents)) - 1] if node.level else folder
            start = f"{node.module}." if node.module else ""
            names |= {(base, f"{start}{alias.name}") for alias in node.names}
    files = (
        file
        for base, name in names
        for stop in range(1, name.count(".") + 2)
        for stem in [base.joinpath(*name.split(".")[:stop])]
        for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py")
    )
    return {file.resolve() for file in files if file.is_file() and folder in file.parents}


def _is_model_folder(name: str) -> bool:
    try:
        return bool(name) and any((Path(name) / file).is_file() for file in _MODEL_FILES)
    except (OSError, ValueError):
        return False


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()

"""Result folders: record the settings of a run, lock the folder, and resume after a kill.

A run saves digests of all settings that its rows depend on. A later run continues in the same
folder if its settings are equal; otherwise it is rejected with a list of the differences.

`identity` identifies a model, reward or value. A class can define it with a method
`identity() -> JSON values`. By default it consists of the class and the file that defines it, its
name, the constructor's arguments that are attributes of the same name, and the fitted attributes
(with a trailing underscore), as in scikit-learn. Arrays, tensors and folders of models are
identified by their content, functions by the file that defines them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mbrl_text_env.files import remove_scratch, shortened, write_text
from mbrl_text_env.types import Prompt

CONFIG = "config.json"
_LOCK_SECONDS = 1.0
_SHOWN = 4
_CHECKPOINTS_OF = "run.json"
_OWN = "mbrl_text_env"
# Arguments that change the speed, not the results.
_SPEED = frozenset({"batch_size", "batch_tokens", "device", "workers"})
# A folder with one of these files is a model folder.
_MODEL_FILES = (
    "config.json", "reward.json", "value.json", "policy.json", "adapter_config.json", "modules.json"
)  # fmt: skip
_MOST_NESTED = 12

Job = TypeVar("Job")
T = TypeVar("T")
Each: TypeAlias = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[tuple[int, Any]]]
"""A function that applies work to jobs and yields the index and result of each when it is done:
`in_turn`, or `workers.RayWorkers`, which pickles work and jobs."""


def in_turn(work: Callable[[Job], T], jobs: Sequence[Job]) -> Iterator[tuple[int, T]]:
    """Do the jobs one by one in this process."""
    for place, job in enumerate(jobs):
        yield place, work(job)


def in_order(results: Iterable[tuple[int, T]]) -> Iterator[T]:
    """Yield results in the order of the jobs; early results are held back."""
    held: dict[int, T] = {}
    following = 0
    for place, result in results:
        held[place] = result
        while following in held:
            yield held.pop(following)
            following += 1


@contextmanager
def claimed(
    folder: str | Path,
    record: Mapping[str, Any],
    noun: str,
    error: type[Exception],
    *,
    grows: Sequence[str] = (),
) -> Iterator[None]:
    """Lock the folder of a run for this process, and check that it belongs to this run.

    After a kill at any moment, the same call can continue. `record` contains the settings that the
    results depend on (see `identity`), and `noun` is the run's name in messages. Other files,
    another run, another process or an unwritable disk raise `error`. The run can add entries to the
    objects in `record` that `grows` lists, such as prompts.
    """
    path = Path(folder)
    with writing(path, error):
        others = path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir())
        if others and not (path / CONFIG).exists():
            raise error(f"{path} holds other files and no {noun}. Choose a new or empty folder.")
        path.mkdir(parents=True, exist_ok=True)
        lock = locked(path, f"another process works on this {noun}. Wait until it ends", error)
    try:
        with writing(path, error):
            remove_scratch(path)
            claim_file(path / CONFIG, record, noun, error, grows)
        yield
    finally:
        lock.release()


def locked(folder: Path, busy: str, error: type[Exception]) -> FileLock:
    """Acquire the lock of a folder; `error` with the text `busy` if another process has it."""
    lock = FileLock(folder / ".lock", timeout=_LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout as reason:
        raise error(f"{folder}: {busy}, or choose another folder.") from reason
    return lock


def claim_file(
    path: Path,
    record: Mapping[str, Any],
    noun: str,
    error: type[Exception],
    grows: Sequence[str] = (),
) -> None:
    """Write the settings of a run, or check that the file has the same ones; see `claimed`."""
    wanted = json.loads(json.dumps(record))
    if not path.exists():
        write_text(path, json.dumps(wanted, indent=2))
        return
    found = read_config(path, error)
    there, here, merged = dict(found), dict(wanted), dict(wanted)
    for key in grows:
        if isinstance(found.get(key), dict):
            common = found[key].keys() & wanted[key].keys()
            there[key], here[key] = ({k: d[key][k] for k in common} for d in (found, wanted))
            merged[key] = {**found[key], **wanted[key]}
    refuse_others(path.parent, there, here, noun, error)
    if merged != found:
        write_text(path, json.dumps(merged, indent=2))


@contextmanager
def writing(folder: str | Path, error: type[Exception]) -> Iterator[None]:
    """Convert an `OSError` in the block to an `error` that the folder cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as reason:
        why = getattr(reason, "strerror", None) or reason
        raise error(
            f"Expected a folder that can be written, got {str(folder)!r} ({why}). Free some space "
            "or change its permissions; then the same command goes on. Or choose another folder "
            "(--out)."
        ) from reason


def refuse_others(
    where: str | Path,
    found: Mapping[str, Any],
    record: Mapping[str, Any],
    noun: str,
    error: type[Exception],
) -> None:
    """Raise `error` if the results in folder `where` have other settings (`found`)."""
    differing = [*_differences(found, json.loads(json.dumps(record)))]
    if differing:
        more = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise error(
            f"{where} holds another {noun} ({', '.join(differing[:_SHOWN])}{more}). Give the "
            "options it was made with, choose another folder, or remove it."
        )


def _differences(found: Any, record: Any, name: str = "") -> Iterator[str]:
    """The differences between two JSON trees, each as "lm.name: a there, b here"."""
    if isinstance(found, dict) and isinstance(record, dict):
        for key in sorted({*found, *record}):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(found.get(key), record.get(key), inner)
    elif found != record:
        there, here = (v if isinstance(v, str) else json.dumps(v) for v in (found, record))
        yield f"{name}: {shortened(there, 60)} there, {shortened(here, 60)} here"


def prompt_digest(prompt: Prompt) -> str:
    """A digest of a prompt's content, metadata and split, without its id."""
    content: Any = prompt.content
    if not isinstance(content, str):
        content = [[message.role, message.content] for message in content]
    row = [content, dict(prompt.metadata), prompt.split]
    return digest(json.dumps(row, sort_keys=True, default=str).encode())


def prompt_digests(prompts: Sequence[Prompt]) -> dict[str, str]:
    """`prompt_digest` of each prompt by its id."""
    return {prompt.id: prompt_digest(prompt) for prompt in prompts}


def digest(*parts: bytes) -> str:
    """A digest of contents, 16 hexadecimal digits."""
    sums = hashlib.blake2b(digest_size=8)
    for part in parts:
        sums.update(hashlib.blake2b(part).digest())
    return sums.hexdigest()


def read_config(path: Path, error: type[Exception]) -> dict[str, Any]:
    """Read a JSON object; raise `error` if the file is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"got {type(values).__name__}")
    except ValueError as reason:
        raise error(
            f"{path}: expected a whole JSON object, got a damaged file ({reason}). What the rows "
            "beside it depend on is not known: restore the file from a copy, or remove the folder."
        ) from reason
    return values


def claim_checkpoints(
    checkpoints: Path, record: Mapping[str, Any], error: type[Exception]
) -> str | None:
    """Create the checkpoint folder; return the last complete checkpoint of the same run, or None.

    Incomplete checkpoints are removed. A folder of another run (with another `record` of JSON
    values) or with other files raises `error`.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    remove_scratch(checkpoints)
    note = checkpoints / _CHECKPOINTS_OF
    others = any(path.name != _CHECKPOINTS_OF for path in checkpoints.iterdir())
    if others and not note.is_file():
        raise error(
            f"{checkpoints}: expected checkpoints of the same training to go on from, got a folder "
            "with other files. Remove the folder to begin anew, or choose another folder for the "
            "result."
        )
    claim_file(note, record, "training", error)
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    whole = None
    for path in found:
        # Trainers write their state last: a checkpoint without it is incomplete.
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            whole = str(path)
        except (OSError, ValueError):
            shutil.rmtree(path)
    return whole


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators, as trainers do, and restore their states afterwards."""
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def identity(part: Any) -> Any:
    """JSON values that identify a part of a run, such as a model or reward; see the module.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> identity(SentimentReward())
        {'class': 'mbrl_text_env.rewards.evaluators.sentiment.SentimentReward', 'name': 'sentiment'}
    """
    return _identity(part, 0)


def folder_digest(folder: str | Path) -> str:
    """A digest of the content of a folder or file, without hidden files."""
    root = Path(folder)
    paths = [root] if root.is_file() else sorted(filter(Path.is_file, root.rglob("*")))
    lines = []
    for path in paths:
        name = path.relative_to(root)
        if not name.name.startswith("."):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
            lines.append(f"{name} {content}".encode())
    return digest(*lines)


def weights_digest(model: Any) -> str:
    """A digest of all weights of a torch module."""
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
    if torch is not None and isinstance(part, torch.dtype | torch.device):
        return str(part)
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
    is_data = dataclasses.is_dataclass(part)
    names = [field.name for field in dataclasses.fields(part)] if is_data else []
    with suppress(TypeError, ValueError):
        # A class below a dataclass may have a constructor of its own.
        names += inspect.signature(type(part)).parameters
    state = getattr(part, "__dict__", {})
    names += [n for n in state if n.endswith("_") and not n.startswith("_")]
    return {
        name: inner(getattr(part, name))
        for name in dict.fromkeys(names)
        if name not in _SPEED and (name in state or hasattr(part, name))
    }


def _function(function: Any, inner: Any) -> dict[str, Any]:
    """Its code, and what it holds besides: variables of the functions around, and defaults."""
    held = []
    for cell in getattr(function, "__closure__", None) or ():
        # A variable that is not set yet has an empty cell.
        with suppress(ValueError):
            held.append(cell.cell_contents)
    held += getattr(function, "__defaults__", None) or ()
    named = getattr(function, "__kwdefaults__", None)
    values = [inner(value) for value in [*held, *([named] if named else [])]]
    return {**_described(function), **({"captured": values} if values else {})}


def _described(defined: Any) -> dict[str, Any]:
    """The name of a class or function, and a digest of the code that defines it."""
    kind = "class" if inspect.isclass(defined) else "function"
    module = getattr(defined, "__module__", None) or ""
    found: dict[str, Any] = {kind: _class_name(defined)}
    if module.partition(".")[0] == _OWN or module in sys.builtin_module_names:
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
            return digest(*(p.read_bytes() for p in _with_neighbours(path)))
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
        path = Path(getattr(_first(defined, "__code__"), "co_filename", ""))
    return path if path.is_file() else None


def _first(defined: Any, name: str) -> Any:
    """An attribute of a function, or of the first method of a class that has it."""
    methods = vars(defined).values() if inspect.isclass(defined) else ()
    found = (getattr(part, name, None) for part in (defined, *methods))
    return next((value for value in found if value is not None), None)


def _with_neighbours(path: Path) -> list[Path]:
    """The file, and those of its folder that it imports, and so on."""
    path = path.resolve()
    found, unread = {path}, [path]
    while unread:
        new = _imported(unread.pop(), path.parent) - found
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

"""Create reward models by name, for the command line, the environment and comparisons.

A name refers to a built-in reward, a reward registered in this program, an entry point of an
installed package in the group `mbrl_text_env.rewards`, or a function in a Python file.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardModel, place_of
from mbrl_text_env.rewards.composite.combinators import WeightedSum
from mbrl_text_env.rewards.names import NAMED, RewardEntry, first_line
from mbrl_text_env.types import nearest

GROUP = "mbrl_text_env.rewards"
"""The entry-point group for rewards of other packages."""

_FILE_MODULE = "reward_file_"
_PYTHON_FILE = re.compile(r"(?P<path>.+\.py):(?P<function>\w+)")


class RewardSpecError(ValueError):
    """Raised if a reward name is unknown or cannot be loaded, or a sum cannot be parsed."""


_registered: dict[str, RewardEntry] = {}


def available() -> list[str]:
    """Return the names that `make` accepts; names with an argument look like "name:ARGUMENT"."""
    return [_shown(name, entry) for name, entry in _known().items()] + [*_foreign()]


def descriptions() -> dict[str, str]:
    """Return a one-line description of each available reward, or why it cannot be imported."""
    lines = {_shown(name, entry): entry.description for name, entry in _known().items()}
    for name, points in _foreign().items():
        try:
            lines[name] = first_line(_loaded(points))
        except RewardSpecError as error:
            lines[name] = f"Cannot be used. {error}"
    return lines


def register(
    name: str,
    factory: Callable[..., Any],
    description: str = "",
    *,
    argument: str | None = None,
    replace: bool = False,
) -> None:
    """Register a reward under a name, for this program.

    Packages declare an entry point in their pyproject.toml instead:

        [project.entry-points."mbrl_text_env.rewards"]
        brevity = "my_package.rewards:Brevity"

    Args:
        name: Letters, digits, ".", "-" and "_".
        factory: A class or function that returns the reward: anything `as_reward_model` accepts.
        description: One line; by default the first line of the factory's docstring.
        argument: A placeholder, such as "FOLDER", for text after a colon, passed to the factory.
        replace: Whether to replace an existing reward of this name.

    Example:
        >>> from mbrl_text_env.rewards import Clip, SentimentReward
        >>> register("joy", lambda: Clip(SentimentReward(), low=0), "Sentiment from 0 up.")
        >>> make("2*joy").name
        '2*clip(sentiment)'
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise RewardSpecError(
            f"Expected a name of letters, digits, '.', '-' and '_' for the reward, got {name!r}."
        )
    if not callable(factory):
        raise TypeError(
            f"Expected a class or function that returns reward {name!r}, got {factory!r}. For an "
            "object, register `lambda: that_object`."
        )
    if not replace and (name in _own() or name in _registered):
        raise RewardSpecError(
            f"Reward {name!r} already exists. Choose another name, or pass replace=True."
        )
    _registered[name] = RewardEntry(factory, description or first_line(factory), argument)


def make(spec: str) -> RewardModel:
    """Create a reward model from a name, or from a weighted sum of names.

    Args:
        spec: A name, such as `"sentiment"`; a name with an argument, such as
            `"classifier:my_org/my_model"`; a function or class in a Python file, such as
            `"my_rewards.py:brevity"` (this runs the file); or a weighted sum, such as
            `"0.5*sentiment+relevance"`, of names without "+" and "*". No model is loaded yet.

    Raises:
        RewardSpecError: A name is unknown, cannot be loaded or occurs twice, or a weight is not a
            finite number.

    Example:
        >>> make("0.5*sentiment+0.5*relevance").weights
        (0.5, 0.5)
    """
    path = Path(spec.strip().rpartition(":")[0]).expanduser()
    if _PYTHON_FILE.fullmatch(spec.strip()) and path.is_file():
        # A path can contain "+" or "*".
        return _named(spec.strip())
    terms = [term.strip() for term in spec.split("+")]
    if len(terms) == 1 and "*" not in spec:
        return _named(terms[0])
    weights, names = zip(*(_weight_and_name(term) for term in terms), strict=True)
    rewards = [_named(name) for name in names]
    try:
        return WeightedSum(rewards, weights)
    except ValueError as error:
        raise RewardSpecError(f"Reward {spec!r}: {error}") from error


@functools.cache
def _own() -> dict[str, RewardEntry]:
    """Import all files of this package's rewards, which register them."""
    for folder in ("evaluators", "verifiable", "composite", "learning"):
        package = importlib.import_module(f"mbrl_text_env.rewards.{folder}")
        if folder != "learning":
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                importlib.import_module(module.name)
    return NAMED


def _known() -> dict[str, RewardEntry]:
    return {**_own(), **_registered}


def _shown(name: str, entry: RewardEntry) -> str:
    return name if entry.argument is None else f"{name}:{entry.argument}"


def _weight_and_name(term: str) -> tuple[float, str]:
    weight, star, name = term.rpartition("*")
    try:
        return float(weight) if star else 1.0, name.strip()
    except ValueError:
        raise RewardSpecError(
            f"Reward {term!r}: expected a number before '*', as in '0.5*{name.strip()}', got "
            f"{weight!r}."
        ) from None


def _named(name: str) -> RewardModel:
    if in_file := _PYTHON_FILE.fullmatch(name):
        # The shell does not expand "~" after an equals sign, as in --reward=~/mine.py:brevity.
        return _from_file(Path(in_file["path"]).expanduser(), in_file["function"])
    if name.rstrip(":").endswith(".py"):
        raise RewardSpecError(
            f"Reward {name!r}: expected a file and the name of a function or class in it, such as "
            f"'{name.rstrip(':')}:brevity'."
        )
    key, _, argument = (part.strip() for part in name.partition(":"))
    entry = _known().get(key)
    if entry is not None and bool(argument) == (entry.argument is not None):
        return _made(name, entry.factory, *([argument] if argument else []))
    if not argument and key in (foreign := _foreign()):
        return _made(name, _loaded(foreign[key]))
    hint = nearest(name, [*_known(), *available()], cutoff=0.5)
    raise RewardSpecError(
        f"Expected a known reward, got {name!r}.{hint} Choose one of {available()}, a function in "
        "a file such as 'my_rewards.py:brevity', or a weighted sum such as "
        "'0.5*sentiment+0.5*relevance'."
    )


def _made(name: str, factory: Callable[..., Any], *arguments: str) -> RewardModel:
    with _refused(f"{name!r} cannot be created:"):
        return as_reward_model(factory(*arguments))


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Turn any error of user code, including `SystemExit`, into a `RewardSpecError`."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise RewardSpecError(
            f"Reward {what} {type(error).__name__}: {error}{place_of(error)}."
        ) from error


def _foreign() -> dict[str, list[EntryPoint]]:
    """Return the entry points whose names are not known otherwise."""
    offered: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        offered.setdefault(point.name, []).append(point)
    for name in offered.keys() & _own().keys():
        warnings.warn(
            f"{_packages(offered[name])} offers a reward {name!r}, but that is the name of a "
            "built-in reward. The built-in reward is used.",
            stacklevel=3,
        )
    return {name: points for name, points in offered.items() if name not in _known()}


def _loaded(points: list[EntryPoint]) -> Callable[..., Any]:
    offered = f"{points[0].name!r}, offered by {_packages(points)}"
    if len(points) > 1:
        raise RewardSpecError(
            f"Reward {offered}: uninstall all but one of them, or import the reward and register "
            "it under another name."
        )
    with _refused(f"{offered}: importing {points[0].value!r} raised"):
        factory: Callable[..., Any] = points[0].load()
        return factory


def _packages(points: list[EntryPoint]) -> str:
    return " and ".join(point.dist.name if point.dist else "a package" for point in points)


def run_file(path: Path) -> ModuleType:
    """Run a Python file as a module that can import the files in its folder.

    While it runs, the folder is first in `sys.path`. Afterwards it is last, for imports inside
    functions.
    """
    folder = str(path.parent)
    name = f"{_FILE_MODULE}{path.stem}_{hashlib.blake2b(bytes(path), digest_size=6).hexdigest()}"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module.
    sys.modules[name] = module
    sys.path.insert(0, folder)
    try:
        with _own_neighbours(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
    return module


def files_run() -> list[Path]:
    """Return the files that `run_file` has run; their objects are pickled by name."""
    modules = [module for name, module in sys.modules.items() if name.startswith(_FILE_MODULE)]
    return [Path(str(module.__file__)) for module in modules]


@contextmanager
def _own_neighbours(folder: Path) -> Iterator[None]:
    """Hide modules from elsewhere that share a name with a file or package in the folder."""
    beside = {path.stem for path in folder.glob("*.py")}
    beside |= {path.parent.name for path in folder.glob("*/__init__.py")}
    beside -= sys.stdlib_module_names | {"mbrl_text_env"}

    def is_elsewhere(module: ModuleType) -> bool:
        source = getattr(module, "__file__", None)
        return source is None or folder not in Path(source).resolve().parents

    found = [key for key in sys.modules if key.partition(".")[0] in beside]
    aside = {key: sys.modules.pop(key) for key in found if is_elsewhere(sys.modules[key])}
    try:
        yield
    finally:
        sys.modules.update(aside)


def _from_file(path: Path, name: str) -> RewardModel:
    """Load a reward, a reward class or a function from a Python file."""
    spec = f"{path}:{name}"
    if not path.is_file():
        reason = "that is a folder" if path.is_dir() else f"there is no file {str(path)!r}"
        raise RewardSpecError(f"Reward {spec!r}: {reason}.")
    with _refused(f"{spec!r}: running the file raised"):
        module = run_file(path.resolve())
    if not hasattr(module, name):
        hint = nearest(name, vars(module))
        raise RewardSpecError(f"Reward {spec!r}: the file has no {name!r}.{hint}")
    found = getattr(module, name)
    return _made(spec, found if inspect.isclass(found) else lambda: found)

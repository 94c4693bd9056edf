"""Public names that are imported when they are first used (PEP 562), and what an extra brings.

`import mbrl_text_env` has to be cheap, while some of its names need torch or transformers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

EXTRAS = {
    "rl": ("stable_baselines3", "tensorboard"),
    "train": ("trl", "peft", "tensorboard"),
    "data": ("datasets", "reasoning_gym"),
    "server": ("httpx", "tenacity"),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "ray": ("ray",),
    "verify": ("math_verify", "jsonschema", "langdetect", "regex"),
}
"""The packages that each extra installs, by import name."""


class MissingExtraError(ImportError):
    """A missing package that an extra of `mbrl-text-env` installs."""


def missing_extra(error: BaseException) -> str | None:
    """The extra that installs the missing package of an ImportError; None for other errors."""
    name = getattr(error, "name", None) if isinstance(error, ImportError) else None
    package = (name or "").partition(".")[0]
    return next((extra for extra, packages in EXTRAS.items() if package in packages), None)


@contextmanager
def extras() -> Iterator[None]:
    """Raise a MissingExtraError that names the extra if an import in the block fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        extra = missing_extra(error)
        if extra is None:
            raise
        raise MissingExtraError(
            f"Expected the package {error.name!r} to be installed. Install it with "
            f"`pip install 'mbrl-text-env[{extra}]'`.",
            name=error.name,
        ) from error


def optional(module: str, error: type[Exception]) -> Any:
    """Import a package of an extra; if it is missing, raise `error`, which names the extra."""
    try:
        with extras():
            return importlib.import_module(module)
    except MissingExtraError as reason:
        raise error(str(reason)) from reason


def attach(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make `__getattr__`, `__dir__` and `__all__` of a package from its names by submodule."""
    module_of = {name: module for module, listed in names.items() for name in listed}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with extras():
            return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    return get, lambda: sorted(module_of), sorted(module_of)

"""Python files with rewards in them: run as modules of their own, with the files beside them."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any


def run_file(path: Path) -> ModuleType:
    """Run a Python file as a module of its own, which imports the files beside it.

    As for a script, the files of its folder come before installed packages while it runs; two files
    in different folders may each have a `helpers.py`. Afterwards the folder stands at the end of
    `sys.path`: what a function imports when it is called is found there, unless something else has
    that name. So neighbours are best imported at the top of the file.
    """
    folder = str(path.parent)
    name = f"reward_file_{path.stem}_{hashlib.blake2b(bytes(path), digest_size=6).hexdigest()}"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
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


def place_of(error: BaseException) -> str:
    """Where other people's code raised, to follow an error's text; nothing where it did not.

    Returns:
        Such as " (my_rewards.py, line 3)": the last line in the file that was called.
    """
    lines = [
        (frame.f_code.co_filename, line)
        for frame, line in walk_tb(error.__traceback__)
        if not str(frame.f_globals.get("__name__")).startswith(("mbrl_text_env", "importlib"))
    ]
    own = [line for file, line in lines if file == lines[0][0]]
    return f" ({lines[0][0]}, line {own[-1]})" if own else ""


@contextmanager
def _own_neighbours(folder: Path) -> Iterator[None]:
    """Set modules from elsewhere aside that have the name of a file or package in the folder."""
    beside = {path.stem for path in folder.glob("*.py")}
    beside |= {path.parent.name for path in folder.glob("*/__init__.py")}
    beside -= sys.stdlib_module_names | {"mbrl_text_env"}
    aside = {
        key: module
        for key, module in sys.modules.items()
        if key.partition(".")[0] in beside and not _is_below(module, folder)
    }
    for key in aside:
        del sys.modules[key]
    try:
        yield
    finally:
        sys.modules.update(aside)


def _is_below(module: ModuleType, folder: Path) -> bool:
    source = getattr(module, "__file__", None)
    return source is not None and folder in Path(source).resolve().parents

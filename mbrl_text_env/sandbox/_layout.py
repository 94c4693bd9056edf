"""What a box shows of the host's files: what the interpreter needs, and no more."""

from __future__ import annotations

import os
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any


@lru_cache(maxsize=1)
def executable() -> str:
    """The interpreter itself, not the link to it in a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


@lru_cache(maxsize=1)
def layout() -> dict[str, list[Any]]:
    """What the box shows of the host: the interpreter, its libraries, and four devices."""
    machine = sysconfig.get_config_var("MULTIARCH") or ""
    # The folders of Debian and its kin, which hold libraries alone; else the general ones.
    systems = [f"{root}/{machine}" for root in ("/lib", "/usr/lib") if machine]
    if not any(Path(path).is_dir() for path in systems):
        systems = ["/lib", "/usr/lib"]
    systems += ["/lib64", "/usr/lib64"]
    base = os.path.realpath(sys.base_prefix)
    own = [] if base == "/usr" else [f"{base}/lib"]
    standard = [sysconfig.get_path(name, vars=_base_paths()) for name in ("stdlib", "platstdlib")]
    wanted = [os.path.realpath(path) for path in (*systems, *own, *standard)]
    folders = [path for path in dict.fromkeys(wanted) if Path(path).is_dir()]
    folders = [path for path in folders if not any(_is_below(path, each) for each in folders)]
    patterns = ("site-packages", "dist-packages", "python*/site-packages", "python*/dist-packages")
    masks = [str(mask) for path in folders for each in patterns for mask in Path(path).glob(each)]
    files = ["/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    return {
        "binds": [*folders, executable(), *filter(os.path.exists, files)],
        "masks": masks,
        "links": [
            (path, str(Path(path).readlink()))
            for path in ("/lib", "/lib64")
            if Path(path).is_symlink()
        ],
    }


def _base_paths() -> dict[str, str]:
    base = sys.base_prefix
    return {"base": base, "installed_base": base, "platbase": base, "installed_platbase": base}


def _is_below(path: str, folder: str) -> bool:
    return path != folder and path.startswith(folder + "/")

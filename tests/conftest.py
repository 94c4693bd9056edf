"""Parts that many tests share: the real models, loaded once, and the worlds with known answers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The same cases in every run, and none that fails because the machine was busy.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# Tests never reach for the network; models come from the wheels.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Consoles are as wide as their tables in a pipe; pytest's workers would have 80 columns.
os.environ.pop("COLUMNS", None)

# A shell that starts a job in the background has it ignore Ctrl-C; tests send that signal.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, each on any worker; the others a file a worker, which shares fixtures."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            slow = item.get_closest_marker("slow")
            group = item.nodeid if slow else item.nodeid.partition("::")[0]
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def smollm2() -> Iterator[object]:
    from mbrl_text_env.language_models import embedded

    return embedded()


@pytest.fixture(scope="session")
def minilm() -> Iterator[object]:
    from mbrl_text_env.language_models import embedded_encoder

    return embedded_encoder()


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For `MBRL_TEXT_ENV_CACHE`: the embedded model is a random Llama of one layer there.

    For what a program does with a policy, not for what it says; decoding takes a hundredth.
    """
    from mbrl_text_env.language_models import registry
    from tests.kills import make_model

    folder = tmp_path_factory.mktemp("cache") / registry.embedded_folder().name
    make_model(folder)
    (folder / registry._MARKER).write_text("{}", encoding="utf-8")
    return folder.parent


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project to build from."""
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__")
    folder = tmp_path_factory.mktemp("packaging") / "source"
    return shutil.copytree(Path(__file__).parents[1], folder, symlinks=True, ignore=ignored)


@pytest.fixture(scope="session")
def wheel(source: Path) -> Path:
    """The project's wheel, built."""
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return source / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs: first on the path, it is the package."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.unpack_archive(wheel, folder, "zip")
    return folder

"""Imports: cheap until a name is used, one-way between the packages, and complete."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mbrl_text_env

ROOT = Path(mbrl_text_env.__file__).parents[1]
HEAVY = (
    "torch",
    "transformers",
    "sentence_transformers",
    "sklearn",
    "scipy",
    "pandas",
    "pyarrow",
    "datasets",
    "stable_baselines3",
    "trl",
    "peft",
    "matplotlib",
    "rich",
)
PACKAGES = (
    "mbrl_text_env",
    "mbrl_text_env.language_models",
    "mbrl_text_env.rewards",
    "mbrl_text_env.agents",
)
MAY_IMPORT = {
    "mbrl_text_env": {"mbrl_text_env"},
    "agents": {"mbrl_text_env", "mbrl_text_env.agents"},
    "benchmarks": {"mbrl_text_env", "mbrl_text_env.agents", "mbrl_text_env.benchmarks"},
}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize(
    "statement",
    [
        "import mbrl_text_env",
        "import mbrl_text_env.rewards, mbrl_text_env.language_models",
        "from mbrl_text_env import Budget, Prompt, TextState, transition",
        "import gymnasium, mbrl_text_env; dir(mbrl_text_env); list(gymnasium.registry)",
        "import mbrl_text_env.agents",
    ],
)
def test_importing_loads_nothing_heavy(statement):
    loaded = loaded_by(statement)
    assert "numpy" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_command_line_loads_no_more_than_it_shows():
    loaded = loaded_by("import mbrl_text_env.benchmarks.cli")
    assert loaded & set(HEAVY) == {"pyarrow", "rich"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_resolves(package):
    module = importlib.import_module(package)
    assert module.__all__ == sorted(set(module.__all__))
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_name_is_an_attribute_error(package):
    module = importlib.import_module(package)
    with pytest.raises(AttributeError, match=rf"module '{package}' has no attribute 'nonsense'"):
        _ = module.nonsense
    assert not hasattr(module, "nonsense")


def test_a_star_import_gives_the_public_names():
    names: dict[str, object] = {}
    exec("from mbrl_text_env import *", names)  # noqa: S102 - a star import needs a namespace
    assert set(mbrl_text_env.__all__) <= set(names)


def test_the_version_is_a_number():
    assert [part.isdigit() for part in mbrl_text_env.__version__.split(".")] == [True] * 3


def room(module: str) -> str | None:
    """The package of ours that a module is in."""
    parts = module.split(".")
    if parts[0] in ("agents", "benchmarks"):  # the folders' names; nothing is imported by them
        return parts[0]
    if parts[0] != "mbrl_text_env":
        return None
    return ".".join(parts[:2]) if parts[1:2] in (["agents"], ["benchmarks"]) else parts[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package):
    for path in ROOT.joinpath(*package.split(".")).resolve().rglob("*.py"):
        own = room(".".join(path.relative_to(ROOT).parts))
        if own not in (package, package.rpartition(".")[2]):
            continue  # an unpacked source distribution has folders where the repository has links
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            ours = {room(name) for name in modules} - {None}
            assert ours <= MAY_IMPORT[package], f"{path}: line {node.lineno}"

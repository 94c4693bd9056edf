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
PACKAGES = ("mbrl_text_env", "mbrl_text_env.language_models", "mbrl_text_env.rewards", "agents")
MAY_IMPORT = {
    "mbrl_text_env": {"mbrl_text_env"},
    "agents": {"mbrl_text_env", "agents"},
    "benchmarks": {"mbrl_text_env", "agents", "benchmarks"},
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
        "import agents",
    ],
)
def test_importing_loads_nothing_heavy(statement):
    loaded = loaded_by(statement)
    assert "numpy" in loaded
    assert loaded.isdisjoint(HEAVY)


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


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            ours = {name.partition(".")[0] for name in modules} & set(MAY_IMPORT)
            assert ours <= MAY_IMPORT[package], f"{path}: line {node.lineno}"


class TestAnotherPackageOfTheSameName:
    """openai-agents, which verifiers requires, installs a package `agents` too."""

    def run(self, folder: Path, code: str) -> subprocess.CompletedProcess:
        (folder / "agents").mkdir()
        (folder / "agents" / "__init__.py").write_text("planner = 'not ours'\n")
        code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n{code}"
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder
        )

    def test_the_commands_find_ours(self, tmp_path):
        done = self.run(tmp_path, "import benchmarks.cli, agents; print(agents.BestOfN.name)")
        assert done.stdout == "best-of-n\n", done.stderr

    def test_one_that_is_imported_already_is_an_error_that_says_what_to_do(self, tmp_path):
        done = self.run(tmp_path, "import agents, benchmarks")
        assert done.returncode == 1
        assert "openai-agents has one of that name" in done.stderr
        assert "environment of its own" in done.stderr

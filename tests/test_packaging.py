"""What the metadata promises is what is tested, and the source distribution can test itself."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lower_bounds(requirements):
    found = [re.match(r"([\w-]+)>=([\w.]+)", requirement) for requirement in requirements]
    return {match[1].lower(): match[2] for match in found if match}


def release(version):
    """A version as numbers, without the zeros at its end: 1.26 and 1.26.0 are one release."""
    return re.sub(r"(\.0)+$", "", version)


def test_the_oldest_releases_are_the_lower_bounds():
    extras = PROJECT["optional-dependencies"]
    short = [r for name, rows in extras.items() if name not in ("test", "docs") for r in rows]
    promised = lower_bounds([*PROJECT["dependencies"], *short])
    pinned = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    assert {name: release(v) for name, v in promised.items()} == {
        name.removeprefix(" "): release(v) for name, v in pinned.items()
    }


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs the tests")
def test_a_file_is_one_workers(request):
    """Else each worker would make what a module's tests share; some releases do so silently."""
    assert request.node.nodeid.endswith("@tests/test_packaging.py")


def test_every_requirement_has_a_lower_bound():
    for requirement in PROJECT["dependencies"]:
        assert ">=" in requirement, requirement


def test_the_metadata_has_the_projects_addresses():
    assert {"Repository", "Documentation", "Changelog", "Issues"} <= set(PROJECT["urls"])


def test_the_source_distribution_holds_what_its_tests_need(source):
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(source / "dist" / done.stdout.splitlines()[-1]) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    needed = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "constraints.txt"]
    needed += ["constraints-oldest.txt", "pyproject.toml", "setup.cfg", "tests/short.txt"]
    folders = ("tests", "docs", "mbrl_text_env", "mbrl_text_env/agents", "mbrl_text_env/benchmarks")
    for folder in folders:
        paths = (path for path in (source / folder).rglob("*") if path.is_file())
        needed += [path.relative_to(source).as_posix() for path in paths]
    assert set(needed) <= held, sorted(set(needed) - held)


def test_the_wheel_holds_one_package_without_its_studies(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
    tops = {name.partition("/")[0] for name in held}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"mbrl_text_env"}
    assert {"mbrl_text_env/benchmarks/matched.py", "mbrl_text_env/data/shop.sql"} <= set(held)
    parts = {f"report.{kind}" for kind in ("css", "js", "html.jinja")}
    assert {f"mbrl_text_env/benchmarks/html/{part}" for part in parts} <= set(held)
    assert not [name for name in held if "/studies/" in name or "/tests/" in name]


def test_nothing_that_is_installed_imports_a_study():
    studies = "mbrl_text_env.benchmarks.studies"
    sources = [path for name in ("mbrl_text_env", "agents", "benchmarks") for path in code(name)]
    found = [path for path in sources if studies in path.read_text(encoding="utf-8")]
    assert found
    assert {path.parent.name for path in found} == {"studies"}


def code(folder):
    return [path for path in (ROOT / folder).rglob("*.py") if path.is_file()]

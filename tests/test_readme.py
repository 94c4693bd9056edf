"""Every code block of the documentation is run."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from mbrl_text_env.benchmarks import cli
from mbrl_text_env.benchmarks.llama_server import llama_server

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/environments.md",
    "docs/language_models.md",
    "docs/model-free.md",
    "docs/planners.md",
    "docs/rewards.md",
    "docs/self-training.md",
    "docs/values.md",
]


def blocks(language):
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        pattern = rf"^( *)```{language}\n(.*?)^\1```"
        for number, match in enumerate(re.finditer(pattern, text, re.MULTILINE | re.DOTALL)):
            indent = len(match[1])
            code = "\n".join(line[indent:] for line in match[2].splitlines())
            found.append(pytest.param(code, id=f"{page}-{number}"))
    return found


def commands():
    for block in blocks("console"):
        joined = block.values[0].replace("\\\n", " ")
        for line in joined.splitlines():
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    exec(compile(code, "documentation", "exec"), namespace)  # noqa: S102 our own documentation
    assert len(namespace) > 2


@pytest.mark.parametrize("words", [c for c in commands() if c[0] == "make"], ids=" ".join)
def test_make_targets(words):
    """The targets are known and say what they would run; running them here would recurse."""
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mbrl-text demo" in done.stdout or "pytest" in done.stdout


def smaller(words):
    """The same command with fewer and shorter responses."""
    small = {"--max-response-tokens": "12", "--budget-tokens": "50"}
    # What is fitted on the collected responses needs several prompts.
    small["--num-prompts"] = "2" if words[1] == "compare" else "8"
    words = [small.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if words[1] in ("collect", "compare") and "--max-response-tokens" not in words:
        words += ["--max-response-tokens", "12"]
    if words[1] == "compare" and "--num-prompts" not in words:
        words += ["--num-prompts", "2"]
    return words


def test_command_line(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    lines = [words for words in commands() if words[0] == "mbrl-text"]
    assert len(lines) >= 5
    with llama_server(threads=1) as url:
        for words in lines:
            # The documentation's addresses, one or several, all become that of a real server.
            words = [url if word.startswith("http://") else word for word in smaller(words)]
            result = CliRunner().invoke(cli.app, words[1:])
            assert result.exit_code == 0, f"{words}\n{result.output}"
    assert (tmp_path / "comparison" / "summary.json").exists()


def test_the_layout_names_what_is_there():
    layout = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folder = ROOT
    for line in re.search(r"```\n(.*?)```", layout, re.DOTALL)[1].splitlines():
        if not line.startswith(" "):
            folder = ROOT / line.split()[0]
            assert folder.is_dir()
        else:
            for name in re.findall(r"[\w./]+(?:\.py|/)(?=\s|$)", line):
                assert (folder / name).exists(), name

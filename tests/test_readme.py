"""Every code block of the documentation is run, with the package as its wheel installs it."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mbrl_text_env.benchmarks import cli
from mbrl_text_env.benchmarks.llama_server import llama_server
from mbrl_text_env.benchmarks.options import ModelOptions
from mbrl_text_env.language_models.registry import CACHE_VARIABLE
from tests.kills import make_model

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/article.md",
    "docs/index.md",
    "docs/installation.md",
    "docs/quickstart.md",
    "docs/first-steps.md",
    "docs/gallery.md",
    "docs/environments.md",
    "docs/language_models.md",
    "docs/model-free.md",
    "docs/planners.md",
    "docs/reports.md",
    "docs/rewards.md",
    "docs/sandbox.md",
    "docs/self-training.md",
    "docs/serving.md",
    "docs/values.md",
    "docs/world_models.md",
]
# What a newcomer runs first, and planners, whose compute is bought in FLOPs. The policy of other
# pages is a random one, which takes a third of the time; the same agents, rewards and trainings
# have the embedded model in tests of their own.
ON_THE_EMBEDDED_MODEL = (
    "README.md",
    "docs/index.md",
    "docs/quickstart.md",
    "docs/first-steps.md",
    "docs/environments.md",
    "docs/planners.md",
)


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


def python(installed, folder, *arguments, **environment):
    """Python in a folder that is not the repository, on the installed package."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page in {b.id.rpartition("-")[0] for b in blocks("python")}]
)
def test_python(page, installed, small_cache, tmp_path):
    """The blocks of a page, each by itself, in one process."""
    small = {} if page in ON_THE_EMBEDDED_MODEL else {CACHE_VARIABLE: str(small_cache)}
    codes = [b.values[0] for b in blocks("python") if b.id.rpartition("-")[0] == page]
    program = (
        "import json, mbrl_text_env, sys\n"
        "for number, code in enumerate(json.load(open('blocks.json'))):\n"
        "    print('block', number, flush=True)\n"
        "    exec(compile(code, f'block-{number}', 'exec'), {'__name__': 'page'})\n"
        "print(mbrl_text_env.__file__)\n"
    )
    (tmp_path / "blocks.json").write_text(json.dumps(codes), encoding="utf-8")
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    done = python(installed, tmp_path, "program.py", **small)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1].startswith(str(installed))


@pytest.mark.parametrize("words", [c for c in commands() if c[0] == "make"], ids=" ".join)
def test_make_targets(words):
    """The targets are known and say what they would run; running them here would recurse."""
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mbrl-text demo" in done.stdout or "pytest" in done.stdout


def smaller(words):
    """The same command with fewer and shorter responses."""
    small = {
        # What the small model computes for about as many tokens as are bought in the example.
        "--budget-flops": "2e9",
        "--max-response-tokens": "12",
        "--budget-tokens": "50",
        "--steps": "1",
        "--samples": "4",
    }
    # What is fitted on the collected responses needs several prompts.
    small["--num-prompts"] = "2" if words[1] == "compare" else "8"
    words = [small.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if (
        words[1] in ("article", "collect", "compare", "train")
        and "--max-response-tokens" not in words
    ):
        words += ["--max-response-tokens", "12"]
    if words[1] == "compare" and "--num-prompts" not in words:
        words += ["--num-prompts", "2"]
    if words[1] == "train":
        sizes = {"prompts_per_step": 1, "num_generations": 4, "batch_size": 4}
        words += [word for pair in sizes.items() for word in ("--set", "{}={}".format(*pair))]
    if words[1] == "compare" and not any(word.startswith("--budget") for word in words):
        words += ["--budget-tokens", "50"]
    return words


@pytest.mark.slow
def test_command_line(small_cache, tmp_path, monkeypatch):
    """On a small random model; `benchmarks/test_cli.py` and the notebook have the embedded one."""
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, str(small_cache))
    # Each model is loaded once, not by every command.
    monkeypatch.setattr(ModelOptions, "load", functools.cache(ModelOptions.load))
    # The prompts and the rewards of the quickstart and the first steps.
    for code in (b.values[0] for b in blocks("python")):
        if "write_text(" in code:
            subprocess.run([sys.executable, "-c", code], check=True)
    lines = [words for words in commands() if words[0] == "mbrl-text"]
    assert len(lines) >= 5
    with llama_server(threads=1) as url:
        for words in lines:
            # The documentation's addresses, one or several, all become that of a real server.
            words = [url if word.startswith("http://") else word for word in smaller(words)]
            result = CliRunner().invoke(cli.app, words[1:])
            assert result.exit_code == 0, f"{words}\n{result.output}"
    assert (tmp_path / "comparison" / "summary.json").exists()


@pytest.mark.slow
def test_the_site(tmp_path):
    """Links, anchors and the reference."""
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    agents = (tmp_path / "site" / "reference" / "agents.html").read_text(encoding="utf-8")
    assert 'id="mbrl_text_env.agents.beam.Adaptive"' in agents


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


@pytest.mark.slow
def test_a_new_reward_and_a_new_agent_are_one_file_each(installed, tmp_path):
    """The examples of CONTRIBUTING and of the page on planners; no other file is touched."""
    package = shutil.copytree(installed, tmp_path / "branch") / "mbrl_text_env"
    reward, agent = (
        b.values[0] for b in blocks("python") if b.id in ("CONTRIBUTING.md-0", "CONTRIBUTING.md-1")
    )
    [planner] = [b.values[0] for b in blocks("python") if "class Deepening(Planner)" in b.values[0]]
    (package / "rewards" / "verifiable" / "punctuation.py").write_text(f'"""A reward."""\n{reward}')
    (package / "agents" / "best_of_eight.py").write_text(f'"""An agent."""\n{agent}')
    (package / "agents" / "deepening.py").write_text(f'"""A planner."""\n{planner}')
    words = "compare --agents best-of-eight,deepening --reward punctuation --num-prompts 2 --seed 0"
    words += " --budget-tokens 100 --max-response-tokens 12 --out comparison --language-model model"
    make_model(tmp_path / "model")
    program = (
        "import sys\n"
        "from mbrl_text_env.benchmarks.cli import app\n"
        "from mbrl_text_env.checks import check_reward_model\n"
        "from mbrl_text_env.rewards import make\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "check_reward_model(make('punctuation'))\n"
    )
    done = python(package.parent, tmp_path, "-c", program, *words.split())
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    summary = json.loads((tmp_path / "comparison" / "summary.json").read_text(encoding="utf-8"))
    assert {row["agent"] for row in summary["agents"]} == {"best-of-eight", "deepening"}

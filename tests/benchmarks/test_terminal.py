"""What the command line prints, and how it ends when a user has made a mistake."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mbrl_text_env import Prompt
from mbrl_text_env.benchmarks import terminal
from mbrl_text_env.benchmarks.cli import app
from mbrl_text_env.benchmarks.options import ModelOptions
from mbrl_text_env.benchmarks.terminal import PlainConsole, panel, plain, progress_bar, visible
from mbrl_text_env.language_models.registry import CACHE_VARIABLE, cache_folder
from mbrl_text_env.rewards import RewardError, RewardSpecError, make
from tests.language_models.conftest import make_config, save_model, train_tokenizer

RUN = CliRunner()
SMALL = ["--max-response-tokens", "4", "--num-prompts", "1", "--agents", "sampling"]
HOSTILE = "[red]a[/red] :x: \x1b[31mb\x07\rc \u202ed\x9b [/] \\[e]"


def run(*words):
    done = RUN.invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def printed(*objects, width=None):
    console = PlainConsole()
    console.file = io.StringIO()
    if width:
        console.width = width
    console.print(*objects)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model without a chat template."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tokenizer = train_tokenizer(chat_template=None)
    save_model(folder, make_config("llama", tokenizer.eos_token_id), tokenizer, 0)
    return folder


def jsonl(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


class TestDoor:
    def test_controls_are_escapes(self):
        shown = visible(HOSTILE)
        assert shown == r"[red]a[/red] :x: \x1b[31mb\x07\rc \u202ed\x9b [/] \[e]"
        assert visible("tab\tline\n日本語 🙂\r\n") == "tab\tline\n日本語 🙂\n"
        assert visible("\ud83d\u2028") == r"\ud83d\u2028"

    @pytest.mark.parametrize("make_it", [str, plain, lambda text: panel(text, text, text)])
    def test_nothing_is_markup(self, make_it):
        found = printed(make_it(HOSTILE))
        assert visible(HOSTILE) in found
        assert not {"\x1b", "\x07", "\r", "\u202e", "\x9b"} & set(found)

    def test_titles_are_not_cut_while_there_is_room(self):
        found = printed(panel("x", "above " * 9 + "END", "below " * 30 + "END"))
        assert "above END" in found
        assert "below END" in found
        assert max(map(len, printed(panel("x", "a" * 90, "b" * 90), width=60).splitlines())) == 60

    def test_a_string_is_one_line(self):
        path = "/folder/" * 60
        assert printed(path, width=40) == path + "\n"

    @pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}])
    def test_tables_are_not_cut_in_a_pipe(self, tmp_path, monkeypatch, variables):
        monkeypatch.delenv("COLUMNS", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        text = "word " * 80 + "END"
        done = run("prompts", "--source", jsonl(tmp_path / "p.jsonl", text))
        assert text in done.output
        monkeypatch.setenv("COLUMNS", "60")
        done = run("prompts", "--source", tmp_path / "p.jsonl")
        assert max(len(line) for line in done.output.splitlines()) == 60


def test_a_reader_that_goes_is_no_traceback():
    command = f"{sys.executable} -m mbrl_text_env.benchmarks.cli prompts --limit 700 | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "775 prompts" in done.stdout
    assert (done.returncode, done.stderr) == (1, "")


class TestMistakes:
    @pytest.mark.parametrize("text", ["", " \n", os.fsdecode(b"caf\xe9")])
    def test_prompts_that_are_none(self, text, base):
        done = run("search", text, "--language-model", base)
        assert done.exit_code == 2
        assert "PROMPT" in done.output

    def test_usage(self):
        for words in (["nonsense"], ["compare", "--nonsense"], ["compare", "--seed", "x"]):
            done = run(*words)
            assert done.exit_code == 2
            assert "--help" in done.output
            assert len(done.output.splitlines()) == 1

    def test_files_and_folders(self, base, tmp_path):
        (tmp_path / "latin.jsonl").write_bytes(b"caf\xe9\n")
        (tmp_path / "file").write_text("x")
        plain_model = ["--language-model", base, "--plain-prompts", "--budget-tokens", 8]
        plain_model += ["--max-response-tokens", 4]
        for words, told in (
            (["compare", "--prompts", tmp_path / "none.jsonl"], "none.jsonl"),
            (["compare", "--prompts", tmp_path], ".jsonl or .csv"),
            (["compare", "--prompts", tmp_path / "latin.jsonl"], "UTF-8"),
            (["compare", "--language-model", tmp_path, *SMALL], "ModelLoadError"),
            (["compare", "--reward", f"{tmp_path}/none.py:f"], "there is no file"),
            (["fit", "--records", tmp_path / "none", "--out", tmp_path / "v"], "none"),
            (["search", "Hi", *plain_model, "--json", tmp_path], "--json: expected a file"),
            (["search", "Hi", *plain_model, "--picture", tmp_path], "--picture: expected a file"),
            (["collect", "--language-model", base, "--plain-prompts", "--num-prompts", "1",
              "--out", tmp_path / "file"], "can be written"),
            (["compare", "--language-model", base, "--plain-prompts", *SMALL,
              "--out", tmp_path / "file" / "a"], "can be written"),
        ):  # fmt: skip
            done = run(*words)
            assert done.exit_code == 2, (words, done.output)
            assert told in done.output

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["--seed", -1], "--seed"),
            (["--reward-timeout", "inf"], "--reward-timeout"),
            (["--agents", "best-of-n:n=inf"], "n=inf"),
            (["--agents", "best-of-n:n=2.5"], "whole number"),
            (["--agents", "lookahead:prefix_tokens=nan"], "prefix_tokens=nan"),
        ],
    )
    def test_numbers_that_are_none(self, words, told, base, tmp_path):
        small = ["compare", "--language-model", base, "--plain-prompts", *SMALL]
        done = run(*small, *words, "--out", tmp_path / "out")
        assert done.exit_code == 2, done.output
        assert told in done.output

    def test_a_cache_that_cannot_be_written_names_the_setting(self, monkeypatch):
        monkeypatch.setenv(CACHE_VARIABLE, "/proc/none")
        with pytest.raises(ValueError, match=CACHE_VARIABLE):
            ModelOptions().load()

    def test_the_cache_folder_may_begin_at_home(self, monkeypatch):
        monkeypatch.setenv(CACHE_VARIABLE, "~/models")
        assert cache_folder() == Path.home() / "models"
        monkeypatch.setenv(CACHE_VARIABLE, " ")
        assert cache_folder().name == "mbrl-text-env"


class TestPrompts:
    def test_a_model_without_a_template(self, base, tmp_path):
        words = ["compare", "--language-model", base, *SMALL, "--out", tmp_path / "out"]
        done = run(*words)
        assert done.exit_code == 2
        assert "--plain-prompts" in done.output
        done = run(*words, "--plain-prompts")
        assert done.exit_code == 0, done.output

    def test_a_filter_that_leaves_nothing_names_the_option(self, tmp_path):
        file = tmp_path / "p.jsonl"
        file.write_text(json.dumps({"text": "One.", "split": "train", "kind": "a"}) + "\n")
        done = run("compare", "--prompts", file, "--out", tmp_path / "out")
        assert done.exit_code == 2
        assert "--split all" in done.output
        for source in (file, "builtin"):
            done = run("prompts", "--source", source, "--kind", "nonsense")
            assert done.exit_code == 2
            assert "--kind" in done.output
        done = run("prompts", "--source", "reasoning-gym:chain_sum", "--kind", "nonsense")
        assert done.exit_code == 2
        assert "chain_sum" in done.output

    def test_an_audit_of_fewer_prompts_than_asked_for(self, base, tmp_path):
        file = jsonl(tmp_path / "p.jsonl", *"abcd")
        words = ["--language-model", base, "--plain-prompts", "--prompts", file, "--split", "all"]
        words += ["--max-response-tokens", 4, "--samples", 4, "--sensitivity-samples", 1]
        (tmp_path / "r.py").write_text("def f(prompt, response): return float(len(response))\n")
        rewards = ["--proxy", f"{tmp_path}/r.py:f", "--gold", "sentiment"]
        done = run("reward", "audit", *rewards, *words, "--out", tmp_path / "out")
        assert "4 prompts of" in done.output
        assert "num_prompts" not in done.output

    def test_fewer_prompts_than_asked_for(self, base, tmp_path):
        file = jsonl(tmp_path / "p.jsonl", "One.", "Two.")
        words = ["compare", "--language-model", base, "--plain-prompts", "--prompts", file]
        words += ["--split", "all", "--agents", "sampling", "--max-response-tokens", 4]
        done = run(*words, "--num-prompts", 5, "--out", tmp_path / "out")
        assert done.exit_code == 0, done.output
        assert "2 prompts of" in done.output
        assert "--num-prompts asks for 5" in done.output

    def test_a_prompt_that_is_too_long_costs_itself(self, base, tmp_path):
        file = jsonl(tmp_path / "p.jsonl", "One.", "Two. " * 4000)
        words = ["--language-model", base, "--plain-prompts", "--prompts", file, "--split", "all"]
        words += ["--num-prompts", 2, "--max-response-tokens", 4]
        done = run("compare", *words, "--agents", "sampling", "--out", tmp_path / "out")
        assert done.exit_code == 1, "not all was done"
        assert "Left out: Prompt 'p-2'" in done.output
        assert "1 of 2 prompts are too long" in done.output
        done = run("collect", *words, "--out", tmp_path / "records", "--samples", 1)
        assert done.exit_code == 1, "not all was done"
        assert "1 responses to 1 prompts added" in done.output


class TestRewardFiles:
    def test_dataclasses_and_neighbours(self, tmp_path):
        (tmp_path / "a_neighbour_of_it.py").write_text("K = 2.0\n")
        (tmp_path / "mine.py").write_text(
            "from __future__ import annotations\n"
            "from dataclasses import dataclass\n"
            "from a_neighbour_of_it import K\n"
            "@dataclass\n"
            "class Brevity:\n"
            "    scale: float = K\n"
            "    name: str = 'brevity'\n"
            "    def score(self, prompts, responses):\n"
            "        return [self.scale / (1 + len(r)) for r in responses]\n"
        )
        assert make(f"{tmp_path}/mine.py:Brevity").scale == 2.0

    def test_files_of_one_name(self, tmp_path):
        for folder, value in (("a", 1.0), ("b", 2.0)):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "r.py").write_text(f"def f(prompt, response): return {value}\n")
        first, second = (make(f"{tmp_path}/{folder}/r.py:f") for folder in ("a", "b"))
        prompt = Prompt.from_text("x")
        assert [r.score([prompt], ["y"])[0] for r in (first, second)] == [1.0, 2.0]

    def test_neighbours_of_one_name(self, tmp_path):
        for folder, value in (("a", 1.0), ("b", 2.0)):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "shared_name_beside.py").write_text(f"K = {value}\n")
            code = "from shared_name_beside import K\ndef f(prompt, response): return K\n"
            (tmp_path / folder / "r.py").write_text(code)
        rewards = [make(f"{tmp_path}/{folder}/r.py:f") for folder in ("a", "b", "a")]
        prompt = Prompt.from_text("x")
        assert [r.score([prompt], ["y"])[0] for r in rewards] == [1.0, 2.0, 1.0]

    def test_paths(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "a+b*c").mkdir()
        (tmp_path / "a+b*c" / "r.py").write_text("def f(prompt, response): return 1.0\n")
        assert make("~/a+b*c/r.py:f").name == make(f"{tmp_path}/a+b*c/r.py:f").name == "f"
        (tmp_path / "d.py").mkdir()
        for spec, told in (("d.py:f", "is a folder"), ("r.py", "name of a function")):
            with pytest.raises(RewardSpecError, match=told):
                make(f"{tmp_path}/{spec}")

    def test_errors_name_the_line(self, tmp_path):
        (tmp_path / "r.py").write_text("x = 1\n\nraise KeyError('k')\n")
        with pytest.raises(RewardSpecError, match=r"r\.py, line 3\)"):
            make(f"{tmp_path}/r.py:f")
        code = "def f(prompt, response):\n    return g()\ndef g():\n    return {}['k']\n"
        (tmp_path / "q.py").write_text(code)
        with pytest.raises(RewardError, match=r"q\.py, line 4\)"):
            make(f"{tmp_path}/q.py:f").score([Prompt.from_text("x")], ["y"])

    @pytest.mark.parametrize(
        ("code", "told"),
        [("def f(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError"), ("x = 1", "has no 'f'"),
         ("import sys; sys.exit(0)", "SystemExit"),
         ("class End(BaseException): pass\nraise End", "End")],
    )  # fmt: skip
    def test_broken_ones(self, tmp_path, code, told):
        (tmp_path / "r.py").write_text(code)
        with pytest.raises(RewardSpecError, match=told):
            make(f"{tmp_path}/r.py:f")

    def test_a_value_for_its_records(self, base, tmp_path):
        (tmp_path / "r.py").write_text("def mine(prompt, response): return float(len(response))\n")
        spec, records = f"{tmp_path}/r.py:mine", tmp_path / "records"
        model = ["--language-model", base]
        file = jsonl(tmp_path / "p.jsonl", *"abcdef")
        words = ["--prompts", file, "--split", "all", "--num-prompts", 6, "--plain-prompts"]
        words += ["--max-response-tokens", 8, *model]
        done = run("collect", "--reward", spec, "--out", records, *words)
        assert done.exit_code == 0, done.output
        fit = ["fit", "--records", records, "--out", tmp_path / "value", *model]
        done = run(*fit, "--kind", "hidden-state")
        assert done.exit_code == 0, done.output
        done = run(*fit, "--kind", "calibrated")
        assert done.exit_code == 2
        assert "pass --reward" in done.output
        done = run(*fit, "--kind", "calibrated", "--reward", spec)
        assert done.exit_code == 0, done.output
        done = run(*fit, "--kind", "calibrated", "--reward", "sentiment")
        assert done.exit_code == 2
        assert "scored by 'mine'" in done.output


@pytest.mark.parametrize(
    ("package", "extra", "code"),
    [
        ("httpx", "server", "from mbrl_text_env.language_models import ServerLM"),
        ("stable_baselines3", "rl", "from mbrl_text_env.agents.model_free import train_ppo"),
        ("peft", "train", "from mbrl_text_env._lazy import optional; optional('peft', ValueError)"),
    ],
)  # fmt: skip
def test_a_missing_package_names_the_extra(package, extra, code):
    code = f"import sys; sys.modules[{package!r}] = None\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 1
    assert f"pip install 'mbrl-text-env[{extra}]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_lines_where_there_is_no_terminal(is_terminal, monkeypatch):
    monkeypatch.setattr(terminal, "_LINE_SECONDS", 0.0)
    console = PlainConsole()
    console.file, console._force_terminal = io.StringIO(), is_terminal
    with progress_bar(console) as bar:
        task = bar.add_task("Doing [red]", total=3)
        bar.advance(task)
        bar.refresh()
    lines = console.file.getvalue().splitlines()
    assert ("Doing [red]: 1 of 3, 0 s" in lines) != is_terminal

"""Folders of results, and what tells the parts of a run from others."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mbrl_text_env.files import write_folder, write_text
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.rewards import (
    ExactMatchReward,
    RewardError,
    TimeLimit,
    WeightedSum,
    as_reward_model,
    make,
)
from mbrl_text_env.rewards.base import score_responses
from mbrl_text_env.runs import claimed, folder_digest, identity, prompt_digest
from mbrl_text_env.types import Message, Prompt
from mbrl_text_env.values import ValueModelError, predict_values
from tests.toys import PROMPTS, CountReward, FixedValue


class RunError(ValueError):
    pass


def claim(folder, record, grows=()):
    with claimed(folder, record, "run", RunError, grows=grows):
        pass


class TestClaimed:
    def test_another_run_is_refused_with_what_differs(self, tmp_path):
        claim(tmp_path / "a", {"seed": 0, "lm": {"name": "x", "weights": "1"}})
        claim(tmp_path / "a", {"lm": {"weights": "1", "name": "x"}, "seed": 0})
        with pytest.raises(RunError, match=r"another run \(lm.weights: 1 there, 2 here\)"):
            claim(tmp_path / "a", {"seed": 0, "lm": {"name": "x", "weights": "2"}})
        with pytest.raises(RunError, match="null there, 1 here"):
            claim(tmp_path / "a", {"seed": 0, "lm": {"name": "x", "weights": "1"}, "top_k": 1})

    def test_entries_are_added_and_never_changed(self, tmp_path):
        def prompts(**digests):
            claim(tmp_path, {"seed": 0, "prompts": digests}, grows=["prompts"])
            return json.loads((tmp_path / "config.json").read_text())["prompts"]

        assert prompts(a="1") == {"a": "1"}
        assert prompts(b="2", a="1") == {"a": "1", "b": "2"}
        assert prompts(b="2") == {"a": "1", "b": "2"}
        with pytest.raises(RunError, match=r"prompts.a: 1 there, 3 here"):
            prompts(a="3", c="4")
        assert prompts(b="2") == {"a": "1", "b": "2"}

    @pytest.mark.parametrize("text", ["", '{"seed": 0', "[]", "\x00" * 20])
    def test_a_damaged_config_is_told(self, tmp_path, text):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(RunError, match=r"config.json: expected a whole JSON object"):
            claim(tmp_path, {"seed": 0})

    def test_what_killed_writers_left_is_removed(self, tmp_path):
        (tmp_path / "parts").mkdir()
        left = [
            tmp_path / ".config.json-0123456789ab",
            tmp_path / "parts" / ".x.jsonl-0123456789ab",
        ]
        (tmp_path / ".value-0123456789ab").mkdir()
        for path in left:
            path.write_text("{")
        write_text(tmp_path / "config.json", '{"seed": 0}')
        claim(tmp_path, {"seed": 0})
        assert sorted(p.name for p in tmp_path.rglob("*")) == [".lock", "config.json", "parts"]

    def test_scratch_alone_is_an_empty_folder(self, tmp_path):
        (tmp_path / ".config.json-0123456789ab").write_text("{")
        claim(tmp_path, {"seed": 0})

    def test_other_files_and_files(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(RunError, match="other files"):
            claim(tmp_path, {"seed": 0})
        with pytest.raises(RunError, match="can be written"):
            claim(tmp_path / "thesis.tex" / "out", {"seed": 0})
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_one_process_at_a_time(self, tmp_path):
        code = (
            "import sys\n"
            "from tests.test_runs import RunError, claim\n"
            "try: claim(sys.argv[1], {'seed': 0})\n"
            "except RunError as error: print(error)\n"
        )
        with claimed(tmp_path, {"seed": 0}, "run", RunError):
            done = subprocess.run(
                [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
            )
        assert "another process works on this run" in done.stdout


def test_prompts_differ_by_content_and_metadata():
    prompts = [
        Prompt.from_text("a"),
        Prompt.from_text("b"),
        Prompt.from_text("a", chat=False),
        Prompt("a", (Message("system", "a"),)),
        Prompt.from_text("a", metadata={"reference_answer": "1"}),
        Prompt.from_text("a", metadata={"reference_answer": "2"}),
        Prompt.from_text("a", split="test"),
    ]
    assert len(set(map(prompt_digest, prompts))) == len(prompts)
    assert prompt_digest(Prompt.from_text("a", "x")) == prompt_digest(prompts[0])


class TestIdentity:
    def test_settings_count(self):
        models = [NGramLM("abc"), NGramLM("abd"), NGramLM("abc", seed=1), NGramLM("abc", order=1)]
        rewards = [
            ExactMatchReward(),
            ExactMatchReward("Answer:"),
            WeightedSum([CountReward(), ExactMatchReward()], [1, 2]),
            WeightedSum([CountReward(), ExactMatchReward()], [1, 3]),
            CountReward("a"),
            CountReward("b"),
        ]
        found = [json.dumps(identity(part)) for part in (*models, *rewards)]
        assert len(set(found)) == len(found)
        assert found == [json.dumps(identity(part)) for part in (*models, *rewards)]

    def test_use_does_not_change_it(self):
        reward, lm = CountReward(), NGramLM("abc")
        before = identity(reward), identity(lm)
        score_responses(reward, PROMPTS[:1], ["abc"])
        lm.decode([1])
        assert (identity(reward), identity(lm)) == before

    def test_a_time_limit_is_that_of_its_reward(self):
        assert identity(TimeLimit(CountReward(), 1)) == identity(CountReward())

    @pytest.mark.parametrize("form", ["function", "class"])
    def test_the_code_of_a_file_counts(self, tmp_path, form):
        path = tmp_path / f"mine_{form}.py"
        texts = {
            "function": "A = {}\ndef f(prompt, response): return A\n",
            "class": "class f:\n  name = 'f'\n  def score(self, p, r): return [{}.0] * len(r)\n",
        }
        found = set()
        for number in (1, 2, 1):
            path.write_text(texts[form].format(number))
            found.add(json.dumps(identity(make(f"{path}:f"))))
        assert len(found) == 2

    def test_the_code_that_a_file_imports_from_its_folder_counts(self, tmp_path, monkeypatch):
        (tmp_path / "mine_main.py").write_text(
            "import mine_helper\ndef f(prompt, response): return mine_helper.g()\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        found = set()
        for number in (1, 2):
            (tmp_path / "mine_helper.py").write_text(f"def g(): return {number}\n")
            found.add(json.dumps(identity(make(f"{tmp_path}/mine_main.py:f"))))
        assert len(found) == 2

    def test_numbers_that_a_file_imports_count(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "path", list(sys.path))
        (tmp_path / "mine_rooms").mkdir()
        (tmp_path / "mine_weights.py").write_text("from mine_rooms.deep import WEIGHT\n")
        (tmp_path / "mine_judge.py").write_text(
            "from mine_weights import WEIGHT\ndef f(prompt, response): return WEIGHT\n"
        )
        found = set()
        for number in (1, 2, 1):
            (tmp_path / "mine_rooms" / "deep.py").write_text(f"WEIGHT = {number}\n")
            found.add(json.dumps(identity(make(f"{tmp_path}/mine_judge.py:f"))))
        assert len(found) == 2

    def test_what_a_function_holds_counts(self):
        def weighed(weight):
            return as_reward_model(lambda prompt, response: weight * len(response))

        def scaled(prompt, response, *, weight):
            return weight * len(response)

        assert identity(weighed(1.0)) == identity(weighed(1.0)) != identity(weighed(2.0))
        one, two = (identity(functools.partial(scaled, weight=w)) for w in (1, 2))
        assert one != two

    def test_weights_count(self):
        import torch

        layer = torch.nn.Linear(3, 2)
        before = identity(layer)
        assert identity(layer) == before
        with torch.no_grad():
            layer.weight[1, 2] += 1e-6
        assert identity(layer) != before
        assert identity(np.arange(3)) != identity(np.arange(3.0)) != identity(np.arange(4.0))

    def test_number_formats_and_devices(self):
        import torch

        parts = (torch.float32, torch.int8, torch.device("cpu"), torch.device("cuda", 1))
        found = [identity(functools.partial(print, part)) for part in parts]
        assert len({json.dumps(each) for each in found}) == len(parts)

    def test_a_language_model_that_was_trained_is_another(self, tmp_path):
        import torch

        from mbrl_text_env.language_models import TransformersLM
        from tests.kills import make_model

        make_model(tmp_path)
        lm = TransformersLM(tmp_path)
        before = identity(lm)
        assert identity(TransformersLM(tmp_path)) == before
        assert identity(TransformersLM(tmp_path, dtype=torch.bfloat16)) != before
        with torch.no_grad():
            lm.model.lm_head.weight[0, 0] += 1
        assert identity(lm) != before

    def test_folders_count_by_content(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        before = folder_digest(tmp_path)
        (tmp_path / ".lock").touch()
        assert folder_digest(tmp_path) == before
        assert identity(str(tmp_path)) == {"folder": before}
        (tmp_path / "config.json").write_text("{ }")
        assert folder_digest(tmp_path) != before


def closed():
    raise GeneratorExit


@pytest.mark.parametrize("leave", [sys.exit, lambda: sys.exit(3), closed])
def test_a_reward_that_leaves_the_program_is_an_error(leave):
    class Leaving(CountReward):
        def score(self, prompts, responses):
            leave()

    for reward in (
        Leaving(),
        as_reward_model(lambda prompt, response: leave()),
        TimeLimit(Leaving(), 9),
    ):
        with pytest.raises(RewardError, match=r"'ab'.*'some text'"):
            score_responses(reward, PROMPTS[:1], ["some text"])


def test_a_reward_is_stopped_by_ctrl_c():
    class Stopped(CountReward):
        def score(self, prompts, responses):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_responses(Stopped(), PROMPTS[:1], ["text"])


def test_a_value_that_leaves_the_program_is_an_error():
    from mbrl_text_env.mdp import initial

    lm = NGramLM("abc")
    value = FixedValue(lambda text: sys.exit(0), lm)
    with pytest.raises(ValueModelError, match=r"FixedValue.*'ab'"):
        predict_values(value, [initial(PROMPTS[0], lm)])


class TestReplacedFolders:
    """Where two names cannot be exchanged at once."""

    @pytest.fixture(autouse=True)
    def no_exchange(self, monkeypatch):
        monkeypatch.setattr("mbrl_text_env.files._exchange", lambda one, other: False)

    def test_the_new_one_takes_its_place(self, tmp_path):
        for text in ("old", "new"):
            with write_folder(tmp_path / "x") as scratch:
                (scratch / "a").write_text(text)
        assert (tmp_path / "x" / "a").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    def test_a_kill_between_the_two_renames(self, tmp_path):
        from mbrl_text_env.files import recover_folder

        target = tmp_path / "x"
        with write_folder(target) as scratch:
            (scratch / "a").write_text("old")
        target.rename(tmp_path / ".x.old")
        recover_folder(target)
        assert (target / "a").read_text() == "old"


def test_a_folder_is_there_at_each_moment(tmp_path):
    """Another process sees the old folder or the new one, however often it looks."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from mbrl_text_env.files import write_folder\n"
        "print(flush=True)\n"
        "for i in range(40):\n"
        "    with write_folder(sys.argv[1]) as scratch:\n"
        "        (scratch / 'a').write_text(str(i))\n"
    )
    target = tmp_path / "x"
    with write_folder(target) as scratch:
        (scratch / "a").write_text("first")
    with subprocess.Popen([sys.executable, "-c", code, target], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        while writer.poll() is None:
            assert target.is_dir()
    assert (target / "a").read_text() == "39"
    assert [path.name for path in Path(tmp_path).iterdir()] == ["x"]

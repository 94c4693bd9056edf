"""Rewards by name."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap

import pytest

import mbrl_text_env.rewards
from mbrl_text_env.rewards import registry as names
from mbrl_text_env.rewards.base import RewardModel, score_responses
from mbrl_text_env.rewards.composite.combinators import WeightedSum
from mbrl_text_env.rewards.composite.transforms import Clip
from mbrl_text_env.rewards.evaluators.classifier import ClassifierReward
from mbrl_text_env.rewards.evaluators.relevance import RelevanceReward
from mbrl_text_env.rewards.evaluators.sentiment import SentimentReward
from mbrl_text_env.rewards.registry import (
    RewardSpecError,
    available,
    descriptions,
    make,
    register,
)
from mbrl_text_env.rewards.verifiable.constraints import ConstraintsReward
from mbrl_text_env.types import Prompt


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("sentiment", SentimentReward),
        ("relevance", RelevanceReward),
        ("constraints", ConstraintsReward),
    ],
)
def test_names(name, cls):
    assert name in available()
    assert isinstance(make(name), cls)
    assert make(name).name == name


def test_classifiers_read_the_articles_text_format(classifiers):
    reward = make(f"classifier:{classifiers['deberta']}")
    assert isinstance(reward, ClassifierReward)
    assert reward.text_format == "article"
    prompts, responses = [Prompt.from_text("Why?")], ["The sky is blue."]
    expected = ClassifierReward(classifiers["deberta"], text_format="article")
    assert reward.score(prompts, responses) == expected.score(prompts, responses)
    hub = make("classifier:OpenAssistant/reward-model-deberta-v3-large-v2")
    assert hub.name == "reward-model-deberta-v3-large-v2"


@pytest.mark.parametrize(
    ("spec", "weights", "name"),
    [
        ("0.5*sentiment+0.5*relevance", (0.5, 0.5), "0.5*sentiment+0.5*relevance"),
        ("sentiment+relevance", (1.0, 1.0), "sentiment+relevance"),
        (" 2 * sentiment + relevance ", (2.0, 1.0), "2*sentiment+relevance"),
        ("sentiment+-0.1*relevance", (1.0, -0.1), "sentiment+-0.1*relevance"),
        ("2*sentiment", (2.0,), "2*sentiment"),
        ("sentiment+3*classifier:owner/name", (1.0, 3.0), "sentiment+3*name"),
    ],
)
def test_weighted_sums(spec, weights, name):
    reward = make(spec)
    assert isinstance(reward, WeightedSum)
    assert reward.weights == weights
    assert reward.name == name


def test_a_weighted_sum_scores():
    prompt = Prompt.from_text("Hi", metadata={"constraints": [{"type": "max_words", "value": 3}]})
    scores = score_responses(make("2*sentiment+constraints"), [prompt], ["It was good."])
    assert scores.total.tolist() == [pytest.approx(2 * 0.4404 + 1)]
    assert scores.parts_of(0) == {"sentiment": 0.4404, "constraints": 1.0}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sentimet", "got 'sentimet'. Did you mean 'sentiment'.* Choose one of .*'relevance'"),
        ("sentiment+relevanse", "got 'relevanse'. Did you mean 'relevance'"),
        ("classifier", "got 'classifier'. Did you mean 'classifier.* 'classifier:NAME_OR_FOLDER'"),
        ("classifier:", "got 'classifier:'. Did you mean"),
        ("zzz", "got 'zzz'. Choose one of"),
        ("", "got ''. Choose one of"),
        ("sentiment+", "got ''"),
        ("half*sentiment", "expected a number before '\\*', as in '0.5\\*sentiment', got 'half'"),
        ("nan*sentiment", "'nan\\*sentiment': Expected finite weights"),
        ("sentiment+0.5*sentiment", "a unique name for each reward"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_helps(spec, message):
    with pytest.raises(RewardSpecError, match=message) as caught:
        make(spec)
    assert isinstance(caught.value, ValueError)


def test_every_name_has_a_description_of_one_line():
    assert list(descriptions()) == available()
    for description in descriptions().values():
        assert description.endswith(".")
        assert "\n" not in description


def test_public_names_are_found_where_the_package_says():
    for name in mbrl_text_env.rewards.__all__:
        assert getattr(mbrl_text_env.rewards, name) is not None
    assert isinstance(make("sentiment"), RewardModel)


def test_making_a_reward_imports_and_loads_nothing_heavy():
    program = (
        "import sys\n"
        "import mbrl_text_env.rewards, mbrl_text_env.rewards.base\n"
        "from mbrl_text_env.rewards import make, as_reward_model, to_trl\n"
        "make('sentiment+relevance+constraints+classifier:owner/name')\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'vaderSentiment', 'trl'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.stderr.strip() == ""


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(names, "_registered", {})


@pytest.mark.usefixtures("registry")
def test_a_reward_is_registered_under_a_name():
    register("joy", lambda: Clip(SentimentReward(), low=0), "Sentiment from 0 up.")
    register("about", RelevanceReward, argument="ENCODER")
    assert available()[-2:] == ["joy", "about:ENCODER"]
    assert descriptions()["joy"] == "Sentiment from 0 up."
    assert descriptions()["about:ENCODER"].startswith("Cosine similarity")
    assert isinstance(make("joy"), Clip)
    assert make("about:some/encoder").encoder == "some/encoder"
    assert make("2*joy+sentiment").weights == (2.0, 1.0)
    with pytest.raises(RewardSpecError, match=r"got 'jo'\. Did you mean 'joy'"):
        make("jo")
    with pytest.raises(RewardSpecError, match=r"got 'joy:3'. Did you mean 'joy'"):
        make("joy:3")


@pytest.mark.usefixtures("registry")
def test_functions_can_be_registered_as_they_are():
    def brevity(prompt, response):
        return -len(response.split())

    register("brevity", lambda: brevity)
    assert score_responses(make("brevity"), [Prompt.from_text("Hi")], ["a b"]).total == [-2.0]


@pytest.mark.usefixtures("registry")
def test_names_that_are_taken_or_cannot_be_written():
    with pytest.raises(RewardSpecError, match="'sentiment' already exists"):
        register("sentiment", SentimentReward)
    register("sentiment", RelevanceReward, replace=True)
    assert isinstance(make("sentiment"), RelevanceReward)
    for name in ("a+b", "2*a", "a:b", "", " a", "a b"):
        with pytest.raises(RewardSpecError, match="Expected a name of letters"):
            register(name, SentimentReward)
    with pytest.raises(TypeError, match="register `lambda: that_object`"):
        register("object", SentimentReward())


@pytest.mark.usefixtures("registry")
def test_a_factory_that_fails_is_named():
    register("broken", lambda: 1 / 0)
    register("nothing", lambda: None)
    with pytest.raises(RewardSpecError, match="'broken' cannot be created: ZeroDivisionError"):
        make("broken")
    with pytest.raises(RewardSpecError, match="'nothing' cannot be created: TypeError: Expected a"):
        make("nothing+sentiment")


ALWAYS_ONE = "def make():\n    return lambda prompt, response: 1.0"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Installs packages that offer rewards: `install(name, source, entries)`."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, source, entries):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"{key} = {name}:{value}\n" for key, value in entries.items())
        (info / "entry_points.txt").write_text(f"[{names.GROUP}]\n{lines}")
        importlib.invalidate_caches()

    return install


def test_an_installed_packages_rewards_appear(packages):
    packages(
        "kind_words",
        '''
        class Kindness:
            """How kind a response is.

            More about it.
            """
            name = "kindness"
            def score(self, prompts, responses):
                return [float(r.count("thanks")) for r in responses]
        ''',
        {"kindness": "Kindness"},
    )
    assert "kindness" in available()
    assert "kind_words" not in sys.modules
    assert descriptions()["kindness"] == "How kind a response is."
    scores = score_responses(make("2*kindness"), [Prompt.from_text("Hi")], ["thanks, thanks"])
    assert scores.total.tolist() == [4.0]
    with pytest.raises(RewardSpecError, match="Did you mean 'kindness'"):
        make("kindnes")


def test_one_that_cannot_be_imported_is_named_and_the_others_work(packages):
    packages("broken_words", "import no_such_module", {"broken": "Reward"})
    packages(
        "sound_words", "def make():\n    return lambda prompt, response: 1.0", {"sound": "make"}
    )
    shown = descriptions()
    assert list(shown) == available()
    reason = "'broken', offered by broken_words: importing 'broken_words:Reward' raised Mod"
    assert shown["broken"].startswith("Cannot be used.")
    assert reason in shown["broken"]
    with pytest.raises(RewardSpecError, match=reason):
        make("broken")
    assert make("sound").score([Prompt.from_text("Hi")], ["x"]).tolist() == [1.0]
    assert make("sentiment").name == "sentiment"


def test_two_packages_with_one_name(packages):
    packages("left_words", ALWAYS_ONE, {"same": "make"})
    packages("right_words", ALWAYS_ONE, {"same": "make"})
    assert available().count("same") == 1
    with pytest.raises(RewardSpecError, match=r"offered by \w+_words and \w+_words"):
        make("same")


def test_own_names_cannot_be_taken_by_a_package(packages):
    packages("rude_words", "def make():\n    return None", {"sentiment": "make"})
    with pytest.warns(UserWarning, match="rude_words offers a reward 'sentiment'"):
        available()
    assert isinstance(make("sentiment"), SentimentReward)


def test_a_file_with_a_dataclass_that_imports_its_neighbour(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour_of_mine.py").write_text("SCALE = 2.0\n")
    (tmp_path / "json.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from neighbour_of_mine import SCALE\n\n"
        "@dataclass\nclass Brevity:\n    scale: float = SCALE\n    name: str = 'brevity'\n"
        "    def score(self, prompts, responses):\n        return [self.scale] * len(responses)\n"
    )
    reward = make(f"{tmp_path}/json.py:Brevity")
    assert score_responses(reward, [Prompt.from_text("Hi")], ["a"]).total == [2.0]
    assert sys.modules["json"].__file__ != str(tmp_path / "json.py")


def test_functions_and_classes_of_a_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "def brevity(prompt, response):\n    return -len(response.split())\n"
        "class Ones:\n"
        "    name = 'ones'\n"
        "    def score(self, prompts, responses):\n        return [1.0] * len(responses)\n"
        "ones = Ones()\n"
    )
    prompts = [Prompt.from_text("Hi")]
    for name, expected in (("brevity", -2.0), ("Ones", 1.0), ("ones", 1.0)):
        assert score_responses(make(f"{path}:{name}"), prompts, ["a b"]).total == [expected]
    total = make(f"0.5*{path}:brevity+sentiment")
    assert total.name == "0.5*brevity+sentiment"
    with pytest.raises(RewardSpecError, match=r"the file has no 'brevty'.* 'brevity'"):
        make(f"{path}:brevty")
    with pytest.raises(RewardSpecError, match="there is no file"):
        make(f"{tmp_path}/nothing.py:brevity")
    path.write_text("1 / 0")
    with pytest.raises(RewardSpecError, match="running the file raised ZeroDivisionError"):
        make(f"{path}:brevity")

"""Rewards by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mbrl_text_env.rewards
from mbrl_text_env.rewards.base import RewardModel, score_responses
from mbrl_text_env.rewards.catalogue import DESCRIPTIONS, RewardSpecError, available, make
from mbrl_text_env.rewards.classifier import ClassifierReward
from mbrl_text_env.rewards.combinators import WeightedSum
from mbrl_text_env.rewards.constraints import ConstraintsReward
from mbrl_text_env.rewards.relevance import RelevanceReward
from mbrl_text_env.rewards.sentiment import SentimentReward
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
        ("sentiment+0.5*sentiment", "a name of its own for each reward"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_helps(spec, message):
    with pytest.raises(RewardSpecError, match=message) as caught:
        make(spec)
    assert isinstance(caught.value, ValueError)


def test_every_name_has_a_description_of_one_line():
    assert list(DESCRIPTIONS) == available()
    for description in DESCRIPTIONS.values():
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

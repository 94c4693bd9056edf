"""A reward by counts says what it says of the text with these counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env.language_models.toy import CharTokenizer
from mbrl_text_env.rewards import (
    ConstraintsReward,
    Gate,
    LengthPenalty,
    Normalise,
    Product,
    RepetitionPenalty,
    RewardError,
    RewardModel,
    SentimentReward,
    Threshold,
    WeightedSum,
)
from mbrl_text_env.rewards.base import score_features
from mbrl_text_env.types import Prompt, TextState
from mbrl_text_env.world_model import TextFeatures, count_feature
from mbrl_text_env.world_model.features import DEFAULT_FEATURES

TOKENIZER = CharTokenizer("aAbZ1. ,*-\n[]éß\U000001c5")
FEATURES = TextFeatures(TOKENIZER, [*DEFAULT_FEATURES, count_feature("occurrences", "ab")])
CONSTRAINTS = [
    *({"type": f"{a}_{b}", "value": 2} for a in ("min", "max") for b in ("words", "sentences")),
    *({"type": f"num_{name}", "value": 1} for name in ("bullets", "paragraphs", "sentences")),
    {"type": "max_capital_words", "value": 1},
    {"type": "min_letter_count", "letter": "A", "value": 3},
    {"type": "keyword_count", "keyword": "ab", "value": 1},
    {"type": "placeholders", "value": 1},
    {"type": "highlights", "value": 1},
    *({"type": name} for name in ("no_commas", "lowercase", "uppercase")),
]


def prompt_of(*constraints):
    return Prompt.from_text("Go.", metadata={"constraints": list(constraints)})


def counts_of(text):
    ids = tuple(TOKENIZER.encode_text(text))
    [row] = FEATURES([TextState(prompt_of({"type": "no_commas"}), (1,), ids, "stop")])
    return {name: np.array([value], float) for name, value in zip(FEATURES.names, row, strict=True)}


texts = st.text(TOKENIZER.alphabet, max_size=30)
ALL = prompt_of(*CONSTRAINTS)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_every_constraint_on_counts_is_decided_as_by_the_text(text):
    reward, counts = ConstraintsReward(), counts_of(text)
    for constraint in CONSTRAINTS:
        prompt = prompt_of(constraint)
        assert score_features(reward, prompt, counts) == reward.score([prompt], [text]), constraint


class Runs(RewardModel):
    name = "runs"

    def score(self, prompts, responses):
        return [float(len(response.split())) for response in responses]

    def feature_names(self, prompt):
        return ["runs"]

    def score_features(self, prompt, features):
        return features["runs"]


REWARDS = [
    WeightedSum([ConstraintsReward(), Runs()], [0.5, -2.0]),
    Gate(Runs(), ConstraintsReward(), threshold=0.4, closed=-1.0),
    Product([ConstraintsReward(), Runs()]),
    Threshold(Runs(), 2),
    Normalise(Runs(), 1.0, 2.0),
    LengthPenalty(ConstraintsReward(), 2, 0.1),
    RepetitionPenalty(ConstraintsReward(), 1.0, n=1),
]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: type(reward).__name__)
@settings(max_examples=30, deadline=None)
@given(text=texts)
def test_combinations_and_transforms_are_what_they_are_of_the_text(reward, text):
    found = score_features(reward, ALL, counts_of(text))
    np.testing.assert_allclose(found, reward.score([ALL], [text]), rtol=1e-12)


@pytest.mark.parametrize(
    ("reward", "prompt", "message"),
    [
        (SentimentReward(), ALL, "'sentiment'.*`score_features`, got neither"),
        (WeightedSum([Runs(), SentimentReward()], [1, 1]), ALL, "`score_features`, got neither"),
        (
            ConstraintsReward(),
            prompt_of({"type": "ends_with", "value": "Bye."}),
            "constraints on counts.*'ends_with'",
        ),
        (
            ConstraintsReward(),
            prompt_of({"type": "keyword_count", "keyword": "sun", "value": 1}),
            "'occurrences:sun'.*Predicted features:.*'words'",
        ),
        (RepetitionPenalty(Runs()), ALL, "n = 1"),
    ],
)
def test_rewards_that_are_no_program_of_these_counts_are_refused(reward, prompt, message):
    with pytest.raises(RewardError, match=message):
        score_features(reward, prompt, counts_of("a"))

"""What every family of rewards keeps to: one row a family, one test a promise.

A new reward gets its row here. `check_reward_model` tests the same and more with responses that it
makes itself; this table says which promise was broken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.prompts import reasoning_gym_prompts
from mbrl_text_env.rewards import (
    CachedReward,
    ClassifierReward,
    Clip,
    ConstraintsReward,
    EmbeddingFeatures,
    Ensemble,
    ExactMatchReward,
    FluencyReward,
    Gate,
    JSONSchemaReward,
    JudgeReward,
    LengthPenalty,
    MathReward,
    Normalise,
    NumericReward,
    PreferencePair,
    ProcessReward,
    Product,
    ReasoningGymReward,
    RegexReward,
    RelevanceReward,
    RepetitionPenalty,
    SentimentReward,
    SQLReward,
    Threshold,
    TimeLimit,
    UnitTestReward,
    WeightedSum,
    as_reward_model,
    fit_reward,
    score_responses,
)
from mbrl_text_env.types import Prompt

TEXTS = ("Why is the sky blue?", "Wie heißt 日本 auf Deutsch? 🙂", "Once upon a time")
RESPONSES = (
    "It was good, and the sky is blue.",
    "no commas here. only small letters!",
    "The answer is 4.",
    "First line.\n\n- second\n- third",
)
UNICODE = "Größe, 日本語, عربى, e\u0301 and 🙂🇪🇺\u200d, \ufffd — “done”."
LONG = ("It was good, they said. " * 500)[:10_000]


class Row(NamedTuple):
    """A family: how it is made of the test's parts, and the metadata or prompts it asks for."""

    make: Callable[[Mapping[str, Any]], Any]
    metadata: Mapping[str, Any] = {}
    prompts: Callable[[], list[Prompt]] | None = None


def two_texts(prompt: str, response: str) -> float:
    return response.count("o") / (1 + len(prompt))


def trl_function(prompts, completions, **kwargs):
    return list(map(two_messages, prompts, completions))


def verl_function(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(ground_truth in solution_str)}


def openrlhf_function(queries, prompts, labels, **kwargs):
    return {"rewards": [len(q) - len(p) for q, p in zip(queries, prompts, strict=True)]}


def two_messages(prompt, completion, **kwargs):
    return two_texts(prompt[-1]["content"], completion[-1]["content"])


def openenv_rubric() -> Any:
    rubrics = pytest.importorskip("openenv.core.rubrics")

    class Count(rubrics.Rubric):
        def forward(self, action, observation):
            return two_texts(observation, action)

    return Count()


def learned(minilm: Any) -> Any:
    """A head that has learned to like rain."""
    things = ("A lake", "Tea", "Snow", "A bee", "Night", "Bread", "Glass", "Sand")
    pairs = [
        PreferencePair(Prompt.from_text(f"Describe {thing}."), f"{thing} in rain.", f"{thing}!")
        for thing in things
    ]
    return fit_reward(pairs, features=EmbeddingFeatures(minilm))


def puzzles() -> list[Prompt]:
    return reasoning_gym_prompts("chain_sum", size=3, seed=0)


ANSWER = {"reference_answer": "4"}
CONSTRAINTS = {"constraints": [{"type": "lowercase"}, {"type": "max_words", "value": 8}]}
ROWS = {
    "sentiment": Row(lambda parts: SentimentReward()),
    "relevance": Row(lambda parts: RelevanceReward(parts["minilm"])),
    "constraints": Row(lambda parts: ConstraintsReward(), CONSTRAINTS),
    "classifier, BERT": Row(lambda parts: ClassifierReward(parts["classifiers"]["bert"])),
    "classifier, DeBERTa-v2": Row(lambda parts: ClassifierReward(parts["classifiers"]["deberta"])),
    "classifier, Llama": Row(
        lambda parts: ClassifierReward(parts["classifiers"]["llama"], text_format="chat")
    ),
    "process, Qwen's format": Row(
        lambda parts: ProcessReward(parts["step_models"]["qwen"], "qwen")
    ),
    "process, Math-Shepherd's": Row(
        lambda parts: ProcessReward(parts["step_models"]["math-shepherd"], "math-shepherd")
    ),
    "fluency": Row(lambda parts: FluencyReward(parts["smollm2"], max_length=128)),
    "judge": Row(lambda parts: JudgeReward(parts["smollm2"], max_length=384)),
    "exact match": Row(lambda parts: ExactMatchReward(), ANSWER),
    "numeric answer": Row(lambda parts: NumericReward(), ANSWER),
    "symbolic answer": Row(lambda parts: MathReward(), ANSWER),
    "regular expression": Row(lambda parts: RegexReward(r"(?s).*\bgood\b.*")),
    "JSON schema": Row(lambda parts: JSONSchemaReward({"type": "object"})),
    "reasoning-gym": Row(lambda parts: ReasoningGymReward(), prompts=puzzles),
    "unit tests": Row(lambda parts: UnitTestReward(), {"tests": ["assert answer == 4"]}),
    "SQL": Row(
        lambda parts: SQLReward(), {"database": "SELECT 1;", "reference_answer": "SELECT 4"}
    ),
    "learned head": Row(lambda parts: learned(parts["minilm"])),
    "function of two texts": Row(lambda parts: as_reward_model(two_texts)),
    "TRL's function": Row(lambda parts: as_reward_model(trl_function)),
    "verl's function": Row(lambda parts: as_reward_model(verl_function), ANSWER),
    "OpenRLHF's function": Row(lambda parts: as_reward_model(openrlhf_function)),
    "OpenEnv's rubric": Row(lambda parts: as_reward_model(openenv_rubric())),
    "weighted sum": Row(lambda parts: WeightedSum([SentimentReward(), two()], [0.5, 2])),
    "product": Row(lambda parts: Product([Clip(SentimentReward(), 0), two()])),
    "gate": Row(lambda parts: Gate(SentimentReward(), ConstraintsReward()), CONSTRAINTS),
    "ensemble": Row(lambda parts: Ensemble([SentimentReward(), two()], "mean-std")),
    "clip": Row(lambda parts: Clip(SentimentReward(), -0.2, 0.3)),
    "threshold": Row(lambda parts: Threshold(SentimentReward(), 0.1)),
    "normalise": Row(lambda parts: Normalise(SentimentReward(), 0.1, 0.5)),
    "length penalty": Row(lambda parts: LengthPenalty(SentimentReward(), 4)),
    "repetition penalty": Row(lambda parts: RepetitionPenalty(SentimentReward())),
    "disk cache": Row(lambda parts: CachedReward(SentimentReward(), parts["path"] / "scores")),
    "time limit": Row(lambda parts: TimeLimit(SentimentReward(), 600)),
}


def two() -> Any:
    return as_reward_model(two_texts)


@pytest.fixture(scope="module")
def parts(smollm2, minilm, classifiers, step_models, tmp_path_factory):
    return {
        "step_models": step_models,
        "smollm2": smollm2,
        "minilm": minilm,
        "classifiers": classifiers,
        "path": tmp_path_factory.mktemp("contract"),
    }


@pytest.fixture(scope="module", params=ROWS)
def family(request, parts):
    row = ROWS[request.param]
    if row.prompts is not None:
        return row.make(parts), row.prompts()
    return row.make(parts), [Prompt.from_text(text, metadata=dict(row.metadata)) for text in TEXTS]


def scores_of(reward, prompts, responses):
    asked = [prompts[i % len(prompts)] for i in range(len(responses))]
    return score_responses(reward, asked, list(responses)).total


@pytest.mark.filterwarnings("ignore:.*cut .* (text|response)")
class TestEveryFamily:
    def test_a_batch_scores_as_its_responses_alone(self, family):
        reward, prompts = family
        together = scores_of(reward, prompts, RESPONSES)
        alone = [
            scores_of(reward, [prompts[i % len(prompts)]], [response])[0]
            for i, response in enumerate(RESPONSES)
        ]
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)

    def test_the_order_is_kept(self, family):
        reward, prompts = family
        one = prompts[:1]
        forth = scores_of(reward, one, RESPONSES)
        back = scores_of(reward, one, RESPONSES[::-1])
        np.testing.assert_allclose(forth, back[::-1], rtol=1e-5, atol=1e-5)

    def test_unicode(self, family):
        reward, prompts = family
        scores = scores_of(reward, prompts, [UNICODE] * 3)
        assert np.isfinite(scores).all()

    def test_an_empty_response(self, family):
        reward, prompts = family
        assert np.isfinite(scores_of(reward, prompts, ["", " \n", ""])).all()

    def test_a_response_of_10000_characters(self, family):
        reward, prompts = family
        assert len(LONG) == 10_000
        both = scores_of(reward, prompts[:1], [LONG, RESPONSES[0]])
        alone = scores_of(reward, prompts[:1], [RESPONSES[0]])
        assert np.isfinite(both).all()
        np.testing.assert_allclose(both[1:], alone, rtol=1e-5, atol=1e-5)

    def test_the_same_scores_twice(self, family):
        reward, prompts = family
        first = scores_of(reward, prompts, RESPONSES)
        np.testing.assert_array_equal(first, scores_of(reward, prompts, RESPONSES))

    def test_the_checker_agrees(self, family):
        reward, prompts = family
        check_reward_model(reward, prompts, [*RESPONSES, UNICODE, ""])

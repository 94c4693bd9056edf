"""A KL penalty is a sum with two log-probabilities, which are known exactly."""

from __future__ import annotations

import numpy as np
import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.mdp import initial
from mbrl_text_env.rewards.base import reward_usage_bound, score_responses
from mbrl_text_env.rewards.composite.combinators import WeightedSum
from mbrl_text_env.rewards.evaluators.judge import FluencyReward
from mbrl_text_env.rewards.evaluators.sentiment import SentimentReward
from mbrl_text_env.types import Chunk, Prompt
from tests.rewards.composite.test_combinators import Count

POLICY, REFERENCE = NGramLM("ab ", seed=1), NGramLM("ab ", seed=2)
PROMPTS = [Prompt.from_text("ab"), Prompt.from_text("b")]
RESPONSES = ["abba", "b"]


def kl_penalised(reward, policy, reference, weight=0.1):
    models = [FluencyReward(policy, name="policy"), FluencyReward(reference, name="reference")]
    return WeightedSum([reward, *models], [1.0, -weight, weight])


def mean_logprob(model, prompt, response):
    ids = model.encode_prompt(Prompt.from_text(response, chat=False))
    assert model.decode(ids) == response
    return np.mean(model.logprobs([initial(prompt, model)], [Chunk(ids)])[0])


def test_by_hand():
    scores = score_responses(kl_penalised(Count("a"), POLICY, REFERENCE, 0.5), PROMPTS, RESPONSES)
    expected = [
        0.5 * (mean_logprob(POLICY, p, r) - mean_logprob(REFERENCE, p, r))
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    np.testing.assert_allclose(scores.total, np.array([2, 0]) - expected)
    assert scores.parts["a"].tolist() == [2.0, 0.0]


def test_a_policy_that_has_not_moved_costs_nothing(smollm2):
    reward = kl_penalised(SentimentReward(), smollm2, smollm2)
    prompts = [Prompt.from_text("How was it?")] * 3
    scores = score_responses(reward, prompts, ["It was good.", "", "日本"])
    np.testing.assert_allclose(scores.total, scores.parts["sentiment"])
    check_reward_model(reward, prompts, ["It was good.", "", "Größe 🙂", "Yes. " * 50])


def test_its_cost_is_that_of_all_three():
    reward = kl_penalised(Count("a"), POLICY, REFERENCE)
    models = [FluencyReward(POLICY), FluencyReward(REFERENCE)]
    expected = 40 + sum(model.flops(PROMPTS[:1], ["abba"])[0] for model in models)
    assert reward.flops(PROMPTS[:1], ["abba"]) == [pytest.approx(expected)]
    bound = 1000 + sum(model.flops_bound() for model in models)
    assert reward_usage_bound(reward).reward_flops == pytest.approx(bound)
    assert reward.applies_to(PROMPTS[0])
    assert not reward.applies_to(Prompt.from_text("ab" * REFERENCE.context_length))

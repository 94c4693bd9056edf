"""Divergence is none from the model itself, and little from its reduced formats."""

from __future__ import annotations

import torch

from mbrl_text_env.benchmarks.precision import divergence, rewards
from mbrl_text_env.language_models import embedded
from mbrl_text_env.prompts import load_prompts

PROMPTS = load_prompts(split="test")[:4]


def test_divergence_from_itself(smollm2):
    found = divergence(smollm2, smollm2, PROMPTS[:2], 16)
    assert found["positions"] >= 16
    assert abs(found["mean_kl"]) < 1e-6
    assert found["same_most_probable_token"] == 1.0


def test_int8_is_near(smollm2):
    found = divergence(smollm2, embedded(dtype=torch.int8), PROMPTS, 100)
    assert 0.0005 < found["mean_kl"] < 0.02
    assert found["same_most_probable_token"] > 0.85


def test_rewards_are_paired_by_prompt(smollm2):
    found = rewards({"float32": smollm2, "bfloat16": smollm2, "int8": smollm2}, PROMPTS, 1, 0)
    for name in ("sentiment", "relevance"):
        assert found[name]["int8"]["mean"] == found[name]["float32"]["mean"]
        assert found[name]["int8"]["difference"] == found[name]["bfloat16"]["low"] == 0.0

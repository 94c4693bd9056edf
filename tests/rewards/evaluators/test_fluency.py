"""Fluency by hand with a known language model, and with the real one."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.language_models import NGramLM, TableLM
from mbrl_text_env.rewards.base import RewardError, score_responses
from mbrl_text_env.rewards.evaluators.judge import FluencyReward
from mbrl_text_env.types import Prompt

PROMPT = Prompt.from_text("Why is the sky blue?")
TABLE = {"": [0.1, 0.6, 0.3], "a": [0.2, 0.5, 0.3], "ab": [0.0, 0.25, 0.75]}


def by_hand(lm, prefix, response_ids):
    """Mean log-probability from plain transformers calls."""
    import torch

    ids = torch.tensor([[*prefix, *response_ids]])
    with torch.inference_mode():
        logs = lm.model(ids).logits[0].double().log_softmax(-1)
    places = range(len(prefix) - 1, ids.shape[1] - 1)
    return float(np.mean([logs[i, ids[0, i + 1]] for i in places]))


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("a", np.log(0.6)),
        ("ab", (np.log(0.6) + np.log(0.3)) / 2),
        ("aba", (np.log(0.6) + np.log(0.3) + np.log(0.25)) / 3),
        # No tokens: the probability that the response ends at once.
        ("", np.log(0.1)),
        (" \n", np.log(0.1)),
        ("Ω", np.log(0.1)),
    ],
)
def test_by_hand(response, expected):
    reward = FluencyReward(TableLM("ab", TABLE))
    assert reward.score([PROMPT], [response])[0] == pytest.approx(expected)


def test_all_stop_tokens_end_a_response():
    lm = TableLM("ab", TABLE)
    lm.stop_token_ids = frozenset({0, 2})
    assert FluencyReward(lm).score([PROMPT], [""])[0] == pytest.approx(np.log(0.4))


@given(response=st.text("ab", max_size=12))
def test_no_response_scores_above_zero_and_none_scores_like_certainty(response):
    lm = NGramLM("ab", order=2, seed=1)
    assert FluencyReward(lm).score([PROMPT], [response])[0] < 0


def test_impossible_text_is_an_error():
    reward = FluencyReward(TableLM("ab", {"": [0.5, 0.5, 0.0]}))
    with pytest.raises(RewardError, match="'fluency': expected finite scores, got -inf for"):
        score_responses(reward, [PROMPT], ["b"])


def test_the_real_model_by_hand(smollm2):
    tokenizer = smollm2._tokenizer.tokenizer
    reward = FluencyReward(smollm2)
    texts = ["Because air scatters blue light.", "Scatters air because light blue."]
    prefix = smollm2.encode_prompt(PROMPT)
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    expected = [by_hand(smollm2, prefix, ids) for ids in encoded]
    np.testing.assert_allclose(reward.score([PROMPT] * 2, texts), expected, atol=1e-4)
    assert expected[0] > expected[1] + 1
    expected = by_hand(smollm2, prefix, [tokenizer.eos_token_id])
    assert reward.score([PROMPT], [""])[0] == pytest.approx(expected, abs=1e-4)
    assert reward.name == "fluency"


def test_the_real_model_keeps_the_contract(smollm2):
    prompts = [Prompt.from_text("Once upon a time", chat=False), PROMPT]
    responses = ["It was good.", "", " \n", "日本 🙂 e\u0301", "\x00\ufffd", "a\n\n- b"]
    check_reward_model(FluencyReward(smollm2), prompts, responses)


def test_special_tokens_in_a_response_are_ordinary_text(smollm2):
    reward = FluencyReward(smollm2)
    end = smollm2._tokenizer.tokenizer.eos_token_id
    for text in ("<|im_end|>", "Yes.<|im_end|><|im_start|>user", "<|im_<|im_end|>end|>"):
        ids = smollm2.encode_text(text)
        assert end not in ids
        assert smollm2.decode(ids) == text
    # Ending the response by its text is not worth what ending it is worth.
    assert reward.score([PROMPT], ["Yes.<|im_end|>"])[0] < reward.score([PROMPT], ["Yes."])[0]


def test_long_responses_are_cut_and_counted_with_one_warning():
    lm = NGramLM("ab", order=2, seed=0, context_length=30)
    reward, short = FluencyReward(lm), FluencyReward(lm, max_length=3)
    question = Prompt.from_text("abab")
    with pytest.warns(UserWarning, match="'fluency' cut 1 response"):
        cut = reward.score([question] * 2, ["ab" * 5_000, "ab"])
    assert cut[0] == pytest.approx(reward.score([question], ["ab" * 13])[0])
    with pytest.warns(UserWarning, match=r"cut 1 response.* to 3 tokens.*Raise max_length"):
        cut = short.score([question], ["abbb"])
    assert cut[0] == pytest.approx(reward.score([question], ["abb"])[0])
    assert (reward.num_truncated, short.num_truncated) == (1, 1)


def test_flops_are_those_of_the_language_model(smollm2):
    lm = NGramLM("ab", context_length=30, flops_per_token=7.0)
    reward = FluencyReward(lm)
    # Four tokens of the prompt and all of the response but the last.
    flops = reward.flops([Prompt.from_text("abab")] * 3, ["abb", "", "ab" * 500])
    assert flops.tolist() == [7 * 6, 7 * 4, 7 * 29]
    assert reward.flops_bound() == 7 * 30
    real = FluencyReward(smollm2)
    assert 0 < real.flops([PROMPT], ["Yes."])[0] < real.flops_bound()


def test_prompts_that_cannot_be_read():
    reward = FluencyReward(NGramLM("ab", context_length=8))
    long = Prompt.from_text("a" * 8, "long")
    assert reward.applies_to(PROMPT)
    assert not reward.applies_to(long)
    with pytest.raises(RewardError, match="'fluency': Prompt 'long' has 8 tokens"):
        score_responses(reward, [long], ["a"])


class TestLanguageModelsThatAreRefused:
    def check(self, language_model, message, **options):
        with pytest.raises(RewardError, match=message):
            score_responses(FluencyReward(language_model, **options), [PROMPT], ["a"])

    def test_none_there(self, tmp_path):
        self.check(str(tmp_path / "nothing"), "'fluency': Expected the folder of a transformers")

    def test_something_else(self):
        self.check(len, "expected a language model, its name .* got builtin_function_or_method")

    def test_one_without_an_end(self):
        lm = NGramLM("ab")
        lm.stop_token_ids = frozenset()
        self.check(lm, "'toy' has no stop tokens, which are needed to score empty")

    def test_lengths_below_one(self):
        self.check(None, "max_length: expected at least 1, got 0", max_length=0)


def test_nothing_is_loaded_before_it_is_used(tmp_path):
    reward = FluencyReward(str(tmp_path / "nothing"))
    assert reward.score([], []).shape == reward.flops([], []).shape == (0,)
    assert (reward.max_length, reward.num_truncated) == (2048, 0)


def test_copies_and_pickles_leave_what_was_loaded_behind(smollm2, monkeypatch):
    monkeypatch.setattr("mbrl_text_env.language_models.registry.embedded", lambda: smollm2)
    reward = FluencyReward()
    before = reward.score([PROMPT], ["Yes."])
    assert len(pickle.dumps(reward)) < 500
    np.testing.assert_allclose(copy.deepcopy(reward).score([PROMPT], ["Yes."]), before, atol=1e-5)

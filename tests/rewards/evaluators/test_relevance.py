"""Relevance with the real MiniLM, and with vectors whose cosine is known."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mbrl_text_env.rewards.base import RewardError, score_responses
from mbrl_text_env.rewards.evaluators import relevance
from mbrl_text_env.rewards.evaluators.relevance import RelevanceReward
from mbrl_text_env.types import Prompt

SKY = Prompt.from_text("Why is the sky blue?")
CAKE = Prompt.from_text("How do I bake a cake?")
# MiniLM: 6 layers of width 384, each with four square matrices, a feed-forward network of width
# 1536 and two norms, and a pooler; the tables of the embeddings are looked up.
MINILM_PARAMETERS = 6 * (
    4 * (384 * 384 + 384) + (384 * 1536 + 1536) + (1536 * 384 + 384) + 2 * 2 * 384
) + (384 * 384 + 384)


class LetterCounts:
    """Counts of a and b in a text: a vector whose cosines are worked out by hand."""

    def __init__(self):
        self.texts = []

    def encode(self, sentences):
        self.texts.extend(sentences)
        return [[text.count("a"), text.count("b")] for text in sentences]


def minilm_flops(tokens):
    return 2 * MINILM_PARAMETERS * tokens + 4 * 6 * 384 * tokens**2


def test_it_is_the_cosine_of_the_two_embeddings():
    prompt = Prompt.from_text("a")
    scores = RelevanceReward(LetterCounts()).score([prompt] * 3, ["aaa", "b", "aaabbbb"])
    np.testing.assert_allclose(scores, [1.0, 0.0, 3 / 5])


def test_minilm_gives_what_sentence_transformers_computes(minilm):
    from sentence_transformers.util import cos_sim

    response = "Air scatters blue light more than red light."
    expected = cos_sim(minilm.encode(SKY.text), minilm.encode(response)).item()
    assert RelevanceReward().score([SKY], [response])[0] == pytest.approx(expected, abs=1e-6)


def test_an_answer_is_closer_to_its_own_question():
    answers = ["The sky is blue because air scatters light.", "Mix flour, eggs and sugar; bake."]
    scores = RelevanceReward().score([SKY, SKY, CAKE, CAKE], answers * 2)
    assert scores[0] > 0.7
    assert scores[3] > 0.3
    assert max(scores[1:3]) < 0.2


def test_the_question_itself_scores_one():
    assert RelevanceReward().score([SKY], [SKY.text])[0] == pytest.approx(1.0, abs=1e-6)


def test_an_empty_response_scores_zero_and_is_not_embedded():
    encoder = LetterCounts()
    assert RelevanceReward(encoder).score([SKY, SKY], ["", " \n"]).tolist() == [0.0, 0.0]
    assert encoder.texts == []


def test_each_distinct_text_is_embedded_once_a_call():
    encoder = LetterCounts()
    a, b = Prompt.from_text("a"), Prompt.from_text("b")
    scores = RelevanceReward(encoder).score([a, b, a, b], ["ab", "ab", "aa", "b"])
    np.testing.assert_allclose(scores, [2**-0.5, 2**-0.5, 1.0, 1.0])
    assert encoder.texts == ["a", "b", "ab", "aa"]


def test_prompts_are_embedded_once(monkeypatch):
    encoder = LetterCounts()
    reward = RelevanceReward(encoder)
    a, b = Prompt.from_text("a"), Prompt.from_text("b")
    first = reward.score([a], ["ab"])
    np.testing.assert_allclose(reward.score([b, a], ["ab", "ab"]), [first[0], first[0]])
    assert encoder.texts == ["a", "ab", "b", "ab"]
    monkeypatch.setattr(relevance, "_PROMPTS_KEPT", 1)
    for _ in range(2):
        np.testing.assert_allclose(reward.score([a, b], ["aa", "aa"]), [1.0, 0.0])
    again = pickle.loads(pickle.dumps(reward))  # noqa: S301, it was made here
    np.testing.assert_allclose(again.score([a], ["aa"]), [1.0])


def test_an_encoder_may_be_a_folder_or_a_loaded_one(minilm, tmp_path):
    minilm.save_pretrained(str(tmp_path))
    rewards = [RelevanceReward(encoder) for encoder in (None, str(tmp_path), minilm)]
    scores = [reward.score([SKY], ["Because of the air."])[0] for reward in rewards]
    np.testing.assert_allclose(scores, scores[0], atol=1e-6)


def test_flops_are_those_of_both_texts():
    # [CLS] and [SEP] are tokens, too.
    flops = RelevanceReward().flops([Prompt.from_text("hello")], ["hello world"])
    assert flops.dtype == np.float64
    assert flops.tolist() == [minilm_flops(3) + minilm_flops(4)]


def test_flops_are_those_of_the_cut_text(minilm):
    assert minilm.max_seq_length == 256
    reward = RelevanceReward(minilm)
    long = "hello " * 2_000
    assert reward.flops([Prompt.from_text(long)], [long]).tolist() == [2 * minilm_flops(256)]
    assert reward.flops_bound() == 2 * minilm_flops(256)


def test_other_encoders_tell_no_flops():
    reward = RelevanceReward(LetterCounts())
    assert reward.flops([SKY, CAKE], ["a", "b"]).tolist() == [0.0, 0.0]
    assert reward.flops_bound() == 0.0


@pytest.mark.parametrize("encoder", ["no-such/encoder", "./no-such-folder"])
def test_an_encoder_that_cannot_be_loaded_is_an_error_that_says_what_to_do(encoder):
    with pytest.raises(RewardError, match=f"'{encoder}'.*HF_HUB_OFFLINE.*encoder=None"):
        RelevanceReward(encoder).score([SKY], ["Because."])


def test_a_vector_without_a_direction_is_an_error_that_names_the_response():
    with pytest.raises(RewardError, match=r"'relevance'.*nan.*'a', response 'c'"):
        score_responses(RelevanceReward(LetterCounts()), [Prompt.from_text("a")], ["c"])


def test_an_encoder_that_returns_something_else_is_an_error():
    class Flat:
        def encode(self, sentences):
            return np.ones(len(sentences))

    with pytest.raises(RewardError, match=r"one vector per text, shape \(1, d\), got shape \(1,\)"):
        RelevanceReward(Flat()).score([SKY], ["Because."])


class TestReduced:
    PROMPTS = (SKY, SKY, CAKE, CAKE)
    ANSWERS = ("The sky is blue because air scatters light.", "Mix flour and eggs; bake.") * 2

    def scores(self, reward):
        return reward.score(self.PROMPTS, self.ANSWERS)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_scores_are_close_to_the_exact_ones(self, minilm, dtype):
        exact, rounded = (self.scores(RelevanceReward(minilm, dtype=d)) for d in (None, dtype))
        assert 1e-5 < np.abs(rounded - exact).max() < 0.01

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_an_exact_one_has_a_reduced_form(self, minilm, dtype):
        reward = RelevanceReward(minilm)
        reduced = reward.reduced(dtype)
        assert (reduced.dtype, reward.dtype) == (dtype, None)
        expected = self.scores(RelevanceReward(minilm, dtype=dtype))
        np.testing.assert_array_equal(self.scores(reduced), expected)

    def test_using_the_one_changes_no_score_of_the_other(self, minilm):
        untouched, alone = RelevanceReward(minilm), RelevanceReward(minilm, dtype="bfloat16")
        # In the first call prompts are embedded; later they are known.
        exact = [self.scores(untouched) for _ in range(2)]
        rounded = [self.scores(alone) for _ in range(2)]
        for first in (0, 1):
            reward = RelevanceReward(minilm)
            pair = [reward, reward.reduced("bfloat16")]
            for i in range(2):
                found = {which: self.scores(pair[which]) for which in (first, 1 - first)}
                np.testing.assert_array_equal(found[0], exact[i])
                np.testing.assert_array_equal(found[1], rounded[i])

    def test_name_and_flops_stay(self, minilm):
        reduced = RelevanceReward(minilm).reduced("bfloat16")
        assert reduced.name == "relevance"
        flops = reduced.flops([Prompt.from_text("hello")], ["hello world"])
        assert flops.tolist() == [minilm_flops(3) + minilm_flops(4)]
        assert reduced.flops_bound() == 2 * minilm_flops(256)

    @pytest.mark.parametrize(
        "make", [RelevanceReward, lambda dtype: RelevanceReward().reduced(dtype)]
    )
    def test_a_pickled_copy_keeps_the_format(self, make):
        reduced = make(dtype="bfloat16")
        scores = self.scores(reduced)
        again = pickle.loads(pickle.dumps(reduced))  # noqa: S301, it was made here
        assert again.dtype == "bfloat16"
        np.testing.assert_array_equal(self.scores(again), scores)

    def test_other_encoders_have_no_other_format(self):
        reduced = RelevanceReward(LetterCounts()).reduced("bfloat16")
        scores = reduced.score([Prompt.from_text("a")] * 3, ["aaa", "b", "aaabbbb"])
        np.testing.assert_allclose(scores, [1.0, 0.0, 3 / 5], rtol=1e-12)
        assert reduced.flops_bound() == 0.0

    @pytest.mark.parametrize("dtype", ["int8", "float32", ""])
    def test_other_formats_are_refused(self, dtype):
        message = rf"dtype: expected one of \['bfloat16', 'float16'\], got '{dtype}'"
        with pytest.raises(ValueError, match=message):
            RelevanceReward(LetterCounts(), dtype=dtype)
        with pytest.raises(ValueError, match=message):
            RelevanceReward(LetterCounts()).reduced(dtype)

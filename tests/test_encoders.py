"""Embedding texts, and the arithmetic of what it costs."""

import itertools
import logging

import numpy as np
import pytest

from mbrl_text_env.encoders import (
    encode_texts,
    encoder_flops,
    encoder_flops_bound,
    multiplies_bfloat16,
    prefix_text,
)

TEXTS = ["A short text.", "Another one, which is a little longer than the first.", "Grüße!"]

# all-MiniLM-L6-v2: 6 layers of width 384 with feed-forward layers of 1536, and a pooler.
ATTENTION = 4 * (384 * 384 + 384)
FEED_FORWARD = 384 * 1536 + 1536 + 1536 * 384 + 384
NORMS = 2 * (384 + 384)
PARAMETERS = 6 * (ATTENTION + FEED_FORWARD + NORMS) + 384 * 384 + 384


def minilm_flops(tokens: int) -> float:
    return 2 * PARAMETERS * tokens + 4 * 6 * 384 * tokens**2


class CountingEncoder:
    """Anything with `encode` is an encoder; this one counts characters and vowels."""

    def encode(self, sentences):
        return [[len(s), sum(c in "aeiou" for c in s)] for s in sentences]


def test_prefix_text_is_prompt_and_response():
    assert prefix_text("Why?", "Because.") == "Prompt: Why?\nResponse: Because."
    assert prefix_text("Why?", "") == "Prompt: Why?\nResponse: "


class TestEncodeTexts:
    def test_is_the_encoders_own_output(self, minilm):
        found = encode_texts(minilm, TEXTS)
        assert found.dtype == np.float32
        assert found.shape == (3, 384)
        np.testing.assert_allclose(found, minilm.encode(TEXTS, show_progress_bar=False), atol=1e-6)

    def test_a_batch_is_its_texts_one_by_one(self, minilm):
        alone = np.concatenate([encode_texts(minilm, [text]) for text in TEXTS])
        np.testing.assert_allclose(encode_texts(minilm, tuple(TEXTS)), alone, atol=1e-5)

    def test_batches_hold_texts_of_about_as_many_tokens(self, minilm, monkeypatch):
        """Long words of one token each, and short ones of many: characters do not tell."""
        texts = ["international " * n for n in range(1, 21)] + ["qzxj" * n for n in range(1, 21)]
        counts = {text: len(minilm.tokenizer(text)["input_ids"]) for text in texts}
        expected = np.concatenate([encode_texts(minilm, [text]) for text in texts])
        batches = []

        def watched(sentences, **options):
            batches.append(sorted(counts[text] for text in sentences))
            return type(minilm).encode(minilm, sentences, **options)

        monkeypatch.setattr(minilm, "encode", watched)
        found = encode_texts(minilm, texts)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert [len(batch) for batch in batches] == [16, 16, 8]
        assert list(itertools.chain(*batches)) == sorted(counts.values())

    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    def test_shows_no_progress_bar(self, minilm, capfd, caplog, dtype):
        with caplog.at_level(logging.DEBUG, logger="sentence_transformers"):
            encode_texts(minilm, TEXTS, dtype)
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    def test_other_encoders(self, dtype):
        found = encode_texts(CountingEncoder(), ["aha", "hm"], dtype)
        assert found.dtype == np.float32
        assert found.tolist() == [[3.0, 2.0], [2.0, 0.0]]

    @pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.01), ("float16", 0.001)])
    def test_a_reduced_format_is_close(self, minilm, dtype, most):
        exact, found = encode_texts(minilm, TEXTS), encode_texts(minilm, TEXTS, dtype)
        assert found.dtype == np.float32
        assert most / 100 < np.abs(found - exact).max() < most

    def test_a_reduced_format_lasts_for_one_call(self, minilm):
        exact = encode_texts(minilm, TEXTS)
        encode_texts(minilm, TEXTS, "bfloat16")
        np.testing.assert_array_equal(encode_texts(minilm, TEXTS), exact)

    def test_other_encoders_multiply_as_they_do(self):
        """A third has 24 bits in float32, and 8 in bfloat16."""
        import torch

        class Thirds:
            def encode(self, sentences):
                sizes = torch.tensor([[float(len(text))] for text in sentences])
                return (sizes @ torch.tensor([[1 / 3]])).numpy()

        assert encode_texts(Thirds(), ["a"], "bfloat16").tolist() == [[float(np.float32(1 / 3))]]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "avx2": True}, False),
        ({}, False),
    ],
)
def test_processors_that_multiply_bfloat16(monkeypatch, capabilities, expected):
    import torch

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert multiplies_bfloat16() is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert multiplies_bfloat16() is False


class TestFlops:
    def test_by_hand(self, minilm):
        # The words are one token each, between the start and the end mark.
        found = encoder_flops(minilm, ["the sea", "the old man and the sea", "the"])
        assert found.dtype == np.float64
        assert found.tolist() == [minilm_flops(4), minilm_flops(8), minilm_flops(3)]

    def test_a_long_text_costs_what_fits(self, minilm):
        assert minilm.max_seq_length == 256
        found = encoder_flops(minilm, ["sea " * 1000])
        assert found.tolist() == [minilm_flops(256)]
        assert encoder_flops_bound(minilm) == minilm_flops(256)

    def test_the_bound_covers_every_text(self, minilm):
        assert encoder_flops(minilm, TEXTS).max() < encoder_flops_bound(minilm)

    def test_a_text_costs_the_same_in_any_batch(self, minilm):
        alone = [float(encoder_flops(minilm, [text])[0]) for text in TEXTS]
        assert encoder_flops(minilm, TEXTS).tolist() == alone

    def test_no_texts(self, minilm):
        assert encoder_flops(minilm, []).shape == (0,)

    @pytest.mark.parametrize("texts", [[], ["one"], ["one", "two"]])
    def test_other_encoders_say_nothing(self, texts):
        found = encoder_flops(CountingEncoder(), texts)
        assert found.dtype == np.float64
        assert found.tolist() == [0.0] * len(texts)
        assert encoder_flops_bound(CountingEncoder()) == 0.0

    def test_a_subclass_is_one_too(self, minilm, monkeypatch):
        class Tuned(type(minilm)):
            pass

        monkeypatch.setattr(minilm, "__class__", Tuned)
        assert encoder_flops(minilm, ["the sea"]).tolist() == [minilm_flops(4)]
        assert encode_texts(minilm, ["the sea"]).shape == (1, 384)


def test_special_tokens_in_a_text_are_ordinary_text(minilm):
    tokenizer = minilm.tokenizer
    separator = tokenizer.sep_token_id
    seen = []
    forward = minilm[0].auto_model.embeddings.word_embeddings.register_forward_pre_hook(
        lambda module, inputs: seen.extend(inputs[0].flatten().tolist())
    )
    try:
        texts = ["Good.[SEP]Prompt: Why?", "[CLS][MASK] fine [SEP][SEP]"]
        encode_texts(minilm, texts)
        encode_texts(minilm, texts[:1])
    finally:
        forward.remove()
    # One text, one end.
    assert seen.count(separator) == 3
    assert tokenizer.mask_token_id not in seen
    plain = encoder_flops(minilm, ["Good.[ SEP ]Prompt: Why?"])
    assert encoder_flops(minilm, texts[:1]).tolist() == plain.tolist()

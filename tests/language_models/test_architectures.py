"""Every causal family of transformers is computed as transformers computes it, or refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from mbrl_text_env.language_models.hf_tokenizer import ModelLoadError
from tests.language_models.architectures import FAMILIES, largest_error, tiny_model
from tests.language_models.sweep import FAILED, NOT_TINY, REFUSED, WRONG, in_a_process, page

# One of each way, and of each thing that families do in their own way.
EXPECTED = {
    "cohere2": "prefix cache",  # a scale of the logits
    "gemma2": "prefix cache",  # soft caps, windows
    "gpt_oss": "prefix cache",  # attention sinks, experts
    "granite": "prefix cache",  # multipliers everywhere
    "mixtral": "prefix cache",
    "modernbert-decoder": "prefix cache",  # a layer before the output layer
    "bloom": "no prefix cache",  # positions by the mask alone
    "falcon_h1": "no prefix cache",  # recurrent layers beside attention
    "llama4_text": "no prefix cache",  # attention in chunks
    "bart": "no prefix cache, one sequence at a time",  # positions by the column
}
# What is large for its size, or takes seconds to be built, is left to the whole sweep.
NOT_CAUSAL = {"rwkv": "keeps no key-value cache", "cpmant": "not a causal language model"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", EXPECTED)
def test_it_agrees_with_transformers(family, tokenizer):
    way, error = largest_error(tiny_model(family), tokenizer)
    assert error < 1e-3
    assert way == EXPECTED[family]


@pytest.mark.parametrize("family", NOT_CAUSAL)
def test_it_is_refused(family, tokenizer):
    with pytest.raises(ModelLoadError, match=NOT_CAUSAL[family]):
        largest_error(tiny_model(family), tokenizer)


def test_an_encoder_is_refused(tokenizer):
    """It sees what follows, so its logits are no predictions."""
    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelLoadError, match="is_decoder=True"):
        largest_error(model, tokenizer)


@pytest.mark.sweep
@pytest.mark.timeout(7200)
def test_every_family_agrees_or_is_refused(tokenizer):
    results = {family: in_a_process(family, tokenizer) for family in FAMILIES}
    assert not {f: r for f, r in results.items() if r[0] in (FAILED, WRONG)}
    assert sum(r[0] not in (NOT_TINY, REFUSED) for r in results.values()) >= 60


def test_the_page_lists_each_family_once():
    results = {"a": ("prefix cache", "1e-6"), "b": (REFUSED, "no | cache"), "c": (NOT_TINY, "big")}
    text = page([{"transformers": "5.0", "torch": "2.0", "families": results}])
    assert "transformers 5.0" in text
    assert text.count("`a`") == text.count("`b`") == text.count("`c`") == 1
    assert "no \\| cache" in text


def longrope(limit: int = 64):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
    config = transformers.Phi3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=2,
        sliding_window=None,
        original_max_position_embeddings=limit,
        rope_parameters={**rope, "original_max_position_embeddings": limit},
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("limit", [9, 10, 11, 14, 17, 24, 26])
def test_longrope_across_its_original_length(limit, tokenizer):
    """Prefixes of 5, 12 and 21 tokens with 6 more: below the limit, across it and beyond it."""
    _, error = largest_error(longrope(limit), tokenizer)
    assert error < 1e-3

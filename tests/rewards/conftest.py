"""Classifiers of real architectures, tiny and random, saved where the real code loads them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    # Large enough for scores that differ visibly from each other.
    "initializer_range": 0.3,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }} {% endfor %}"
)


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory, minilm) -> dict[str, Path]:
    """Folders by name; see the functions below for what is in them."""
    import torch

    root = tmp_path_factory.mktemp("classifiers")
    # What BERT takes; MiniLM was trained on half of it.
    words = copy.deepcopy(minilm.tokenizer)
    words.model_max_length = 512
    folders = {}
    for build in (bert, bert_with_three_classes, deberta, llama, llama_with_padding):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, tokenizer = build(words)
        folders[build.__name__] = root / build.__name__
        model.save_pretrained(folders[build.__name__])
        tokenizer.save_pretrained(folders[build.__name__])
    return folders


def bert(tokenizer):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, **SIZES)
    return BertForSequenceClassification(config), tokenizer


def bert_with_three_classes(tokenizer):
    from transformers import BertConfig, BertForSequenceClassification

    labels = {0: "bad", 1: "fair", 2: "good"}
    config = BertConfig(vocab_size=len(tokenizer), id2label=labels, **SIZES)
    return BertForSequenceClassification(config), tokenizer


def deberta(tokenizer):
    """The architecture of the article's reward model, with a Unigram tokenizer as it has."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, DebertaV2Tokenizer

    corpus = ["User: How are you, and why? Assistant: I am fine. The sky is blue, 1 2 3!"] * 20
    tokenizer = DebertaV2Tokenizer().train_new_from_iterator(corpus, 100)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        num_labels=1,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        **SIZES,
    )
    return DebertaV2ForSequenceClassification(config), tokenizer


def llama(tokenizer):
    """A decoder without a padding token in its config, and with a chat template."""
    return _llama(tokenizer, pad_token_id=None)


def llama_with_padding(tokenizer):
    return _llama(tokenizer, pad_token_id=tokenizer.pad_token_id)


def _llama(tokenizer, pad_token_id):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_labels=1, pad_token_id=pad_token_id, **SIZES
    )
    return LlamaForSequenceClassification(config), tokenizer

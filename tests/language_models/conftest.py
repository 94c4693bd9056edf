"""Tiny random transformers models, saved to disk with a small trained tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mbrl_text_env.language_models import TransformersLM

SENTENCES = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "A small model writes small sentences, one token after another.",
    "Where does the river go when the rain has stopped?",
    "She sells sea shells by the sea shore in the morning.",
    "Every good search needs a good value and a small budget.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STOP_TOKEN = "<|im_end|>"  # noqa: S105 - a token of text, no secret
VOCAB_SIZE = 300
CONTEXT_LENGTH = 96
SLIDING_WINDOW = 8

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "gpt2", "lfm2")
"""Grouped queries, biases, query norms, sliding windows, learned positions, convolution layers."""


def train_tokenizer(**options: Any) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few sentences, with a stop token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|im_start|>", STOP_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=STOP_TOKEN, **options
    )


def make_config(family: str, eos: int, **options: Any) -> transformers.PreTrainedConfig:
    """A config of two or three layers; options go to its constructor."""
    if family == "gpt2":
        sizes: dict[str, Any] = {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": CONTEXT_LENGTH,
        }
        return transformers.GPT2Config(
            vocab_size=VOCAB_SIZE,
            initializer_range=0.3,
            bos_token_id=eos,
            eos_token_id=eos,
            **{**sizes, **options},
        )
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT_LENGTH,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    factories: dict[str, Any] = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma3": transformers.Gemma3TextConfig,
        "lfm2": transformers.Lfm2Config,
    }
    if family in ("qwen2", "lfm2"):
        del sizes["head_dim"]
    if family == "lfm2":
        sizes["layer_types"] = ["conv", "full_attention"]
    if family == "gemma3":
        sizes |= {
            "num_hidden_layers": 3,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
    return factories[family](
        vocab_size=VOCAB_SIZE,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=None,
        **{**sizes, **options},
    )


def save_model(
    folder: Path, config: transformers.PreTrainedConfig, tokenizer: Any, seed: int = 0
) -> Path:
    """Random weights and the tokenizer, as a model folder of transformers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return train_tokenizer(chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: transformers.PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """Folder of the tiny model of a family, made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_model(
                tmp_path_factory.mktemp("models") / f"tiny-{family}",
                make_config(family, tokenizer.eos_token_id),
                tokenizer,
            )
        return made[family]

    return folder


@pytest.fixture(scope="session")
def tiny(model_folder: Callable[[str], Path]) -> Callable[[str], TransformersLM]:
    """The tiny model of a family, loaded by the path that users take."""
    loaded: dict[str, TransformersLM] = {}

    def load(family: str) -> TransformersLM:
        if family not in loaded:
            loaded[family] = TransformersLM(model_folder(family))
        return loaded[family]

    return load

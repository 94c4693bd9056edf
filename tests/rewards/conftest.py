"""Reward models of real architectures, tiny and random, saved where the real code loads them."""

from __future__ import annotations

import copy
import json
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
    builders = (
        *(bert, bert_with_three_classes, roberta, modernbert, deberta),
        *(llama, llama_with_padding, qwen2, qwen3, gemma),
    )
    for build in builders:
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


def roberta(tokenizer):
    """Its positions begin behind the padding token's id, so two of them are never used."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 10**9
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=66,
        type_vocab_size=2,
        **SIZES,
    )
    return RobertaForSequenceClassification(config), tokenizer


def modernbert(tokenizer):
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=512,
        global_attn_every_n_layers=2,
        **SIZES,
    )
    return ModernBertForSequenceClassification(config), tokenizer


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

    config = LlamaConfig(
        vocab_size=len(tokenizer), num_labels=1, pad_token_id=pad_token_id, **SIZES
    )
    return LlamaForSequenceClassification(config), with_chat_template(tokenizer)


def qwen2(_tokenizer):
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    return _with_byte_level_tokenizer(Qwen2ForSequenceClassification, Qwen2Config)


def qwen3(_tokenizer):
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    return _with_byte_level_tokenizer(Qwen3ForSequenceClassification, Qwen3Config, head_dim=16)


def gemma(_tokenizer):
    from transformers import Gemma3TextConfig, Gemma3TextForSequenceClassification

    return _with_byte_level_tokenizer(
        Gemma3TextForSequenceClassification, Gemma3TextConfig, head_dim=16, sliding_window=8
    )


def _with_byte_level_tokenizer(model, config, **options):
    tokenizer = byte_level_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "num_key_value_heads": 1, **SIZES}
    return model(config(num_labels=1, pad_token_id=0, **sizes, **options)), tokenizer


def with_chat_template(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


STEP_SIZES: dict[str, Any] = {**SIZES, "num_key_value_heads": 1}
IM_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEP_TEXTS = [
    "What is 2 + 2 * 3? Step 1: Multiply first: 2 * 3 = 6. ки\nStep 2: Then add: 2 + 6 = 8. ки",
    "Once upon a time there was a number. It was good, and I hated it. The answer is - or + 1.",
] * 4


@pytest.fixture(scope="session")
def step_models(tmp_path_factory) -> dict[str, Path]:
    """Process reward models: folders by the name of their format."""
    import torch

    root = tmp_path_factory.mktemp("step_models")
    folders = {}
    for name, save in (
        ("qwen", save_qwen_prm),
        ("math-shepherd", save_math_shepherd),
        ("trl", save_trl),
    ):
        folders[name] = root / name
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save(folders[name])
    return folders


def byte_level_tokenizer(special=()):
    """A byte-level BPE tokenizer like Qwen's, with a chat template and more special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(STEP_TEXTS, trainer)
    special_tokens = {"eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=IM_TEMPLATE, **special_tokens
    )


def metaspace_tokenizer():
    """A BPE tokenizer with Llama's and Mistral's normalizer and bytes, and few words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = [
        *(("к", "и"), ("▁", "ки"), ("▁", "+"), ("▁", "-"), ("▁", "▁")),
        *(("t", "e"), ("S", "te"), ("Ste", "p"), ("▁", "S"), ("▁S", "te"), ("▁Ste", "p")),
    ]
    tokens = [
        *("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))),
        *(chr(letter) for letter in range(ord("!"), ord("~") + 1)),
        *("▁", "к", "и"),
        *(left + right for left, right in merges),
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = {"unk_token": "<unk>", "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(vocab, merges, **unknown))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def save_qwen_prm(folder: Path) -> None:
    """A checkpoint with the names of Qwen2.5-Math-PRM-7B, and code that has to stay unused."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2Model

    tokenizer = byte_level_tokenizer(["<extra_0>"])
    config = Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=2048, **STEP_SIZES)
    weights = {f"model.{name}": w for name, w in Qwen2Model(config).state_dict().items()}
    for layer, outputs in ((0, 32), (2, 2)):
        weights[f"score.{layer}.weight"] = torch.randn(outputs, 32)
        weights[f"score.{layer}.bias"] = torch.randn(outputs)
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    saved = config.to_dict()
    # As in the real one: two classes and the padding token are not written down.
    for key in ("id2label", "label2id", "num_labels", "pad_token_id"):
        saved.pop(key, None)
    saved["architectures"] = ["Qwen2ForProcessRewardModel"]
    saved["auto_map"] = {
        "AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
        "AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel",
    }
    (folder / "config.json").write_text(json.dumps(saved))
    for name in ("configuration_qwen2_rm", "modeling_qwen2_rm"):
        (folder / f"{name}.py").write_text("raise SystemExit('this code was run')")


def save_math_shepherd(folder: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = metaspace_tokenizer()
    config = MistralConfig(
        vocab_size=len(tokenizer), max_position_embeddings=2048, sliding_window=None, **STEP_SIZES
    )
    MistralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_trl(folder: Path) -> None:
    """What TRL's PRMTrainer trains and saves."""
    from transformers import Qwen2Config, Qwen2ForTokenClassification

    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"  # noqa: S105 a token of text
    config = Qwen2Config(
        vocab_size=len(tokenizer), num_labels=2, max_position_embeddings=2048, **STEP_SIZES
    )
    Qwen2ForTokenClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

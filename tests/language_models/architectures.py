"""Tiny random models of every causal family of transformers, and how far ours are from them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mbrl_text_env.language_models import SamplingParams, TransformersLM
from mbrl_text_env.types import Chunk, Prompt, TextState

VOCAB_SIZE = 300
_LENGTHS = (21, 5, 12)
_NEW = 6
_MOST_PARAMETERS = 20_000_000

FAMILIES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

# Set where a family's config has the option.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Older names of the same.
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "n_ctx": 128,
    "n_inner": 48,
    "rotary_dim": 4,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_dim": 48,
    "max_seq_len": 128,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "embedding_dim": 32,
    "num_attention_layers": 2,
    "attention_head_size": 8,
    # Experts and latent attention.
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "intermediate_size_mlp": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "global_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
    # Recurrent layers.
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 4,
    "lru_width": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_memory_blocks": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "laurel_rank": 4,
    "sliding_window": 8,
    "attention_window": 8,
    "dropout": 0.0,
}

# What some families need besides.
_SPECIAL: dict[str, dict[str, Any]] = {
    family: {"is_decoder": True}
    for family in (
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
        *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
        *("xlm-roberta", "xlm-roberta-xl", "xmod"),
    )
} | {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
}


# Tried in this order: families divide the width among their heads in different ways.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": None},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": None},
)


def tiny_model(family: str, seed: int = 0) -> Any:
    """A tiny model of a family with random weights, in evaluation mode.

    Raises:
        ValueError: The options above do not make one.
    """
    reasons = []
    for variant in _VARIANTS:
        try:
            return _make(family, _SMALL | variant, seed)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}".partition("\n")[0])
    raise ValueError(reasons[0])


def _make(family: str, small: dict[str, Any], seed: int) -> Any:
    cls = transformers.CONFIG_MAPPING[family]
    default = cls()
    if hasattr(default, "text_config"):
        default = default.get_text_config()
        cls = type(default)
    names = {*default.to_dict(), *cls.attribute_map}
    options = {name: value for name, value in small.items() if name in names and value is not None}
    config = cls(**options | _SPECIAL.get(family, {}))
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    if model.num_parameters() > _MOST_PARAMETERS:
        raise ValueError(f"{model.num_parameters():,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        # Norms and the like start alike in all layers; then it may not matter which is used.
        for weight in model.parameters():
            weight.data += 0.02 * torch.randn_like(weight)
    with torch.inference_mode():
        model(input_ids=torch.arange(3, 18)[None], use_cache=False)
    return model


def way_of(lm: TransformersLM) -> str:
    """How the model is computed."""
    way = lm._way
    if way.network is not None:
        return "prefix cache"
    if not way.steps:
        return "no cache, one sequence at a time"
    return "no prefix cache, one sequence at a time" if way.alone else "no prefix cache"


def largest_error(model: Any, tokenizer: Any) -> tuple[str, float]:
    """How the model is computed, and how far any log-probability (nats) or feature is off.

    Raises:
        ModelLoadError: The family is refused.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = TransformersLM(model, tokenizer=tokenizer)
    rng = np.random.default_rng(1)
    ids = [tuple(rng.integers(3, VOCAB_SIZE, n + _NEW).tolist()) for n in _LENGTHS]
    states = [TextState(Prompt(str(i), "x"), row[:-_NEW]) for i, row in enumerate(ids)]
    chunks = [Chunk(row[-_NEW:]) for row in ids]
    # Fresh, with what was kept, and without a cache; all in a batch, and each alone.
    everything = [list(range(len(states))), *([i] for i in range(len(states)))]
    errors = []
    for prefix_cache in (True, False):
        if not prefix_cache:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lm = TransformersLM(model, tokenizer=tokenizer, prefix_cache=False)
        for indices in everything:
            if prefix_cache and indices == everything[1]:
                lm.clear_cache()
            errors += _errors(lm, [states[i] for i in indices], [chunks[i] for i in indices])
    return way_of(lm), max(errors)


def _errors(
    lm: TransformersLM, states: Sequence[TextState], chunks: Sequence[Chunk]
) -> list[float]:
    errors = []
    seeds = list(range(len(states)))
    for params in (SamplingParams(), SamplingParams(temperature=0)):
        drawn = lm.sample(states, 2, _NEW, seeds=seeds, params=params)
        for state, row in zip(states, drawn, strict=True):
            for chunk in row:
                errors.append(_off(_logprobs(lm, state, chunk), chunk.logprobs))
    for state, chunk, found in zip(states, chunks, lm.logprobs(states, chunks), strict=True):
        errors.append(_off(_logprobs(lm, state, chunk), found))
    for state, found in zip(states, lm.next_tokens(states, 5), strict=True):
        expected = _reference(lm, state.prompt_ids)[-1]
        best = expected.topk(5).values.tolist()
        errors.append(_off(best, found.logprobs))
        errors.append(_off([float(expected[i]) for i in found.token_ids], found.logprobs))
    for state, row in zip(states, lm.features(states), strict=True):
        with torch.inference_mode():
            logits = lm._logits(torch.from_numpy(row)[None])[0].log_softmax(-1)
        errors.append(float((logits - _reference(lm, state.prompt_ids)[-1]).abs().max()))
    return errors


def _off(expected: Sequence[float], found: Sequence[float]) -> float:
    return float(np.abs(np.asarray(expected) - np.asarray(found)).max())


@torch.inference_mode()
def _reference(lm: TransformersLM, ids: Sequence[int]) -> torch.Tensor:
    out = lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    return out.logits[0].float().log_softmax(-1)


def _logprobs(lm: TransformersLM, state: TextState, chunk: Chunk) -> list[float]:
    ids = (*state.prompt_ids, *chunk.token_ids)
    logs = _reference(lm, ids)
    first = len(state.prompt_ids)
    return [float(logs[i - 1, ids[i]]) for i in range(first, len(ids))]

"""Adapters of peft, merged into copies of transformers models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from mbrl_text_env.language_models.choosing import TOLERANCES


def merged_adapter(model: Any, folder: str | Path) -> Any:
    """A transformers model with an adapter of peft; it shares the weights that do not change.

    Args:
        model: The base, which stays as it is.
        folder: The adapter's folder, or its name on the Hub.

    Raises:
        ValueError: Merged, it is not what peft computes with the adapter beside its base.
        Exception: peft cannot load it.
    """
    from peft import PeftModel

    # Detached, not `.data`: these share the version counter, so training is noticed here too.
    shared: dict[int, Any] = {
        id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    shared |= {id(b): b for b in model.buffers()}
    adapted: Any = PeftModel.from_pretrained(copy.deepcopy(model, shared), str(folder)).eval()
    ids = torch.arange(min(12, model.config.get_text_config().vocab_size), device=model.device)[
        None
    ]
    with torch.inference_mode():
        expected = adapted(input_ids=ids, use_cache=False).logits.float()
    base = adapted.get_base_model()
    changed = {id(layer.base_layer) for layer in base.modules() if hasattr(layer, "base_layer")}
    head = _inner(base.get_output_embeddings())
    if is_tied(base) and changed & {id(head), id(_inner(base.get_input_embeddings()))}:
        # An adapter on one of two tied layers changes that one alone.
        head.weight = torch.nn.Parameter(head.weight.detach(), requires_grad=False)
    # Merging with safety checks works on copies of the weights that change.
    merged = adapted.merge_and_unload(safe_merge=True)
    if not is_tied(merged):
        merged.config.get_text_config().tie_word_embeddings = False
    with torch.inference_mode():
        logits = merged(input_ids=ids, use_cache=False).logits.float()
    difference = float((logits - expected).abs().max())
    if not difference <= TOLERANCES[model.dtype] * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"merged, a logit differs by {difference:.3g} from that of the adapter beside its "
            "base; merge it with peft yourself, save the model and load it by folder"
        )
    return merged


def is_tied(model: Any) -> bool:
    """Whether the input embedding is the output layer too."""
    head, embedding = _inner(model.get_output_embeddings()), _inner(model.get_input_embeddings())
    weight = getattr(head, "weight", None)
    return weight is not None and weight is getattr(embedding, "weight", None)


def _inner(layer: Any) -> Any:
    """A layer without the adapter around it."""
    return getattr(layer, "base_layer", layer)

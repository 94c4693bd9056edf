"""What forward passes cost: floating-point operations of a transformer, from its sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mbrl_text_env.types import Usage


def pass_usage(
    prefix: int, computed: int, new_tokens: Sequence[int], num_parameters: int, width: int
) -> Usage:
    """One call: 2 x parameters for each token that went through the model, plus attention.

    Args:
        prefix: Tokens of the state's prompt and response.
        computed: How many of them were computed; more than there are where some were repeated.
        new_tokens: Length of each chunk sampled after it.
        num_parameters: Weights that take part in products.
        width: Of the heads of all layers together; see `attention_width`.
    """
    new = sum(new_tokens)
    # Scores and weighted values: 2 x 2 x context x width for each layer and token. The prefix's
    # last tokens are the ones that are computed; a token attends to those before it.
    if computed <= prefix:
        attended = (prefix**2 - (prefix - computed) ** 2) / 2
    else:
        attended = computed * prefix / 2
    attended += sum(n * prefix + n * n / 2 for n in new_tokens)
    flops = 2.0 * num_parameters * (computed + new) + 4.0 * width * attended
    return Usage(
        prompt_tokens=computed,
        cached_tokens=max(0, prefix - computed),
        generated_tokens=new,
        lm_calls=1,
        lm_flops=flops,
    )


def attention_width(config: Any) -> int:
    """What the heads of all layers have together."""
    # Some families give each layer a config of its own.
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    width = 0
    for layer in layers:
        # The heads together are as wide as the model, unless the config gives their size.
        size = getattr(layer, "head_dim", None)
        width += layer.num_attention_heads * size if size else config.hidden_size
    return width

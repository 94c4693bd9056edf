"""Forward passes over preallocated keys and values: transformers' own modules, or a lean Llama."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import Cache

from mbrl_text_env.language_models.kv import KVBatch, KVShape, KVWindow
from mbrl_text_env.language_models.products import Product, make_product

# Grouped or full attention, rotary positions, gated feed-forward, a norm before each: one forward
# pass serves them. Their subclasses may differ in anything, so the type itself has to be one.
_LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_FULL, _SLIDING = "full_attention", "sliding_attention"


class UnsupportedNetworkError(ValueError):
    """A network whose state is more than keys and values, or that treats them in its own way."""


class Network(Protocol):
    """From token ids and the keys and values before them to hidden states and logits."""

    @property
    def shape(self) -> KVShape:
        """What it keeps of a token."""
        ...

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, window: KVWindow) -> torch.Tensor:
        """Last hidden states, [rows, width, hidden_size], of ids int64[rows, width].

        Keys and values are read from the window and written to it.
        """
        ...

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """float32[n, V] of hidden states [n, hidden_size]; `out` may be used for them."""
        ...


class ModuleNetwork:
    """The modules of a transformers model, whatever they are.

    Args:
        model: A causal language model whose layers attend to all or to the latest tokens.

    Raises:
        UnsupportedNetworkError: It has other layers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._config = model.config.get_text_config()
        self._windows = _windows(self._config)
        self._head = model.get_output_embeddings()
        if self._head is None:
            raise UnsupportedNetworkError(f"{type(model).__name__} has no output embeddings.")

    @functools.cached_property
    def shape(self) -> KVShape:
        """Found by a forward pass over one token."""
        recorder = _Recorder()
        ids = torch.zeros(1, 1, dtype=torch.long, device=self._model.device)
        out = self._model.base_model(input_ids=ids, past_key_values=recorder, use_cache=True)
        layers = [recorder.shapes.get(i) for i in range(len(recorder.shapes))]
        if not layers or None in layers:
            raise UnsupportedNetworkError(
                f"{type(self._model).__name__} keeps no keys and values in some layers."
            )
        hidden = out.last_hidden_state
        return KVShape(tuple(layers), hidden.shape[-1], hidden.dtype, hidden.device)  # type: ignore[arg-type]

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, window: KVWindow) -> torch.Tensor:
        """See `Network.forward`."""
        masks = {kind: window.bias(size) for kind, size in self._windows.items()}
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        hidden: torch.Tensor = self._model.base_model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=_WindowCache(window),
            use_cache=True,
        ).last_hidden_state
        return hidden

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Network.logits`."""
        return scaled_logits(self._head(hidden), self._config)


class LlamaNetwork:
    """Llama, Mistral, Qwen2 and Qwen3 without the cost of a module call for each small step.

    On a CPU everything but the products is float32. Weights of the model's own format are used
    where they lie; int8 ones are copies, made when this is constructed. Beside int8 products, keys
    and values are bfloat16: attention, which waits for memory, is half as long again in float32.

    Args:
        model: One of these models, without adapters; `is_llama_like` tells.
        dtype: Format of the products: the model's own, or int8.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        config = model.config
        self._model = model
        self._config = config
        self._window = _windows(config).get(_SLIDING)
        on_cpu = model.device.type == "cpu"
        self._compute_dtype = torch.float32 if on_cpu else model.dtype
        self._layers = [_LlamaLayer(layer, dtype, config) for layer in model.model.layers]
        self._head = make_product([model.lm_head], dtype)
        heads, size = config.num_key_value_heads, self._layers[0].head_size
        self.shape = KVShape(
            ((heads, size, size),) * len(self._layers),
            config.hidden_size,
            torch.bfloat16 if dtype == torch.int8 else self._compute_dtype,
            model.device,
            self._compute_dtype,
        )

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, window: KVWindow) -> torch.Tensor:
        """See `Network.forward`."""
        model = self._model.model
        rows, width = ids.shape
        x = model.embed_tokens(ids.reshape(-1)).to(self._compute_dtype)
        cos, sin = model.rotary_emb(x, positions)
        half = cos.shape[-1] // 2
        # One sign for each half: rotating is then one swap, one product and one sum.
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        turns = cos.reshape(rows * width, 1, -1), sin.reshape(rows * width, 1, -1)
        bias = window.bias(self._window)
        for index, layer in enumerate(self._layers):
            x += layer.attend(x, turns, bias, window, index)
            x += layer.feed_forward(x)
        return _norm(x, model.norm).view(rows, width, -1)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Network.logits`."""
        return scaled_logits(self._head(hidden, out)[0], self._config)


class _LlamaLayer:
    """One decoder layer."""

    def __init__(self, layer: Any, dtype: torch.dtype, config: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._before_attention = layer.input_layernorm
        self._before_mlp = layer.post_attention_layernorm
        self._query_norm = getattr(attention, "q_norm", None)
        self._key_norm = getattr(attention, "k_norm", None)
        self._activation = mlp.act_fn
        self._heads = config.num_key_value_heads
        self.head_size: int = attention.head_dim
        self._scaling: float = attention.scaling
        self._inputs = make_product([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self._output: Product = make_product([attention.o_proj], dtype)
        self._gate_and_up = make_product([mlp.gate_proj, mlp.up_proj], dtype)
        self._down = make_product([mlp.down_proj], dtype)

    def attend(
        self,
        x: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        bias: torch.Tensor,
        window: KVWindow,
        index: int,
    ) -> torch.Tensor:
        tokens, (rows, width) = len(x), (bias.shape[0], bias.shape[2])
        queries, keys, values = (
            part.view(tokens, -1, self.head_size)
            for part in self._inputs(_norm(x, self._before_attention))
        )
        if self._query_norm is not None:
            queries, keys = _norm(queries, self._query_norm), _norm(keys, self._key_norm)
        keys, values = window.update(
            index,
            *(
                part.view(rows, width, self._heads, -1).transpose(1, 2)
                for part in (_rotated(keys, *turns), values)
            ),
        )
        # Queries that share keys are further rows of one product: no key is repeated.
        groups = queries.shape[1] // self._heads
        folded = _rotated(queries, *turns).view(rows, width, self._heads, groups, -1)
        folded = folded.permute(0, 2, 3, 1, 4).reshape(rows, self._heads, groups * width, -1)
        out = functional.scaled_dot_product_attention(
            folded.to(keys.dtype),
            keys,
            values,
            attn_mask=bias if width == 1 else bias.repeat(1, 1, groups, 1),
            scale=self._scaling,
        )
        out = out.view(rows, self._heads, groups, width, -1).permute(0, 3, 1, 2, 4)
        return self._output(out.reshape(tokens, -1).to(x.dtype))[0]

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_and_up(_norm(x, self._before_mlp))
        return self._down(self._activation(gate).mul_(up))[0]


class _WindowCache(Cache):
    """A window as transformers' modules see it."""

    def __init__(self, window: KVWindow) -> None:
        super().__init__(layers=[])
        self._window = window

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._window.update(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._window.start


class _Recorder(Cache):
    """Notes what the layers keep."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, tuple[int, int, int]] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.shapes[layer_idx] = (key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def is_llama_like(model: Any) -> bool:
    """Whether `LlamaNetwork` computes this model: its type, plain linear layers, no adapters."""
    if type(model).__name__ not in _LLAMA_LIKE or len(_windows(model.config)) > 1:
        return False
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    wanted = 7 * len(model.model.layers) + 1
    return len(linear) == wanted and all(type(m) is torch.nn.Linear for m in linear)


def scaled_logits(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """float32 logits after what some families do to them: Cohere, Granite, Gemma."""
    logits = logits.float()
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def reference_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """float32[len(ids), V]: what the model itself makes of a sequence, without any cache."""
    tensor = torch.tensor([list(ids)], device=model.device)
    logits: torch.Tensor = model(input_ids=tensor, use_cache=False).logits[0]
    return logits.float()


def stepwise_logits(network: Network, ids: Sequence[int]) -> torch.Tensor:
    """float32[len(ids), V]: the first half in one pass, the rest token by token."""
    batch = KVBatch(network.shape, 1, len(ids))
    tensor = torch.tensor([list(ids)], device=network.shape.device)
    half = (len(ids) + 1) // 2
    bounds = [(0, half), *((i, i + 1) for i in range(half, len(ids)))]
    batch.columns = half
    batch.add(half, [])
    hidden = []
    for start, end in bounds:
        batch.columns = end
        positions = torch.arange(start, end, device=tensor.device)[None]
        window = batch.window(slice(0, 1), start, end)
        hidden.append(network.forward(tensor[:, start:end], positions, window)[0])
    return network.logits(torch.cat(hidden))


def _windows(config: Any) -> dict[str, int | None]:
    """How many tokens each kind of layer sees; None for all before it."""
    size = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        size = None
    kinds = set(getattr(config, "layer_types", None) or [_FULL if size is None else _SLIDING])
    if not kinds <= {_FULL, _SLIDING}:
        raise UnsupportedNetworkError(f"Layers of the kinds {sorted(kinds)}.")
    return {kind: size if kind == _SLIDING else None for kind in sorted(kinds)}


def _norm(x: torch.Tensor, module: Any) -> torch.Tensor:
    weight = module.weight.to(x.dtype)
    return functional.rms_norm(x, weight.shape, weight, module.variance_epsilon)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], -1)
    return swapped.mul_(sin).addcmul_(x, cos)

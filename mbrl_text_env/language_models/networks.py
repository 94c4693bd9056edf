"""Forward passes over preallocated keys and values: transformers' own modules, or a lean Llama."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutput

from mbrl_text_env.language_models.kv import KVShape, KVWindow
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


class OwnPasses:
    """A transformers model in two halves: hidden states from tokens, and logits from those.

    Both are the model's own code: multipliers, soft caps and the like are done, whatever they are.

    Raises:
        UnsupportedNetworkError: The model does not consist of these halves.
    """

    def __init__(self, model: Any) -> None:
        # What some classes name as their body is the body of a class around them.
        names = (type(model).base_model_prefix, "model", "transformer")
        prefix = next((name for name in names if name in model._modules), names[0])
        body = model._modules.get(prefix)
        cache = cache_parameter(model)
        if body is None or cache is None:
            raise UnsupportedNetworkError(
                f"{type(model).__name__} has no {prefix!r} that makes hidden states with a cache."
            )
        self._body, self._cache = body, cache
        parameters = inspect.signature(body.forward).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        # Families whose positions follow from the mask take none.
        self._takes_positions = "position_ids" in parameters or (
            inspect.Parameter.VAR_KEYWORD in kinds
        )
        # The same modules but for the body, so that trained weights are seen.
        self._output = copy.copy(model)
        self._given = _Given(body)
        self._output._modules = {**model._modules, prefix: self._given}

    def hidden(self, cache: Cache | None = None, **inputs: Any) -> torch.Tensor:
        """Last hidden states, [rows, width, hidden_size].

        Args:
            cache: Keys and values before these tokens, which are added to it; None without.
            **inputs: `input_ids` and what else the model takes.
        """
        if cache is not None:
            inputs[self._cache] = cache
        if not self._takes_positions:
            inputs.pop("position_ids", None)
        out = self._body(**inputs, use_cache=cache is not None)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32[n, V] of hidden states [n, hidden_size]."""
        self._given.hidden = hidden[None]
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        try:
            logits: torch.Tensor = self._output(input_ids=ids, use_cache=False).logits[0]
        finally:
            self._given.hidden = None
        return logits.float()


class _Given(torch.nn.Module):
    """Stands where the body of a model stands, and answers with hidden states that are given."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None
        # In a tuple, so that it is no module of this one.
        self._body = (body,)

    def __getattr__(self, name: str) -> Any:
        # Multipliers and embeddings that the output layer uses.
        return getattr(self._body[0], name)

    @property
    def decoder(self) -> _Given:
        """Some models call a part of their body."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> _Outputs:
        return _Outputs(last_hidden_state=self.hidden)


class _Outputs(BaseModelOutput):
    """Nothing but the last hidden state."""

    def __getattr__(self, name: str) -> None:
        # Caches, router logits and the like, which models hand on.
        if name.startswith("__"):
            raise AttributeError(name)


class ModuleNetwork:
    """The modules of a transformers model whose layers attend to all or to the latest tokens.

    Raises:
        UnsupportedNetworkError: It has other layers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._own = OwnPasses(model)
        self._windows = _windows(model.config.get_text_config())

    @functools.cached_property
    def shape(self) -> KVShape:
        """Found by a forward pass over one token."""
        recorder = _Recorder()
        ids = torch.zeros(1, 1, dtype=torch.long, device=self._model.device)
        hidden = self._own.hidden(recorder, input_ids=ids)
        layers = [recorder.shapes.get(i) for i in range(len(recorder.shapes))]
        if not layers or None in layers:
            raise UnsupportedNetworkError(
                f"{type(self._model).__name__} keeps no keys and values in some layers."
            )
        return KVShape(tuple(layers), hidden.shape[-1], hidden.dtype, hidden.device)  # type: ignore[arg-type]

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, window: KVWindow) -> torch.Tensor:
        """See `Network.forward`."""
        masks = {kind: window.bias(size) for kind, size in self._windows.items()}
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return self._own.hidden(
            _WindowCache(window), input_ids=ids, position_ids=positions, attention_mask=mask
        )

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Network.logits`."""
        return self._own.logits(hidden)


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
        return self._head(hidden, out)[0].float()


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


def cache_parameter(model: Any) -> str | None:
    """The parameter of `forward` that takes keys and values; None where there is none.

    It is called `cache` from transformers 5.24 on.
    """
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in parameters), None)


def length_switch(config: Any) -> int | None:
    """Tokens beyond which "longrope" models turn all positions by other angles; None for others.

    Up to this length they use their short factors, beyond it the long ones, for the whole sequence.
    Keys of one kind are of no use beside keys of the other.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            limit: int | None = kind.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return limit
    return None


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

"""Forward passes over preallocated keys and values, by transformers' modules or a lean Llama."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutput

_FULL, _SLIDING = "full_attention", "sliding_attention"
# Rotates blocks of this many adjacent inputs; a power of 2.
_ROTATION = 64


class UnsupportedNetworkError(ValueError):
    """A network has more state than keys and values, or handles them in its own way."""


@dataclass(frozen=True)
class KVShape:
    """What a network stores per token: keys, values and the last hidden state."""

    layers: tuple[tuple[int, int, int], ...]  # heads, key size, value size
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    hidden_dtype: torch.dtype | None = None  # None uses that of keys and values

    @property
    def groups(self) -> dict[tuple[int, int], int]:
        """Number of keys and values of each (heads, size)."""
        return Counter((heads, size) for heads, *sizes in self.layers for size in sizes)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys, values and hidden state."""
        numbers = sum(heads * (key + value) for heads, key, value in self.layers)
        hidden = self.hidden_size * (self.hidden_dtype or self.dtype).itemsize
        return numbers * self.dtype.itemsize + hidden

    def places(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Group and index of each layer's key and value: ((group, i), (group, j))."""
        free = {
            name: zip(itertools.repeat(group), itertools.count(), strict=False)
            for group, name in enumerate(self.groups)
        }
        return [(next(free[h, key]), next(free[h, value])) for h, key, value in self.layers]


@dataclass(frozen=True)
class Span:
    """Tokens' groups [count, heads, tokens, size] and hidden states [tokens, hidden_size]."""

    groups: tuple[Tensor, ...]
    hidden: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (*self.groups, self.hidden))

    def view(self, start: int, end: int) -> Span:
        """A view of some tokens, without copying."""
        return Span(tuple(group[:, :, start:end] for group in self.groups), self.hidden[start:end])

    def part(self, start: int, end: int) -> Span:
        """A copy of some tokens, which does not keep the rest in memory."""
        some = self.view(start, end)
        return Span(tuple(group.clone() for group in some.groups), some.hidden.clone())


class KVBatch:
    """Preallocated keys and values of a batch whose rows all end at the same column.

    Row r of `size` rows uses the columns from `starts[r]` to `columns`, which can grow to
    `capacity`. A step writes one column for all rows, so nothing is concatenated or scattered. A
    dropped row is replaced by the last one.
    """

    def __init__(self, shape: KVShape, rows: int, capacity: int) -> None:
        self.shape = shape
        self.allocated = rows, capacity
        make = functools.partial(torch.empty, dtype=shape.dtype, device=shape.device)
        sizes = [(n, rows, heads, capacity, size) for (heads, size), n in shape.groups.items()]
        self.groups = [make(size) for size in sizes]
        hidden_dtype = shape.hidden_dtype or shape.dtype
        self.hidden = make((rows, capacity, shape.hidden_size), dtype=hidden_dtype)
        self.bias = make((rows, capacity))
        self.starts = np.zeros(rows, dtype=np.int64)
        self.places = shape.places()
        self.clear(0, capacity)

    def clear(self, columns: int, capacity: int) -> None:
        """Drop all rows; new ones end at `columns` and can grow to `capacity` columns."""
        self.size, self.columns, self.capacity = 0, columns, capacity

    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens in each row, int64[size]."""
        return self.columns - self.starts[: self.size]

    def add(self, length: int, spans: Sequence[Span]) -> int:
        """Add a row of `length` tokens, starting with the given spans; return its index."""
        row, start = self.size, self.columns - length
        assert start >= 0, "a row is longer than the batch has columns"
        self.size += 1
        self._open(row, start)
        for span in spans:
            end = start + len(span)
            for mine, theirs in zip(self.groups, span.groups, strict=True):
                mine[:, row, :, start:end] = theirs
            self.hidden[row, start:end] = span.hidden
            start = end
        return row

    def copy(self, row: int) -> int:
        """Add a copy of a row; return its index."""
        self.size += 1
        self._move(row, self.size - 1)
        return self.size - 1

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        self.size -= 1
        if row != self.size:
            self._move(self.size, row)

    def read(self, row: int, first: int, last: int) -> Span:
        """A copy of the row's tokens from `first` to `last` (exclusive), counted from its start."""
        start = int(self.starts[row])
        whole = Span(tuple(group[:, row] for group in self.groups), self.hidden[row])
        return whole.part(start + first, start + last)

    def shift(self) -> None:
        """Remove the columns that are empty in all rows."""
        empty = int(self.starts[: self.size].min(initial=self.columns))
        if not empty:
            return
        rows, old = slice(self.size), slice(empty, self.columns)
        self.columns -= empty
        # In pieces, because source and target overlap.
        for part in itertools.chain.from_iterable(self.groups):
            part[rows, :, : self.columns] = part[rows, :, old].clone()
        self.hidden[rows, : self.columns] = self.hidden[rows, old].clone()
        for row in range(self.size):
            self._open(row, int(self.starts[row]) - empty)

    def _open(self, row: int, start: int) -> None:
        self.starts[row] = start
        # Masked values are multiplied by zero, so they must be finite.
        for group in self.groups:
            group[:, row, :, :start] = 0
        self.bias[row, :start] = -torch.inf
        self.bias[row, start:] = 0

    def _move(self, source: int, target: int) -> None:
        self.starts[target] = self.starts[source]
        self.bias[target] = self.bias[source]
        columns = slice(self.columns)
        for group in self.groups:
            group[:, target, :, columns] = group[:, source, :, columns]
        self.hidden[target, columns] = self.hidden[source, columns]


@dataclass(eq=False)
class KVWindow(Cache):
    """The keys and values that one forward pass reads and writes; also a transformers `Cache`.

    It writes the columns `start` to `end` (exclusive) of some rows, at positions where `valid`,
    bool[rows, width], is true (None: all), and reads everything before `end`.
    """

    batch: KVBatch
    rows: slice
    start: int
    end: int
    valid: Tensor | None = None
    _bias: dict[int | None, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, [rows, heads, width, size]; return all of them."""
        places = self.batch.places[layer_idx]
        found = []
        for new, (group, index) in zip((key_states, value_states), places, strict=True):
            stored = self.batch.groups[group][index, self.rows, :, : self.end]
            target = stored[:, :, self.start :]
            if self.valid is not None:
                new = torch.where(self.valid[:, None, :, None], new.to(target.dtype), target)
            target.copy_(new)
            found.append(stored)
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens before those to be written."""
        return self.start

    def write_hidden(self, hidden: Tensor) -> None:
        """Store the last hidden states, [rows, width, hidden_size]."""
        target = self.batch.hidden[self.rows, self.start : self.end]
        if self.valid is not None:
            hidden = torch.where(self.valid[:, :, None], hidden, target)
        target.copy_(hidden)

    def bias(self, sliding_window: int | None = None) -> Tensor:
        """Attention bias [rows, 1, width, end]: 0 for visible keys, minus infinity elsewhere.

        A query sees `sliding_window` keys including its own; None means all keys up to its own.
        """
        if sliding_window in self._bias:
            return self._bias[sliding_window]
        bias = self.batch.bias[self.rows, None, None, : self.end]
        slides = sliding_window is not None and sliding_window < self.end
        if slides or self.end - self.start > 1:
            columns = torch.arange(self.end, device=bias.device)
            distance = columns[self.start :, None] - columns
            hidden = distance < 0
            if sliding_window is not None:
                hidden |= distance >= sliding_window
            # A padding query sees itself: softmax is undefined for a row of minus infinities.
            bias = bias.masked_fill(hidden, -torch.inf).masked_fill(distance == 0, 0.0)
        self._bias[sliding_window] = bias
        return bias


class OwnPasses:
    """A transformers model split in two: tokens to hidden states, and hidden states to logits.

    Both parts are the model's own code, so multipliers, soft caps and similar steps are included. A
    model that cannot be split raises an `UnsupportedNetworkError`.
    """

    def __init__(self, model: Any) -> None:
        # Named `cache` from transformers 5.24 on.
        taken = inspect.signature(model.forward).parameters
        cache = next((name for name in ("past_key_values", "cache") if name in taken), None)
        # For some classes, the named body is itself a wrapper with a body.
        names = (type(model).base_model_prefix, "model", "transformer")
        prefix = next((name for name in names if name in model._modules), names[0])
        body = model._modules.get(prefix)
        if cache is None or body is None:
            lack = f"has no {prefix!r} that computes hidden states"
            if cache is None:
                lack = "keeps no key-value cache, so its prefixes cannot be shared among samples"
            raise UnsupportedNetworkError(f"{type(model).__name__} {lack}.")
        self._body, self._cache = body, cache
        parameters = inspect.signature(body.forward).parameters
        # Families that derive positions from the mask take none.
        self._takes_positions = "position_ids" in parameters or any(
            parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
        )
        # The same modules except for the body, so that trained weights are seen.
        self._output = copy.copy(model)
        self._given = _Given(body)
        self._output._modules = {**model._modules, prefix: self._given}

    def hidden(self, cache: Cache | None = None, **inputs: Any) -> Tensor:
        """Last hidden states [rows, width, hidden_size] of the inputs; fills the cache."""
        if cache is not None:
            inputs[self._cache] = cache
        if not self._takes_positions:
            inputs.pop("position_ids", None)
        hidden: Tensor = self._body(**inputs, use_cache=cache is not None).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32[n, V] of hidden states [n, hidden_size]."""
        self._given.hidden = hidden[None]
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        try:
            logits: Tensor = self._output(input_ids=ids, use_cache=False).logits[0]
        finally:
            self._given.hidden = None
        return logits.float()


class _Given(nn.Module):
    """Replaces a model's body and returns given hidden states."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        # In a tuple, so that it is not registered as a submodule.
        self._body = (body,)

    def __getattr__(self, name: str) -> Any:
        # Multipliers and embeddings that the output layer uses.
        return getattr(self._body[0], name)

    # Some models call a part of their body.
    decoder = property(lambda self: self)

    def forward(self, *args: Any, **kwargs: Any) -> _Outputs:
        return _Outputs(last_hidden_state=self.hidden)


class _Outputs(BaseModelOutput):
    def __getattr__(self, name: str) -> None:
        # Caches, router logits and similar fields that models pass on.
        if name.startswith("__"):
            raise AttributeError(name)


class ModuleNetwork:
    """A transformers model whose layers attend to all or to the latest tokens.

    Other layers raise an `UnsupportedNetworkError`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._own = OwnPasses(model)
        self._windows = layer_windows(model.config.get_text_config())

    @functools.cached_property
    def shape(self) -> KVShape:
        """What the model stores per token, found by a forward pass over one token."""
        cache = DynamicCache()
        ids = torch.zeros(1, 1, dtype=torch.long, device=self._model.device)
        hidden = self._own.hidden(cache, input_ids=ids)
        kept = [
            (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers
        ]
        layers = [
            (k.shape[1], k.shape[-1], v.shape[-1])
            for k, v in kept
            if k is not None and v is not None
        ]
        if not layers or len(layers) < len(kept):
            raise UnsupportedNetworkError(
                f"{type(self._model).__name__} stores no keys and values in some layers."
            )
        return KVShape(tuple(layers), hidden.shape[-1], hidden.dtype, hidden.device)

    def forward(self, ids: Tensor, positions: Tensor, window: KVWindow) -> Tensor:
        """Hidden states [rows, width, hidden_size] of ids int64[rows, width]; fills the window."""
        masks = {kind: window.bias(size) for kind, size in self._windows.items()}
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        return self._own.hidden(window, **inputs)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits float32[n, V] of hidden states [n, hidden_size]; `out` is optional memory."""
        return self._own.logits(hidden)


class LlamaNetwork:
    """Llama, Mistral, Qwen2 and Qwen3 without the overhead of a module call per operation.

    `dtype` is the format of the products: the model's own, or int8 with copied weights. On a CPU
    everything else is float32, except that with int8 products keys and values are bfloat16:
    attention is limited by memory, and takes half as long again in float32.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        config = model.config
        self._model = model
        self._window = layer_windows(config).get(_SLIDING)
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

    def forward(self, ids: Tensor, positions: Tensor, window: KVWindow) -> Tensor:
        """See `ModuleNetwork.forward`."""
        model = self._model.model
        rows, width = ids.shape
        x = model.embed_tokens(ids.reshape(-1)).to(self._compute_dtype)
        cos, sin = model.rotary_emb(x, positions)
        half = cos.shape[-1] // 2
        # One sign per half: rotating then needs one swap, one product and one sum.
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        turns = cos.reshape(rows * width, 1, -1), sin.reshape(rows * width, 1, -1)
        bias = window.bias(self._window)
        for index, layer in enumerate(self._layers):
            x += layer.attend(x, turns, bias, window, index)
            x += layer.feed_forward(x)
        return _norm(x, model.norm).view(rows, width, -1)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """See `ModuleNetwork.logits`."""
        return self._head(hidden, out)[0].float()


Network = ModuleNetwork | LlamaNetwork


class _LlamaLayer:
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
        self._output = make_product([attention.o_proj], dtype)
        self._gate_and_up = make_product([mlp.gate_proj, mlp.up_proj], dtype)
        self._down = make_product([mlp.down_proj], dtype)

    def attend(
        self, x: Tensor, turns: tuple[Tensor, Tensor], bias: Tensor, window: KVWindow, index: int
    ) -> Tensor:
        tokens, (rows, width) = len(x), (bias.shape[0], bias.shape[2])
        queries, keys, values = (
            part.view(tokens, -1, self.head_size)
            for part in self._inputs(_norm(x, self._before_attention))
        )
        if self._query_norm is not None:
            queries, keys = _norm(queries, self._query_norm), _norm(keys, self._key_norm)
        keys, values = (
            part.view(rows, width, self._heads, -1).transpose(1, 2)
            for part in (_rotated(keys, *turns), values)
        )
        keys, values = window.update(keys, values, index)
        # Queries that share keys become further rows of one product, so keys are not repeated.
        groups = queries.shape[1] // self._heads
        folded = _rotated(queries, *turns).view(rows, width, self._heads, groups, -1)
        folded = folded.permute(0, 2, 3, 1, 4).reshape(rows, self._heads, groups * width, -1)
        mask = bias if width == 1 else bias.repeat(1, 1, groups, 1)
        out = functional.scaled_dot_product_attention(
            folded.to(keys.dtype), keys, values, attn_mask=mask, scale=self._scaling
        )
        out = out.view(rows, self._heads, groups, width, -1).permute(0, 3, 1, 2, 4)
        return self._output(out.reshape(tokens, -1).to(x.dtype))[0]

    def feed_forward(self, x: Tensor) -> Tensor:
        gate, up = self._gate_and_up(_norm(x, self._before_mlp))
        return self._down(self._activation(gate).mul_(up))[0]


def layer_windows(config: Any) -> dict[str, int | None]:
    """Number of tokens that each kind of layer sees; None means all earlier ones."""
    slides = getattr(config, "use_sliding_window", True)
    size = getattr(config, "sliding_window", None) if slides else None
    kinds = set(getattr(config, "layer_types", None) or [_FULL if size is None else _SLIDING])
    if not kinds <= {_FULL, _SLIDING}:
        raise UnsupportedNetworkError(f"Layers of the kinds {sorted(kinds)} are not supported.")
    return {kind: size if kind == _SLIDING else None for kind in sorted(kinds)}


def _norm(x: Tensor, module: Any) -> Tensor:
    weight = module.weight.to(x.dtype)
    return functional.rms_norm(x, weight.shape, weight, module.variance_epsilon)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], -1)
    return swapped.mul_(sin).addcmul_(x, cos)


class FloatProduct:
    """x -> x W' + b for layers that share their input. Weights are not copied, so training is seen.

    Inputs are rounded to the format of the weights; results have the format of the inputs.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = list(layers)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Sequence[Tensor]:
        """Map float32[rows, inputs] to float32[rows, outputs] per layer; `out` for a single one."""
        first = self._layers[0]
        if x.dtype == first.weight.dtype and out is not None and first.bias is None:
            return [torch.mm(x, first.weight.t(), out=out)]
        rounded = x.to(first.weight.dtype)
        return [functional.linear(rounded, y.weight, y.bias).to(x.dtype) for y in self._layers]


class Int8Product:
    """int8 products with one scale per weight row and one per input row; sums are exact.

    A few input channels are much larger than the rest and would use up the whole range. Both sides
    are therefore rotated by Hadamard matrices of up to 64 adjacent channels, which keeps all
    products and spreads these channels out.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (2024).
    Deviations: 8 bits; the inputs of every product are rotated on the fly, in small blocks, so the
    network and its norms are not rewritten and nothing is calibrated.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._sizes = [layer.out_features for layer in layers]
        biases = [layer.bias.detach().float() for layer in layers if layer.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        weight = torch.cat([layer.weight.detach().float() for layer in layers])
        # The largest Hadamard matrix that divides the inputs, made orthogonal.
        size = math.gcd(weight.shape[-1], _ROTATION)
        rotation = torch.tensor(hadamard(size, dtype=np.float32), device=weight.device)
        self._rotation = rotation / size**0.5
        weight = self._rotated(weight)
        scales = _scales(weight)
        # The kernel is fastest with the inputs along the rows.
        self._weight = (weight / scales).round_().to(torch.int8).t()
        self._scales = scales.t().contiguous()
        self._sums: Tensor | None = None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Sequence[Tensor]:
        """See `FloatProduct.__call__`."""
        x = self._rotated(x)
        scales = _scales(x)
        rounded = x.div_(scales).round_().to(torch.int8)
        if out is None:
            y = torch._int_mm(rounded, self._weight).float()
        else:
            if self._sums is None or len(self._sums) < len(out):
                self._sums = torch.empty(out.shape, dtype=torch.int32, device=out.device)
            y = out.copy_(torch._int_mm(rounded, self._weight, out=self._sums[: len(out)]))
        y.mul_(scales).mul_(self._scales)
        if self._bias is not None:
            y += self._bias
        return y.split(self._sizes, -1) if len(self._sizes) > 1 else (y,)

    def _rotated(self, x: Tensor) -> Tensor:
        size = self._rotation.shape[-1]
        return (x.reshape(-1, size) @ self._rotation).view(x.shape)


def make_product(layers: Sequence[nn.Linear], dtype: torch.dtype) -> FloatProduct | Int8Product:
    """Product of linear layers that share their input, in their own format or in int8."""
    return Int8Product(layers) if dtype == torch.int8 else FloatProduct(layers)


def _scales(rows: Tensor) -> Tensor:
    """Size of one 8-bit step in each row, float32[rows, 1]."""
    return rows.abs().amax(-1, keepdim=True).clamp_(min=1e-30).mul_(1 / 127)

"""Prepare a transformers model: merge adapters, and choose a correct way to compute it."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import inspect
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from torch import Tensor
from torch.backends.cpu import get_cpu_capability

from mbrl_text_env.files import write_text
from mbrl_text_env.language_models import engine, networks
from mbrl_text_env.language_models.hf_tokenizer import ModelLoadError, load
from mbrl_text_env.language_models.networks import (
    KVBatch,
    LlamaNetwork,
    ModuleNetwork,
    Network,
    OwnPasses,
    UnsupportedNetworkError,
    layer_windows,
)
from mbrl_text_env.runs import digest

logger = logging.getLogger(__name__)

# Tolerance relative to the model's own results, as a fraction of the largest logit.
_TOLERANCES = {torch.float32: 3e-4, torch.float16: 3e-2, torch.bfloat16: 0.15}
_PROBE_TOKENS = 12
_PROBE_WINDOW = 64
_STEPS = 3
_KV_BYTES = 2**24
_MOST_KV_BYTES = 4 * 2**30
# Grouped or full attention, rotary positions, gated feed-forward and pre-norms: one forward pass
# covers them. Subclasses can differ in any respect, so only these exact types are allowed.
_LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Way:
    """How a model is computed: by its own forward pass, or over cached keys and values (`network`).

    Without a network, `OwnBatch` is used with `steps`, one row at a time if `alone`.
    """

    own: OwnPasses
    network: Network | None = None
    steps: bool = True
    alone: bool = False


class DifferenceError(UnsupportedNetworkError):
    """A way of computing a model gives different logits."""


def choose_way(
    model: Any, dtype: torch.dtype, name: str, trial_file: str | Path | None = None
) -> Way:
    """Choose the fastest way that gives the logits of the model itself, in evaluation mode.

    Each way is tested on random tokens: sequences of several lengths in one batch, twice, so the
    second run uses cached prefixes; then token by token, while rows are dropped. The rounding of
    int8 products differs, so the test uses the network without them. A `trial_file` records under
    which conditions `LlamaNetwork` passed; under these, it is used without a test.

    Raises:
        ModelLoadError: No way is correct, or the model is not causal.
        ValueError: int8 is not supported for the model.
    """
    try:
        own = OwnPasses(model)
    except UnsupportedNetworkError as error:
        # Models with another kind of state would run without any memory.
        raise ModelLoadError(
            f"{error} Use a causal language model with attention, such as Llama, Qwen, Gemma or "
            "GPT-2."
        ) from error
    if dtype == torch.int8 and not (_is_llama_like(model) and model.device.type == "cpu"):
        raise ValueError(
            f"dtype=torch.int8 is for Llama, Mistral, Qwen2 and Qwen3 models without adapters, "
            f"on a CPU; {type(model).__name__} is on {model.device}. Omit dtype, or "
            "use torch.bfloat16."
        )
    has_switch = length_switch(model.config.get_text_config()) is not None
    kept = None if trial_file is None or has_switch else _Kept(Path(trial_file), model)
    if kept is not None and _is_llama_like(model) and kept.was_right():
        return Way(own, LlamaNetwork(model, dtype))
    trial = _Trial(model, own)
    if dtype == torch.int8:
        trial.check_network(LlamaNetwork(model, model.dtype))
        network: Network | None = LlamaNetwork(model, dtype)
    else:
        network = _cached_network(model, trial, name)
    if kept is not None and isinstance(network, LlamaNetwork):
        kept.add()
    if network is not None and not has_switch:
        return Way(own, network)
    reason: Exception | None = None
    for steps, alone in ((True, False), (True, True), (False, True)):
        try:
            trial.check(functools.partial(engine.OwnBatch, own, model, steps), alone)
            trial.check_hidden(alone)
            return Way(own, network, steps, alone)
        except Exception as error:
            logger.info("%s is not computed with steps=%s, alone=%s: %s", name, steps, alone, error)
            reason = error
    raise ModelLoadError(
        f"No known way of computing {type(model).__name__} gives correct logits ({reason}). Use a "
        "model with attention, such as Llama, Qwen, Gemma or GPT-2."
    ) from reason


class _Kept:
    """A file with digests of the conditions in which a model's `LlamaNetwork` was correct."""

    def __init__(self, path: Path, model: Any) -> None:
        code = [inspect.getsource(module).encode() for module in (engine, networks)]
        is_cuda = model.device.type == "cuda"
        processor = torch.cuda.get_device_name(model.device) if is_cuda else get_cpu_capability()
        about = [torch.__version__, transformers.__version__, processor, str(model.dtype)]
        about += [model.name_or_path, model.config.to_json_string()]
        self._path, self._own = path, digest(*code, *map(str.encode, about))

    def _found(self) -> list[str]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # Missing or damaged: the model is tested.
            return []
        return found if isinstance(found, list) else []

    def was_right(self) -> bool:
        return self._own in self._found()

    def add(self) -> None:
        # If the folder is not writable, the next load tests again.
        with contextlib.suppress(OSError):
            write_text(self._path, json.dumps([*self._found(), self._own]))


def _cached_network(model: Any, trial: _Trial, name: str) -> Network | None:
    """The fastest correct network over cached keys and values, or None."""
    makers: list[Callable[[], Network]] = [lambda: ModuleNetwork(model)]
    if _is_llama_like(model):
        makers.insert(0, lambda: LlamaNetwork(model, model.dtype))
    for make in makers:
        try:
            network = make()
            trial.check_network(network)
            return network
        except Exception as error:
            # This family may do something its own way, which the next candidate can handle.
            logger.info("%s runs without a prefix cache: %s", name, error)
            if isinstance(error, DifferenceError):
                warnings.warn(f"{error} Using a slower way.", stacklevel=5)
    return None


class _Trial:
    """Random sequences, and the model's own logits for each of them alone."""

    def __init__(self, model: Any, own: OwnPasses) -> None:
        self._model, self._own = model, own
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or 0
        # Beyond the switch, the model itself uses other angles for a prefix than for the whole.
        most = length_switch(config) or getattr(config, "max_position_embeddings", None) or 2**31
        longest = min(_PROBE_TOKENS + (window if window <= _PROBE_WINDOW else 0), most - _STEPS)
        lengths = [max(1, longest), max(1, longest // 2), max(1, longest // 4), max(1, longest)]
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (4, longest + _STEPS))
        rows = zip(ids.tolist(), lengths, strict=True)
        self._sequences = [tuple(row[: length + _STEPS]) for row, length in rows]
        self._expected = [self._reference(sequence) for sequence in self._sequences]
        width = self._expected[0].shape[-1]
        weight = getattr(model.get_input_embeddings(), "weight", None)
        if weight is not None and len(weight) < width:
            raise ModelLoadError(
                f"{type(model).__name__} gives {width} logits, but its input embedding has "
                f"{len(weight)} rows, so it may draw tokens that it cannot read. Check vocab_size "
                "and the sizes of its embeddings in its config."
            )
        prefix = self._reference(self._sequences[0][:-_STEPS])
        if difference(self._expected[0][: len(prefix)], prefix, model.dtype) is not None:
            raise ModelLoadError(
                f"{type(model).__name__}: the logits of a token depend on later tokens, so this "
                "is not a causal language model. If the model can also be an encoder, set "
                "is_decoder=True in its config."
            )

    def _reference(self, ids: engine.Tokens) -> Tensor:
        """The model's own logits for a sequence without a cache, float32[len(ids), V]."""
        tensor = torch.tensor([ids], device=self._model.device)
        try:
            logits: Tensor = self._model(input_ids=tensor, use_cache=False).logits[0]
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ModelLoadError(
                f"{type(self._model).__name__} fails on {len(ids)} tokens "
                f"({type(error).__name__}: {reason}). Expected a transformers causal language "
                "model whose forward pass needs only token ids."
            ) from error
        return logits.float()

    def _compare(self, logits: Tensor, expected: Tensor, subject: str) -> None:
        found = difference(logits, expected, self._model.dtype)
        if found is not None:
            raise DifferenceError(
                f"{subject} does not compute {type(self._model).__name__} (a logit differs by "
                f"{found:.3g})."
            )

    def check_network(self, network: Network) -> None:
        """Raise an error unless batched rows, cached prefixes and steps agree with the model."""
        longest = max(map(len, self._sequences))
        cache = engine.PrefixCache(_KV_BYTES)

        def make() -> engine.CachedBatch:
            kv = KVBatch(network.shape, len(self._sequences) + 1, longest)
            kv.clear(longest - _STEPS, longest)
            return engine.CachedBatch(network, cache, kv)

        subject = type(network).__name__
        for sequences in (self._sequences, self._sequences[:1]):
            batch = make()
            prefixes = [sequence[:-_STEPS] for sequence in sequences]
            for place, row in enumerate(batch.add(prefixes, [1] * len(prefixes))[0]):
                hidden = batch.hidden(place, 0, len(prefixes[row]))
                expected = self._expected[row][: len(hidden)]
                self._compare(network.logits(hidden), expected, subject)
            cache.clear()
        # First prefixes of prefixes, then these, to continue from what is cached.
        make().add(
            [sequence[: -_STEPS - 1] or sequence[:1] for sequence in self._sequences], [1] * 4
        )
        self.check(make, False, subject)

    def check(
        self, make: Callable[[], engine.Batch], alone: bool, subject: str | None = None
    ) -> None:
        """Raise an error unless batches agree with the model while rows are added and dropped."""
        for indices in self._groups(alone):
            batch = make()
            prefixes = [self._sequences[i][:-_STEPS] for i in indices]
            copies = [1 if alone or place else 2 for place in range(len(indices))]
            rows, _ = batch.add(prefixes, copies)
            active = [(indices[row], len(prefixes[row])) for row in rows]
            for step in range(_STEPS + 1):
                logits = batch.logits()
                for row, (i, length) in enumerate(active):
                    expected = self._expected[i][length - 1]
                    self._compare(logits[row], expected, subject or type(batch).__name__)
                if step == _STEPS:
                    break
                if len(active) > 2:
                    batch.drop(0)
                    active[0] = active.pop()
                batch.append([self._sequences[i][length] for i, length in active])
                active = [(i, length + 1) for i, length in active]

    def check_hidden(self, alone: bool) -> None:
        for indices in self._groups(alone):
            sequences = [self._sequences[i] for i in indices]
            found = engine.plain_hidden(self._own, sequences, self._model.device)
            for i, hidden in zip(indices, found, strict=True):
                self._compare(self._own.logits(hidden), self._expected[i], "A padded batch")

    def _groups(self, alone: bool) -> Iterator[Sequence[int]]:
        everything = list(range(len(self._sequences)))
        # The first and last have equal lengths: without padding, models compute positions.
        yield from ([i] for i in everything) if alone else [everything, [0, everything[-1]]]


def difference(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> float | None:
    """The largest difference of a logit if it exceeds the rounding error of `dtype`, or None."""
    found = float((logits - expected).abs().max())
    # "<=" is false for NaN, which also counts as a difference.
    is_near = found <= _TOLERANCES[dtype] * max(1.0, float(expected.abs().max()))
    return None if is_near else found


def _is_llama_like(model: Any) -> bool:
    """Whether `LlamaNetwork` supports this model: exact type, plain linear layers, no adapters."""
    if type(model).__name__ not in _LLAMA_LIKE or len(layer_windows(model.config)) > 1:
        return False
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    wanted = 7 * len(model.model.layers) + 1
    return len(linear) == wanted and all(type(m) is torch.nn.Linear for m in linear)


def length_switch(config: Any) -> int | None:
    """Length from which "longrope" models use other angles for all positions; None for others.

    Cached keys from one side of the switch cannot be used on the other.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if kind.get("rope_type") == "longrope":
            name = "original_max_position_embeddings"
            limit: int | None = kind.get(name) or getattr(config, name, None)
            return limit
    return None


def attention_width(config: Any) -> int:
    """Total width of the heads of all layers."""
    # Some families have a config per layer.
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    # By default, the heads together are as wide as the model.
    sizes = [getattr(layer, "head_dim", None) for layer in layers]
    return sum(
        layer.num_attention_heads * size if size else config.hidden_size
        for layer, size in zip(layers, sizes, strict=True)
    )


def number_format(dtype: Any, device: torch.device) -> torch.dtype:
    """Convert a dtype or its name; None gives the device's default."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: expected a torch.dtype, its name or None, got {dtype!r}.")
    return found


def in_place(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a model if needed, and move it to its device and format in evaluation mode."""
    # int8 products are made from the weights in their original format.
    is_int8 = dtype == torch.int8
    if isinstance(model, (str, Path)):
        model = load("AutoModelForCausalLM", model, dtype="auto" if is_int8 else dtype)
    # Older PEFT versions leave their `peft_config` on the base model.
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    model = model.to(device)
    return (model if is_int8 else model.to(dtype)).eval()


def from_anywhere(source: Any) -> Any:
    """Make a folder's path absolute; return anything else unchanged."""
    is_path = isinstance(source, (str, Path))
    return str(Path(source).resolve()) if is_path and Path(source).exists() else source


def free_share(device: torch.device) -> int:
    """A quarter of the free memory in bytes, at most 4 GiB."""
    is_cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if is_cuda else psutil.virtual_memory().available
    return max(1, min(free // 4, _MOST_KV_BYTES))


def return_free_memory() -> None:
    """Return freed memory to the system: glibc keeps pieces between blocks in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def merged_adapter(model: Any, folder: str | Path) -> Any:
    """Copy a model with a merged PEFT adapter; unchanged weights are shared.

    Raises:
        ValueError: The merged model differs from PEFT's computation with a separate adapter.
        Exception: PEFT cannot load the adapter.
    """
    from peft import PeftModel

    # Detached, not `.data`: this shares the version counter, so training is detected.
    shared: dict[int, Any] = {
        id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    shared |= {id(b): b for b in model.buffers()}
    adapted: Any = PeftModel.from_pretrained(copy.deepcopy(model, shared), str(folder)).eval()
    ids = torch.arange(min(12, model.config.get_text_config().vocab_size), device=model.device)
    with torch.inference_mode():
        expected = adapted(input_ids=ids[None], use_cache=False).logits.float()
    base = adapted.get_base_model()
    changed = {id(layer.base_layer) for layer in base.modules() if hasattr(layer, "base_layer")}
    head, embedding = _tied_layers(base)
    if is_tied(base) and changed & {id(head), id(embedding)}:
        # An adapter on one of two tied layers changes only that layer.
        head.weight = torch.nn.Parameter(head.weight.detach(), requires_grad=False)
    # Merging with safety checks works on copies of the changed weights.
    merged = adapted.merge_and_unload(safe_merge=True)
    if not is_tied(merged):
        merged.config.get_text_config().tie_word_embeddings = False
    with torch.inference_mode():
        logits = merged(input_ids=ids[None], use_cache=False).logits.float()
    found = difference(logits, expected, model.dtype)
    if found is not None:
        raise ValueError(
            f"merged, a logit differs by {found:.3g} from the model with a separate adapter; "
            "merge it with peft yourself, save the model and load it by folder"
        )
    return merged


def is_tied(model: Any) -> bool:
    """Whether the input embedding is also the output layer."""
    head, embedding = _tied_layers(model)
    weight = getattr(head, "weight", None)
    return weight is not None and weight is getattr(embedding, "weight", None)


def _tied_layers(model: Any) -> list[Any]:
    """The output layer and the input embedding, without adapter wrappers."""
    layers = model.get_output_embeddings(), model.get_input_embeddings()
    return [getattr(layer, "base_layer", layer) for layer in layers]

"""Which way of computing a transformers model is right for it: tried out when it is loaded."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mbrl_text_env.language_models.batches import (
    Batch,
    CachedBatch,
    DynamicBatch,
    PlainBatch,
    plain_hidden,
)
from mbrl_text_env.language_models.hf_tokenizer import ModelLoadError
from mbrl_text_env.language_models.kv import KVBatch
from mbrl_text_env.language_models.networks import (
    LlamaNetwork,
    ModuleNetwork,
    Network,
    OwnPasses,
    UnsupportedNetworkError,
    cache_parameter,
    is_llama_like,
    length_switch,
)
from mbrl_text_env.language_models.prefix_cache import PrefixCache, Tokens

logger = logging.getLogger(__name__)

# How far a way of computing may be from the model's own, as a share of the largest logit.
TOLERANCES = {torch.float32: 3e-4, torch.float16: 3e-2, torch.bfloat16: 0.15}
_PROBE_TOKENS = 12
_PROBE_WINDOW = 64
_STEPS = 3
_KV_BYTES = 2**24


@dataclass(frozen=True)
class Engine:
    """How a model is computed: by its own passes, or over kept keys and values (`network`).

    Without a network, `steps` says whether a token goes on from what transformers keeps of those
    before it (or takes a pass over the whole sequence), `alone` whether rows are computed one at a
    time.
    """

    own: OwnPasses
    network: Network | None = None
    steps: bool = True
    alone: bool = False


def choose_engine(model: Any, dtype: torch.dtype, name: str) -> Engine:
    """The fastest way that computes what the model itself computes.

    Each is tried on a few random tokens: sequences of several lengths in one batch, twice, so that
    the second time finds prefixes that are kept; then token by token, while rows leave.

    Args:
        model: A causal language model in evaluation mode.
        dtype: Format of the products; int8 has rounding of its own, so that the network around it
            is tried.
        name: What messages call the model.

    Raises:
        ModelLoadError: None is right, or the model does not attend to earlier tokens alone.
        ValueError: int8 is not offered for the model.
    """
    own, device = _passes(model), model.device
    trial = _Trial(model, own)
    if dtype == torch.int8:
        if not is_llama_like(model) or device.type != "cpu":
            raise ValueError(
                f"dtype=torch.int8 is for Llama, Mistral, Qwen2 and Qwen3 models without adapters, "
                f"on a CPU; {type(model).__name__} is on {device}. Leave dtype out, or choose "
                "torch.bfloat16."
            )
        trial.check_network(LlamaNetwork(model, model.dtype))
        return Engine(own, LlamaNetwork(model, torch.int8))
    network = _cached_network(model, trial, name)
    if network is not None and length_switch(model.config.get_text_config()) is None:
        return Engine(own, network)
    reason: Exception | None = None
    for steps, alone in ((True, False), (True, True), (False, True)):
        engine = Engine(own, network, steps, alone)
        try:
            trial.check(functools.partial(plain_batch, engine, model), alone)
            trial.check_hidden(alone)
        except Exception as error:
            logger.info("%s is not computed with steps=%s, alone=%s: %s", name, steps, alone, error)
            reason = error
            continue
        return engine
    raise ModelLoadError(
        f"{type(model).__name__} is computed rightly in no way that is known ({reason}). Use a "
        "model with attention, such as Llama, Qwen, Gemma or GPT-2."
    ) from reason


def _cached_network(model: Any, trial: _Trial, name: str) -> Network | None:
    """The leanest network over kept keys and values that computes what the model computes."""
    makers: list[Callable[[], Network]] = [lambda: ModuleNetwork(model)]
    if is_llama_like(model):
        makers.insert(0, lambda: LlamaNetwork(model, model.dtype))
    for make in makers:
        try:
            network = make()
            trial.check_network(network)
        except Exception as error:
            # Whatever a family does in its own way, the next way may be right about.
            logger.info("%s runs without a prefix cache: %s", name, error)
            if isinstance(error, DifferenceError):
                warnings.warn(f"{error} A slower way is taken.", stacklevel=5)
            continue
        return network
    return None


def plain_batch(engine: Engine, model: Any) -> Batch:
    """An empty batch of an engine without a network."""
    if engine.steps:
        return DynamicBatch(engine.own, model.config, model.device)
    return PlainBatch(engine.own, model.device)


class DifferenceError(UnsupportedNetworkError):
    """A way of computing a model gives other logits than the model."""


def _passes(model: Any) -> OwnPasses:
    """Refuse models whose state is no key-value cache; they would go on without any memory."""
    if cache_parameter(model) is None:
        raise ModelLoadError(
            f"{type(model).__name__} keeps no key-value cache, so its prefixes cannot be shared "
            "among samples. Use a model with attention, such as Llama, Qwen, Gemma or GPT-2."
        )
    try:
        return OwnPasses(model)
    except UnsupportedNetworkError as error:
        raise ModelLoadError(
            f"{error} Expected a causal language model of transformers, such as Llama, Qwen, Gemma "
            "or GPT-2."
        ) from error


class _Trial:
    """Random sequences, and the logits that the model itself gives for each of them alone."""

    def __init__(self, model: Any, own: OwnPasses) -> None:
        self._model, self._own = model, own
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or 0
        # Beyond a switch, the model itself judges a prefix and its continuation by other angles.
        most = length_switch(config) or getattr(config, "max_position_embeddings", None) or 2**31
        longest = min(_PROBE_TOKENS + (window if window <= _PROBE_WINDOW else 0), most - _STEPS)
        lengths = [max(1, longest), max(1, longest // 2), max(1, longest // 4), max(1, longest)]
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (4, longest + _STEPS))
        self._sequences: list[Tokens] = [
            tuple(row[: length + _STEPS].tolist()) for row, length in zip(ids, lengths, strict=True)
        ]
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
        if not self._near(self._expected[0][: len(prefix)], prefix):
            raise ModelLoadError(
                f"{type(model).__name__}: what follows a token changes what the model says of it, "
                "so it is no causal language model. For a model that can also be an encoder, set "
                "is_decoder=True in its config."
            )

    def _reference(self, ids: Tokens) -> torch.Tensor:
        """float32[len(ids), V]: what the model itself makes of a sequence, without any cache."""
        tensor = torch.tensor([ids], device=self._model.device)
        try:
            logits: torch.Tensor = self._model(input_ids=tensor, use_cache=False).logits[0]
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ModelLoadError(
                f"{type(self._model).__name__} cannot be asked about {len(ids)} tokens "
                f"({type(error).__name__}: {reason}). Expected a causal language model of "
                "transformers whose forward pass takes token ids alone."
            ) from error
        return logits.float()

    def _near(self, logits: torch.Tensor, expected: torch.Tensor) -> bool:
        difference = float((logits - expected).abs().max())
        scale = max(1.0, float(expected.abs().max()))
        # "<=" is false for NaN, which is a difference too.
        return difference <= TOLERANCES[self._model.dtype] * scale

    def _compare(self, logits: torch.Tensor, expected: torch.Tensor, subject: str) -> None:
        if not self._near(logits, expected):
            difference = float((logits - expected).abs().max())
            raise DifferenceError(
                f"{subject} does not compute {type(self._model).__name__} (a logit differs by "
                f"{difference:.3g})."
            )

    def check_network(self, network: Network) -> None:
        """Raise an error unless it agrees: rows side by side, prefixes kept, steps."""
        longest = max(map(len, self._sequences))
        cache: PrefixCache[Any] = PrefixCache(_KV_BYTES)

        def make() -> CachedBatch:
            kv = KVBatch(network.shape, len(self._sequences) + 1, longest)
            kv.clear(longest - _STEPS, longest)
            return CachedBatch(network, cache, kv)

        subject = type(network).__name__
        for sequences in (self._sequences, self._sequences[:1]):
            batch = make()
            prefixes = [sequence[:-_STEPS] for sequence in sequences]
            rows = batch.add(prefixes, [1] * len(prefixes)).rows
            for place, row in enumerate(rows):
                hidden = batch.hidden(place, 0, len(prefixes[row]))
                expected = self._expected[row][: len(hidden)]
                self._compare(network.logits(hidden), expected, subject)
            cache.clear()
        # First with prefixes of prefixes, then with these: what is kept is gone on from.
        make().add(
            [sequence[: -_STEPS - 1] or sequence[:1] for sequence in self._sequences], [1] * 4
        )
        self.check(make, False, subject)

    def check(self, make: Callable[[], Batch], alone: bool, subject: str | None = None) -> None:
        """Raise an error unless batches agree, while they grow and lose rows."""
        for indices in self._groups(alone):
            batch = make()
            prefixes = [self._sequences[i][:-_STEPS] for i in indices]
            copies = [1 if alone or place else 2 for place in range(len(indices))]
            active = [
                (indices[row], len(prefixes[row])) for row in batch.add(prefixes, copies).rows
            ]
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
        """Raise an error unless passes without a cache agree."""
        for indices in self._groups(alone):
            sequences = [self._sequences[i] for i in indices]
            for i, hidden in zip(
                indices, plain_hidden(self._own, sequences, self._model.device), strict=True
            ):
                self._compare(self._own.logits(hidden), self._expected[i], "A padded batch")

    def _groups(self, alone: bool) -> Iterator[Sequence[int]]:
        everything = list(range(len(self._sequences)))
        # The first and the last are of one length: without padding, models find positions alone.
        yield from ([i] for i in everything) if alone else [everything, [0, everything[-1]]]

"""Causal language models of transformers, by Hub name or folder.

A state's prefix is computed once for all its samples; finished sequences are replaced by new ones.
"""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mbrl_text_env.language_models import engine, loading
from mbrl_text_env.language_models.base import (
    FeatureModel,
    NextTokens,
    SampleRequest,
    charge,
    check_judging_arguments,
    check_next_tokens,
    check_requests,
    finish_reason,
    pass_usage,
    prefix_of,
    room_after,
)
from mbrl_text_env.language_models.decoding import Sampled, fill_in, waiting, whole_requests
from mbrl_text_env.language_models.engine import Tokens, chosen_logprobs
from mbrl_text_env.language_models.hf_tokenizer import HFTokenizer, ModelLoadError, Tokenized
from mbrl_text_env.language_models.networks import KVBatch, LlamaNetwork, Network
from mbrl_text_env.runs import weights_digest
from mbrl_text_env.types import Chunk, Ledger, TextState, Usage, check_positive, timed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Number of tokens in a pass of the output layer.
_LOGIT_ROWS = 256
T = TypeVar("T")


class TransformersLM(Tokenized, FeatureModel):
    """A causal language model of transformers.

    Llama, Mistral, Qwen2 and Qwen3 run on an optimised forward pass; other models run on their own
    modules, with a prefix cache if all layers are attention. Which way is correct is tested when
    the model is loaded. In-place training of the weights is detected and empties the cache. Writes
    that bypass PyTorch's version counters (`parameter.data.copy_`) are not: call `weights_changed`
    after them.

    Args:
        model: Hub name, folder, or a loaded transformers model.
        tokenizer: Its tokenizer; by default loaded from the same name or folder.
        name: Name in reports; by default the last part of the model's name or folder.
        device: By default `"cuda"` if available, otherwise `"cpu"`.
        dtype: A dtype or its name. By default float32 on a CPU and bfloat16 elsewhere. On a CPU,
            bfloat16 and float16 apply to weights and products only. int8 is for CPUs and
            the models named above: 8-bit products with rotated inputs
            (`networks.Int8Product`). With every reduced format, the same call in another batch can
            sample other tokens.
        batch_size: Maximum number of sequences decoded together.
        kv_bytes: Maximum bytes of keys and values: half for the sequences being decoded (fewer at
            once if they are long, but at least one), half for the prefix cache. By default a
            quarter of the free memory, at most 4 GiB.
        prefix_cache: Whether to cache prefixes between calls.
        trial_file: File that records that the fastest way of computing the model was correct, with
            these versions and on this kind of processor, so that it is not tested again. Use it
            for a model whose files do not change; by default each load tests (seconds).

    Raises:
        ModelLoadError: Nothing could be loaded, the model has no key-value cache (RWKV), or no
            way is correct.
        ValueError: `batch_size` or `kv_bytes` is below 1, a loaded model has no tokenizer,
            `dtype` is not a number format, or int8 is not supported.

    Example:
        >>> from mbrl_text_env.language_models import TransformersLM
        >>> lm = TransformersLM("Qwen/Qwen2.5-0.5B-Instruct")  # doctest: +SKIP
    """

    guards = True

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | HFTokenizer | None = None,
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        batch_size: int = 64,
        kv_bytes: int | None = None,
        prefix_cache: bool = True,
        trial_file: str | Path | None = None,
    ) -> None:
        check_positive(batch_size=batch_size, kv_bytes=kv_bytes)
        named = isinstance(model, (str, Path))
        if tokenizer is None and not named:
            raise ValueError(
                "A loaded model needs its tokenizer: pass TransformersLM(model, tokenizer=...)."
            )
        trials = trial_file if named else None
        self._options: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": batch_size}
        self._options |= {"kv_bytes": kv_bytes, "prefix_cache": prefix_cache}
        self._options |= {"trial_file": trials}
        kept = {**self._options, "name": name, "tokenizer": loading.from_anywhere(tokenizer)}
        # The arguments of `_made_again`.
        self._recipe: tuple[Any, ...] | None = (
            (loading.from_anywhere(model), kept) if named else None
        )
        path = Path(str(getattr(model, "name_or_path", model)))
        self.name = name or path.name or type(model).__name__
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype, self.batch_size = loading.number_format(dtype, self.device), batch_size
        self.model = loading.in_place(model, self.device, self.dtype)
        source: Any = str(model) if tokenizer is None else tokenizer
        self._tokenizer = source if isinstance(source, HFTokenizer) else HFTokenizer(source)
        self._read_sizes()
        self.kv_bytes = kv_bytes or loading.free_share(self.device)
        self._lock = threading.RLock()
        self._cache = engine.PrefixCache(self.kv_bytes // 2 if prefix_cache else 0)
        self._kv: KVBatch | None = None
        self._digests: tuple[Any, str] | None = None
        self._weights = self._loaded = self._weights_version()
        with torch.inference_mode():
            self._way = loading.choose_way(self.model, self.dtype, self.name, trials)
        self._network = self._way.network
        # Maximum number of rows together if no network is used.
        self._plain_rows = 1 if self._way.alone else batch_size
        if self._network is not None:
            self.cache_tokens = self._cache.max_bytes // self._network.shape.bytes_per_token

    def _read_sizes(self) -> None:
        config, tokenizer = self.model.config.get_text_config(), self._tokenizer
        self.vocab_size = config.vocab_size
        self.stop_token_ids, self.context_length = tokenizer.with_model(self.model)
        self.feature_size = config.hidden_size
        # The input embedding is a lookup, not a product; only a tied one is also the output layer.
        lookup = 0 if loading.is_tied(self.model) else self.vocab_size * config.hidden_size
        self.num_parameters: int = self.model.num_parameters() - lookup
        self._attention_width = loading.attention_width(config)
        # Keys and values of shorter prefixes cannot be used beyond this length.
        self._switch: float = loading.length_switch(config) or math.inf

    def __reduce__(self) -> tuple[Any, ...]:
        if self._recipe is None or self._weights_version() != self._loaded:
            came = "was made from a module in memory" if self._recipe is None else "was trained"
            raise pickle.PicklingError(
                f"Language model {self.name!r} is sent to another process as the name or folder "
                f"it is loaded from, but this one {came}. Save it with `lm.model.save_pretrained` "
                "(and its tokenizer), and load it by folder: TransformersLM(folder)."
            )
        return _made_again, (self.identity(), *self._recipe)

    @property
    def cache_stats(self) -> engine.CacheStats:
        """Prefix cache hits, misses and evictions so far, in tokens."""
        return self._cache.stats

    @property
    def cached_bytes(self) -> int:
        """Bytes of cached prefixes."""
        return self._cache.nbytes

    def identity(self) -> dict[str, Any]:
        """What distinguishes this model: its name, weights, number format and tokenizer."""
        version = self._weights_version()
        if self._digests is None or self._digests[0] != version:
            self._digests = version, weights_digest(self.model)
        return {
            "name": self.name,
            "weights": self._digests[1],
            "dtype": str(self.dtype),
            "tokenizer": self._tokenizer.identity(),
        }

    def clear_cache(self) -> None:
        """Clear all cached prefixes."""
        with self._lock:
            self._cache.clear()
            loading.return_free_memory()

    def weights_changed(self) -> None:
        """Clear all cached prefixes, and the weights of int8 products."""
        with self._lock:
            self._weights = ()

    def with_adapter(self, folder: str | Path, name: str | None = None) -> TransformersLM:
        """Return this model with a PEFT LoRA adapter, given by folder or Hub name.

        Both models can be used together; only the weights that the adapter changes are duplicated.
        The default name joins the names of this model and the folder.

        Raises:
            ModelLoadError: There is no adapter, or it belongs to another model.
        """
        try:
            merged = loading.merged_adapter(self.model, folder)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ModelLoadError(
                f"Expected the folder of a peft adapter for {self.name!r}, got {str(folder)!r} "
                f"({type(error).__name__}: {reason}). An adapter fits only the model that it was "
                "trained on; check `base_model_name_or_path` in its adapter_config.json."
            ) from error
        name = name or f"{self.name}+{Path(str(folder)).name}"
        options: dict[str, Any] = {**self._options, "kv_bytes": self.kv_bytes, "name": name}
        adapted = TransformersLM(merged, tokenizer=self._tokenizer, **options)
        if self._recipe is not None and self._weights_version() == self._loaded:
            adapted._recipe = (*self._recipe, (loading.from_anywhere(folder), name))
        return adapted

    def sample_requests(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> list[list[Chunk]]:
        """Sample chunks; see `LanguageModel.sample_requests`."""
        check_requests(requests, self.guards)
        limits = [min(r.max_new_tokens, room_after(r.state, self.context_length)) for r in requests]
        chunks: list[list[Chunk]] = [[] for _ in requests]
        with timed(ledgers), self._lock, torch.inference_mode():
            queue = waiting(requests, limits)
            computed = self._run(queue)
        for drawn in queue:
            reason = finish_reason(self, drawn.state, drawn.tokens)
            chunks[drawn.request].append(
                Chunk(tuple(drawn.tokens), tuple(drawn.logprobs), reason, drawn.log_weight)
            )
        rows = zip(requests, chunks, computed, strict=True)
        usages = (
            self._usage(len(prefix_of(r.state)), n, list(map(len, row))) for r, row, n in rows
        )
        charge(ledgers, usages)
        return chunks

    def logprobs(
        self,
        states: Sequence[TextState],
        chunks: Sequence[Chunk],
        *,
        ledgers: Sequence[Ledger] | None = None,
    ) -> list[tuple[float, ...]]:
        """Log-probabilities from the model's own forward pass over state and chunk together."""
        check_judging_arguments(states, chunks)
        prefixes = [prefix_of(state) for state in states]
        tokens = [chunk.token_ids for chunk in chunks]
        sequences = list(map(self._judging, prefixes, tokens))

        def read(i: int, hidden: Tensor) -> tuple[float, ...]:
            return tuple(chosen_logprobs(self._logits(hidden), tokens[i]))

        return self._read(sequences, [len(p) - 1 for p in prefixes], ledgers, read)

    def next_tokens(
        self, states: Sequence[TextState], k: int, *, ledgers: Sequence[Ledger] | None = None
    ) -> list[NextTokens]:
        """The k most probable next tokens of each state; see `LanguageModel.next_tokens`."""
        check_next_tokens(states, k, self.vocab_size)

        def read(i: int, hidden: Tensor) -> NextTokens:
            ids, logs = engine.top_tokens(self._logits(hidden), k)
            return NextTokens(tuple(ids[0].tolist()), tuple(logs[0].tolist()))

        sequences = [prefix_of(state) for state in states]
        return self._read(sequences, [len(s) - 1 for s in sequences], ledgers, read)

    def features(
        self, states: Sequence[TextState], *, ledgers: Sequence[Ledger] | None = None
    ) -> npt.NDArray[np.float32]:
        """Last-layer hidden state of each prefix's last token, float32[B, hidden_size].

        Computed prefixes are cached, so sampling from the same states does not repeat the work.
        """

        def read(i: int, hidden: Tensor) -> npt.NDArray[np.float32]:
            # Copied, because the next pass uses the same memory.
            return hidden[-1].float().cpu().numpy().copy()

        sequences = [prefix_of(state) for state in states]
        rows = self._read(sequences, [len(s) - 1 for s in sequences], ledgers, read)
        return np.array(rows, dtype=np.float32).reshape(len(states), self.feature_size)

    def usage_bound(self, prefix_tokens: int, new_tokens: Sequence[int]) -> Usage:
        """2 x parameters for each token of the prefix and the chunks, plus attention."""
        passes = 1
        if self._network is None or prefix_tokens > self._switch:
            # Without a cache, samples in different batches do not share their prefix.
            passes = max(1, math.ceil(len(new_tokens) / self._plain_rows))
        computed = passes * prefix_tokens
        if self._network is None or prefix_tokens + max(new_tokens, default=0) > self._switch + 1:
            computed += sum(self._repeated(prefix_tokens, new) for new in new_tokens)
        if prefix_tokens <= self._switch:
            # Beyond the switch, a sequence is judged as a whole, and recomputed if it continues.
            lengths = [prefix_tokens + new for new in new_tokens]
            computed += sum(length for length in lengths if length > self._switch)
            computed += sum(length for length in lengths if length > self._switch + 1)
        return self._usage(prefix_tokens, computed, new_tokens)

    def _usage(self, prefix: int, computed: int, new_tokens: Sequence[int]) -> Usage:
        width = self._attention_width
        return pass_usage(prefix, computed, new_tokens, self.num_parameters, width)

    def _read(
        self,
        sequences: Sequence[Tokens],
        firsts: Sequence[int],
        ledgers: Sequence[Ledger] | None,
        read: Callable[[int, Tensor], T],
    ) -> list[T]:
        """Apply `read` to each sequence's hidden states, and charge them to its ledger."""
        found: dict[int, T] = {}
        computed = [0] * len(sequences)
        with timed(ledgers), self._lock, torch.inference_mode():
            for i, hidden, count in self._hidden(sequences, firsts):
                found[i] = read(i, hidden)
                computed[i] = count
        usages = (self._usage(len(s), n, []) for s, n in zip(sequences, computed, strict=True))
        charge(ledgers, usages)
        return [found[i] for i in range(len(sequences))]

    def _weights_version(self) -> tuple[tuple[int, int], ...]:
        return tuple((p.data_ptr(), p._version) for p in self.model.parameters())

    def _refresh(self) -> None:
        """Detect weights trained since the last call; disable dropout, which is for training."""
        if self.model.training:
            self.model.eval()
        weights = self._weights_version()
        if weights != self._weights:
            self._weights = weights
            self._cache.clear()
            if self.dtype == torch.int8:
                self._network = LlamaNetwork(self.model, torch.int8)

    def _cached_batch(
        self, wanted: int, longest: int, capacity: int
    ) -> tuple[engine.CachedBatch, int]:
        """An empty batch of up to `wanted` rows within the memory limit, and its number of rows."""
        assert self._network is not None
        shape = self._network.shape
        fitting = self.kv_bytes // 2 // (shape.bytes_per_token * capacity)
        rows = max(1, min(wanted, self.batch_size, fitting))
        kv = self._kv
        if kv is None or kv.allocated[0] < rows or kv.allocated[1] < capacity:
            self._kv = None  # Two of them at once would exceed the limit.
            kv = self._kv = KVBatch(shape, rows, capacity)
        # Reset, so that earlier samples cannot affect these.
        kv.clear(longest, capacity)
        return engine.CachedBatch(self._network, self._cache, kv), rows

    def _run(self, queue: Sequence[Sampled]) -> list[int]:
        """Sample the queue; return the prefix tokens computed for each request."""
        computed = [0] * (1 + max((chunk.request for chunk in queue), default=-1))
        self._refresh()
        switch = self._switch
        near = [chunk for chunk in queue if len(chunk.sequence) <= switch]
        limits = [chunk.limit for chunk in near]
        for chunk in near:
            chunk.limit = int(min(chunk.limit, switch + 1 - len(chunk.sequence)))
        self._decode(near, computed, self._network)
        for chunk, limit in zip(near, limits, strict=True):
            chunk.limit = limit
        fresh = [chunk for chunk in queue if not chunk.tokens]
        self._decode(fresh + [c for c in near if not c.is_done(self)], computed, None)
        # As in `logprobs`: a pass over the whole sequence, with its angles.
        crossing = [chunk for chunk in near if len(chunk.sequence) > switch]
        prefixes = [prefix_of(chunk.state) for chunk in crossing]
        sequences = [self._judging(p, c.tokens) for p, c in zip(prefixes, crossing, strict=True)]
        for i, hidden, count in self._hidden(sequences, [len(p) - 1 for p in prefixes]):
            crossing[i].logprobs[:] = chosen_logprobs(self._logits(hidden), crossing[i].tokens)
            computed[crossing[i].request] += count
        return computed

    def _decode(
        self, queue: Sequence[Sampled], computed: list[int], network: Network | None
    ) -> None:
        """Sample chunks, over cached keys and values if a network is given."""
        if not queue:
            return
        if network is None:
            before = [(len(chunk.sequence), len(chunk.tokens)) for chunk in queue]
            for part in whole_requests(queue, self._plain_rows):
                plain = engine.OwnBatch(self._way.own, self.model, self._way.steps)
                fill_in(part, plain, len(part), self, computed)
            for chunk, (prefix, start) in zip(queue, before, strict=True):
                computed[chunk.request] += self._repeated(prefix, len(chunk.tokens) - start)
            return
        longest = max(len(chunk.sequence) for chunk in queue)
        capacity = max(len(chunk.sequence) + chunk.limit for chunk in queue)
        # Spare columns, to avoid moving data while rows are added and dropped.
        capacity += capacity // 4 if len(queue) > self.batch_size else 0
        cached, rows = self._cached_batch(len(queue), longest, capacity)
        fill_in(queue, cached, rows, self, computed)

    def _repeated(self, prefix: int, new: int) -> int:
        """Tokens recomputed for `new` tokens after a prefix, if nothing is cached."""
        return 0 if self._way.steps else sum(prefix + place for place in range(new - 1))

    def _hidden(
        self, sequences: Sequence[Tokens], firsts: Sequence[int]
    ) -> Iterator[tuple[int, Tensor, int]]:
        """Yield index, hidden states from position `firsts[i]` to the end, and computed tokens."""
        self._refresh()
        near = [i for i in range(len(sequences)) if len(sequences[i]) <= self._switch]
        far = [i for i in range(len(sequences)) if len(sequences[i]) > self._switch]
        owners: dict[Tokens, list[int]] = {}
        if self._network is not None:
            for i in sorted(near, key=lambda i: (-len(sequences[i]), sequences[i])):
                owners.setdefault(sequences[i], []).append(i)
            near = []
        unique = list(owners)
        while unique:
            batch, size = self._cached_batch(len(unique), len(unique[0]), len(unique[0]))
            part, unique = unique[:size], unique[size:]
            rows, computed = batch.add(part, [1] * len(part))
            for row, place in enumerate(rows):
                sequence, count = part[place], computed[place]
                for i in owners[sequence]:
                    yield i, batch.hidden(row, firsts[i], len(sequence)), count
                    count = 0
        for indices in (near, far):
            order = sorted(indices, key=lambda i: len(sequences[i]))
            for start in range(0, len(order), self._plain_rows):
                chosen = order[start : start + self._plain_rows]
                found = engine.plain_hidden(
                    self._way.own, [sequences[i] for i in chosen], self.device
                )
                for i, hidden in zip(chosen, found, strict=True):
                    yield i, hidden[firsts[i] :], len(sequences[i])

    def _judging(self, prefix: Tokens, tokens: Sequence[int]) -> Tokens:
        """Tokens to process when judging `tokens`; the last one only matters across the switch."""
        crosses = len(prefix) + len(tokens) - 1 == self._switch
        return (*prefix, *(tokens if crosses else tokens[:-1]))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, float32[n, V], in parts to limit memory."""
        own = self._network or self._way.own
        return torch.cat([own.logits(part) for part in hidden.split(_LOGIT_ROWS)])


def _made_again(
    identity: dict[str, Any],
    model: Any,
    options: dict[str, Any],
    *adapters: tuple[Any, str],
) -> TransformersLM:
    """Load a pickled language model in another process, with its adapters by folder and name."""
    lm = TransformersLM(model, **options)
    for folder, name in adapters:
        lm = lm.with_adapter(folder, name)
    found = lm.identity()
    # Two machines may round differently when they merge an adapter.
    kept = found.keys() - ({"weights"} if adapters else set())
    differing = [f"{k}: {identity[k]}, now {found[k]}" for k in kept if found[k] != identity[k]]
    if differing:
        raise ModelLoadError(
            f"Expected language model {lm.name!r} as it was pickled, got a different one from "
            f"{str(model)!r} ({', '.join(differing)}). Use the same files on every machine, and "
            "set dtype: its default differs between CPU and GPU."
        )
    return lm

"""Any causal language model of transformers, by name or folder.

Keys and values of prefixes seen before are found by their token ids, a state's prefix is computed
once for all its samples, and sequences that end make room for others.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from mbrl_text_env.language_models.adapters import is_tied, merged_adapter
from mbrl_text_env.language_models.base import (
    FeatureModel,
    NextTokens,
    SampleRequest,
    charge,
    check_judging_arguments,
    check_requests,
    check_unfinished,
    finish_reason,
    prefix_of,
    room_after,
)
from mbrl_text_env.language_models.batches import CachedBatch, kv_rows, plain_hidden
from mbrl_text_env.language_models.choosing import choose_engine, plain_batch
from mbrl_text_env.language_models.decoding import (
    Sampled,
    decode,
    is_done,
    waiting,
    whole_requests,
)
from mbrl_text_env.language_models.flops import attention_width, pass_usage
from mbrl_text_env.language_models.hf_tokenizer import (
    HFTokenizer,
    ModelLoadError,
    check_known,
    check_room,
    context_limit,
    load,
    stop_ids,
)
from mbrl_text_env.language_models.kv import KVBatch, Span, free_share, return_free_memory
from mbrl_text_env.language_models.networks import LlamaNetwork, Network, length_switch
from mbrl_text_env.language_models.prefix_cache import CacheStats, PrefixCache, Tokens
from mbrl_text_env.language_models.sampling import chosen_logprobs, top_tokens
from mbrl_text_env.runs import weights_digest
from mbrl_text_env.types import Chunk, Ledger, Prompt, TextState, Usage, timed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Logits are large: a pass of the output layer takes this many tokens.
_LOGIT_ROWS = 256
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What makes a language model again in another process: its source, the constructor's options,
    and folder and name of each adapter."""

    model: Any
    options: dict[str, Any]
    adapters: tuple[tuple[Any, str], ...] = ()

    def make(self) -> TransformersLM:
        """The language model."""
        lm = TransformersLM(self.model, **self.options)
        for folder, name in self.adapters:
            lm = lm.with_adapter(folder, name)
        return lm


def _from_anywhere(source: Any) -> Any:
    """A folder by a path that holds in every working directory; a name on the Hub as it is."""
    is_path = isinstance(source, (str, Path))
    return str(Path(source).resolve()) if is_path and Path(source).exists() else source


class TransformersLM(FeatureModel):
    """A causal language model of transformers.

    Llama, Mistral, Qwen2 and Qwen3 run on a lean forward pass of our own, other models on their own
    modules, with a prefix cache where their layers are attention alone; which way is right is tried
    out when the model is loaded.

    Weights that are trained in place are noticed, and the cache is emptied. A write that goes
    around PyTorch's version counters (`parameter.data.copy_`) is not: call `weights_changed` then.

    Args:
        model: Name on the Hub, folder, or a loaded transformers model.
        tokenizer: Its tokenizer; by default loaded from the same name or folder.
        name: What reports call it; by default the last part of the model's name or folder.
        device: By default `"cuda"` where there is one, otherwise `"cpu"`.
        dtype: By default float32 on a CPU and bfloat16 elsewhere. On a CPU, bfloat16 and float16
            are the format of weights and products, and everything else is float32. `torch.int8` is
            for CPUs and the models named above: products of 8 bits with rotated inputs
            (`products.Int8Product`). As with every reduced format, rounding then depends a little
            on the batch, so the same call in another batch may sample other tokens.
        batch_size: Most sequences decoded together.
        kv_bytes: Most bytes of keys and values: half of them for the sequences being decoded, so
            that long ones are decoded in smaller batches, half for the prefix cache. A single
            sequence longer than that is decoded all the same. By default a quarter of the memory
            that is free now, at most 4 GiB.
        prefix_cache: Whether prefixes are kept between calls.

    Raises:
        ModelLoadError: Nothing could be loaded, or the model keeps no key-value cache (RWKV; Mamba
            before transformers 5.24), or no way is right.
        ValueError: `batch_size` or `kv_bytes` is below 1, a loaded model came without a tokenizer,
            or int8 is asked for where it is not offered.

    Example:
        >>> from mbrl_text_env.language_models import TransformersLM
        >>> lm = TransformersLM("Qwen/Qwen2.5-0.5B-Instruct")  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | HFTokenizer | None = None,
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 64,
        kv_bytes: int | None = None,
        prefix_cache: bool = True,
    ) -> None:
        for option, value in (("batch_size", batch_size), ("kv_bytes", kv_bytes)):
            if value is not None and value < 1:
                raise ValueError(f"{option}: expected at least 1, got {value}.")
        self._recipe: _Recipe | None = None
        named = isinstance(model, (str, Path))
        if named:
            options = {"name": name, "device": device, "dtype": dtype, "batch_size": batch_size}
            options |= {"kv_bytes": kv_bytes, "prefix_cache": prefix_cache}
            kept = tokenizer if tokenizer is None else _from_anywhere(tokenizer)
            self._recipe = _Recipe(_from_anywhere(model), {**options, "tokenizer": kept})
        elif tokenizer is None:
            raise ValueError(
                "A loaded model needs its tokenizer too: pass TransformersLM(model, tokenizer=...)."
            )
        path = Path(str(getattr(model, "name_or_path", model)))
        self.name = name or path.name or type(model).__name__
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.dtype, self.batch_size, self.prefix_cache = dtype, batch_size, prefix_cache
        self.model = self._in_place(model)
        source: Any = str(model) if tokenizer is None else tokenizer
        self._tokenizer = source if isinstance(source, HFTokenizer) else HFTokenizer(source)
        self._read_sizes()
        self.kv_bytes = kv_bytes or free_share(self.device)
        self._lock = threading.RLock()
        self._cache: PrefixCache[Span] = PrefixCache(self.kv_bytes // 2 if prefix_cache else 0)
        self._kv: KVBatch | None = None
        self._digests: tuple[Any, str] | None = None
        self._weights = self._loaded = self._weights_version()
        with torch.inference_mode():
            self._engine = choose_engine(self.model, dtype, self.name)
        self._network = self._engine.network
        if self._network is not None:
            self.cache_tokens = self._cache.max_bytes // self._network.shape.bytes_per_token
        # Beyond this length no keys and values of shorter prefixes can be used.
        self._switch = length_switch(self.model.config.get_text_config())

    def _in_place(self, model: Any) -> Any:
        """The model on its device, in its number format, for evaluation."""
        # int8 products are made from the weights in the format that they came in.
        is_int8 = self.dtype == torch.int8
        if isinstance(model, (str, Path)):
            model = load(AutoModelForCausalLM, model, dtype="auto" if is_int8 else self.dtype)
        # Older releases of PEFT leave their `peft_config` on the base model too.
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        model = model.to(self.device)
        return (model if is_int8 else model.to(self.dtype)).eval()

    def _read_sizes(self) -> None:
        config = self.model.config.get_text_config()
        self.vocab_size = config.vocab_size
        self.stop_token_ids = self._tokenizer.stop_token_ids | stop_ids(
            None, self.model.generation_config
        )
        self.context_length = min(
            context_limit(config, self._tokenizer.tokenizer), self._tokenizer.context_length
        )
        self.feature_size = config.hidden_size
        # The input embedding is looked up, not multiplied; only a tied one is the output layer too.
        lookup = 0 if is_tied(self.model) else self.vocab_size * config.hidden_size
        self.num_parameters: int = self.model.num_parameters() - lookup
        self._attention_width = attention_width(config)

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformersLM:
        # A shared, read-only engine: environments and agents that are copied go on using this one.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._recipe is None or self._weights_version() != self._loaded:
            came = "was made from a module in memory" if self._recipe is None else "was trained"
            raise pickle.PicklingError(
                f"Language model {self.name!r} goes to another process as the name or folder that "
                f"it is loaded from, but this one {came}. Save it with `lm.model.save_pretrained` "
                "(and its tokenizer), and load it by folder: TransformersLM(folder)."
            )
        return _Recipe.make, (self._recipe,)

    @property
    def cache_stats(self) -> CacheStats:
        """What the prefix cache found, missed and dropped so far."""
        return self._cache.stats

    @property
    def cached_bytes(self) -> int:
        """Bytes of the prefixes that are kept."""
        return self._cache.nbytes

    def identity(self) -> dict[str, Any]:
        """What tells this model from others: its name, weights, number format and tokenizer."""
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
        """Forget all prefixes."""
        with self._lock:
            self._cache.clear()
            return_free_memory()

    def weights_changed(self) -> None:
        """Forget all prefixes, and the weights that int8 products were made from."""
        with self._lock:
            self._weights = ()

    def with_adapter(self, folder: str | Path, name: str | None = None) -> TransformersLM:
        """This model with a LoRA adapter of peft; both can be used side by side.

        Only the weights that the adapter changes are held twice.

        Args:
            folder: The adapter's folder, or its name on the Hub.
            name: What reports call it; by default this model's name and the folder's.

        Raises:
            ModelLoadError: There is no adapter, or it belongs to another model.
        """
        try:
            merged = merged_adapter(self.model, folder)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ModelLoadError(
                f"Expected the folder of a peft adapter for {self.name!r}, got {str(folder)!r} "
                f"({type(error).__name__}: {reason}). An adapter fits the model that it was "
                "trained on; check `base_model_name_or_path` in its adapter_config.json."
            ) from error
        name = name or f"{self.name}+{Path(str(folder)).name}"
        adapted_model = TransformersLM(
            merged,
            tokenizer=self._tokenizer,
            name=name,
            device=self.device,
            dtype=self.dtype,
            batch_size=self.batch_size,
            kv_bytes=self.kv_bytes,
            prefix_cache=self.prefix_cache,
        )
        if self._recipe is not None and self._weights_version() == self._loaded:
            adapters = (*self._recipe.adapters, (_from_anywhere(folder), name))
            adapted_model._recipe = dataclasses.replace(self._recipe, adapters=adapters)
        return adapted_model

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt; see `HFTokenizer.encode_prompt`."""
        ids = self._tokenizer.encode_prompt(prompt)
        # A tokenizer that was passed in loaded knows nothing of the model's context.
        check_room(prompt, len(ids), self.context_length)
        check_known(prompt, ids, self.vocab_size, self._tokenizer)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._tokenizer.decode(token_ids)

    def sample_requests(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> list[list[Chunk]]:
        """Draw chunks; see `RequestSampler.sample_requests`."""
        check_requests(requests)
        limits = [min(r.max_new_tokens, room_after(r.state, self.context_length)) for r in requests]
        chunks: list[list[Chunk]] = [[] for _ in requests]
        with timed(ledgers), self._lock, torch.inference_mode():
            queue = waiting(requests, limits)
            computed = self._run(queue)
            for drawn in queue:
                reason = finish_reason(self, drawn.state, drawn.tokens)
                chunks[drawn.request].append(
                    Chunk(tuple(drawn.tokens), tuple(drawn.logprobs), reason)
                )
        charge(
            ledgers,
            (
                self._usage(len(prefix_of(r.state)), count, [len(chunk) for chunk in row])
                for r, row, count in zip(requests, chunks, computed, strict=True)
            ),
        )
        return chunks

    def logprobs(
        self,
        states: Sequence[TextState],
        chunks: Sequence[Chunk],
        *,
        ledgers: Sequence[Ledger] | None = None,
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of given chunks; see `LanguageModel.logprobs`.

        They are those of the model's own forward pass over state and chunk together.
        """
        check_judging_arguments(states, chunks)
        sequences, firsts = self._judged(states, chunks)
        return self._passes(
            self._logits_after(sequences, firsts),
            sequences,
            ledgers,
            lambda i, logits: tuple(chosen_logprobs(logits, chunks[i].token_ids)),
        )

    def log_distributions(
        self, states: Sequence[TextState], chunks: Sequence[Chunk]
    ) -> list[torch.Tensor]:
        """The whole distribution (log-probabilities, nats) at each token of each chunk.

        Returns:
            float32[len(chunks[i]), V] for each state, V numbers a token: mind the memory.
        """
        check_judging_arguments(states, chunks)
        sequences, firsts = self._judged(states, chunks)
        return self._passes(
            self._logits_after(sequences, firsts),
            sequences,
            None,
            lambda i, logits: logits[: len(chunks[i])].log_softmax(-1),
        )

    def next_tokens(
        self, states: Sequence[TextState], k: int, *, ledgers: Sequence[Ledger] | None = None
    ) -> list[NextTokens]:
        """The k most probable next tokens of each state; see `LanguageModel.next_tokens`."""
        check_unfinished(states)
        if not 1 <= k <= self.vocab_size:
            raise ValueError(f"k: expected a number from 1 to {self.vocab_size}, got {k}.")
        sequences = [prefix_of(state) for state in states]

        def read(i: int, logits: torch.Tensor) -> NextTokens:
            ids, logs = top_tokens(logits, k)
            return NextTokens(tuple(ids[0].tolist()), tuple(logs[0].tolist()))

        passes = self._logits_after(sequences, [len(sequence) - 1 for sequence in sequences])
        return self._passes(passes, sequences, ledgers, read)

    def features(
        self, states: Sequence[TextState], *, ledgers: Sequence[Ledger] | None = None
    ) -> npt.NDArray[np.float32]:
        """float32[B, hidden_size]: the last layer's hidden state of each prefix's last token.

        What is computed here is kept: sampling from the same states does not compute it again.
        """
        sequences = [prefix_of(state) for state in states]
        passes = self._hidden(sequences, [len(sequence) - 1 for sequence in sequences])

        def read(i: int, hidden: torch.Tensor) -> npt.NDArray[np.float32]:
            # A copy: the next pass computes in the same memory.
            return hidden[-1].float().cpu().numpy().copy()

        rows = self._passes(passes, sequences, ledgers, read)
        return np.array(rows, dtype=np.float32).reshape(len(states), self.feature_size)

    def usage_bound(self, prefix_tokens: int, new_tokens: Sequence[int]) -> Usage:
        """2 x parameters for each token of the prefix and of the chunks, plus attention."""
        switch = math.inf if self._switch is None else self._switch
        passes = 1
        if self._network is None or prefix_tokens > switch:
            # Without a cache, samples that do not fit into one batch do not share their prefix.
            passes = max(1, math.ceil(len(new_tokens) / self._plain_rows))
        computed = passes * prefix_tokens
        if self._network is None or prefix_tokens + max(new_tokens, default=0) > switch + 1:
            computed += sum(self._repeated(prefix_tokens, new) for new in new_tokens)
        if prefix_tokens <= switch:
            # What crosses the switch is judged as a whole, and computed anew there if it goes on.
            lengths = [prefix_tokens + new for new in new_tokens]
            computed += sum(length for length in lengths if length > switch)
            computed += sum(length for length in lengths if length > switch + 1)
        return self._usage(prefix_tokens, computed, new_tokens)

    def _usage(self, prefix: int, computed: int, new_tokens: Sequence[int]) -> Usage:
        return pass_usage(prefix, computed, new_tokens, self.num_parameters, self._attention_width)

    def _passes(
        self,
        passes: Iterator[tuple[int, torch.Tensor, int]],
        sequences: Sequence[Tokens],
        ledgers: Sequence[Ledger] | None,
        read: Callable[[int, torch.Tensor], T],
    ) -> list[T]:
        """What is read from the passes over sequences, which are charged to their ledgers."""
        found: dict[int, T] = {}
        computed = [0] * len(sequences)
        with timed(ledgers), self._lock, torch.inference_mode():
            for i, values, count in passes:
                found[i] = read(i, values)
                computed[i] = count
        usages = (self._usage(len(s), n, []) for s, n in zip(sequences, computed, strict=True))
        charge(ledgers, usages)
        return [found[i] for i in range(len(sequences))]

    def _judged(
        self, states: Sequence[TextState], chunks: Sequence[Chunk]
    ) -> tuple[list[Tokens], list[int]]:
        """What is computed to judge chunks, and the places after which their tokens stand."""
        pairs = zip(states, chunks, strict=True)
        sequences = [self._judging(prefix_of(s), c.token_ids) for s, c in pairs]
        return sequences, [len(prefix_of(state)) - 1 for state in states]

    def _weights_version(self) -> tuple[tuple[int, int], ...]:
        return tuple((p.data_ptr(), p._version) for p in self.model.parameters())

    def _refresh(self) -> None:
        """Notice weights that were trained since the last call; dropout is for training alone."""
        if self.model.training:
            self.model.eval()
        weights = self._weights_version()
        if weights != self._weights:
            self._weights = weights
            self._cache.clear()
            if self.dtype == torch.int8:
                self._network = LlamaNetwork(self.model, torch.int8)

    def _cached_batch(self, wanted: int, longest: int, capacity: int) -> tuple[CachedBatch, int]:
        """An empty batch of up to `wanted` rows within the memory allowed, and its rows."""
        assert self._network is not None
        shape = self._network.shape
        rows = kv_rows(shape, capacity, wanted, self.kv_bytes // 2)
        kv = self._kv
        if kv is None or kv.allocated[0] < rows or kv.allocated[1] < capacity:
            self._kv = None  # Two of them at once would not be within the bound.
            kv = self._kv = KVBatch(shape, rows, capacity)
        # As if it were new: what was sampled before may not change what is sampled now.
        kv.clear(longest, capacity)
        return CachedBatch(self._network, self._cache, kv), rows

    def _run(self, queue: Sequence[Sampled]) -> list[int]:
        """Sample the queue; returns the prefix tokens computed for each request."""
        computed = [0] * (1 + max((chunk.request for chunk in queue), default=-1))
        self._refresh()
        switch = self._switch
        if switch is None:
            self._decode(queue, computed, self._network)
            return computed
        near = [chunk for chunk in queue if len(chunk.sequence) <= switch]
        limits = [chunk.limit for chunk in near]
        for chunk in near:
            chunk.limit = min(chunk.limit, switch + 1 - len(chunk.sequence))
        self._decode(near, computed, self._network)
        for chunk, limit in zip(near, limits, strict=True):
            chunk.limit = limit
        going_on = [chunk for chunk in near if not is_done(chunk, self)]
        far = [chunk for chunk in queue if chunk.tokens == []] + going_on
        self._decode(far, computed, None)
        # As `logprobs` gives them: a pass over the whole sequence, with its angles.
        crossing = [chunk for chunk in near if len(chunk.sequence) > switch]
        sequences = [self._judging(prefix_of(chunk.state), chunk.tokens) for chunk in crossing]
        firsts = [len(prefix_of(chunk.state)) - 1 for chunk in crossing]
        for i, logits, count in self._logits_after(sequences, firsts):
            crossing[i].logprobs[:] = chosen_logprobs(logits, crossing[i].tokens)
            computed[crossing[i].request] += count
        return computed

    def _decode(
        self, queue: Sequence[Sampled], computed: list[int], network: Network | None
    ) -> None:
        """Sample chunks, over kept keys and values where a network is given."""
        if not queue:
            return
        if network is None:
            before = [(len(chunk.sequence), len(chunk.tokens)) for chunk in queue]
            for part in whole_requests(queue, self._plain_rows):
                decode(part, plain_batch(self._engine, self.model), len(part), self, computed)
            for chunk, (prefix, start) in zip(queue, before, strict=True):
                computed[chunk.request] += self._repeated(prefix, len(chunk.tokens) - start)
            return
        longest = max(len(chunk.sequence) for chunk in queue)
        capacity = max(len(chunk.sequence) + chunk.limit for chunk in queue)
        # Room to go on without moving anything while rows come and go.
        capacity += capacity // 4 if len(queue) > self.batch_size else 0
        cached, rows = self._cached_batch(min(self.batch_size, len(queue)), longest, capacity)
        decode(queue, cached, rows, self, computed)

    @property
    def _plain_rows(self) -> int:
        """Most rows side by side where no network is used."""
        return 1 if self._engine.alone else self.batch_size

    def _repeated(self, prefix: int, new: int) -> int:
        """Tokens computed again for `new` tokens after a prefix, where nothing is kept of them."""
        if self._engine.steps:
            return 0
        return sum(prefix + place - 1 for place in range(1, new))

    def _hidden(
        self, sequences: Sequence[Tokens], firsts: Sequence[int]
    ) -> Iterator[tuple[int, torch.Tensor, int]]:
        """Index, hidden states from place `firsts[i]` to the end, and tokens computed for it."""
        self._refresh()
        switch = math.inf if self._switch is None else self._switch
        near = [i for i in range(len(sequences)) if len(sequences[i]) <= switch]
        far = [i for i in range(len(sequences)) if len(sequences[i]) > switch]
        if self._network is None:
            yield from self._hidden_without_cache(near, sequences, firsts)
        else:
            yield from self._hidden_with_cache(near, sequences, firsts)
        yield from self._hidden_without_cache(far, sequences, firsts)

    def _hidden_with_cache(
        self, indices: Sequence[int], sequences: Sequence[Tokens], firsts: Sequence[int]
    ) -> Iterator[tuple[int, torch.Tensor, int]]:
        owners: dict[Tokens, list[int]] = {}
        for i in sorted(indices, key=lambda i: (-len(sequences[i]), sequences[i])):
            owners.setdefault(sequences[i], []).append(i)
        unique = list(owners)
        while unique:
            longest = len(unique[0])
            batch, rows = self._cached_batch(min(self.batch_size, len(unique)), longest, longest)
            part, unique = unique[:rows], unique[rows:]
            found = batch.add(part, [1] * len(part))
            for row, place in enumerate(found.rows):
                sequence, count = part[place], found.computed[place]
                for i in owners[sequence]:
                    yield i, batch.hidden(row, firsts[i], len(sequence)), count
                    count = 0

    def _hidden_without_cache(
        self, indices: Sequence[int], sequences: Sequence[Tokens], firsts: Sequence[int]
    ) -> Iterator[tuple[int, torch.Tensor, int]]:
        order = sorted(indices, key=lambda i: len(sequences[i]))
        for start in range(0, len(order), self._plain_rows):
            part = order[start : start + self._plain_rows]
            found = plain_hidden(self._engine.own, [sequences[i] for i in part], self.device)
            for i, hidden in zip(part, found, strict=True):
                yield i, hidden[firsts[i] :], len(sequences[i])

    def _judging(self, prefix: Tokens, tokens: Sequence[int]) -> Tokens:
        """What a pass goes over to judge tokens after a prefix.

        The last one is left out, unless it takes a longrope model across its switch.
        """
        crosses = len(prefix) + len(tokens) - 1 == self._switch
        return (*prefix, *(tokens if crosses else tokens[:-1]))

    def _logits_after(
        self, sequences: Sequence[Tokens], firsts: Sequence[int]
    ) -> Iterator[tuple[int, torch.Tensor, int]]:
        """Index, float32 logits after each token from place `firsts[i]` on, tokens computed."""
        for i, hidden, count in self._hidden(sequences, firsts):
            logits = [self._to_logits(part) for part in hidden.split(_LOGIT_ROWS)]
            yield i, torch.cat(logits), count

    def _to_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return (self._network or self._engine.own).logits(hidden)

"""Any causal language model of transformers, by name or folder, under the package's protocol.

The decoding loop is our own: a state's prefix is computed once for all its samples, sequences that
end leave the batch, and every sequence draws from its own random stream, so that the batch around
it does not change its tokens (floating-point ties aside).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
)

from mbrl_text_env.language_models.base import (
    PromptTooLongError,
    SamplingParams,
    check_sample_arguments,
    check_unfinished,
    stream,
)
from mbrl_text_env.ledger import Ledger, Usage, timed
from mbrl_text_env.types import Chunk, FinishReason, Prompt, TextState

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Sequences that have ended are dropped from the key-value cache when they are this share of the
# batch: dropping copies the whole cache, so doing it at every end would cost more than it saves.
_COMPACTION_SHARE = 1 / 8


class ModelLoadError(ValueError):
    """A folder or Hub name from which no model could be loaded."""


class HFTokenizer:
    """A transformers tokenizer, with what it takes to know when a response ends.

    Args:
        source: Name on the Hub, folder, or a loaded transformers tokenizer.
        stop_token_ids: Ids that end a response; by default the end-of-sequence ids of the
            tokenizer and of the model's generation config, or of its config where it has none.
        context_length: Most tokens of prompt and response together; by default the model config's.

    Raises:
        ModelLoadError: Nothing could be loaded from `source`.
    """

    def __init__(
        self,
        source: str | Path | PreTrainedTokenizerBase,
        stop_token_ids: Iterable[int] | None = None,
        context_length: int | None = None,
    ) -> None:
        named = isinstance(source, (str, Path))
        loaded: Any = source
        self.tokenizer = _load(AutoTokenizer, source) if named else loaded
        if named and not self.tokenizer("text", add_special_tokens=False)["input_ids"]:
            # transformers makes an empty one where the files are missing.
            raise ModelLoadError(
                f"{str(source)!r} has no tokenizer files. Save the model's tokenizer there, or "
                "pass it as `tokenizer`."
            )
        config = _load_optional(AutoConfig, source) if named else None
        text_config = config.get_text_config() if config is not None else None
        self.vocab_size: int = max(len(self.tokenizer), getattr(text_config, "vocab_size", 0))
        generation = _load_optional(GenerationConfig, source) if named else None
        self.stop_token_ids = (
            frozenset(stop_token_ids)
            if stop_token_ids is not None
            else _stop_ids(self.tokenizer.eos_token_id, generation or text_config)
        )
        self.context_length: int = context_length or _context_length(text_config, self.tokenizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> HFTokenizer:
        # Read-only. Gymnasium deep-copies the arguments of an environment whenever its spec is
        # read through a wrapper.
        return self

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt: chat messages through the chat template, plain text as it is.

        Raises:
            PromptTooLongError: It leaves no room for a response.
            ValueError: It is a chat, and the tokenizer has no chat template.
        """
        if isinstance(prompt.content, str):
            ids = list(self.tokenizer(prompt.content)["input_ids"])
        else:
            if self.tokenizer.chat_template is None:
                raise ValueError(
                    f"Prompt {prompt.id!r} is a chat, but the tokenizer has no chat template. Load "
                    "prompts with chat=False, or use an instruction-tuned model."
                )
            messages = [{"role": m.role, "content": m.content} for m in prompt.content]
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        if not ids:
            raise ValueError(f"Prompt {prompt.id!r} has no tokens: {prompt.text!r}. Give it text.")
        _check_room(prompt, len(ids), self.context_length)
        return tuple(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class TransformersLM:
    """A causal language model of transformers.

    Args:
        model: Name on the Hub, folder, or a loaded transformers model.
        tokenizer: Its tokenizer; by default loaded from the same name or folder.
        name: What reports call it; by default the last part of the model's name or folder.
        device: By default `"cuda"` where there is one, otherwise `"cpu"`.
        dtype: By default float32 on a CPU and bfloat16 elsewhere.
        batch_size: Most sequences decoded together; memory grows with it.

    Raises:
        ModelLoadError: Nothing could be loaded from the name or folder, or the model keeps no
            key-value cache (RWKV, Mamba and other purely recurrent ones; hybrids are fine).
        ValueError: `batch_size` is below 1, or a loaded model came without a tokenizer.

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
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}.")
        named = isinstance(model, (str, Path))
        if tokenizer is None:
            if not named:
                raise ValueError(
                    "A loaded model needs its tokenizer too: pass TransformersLM(model, "
                    "tokenizer=...)."
                )
            tokenizer = str(model)
        path = Path(str(getattr(model, "name_or_path", model)))
        self.name = name or path.name or type(model).__name__
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.dtype = dtype
        self.batch_size = batch_size
        loaded: Any = _load(AutoModelForCausalLM, model, dtype=dtype) if named else model
        _check_cache(loaded)
        self.model = loaded.to(self.device, dtype).eval()
        self._tokenizer = (
            tokenizer if isinstance(tokenizer, HFTokenizer) else HFTokenizer(tokenizer)
        )
        config = self.model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.stop_token_ids = self._tokenizer.stop_token_ids | _stop_ids(
            None, self.model.generation_config
        )
        self.context_length = min(
            _context_length(config, self._tokenizer.tokenizer), self._tokenizer.context_length
        )
        self.feature_size: int = config.hidden_size
        # The input embedding is looked up, not multiplied; only a tied one is the output layer too.
        lookup = 0 if config.tie_word_embeddings else self.vocab_size * config.hidden_size
        self.num_parameters: int = self.model.num_parameters() - lookup
        # The heads together are as wide as the model, unless the config gives their size.
        head_size = getattr(config, "head_dim", None)
        width = config.num_attention_heads * head_size if head_size else config.hidden_size
        self._attention_width: int = config.num_hidden_layers * width

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformersLM:
        # A shared, read-only engine: environments and agents that are copied go on using this one.
        return self

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt; see `HFTokenizer.encode_prompt`."""
        ids = self._tokenizer.encode_prompt(prompt)
        # A tokenizer that was passed in loaded knows nothing of the model's context.
        _check_room(prompt, len(ids), self.context_length)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._tokenizer.decode(token_ids)

    def sample(
        self,
        states: Sequence[TextState],
        num_samples: int,
        max_new_tokens: int,
        *,
        seeds: Sequence[int],
        first_sample: int = 0,
        params: SamplingParams = SamplingParams(),
        ledgers: Sequence[Ledger] | None = None,
    ) -> list[list[Chunk]]:
        """Draw chunks; see `LanguageModel.sample`."""
        check_sample_arguments(states, num_samples, max_new_tokens, seeds)
        chunks: list[list[Chunk]] = [[] for _ in states]
        with timed(ledgers):
            for batch, first, count in self._batches(states, num_samples):
                drawn = self._decode(
                    [states[i] for i in batch],
                    range(first_sample + first, first_sample + first + count),
                    max_new_tokens,
                    [seeds[i] for i in batch],
                    params,
                )
                for i, row in zip(batch, drawn, strict=True):
                    chunks[i].extend(row)
        if ledgers is not None:
            for state, row, ledger in zip(states, chunks, ledgers, strict=True):
                ledger.charge(self.usage(len(_prefix(state)), [len(chunk) for chunk in row]))
        return chunks

    @torch.inference_mode()
    def logprobs(
        self,
        states: Sequence[TextState],
        chunks: Sequence[Chunk],
        *,
        ledgers: Sequence[Ledger] | None = None,
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of given chunks; see `LanguageModel.logprobs`."""
        check_unfinished(states)
        if len(chunks) != len(states):
            raise ValueError(f"Expected one chunk a state ({len(states)}), got {len(chunks)}.")
        found: list[tuple[float, ...]] = []
        with timed(ledgers):
            for start in range(0, len(states), self.batch_size):
                part = slice(start, start + self.batch_size)
                found.extend(self._chunk_logprobs(states[part], chunks[part]))
        if ledgers is not None:
            for state, chunk, ledger in zip(states, chunks, ledgers, strict=True):
                ledger.charge(self.usage(len(_prefix(state)) + len(chunk), []))
        return found

    @torch.inference_mode()
    def features(
        self, states: Sequence[TextState], *, ledgers: Sequence[Ledger] | None = None
    ) -> npt.NDArray[np.float32]:
        """float32[B, hidden_size]: the last layer's hidden state of each prefix's last token."""
        rows = np.zeros((len(states), self.feature_size), dtype=np.float32)
        with timed(ledgers):
            for start in range(0, len(states), self.batch_size):
                part = slice(start, start + self.batch_size)
                inputs = self._inputs([_prefix(state) for state in states[part]])
                hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
                rows[part] = hidden[:, -1].float().cpu().numpy()
        if ledgers is not None:
            for state, ledger in zip(states, ledgers, strict=True):
                ledger.charge(self.usage(len(_prefix(state)), []))
        return rows

    def usage(self, prefix_tokens: int, new_tokens: Sequence[int]) -> Usage:
        """2 x parameters for each token of the prefix and of the chunks, plus attention."""
        # More samples than fit into a batch share no prefix computation across batches.
        passes = max(1, math.ceil(len(new_tokens) / self.batch_size))
        prompt, new = passes * prefix_tokens, sum(new_tokens)
        # Scores and weighted values: 2 x 2 x context x width for each layer and token; a prefix
        # token attends to half the prefix on average.
        attended = passes * prefix_tokens * prefix_tokens / 2
        attended += sum(n * prefix_tokens + n * n / 2 for n in new_tokens)
        flops = 2.0 * self.num_parameters * (prompt + new) + 4.0 * self._attention_width * attended
        return Usage(prompt_tokens=prompt, generated_tokens=new, lm_calls=1, lm_flops=flops)

    def _batches(
        self, states: Sequence[TextState], num_samples: int
    ) -> Iterator[tuple[list[int], int, int]]:
        """Batches of similar length: indices of states, first sample and number of samples."""
        order = sorted(range(len(states)), key=lambda i: len(_prefix(states[i])))
        for first in range(0, num_samples, self.batch_size):
            count = min(self.batch_size, num_samples - first)
            width = max(1, self.batch_size // count)
            for start in range(0, len(order), width):
                yield order[start : start + width], first, count

    @torch.inference_mode()
    def _decode(
        self,
        states: Sequence[TextState],
        samples: range,
        max_new_tokens: int,
        seeds: Sequence[int],
        params: SamplingParams,
    ) -> list[list[Chunk]]:
        limits = self._limits(states, max_new_tokens)
        rows = [(i, k) for i in range(len(states)) for k in samples]
        uniforms = np.stack(
            [stream(seeds[i], states[i], k).random(max_new_tokens) for i, k in rows]
        )
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        batch = _Prefilled(self, [_prefix(state) for state in states], len(samples))
        alive = np.arange(len(rows))
        running = np.ones(len(rows), dtype=bool)
        for step in range(max_new_tokens):
            draws = torch.from_numpy(uniforms[alive, step]).to(self.device)
            drawn, logs = draw(batch.logits, draws, params)
            new_tokens, new_logs = drawn.tolist(), logs.tolist()
            for place, row in enumerate(alive.tolist()):
                if running[row]:
                    tokens[row].append(new_tokens[place])
                    logprobs[row].append(new_logs[place])
                    ended = new_tokens[place] in self.stop_token_ids
                    running[row] = not ended and len(tokens[row]) < limits[rows[row][0]]
            if not running.any():
                break
            keep = np.flatnonzero(running[alive])
            if len(keep) <= len(alive) * (1 - _COMPACTION_SHARE):
                batch.keep(keep)
                alive, drawn = alive[keep], drawn[torch.from_numpy(keep).to(self.device)]
            batch.append(drawn)
        chunks = [
            self._chunk(states[i], t, p)
            for (i, _), t, p in zip(rows, tokens, logprobs, strict=True)
        ]
        size = len(samples)
        return [chunks[start : start + size] for start in range(0, len(chunks), size)]

    def _limits(self, states: Sequence[TextState], max_new_tokens: int) -> list[int]:
        limits = []
        for state in states:
            room = self.context_length - len(_prefix(state))
            if room < 1:
                raise PromptTooLongError(
                    f"Prompt {state.prompt.id!r} and its response have {len(_prefix(state))} "
                    f"tokens and fill the model's context of {self.context_length}."
                )
            limits.append(min(max_new_tokens, room))
        return limits

    def _chunk(self, state: TextState, ids: list[int], logprobs: list[float]) -> Chunk:
        reason: FinishReason | None = None
        if ids[-1] in self.stop_token_ids:
            reason = "stop"
        elif len(_prefix(state)) + len(ids) >= self.context_length:
            reason = "length"
        return Chunk(tuple(ids), tuple(logprobs), reason)

    def _chunk_logprobs(
        self, states: Sequence[TextState], chunks: Sequence[Chunk]
    ) -> list[tuple[float, ...]]:
        inputs = self._inputs(
            [_prefix(state) + chunk.token_ids for state, chunk in zip(states, chunks, strict=True)]
        )
        longest = max(len(chunk) for chunk in chunks)
        logits = self.model(**inputs, use_cache=False, logits_to_keep=longest + 1).logits
        # Some models take no notice of `logits_to_keep` and return the logits of every place.
        logits = logits[:, -longest - 1 : -1].float()
        targets = inputs["input_ids"][:, -longest:, None]
        logs = logits.log_softmax(-1).gather(-1, targets).squeeze(-1).tolist()
        # Sequences are padded on the left, so a chunk's tokens are the last ones of its row.
        return [tuple(row[-len(chunk) :]) for row, chunk in zip(logs, chunks, strict=True)]

    def _inputs(self, sequences: Sequence[tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Sequences padded on the left, with their mask and positions, on the model's device."""
        width = max(len(sequence) for sequence in sequences)
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, width - len(sequence) :] = torch.tensor(sequence)
            mask[row, width - len(sequence) :] = 1
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        }
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}


class _Prefilled:
    """A batch of sequences in decoding: its key-value cache, mask and next-token logits."""

    def __init__(
        self, lm: TransformersLM, prefixes: Sequence[tuple[int, ...]], copies: int
    ) -> None:
        self.lm = lm
        inputs = lm._inputs(prefixes)
        self.cache: Any = DynamicCache(config=lm.model.config)
        logits = lm.model(
            **inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        self.logits = logits[:, -1].float().repeat_interleave(copies, 0)
        self.mask, self.positions = inputs["attention_mask"], inputs["position_ids"][:, -1:]
        if copies > 1:
            self._select(torch.arange(len(prefixes)).repeat_interleave(copies))

    def keep(self, rows: npt.NDArray[np.intp]) -> None:
        """Drop all other sequences."""
        self._select(torch.from_numpy(rows))

    def _select(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.mask.device)
        # The beam search's reordering: unlike the cache's other methods on the batch, every kind of
        # layer has it, those of hybrid models too.
        self.cache.reorder_cache(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def append(self, tokens: torch.Tensor) -> None:
        """Append one token a sequence (int64[B]) and compute the next logits."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        # A sequence that has ended may stay in the batch, but not run over the last position.
        self.positions = (self.positions + 1).clamp(max=self.lm.context_length - 1)
        self.logits = (
            self.lm.model(
                input_ids=tokens[:, None],
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
            )
            .logits[:, -1]
            .float()
        )


def draw(
    logits: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn uniform numbers into tokens by the inverse of the cumulative distribution.

    One pass over the vocabulary a sequence; `torch.multinomial` costs several, and draws from a
    generator that all sequences share.

    Args:
        logits: float32[B, V].
        uniforms: float64[B] in [0, 1).
        params: Temperature, top-k and top-p, applied in this order.

    Returns:
        Tokens int64[B] and their log-probabilities float32[B] (nats) under the unshaped
        distribution.
    """
    if params.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        # Relative to the largest, so that no quotient by a small temperature overflows.
        scaled = logits - logits.amax(-1, keepdim=True)
        scaled /= max(params.temperature, torch.finfo(scaled.dtype).tiny)
        if params.top_k and params.top_k < scaled.shape[-1]:
            least = scaled.topk(params.top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        probabilities = scaled.softmax(-1)
        if params.top_p < 1.0:
            probabilities = _nucleus(probabilities, params.top_p)
        # Doubles: the rounding of 50,000 sums in single precision would show in the samples.
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        targets = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    chosen = logits.gather(-1, tokens[:, None]).squeeze(-1)
    return tokens, chosen - logits.logsumexp(-1)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, order = probabilities.sort(dim=-1, descending=True)
    # A token stays if the ones before it have not reached top_p; the first always does.
    dropped = ordered.cumsum(-1) - ordered >= top_p
    dropped[:, 0] = False
    return probabilities.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)


def _prefix(state: TextState) -> tuple[int, ...]:
    return state.prompt_ids + state.response_ids


def _load(factory: Any, source: Any, **options: Any) -> Any:
    try:
        return factory.from_pretrained(str(source), **options)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelLoadError(
            f"Expected the folder of a transformers causal language model with its tokenizer, or a "
            f"name on the Hugging Face Hub that is reachable or already downloaded; got {source!r} "
            f"({type(error).__name__}: {reason}). Check the spelling, the network, or "
            "HF_HUB_OFFLINE; `language_models.embedded()` needs no network."
        ) from error


def _load_optional(factory: Any, source: Any) -> Any:
    """A config that a folder with a tokenizer alone does not have."""
    try:
        return factory.from_pretrained(str(source))
    except (OSError, ValueError):
        return None


def _check_cache(model: Any) -> None:
    """Refuse models whose state is no key-value cache; they would go on without any memory."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ModelLoadError(
            f"{type(model).__name__} keeps no key-value cache, so its prefixes cannot be shared "
            "among samples. Use a model with attention, such as Llama, Qwen, Gemma or GPT-2."
        )


def _check_room(prompt: Prompt, length: int, context_length: int) -> None:
    if length >= context_length:
        raise PromptTooLongError(
            f"Prompt {prompt.id!r} has {length} tokens, but the model's context holds "
            f"{context_length} tokens of prompt and response together. Shorten it, or use a model "
            "with a longer context."
        )


def _stop_ids(eos_token_id: int | None, config: Any) -> frozenset[int]:
    configured = getattr(config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [eos_token_id, *listed] if i is not None)


def _context_length(config: Any, tokenizer: Any) -> int:
    # Tokenizers without a limit report a huge number.
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    known = [limit for limit in limits if limit is not None and limit < 10**9]
    return min(known) if known else 2**31

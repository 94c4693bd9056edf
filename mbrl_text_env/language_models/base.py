"""What the environment and the agents need of a tokenizer and a language model."""

from __future__ import annotations

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mbrl_text_env.types import (
    Chunk,
    FinishReason,
    Ledger,
    Prompt,
    TextState,
    Usage,
    check_positive,
)


class PromptEncodingError(ValueError):
    """A prompt that a tokenizer or its chat template does not take."""


class PromptTooLongError(PromptEncodingError):
    """A prompt that leaves no room for a response in the model's context."""


class UnknownTokenError(PromptEncodingError):
    """A prompt with a token that the tokenizer knows and the model does not."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn: temperature, then top-k, then top-p, as in transformers and vLLM.

    Args:
        temperature: 0 is greedy decoding; 1 the model's own distribution.
        top_p: Smallest set of tokens whose probability reaches `top_p`; 1 keeps all.
        top_k: Number of most probable tokens kept; 0 keeps all.
        stop: Texts that end a chunk with the token that completes one of them, such as
            `("\n\n",)` for a paragraph. The response goes on: only a stop token ends it.

    Raises:
        ValueError: A value is outside its range.
        TypeError: `stop` is one string instead of a tuple.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a number from 0 up, got {self.temperature!r}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a number above 0 and up to 1, got {self.top_p!r}.")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (keep all) or more, got {self.top_k!r}.")
        if isinstance(self.stop, str):
            raise TypeError(f"stop: expected a tuple of strings, got {self.stop!r}; write a tuple.")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not all(self.stop):
            raise ValueError(f"stop: expected texts that are not empty, got {self.stop!r}.")

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the model's own distribution."""
        return (self.temperature, self.top_p, self.top_k) == (1.0, 1.0, 0)


@dataclass(frozen=True)
class Guard:
    """What a response's text may not become, watched while its tokens are drawn.

    A token is drawn as ever and looked at; only where the text may not go on so, others follow from
    the most probable tokens that are left. Where none is left, the chunk ends with the token first
    drawn. Where nothing is refused, tokens are those of plain sampling. The law of a token is
    plain sampling's if that may follow; otherwise the model's at the same temperature over those
    that may follow. Each token is renormalised by itself, whatever it leads to, so responses are no
    sample of the model's distribution over those that are allowed.

    A language model without `guards`, such as a server, is asked for whole chunks, which are cut at
    their first refused token (`guarding`); all that was drawn is charged. Where it does not give
    its most probable next tokens, the place is drawn again, up to 8 times (not at temperature 0):
    if q is the probability of what may not follow, the chunk ends there with probability q**9.

    With `weighted`, replacements come from the whole distribution that the sampling parameters
    shape, and `Chunk.log_weight` undoes the renormalisation: for any function f, the mean of weight
    x f(chunk) is the sum of p(chunk) f(chunk) over the allowed chunks, p being plain sampling's. It
    takes a second look at each token, and a language model with `guards`.

    Source: Lipkin et al., "Fast Controlled Generation from Language Models with Adaptive Weighted
    Rejection Sampling", 2025. Deviations: without weights it is locally constrained decoding with
    lazy checks; with them, the weight of a token is (1 - what was rejected) x (1 if another token,
    drawn without replacement, may follow too; otherwise the token's share of what was left).

    Args:
        allows: `allows(states, texts, ended) -> bool[B]`: whether the response to
            `states[i].prompt` may begin with `texts[i]`, or be it where `ended[i]`. What it
            refuses, it refuses however the text goes on.
        floor: The least log-probability (nats) of a token in place of a refused one.
        candidates: How many of the most probable tokens are tried.
        weighted: Whether chunks get weights; then `floor` and `candidates` do not count.
        kept: What redrawing leaves of a ledger's budget, for language models without `guards`.
    """

    allows: Callable[[Sequence[TextState], Sequence[str], Sequence[bool]], Sequence[bool]]
    floor: float = -7.0
    candidates: int = 64
    weighted: bool = False
    kept: Usage = field(default_factory=Usage)


@dataclass(frozen=True)
class SampleRequest:
    """One state's part of a call of `LanguageModel.sample`, which describes the fields."""

    state: TextState
    num_samples: int
    max_new_tokens: int
    seed: int
    first_sample: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)
    guard: Guard | None = None


@runtime_checkable
class Tokenizer(Protocol):
    """Token ids in, token ids out; text only for people and reward models."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, which are 0 to vocab_size - 1."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Ids that end a response."""

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and response may have together."""

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, chat template and generation mark included.

        What a prompt says is encoded as text: only the template writes control tokens. A prompt
        that leaves no room for a response is a `PromptTooLongError`; any other that cannot be
        encoded, a ValueError that names it and what to change.
        """

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response, special tokens left out."""


@dataclass(frozen=True)
class NextTokens:
    """The most probable next tokens of a state, best first; `logprobs` (nats) are the model's."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class LanguageModel(ABC):
    """A distribution over token sequences, batched; it is its own `Tokenizer`.

    Abstract are what it is (`name`, the tokenizer's attributes), `sample_requests`, `logprobs` and
    `usage_bound`; `mbrl_text_env.checks.check_language_model` checks them all. In all methods
    `ledgers` has one ledger a state (or request), which is charged for it.
    """

    name: str
    vocab_size: int
    stop_token_ids: frozenset[int]
    context_length: int
    cache_tokens: int = 0
    """Tokens of prefixes that can be kept between calls; 0 for none."""
    guards: bool = False
    """Whether `sample_requests` watches guards; elsewhere `guarding.sample_requests` does."""

    @property
    def counts_flops(self) -> bool:
        """Whether ledgers are charged FLOPs; if not, budgets in FLOPs are refused."""
        return True

    @abstractmethod
    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """See `Tokenizer.encode_prompt`."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""

    def encode_text(self, text: str) -> Sequence[int]:
        """Token ids of a text alone, without control tokens, to follow those of a response.

        Raises:
            NotImplementedError: The model does not give them.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not encode texts (`encode_text`). Use TransformersLM, or "
            "an agent that adds none."
        )

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
        """Draw `chunks[len(states)][num_samples]`, their log-probabilities included.

        Args:
            states: States that have not ended.
            num_samples: Chunks a state, at least 1.
            max_new_tokens: Most tokens a chunk, at least 1. A chunk is shorter only if it ends with
                a stop token or text, or the context is full.
            seeds: One a state. Chunk k of a state is a function of its seed, its tokens and k
                alone (`stream`), not of the batch around it.
            first_sample: The first k: 4 chunks from 0 and then 4 from 4 are the 8 from 0.
            params: Temperature, top-p, top-k, stop strings.
            ledgers: Tokens, calls, FLOPs and time are charged there.

        Raises:
            ValueError: A count is below 1, the lengths differ, or a state has ended.
        """
        check_sample_arguments(states, num_samples, max_new_tokens, seeds)
        requests = [
            SampleRequest(state, num_samples, max_new_tokens, seed, first_sample, params)
            for state, seed in zip(states, seeds, strict=True)
        ]
        return self.sample_requests(requests, ledgers=ledgers)

    @abstractmethod
    def sample_requests(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> list[list[Chunk]]:
        """`sample` for requests that differ in more: `chunks[i][requests[i].num_samples]`.

        `check_requests` refuses what cannot be sampled.
        """

    async def sample_requests_async(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> list[list[Chunk]]:
        """`sample_requests` in a thread, by default."""
        return await asyncio.to_thread(sample_requests, self, requests, ledgers=ledgers)

    @abstractmethod
    def logprobs(
        self,
        states: Sequence[TextState],
        chunks: Sequence[Chunk],
        *,
        ledgers: Sequence[Ledger] | None = None,
    ) -> list[tuple[float, ...]]:
        """Log-probability (nats) of each token of `chunks[i]` after `states[i]`."""

    def next_tokens(
        self, states: Sequence[TextState], k: int, *, ledgers: Sequence[Ledger] | None = None
    ) -> list[NextTokens]:
        """The k most probable next tokens of each state.

        Raises:
            NotImplementedError: The model does not give them.
            ValueError: k is below 1 or above the size of the vocabulary, or a state has ended.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not give the most probable next tokens (`next_tokens`). "
            "Use TransformersLM, or an agent that samples."
        )

    @abstractmethod
    def usage_bound(self, prefix_tokens: int, new_tokens: Sequence[int]) -> Usage:
        """The most that `sample` charges for a state of `prefix_tokens`, none of them cached.

        `new_tokens` has the length of each chunk sampled after it.
        """

    def clear_cache(self) -> None:  # noqa: B027 a default, not a duty
        """Forget all prefixes; nothing to do where none are kept."""


class FeatureModel(LanguageModel):
    """A language model that also gives features of a prefix: `isinstance` tells."""

    feature_size: int

    @abstractmethod
    def features(
        self, states: Sequence[TextState], *, ledgers: Sequence[Ledger] | None = None
    ) -> npt.NDArray[np.float32]:
        """float32[len(states), feature_size]."""


def sample_requests(
    language_model: LanguageModel,
    requests: Sequence[SampleRequest],
    *,
    ledgers: Sequence[Ledger] | None = None,
) -> list[list[Chunk]]:
    """`LanguageModel.sample_requests` of any language model, also one with a `sample` of its own.

    Of that one, requests of one kind are asked for together.
    """
    if _has_common_batches(language_model):
        return language_model.sample_requests(requests, ledgers=ledgers)
    kinds: dict[tuple[int, int, int, SamplingParams], list[int]] = {}
    for i, r in enumerate(requests):
        kind = (r.num_samples, r.max_new_tokens, r.first_sample, r.params)
        kinds.setdefault(kind, []).append(i)
    rows: list[list[Chunk]] = [[] for _ in requests]
    for (num_samples, max_new_tokens, first_sample, params), indices in kinds.items():
        drawn = language_model.sample(
            [requests[i].state for i in indices],
            num_samples,
            max_new_tokens,
            seeds=[requests[i].seed for i in indices],
            first_sample=first_sample,
            params=params,
            ledgers=None if ledgers is None else [ledgers[i] for i in indices],
        )
        for i, row in zip(indices, drawn, strict=True):
            rows[i] = row
    return rows


def watches_guards(language_model: LanguageModel) -> bool:
    """Whether a language model watches guards by itself, for a `sample` takes none."""
    return getattr(language_model, "guards", False) and _has_common_batches(language_model)


def _has_common_batches(language_model: LanguageModel) -> bool:
    """Whether `sample_requests` is its own; a `sample` that overrides it is not gone around."""
    for holder in (language_model, *type(language_model).__mro__):
        names = getattr(holder, "__dict__", {})
        if "sample_requests" in names or "sample" in names:
            return "sample_requests" in names
    return False


def stream(seed: int, state: TextState, sample_index: int) -> np.random.Generator:
    """The random stream of one sequence: a function of seed, tokens and sample index.

    So neither the batch around a sequence nor the order of the calls changes its tokens. Asking
    again gives the same chunk; for fresh samples of a state, pass another seed.

    Example:
        >>> state = TextState(Prompt.from_text("Hi"), prompt_ids=(5, 6))
        >>> stream(0, state, 1).random() == stream(0, state, 1).random()
        True
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{seed}:{sample_index}:{len(state.prompt_ids)}:".encode())
    digest.update(state.prompt.id.encode())
    digest.update(np.asarray(prefix_of(state), dtype=np.int64).tobytes())
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))


def spawn_seed(seed: int, *path: int) -> int:
    """A new seed below 2**63 that follows from a seed and a path of integers.

    Example:
        >>> spawn_seed(0, 1) == spawn_seed(0, 1), spawn_seed(0, 1) == spawn_seed(0, 2)
        (True, False)
    """
    text = ":".join(map(str, (seed, *path)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def has_stop_text(tokenizer: Tokenizer, token_ids: Sequence[int], params: SamplingParams) -> bool:
    """Whether the text of a chunk's tokens contains one of `params.stop`."""
    if not params.stop:
        return False
    text = tokenizer.decode(token_ids)
    return any(stop in text for stop in params.stop)


def prefix_of(state: TextState) -> tuple[int, ...]:
    """All tokens of a state."""
    return state.prompt_ids + state.response_ids


def room_after(state: TextState, context_length: int) -> int:
    """Tokens that a model's context has left after a state, or a `PromptTooLongError`."""
    length = len(prefix_of(state))
    if length >= context_length:
        raise PromptTooLongError(
            f"Prompt {state.prompt.id!r} and its response have {length} tokens and fill the "
            f"model's context of {context_length}."
        )
    return context_length - length


def check_room(prompt: Prompt, length: int, context_length: int) -> None:
    """Raise a PromptTooLongError where a prompt of `length` tokens leaves no room to respond."""
    if length >= context_length:
        raise PromptTooLongError(
            f"Prompt {prompt.id!r} has {length} tokens, but the model's context holds "
            f"{context_length} tokens of prompt and response together. Shorten it, or use a model "
            "with a longer context."
        )


def finish_reason(
    tokenizer: Tokenizer, state: TextState, token_ids: Sequence[int]
) -> FinishReason | None:
    """Why a chunk ends the response to a state; None where the response goes on."""
    if token_ids[-1] in tokenizer.stop_token_ids:
        return "stop"
    is_full = len(prefix_of(state)) + len(token_ids) >= tokenizer.context_length
    return "length" if is_full else None


def charge(ledgers: Sequence[Ledger] | None, usages: Iterable[Usage]) -> None:
    """Charge each ledger its usage, where there are ledgers."""
    for usage, ledger in zip(usages, ledgers or (), strict=ledgers is not None):
        ledger.charge(usage)


def pass_usage(
    prefix: int, computed: int, new_tokens: Sequence[int], num_parameters: int, width: int
) -> Usage:
    """One call of a transformer: 2 x parameters for each token that went through, plus attention.

    Of the `prefix` tokens of a state some were `computed`, or more than there are where some were
    repeated; `width` is that of the heads of all layers together.
    """
    new = sum(new_tokens)
    # Scores and weighted values: 2 x 2 x context x width for each layer and token. The prefix's
    # last tokens are the ones that are computed; a token attends to those before it.
    attended = computed * prefix / 2
    if computed <= prefix:
        attended = (prefix**2 - (prefix - computed) ** 2) / 2
    attended += sum(n * prefix + n * n / 2 for n in new_tokens)
    return Usage(
        prompt_tokens=computed,
        cached_tokens=max(0, prefix - computed),
        generated_tokens=new,
        lm_calls=1,
        lm_flops=2.0 * num_parameters * (computed + new) + 4.0 * width * attended,
    )


def check_requests(requests: Sequence[SampleRequest], guards: bool = False) -> None:
    """Refuse requests that cannot be answered, also those with a guard where there are none."""
    for r in requests:
        if r.guard is not None and not guards:
            raise ValueError(
                "guard: expected a language model with `guards`, such as `TransformersLM`. Call "
                "`language_models.guarding.sample_requests` for one without."
            )
        check_sample_arguments([r.state], r.num_samples, r.max_new_tokens, [r.seed])


def check_sample_arguments(
    states: Sequence[TextState], num_samples: int, max_new_tokens: int, seeds: Sequence[int]
) -> None:
    """Raise the ValueErrors of `LanguageModel.sample`."""
    check_positive(num_samples=num_samples, max_new_tokens=max_new_tokens)
    if len(seeds) != len(states):
        raise ValueError(f"Expected one seed a state ({len(states)}), got {len(seeds)}.")
    check_unfinished(states)


def check_judging_arguments(states: Sequence[TextState], chunks: Sequence[Chunk]) -> None:
    """Raise a ValueError where `LanguageModel.logprobs` gets ended states, or too few chunks."""
    check_unfinished(states)
    if len(chunks) != len(states):
        raise ValueError(f"Expected one chunk a state ({len(states)}), got {len(chunks)}.")


def check_next_tokens(states: Sequence[TextState], k: int, most: int) -> None:
    """Raise the ValueErrors of `LanguageModel.next_tokens`, which gives at most so many."""
    check_unfinished(states)
    if not 1 <= k <= most:
        raise ValueError(f"k: expected a number from 1 to {most}, got {k}.")


def check_unfinished(states: Sequence[TextState]) -> None:
    """Raise a ValueError where the response to a state has ended."""
    for state in states:
        if state.finish_reason is not None:
            raise ValueError(
                f"The response to prompt {state.prompt.id!r} has ended ({state.finish_reason!r}); "
                "a language model cannot continue it. Leave ended states out of the batch."
            )

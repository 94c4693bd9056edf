"""Interfaces of the tokenizer and the language model that environments and agents use."""

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
    """The tokenizer or its chat template cannot encode a prompt."""


class PromptTooLongError(PromptEncodingError):
    """A prompt leaves no room for a response in the model's context."""


class UnknownTokenError(PromptEncodingError):
    """A prompt has a token that the tokenizer knows but the model does not."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters: temperature, then top-k, then top-p, as in transformers and vLLM.

    Args:
        temperature: 0 is greedy decoding; 1 is the model's own distribution.
        top_p: Keep the smallest set of tokens whose probability reaches `top_p`; 1 keeps all.
        top_k: Keep this many most probable tokens; 0 keeps all.
        stop: Strings that end a chunk after the token that completes one, such as `("\n\n",)` for
            paragraphs. The response continues: only a stop token ends it.

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
            raise ValueError(f"temperature: expected a number >= 0, got {self.temperature!r}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a number above 0 and up to 1, got {self.top_p!r}.")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (keep all) or more, got {self.top_k!r}.")
        if isinstance(self.stop, str):
            raise TypeError(f"stop: expected a tuple of strings, got {self.stop!r}; use a tuple.")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not all(self.stop):
            raise ValueError(f"stop: expected non-empty strings, got {self.stop!r}.")

    @property
    def is_plain(self) -> bool:
        """Whether tokens are sampled from the model's own distribution."""
        return (self.temperature, self.top_p, self.top_k) == (1.0, 1.0, 0)


@dataclass(frozen=True)
class Guard:
    """A constraint on a response's text, checked while its tokens are sampled.

    Each token is sampled as usual and then checked. If the text may not continue with it, it is
    replaced by one of the most probable tokens that are allowed. If none is allowed, the chunk ends
    with the token sampled first. Without a rejection, the result equals plain sampling. An allowed
    token has the plain sampling distribution; a replacement has the model's at the same
    temperature, restricted to allowed tokens. Each token is renormalised separately, so responses
    are not samples of the model's distribution over allowed responses.

    Language models without `guards`, such as servers, sample whole chunks, which are cut at the
    first rejected token (`guarding`); all sampled tokens are charged. If the model has no
    `next_tokens`, the position is resampled up to 8 times (not at temperature 0): if q is the
    probability of a rejection, the chunk ends there with probability q**9.

    With `weighted`, replacements come from the full distribution of the sampling parameters, and
    `Chunk.log_weight` corrects for the renormalisation: for any function f, the mean of weight
    x f(chunk) is the sum of p(chunk) f(chunk) over the allowed chunks, where p is plain sampling.
    This checks each token twice and needs a language model with `guards`. After `candidates`
    rejections, and each time they have doubled, the chunk continues with a probability equal to the
    remaining mass (relative to the last time) and its weight is divided by that probability;
    otherwise it ends with weight 0. This keeps the estimates unbiased (Russian roulette; Kahn, "Use
    of Different Monte Carlo Sampling Techniques", 1955) without checking the whole vocabulary.

    Source: Lipkin et al., "Fast Controlled Generation from Language Models with Adaptive Weighted
    Rejection Sampling", 2025. Deviations: without weights this is locally constrained decoding with
    lazy checks. With them, the weight of a token is (1 - rejected mass) x (1 if another token,
    sampled without replacement, is allowed too; otherwise the token's share of the remaining mass).

    Args:
        allows: `allows(states, texts, ended) -> bool[B]`: whether the response to
            `states[i].prompt` may start with `texts[i]`, or equal it if `ended[i]`. A rejected
            start must stay rejected for every continuation.
        floor: Minimum log-probability (nats) of a replacement token.
        candidates: Number of most probable tokens to try; with `weighted`, see above.
        weighted: Whether to compute weights; `floor` is then ignored.
        kept: Usage to reserve in the ledger's budget when resampling without `guards`.
    """

    allows: Callable[[Sequence[TextState], Sequence[str], Sequence[bool]], Sequence[bool]]
    floor: float = -7.0
    candidates: int = 64
    weighted: bool = False
    kept: Usage = field(default_factory=Usage)


@dataclass(frozen=True)
class SampleRequest:
    """The part of a `LanguageModel.sample` call for one state; see there for the fields."""

    state: TextState
    num_samples: int
    max_new_tokens: int
    seed: int
    first_sample: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)
    guard: Guard | None = None


@runtime_checkable
class Tokenizer(Protocol):
    """Converts between prompts or responses and token ids."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids; valid ids are 0 to vocab_size - 1."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Token ids that end a response."""

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of prompt and response together."""

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Encode a prompt, including the chat template and generation prompt.

        Message contents are encoded as plain text: only the template adds control tokens. Raises a
        `PromptTooLongError` if no room for a response is left, and a ValueError that names the
        prompt and the fix if it cannot be encoded.
        """

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode a response, without special tokens."""


@dataclass(frozen=True)
class NextTokens:
    """The most probable next tokens of a state, best first; `logprobs` (nats) are unshaped."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class LanguageModel(ABC):
    """A batched distribution over token sequences; it is also its own `Tokenizer`.

    Subclasses define `name`, the tokenizer's attributes, `sample_requests`, `logprobs` and
    `usage_bound`; `mbrl_text_env.checks.check_language_model` tests them. In all methods, `ledgers`
    has one ledger per state (or request), which is charged.
    """

    name: str
    vocab_size: int
    stop_token_ids: frozenset[int]
    context_length: int
    cache_tokens: int = 0
    """Number of prefix tokens that can be cached between calls; 0 without a cache."""
    guards: bool = False
    """Whether `sample_requests` supports guards; otherwise use `guarding.sample_requests`."""

    @property
    def counts_flops(self) -> bool:
        """Whether FLOPs are charged; if not, budgets in FLOPs are rejected."""
        return True

    @abstractmethod
    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """See `Tokenizer.encode_prompt`."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""

    def encode_text(self, text: str) -> Sequence[int]:
        """Encode a text that follows response tokens, without control tokens.

        Raises:
            NotImplementedError: The model cannot encode texts.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not encode texts (`encode_text`). Use TransformersLM, or "
            "an agent that inserts no text."
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
        """Sample chunks with log-probabilities: `chunks[len(states)][num_samples]`.

        Args:
            states: States that have not ended.
            num_samples: Chunks per state, at least 1.
            max_new_tokens: Maximum tokens per chunk, at least 1. A chunk is shorter only if it ends
                with a stop token or string, or the context is full.
            seeds: One seed per state. Chunk k of a state depends only on its seed, its tokens and k
                (`stream`), not on the other rows of the batch.
            first_sample: The first k. Sampling 4 chunks from 0 and 4 from 4 equals 8 from 0.
            params: Temperature, top-p, top-k and stop strings.
            ledgers: Charged for tokens, calls, FLOPs and time.

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
        """Sample for requests with different settings: `chunks[i][requests[i].num_samples]`.

        Invalid requests raise the errors of `check_requests`.
        """

    async def sample_requests_async(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> list[list[Chunk]]:
        """Async `sample_requests`; by default it runs in a thread."""
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
        """Return the k most probable next tokens of each state.

        Raises:
            NotImplementedError: The model does not provide them.
            ValueError: k is below 1 or above the vocabulary size, or a state has ended.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not provide the most probable next tokens "
            "(`next_tokens`). Use TransformersLM, or an agent that samples."
        )

    @abstractmethod
    def usage_bound(self, prefix_tokens: int, new_tokens: Sequence[int]) -> Usage:
        """Upper bound on the usage of `sample` for a state of `prefix_tokens` uncached tokens.

        `new_tokens` has the length of each chunk sampled from it.
        """

    def clear_cache(self) -> None:  # noqa: B027 a default, not a duty
        """Clear all cached prefixes; does nothing without a cache."""


class FeatureModel(LanguageModel):
    """A language model that also provides features of a prefix."""

    feature_size: int

    @abstractmethod
    def features(
        self, states: Sequence[TextState], *, ledgers: Sequence[Ledger] | None = None
    ) -> npt.NDArray[np.float32]:
        """Features of the states, float32[len(states), feature_size]."""


def sample_requests(
    language_model: LanguageModel,
    requests: Sequence[SampleRequest],
    *,
    ledgers: Sequence[Ledger] | None = None,
) -> list[list[Chunk]]:
    """Call `sample_requests` of any language model, including one that overrides `sample`.

    In the latter case, requests with the same settings are sampled together.
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
    """Whether a language model supports guards itself; an overridden `sample` does not."""
    return getattr(language_model, "guards", False) and _has_common_batches(language_model)


def _has_common_batches(language_model: LanguageModel) -> bool:
    """Whether to call its `sample_requests`; an overridden `sample` takes precedence."""
    for holder in (language_model, *type(language_model).__mro__):
        names = getattr(holder, "__dict__", {})
        if "sample_requests" in names or "sample" in names:
            return "sample_requests" in names
    return False


def stream(seed: int, state: TextState, sample_index: int) -> np.random.Generator:
    """Random generator of one sequence: a function of seed, tokens and sample index.

    Tokens therefore depend neither on the batch nor on the order of calls. The same arguments give
    the same chunk again; for new samples of a state, use another seed.

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
    """Derive a new seed below 2**63 from a seed and a path of integers.

    Example:
        >>> spawn_seed(0, 1) == spawn_seed(0, 1), spawn_seed(0, 1) == spawn_seed(0, 2)
        (True, False)
    """
    text = ":".join(map(str, (seed, *path)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def has_stop_text(tokenizer: Tokenizer, token_ids: Sequence[int], params: SamplingParams) -> bool:
    """Whether the chunk's text contains one of `params.stop`."""
    if not params.stop:
        return False
    text = tokenizer.decode(token_ids)
    return any(stop in text for stop in params.stop)


def prefix_of(state: TextState) -> tuple[int, ...]:
    """All tokens of a state: prompt and response."""
    return state.prompt_ids + state.response_ids


def room_after(state: TextState, context_length: int) -> int:
    """Tokens left in a model's context after a state; a `PromptTooLongError` if none are."""
    length = len(prefix_of(state))
    if length >= context_length:
        raise PromptTooLongError(
            f"Prompt {state.prompt.id!r} and its response have {length} tokens and fill the "
            f"model's context of {context_length}."
        )
    return context_length - length


def check_room(prompt: Prompt, length: int, context_length: int) -> None:
    """Raise a PromptTooLongError if a prompt of `length` tokens leaves no room for a response."""
    if length >= context_length:
        raise PromptTooLongError(
            f"Prompt {prompt.id!r} has {length} tokens, but the model's context holds "
            f"{context_length} tokens of prompt and response together. Shorten it, or use a model "
            "with a longer context."
        )


def finish_reason(
    tokenizer: Tokenizer, state: TextState, token_ids: Sequence[int]
) -> FinishReason | None:
    """Why a chunk ends the response to a state; None if the response continues."""
    if token_ids[-1] in tokenizer.stop_token_ids:
        return "stop"
    is_full = len(prefix_of(state)) + len(token_ids) >= tokenizer.context_length
    return "length" if is_full else None


def charge(ledgers: Sequence[Ledger] | None, usages: Iterable[Usage]) -> None:
    """Charge each ledger its usage, if there are ledgers."""
    for usage, ledger in zip(usages, ledgers or (), strict=ledgers is not None):
        ledger.charge(usage)


def pass_usage(
    prefix: int, computed: int, new_tokens: Sequence[int], num_parameters: int, width: int
) -> Usage:
    """Usage of a transformer call: 2 x parameters for each processed token, plus attention.

    `computed` of the `prefix` tokens are processed; it exceeds `prefix` if some are repeated.
    `width` is the total width of the heads of all layers.
    """
    new = sum(new_tokens)
    # Scores and weighted values: 2 x 2 x context x width per layer and token. Computed prefix
    # tokens are the last ones; a token attends to those before it.
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
    """Raise an error for invalid requests, including those with a guard unless `guards`."""
    for r in requests:
        if r.guard is not None and not guards:
            raise ValueError(
                "guard: expected a language model with `guards`, such as `TransformersLM`. For "
                "others, call `language_models.guarding.sample_requests`."
            )
        check_sample_arguments([r.state], r.num_samples, r.max_new_tokens, [r.seed])


def check_sample_arguments(
    states: Sequence[TextState], num_samples: int, max_new_tokens: int, seeds: Sequence[int]
) -> None:
    """Raise the ValueErrors of `LanguageModel.sample`."""
    check_positive(num_samples=num_samples, max_new_tokens=max_new_tokens)
    if len(seeds) != len(states):
        raise ValueError(f"Expected one seed per state ({len(states)}), got {len(seeds)}.")
    check_unfinished(states)


def check_judging_arguments(states: Sequence[TextState], chunks: Sequence[Chunk]) -> None:
    """Raise a ValueError for `logprobs` calls with ended states or the wrong number of chunks."""
    check_unfinished(states)
    if len(chunks) != len(states):
        raise ValueError(f"Expected one chunk per state ({len(states)}), got {len(chunks)}.")


def check_next_tokens(states: Sequence[TextState], k: int, most: int) -> None:
    """Raise the ValueErrors of `LanguageModel.next_tokens`, with at most `most` tokens."""
    check_unfinished(states)
    if not 1 <= k <= most:
        raise ValueError(f"k: expected a number from 1 to {most}, got {k}.")


def check_unfinished(states: Sequence[TextState]) -> None:
    """Raise a ValueError if the response to a state has ended."""
    for state in states:
        if state.finish_reason is not None:
            raise ValueError(
                f"The response to prompt {state.prompt.id!r} has ended ({state.finish_reason!r}); "
                "a language model cannot continue it. Remove ended states from the batch."
            )

"""Small language models whose distributions are known exactly.

They answer what a search should have found: all responses can be enumerated with their
probabilities. They are fast enough for thousands of property-test cases and implement the whole
protocol.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mbrl_text_env.language_models.base import (
    FeatureModel,
    PromptTooLongError,
    SampleRequest,
    SamplingParams,
    charge,
    check_judging_arguments,
    check_requests,
    finish_reason,
    has_stop_text,
    prefix_of,
    room_after,
    stream,
)
from mbrl_text_env.types import Chunk, FinishReason, Ledger, Prompt, TextState, Usage, timed

STOP = 0
"""Id of the stop token of every toy."""


class CharTokenizer:
    """One token a character; id 0 is the stop token, the alphabet's characters follow.

    Args:
        alphabet: Distinct characters.
        context_length: Most tokens of prompt and response together.

    Raises:
        ValueError: The alphabet is empty or has a character twice.

    Example:
        >>> tokenizer = CharTokenizer("abc")
        >>> tokenizer.encode_prompt(Prompt.from_text("cab")), tokenizer.decode([2, 1, 0])
        ((3, 1, 2), 'ba')
    """

    def __init__(self, alphabet: str, context_length: int = 1024) -> None:
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise ValueError(f"Expected an alphabet of distinct characters, got {alphabet!r}.")
        self.alphabet = alphabet
        self.context_length = context_length
        self.vocab_size = len(alphabet) + 1
        self.stop_token_ids = frozenset({STOP})
        self._texts = ["", *alphabet]
        self._id_of = {character: i + 1 for i, character in enumerate(alphabet)}

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids of the prompt's characters; characters outside the alphabet are left out.

        Raises:
            PromptTooLongError: The prompt leaves no room for a response.
        """
        ids = tuple(self._id_of[c] for c in prompt.text if c in self._id_of)
        if len(ids) >= self.context_length:
            raise PromptTooLongError(
                f"Prompt {prompt.id!r} has {len(ids)} tokens, but the context holds "
                f"{self.context_length} tokens of prompt and response together. Shorten it."
            )
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Characters of the ids, stop tokens left out."""
        return "".join(map(self._texts.__getitem__, token_ids))


class ExactLM(CharTokenizer, FeatureModel):
    """A language model with a known next-token distribution.

    Args:
        alphabet: The characters that it writes.
        context_length: Most tokens of prompt and response together.
        flops_per_token: What a token is charged in the ledger.
    """

    name = "toy"

    def __init__(
        self, alphabet: str, context_length: int = 1024, flops_per_token: float = 1.0
    ) -> None:
        super().__init__(alphabet, context_length)
        self.flops_per_token = flops_per_token
        self.feature_size = self.vocab_size

    @abstractmethod
    def next_probabilities(
        self, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]
    ) -> npt.NDArray[np.float64]:
        """float64[vocab_size], the distribution of the next token."""

    def features(
        self, states: Sequence[TextState], *, ledgers: Sequence[Ledger] | None = None
    ) -> npt.NDArray[np.float32]:
        """float32[B, vocab_size]: the distribution of the token after each prefix."""
        with timed(ledgers):
            rows = [self.next_probabilities(s.prompt_ids, s.response_ids) for s in states]
        charge(ledgers, (self.usage_bound(len(prefix_of(state)), []) for state in states))
        return np.asarray(rows, dtype=np.float32).reshape(len(states), self.vocab_size)

    def sample_requests(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> list[list[Chunk]]:
        """Draw chunks; see `LanguageModel.sample_requests`."""
        check_requests(requests)
        with timed(ledgers):
            rows = [
                [
                    self._draw(
                        r.state,
                        stream(r.seed, r.state, r.first_sample + k),
                        r.max_new_tokens,
                        r.params,
                    )
                    for k in range(r.num_samples)
                ]
                for r in requests
            ]
        charge(
            ledgers,
            (
                self.usage_bound(len(prefix_of(r.state)), [len(chunk) for chunk in row])
                for r, row in zip(requests, rows, strict=True)
            ),
        )
        return rows

    def logprobs(
        self,
        states: Sequence[TextState],
        chunks: Sequence[Chunk],
        *,
        ledgers: Sequence[Ledger] | None = None,
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of given chunks; see `LanguageModel.logprobs`."""
        check_judging_arguments(states, chunks)
        pairs = list(zip(states, chunks, strict=True))
        with timed(ledgers):
            found = [self._token_logprobs(state, chunk.token_ids) for state, chunk in pairs]
        charge(ledgers, (self.usage_bound(len(prefix_of(s)) + len(c), []) for s, c in pairs))
        return found

    def usage_bound(self, prefix_tokens: int, new_tokens: Sequence[int]) -> Usage:
        """`flops_per_token` for every token of the prefix and of the chunks."""
        new = sum(new_tokens)
        flops = self.flops_per_token * (prefix_tokens + new)
        return Usage(prompt_tokens=prefix_tokens, generated_tokens=new, lm_calls=1, lm_flops=flops)

    def responses(
        self, state: TextState, max_response_tokens: int
    ) -> Iterator[tuple[tuple[int, ...], float]]:
        """Every complete response after `state` with its probability; they sum to 1.

        A response is complete when it ends with the stop token or has `max_response_tokens`.
        """
        if len(state.response_ids) >= max_response_tokens or state.finish_reason is not None:
            yield state.response_ids, 1.0
            return
        probabilities = self.next_probabilities(state.prompt_ids, state.response_ids)
        for token in np.flatnonzero(probabilities):
            ids = (*state.response_ids, int(token))
            reason: FinishReason | None = "stop" if token == STOP else None
            child = TextState(state.prompt, state.prompt_ids, ids, reason)
            for response, probability in self.responses(child, max_response_tokens):
                yield response, float(probabilities[token]) * probability

    def _token_logprobs(self, state: TextState, ids: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(
            _log(self.next_probabilities(state.prompt_ids, state.response_ids + ids[:t])[token])
            for t, token in enumerate(ids)
        )

    def _draw(
        self,
        state: TextState,
        generator: np.random.Generator,
        max_new_tokens: int,
        params: SamplingParams,
    ) -> Chunk:
        uniforms = generator.random(max_new_tokens)
        ids: tuple[int, ...] = ()
        logprobs: tuple[float, ...] = ()
        for uniform in uniforms[: room_after(state, self.context_length)]:
            own = self.next_probabilities(state.prompt_ids, state.response_ids + ids)
            token = draw_token(own, params, float(uniform))
            ids, logprobs = (*ids, token), (*logprobs, _log(own[token]))
            if token == STOP or has_stop_text(self, ids, params):
                break
        return Chunk(ids, logprobs, finish_reason(self, state, ids))


class TableLM(ExactLM):
    """A table from response prefixes to next-token distributions.

    Args:
        alphabet: The characters that it writes.
        table: Probabilities (float[len(alphabet) + 1], the stop token first) by the text of the
            response prefix. A prefix that is not in the table has the uniform distribution.
        context_length: Most tokens of prompt and response together.

    Raises:
        ValueError: A row has a wrong length, a negative entry, or does not sum to 1; or a prefix
            has a character that is not in the alphabet.

    Example:
        >>> model = TableLM("ab", {"": [0.0, 0.9, 0.1], "a": [1.0, 0.0, 0.0]})
        >>> state = TextState(Prompt.from_text("a"), prompt_ids=(1,))
        >>> [(model.decode(ids), round(p, 3)) for ids, p in model.responses(state, 1)]
        [('a', 0.9), ('b', 0.1)]
    """

    def __init__(
        self,
        alphabet: str,
        table: Mapping[str, Sequence[float]],
        context_length: int = 1024,
        flops_per_token: float = 1.0,
    ) -> None:
        super().__init__(alphabet, context_length, flops_per_token)
        self.table = dict(table)
        self._rows: dict[tuple[int, ...], npt.NDArray[np.float64]] = {}
        for prefix, row in table.items():
            unknown = set(prefix) - set(alphabet)
            if unknown:
                raise ValueError(
                    f"Row {prefix!r}: {sorted(unknown)} are not in the alphabet {alphabet!r}."
                )
            ids = tuple(self._id_of[c] for c in prefix)
            self._rows[ids] = _checked_row(prefix, row, self.vocab_size)
        self._uniform = np.full(self.vocab_size, 1.0 / self.vocab_size)

    def next_probabilities(
        self, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]
    ) -> npt.NDArray[np.float64]:
        """The prefix's row of the table, or the uniform distribution."""
        return self._rows.get(response_ids, self._uniform)


class NGramLM(ExactLM):
    """An n-gram model with random probabilities, fixed by a seed.

    The next token depends on the last `order - 1` tokens of prompt and response. Its distribution
    is drawn from a symmetric Dirichlet distribution.

    Args:
        alphabet: The characters that it writes.
        order: n, at least 1.
        seed: Determines every probability.
        concentration: Of the Dirichlet distribution; small values make peaked distributions.
        stop_probability: Probability of the stop token at every place, 0 up to (not including) 1.
        context_length: Most tokens of prompt and response together.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self,
        alphabet: str,
        order: int = 2,
        seed: int = 0,
        concentration: float = 1.0,
        stop_probability: float = 0.1,
        context_length: int = 1024,
        flops_per_token: float = 1.0,
    ) -> None:
        super().__init__(alphabet, context_length, flops_per_token)
        if order < 1 or concentration <= 0 or not 0 <= stop_probability < 1:
            raise ValueError(
                "Expected order >= 1, concentration > 0 and 0 <= stop_probability < 1, got "
                f"{order}, {concentration} and {stop_probability}."
            )
        self.order = order
        self.seed = seed
        self.concentration = concentration
        self.stop_probability = stop_probability
        self._row = lru_cache(maxsize=None)(self._make_row)

    def next_probabilities(
        self, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]
    ) -> npt.NDArray[np.float64]:
        """The distribution after the last `order - 1` tokens."""
        if self.order == 1:
            return self._row(())
        return self._row((prompt_ids + response_ids)[1 - self.order :])

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # The memo of rows does not pickle; the arguments rebuild it.
        arguments = (self.alphabet, self.order, self.seed, self.concentration)
        return type(self), (
            *arguments,
            self.stop_probability,
            self.context_length,
            self.flops_per_token,
        )

    def _make_row(self, context: tuple[int, ...]) -> npt.NDArray[np.float64]:
        generator = np.random.default_rng([self.seed, *context])
        letters = generator.dirichlet(np.full(self.vocab_size - 1, self.concentration))
        row = np.concatenate([[self.stop_probability], (1 - self.stop_probability) * letters])
        return row / row.sum()


def draw_token(
    probabilities: npt.NDArray[np.float64], params: SamplingParams, uniform: float
) -> int:
    """Turn one uniform number into a token by the inverse of the cumulative distribution.

    Args:
        probabilities: float64[V], the model's own distribution.
        params: Temperature, top-k and top-p, applied in this order.
        uniform: In [0, 1).
    """
    if params.temperature == 0:
        return int(np.argmax(probabilities))
    cumulative = np.cumsum(shaped(probabilities, params))
    token = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(token, len(probabilities) - 1)


def shaped(
    probabilities: npt.NDArray[np.float64], params: SamplingParams
) -> npt.NDArray[np.float64]:
    """The distribution that tokens are drawn from: float64[V], sums to 1 (temperature above 0)."""
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities)
    # Relative to the largest, so that no quotient by a small temperature overflows.
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()) / params.temperature)
    order = np.argsort(-weights, kind="stable")
    if params.top_k:
        weights[order[params.top_k :]] = 0.0
    if params.top_p < 1.0:
        cumulative = np.cumsum(weights[order]) / weights.sum()
        # A token stays if the ones before it have not reached top_p; the first always does.
        weights[order[1:][cumulative[:-1] >= params.top_p]] = 0.0
    return np.asarray(weights / weights.sum())


def _checked_row(prefix: str, row: Sequence[float], vocab_size: int) -> npt.NDArray[np.float64]:
    values = np.array(row, dtype=np.float64)
    # Said so that NaN fails too.
    valid = values.shape == (vocab_size,) and values.min() >= 0 and abs(values.sum() - 1) <= 1e-9
    if not valid:
        raise ValueError(
            f"Row {prefix!r}: expected {vocab_size} probabilities (the stop token's first) that "
            f"sum to 1, got {list(row)}."
        )
    return values


def _log(probability: float) -> float:
    return float(np.log(probability)) if probability > 0 else float("-inf")

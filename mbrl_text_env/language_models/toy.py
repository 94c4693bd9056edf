"""Small language models with exactly known distributions.

All responses can be enumerated with their probabilities, which gives the optimum for a search.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from mbrl_text_env.language_models import base
from mbrl_text_env.language_models.base import (
    FeatureModel,
    Guard,
    NextTokens,
    SampleRequest,
    SamplingParams,
)
from mbrl_text_env.language_models.guarding import replacements, weighted_token
from mbrl_text_env.types import Chunk, FinishReason, Ledger, Prompt, TextState, Usage, timed

STOP = 0
"""Id of the stop token of every toy model."""
Ids = tuple[int, ...]
Row = npt.NDArray[np.float64]


class CharTokenizer:
    """A character tokenizer: id 0 is the stop token, followed by the alphabet's characters.

    Raises:
        ValueError: The alphabet is empty or has duplicate characters.

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

    def encode_prompt(self, prompt: Prompt) -> Ids:
        """Encode the prompt's characters; characters outside the alphabet are skipped."""
        ids = tuple(self.encode_text(prompt.text))
        base.check_room(prompt, len(ids), self.context_length)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode ids to characters, without stop tokens."""
        return "".join(map(self._texts.__getitem__, token_ids))

    def encode_text(self, text: str) -> list[int]:
        """Encode the characters; those outside the alphabet are skipped."""
        return [self._id_of[c] for c in text if c in self._id_of]


class ExactLM(CharTokenizer, FeatureModel):
    """Base class of language models with a known next-token distribution.

    It generates the characters of `alphabet`; ledgers are charged `flops_per_token`.
    """

    guards = True

    name = "toy"

    def __init__(
        self, alphabet: str, context_length: int = 1024, flops_per_token: float = 1.0
    ) -> None:
        super().__init__(alphabet, context_length)
        self.flops_per_token = flops_per_token
        self.feature_size = self.vocab_size

    @abstractmethod
    def next_probabilities(self, prompt_ids: Ids, response_ids: Ids) -> Row:
        """Distribution of the next token, float64[vocab_size]."""

    def features(
        self, states: Sequence[TextState], *, ledgers: Sequence[Ledger] | None = None
    ) -> npt.NDArray[np.float32]:
        """Distribution of the next token after each prefix, float32[B, vocab_size]."""
        with timed(ledgers):
            rows = [self.next_probabilities(s.prompt_ids, s.response_ids) for s in states]
        base.charge(ledgers, (self.usage_bound(len(base.prefix_of(state)), []) for state in states))
        return np.asarray(rows, dtype=np.float32).reshape(len(states), self.vocab_size)

    def sample_requests(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> list[list[Chunk]]:
        """Sample chunks; see `LanguageModel.sample_requests`."""
        base.check_requests(requests, self.guards)
        with timed(ledgers):
            rows = [
                [
                    self._draw(
                        r.state,
                        base.stream(r.seed, r.state, k),
                        r.max_new_tokens,
                        r.params,
                        r.guard,
                    )
                    for k in range(r.first_sample, r.first_sample + r.num_samples)
                ]
                for r in requests
            ]
        pairs = zip(requests, rows, strict=True)
        lengths = (
            (len(base.prefix_of(r.state)), [len(chunk) for chunk in row]) for r, row in pairs
        )
        base.charge(ledgers, (self.usage_bound(prefix, new) for prefix, new in lengths))
        return rows

    def logprobs(
        self,
        states: Sequence[TextState],
        chunks: Sequence[Chunk],
        *,
        ledgers: Sequence[Ledger] | None = None,
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of given chunks; see `LanguageModel.logprobs`."""
        base.check_judging_arguments(states, chunks)
        pairs = list(zip(states, (chunk.token_ids for chunk in chunks), strict=True))
        with timed(ledgers):
            found = [
                tuple(_log(self._after(s, ids[:t])[token]) for t, token in enumerate(ids))
                for s, ids in pairs
            ]
        base.charge(
            ledgers, (self.usage_bound(len(base.prefix_of(s)) + len(ids), []) for s, ids in pairs)
        )
        return found

    def next_tokens(
        self, states: Sequence[TextState], k: int, *, ledgers: Sequence[Ledger] | None = None
    ) -> list[NextTokens]:
        """The k most probable next tokens; see `LanguageModel.next_tokens`."""
        base.check_next_tokens(states, k, self.vocab_size)
        with timed(ledgers):
            rows = [self._after(state, ()) for state in states]
            orders = [np.argsort(-row, kind="stable")[:k].tolist() for row in rows]
        base.charge(ledgers, (self.usage_bound(len(base.prefix_of(state)), []) for state in states))
        return [
            NextTokens(tuple(order), tuple(_log(row[token]) for token in order))
            for order, row in zip(orders, rows, strict=True)
        ]

    def usage_bound(self, prefix_tokens: int, new_tokens: Sequence[int]) -> Usage:
        """`flops_per_token` for each token of the prefix and the chunks."""
        new = sum(new_tokens)
        flops = self.flops_per_token * (prefix_tokens + new)
        return Usage(prompt_tokens=prefix_tokens, generated_tokens=new, lm_calls=1, lm_flops=flops)

    def responses(self, state: TextState, max_response_tokens: int) -> Iterator[tuple[Ids, float]]:
        """Yield every complete response after `state` with its probability; they sum to 1.

        A response is complete if it ends with the stop token or has `max_response_tokens` tokens.
        """
        if len(state.response_ids) >= max_response_tokens or state.finish_reason is not None:
            yield state.response_ids, 1.0
            return
        probabilities = self._after(state, ())
        for token in np.flatnonzero(probabilities):
            ids = (*state.response_ids, int(token))
            reason: FinishReason | None = "stop" if token == STOP else None
            child = TextState(state.prompt, state.prompt_ids, ids, reason)
            for response, probability in self.responses(child, max_response_tokens):
                yield response, float(probabilities[token]) * probability

    def _after(self, state: TextState, ids: Ids) -> Row:
        return self.next_probabilities(state.prompt_ids, state.response_ids + ids)

    def _draw(
        self,
        state: TextState,
        generator: np.random.Generator,
        max_new_tokens: int,
        params: SamplingParams,
        guard: Guard | None,
    ) -> Chunk:
        room = min(max_new_tokens, base.room_after(state, self.context_length))
        uniforms = generator.random(room)
        ids: Ids = ()
        logprobs: tuple[float, ...] = ()
        log_weight = 0.0
        for uniform in uniforms:
            own = self._after(state, ids)
            token, is_dead = draw_token(own, params, float(uniform)), False
            if guard is not None:
                may_follow = partial(self._may_follow, guard, state, ids)
                found, more = _guarded_token(own, token, guard, may_follow, params, generator)
                log_weight += more
                token, is_dead = (token, True) if found is None else (found, False)
            ids, logprobs = (*ids, token), (*logprobs, _log(own[token]))
            if is_dead or token == STOP or base.has_stop_text(self, ids, params):
                break
        return Chunk(ids, logprobs, base.finish_reason(self, state, ids), log_weight)

    def _may_follow(self, guard: Guard, state: TextState, ids: Ids, token: int) -> bool:
        text = self.decode((*state.response_ids, *ids, token))
        [allowed] = guard.allows([state], [text], [token == STOP])
        return allowed


class TableLM(ExactLM):
    """A table from response prefixes to next-token distributions.

    `table` maps the text of a response prefix to probabilities (float[len(alphabet) + 1], the stop
    token first). Prefixes that are not in the table have the uniform distribution.

    Raises:
        ValueError: A row has the wrong length or a negative entry, or does not sum to 1, or a
            prefix has a character outside the alphabet.

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
        self._rows: dict[Ids, Row] = {}
        for prefix, row in table.items():
            unknown = set(prefix) - set(alphabet)
            if unknown:
                raise ValueError(
                    f"Row {prefix!r}: {sorted(unknown)} are not in the alphabet {alphabet!r}."
                )
            values, size = np.array(row, dtype=np.float64), self.vocab_size
            # Written so that NaN fails too.
            if not (
                values.shape == (size,) and values.min() >= 0 and abs(values.sum() - 1) <= 1e-9
            ):
                raise ValueError(
                    f"Row {prefix!r}: expected {size} probabilities (the stop token's first) that "
                    f"sum to 1, got {list(row)}."
                )
            self._rows[tuple(self._id_of[c] for c in prefix)] = values
        self._uniform = np.full(self.vocab_size, 1.0 / self.vocab_size)

    def next_probabilities(self, prompt_ids: Ids, response_ids: Ids) -> Row:
        """The prefix's row of the table, or the uniform distribution."""
        return self._rows.get(response_ids, self._uniform)


class NGramLM(ExactLM):
    """An n-gram model with random probabilities, fixed by a seed.

    The next token depends on the last `order - 1` tokens of prompt and response. The stop token has
    `stop_probability`, in [0, 1), at every position. The rest is drawn from a symmetric Dirichlet
    distribution, which is peaked for a small `concentration`.
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
        self.order, self.seed = order, seed
        self.concentration, self.stop_probability = concentration, stop_probability
        self._rows: dict[Ids, Row] = {}

    def next_probabilities(self, prompt_ids: Ids, response_ids: Ids) -> Row:
        """The distribution after the last `order - 1` tokens."""
        context = (prompt_ids + response_ids)[1 - self.order :] if self.order > 1 else ()
        if context not in self._rows:
            generator = np.random.default_rng([self.seed, *context])
            letters = generator.dirichlet(np.full(self.vocab_size - 1, self.concentration))
            row = np.concatenate([[self.stop_probability], (1 - self.stop_probability) * letters])
            self._rows[context] = row / row.sum()
        return self._rows[context]


def _guarded_token(
    own: Row,
    drawn: int,
    guard: Guard,
    may_follow: Callable[[int], bool],
    params: SamplingParams,
    generator: np.random.Generator,
) -> tuple[int | None, float]:
    """The sampled token or its replacement, and its log-weight; see `Guard`."""
    if guard.weighted:
        probabilities = shaped(own, params)
        return weighted_token(drawn, probabilities, may_follow, guard.candidates, generator)
    if may_follow(drawn):
        return drawn, 0.0
    order = np.argsort(-own, kind="stable")[: guard.candidates].tolist()
    found = {each: _log(own[each]) for each in order if own[each] > 0 and each != drawn}
    others = replacements(found, guard, params, generator)
    return next(filter(may_follow, others), None), 0.0


def draw_token(probabilities: Row, params: SamplingParams, uniform: float) -> int:
    """Map a uniform number in [0, 1) to a token of a distribution, float64[V].

    This inverts the cumulative distribution after temperature, top-k and top-p.
    """
    if params.temperature == 0:
        return int(np.argmax(probabilities))
    cumulative = np.cumsum(shaped(probabilities, params))
    token = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(token, len(probabilities) - 1)


def shaped(probabilities: Row, params: SamplingParams) -> Row:
    """The distribution that tokens are sampled from, float64[V], which sums to 1."""
    if params.temperature == 0:
        return np.asarray(np.eye(len(probabilities))[np.argmax(probabilities)])
    # Relative to the maximum, to avoid overflow at low temperatures.
    with np.errstate(divide="ignore", over="ignore"):
        logits = np.log(probabilities)
        weights = np.exp((logits - logits.max()) / params.temperature)
    if params.top_k or params.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
    if params.top_k:
        weights[order[params.top_k :]] = 0.0
    if params.top_p < 1.0:
        cumulative = np.cumsum(weights[order]) / weights.sum()
        # A token is kept if those before it do not reach top_p, so the first always is.
        weights[order[1:][cumulative[:-1] >= params.top_p]] = 0.0
    return np.asarray(weights / weights.sum())


def _log(probability: float) -> float:
    return float(np.log(probability)) if probability > 0 else float("-inf")

"""Check guards, and apply them to language models that do not support guards, such as servers.

A chunk is sampled as usual and cut at its first rejected token. That token is replaced, and the
chunk continues. Discarded tokens are charged. `Guard` defines the token distribution.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mbrl_text_env.language_models import base
from mbrl_text_env.language_models.base import (
    Guard,
    LanguageModel,
    NextTokens,
    SampleRequest,
    SamplingParams,
    Tokenizer,
)
from mbrl_text_env.types import Chunk, Ledger, TextState, Usage

# Maximum number of resamplings of a position without `next_tokens`.
REDRAWS = 8
# Tokens to sample after a cut, doubled after each piece without a rejection, because tokens after a
# rejected one are discarded.
_PIECE = 8

_Rows: TypeAlias = list[list[Chunk]]
_Draw: TypeAlias = Callable[..., Awaitable[_Rows]]
_Call: TypeAlias = Callable[..., Awaitable[Any]]


def replacements(
    logprobs: Mapping[int, float],
    guard: Guard,
    params: SamplingParams,
    generator: np.random.Generator,
) -> Iterator[int]:
    """Order the replacements of a rejected token, sampled without replacement; see `Guard`.

    They come from the model's most probable tokens without the rejected one, with unshaped
    `logprobs`; the temperature applies.
    """
    left = [token for token, log in logprobs.items() if log >= guard.floor]
    while left:
        place = 0
        if params.temperature > 0:
            scaled = np.array([logprobs[each] for each in left]) / params.temperature
            ends = np.exp(scaled - scaled.max()).cumsum()
            place = int(np.searchsorted(ends, generator.random() * ends[-1], side="right"))
        yield left.pop(min(place, len(left) - 1))


def weighted_token(
    first: int,
    probabilities: npt.NDArray[np.float64],
    may_follow: Callable[[int], bool],
    candidates: int,
    generator: np.random.Generator,
) -> tuple[int | None, float]:
    """Return an allowed token and its log-weight; (None, -inf) if none was found.

    `first` was sampled from `probabilities`, float64[V]. See `Guard` for the distribution.
    """
    left = probabilities / probabilities.sum()

    def drawn() -> int | None:
        ends = left.cumsum()
        if not ends[-1] > 0:
            return None
        place = int(np.searchsorted(ends, generator.random() * ends[-1], side="right"))
        return min(place, len(left) - 1)

    token: int | None = first
    rejected, survived = 0, 1.0
    while token is not None and not may_follow(token):
        left[token] = 0.0
        rejected += 1
        if rejected == candidates:
            mass = left.sum()
            if not generator.random() * survived < mass:
                return None, -np.inf
            candidates, survived = 2 * candidates, mass
        token = drawn()
    if token is None:
        return None, -np.inf
    # Without a rejection, avoid rounding errors.
    mass, own = 1.0 if token == first else left.sum(), left[token]
    left[token] = 0.0
    other = drawn()
    share = 1.0 if other is None or may_follow(other) else own / mass
    return token, float(np.log(mass * share / survived))


class GrowingText:
    """Incremental detokenization: the text of tokens that arrive one by one.

    An incomplete character at the end is omitted until it is complete, or until a fourth token
    shows that it never will be.

    Source: vLLM's incremental detokenization, which decodes as far back as it last read.
    """

    def __init__(self, tokenizer: Tokenizer, token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._text, self._before, self._read = "", "", 0
        self._recent: list[int] = []
        for token in token_ids:
            self.append(token)

    def with_token(self, token: int) -> str:
        """The text with `token` appended."""
        new = self._new(token)
        # A character has at most four bytes, so it can no longer become complete.
        is_overdue = len(self._recent) - self._read >= 3
        return self._text + (new if is_overdue else new.rstrip("\ufffd"))

    def append(self, token: int) -> None:
        """Append a token."""
        new = self._new(token)
        self._recent.append(token)
        if new and not new.endswith("\ufffd"):
            self._text += new
            self._recent = self._recent[self._read :]
            self._read = len(self._recent)
            self._before = self._tokenizer.decode(self._recent)

    def _new(self, token: int) -> str:
        return self._tokenizer.decode([*self._recent, token])[len(self._before) :]


def sample_requests(
    language_model: LanguageModel,
    requests: Sequence[SampleRequest],
    *,
    ledgers: Sequence[Ledger] | None = None,
) -> _Rows:
    """Call `LanguageModel.sample_requests`, with guards for any language model.

    Example:
        >>> request = SampleRequest(state, 4, 64, seed=0, guard=guard)  # doctest: +SKIP
        >>> [chunks] = sample_requests(ServerLM(url, tokenizer=name), [request])  # doctest: +SKIP
    """
    if _is_watched(language_model, requests):
        return base.sample_requests(language_model, requests, ledgers=ledgers)

    async def draw(asked: Sequence[SampleRequest], paying: Sequence[Ledger] | None) -> _Rows:
        return base.sample_requests(language_model, asked, ledgers=paying)

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    # No await blocks here, so no event loop is needed, and it also works inside one.
    guarded = _Guarded(language_model, draw, call).rows(requests, ledgers)
    try:
        guarded.send(None)
    except StopIteration as ended:
        rows: _Rows = ended.value
        return rows
    raise AssertionError("expected a coroutine that waits for nothing")


async def sample_requests_async(
    language_model: LanguageModel, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger]
) -> _Rows:
    """Async `sample_requests`; blocking calls run in a thread."""
    if _is_watched(language_model, requests):
        return await language_model.sample_requests_async(requests, ledgers=ledgers)

    async def draw(asked: Sequence[SampleRequest], paying: Sequence[Ledger]) -> _Rows:
        return await language_model.sample_requests_async(asked, ledgers=paying)

    return await _Guarded(language_model, draw, asyncio.to_thread).rows(requests, ledgers)


def _is_watched(language_model: LanguageModel, requests: Sequence[SampleRequest]) -> bool:
    """Whether the model can answer the requests without help."""
    guards = [request.guard for request in requests if request.guard is not None]
    if base.watches_guards(language_model) or not guards:
        return True
    if any(guard.weighted for guard in guards):
        raise ValueError(
            f"guard: expected a language model with `guards` for weighted chunks, got "
            f"{type(language_model).__name__}. Use TransformersLM, or a guard without weights."
        )
    return False


@dataclass
class _Growing:
    """The allowed part of a chunk; `refused` has the tokens first sampled after it.

    `asked` counts the calls, so that no random stream is used twice.
    """

    model: LanguageModel
    request: SampleRequest
    number: int
    ledger: Ledger | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] | None = field(default_factory=list)
    text: GrowingText | None = None
    refused: tuple[list[int], tuple[float, ...]] | None = None
    redraws: int = 0
    asked: int = 0
    size: int = _PIECE
    is_done: bool = False

    def __post_init__(self) -> None:
        room = base.room_after(self.request.state, self.model.context_length)
        self.limit = min(self.request.max_new_tokens, room)

    @property
    def guard(self) -> Guard:
        assert self.request.guard is not None
        return self.request.guard

    @property
    def state(self) -> TextState:
        """The request's state extended by the tokens so far."""
        state = self.request.state
        return replace(state, response_ids=(*state.response_ids, *self.tokens))

    @property
    def chunk(self) -> Chunk:
        reason = base.finish_reason(self.model, self.request.state, self.tokens)
        return Chunk(tuple(self.tokens), tuple(self.logprobs or ()), reason)

    @property
    def length(self) -> int:
        return min(self.size, self.limit - len(self.tokens))

    def fresh_seed(self) -> int:
        """Seed of an unused random stream."""
        self.asked += 1
        return base.spawn_seed(self.request.seed, self.number, self.asked)

    def affords(self, reserved: dict[int, Usage], new: int) -> bool:
        """Whether the ledger affords `new` tokens on top of the reserved usage; if so, reserve."""
        if self.ledger is None:
            return True
        need = self.model.usage_bound(len(base.prefix_of(self.state)), [new])
        total = reserved.get(id(self.ledger), Usage()) + need
        if not self.ledger.affords(total + self.guard.kept):
            self.end()
            return False
        reserved[id(self.ledger)] = total
        return True

    def end(self) -> None:
        """End with the rejected token, or all sampled tokens if the budget is exhausted."""
        if self.refused is not None:
            ids, logprobs = self.refused
            is_kept = self.ledger is None or self.ledger.affords(self.guard.kept)
            count = 1 if is_kept else len(ids)
            self._add(ids[:count], logprobs[:count])
        self.is_done = True

    def take(self, piece: Chunk) -> None:
        """Append sampled tokens up to the first rejected one."""
        ids = list(piece.token_ids)[: self._end_of_stop_text(piece.token_ids)]
        count = self._first_refused(ids)
        self._add(ids[:count], piece.logprobs[:count])
        if count:
            self.refused, self.redraws = None, 0
        if count < len(ids):
            self.size, self.text = _PIECE, None
            self.refused = self.refused or (ids[count:], piece.logprobs[count:])
        else:
            self.size *= 2
            self._check_end()

    def replace_refused(self, found: NextTokens) -> None:
        """Replace the rejected token by an allowed probable one, or end the chunk there."""
        assert self.refused is not None
        pairs = zip(found.token_ids[: self.guard.candidates], found.logprobs, strict=False)
        logprobs = {token: log for token, log in pairs if token != self.refused[0][0]}
        generator = base.stream(self.fresh_seed(), self.request.state, 0)
        for token in replacements(logprobs, self.guard, self.request.params, generator):
            if self._first_refused([token]):
                self.refused = None
                self._add([token], (logprobs[token],))
                self._check_end()
                return
            self.text = None
        self.end()

    def _add(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        self.tokens += ids
        if self.logprobs is not None:
            self.logprobs = [*self.logprobs, *logprobs] if len(logprobs) == len(ids) else None

    def _check_end(self) -> None:
        is_stopped = self.tokens[-1] in self.model.stop_token_ids
        is_full = len(self.tokens) >= self.limit
        has_stop = base.has_stop_text(self.model, self.tokens, self.request.params)
        self.is_done = is_stopped or is_full or has_stop

    def _end_of_stop_text(self, ids: Sequence[int]) -> int:
        """Number of new tokens up to the end of a stop string, which can start before them."""
        if self.request.params.stop:
            for i in range(1, len(ids) + 1):
                if base.has_stop_text(self.model, [*self.tokens, *ids[:i]], self.request.params):
                    return i
        return len(ids)

    def _first_refused(self, ids: Sequence[int]) -> int:
        """Index of the first rejected token; their number if all are allowed."""
        state = self.request.state
        if self.text is None:
            self.text = GrowingText(self.model, (*state.response_ids, *self.tokens))
        texts = []
        for token in ids:
            texts.append(self.text.with_token(token))
            self.text.append(token)
        is_stopped = ids[-1] in self.model.stop_token_ids
        # Checking an ended text can cost a reward call, so check the tokens before it first.
        going_on = texts[:-1] if is_stopped else texts
        count = len(going_on)
        allowed = self.guard.allows([state] * count, going_on, [False] * count) if count else []
        for i, well in enumerate(allowed):
            if not well:
                return i
        if is_stopped and self.guard.allows([state], texts[-1:], [True])[0]:
            return len(ids)
        return count


@dataclass
class _Guarded:
    """Samples chunks with guards: `draw` calls the model, `call` calls other functions."""

    model: LanguageModel
    draw: _Draw
    call: _Call
    gives_next: bool = True

    async def rows(
        self, requests: Sequence[SampleRequest], ledgers: Sequence[Ledger] | None
    ) -> _Rows:
        base.check_requests(requests, guards=True)
        # Whole chunks first: without a rejection, they equal plain sampling.
        rows = await self.draw([replace(r, guard=None) for r in requests], ledgers)
        growing: dict[tuple[int, int], _Growing] = {}
        for i, (request, row) in enumerate(zip(requests, rows, strict=True)):
            for k, chunk in enumerate(row if request.guard is not None else ()):
                ledger = None if ledgers is None else ledgers[i]
                new = _Growing(self.model, request, request.first_sample + k, ledger)
                await self.call(new.take, chunk)
                if new.refused is not None:
                    growing[i, k] = new
        active = list(growing.values())
        while active := [each for each in active if not each.is_done]:
            await self._replace(active)
            await self._go_on(active)
        for (i, k), each in growing.items():
            rows[i][k] = each.chunk
        return rows

    async def _replace(self, active: Sequence[_Growing]) -> None:
        """Replace rejected tokens, if the model has `next_tokens`."""
        reserved: dict[int, Usage] = {}
        refused = [each for each in active if each.refused is not None and self.gives_next]
        refused = [each for each in refused if each.affords(reserved, 1)]
        if not refused:
            return
        try:
            found = await self.call(self._next_tokens, refused)
        except NotImplementedError:
            self.gives_next = False
            return
        for each, next_tokens in zip(refused, found, strict=True):
            await self.call(each.replace_refused, next_tokens)

    async def _go_on(self, active: Sequence[_Growing]) -> None:
        """Sample the next pieces; a rejected position is resampled a limited number of times."""
        for each in active:
            is_greedy = each.request.params.temperature == 0
            if each.refused is not None and (is_greedy or each.redraws == REDRAWS):
                each.end()
            each.redraws += each.refused is not None
        reserved: dict[int, Usage] = {}
        going = [a for a in active if not a.is_done and a.affords(reserved, a.length)]
        if not going:
            return
        requests = [
            replace(
                each.request,
                state=each.state,
                num_samples=1,
                max_new_tokens=each.length,
                seed=each.fresh_seed(),
                first_sample=0,
                guard=None,
            )
            for each in going
        ]
        for each, [piece] in zip(
            going, await self.draw(requests, self._ledgers(going)), strict=True
        ):
            await self.call(each.take, piece)

    def _next_tokens(self, refused: Sequence[_Growing]) -> list[NextTokens]:
        most = getattr(self.model, "most_next_tokens", self.model.vocab_size)
        k = min(most, self.model.vocab_size, max(each.guard.candidates for each in refused))
        states = [each.state for each in refused]
        return self.model.next_tokens(states, k, ledgers=self._ledgers(refused))

    def _ledgers(self, growing: Sequence[_Growing]) -> list[Ledger] | None:
        ledgers = [each.ledger for each in growing if each.ledger is not None]
        return ledgers or None

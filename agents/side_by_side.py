"""Many searches at once, with their model calls in common batches.

Each state's search runs in a thread of its own until it asks a model for something. When all of
them wait, what they ask for is answered together: one batch of the language model, one of the
reward model, one of the value model. Searches that end make room for others. Nothing depends on
which thread runs first, and a chunk depends on its seed and state alone, so the results are those
of one search after the other.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from mbrl_text_env.encoders import encode_texts
from mbrl_text_env.language_models.base import (
    RequestSampler,
    SampleRequest,
    sample_requests,
)
from mbrl_text_env.ledger import Ledger, note_waiting
from mbrl_text_env.rewards.base import Scores
from mbrl_text_env.types import TextState
from mbrl_text_env.values import ValueEstimate

T = TypeVar("T")

# Threads that wait cost little; how many sequences are decoded together is the engine's affair.
MOST_AT_ONCE = 256
_SAMPLE, _ENCODE = "sample_requests", "encode"


def run_side_by_side(
    searches: Sequence[Callable[[Merging], T]], most_at_once: int = MOST_AT_ONCE
) -> list[T]:
    """Run searches side by side and return their results in order.

    Args:
        searches: Each is called with a `Merging`, whose models it uses in place of the real ones.
        most_at_once: Searches that are under way at a time.

    Raises:
        BaseException: What the first search (by its place in the list) of those that failed at the
            same time raised; the others are given up.

    Example:
        >>> run_side_by_side([lambda merging: 1, lambda merging: 2])
        [1, 2]
    """
    meeting = _Meeting()
    waiting = [_Thread(search, meeting) for search in searches]
    order, active = list(waiting), []  # type: list[_Thread[T]], list[_Thread[T]]
    try:
        while waiting or active:
            started = waiting[: most_at_once - len(active)]
            del waiting[: len(started)]
            meeting.depart(len(started) + len(active))
            for thread in active:
                thread.resume()
            for thread in started:
                thread.start()
            meeting.wait()
            active = [thread for thread in (*active, *started) if not thread.ended]
            for thread in order:
                if thread.error is not None:
                    raise thread.error
            _answer([thread.call for thread in active if thread.call is not None])
    finally:
        meeting.cancelled = True
        for thread in order:
            thread.resume()
    return [thread.result for thread in order]  # type: ignore[misc]


class Merging:
    """Stand-ins for models whose calls are answered together with those of other searches.

    Args:
        ask: Hands a call over and returns its answer.
    """

    def __init__(self, ask: Callable[[_Call], Any]) -> None:
        self._ask = ask

    def language_model(self, model: Any) -> Any:
        """A language model; everything but its batched calls is the model's own."""
        return _stand_in(_LanguageModel, model, self._ask)

    def reward_model(self, model: Any) -> Any:
        """A reward model."""
        return _stand_in(_RewardModel, model, self._ask)

    def value_model(self, model: Any) -> Any:
        """A value model."""
        return _stand_in(_ValueModel, model, self._ask)

    def encoder(self, model: Any) -> Any:
        """A text encoder."""
        return _stand_in(_Encoder, model, self._ask)


class _CancelledError(BaseException):
    """Ends searches that wait when another one has failed."""


@dataclass
class _Call:
    """What a search asks of a model.

    Args:
        model: The model itself.
        method: Name of the method.
        batch: Arguments with one entry a state or response, by name and in order.
        common: Further arguments; only calls that agree in them are answered together.
    """

    model: Any
    method: str
    batch: dict[str, Sequence[Any]]
    common: tuple[Any, ...] = ()
    result: Any = None
    error: Exception | None = None
    seconds: float = field(default=0.0, init=False)

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    @property
    def key(self) -> tuple[Any, ...]:
        return id(self.model), self.method, tuple(self.batch), self.common


class _Meeting:
    """Where a search waits until all the others wait too."""

    def __init__(self) -> None:
        self.cancelled = False
        self._running = 0
        self._condition = threading.Condition()

    def depart(self, count: int) -> None:
        with self._condition:
            self._running += count

    def arrive(self) -> None:
        with self._condition:
            self._running -= 1
            self._condition.notify()

    def wait(self) -> None:
        with self._condition:
            while self._running:
                # With a timeout, so that Ctrl-C is noticed on every platform.
                self._condition.wait(timeout=1.0)


class _Thread(Generic[T]):
    """One search."""

    def __init__(self, search: Callable[[Merging], T], meeting: _Meeting) -> None:
        self.call: _Call | None = None
        self.result: T | None = None
        self.error: BaseException | None = None
        self.ended = False
        self._search, self._meeting = search, meeting
        self._answered = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def resume(self) -> None:
        self._answered.set()

    def _run(self) -> None:
        try:
            self.result = self._search(Merging(self._ask))
        except _CancelledError:
            pass
        except BaseException as error:  # raised again by the thread that waits for the results
            self.error = error
        self.ended = True
        self._meeting.arrive()

    def _ask(self, call: _Call) -> Any:
        start = time.perf_counter()
        self.call = call
        self._answered.clear()
        self._meeting.arrive()
        if not self._meeting.cancelled:
            self._answered.wait()
        if self._meeting.cancelled:
            raise _CancelledError
        self.call = None
        note_waiting(time.perf_counter() - start - call.seconds)
        if call.error is not None:
            raise call.error
        return call.result


class _StandIn:
    """A model whose batched calls are handed over."""

    def __init__(self, model: Any, ask: Callable[[_Call], Any]) -> None:
        self._model, self._ask = model, ask

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # asked for while a copy is being made, before it has one
            raise AttributeError(name)
        return getattr(self._model, name)


class _LanguageModel(_StandIn, RequestSampler):
    def sample_requests(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> Any:
        return self._ask(self._call(_SAMPLE, {"requests": requests}, ledgers))

    def logprobs(self, states: Any, chunks: Any, *, ledgers: Sequence[Ledger] | None = None) -> Any:
        return self._ask(self._call("logprobs", {"states": states, "chunks": chunks}, ledgers))

    def __getattr__(self, name: str) -> Any:
        # Only some language models have these.
        found = super().__getattr__(name)
        if name in ("features", "next_tokens"):
            return functools.partial(self._merged, name)
        return found

    def _merged(
        self,
        name: str,
        states: Any,
        *common: Any,
        ledgers: Sequence[Ledger] | None = None,
        **named: Any,
    ) -> Any:
        bound = inspect.signature(getattr(self._model, name)).bind(states, *common, **named)
        return self._ask(self._call(name, {"states": states}, ledgers, bound.args[1:]))

    def _call(
        self,
        method: str,
        batch: dict[str, Sequence[Any]],
        ledgers: Sequence[Ledger] | None,
        common: tuple[Any, ...] = (),
    ) -> _Call:
        count = len(next(iter(batch.values())))
        if ledgers is None:
            ledgers = [Ledger() for _ in range(count)]
        return _Call(self._model, method, {**batch, "ledgers": ledgers}, common)


class _RewardModel(_StandIn):
    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name in ("score", "score_parts"):
            return functools.partial(self._merged, name)
        return found

    def _merged(self, name: str, prompts: Sequence[Any], responses: Sequence[str]) -> Any:
        return self._ask(_Call(self._model, name, {"prompts": prompts, "responses": responses}))


class _ValueModel(_StandIn):
    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        # Only value models that ask other models have this.
        if name == "predict_with":
            return self._predicted_with
        return found

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        estimate: ValueEstimate = self._ask(_Call(self._model, "predict", {"states": states}))
        return estimate

    def _predicted_with(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger] | None
    ) -> ValueEstimate:
        if ledgers is None:
            ledgers = [Ledger() for _ in states]
        batch = {"states": states, "ledgers": ledgers}
        estimate: ValueEstimate = self._ask(_Call(self._model, "predict_with", batch))
        return estimate


class _Encoder(_StandIn):
    def encode(self, sentences: list[str], **options: Any) -> Any:
        # How a SentenceTransformer is asked, `encode_texts` knows.
        return self._ask(_Call(self._model, _ENCODE, {"sentences": sentences}))

    def __getitem__(self, index: Any) -> Any:
        return self._model[index]


def _stand_in(kind: type[_StandIn], model: Any, ask: Callable[[_Call], Any]) -> Any:
    # Errors name a model by its class.
    return type(type(model).__name__, (kind,), {})(model, ask)


def _answer(calls: Sequence[_Call]) -> None:
    groups: dict[tuple[Any, ...], list[_Call]] = {}
    for call in calls:
        groups.setdefault(call.key, []).append(call)
    for group in groups.values():
        _answer_together(group)


def _answer_together(calls: Sequence[_Call]) -> None:
    start = time.perf_counter()
    try:
        results = _results(calls)
    except Exception as error:
        if len(calls) > 1 and "ledgers" not in calls[0].batch:
            # Asked alone, each gets its own answer, or an error that names its own prompt.
            for call in calls:
                _answer_together([call])
            return
        # A language model may have charged some ledgers already: it is not asked again.
        for call in calls:
            call.error = error
        return
    total = max(1, sum(map(len, calls)))
    seconds = time.perf_counter() - start
    for call, result in zip(calls, results, strict=True):
        call.result, call.seconds = result, seconds * len(call) / total


def _results(calls: Sequence[_Call]) -> list[Any]:
    first = calls[0]
    batch = {name: [x for call in calls for x in call.batch[name]] for name in first.batch}
    ledgers = {"ledgers": batch.pop("ledgers")} if "ledgers" in batch else {}
    if first.method == _SAMPLE:
        everything: Any = sample_requests(first.model, batch["requests"], **ledgers)
    elif first.method == _ENCODE:
        everything = encode_texts(first.model, batch["sentences"])
    else:
        method = getattr(first.model, first.method)
        everything = method(*batch.values(), *first.common, **ledgers)
    if len(calls) == 1:
        # As it came, so that its length is checked where it always is.
        return [everything]
    ends = list(itertools.accumulate(map(len, calls)))
    found = len(everything.mean if isinstance(everything, ValueEstimate) else everything)
    if found != ends[-1]:
        raise ValueError(f"{first.method}: expected {ends[-1]} results, got {found}.")
    starts = [0, *ends[:-1]]
    return [_part(everything, slice(a, b)) for a, b in zip(starts, ends, strict=True)]


def _part(results: Any, part: slice) -> Any:
    if isinstance(results, Scores):
        parts = {name: values[part] for name, values in results.parts.items()}
        return Scores(results.total[part], parts)
    if isinstance(results, ValueEstimate):
        return ValueEstimate(results.mean[part], results.std[part])
    return results[part]

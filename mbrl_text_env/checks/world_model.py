"""The checker of world models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbrl_text_env.checks.base import Trial, rules
from mbrl_text_env.types import Ledger, TextState
from mbrl_text_env.world_model.dynamics import Futures, WorldModelError, predict_futures

_FUTURES, _SEED = 7, 3
_RULES = rules("""
attributes | attributes | an object with {names} | Subclass `world_model.Dynamics`.
fitted | is_fitted | dynamics that can predict | Fit them first.
arguments | {place} | arguments that are left as they are | Copy them.
failure | {place} | {size} arguments to be taken |
futures | futures | `world_model.Futures` | Return one.
shape | futures, {part} | {expected} | Return an array of the states and their futures.
finite | futures, features | finite numbers |
tokens | futures, features | the first, the tokens, to be `length` |
grows | futures, {part} | nothing below what the state has, {least:g} | A response only grows; add
    increments that are at least 0.
ended | futures, ended | {expected} |
late | futures, length | at most {most} tokens | Stop at the horizon, or at the longest response.
member | futures, member | numbers from 0 |
same | futures, {part} | {expected} | Futures follow from the state and the seed: draw from
    `language_models.base.stream(seed, state, 0)`, keep nothing.
error | {case} | {error} | Call `predict_futures`, or check as it does.
charge | predict_futures | {expected}, got {got} charged. |
pickle | pickle | an object that can be pickled | Define functions of features in a module.
""")


def check_world_model(
    dynamics: Any, states: Sequence[TextState], horizon: int | None = None
) -> None:
    """Check that dynamics implement the interface of `world_model.Dynamics`.

    It checks shapes and types of futures; that counts and lengths never fall below the state's;
    that futures to the end have ended, and others stop at the horizon; that futures do not depend
    on the call, the order or the rest of the batch; the empty batch; that ended states and horizons
    beyond the records are rejected; charges; and pickling.

    Args:
        dynamics: Fitted dynamics.
        states: At least two states of different lengths that have not ended.
        horizon: A supported horizon in tokens; None if they only predict the end.

    Raises:
        CheckError: A check fails.

    Example:
        >>> check_world_model(dynamics, states, horizon=8)  # doctest: +SKIP
    """
    if len(states) < 2:
        raise ValueError(f"states: expected at least 2, got {len(states)}.")
    trial = _Trial(dynamics)
    trial.expect_attributes(dynamics, "futures", "features", "names", "is_fitted", "flops_bound")
    trial.expect("fitted", dynamics.is_fitted is True, dynamics.is_fitted)
    states = [*states, states[0]]
    for ahead in dict.fromkeys((None, horizon)):
        found = trial.futures(states, ahead)
        trial.check_growth(states, found, ahead)
        trial.compare(found, trial.futures(states, ahead), "the same in a second call")
        backwards = trial.futures(states[::-1], ahead)
        turned = Futures(*(values[::-1] for values in vars(backwards).values()))
        trial.compare(found, turned, "futures in the order of the states")
        alone = [trial.futures([state], ahead) for state in states]
        parts = (
            np.concatenate(each) for each in zip(*(vars(a).values() for a in alone), strict=True)
        )
        trial.compare(found, Futures(*parts), "those that each state has alone")
        trial.futures([], ahead)
    trial.check_refusals(states[0])
    trial.check_charges(states)
    trial.check_pickle(states)


@dataclass
class _Trial(Trial):
    """Dynamics under check."""

    rules = _RULES
    dynamics: Any

    def __post_init__(self) -> None:
        self.subject = f"World model {type(self.dynamics).__name__}"

    def futures(self, states: Sequence[TextState], horizon: int | None) -> Futures:
        def ask(given: list[TextState]) -> Any:
            return self.dynamics.futures(given, _FUTURES, horizon, _SEED)

        found = self.called("futures", ask, list(states))
        self.expect("futures", isinstance(found, Futures), found)
        shape = len(states), _FUTURES
        wanted = {
            "features": ((*shape, len(self.dynamics.names)), "f"),
            "length": (shape, "i"),
            "ended": (shape, "b"),
            "member": (shape, "i"),
        }
        for part, (size, kind) in wanted.items():
            values = np.asarray(getattr(found, part))
            got = f"{values.dtype}{list(values.shape)}"
            right = values.shape == size and values.dtype.kind == kind
            self.expect("shape", right, got, part=part, expected=f"{kind}{list(size)}")
        self.expect("finite", np.isfinite(found.features).all(), found.features)
        self.expect("member", (found.member >= 0).all(), found.member)
        return found

    def check_growth(self, states: Sequence[TextState], found: Futures, ahead: int | None) -> None:
        features, names = self.dynamics.features, self.dynamics.names
        now = dict(zip(features.names, features(states).T, strict=True))
        falls = {feature.name for feature in features.features if feature.falls}
        same = found.features[..., names.index("tokens")] == found.length
        self.expect("tokens", same.all(), found.features[..., 0])
        for column, name in enumerate(names):
            for row, least in zip(found.features[..., column], now[name], strict=True):
                grows = name in falls or (row >= least).all()
                self.expect("grows", grows, row, part=name, least=least)
        longest = self.dynamics.longest_
        for state, length, ended in zip(states, found.length, found.ended, strict=True):
            most = longest if ahead is None else len(state.response_ids) + ahead
            self.expect("late", (length <= most).all(), length, most=most)
            if ahead is None:
                self.expect("ended", ended.all(), ended, expected="the end of all")
            else:
                open_ = length[~ended]
                message = f"{most} tokens of those that go on"
                self.expect("ended", (open_ == most).all(), open_, expected=message)

    def compare(self, one: Futures, other: Futures, expected: str) -> None:
        for part, values in vars(one).items():
            same = np.array_equal(values, getattr(other, part))
            self.expect("same", same, "others", part=part, expected=expected)

    def check_refusals(self, state: TextState) -> None:
        ended = TextState(state.prompt, state.prompt_ids, state.response_ids, "stop")
        beyond = self.dynamics.longest_ + 1

        def ask(given: TextState, horizon: int | None) -> Futures:
            return predict_futures(self.dynamics, [given], _FUTURES, horizon)

        self.expect_error("error", WorldModelError, lambda: ask(ended, None), "an ended state")
        self.expect_error("error", WorldModelError, lambda: ask(state, beyond), "too far ahead")

    def check_charges(self, states: Sequence[TextState]) -> None:
        ledgers = [Ledger() for _ in states]
        found = predict_futures(self.dynamics, states, _FUTURES, seed=_SEED, ledgers=ledgers)
        self.compare(self.futures(states, None), found, "the same futures with ledgers")
        most = float(self.dynamics.flops_bound(_FUTURES))
        for ledger in ledgers:
            usage = ledger.usage
            right = usage.dynamics_calls == _FUTURES and usage.flops == most and 0 <= most < np.inf
            expected = f"{_FUTURES} dynamics calls and flops_bound, {most:g} operations"
            self.expect("charge", right, usage, expected=expected)

    def check_pickle(self, states: Sequence[TextState]) -> None:
        again = self.pickled(self.dynamics)
        found = _Trial(again).futures(states, None)
        self.compare(self.futures(states, None), found, "the same futures from a pickled copy")

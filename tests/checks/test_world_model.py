"""The world model checker passes what keeps its contract, and names the fault of what does not."""

from dataclasses import replace

import numpy as np
import pytest

from mbrl_text_env import CheckError
from mbrl_text_env.checks import check_world_model
from mbrl_text_env.world_model import EnsembleDynamics, IncrementDynamics
from mbrl_text_env.world_model.features import DEFAULT_FEATURES
from tests.world_model.worlds import FEATURES, LM, fitted, records_of, state_of

STATES = [state_of(text) for text in ("", "a", "ab", "a b")]


@pytest.mark.parametrize("neighbours", [None, 5])
@pytest.mark.parametrize("features", [FEATURES, DEFAULT_FEATURES], ids=["few", "default"])
@pytest.mark.parametrize("stride", [1, 2])
def test_increments_pass(neighbours, features, stride):
    check_world_model(fitted(features, neighbours=neighbours, stride=stride), STATES, 2)


@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
@pytest.mark.parametrize("stride", [1, 2])
def test_ensembles_pass(propagation, stride):
    dynamics = EnsembleDynamics(
        LM, FEATURES, members=3, elites=2, hidden=16, stride=stride, propagation=propagation
    )
    check_world_model(dynamics.fit(records_of(samples=10)), STATES, 2)


class Changed(IncrementDynamics):
    """Futures that a subclass breaks."""

    def futures(self, states, num_futures, horizon=None, seed=0):
        return self.broken(super().futures(states, num_futures, horizon, seed), horizon)


class NotANumber(Changed):
    def broken(self, found, horizon):
        return replace(found, features=np.full_like(found.features, np.nan))


class NoCounts(Changed):
    """Increments alone, without what the state has."""

    def futures(self, states, num_futures, horizon=None, seed=0):
        found = super().futures(states, num_futures, horizon, seed)
        features = found.features - self.features(states)[:, None]
        features[..., 0] = found.length
        return replace(found, features=features)

    def broken(self, found, horizon):
        return found


class OtherTokens(Changed):
    def broken(self, found, horizon):
        return replace(found, length=found.length + 1)


class NeverEnds(Changed):
    def broken(self, found, horizon):
        return replace(found, ended=np.zeros_like(found.ended))


class Overshoots(Changed):
    def broken(self, found, horizon):
        features = found.features.copy()
        features[..., 0] += 9
        return replace(found, features=features, length=found.length + 9)


class OneMember(Changed):
    def broken(self, found, horizon):
        return replace(found, member=found.member[:, 0])


class NegativeMember(Changed):
    def broken(self, found, horizon):
        return replace(found, member=found.member - 9)


class Doubles(Changed):
    def broken(self, found, horizon):
        return vars(found)


class Counts(Changed):
    """Its futures change with each call."""

    calls = 0

    def broken(self, found, horizon):
        self.calls += 1
        return replace(found, member=found.member + self.calls)


class OfTheBatch(Changed):
    def broken(self, found, horizon):
        return replace(found, member=found.member + len(found.member))


class OfThePlace(Changed):
    def broken(self, found, horizon):
        return replace(found, member=found.member + np.arange(len(found.member))[:, None])


class Endless(Changed):
    """Its operations have no bound."""

    def broken(self, found, horizon):
        return found

    def flops_bound(self, num_futures):
        return float("inf")


class Closed(Changed):
    def broken(self, found, horizon):
        return found

    def __reduce__(self):
        raise TypeError("no")


class Clears(IncrementDynamics):
    def futures(self, states, num_futures, horizon=None, seed=0):
        found = super().futures(states, num_futures, horizon, seed)
        states.clear()
        return found


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (NotANumber, "finite numbers"),
        (NoCounts, "A response only grows"),
        (OtherTokens, "the tokens, to be `length`"),
        (NeverEnds, "the end of all|tokens of those that go on"),
        (Overshoots, "at most . tokens"),
        (OneMember, r"member: expected i\[5, 7\]"),
        (NegativeMember, "numbers from 0"),
        (Doubles, "Return one"),
        (Counts, "the same in a second call"),
        (OfTheBatch, "each state has alone"),
        (OfThePlace, "in the order of the states"),
        (Endless, "charged"),
        (Closed, "can be pickled"),
        (Clears, "left as they are"),
    ],
)
def test_faults_are_named(broken, message):
    dynamics = broken(LM, FEATURES, stride=1).fit(records_of(samples=10))
    with pytest.raises(CheckError, match=message):
        check_world_model(dynamics, STATES, 2)


def test_one_that_is_not_fitted_and_other_objects_are_faults():
    with pytest.raises(CheckError, match="Fit them first"):
        check_world_model(IncrementDynamics(LM), STATES)
    with pytest.raises(CheckError, match="Subclass"):
        check_world_model(object(), STATES)
    with pytest.raises(ValueError, match="at least 2"):
        check_world_model(fitted(), STATES[:1])

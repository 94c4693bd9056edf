"""The value model checker passes what keeps its contract, and names the fault of what does not."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env import CheckError
from mbrl_text_env.agents.values import PrefixRewardValue
from mbrl_text_env.checks import check_value_model
from mbrl_text_env.types import Prompt, TextState, Usage
from mbrl_text_env.values import ValueEstimate
from tests.checks.common import LM, broken
from tests.toys import CountReward, ExactValue, OptimalValue


def state_of(text, prompt="ab"):
    asked = Prompt.from_text(prompt)
    ids = LM.encode_prompt(Prompt.from_text(text)) if text else ()
    return TextState(asked, LM.encode_prompt(asked), ids)


STATES = [state_of("ab"), state_of(""), state_of("aab"), state_of("ba", "cab")]


class Good:
    """The number of tokens, as sure as they are many."""

    is_fitted = True

    def predict(self, states):
        sizes = np.array([float(len(state.response_ids)) for state in states])
        return ValueEstimate(sizes, 1 / (1 + sizes))


class Charges(Good):
    """Asks a model that costs something."""

    def predict_with(self, states, ledgers):
        for state, ledger in zip(states, ledgers or [], strict=ledgers is not None):
            ledger.charge(self.taken(state))
        return self.predict(states)

    def taken(self, state):
        return Usage(reward_calls=1, reward_flops=float(len(state.response_ids)))

    def usage_bound(self, state):
        return self.taken(state)

    def flops(self, states):
        return np.array([10.0 * len(state.response_ids) for state in states])

    def flops_bound(self):
        return 30.0


@pytest.mark.parametrize(
    "value",
    [
        Good(),
        Charges(),
        ExactValue(LM, CountReward(), 4),
        OptimalValue(LM, CountReward(), 4),
        PrefixRewardValue(CountReward(), LM),
    ],
    ids=lambda value: type(value).__name__,
)
def test_value_models_pass(value):
    check_value_model(value, STATES)


@settings(max_examples=20)
@given(st.lists(st.text("abcde", max_size=6), min_size=2, max_size=5))
def test_value_models_pass_on_any_states(texts):
    states = [state_of(text) for text in texts]
    check_value_model(PrefixRewardValue(CountReward(), LM), states)


# Value models that break it.


class NotANumber(Good):
    def predict(self, states):
        mean = super().predict(states).mean
        return ValueEstimate(np.where(mean == 0, np.nan, mean), np.zeros(len(mean)))


class InfiniteSpread(Good):
    def predict(self, states):
        with np.errstate(divide="ignore"):
            return ValueEstimate(np.zeros(len(states)), 1 / super().predict(states).mean)


class NegativeSpread(Good):
    def predict(self, states):
        estimate = super().predict(states)
        return ValueEstimate(estimate.mean, -estimate.std)


class Column(Good):
    def predict(self, states):
        estimate = super().predict(states)
        return ValueEstimate(estimate.mean[:, None], estimate.std)


class OneSpreadForAll(Good):
    def predict(self, states):
        return ValueEstimate(super().predict(states).mean, np.array([0.5]))


class TooFew(Good):
    def predict(self, states):
        estimate = super().predict(states[1:])
        return ValueEstimate(estimate.mean, estimate.std)


class Integers(Good):
    def predict(self, states):
        estimate = super().predict(states)
        return ValueEstimate(estimate.mean.astype(int), estimate.std)


class MeanAlone(Good):
    def predict(self, states):
        return super().predict(states).mean


class DependsOnTheBatch(Good):
    def predict(self, states):
        estimate = super().predict(states)
        return ValueEstimate(estimate.mean - estimate.mean.sum(), estimate.std)


class SpreadOfTheBatch(Good):
    def predict(self, states):
        mean = super().predict(states).mean
        return ValueEstimate(mean, np.full(len(mean), len(mean), dtype=float))


class DependsOnTheOrder(Good):
    def predict(self, states):
        return ValueEstimate(np.arange(float(len(states))), np.zeros(len(states)))


class SortedValues(Good):
    def predict(self, states):
        estimate = super().predict(states)
        return ValueEstimate(np.sort(estimate.mean), estimate.std)


class KeepsCount(Good):
    def __init__(self):
        self.calls = 0

    def predict(self, states):
        self.calls += 1
        estimate = super().predict(states)
        return ValueEstimate(estimate.mean + self.calls, estimate.std)


class DrawsWithoutSeed(Good):
    draws = itertools.count()

    def predict(self, states):
        std = np.array([float(next(self.draws)) for _ in states])
        return ValueEstimate(np.zeros(len(states)), std)


class SortsItsList(Good):
    def predict(self, states):
        states.sort(key=lambda state: len(state.response_ids))
        return super().predict(states)


class EmptiesItsListOfPaid(Charges):
    def predict_with(self, states, ledgers):
        estimate = super().predict_with(states, ledgers)
        states.clear()
        return estimate


class FailsOnAnEmptyBatch(Good):
    def predict(self, states):
        assert states[0].prompt
        return super().predict(states)


class FailsOnAnEmptyPrefix(Good):
    def predict(self, states):
        inverse = np.array([1 / len(state.response_ids) for state in states])
        return ValueEstimate(inverse, inverse)


class Unfitted(Good):
    is_fitted = False


class MaybeFitted(Good):
    is_fitted = None


class ChargesAboveItsBound(Charges):
    def usage_bound(self, state):
        return Usage(reward_calls=1, reward_flops=2.0)


class ChargesWithoutABound(Charges):
    usage_bound = None


class FlopsAboveTheirBound(Charges):
    def flops_bound(self):
        return 29.0


class ExpectsMoreThanItsBound(Charges):
    def expected_usage(self, state):
        return self.taken(state) * 2


class NegativeFlops(Charges):
    def flops(self, states):
        return -super().flops(states)


class ChargesAValueCall(Charges):
    def predict_with(self, states, ledgers):
        for ledger in ledgers or []:
            ledger.charge(Usage(value_calls=1))
        return super().predict_with(states, ledgers)


class ChargesItAll(Charges):
    """Puts the cost of the batch on the first ledger."""

    def predict_with(self, states, ledgers):
        for state in states if ledgers else []:
            ledgers[0].charge(self.taken(state))
        return self.predict(states)


class OtherValuesWhenPaid(Charges):
    def predict_with(self, states, ledgers):
        estimate = super().predict_with(states, ledgers)
        return ValueEstimate(estimate.mean + (ledgers is not None), estimate.std)


class NoNumberWhenPaid(Charges):
    def predict_with(self, states, ledgers):
        estimate = super().predict_with(states, ledgers)
        return ValueEstimate(estimate.mean * np.nan, estimate.std)


class NotPicklable(Good):
    def __init__(self):
        self.function = lambda: 1


class ForgetsItsFit(Good):
    """Leaves what it needs out of the pickle."""

    def __init__(self):
        self.weight = 2.0

    def __getstate__(self):
        return {"weight": 1.0}

    def predict(self, states):
        estimate = super().predict(states)
        return ValueEstimate(self.weight * estimate.mean, estimate.std)


@pytest.mark.parametrize(
    ("cls", "match"),
    [
        broken(NotANumber, "mean: expected finite numbers"),
        broken(InfiniteSpread, "std: expected finite numbers"),
        broken(NegativeSpread, "std: expected standard deviations of at least 0"),
        broken(Column, r"mean: expected float64\[5\], one for each state, got float64\[5, 1\]"),
        broken(OneSpreadForAll, r"std: expected float64\[5\].*got float64\[1\]"),
        broken(TooFew, r"mean: expected float64\[5\].*got float64\[4\]"),
        broken(Integers, r"mean: expected float64\[5\].*got int64\[5\]"),
        broken(MeanAlone, r"expected a `values\.ValueEstimate`"),
        broken(DependsOnTheBatch, "mean: expected the value that each state has alone"),
        broken(SpreadOfTheBatch, "std: expected the value that each state has alone"),
        broken(DependsOnTheOrder, "mean: expected values in the order of the states"),
        broken(SortedValues, "mean: expected values in the order of the states"),
        broken(KeepsCount, "mean: expected the same in a second call"),
        broken(DrawsWithoutSeed, "std: expected the same in a second call"),
        broken(SortsItsList, "predict: expected that the list of states is left as it is"),
        broken(EmptiesItsListOfPaid, "ledgers: expected that the list of states is left as it is"),
        broken(FailsOnAnEmptyBatch, "expected values of 0 states, got IndexError.*an empty batch"),
        broken(FailsOnAnEmptyPrefix, "expected values of 5 states, got ZeroDivisionError"),
        broken(Unfitted, "is_fitted: expected True, got False.*Fit it"),
        broken(MaybeFitted, "is_fitted: expected True, got None"),
        broken(ChargesAboveItsBound, r"ledgers, reward_flops: expected 0 to 2, .* 3 tokens, got 3"),
        broken(ChargesWithoutABound, "ledgers, reward_calls: expected 0 to 0"),
        broken(FlopsAboveTheirBound, "ledgers, value_flops: expected 0 to 29, .*got 30"),
        broken(ExpectsMoreThanItsBound, "expected_usage, reward_calls: expected 0 to 1, .*got 2"),
        broken(NegativeFlops, "ledgers, value_flops: expected 0 to 30, .*got -20"),
        broken(ChargesAValueCall, "ledgers: expected one value call a state, got.*predict_values"),
        broken(ChargesItAll, "ledgers, reward_calls: expected 0 to 1, .*got 5"),
        broken(OtherValuesWhenPaid, "mean: expected the same values with ledgers as without"),
        broken(NoNumberWhenPaid, "ledgers: expected values of 5 states, got ValueModelError"),
        broken(NotPicklable, "pickle: expected an object that can be pickled, got"),
        broken(ForgetsItsFit, "mean: expected the same values from a pickled copy"),
    ],
)
def test_broken_value_models_fail(cls, match):
    with pytest.raises(CheckError, match=match):
        check_value_model(cls(), STATES)


def test_messages_say_what_was_expected_what_came_and_what_to_change():
    with pytest.raises(AssertionError) as caught:
        check_value_model(NegativeSpread(), STATES[:2])
    assert str(caught.value) == (
        "Value model NegativeSpread, predict, std: expected standard deviations of at least 0, got "
        f"{-1 / np.array([3.0, 1.0, 3.0])!r}. Return 0 where nothing is uncertain."
    )


def test_the_tolerance_is_the_callers():
    class Rounds(Good):
        """Depends on the batch a little, as single precision does."""

        def __reduce__(self):
            return (Good, ())

        def predict(self, states):
            estimate = super().predict(states)
            return ValueEstimate(estimate.mean + 1e-4 * len(states), estimate.std)

    check_value_model(Rounds(), STATES, tolerance=1e-2)
    with pytest.raises(CheckError, match="that each state has alone"):
        check_value_model(Rounds(), STATES)


def test_other_objects_are_no_value_models():
    with pytest.raises(CheckError, match="without predict"):
        check_value_model(object(), STATES)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        check_value_model(Good(), STATES[:1])


def test_the_model_and_the_states_are_left_as_they_were():
    value, states = Charges(), list(STATES)
    before = pickle.dumps(value)
    check_value_model(value, states)
    assert pickle.dumps(value) == before
    assert states == STATES

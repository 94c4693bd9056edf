"""Usage, budgets and ledgers: sums, hard caps and the shares of time."""

import dataclasses
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.types import Budget, BudgetError, BudgetExceededError, Ledger, Usage, timed

COUNTS = [f.name for f in dataclasses.fields(Usage) if f.type == "int"]
AMOUNTS = [f.name for f in dataclasses.fields(Usage)]
CAPS = {
    "tokens": lambda n: Usage(generated_tokens=n),
    "flops": lambda n: Usage(lm_flops=n),
    "reward_calls": lambda n: Usage(reward_calls=n),
}

usages = st.builds(Usage, **{name: st.integers(0, 10**9) for name in AMOUNTS})


class TestUsage:
    @given(usages, usages, usages)
    def test_adds_up_amount_by_amount(self, first, second, third):
        total = first + second
        for name in AMOUNTS:
            assert getattr(total, name) == getattr(first, name) + getattr(second, name)
        assert first + second == second + first
        assert (first + second) + third == first + (second + third)
        assert first + Usage() == first

    @given(usages, st.integers(0, 5))
    def test_a_multiple_is_a_repeated_sum(self, usage, count):
        assert usage * count == sum([usage] * count, Usage())

    @given(usages, usages)
    def test_a_difference_undoes_a_sum(self, first, second):
        assert (first + second) - second == first

    @given(usages, usages)
    def test_the_maximum_is_taken_amount_by_amount(self, first, second):
        most = first.maximum(second)
        for name in AMOUNTS:
            assert getattr(most, name) == max(getattr(first, name), getattr(second, name))

    def test_flops_are_those_of_all_models(self):
        usage = Usage(lm_flops=1.0, reward_flops=20.0, value_flops=300.0, dynamics_flops=4000.0)
        assert usage.flops == 4321.0

    def test_as_dict_names_every_amount(self):
        usage = Usage(prompt_tokens=3, lm_flops=2.0, value_flops=5.0)
        amounts = usage.as_dict()
        assert set(amounts) == {*AMOUNTS, "flops"}
        assert amounts["flops"] == 7.0
        assert Usage(**{k: v for k, v in amounts.items() if k != "flops"}) == usage

    def test_counts_stay_whole_numbers(self):
        total = (Usage(generated_tokens=3) + Usage(generated_tokens=4)) * 2
        assert COUNTS
        assert all(isinstance(getattr(total, name), int) for name in COUNTS)


class TestBudget:
    def test_no_cap(self):
        assert not Budget().is_capped

    @pytest.mark.parametrize("name", ["tokens", "flops", "reward_calls", "seconds"])
    def test_each_cap(self, name):
        assert Budget(**{name: 1}).is_capped

    @pytest.mark.parametrize("name", ["tokens", "flops", "reward_calls", "seconds"])
    @pytest.mark.parametrize("cap", [0, -1, -0.5, float("nan")])
    def test_a_cap_that_is_not_positive(self, name, cap):
        with pytest.raises(BudgetError, match=rf"Budget\({name}={cap!r}\): expected a positive"):
            Budget(**{name: cap})

    def test_what_is_left_after_some_was_spent(self):
        budget = Budget(tokens=10, flops=8.0, seconds=2.0)
        spent = Usage(generated_tokens=4, lm_flops=3.0, reward_flops=1.0, reward_calls=9, seconds=1)
        assert budget.after(spent) == Budget(tokens=6, flops=4.0, seconds=1.0)
        assert budget.after(Usage(generated_tokens=10)) is None
        assert Budget().after(spent) == Budget()

    def test_shares_are_never_more_than_the_whole(self):
        budget = Budget(tokens=10, reward_calls=7, flops=9.0)
        assert budget.shared(3) == Budget(tokens=3, reward_calls=2, flops=3.0)
        assert budget.shared(7) == Budget(tokens=1, reward_calls=1, flops=9.0 / 7)
        assert budget.shared(8) is None
        assert Budget().shared(5) == Budget()


class TestLedger:
    def test_starts_empty_and_without_caps(self):
        ledger = Ledger()
        assert ledger.usage == Usage()
        assert not ledger.budget.is_capped
        assert ledger.affords(Usage(generated_tokens=10**18, lm_flops=1e300, seconds=1e9))

    @given(st.lists(usages, max_size=6))
    def test_keeps_the_sum(self, charges):
        ledger = Ledger()
        for usage in charges:
            ledger.charge(usage)
        assert ledger.usage == sum(charges, Usage())

    @pytest.mark.parametrize("name", CAPS)
    def test_a_cap_may_be_reached_and_not_passed(self, name):
        spend = CAPS[name]
        ledger = Ledger(Budget(**{name: 10}))
        assert ledger.affords(spend(10))
        assert not ledger.affords(spend(11))
        ledger.charge(spend(6))
        assert ledger.affords(spend(4))
        assert not ledger.affords(spend(5))
        ledger.charge(spend(4))
        assert ledger.affords(Usage())
        assert not ledger.affords(spend(1))

    @pytest.mark.parametrize("name", CAPS)
    def test_a_charge_beyond_raises_and_is_kept(self, name):
        spend = CAPS[name]
        ledger = Ledger(Budget(**{name: 10}))
        ledger.charge(spend(9))
        with pytest.raises(BudgetExceededError, match=rf"Spent 12 {name} of a budget of 10"):
            ledger.charge(spend(3))
        assert ledger.usage == spend(12)
        assert not ledger.affords(Usage())

    def test_rounding_passes_no_cap(self):
        ledger = Ledger(Budget(flops=0.3))
        for _ in range(3):
            ledger.charge(Usage(lm_flops=0.1))  # the sum is a little above 0.3
        assert not ledger.affords(Usage(lm_flops=1e-6))

    def test_asking_costs_nothing(self):
        ledger = Ledger(Budget(tokens=5))
        ledger.affords(Usage(generated_tokens=4))
        assert ledger.usage == Usage()

    def test_only_generated_tokens_are_capped(self):
        ledger = Ledger(Budget(tokens=5))
        ledger.charge(Usage(prompt_tokens=1000, cached_tokens=1000, lm_calls=50))
        assert ledger.affords(Usage(generated_tokens=5))
        assert not ledger.affords(Usage(generated_tokens=6))

    def test_flops_of_all_models_are_capped_together(self):
        ledger = Ledger(Budget(flops=100.0))
        ledger.charge(Usage(lm_flops=40.0, reward_flops=30.0))
        assert ledger.affords(Usage(value_flops=20.0, dynamics_flops=10.0))
        assert not ledger.affords(Usage(value_flops=20.0, dynamics_flops=10.5))

    def test_time_is_checked_between_calls_and_never_raises(self):
        ledger = Ledger(Budget(seconds=1.0))
        assert ledger.affords(Usage(seconds=1.0))
        ledger.charge(Usage(seconds=5.0))
        assert not ledger.affords(Usage())

    def test_ledgers_do_not_share(self):
        first, second = Ledger(), Ledger()
        first.charge(Usage(lm_calls=1))
        assert second.usage == Usage()


class TestTimed:
    def test_shares_are_equal_and_sum_to_the_whole(self):
        alone, shared = Ledger(), [Ledger() for _ in range(4)]
        with timed([alone]), timed(shared):
            sum(range(1000))
        shares = {ledger.usage.seconds for ledger in shared}
        assert len(shares) == 1
        share = shares.pop()
        assert share > 0
        assert 4 * share <= alone.usage.seconds
        assert shared[0].usage == Usage(seconds=share)

    def test_seconds_are_charged_once_where_a_block_stands_in_another(self):
        inner, outer = Ledger(), Ledger()
        started = time.perf_counter()
        with timed([outer]), timed([inner]):
            sum(range(200_000))
        elapsed = time.perf_counter() - started
        assert inner.usage.seconds + outer.usage.seconds <= elapsed
        assert outer.usage.seconds < inner.usage.seconds

    def test_an_error_is_charged_too(self):
        ledger = Ledger()
        with pytest.raises(KeyError), timed([ledger]):
            raise KeyError
        assert ledger.usage.seconds > 0

    @pytest.mark.parametrize("ledgers", [None, []])
    def test_nobody_to_charge(self, ledgers):
        with timed(ledgers):
            pass

    def test_blocks_add_up(self):
        ledger = Ledger()
        with timed([ledger]):
            pass
        before = ledger.usage.seconds
        with timed([ledger]):
            pass
        assert ledger.usage.seconds > before

    def test_time_beyond_its_cap_does_not_raise(self):
        ledger = Ledger(Budget(seconds=1e-12))
        with timed([ledger]):
            sum(range(1000))
        assert not ledger.affords(Usage())

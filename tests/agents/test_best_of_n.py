import itertools
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.agents import BestOfN
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.mdp import initial
from mbrl_text_env.types import Budget
from tests.toys import PROMPTS, CountReward, FixedValue

LM = NGramLM("abc", seed=3)


def test_it_keeps_the_best_of_its_samples():
    reward = CountReward()
    agent = BestOfN(LM, reward, n=8, max_response_tokens=5)
    (generation,) = agent.generate(PROMPTS[:1], seed=1)
    (samples,) = LM.sample([initial(PROMPTS[0], LM)], 8, 5, seeds=[1], params=agent.params)
    texts = [LM.decode(chunk.token_ids) for chunk in samples]
    scores = CountReward().score(PROMPTS[:1] * 8, texts)
    assert generation.completion.score == max(scores)
    assert generation.text == texts[scores.index(max(scores))]
    assert generation.usage.generated_tokens == sum(map(len, samples))
    # One call for all; what was drawn twice is scored once.
    different = list(
        {chunk.token_ids: text for chunk, text in zip(samples, texts, strict=True)}.values()
    )
    assert len(different) < 8
    assert reward.calls == [different]
    assert generation.usage.reward_calls == len(different)


def test_without_budget_and_n_it_takes_the_articles_four():
    (generation,) = BestOfN(LM, CountReward(), max_response_tokens=5).generate(PROMPTS[:1])
    assert generation.usage.reward_calls == 4


def test_a_budget_is_spent_as_far_as_it_is_certain():
    never_stops = NGramLM("abcdefgh", seed=1, stop_probability=0.0, concentration=10.0)
    agent = BestOfN(never_stops, CountReward(), max_response_tokens=12)
    for tokens, count in ((12, 1), (23, 1), (24, 2), (100, 8)):
        (generation,) = agent.generate(PROMPTS[:1], Budget(tokens=tokens))
        assert generation.usage.reward_calls == count
        assert generation.usage.generated_tokens == 12 * count


def test_what_short_responses_leave_over_is_spent():
    short = NGramLM("abc", seed=3, stop_probability=0.6)
    agent = BestOfN(short, CountReward(), max_response_tokens=10)
    (generation,) = agent.generate(PROMPTS[:1], Budget(tokens=100))
    assert generation.usage.lm_calls > 1
    assert 90 < generation.usage.generated_tokens <= 100


def test_more_budget_never_scores_lower():
    agent = BestOfN(LM, CountReward(), max_response_tokens=5)
    budgets = [Budget(tokens=tokens) for tokens in (5, 10, 20, 40, 80, 160)]
    for seed in range(10):
        scores = [agent.generate(PROMPTS, b, seed=seed) for b in budgets]
        for earlier, later in pairwise(scores):
            for a, b in zip(earlier, later, strict=True):
                assert a.completion.score <= b.completion.score


def test_a_time_limit_ends_the_search(monkeypatch):
    # A clock that goes on by a millisecond whenever it is read.
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: 0.001 * next(ticks))
    monkeypatch.setattr("mbrl_text_env.types.time", clock)
    (generation,) = BestOfN(LM, CountReward(), max_response_tokens=5).generate(
        PROMPTS[:1], Budget(seconds=0.05)
    )
    assert generation.completion.score is not None
    # The cap is looked at before a wave, and a wave is two calls.
    assert 0.05 <= generation.usage.seconds <= 0.06


WAVES = list(itertools.accumulate((1, 1, 2, 4, 8, 16, 16, 16)))
"""Samples drawn after each wave towards a target."""


class TestTarget:
    LM = NGramLM("abcdefgh", seed=3, concentration=50.0, stop_probability=0.1)

    def agent(self, **options):
        return BestOfN(self.LM, CountReward(), max_response_tokens=8, **options)

    def test_it_is_a_number(self):
        with pytest.raises(ValueError, match="target: expected a score"):
            self.agent(target=float("nan"))

    def sampled(self, seed, n):
        """The scores of the first n samples."""
        start, params = initial(PROMPTS[0], self.LM), self.agent().params
        [chunks] = self.LM.sample([start], n, 8, seeds=[seed], params=params)
        texts = [self.LM.decode(chunk.token_ids) for chunk in chunks]
        return CountReward().score([None] * n, texts)

    def explored(self, seed=0, budget=None, **options):
        [found] = self.agent(**options).explore(PROMPTS[:1], budget, seed=seed)
        return found

    @given(seed=st.integers(0, 999), n=st.integers(1, 40), target=st.floats(0.0, 0.8))
    def test_it_ends_with_the_wave_that_reaches_the_target(self, seed, n, target):
        scores = self.sampled(seed, n)
        reached = next((i + 1 for i, score in enumerate(scores) if score >= target), n)
        answer, tree = self.explored(seed, n=n, target=target)
        drawn = min(n, next(count for count in WAVES if count >= reached))
        assert tree.root.samples == drawn
        assert answer.completion.score == max(scores[:drawn])
        assert (answer.completion.score >= target) == (max(scores) >= target)

    def test_waves_begin_with_one_and_double(self, monkeypatch):
        counts, sample = [], self.LM.sample

        def counted(states, num_samples, *args, **options):
            counts.append((options["first_sample"], num_samples))
            return sample(states, num_samples, *args, **options)

        monkeypatch.setattr(self.LM, "sample", counted)
        self.explored(n=60, target=2.0)
        assert [count for _, count in counts] == [1, 1, 2, 4, 8, 16, 16, 12]
        assert [first for first, _ in counts] == [0, *WAVES[:7]]

    def test_a_score_as_high_as_the_target_will_do(self):
        scores = self.sampled(0, 64)
        best, place = max(scores), scores.index(max(scores))
        drawn = next(count for count in WAVES if count > place)
        assert drawn < 64
        for target, samples in ((best, drawn), (np.nextafter(best, 2.0), 64)):
            assert self.explored(n=64, target=target)[1].root.samples == samples

    @given(seed=st.integers(0, 999), tokens=st.integers(8, 400))
    def test_out_of_reach_a_budget_buys_what_it_buys_without(self, seed, tokens):
        plain, other = (
            self.explored(seed, Budget(tokens=tokens), target=target) for target in (None, 2.0)
        )
        assert other[1].root.samples == plain[1].root.samples
        assert other[0].usage.generated_tokens == plain[0].usage.generated_tokens
        assert other[0].completion == plain[0].completion

    def test_without_budget_and_n_it_takes_at_most_four(self):
        assert self.explored(target=2.0)[1].root.samples == 4
        assert self.explored(target=0.0)[1].root.samples == 1

    def test_samples_are_those_without_a_target(self):
        _, plain = self.explored(n=32)
        _, tree = self.explored(n=32, target=0.45)
        found, others = ([node.state.response_ids for node in t.complete()] for t in (tree, plain))
        assert 1 < len(found) < len(others)
        assert found == others[: len(found)]

    def test_what_is_left_of_a_budget_is_not_spent(self):
        answer, tree = self.explored(budget=Budget(tokens=800), target=0.3)
        assert answer.completion.score >= 0.3
        assert answer.usage.generated_tokens < 200
        assert answer.usage.lm_calls == 1 + WAVES.index(tree.root.samples)

    def test_not_with_pruning(self):
        value = FixedValue(len, self.LM)
        with pytest.raises(ValueError, match=r"keep=1\.0 with a target, got keep=0\.5"):
            BestOfN(self.LM, CountReward(), value, keep=0.5, target=1.0)


def test_bad_arguments():
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="n: expected at least 1"):
            BestOfN(LM, CountReward(), n=wrong)


class TestPruning:
    LM = NGramLM("abcdefgh", seed=3, concentration=50.0, stop_probability=0.0)

    def agent(self, **options):
        value = FixedValue(lambda text: text.count("a"), self.LM)
        return BestOfN(
            self.LM, CountReward(), value, max_response_tokens=8, chunk_tokens=2, **options
        )

    def test_after_each_chunk_the_better_half_goes_on(self):
        """8 chunks of 2, then 4, 2 and 1."""
        [(answer, tree)] = self.agent(n=8, keep=0.5).explore(PROMPTS[:1])
        assert answer.usage.generated_tokens == 2 * (8 + 4 + 2 + 1)
        depths = [node.depth for node in tree.nodes for _ in range(node.copies)]
        assert [depths.count(depth) for depth in (1, 2, 3, 4)] == [8, 4, 2, 1]
        first = [node for node in tree.nodes if node.depth == 1]
        pruned = [node.value for node in first if not node.children]
        assert max(pruned) <= min(node.value for node in first if node.children)

    def test_a_budget_buys_more_samples_with_pruning(self):
        plain, pruned = (
            self.agent(keep=keep).explore(PROMPTS[:1], Budget(tokens=160))[0][1]
            for keep in (1.0, 0.5)
        )
        assert plain.root.samples == 20
        assert pruned.root.samples > 30

    def test_it_pays_with_a_good_value(self):
        budget = Budget(tokens=160)
        plain, pruned = (
            np.mean(
                [
                    g.completion.score
                    for seed in range(8)
                    for g in self.agent(keep=keep).generate(PROMPTS, budget, seed=seed)
                ]
            )
            for keep in (1.0, 0.5)
        )
        assert pruned > plain + 0.02

    def test_no_more_is_begun_than_can_be_finished(self):
        """However many samples are asked for, a budget is spent on complete responses."""
        budget = Budget(tokens=160)
        trees = [
            self.agent(n=n, keep=0.5).explore(PROMPTS[:1], budget)[0][1] for n in (None, 40, 1000)
        ]
        firsts = [sum(child.copies for child in tree.root.children) for tree in trees]
        assert firsts[1:] == [min(40, firsts[0]), min(1000, firsts[0])]
        assert all(len(tree.complete()) >= 2 for tree in trees)

    def test_shares_are_not_raised_by_rounding(self):
        [(_, tree)] = self.agent(n=25, keep=0.28).explore(PROMPTS[:1])
        assert sum(node.samples for node in tree.root.children) == 7

    @pytest.mark.parametrize("keep", [0.0, -1.0, 1.1])
    def test_shares_are_shares(self, keep):
        with pytest.raises(ValueError, match="keep"):
            self.agent(keep=keep)

    def test_it_takes_a_value(self):
        with pytest.raises(ValueError, match="pruning needs a value model"):
            BestOfN(self.LM, CountReward(), keep=0.5)

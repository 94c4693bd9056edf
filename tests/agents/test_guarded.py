"""The guarded planner on toys whose answers are known."""

import asyncio
import threading
import time
from typing import ClassVar

import numpy as np
import pytest

from mbrl_text_env.agents import Adaptive, BestOfN, Guarded, ParticleFilter
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.mdp import initial, transition
from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.types import Budget, Chunk, Prompt

LM = NGramLM("abcde", order=2, seed=3, stop_probability=0.15)
PROMPTS = [Prompt.from_text(text, chat=False) for text in ("ab", "ba", "cd", "de", "ea", "ac")]


class Plain(NGramLM):
    """One that watches no guards."""

    guards = False


PLAIN = Plain("abcde", order=2, seed=3, stop_probability=0.15)


class NoVowels(RewardModel):
    """1 for at least four letters without a vowel, half for either."""

    name = "no-vowels"
    is_verifier = True

    def score(self, prompts, responses):
        return [
            (len(text) >= 4) / 2 + (not set("ae") & set(text)) / 2 if text else 0.0
            for text in responses
        ]

    def bound(self, prompts, prefixes):
        return [0.5 if set("ae") & set(text) else 1.0 for text in prefixes]


def answers(agent, budget=None, seed=0):
    return agent.generate(PROMPTS, budget, seed=seed)


def test_it_reaches_the_target_for_fewer_tokens_than_best_of_n():
    options = {"max_response_tokens": 12}
    own, other = Guarded(LM, NoVowels(), **options), BestOfN(LM, NoVowels(), target=1.0, **options)
    budget = Budget(tokens=300)
    for seed in range(3):
        found, plain = answers(own, budget, seed), answers(other, budget, seed)
        assert all(g.completion.score == 1.0 for g in found)
        spent = [sum(g.usage.generated_tokens for g in row) for row in (found, plain)]
        assert spent[0] * 2 < spent[1]


def test_a_model_without_guards_reaches_the_target_for_fewer_tokens_than_best_of_n_too():
    options = {"max_response_tokens": 12}
    own = Guarded(PLAIN, NoVowels(), **options)
    other = BestOfN(PLAIN, NoVowels(), target=1.0, **options)
    budget = Budget(tokens=300)
    found, plain = ([g for s in range(3) for g in answers(a, budget, s)] for a in (own, other))
    assert all(g.completion.score == 1.0 for g in found)
    spent = [sum(g.usage.generated_tokens for g in row) for row in (found, plain)]
    assert spent[0] < spent[1]
    assert asyncio.run(own.generate_async(PROMPTS, budget, seed=2))[0].text == found[-6].text


def test_without_a_budget_it_draws_until_the_target_or_four():
    for generation in answers(Guarded(LM, NoVowels(), max_response_tokens=12, floor=-40.0)):
        assert generation.completion.score == 1.0


@pytest.mark.parametrize("lm", [LM, PLAIN], ids=["own", "by-chunks"])
@pytest.mark.parametrize("tokens", [12, 13, 40, 100])
def test_budgets_hold_and_every_answer_is_complete(tokens, lm):
    agent = Guarded(lm, NoVowels(), max_response_tokens=12)
    for generation in answers(agent, Budget(tokens=tokens, reward_calls=3)):
        assert generation.usage.generated_tokens <= tokens
        assert generation.usage.reward_calls <= 3
        assert generation.completion.score is not None
        assert generation.completion.state.finish_reason is not None


def test_a_batch_answers_as_single_prompts_do():
    agent, budget = Guarded(LM, NoVowels(), max_response_tokens=12), Budget(tokens=100)
    together = answers(agent, budget, 5)
    apart = [agent.generate([prompt], budget, seed=5)[0] for prompt in PROMPTS]
    assert [g.completion for g in together] == [g.completion for g in apart]


def test_a_target_above_what_can_be_reached_is_what_can_be_reached():
    agent = Guarded(LM, NoVowels(), max_response_tokens=12, target=7.0)
    with pytest.warns(UserWarning, match="target of at most 1, .*'no-vowels' .*'ab.*got 7"):
        found = answers(agent, Budget(tokens=200))
    assert np.mean([g.completion.score for g in found]) == 1.0


def test_from_a_state_in_which_something_is_lost_the_rest_is_reached():
    """A vowel is there: half a point is the most, and the search stops at the first with it."""
    lost = [transition(initial(p, LM), Chunk((1, 2)), 12) for p in PROMPTS]
    for kind in (Guarded, Adaptive):
        agent = kind(LM, NoVowels(), max_response_tokens=12)
        for decision in agent.act(lost, Budget(tokens=200)):
            assert decision.completion.score == 0.5
            assert decision.usage.generated_tokens <= 24


def test_searches_in_an_event_loop_score_one_at_a_time():
    class Alone(Spelled):
        busy = 0

        def score(self, prompts, responses):
            type(self).busy += 1
            time.sleep(0.001)
            assert self.busy == 1
            type(self).busy -= 1
            return super().score(prompts, responses)

    lock = threading.RLock()

    class Locked(NGramLM):
        """As `TransformersLM` does, it answers one call at a time."""

        def sample_requests(self, requests, *, ledgers=None):
            with lock:
                return super().sample_requests(requests, ledgers=ledgers)

        def logprobs(self, states, chunks, *, ledgers=None):
            with lock:
                return super().logprobs(states, chunks, ledgers=ledgers)

    async def both():
        lm = Locked("abcde", order=2, seed=3, stop_probability=0.15)
        agents = [Guarded(lm, Alone(), max_response_tokens=12) for _ in range(2)]
        return await asyncio.gather(*(a.generate_async(PROMPTS, Budget(tokens=60)) for a in agents))

    first, second = asyncio.run(both())
    expected = answers(Guarded(LM, Spelled(), max_response_tokens=12), Budget(tokens=60))
    for found in (first, second):
        assert [g.completion for g in found] == [g.completion for g in expected]


def test_refusals():
    class Unknown(RewardModel):
        def score(self, prompts, responses):
            return [0.0] * len(responses)

    with pytest.raises(ValueError, match="a reward whose `bound` limits"):
        answers(Guarded(LM, Unknown(), max_response_tokens=12))
    for options in ({"floor": 1.0}, {"candidates": 0}, {"target": float("nan")}):
        with pytest.raises(ValueError, match="xpected"):
            Guarded(LM, NoVowels(), **options)


def test_guarded_particles_reach_the_target_where_plain_ones_do_not():
    options = {"max_response_tokens": 12, "chunk_tokens": 3, "particles": 4}
    own, other = (ParticleFilter(LM, NoVowels(), guarded=on, **options) for on in (1, 0))
    found, plain = ([g.completion.score for g in answers(agent, seed=1)] for agent in (own, other))
    assert np.mean(found) == 1.0
    assert np.mean(plain) < 0.9


class Spelled(NoVowels):
    """1 for a response that also ends with "bd", which the model hardly ever writes."""

    def score(self, prompts, responses):
        return [
            both * (0.5 + 0.5 * text.endswith("bd"))
            for both, text in zip(super().score(prompts, responses), responses, strict=True)
        ]

    def suggest(self, prompt, prefix):
        return ["", "e", "bd"]  # the first two are of no use


def test_what_is_suggested_is_added_with_its_own_log_probability():
    for kind in (Guarded, Adaptive):
        agent = kind(LM, Spelled(), max_response_tokens=12)
        for generation in answers(agent, Budget(tokens=120), 2):
            completion = generation.completion
            assert completion.score == 1.0
            [judged] = LM.logprobs(
                [initial(generation.prompt, LM)], [Chunk(completion.state.response_ids)]
            )
            assert completion.logprobs == pytest.approx(judged)
            assert generation.usage.generated_tokens <= 120
    plain = Guarded(LM, Spelled(), max_response_tokens=12, additions=0)
    assert np.mean([g.completion.score for g in answers(plain, Budget(tokens=120), 2)]) < 0.9


def test_no_text_is_paid_for_twice():
    class Counting(NoVowels):
        asked: ClassVar[list[str]] = []

        def score(self, prompts, responses):
            self.asked.extend(responses)
            return super().score(prompts, responses)

    reward = Counting()
    [generation] = Guarded(LM, reward, max_response_tokens=12).generate(
        PROMPTS[:1], Budget(tokens=200)
    )
    assert len(reward.asked) == len(set(reward.asked)) == generation.usage.reward_calls

"""How far a policy has moved: against exact enumeration, and by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from mbrl_text_env.agents.learning import check_gold, check_value, divergence, diversity
from mbrl_text_env.agents.learning.reports import (
    Divergence,
    Diversity,
    _standard_error,
    to_json,
)
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.files import restored
from mbrl_text_env.language_models import NGramLM, SamplingParams, TableLM
from mbrl_text_env.mdp import initial
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.types import Chunk, Ledger, Prompt, TextState
from tests.agents.values.worlds import written
from tests.toys import CountReward, FixedValue, now

ASKED = [Prompt.from_text(text) for text in ("ab", "ba", "cc")]
POLICY = NGramLM("abc", order=2, seed=1, stop_probability=0.3)
OTHER = NGramLM("abc", order=2, seed=2, stop_probability=0.2)
TOKENS = 3


def sampled(lm, count, seed=0, prompts=ASKED):
    agent = Sampling(lm, max_response_tokens=TOKENS, params=SamplingParams())
    states = [initial(prompt, lm) for prompt in prompts]
    rows = [now(agent.complete(state, count, Ledger(), seed)) for state in states]
    return [completion.state for row in rows for completion in row]


def exact_divergence():
    """Nats a response, and nats a token, by enumeration."""
    nats = tokens = 0.0
    for prompt in ASKED:
        start = initial(prompt, POLICY)
        for ids, probability in POLICY.responses(start, TOKENS):
            state = TextState(prompt, start.prompt_ids)
            own, other = (sum(lm.logprobs([state], [Chunk(ids)])[0]) for lm in (POLICY, OTHER))
            nats += probability * (own - other)
            tokens += probability * len(ids)
    return nats / len(ASKED), nats / tokens


class TestDivergence:
    def test_against_enumeration(self):
        per_response, per_token = exact_divergence()
        found = divergence(POLICY, OTHER, sampled(POLICY, 2000))
        assert found.num_responses == 6000
        assert found.per_response == pytest.approx(per_response, abs=0.03)
        assert found.per_token == pytest.approx(per_token, abs=0.015)

    def test_standard_errors_cover(self):
        """Of 100 estimates about 95% are within two standard errors."""
        prompts = [replace(ASKED[i % 3], id=f"{i}") for i in range(60)]
        exact = exact_divergence()
        hits = np.zeros(2)
        for seed in range(100):
            found = divergence(POLICY, OTHER, sampled(POLICY, 1, seed, prompts))
            hits += [
                abs(found.per_response - exact[0]) < 2 * found.per_response_error,
                abs(found.per_token - exact[1]) < 2 * found.per_token_error,
            ]
        assert (hits >= 88).all()

    def test_by_hand(self):
        """Two prompts with one response of one and of two tokens."""
        policy = TableLM("ab", {"": [0.5, 0.5, 0.0], "a": [1.0, 0.0, 0.0]})
        base = TableLM("ab", {"": [0.25, 0.25, 0.5], "a": [0.5, 0.25, 0.25]})
        states = [
            TextState(ASKED[0], (1, 2), (0,), "stop"),
            TextState(ASKED[1], (2, 1), (1, 0), "stop"),
        ]
        ledger = Ledger()
        found = divergence(policy, base, states, ledger=ledger)
        two = math.log(2)
        assert (found.per_response, found.per_token) == pytest.approx((1.5 * two, two))
        # The deviations from the mean are log 2 / 2; per token, each has log 2 exactly.
        assert found.per_response_error == pytest.approx(two / 2)
        assert found.per_token_error == pytest.approx(0, abs=1e-12)
        assert ledger.usage.lm_calls == 4

    def test_a_policy_is_not_divergent_from_itself(self):
        found = divergence(POLICY, POLICY, sampled(POLICY, 4))
        assert found == Divergence(0.0, 0.0, 0.0, 0.0, 12)

    def test_what_the_base_cannot_write(self):
        base = TableLM("ab", {"": [1.0, 0.0, 0.0]})
        policy = TableLM("ab", {"": [0.0, 1.0, 0.0]})
        states = [TextState(ASKED[0], (1, 2), (1,), "length")]
        found = divergence(policy, base, states)
        assert found.per_response == found.per_token == float("inf")
        assert math.isnan(found.per_response_error)
        read = restored(Divergence, json.loads(json.dumps(to_json(found), allow_nan=False)))
        assert read.per_response == float("inf")
        assert math.isnan(read.per_token_error)

    def test_clusters(self):
        """Responses to one prompt are one unit: these four deviations are two."""
        deviations = np.array([1.0, 1.0, -1.0, -1.0])
        # Sums 2 and -2; sqrt(2 / 1 x 8) / 4.
        assert _standard_error(deviations, ["a", "a", "b", "b"]) == pytest.approx(1.0)
        # One prompt: its four responses are the units; sqrt(4 / 3 x 4) / 4.
        assert _standard_error(deviations, ["a"] * 4) == pytest.approx(math.sqrt(16 / 3) / 4)
        assert math.isnan(_standard_error(np.array([0.0]), ["a"]))

    def test_incomplete_responses_are_refused(self):
        for states in ([], [initial(ASKED[0], POLICY)]):
            with pytest.raises(ValueError, match="at least one complete response"):
                divergence(POLICY, OTHER, states)


class TestDiversity:
    def test_by_hand(self):
        rows = [
            replace(written("ab", "a", 0.0), response=text, prompt_id=prompt)
            for prompt, text in [
                ("1", "the cat sat"),
                ("1", "The cat  sat"),
                ("2", "the cat sat"),
                ("2", "a dog"),
                ("3", ""),
            ]
        ]
        found = diversity(rows)
        # 11 words, 5 different; 7 pairs, 3 different; 3 triples, 1 different.
        assert found.distinct == pytest.approx((5 / 11, 3 / 7, 1 / 3))
        # Three of five are also an answer to another prompt; one repeats its own prompt's.
        assert (found.duplicates, found.repeats) == pytest.approx((3 / 5, 1 / 5))
        assert restored(Diversity, json.loads(json.dumps(to_json(found)))) == found

    def test_no_words(self):
        found = diversity([replace(written("ab", "a", 0.0), response="")])
        assert np.isnan(found.distinct).all()
        with pytest.raises(ValueError, match="at least one record"):
            diversity([])


class TestValueCheck:
    ROWS = (written("ab", "aa", 1.0), written("ab", "bb", 0.0), written("c", "ba", 0.5))

    def test_by_hand(self):
        lm = NGramLM("abcde", order=2, seed=1)
        value = FixedValue(lambda text: 1.0 if text == "a" else 0.0, lm)
        # Prefixes are a, b and b: off by 0, 0 and a half.
        ledger = Ledger()
        found = check_value(value, self.ROWS, ledger=ledger)
        assert (found.error, found.num_prefixes) == (pytest.approx(math.sqrt(0.25 / 3)), 3)
        assert found.within_prompt == pytest.approx(1.0)
        # Predictions 1, 0, 0 and scores 1, 0, 0.5.
        assert found.correlation == pytest.approx(np.corrcoef([1, 0, 0], [1, 0, 0.5])[0, 1])
        assert ledger.usage.value_calls == 3

    def test_its_own_lengths_are_taken(self):
        lm = NGramLM("abcde", order=2, seed=1)
        value = FixedValue(len, lm)
        value.lengths = (1, 2, 3)
        assert check_value(value, [written("ab", "abcd", 1.0)] * 2).num_prefixes == 6


class TestGold:
    ROWS = (written("ab", "aab", 0.9), written("ab", "b", 0.1), written("c", "aa", 0.5))

    def test_by_hand(self):
        ledger = Ledger()
        found = check_gold(CountReward(), self.ROWS, ledger=ledger)
        assert found.gold == pytest.approx((2 / 3 + 0 + 1) / 3)
        assert found.proxy == pytest.approx(0.5)
        assert found.gap == pytest.approx(0.5 - found.gold)
        assert found.correlation == pytest.approx(np.corrcoef([0.9, 0.1, 0.5], [2 / 3, 0, 1])[0, 1])
        assert (found.num_responses, ledger.usage.reward_calls) == (3, 3)

    def test_where_it_does_not_apply(self):
        class Fussy(CountReward):
            def applies_to(self, prompt):
                return prompt.id == "ab"

            def score(self, prompts, responses):
                if "b" in responses:
                    raise RewardError("no b")
                return super().score(prompts, responses)

        found = check_gold(Fussy(), self.ROWS)
        assert (found.num_responses, found.proxy) == (1, 0.9)
        assert check_gold(Fussy(), self.ROWS[2:]) is None

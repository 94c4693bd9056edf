"""Guards over language models without their own: cut, redrawn, paid for, and of the stated law."""

import asyncio
import collections

import numpy as np
import pytest
from scipy import stats

from mbrl_text_env.language_models import NextTokens, NGramLM, SamplingParams
from mbrl_text_env.language_models.base import LanguageModel, SampleRequest
from mbrl_text_env.language_models.guarding import (
    REDRAWS,
    sample_requests,
    sample_requests_async,
)
from mbrl_text_env.mdp import initial
from mbrl_text_env.types import Budget, Ledger, Usage
from tests.language_models.test_guard import PLAIN, PROMPT, TOY, law, without


class Redrawn(NGramLM):
    """Without guards, and without the most probable next tokens."""

    guards = False
    next_tokens = LanguageModel.next_tokens


class Ranked(Redrawn):
    """Without guards, with the most probable next tokens, for which one is generated."""

    def next_tokens(self, states, k, *, ledgers=None):
        rows = [np.log(self.next_probabilities(s.prompt_ids, s.response_ids)) for s in states]
        for state, ledger in zip(states, ledgers or (), strict=False):
            ledger.charge(self.usage_bound(len(state.prompt_ids) + len(state.response_ids), [1]))
        orders = [np.argsort(-row, kind="stable")[:k] for row in rows]
        return [
            NextTokens(tuple(map(int, o)), tuple(map(float, row[o])))
            for o, row in zip(orders, rows, strict=True)
        ]


class OnlySample(Redrawn):
    """Somebody else's model, whose own `sample` is not gone around."""

    def sample(self, *args, **options):
        return super().sample(*args, **options)


OPTIONS = {"alphabet": "abcde", "order": 2, "seed": 3, "stop_probability": 0.1}
MODELS = {
    "redrawn": Redrawn(**OPTIONS),
    "ranked": Ranked(**OPTIONS),
    "only sample": OnlySample(**OPTIONS),
}


@pytest.fixture(params=MODELS)
def lm(request):
    return MODELS[request.param]


def sampled(lm, guard, count=1, tokens=1, params=PLAIN, seed=0, ledger=None):
    request = SampleRequest(initial(PROMPT, lm), count, tokens, seed, 0, params, guard)
    [row] = sample_requests(lm, [request], ledgers=None if ledger is None else [ledger])
    return row


@pytest.mark.parametrize(
    "params", [PLAIN, SamplingParams(0.7, 0.9), SamplingParams(0), SamplingParams(stop=("ab",))]
)
def test_where_nothing_is_refused_tokens_and_charges_are_those_of_plain_sampling(lm, params):
    for seed in range(3):
        plain, guarded = Ledger(), Ledger()
        expected = sampled(lm, None, 5, 12, params, seed, plain)
        assert sampled(lm, without(""), 5, 12, params, seed, guarded) == expected
        assert vars(guarded.usage) | {"seconds": 0} == vars(plain.usage) | {"seconds": 0}


def test_no_refused_text_is_written_and_what_is_written_is_judged_right(lm):
    row = sampled(lm, without("ae"), 64, 12)
    state = initial(PROMPT, lm)
    judged = lm.logprobs([state] * len(row), row)
    whole = 0
    for chunk, logs in zip(row, judged, strict=True):
        # A chunk that had to be given up ends with what was refused.
        assert not set("ae") & set(lm.decode(chunk.token_ids[:-1]))
        is_dead = bool(set("ae") & set(lm.decode(chunk.token_ids)))
        assert is_dead or len(chunk) == 12 or chunk.finish_reason == "stop"
        whole += not is_dead
        np.testing.assert_allclose(chunk.logprobs, logs)
    assert whole > len(row) / 2


def test_the_same_call_gives_the_same_chunks_in_a_thread_and_in_an_event_loop(lm):
    guard = without("ae")
    row = sampled(lm, guard, 8, 12)
    assert sampled(lm, guard, 8, 12) == row
    request = SampleRequest(initial(PROMPT, lm), 8, 12, 0, 0, PLAIN, guard)
    assert asyncio.run(sample_requests_async(lm, [request], ledgers=[Ledger()])) == [row]


def test_a_chunk_depends_on_nothing_around_it(lm):
    state, guard = initial(PROMPT, lm), without("ae")
    [row] = sample_requests(lm, [SampleRequest(state, 6, 12, 0, 0, PLAIN, guard)])
    others = [SampleRequest(state, 1, 12, 0, k, PLAIN, guard) for k in range(6)]
    plain = SampleRequest(state, 2, 12, 5)
    rows = sample_requests(lm, [*others, plain])
    assert [chunk for [chunk] in rows[:-1]] == row
    assert rows[-1] == sample_requests(lm, [plain])[0]


def frequencies(row, size):
    return np.bincount([chunk.token_ids[0] for chunk in row], minlength=size)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("options", [{}, {"candidates": 4}, {"floor": -1.9}])
def test_the_law_with_the_most_probable_tokens_is_that_of_a_model_with_guards(options, temperature):
    lm, guard = MODELS["ranked"], without("be", **options)
    logs = np.log(lm.next_probabilities(lm.encode_prompt(PROMPT), ()))
    well = np.array([not set("be") & set(lm.decode([token])) for token in range(len(logs))])
    expected = law(logs, well, guard, temperature) * 10_000
    row = sampled(lm, guard, 10_000, 1, SamplingParams(temperature))
    counts = frequencies(row, len(logs))
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3


@pytest.mark.parametrize("letters", ["be", "abcd"])
def test_the_law_of_what_is_drawn_again(letters):
    lm, guard = MODELS["redrawn"], without(letters)
    plain = lm.next_probabilities(lm.encode_prompt(PROMPT), ())
    well = np.array([not set(letters) & set(lm.decode([token])) for token in range(len(plain))])
    # A dead chunk ends with the token first drawn.
    dead = plain[~well].sum() ** REDRAWS
    expected = np.where(well, plain / plain[well].sum() * (1 - dead * plain[~well].sum()), 0)
    expected += np.where(well, 0, plain * dead)
    counts = frequencies(sampled(lm, guard, 10_000), len(plain))
    rare = expected * 10_000 < 5
    observed = [*counts[~rare], counts[rare].sum()]
    wanted = [*expected[~rare] * 10_000, expected[rare].sum() * 10_000]
    seen = [i for i, each in enumerate(wanted) if each > 0]
    pairs = np.array(observed)[seen], np.array(wanted)[seen]
    assert stats.chisquare(*pairs).pvalue > 1e-3


def test_what_is_thrown_away_is_charged(lm):
    """Every token that the model drew, counted at the model."""
    drawn = collections.Counter()

    class Counting(Redrawn):
        def sample_requests(self, requests, *, ledgers=None):
            rows = super().sample_requests(requests, ledgers=ledgers)
            drawn["tokens"] += sum(len(chunk) for row in rows for chunk in row)
            drawn["calls"] += len(rows)
            return rows

    ledger = Ledger()
    row = sampled(Counting(**OPTIONS), without("ae"), 8, 12, ledger=ledger)
    assert ledger.usage.generated_tokens == drawn["tokens"] > sum(map(len, row))
    assert ledger.usage.lm_calls == drawn["calls"]


def test_where_nothing_may_follow_the_chunk_ends_with_what_was_drawn_first(lm):
    plain = sampled(lm, None, 4, 12)
    refused = sampled(lm, without("abcde", lambda text: False), 4, 12)
    for chunk, expected in zip(refused, plain, strict=True):
        assert chunk.token_ids == expected.token_ids[:1]
    # At temperature 0 drawing again draws the same.
    ledger, greedy = Ledger(), SamplingParams(0)
    [chunk] = sampled(MODELS["redrawn"], without("abcde"), 1, 4, greedy, ledger=ledger)
    assert (len(chunk), ledger.usage.lm_calls) == (1, 1)


def test_a_response_ends_only_where_it_may(lm):
    row = sampled(lm, without("", lambda text: len(text) >= 6), 64, 40)
    ended = [lm.decode(c.token_ids) for c in row if c.finish_reason == "stop"]
    assert len(ended) > 32
    assert min(map(len, ended)) >= 6


def test_a_stop_text_counts_from_before_a_cut():
    lm, params = MODELS["redrawn"], SamplingParams(stop=("cd",))
    for seed in range(30):
        for chunk in sampled(lm, without("a"), 4, 20, params, seed):
            text = lm.decode(chunk.token_ids)
            assert text.find("cd") in (-1, len(text) - 2)


@pytest.mark.parametrize("cap", range(16, 60, 4))
@pytest.mark.parametrize("kept", [0, 5])
def test_no_cap_is_passed_and_what_has_to_be_kept_is_kept(lm, cap, kept):
    for budget in (Budget(tokens=cap), Budget(flops=2 * cap)):
        ledger = Ledger(budget)
        keep = Usage(generated_tokens=kept, lm_flops=2.0 * kept)
        row = sampled(lm, without("ae", kept=keep), 1, 11, ledger=ledger)
        assert len(row) == 1
        # Where nothing was drawn again, what is there was promised.
        assert ledger.affords(keep) or ledger.usage.lm_calls == 1


def test_a_chunk_stays_as_it_was_drawn_where_nothing_else_can_be_paid(lm):
    [plain] = sampled(lm, None, 1, 11)
    ledger = Ledger(Budget(tokens=11))
    guard = without("abcde", kept=Usage(generated_tokens=11))
    assert sampled(lm, guard, 1, 11, ledger=ledger) == [plain]


def test_a_model_with_guards_of_its_own_watches_them():
    request = SampleRequest(initial(PROMPT, TOY), 8, 12, 0, 0, PLAIN, without("ae"))
    assert sample_requests(TOY, [request]) == TOY.sample_requests([request])

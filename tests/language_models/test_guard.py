"""Guarded decoding: exact where nothing is refused, of the stated law where something is."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mbrl_text_env.language_models import NGramLM, SamplingParams, embedded_tokenizer
from mbrl_text_env.language_models.base import Guard, SampleRequest
from mbrl_text_env.language_models.guarding import GrowingText
from mbrl_text_env.mdp import initial
from mbrl_text_env.types import Prompt, TextState

PROMPT = Prompt.from_text("ab", chat=False)
TOY = NGramLM("abcde", order=2, seed=3, stop_probability=0.1)


def without(letters, may_end=lambda text: True, **options):
    def allows(states, texts, ended):
        return [
            not set(letters) & set(text) and (not ends or may_end(text))
            for text, ends in zip(texts, ended, strict=True)
        ]

    return Guard(allows, **{"floor": -50.0, **options})


PLAIN = SamplingParams()


def sampled(lm, guard, count=1, tokens=1, params=PLAIN, seed=0, states=None):
    states = states or [initial(PROMPT, lm)]
    requests = [SampleRequest(s, count, tokens, seed, 0, params, guard) for s in states]
    return lm.sample_requests(requests)


@pytest.fixture(params=["toy", "llama", "gpt2", "lfm2"])
def lm(request, tiny):
    return TOY if request.param == "toy" else tiny(request.param)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.7, 0.9), SamplingParams(0)])
def test_where_nothing_is_refused_tokens_are_those_of_plain_sampling(lm, params):
    for seed in range(3):
        plain = sampled(lm, None, 5, 12, params, seed)
        assert sampled(lm, without(""), 5, 12, params, seed) == plain


def test_no_refused_text_is_written_and_what_is_written_is_judged_right(lm):
    letters = "ae"
    [chunks] = sampled(lm, without(letters), 16, 12)
    state = initial(PROMPT, lm)
    for chunk in chunks:
        assert not set(letters) & set(lm.decode(chunk.token_ids))
    judged = lm.logprobs([state] * len(chunks), chunks)
    for chunk, logs in zip(chunks, judged, strict=True):
        np.testing.assert_allclose(chunk.logprobs, logs, atol=1e-4)


def law(logs, well, guard, temperature):
    """The stated law of one token, from the model's own log-probabilities."""
    shaped = np.exp(logs / temperature)
    shaped /= shaped.sum()
    rows = np.argsort(-logs, kind="stable")[: guard.candidates]
    others = np.zeros_like(shaped)
    others[rows] = np.where((logs[rows] >= guard.floor) & well[rows], shaped[rows], 0.0)
    return np.where(well, shaped, 0.0) + shaped[~well].sum() * others / others.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("options", [{}, {"candidates": 4}, {"floor": -1.9}])
def test_the_law_of_a_token_is_the_stated_one(options, temperature):
    guard = without("be", **options)
    logs = np.log(TOY.next_probabilities(TOY.encode_prompt(PROMPT), ()))
    well = np.array([not set("be") & set(TOY.decode([token])) for token in range(len(logs))])
    expected = law(logs, well, guard, temperature) * 20_000
    [chunks] = sampled(TOY, guard, 20_000, params=SamplingParams(temperature))
    counts = np.bincount([c.token_ids[0] for c in chunks], minlength=len(logs))
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3


def test_the_law_under_the_engine(tiny):
    lm = tiny("llama")
    state = initial(PROMPT, lm)
    [top] = lm.next_tokens([state], lm.vocab_size)
    logs = np.full(lm.vocab_size, -np.inf)
    logs[list(top.token_ids)] = top.logprobs
    letters = "aeiou"
    well = np.array([not set(letters) & set(lm.decode([t])) for t in range(lm.vocab_size)])
    guard = without(letters, candidates=lm.vocab_size)
    expected = law(logs, well, guard, 1.0) * 20_000
    [chunks] = sampled(lm, guard, 20_000)
    counts = np.bincount([c.token_ids[0] for c in chunks], minlength=lm.vocab_size)
    assert counts[~well].sum() == 0
    # Rare tokens are one bin, as the test asks for.
    rare = expected < 10
    observed = [*counts[~rare], counts[rare].sum()]
    assert stats.chisquare(observed, [*expected[~rare], expected[rare].sum()]).pvalue > 1e-3


def test_a_response_ends_only_where_it_may(lm):
    [chunks] = sampled(lm, without("", lambda text: len(text) >= 4), 32, 64)
    ended = [lm.decode(c.token_ids) for c in chunks if c.finish_reason == "stop"]
    assert ended
    assert all(len(text) >= 4 for text in ended)


def test_a_dead_end_is_the_last_token_of_its_chunk(lm):
    def allows(states, texts, ended):
        return [len(text) < 5 and not ends for text, ends in zip(texts, ended, strict=True)]

    [chunks] = sampled(lm, Guard(allows, floor=-50.0), 8, 32)
    for chunk in chunks:
        # A character of which bytes are missing is not there before its fourth token.
        assert len(lm.decode(chunk.token_ids[:-1])) < 5 + 3
        assert len(chunk) < 32


def test_the_batch_around_it_changes_nothing(lm):
    states = [initial(Prompt.from_text(text, chat=False), lm) for text in ("ab", "ba", "bb")]
    others = sampled(lm, without("c"), 3, 10, states=states)
    for state, row in zip(states, others, strict=True):
        [alone] = sampled(lm, without("c"), 3, 10, states=[state])
        assert [c.token_ids for c in alone] == [c.token_ids for c in row]


def test_a_model_without_guards_says_so():
    class Plain(NGramLM):
        guards = False

    lm = Plain("abc", order=1, seed=0)
    with pytest.raises(ValueError, match="expected a language model with `guards`"):
        sampled(lm, without("a"))


@settings(max_examples=60)
@given(text=st.text(min_size=1, max_size=30).filter(str.strip), cut=st.integers(0, 60))
def test_growing_text_is_the_decoded_text_of_whole_characters(text, cut):
    tokenizer = embedded_tokenizer()
    ids = tokenizer.encode_prompt(Prompt.from_text(text, "any", chat=False))[:cut]
    growing = GrowingText(tokenizer, ids[: len(ids) // 2])
    for place in range(len(ids) // 2, len(ids)):
        whole = tokenizer.decode(ids[: place + 1])
        assert growing.with_token(ids[place]).rstrip("\ufffd") == whole.rstrip("\ufffd")
        growing.append(ids[place])


def test_a_guard_goes_on_from_a_prefix(tiny):
    lm = tiny("llama")
    start = initial(PROMPT, lm)
    [[chunk]] = sampled(lm, None, 1, 6)
    state = dataclasses.replace(start, response_ids=chunk.token_ids)
    assert isinstance(state, TextState)
    seen = []

    def allows(states, texts, ended):
        seen.extend(texts)
        return [True] * len(texts)

    sampled(lm, Guard(allows), 1, 4, states=[state])
    assert all(text.startswith(lm.decode(chunk.token_ids)) for text in seen)


def words(lm, guard, count, length, seed):
    [chunks] = sampled(lm, guard, count, length, seed=seed)
    return [lm.decode(chunk.token_ids) for chunk in chunks], [c.log_weight for c in chunks]


@pytest.mark.parametrize("candidates", [1, 64])
def test_weighted_chunks_estimate_sums_over_what_is_allowed_without_bias(candidates):
    """Sums of p(chunk) over the allowed ones that begin with each letter, and over all of them."""
    guard = without("be", lambda text: len(text) != 1, weighted=True, candidates=candidates)
    exact = dict.fromkeys(["", "a", "c", "d"], 0.0)
    for ids, probability in TOY.responses(initial(PROMPT, TOY), 3):
        text, ended = TOY.decode(ids), ids[-1] == 0
        if not set("be") & set(text) and not (ended and len(text) == 1):
            exact[text[:1]] += probability
    texts, logs = words(TOY, guard, 20_000, 3, seed=1)
    weights = np.exp(logs)
    for letter, probability in exact.items():
        each = weights * [text[:1] == letter for text in texts]
        assert abs(each.mean() - probability) < 4 * each.std() / np.sqrt(20_000)
    assert abs(weights.mean() - sum(exact.values())) < 4 * weights.std() / np.sqrt(20_000)


def test_resampled_by_weight_they_have_the_law_of_plain_samples_that_are_allowed():
    guard = without("be", weighted=True)
    texts, logs = words(TOY, guard, 60_000, 2, seed=2)
    rng, kept = np.random.default_rng(0), []
    for start in range(0, 60_000, 30):  # one of thirty
        weights = np.exp(logs[start : start + 30])
        kept.append(texts[start + rng.choice(30, p=weights / weights.sum())])
    exact = {}
    for ids, probability in TOY.responses(initial(PROMPT, TOY), 2):
        text = TOY.decode(ids)
        if not set("be") & set(text):
            exact[text] = exact.get(text, 0.0) + probability
    expected = np.array(list(exact.values())) / sum(exact.values()) * len(kept)
    counts = np.array([kept.count(text) for text in exact])
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_the_engine_weighs_as_the_toys_do(tiny):
    lm = tiny("llama")
    state = initial(PROMPT, lm)
    [top] = lm.next_tokens([state], lm.vocab_size)
    well = np.array([not set("aeiou") & set(lm.decode([t])) for t in top.token_ids])
    allowed = np.exp(top.logprobs)[well].sum()
    _, logs = words(lm, without("aeiou", weighted=True), 4_000, 1, seed=0)
    weights = np.exp(logs)
    assert abs(weights.mean() - allowed) < 4 * weights.std() / np.sqrt(4_000)


def test_a_dead_end_does_not_check_the_whole_vocabulary(smollm2):
    """49,152 tokens, none of them allowed: checking all takes half a minute with a real bound."""
    checked = []

    def allows(states, texts, ended):
        checked.extend(texts)
        return [False] * len(texts)

    sampled(smollm2, Guard(allows, weighted=True), 20, 1)
    assert 20 * 64 <= len(checked) <= 20 * 1000


@pytest.mark.parametrize("params", [PLAIN, SamplingParams(0.7, 0.9), SamplingParams(0)])
def test_a_weighted_chunk_is_plain_and_weighs_1_where_nothing_is_refused(lm, params):
    plain = sampled(lm, None, 5, 1, params, 0)
    assert sampled(lm, without("", weighted=True), 5, 1, params, 0) == plain


def test_a_weighted_chunk_that_no_way_leads_on_from_weighs_nothing(lm):
    nothing = Guard(lambda states, texts, ended: [False] * len(texts), weighted=True)
    [[chunk]] = sampled(lm, nothing)
    assert chunk.log_weight == -np.inf

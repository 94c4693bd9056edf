"""The toys against numbers worked out by hand, their own enumeration, and exact frequencies."""

import copy
import itertools
import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mbrl_text_env.language_models import (
    CharTokenizer,
    NGramLM,
    PromptTooLongError,
    SamplingParams,
    TableLM,
)
from mbrl_text_env.language_models.base import stream
from mbrl_text_env.language_models.toy import STOP, ExactLM, draw_token, shaped
from mbrl_text_env.types import Budget, BudgetExceededError, Chunk, Ledger, Prompt, TextState, Usage

GREEDY = SamplingParams(temperature=0)


def state(
    prompt: str = "ab", response_ids: tuple[int, ...] = (), model: CharTokenizer | None = None
) -> TextState:
    tokenizer = model if model is not None else CharTokenizer("abc")
    content = Prompt(prompt, prompt)
    return TextState(content, tokenizer.encode_prompt(content), response_ids)


def table_lm(**options) -> TableLM:
    """'b' after 'a' or nothing after it; everything else uniform over stop, a, b."""
    return TableLM(
        "ab",
        {"": [0.1, 0.6, 0.3], "a": [0.5, 0.0, 0.5], "b": [0.25, 0.75, 0.0], "ab": [1, 0, 0]},
        **options,
    )


@st.composite
def distributions(draw) -> np.ndarray:
    """Probabilities with zeros and ties among them."""
    weights = draw(
        st.lists(st.integers(0, 20) | st.floats(1e-6, 1.0), min_size=1, max_size=12).filter(any)
    )
    return np.asarray(weights, dtype=np.float64) / math.fsum(weights)


class TestCharTokenizer:
    @given(st.text("abc xyz", min_size=1, max_size=50).filter(str.strip))
    def test_round_trip(self, text):
        tokenizer = CharTokenizer("zyx cba")
        assert tokenizer.decode(tokenizer.encode_prompt(Prompt("p", text))) == text

    def test_ids_follow_the_alphabet_and_zero_is_stop(self):
        tokenizer = CharTokenizer("cab")
        assert tokenizer.encode_prompt(Prompt("p", "abc")) == (2, 3, 1)
        assert tokenizer.vocab_size == 4
        assert tokenizer.stop_token_ids == {0}
        assert tokenizer.decode([2, 3, 0]) == "ab"
        assert tokenizer.decode([]) == ""

    def test_other_characters_are_left_out(self):
        assert CharTokenizer("ab").encode_prompt(Prompt("p", "A b, a!")) == (2, 1)

    def test_a_chat_is_read_as_its_text(self):
        assert CharTokenizer("ab").encode_prompt(Prompt.from_text("ba")) == (2, 1)

    @pytest.mark.parametrize("alphabet", ["", "aba"])
    def test_alphabet_must_be_distinct_characters(self, alphabet):
        with pytest.raises(ValueError, match="alphabet of distinct characters"):
            CharTokenizer(alphabet)

    def test_a_prompt_must_leave_room(self):
        tokenizer = CharTokenizer("ab", context_length=3)
        assert tokenizer.encode_prompt(Prompt("p", "ab")) == (1, 2)
        with pytest.raises(PromptTooLongError, match=r"'p' has 3 tokens, but .* context holds 3"):
            tokenizer.encode_prompt(Prompt("p", "aba"))


class TestTableLM:
    def test_hand_computed_responses(self):
        model = table_lm()
        found = {model.decode(ids): p for ids, p in model.responses(state(), 2)}
        assert found == pytest.approx(
            {"": 0.1, "a": 0.6 * 0.5, "ab": 0.6 * 0.5, "b": 0.3 * 0.25, "ba": 0.3 * 0.75}
        )

    def test_responses_of_a_prefix_and_of_an_ended_state(self):
        model = table_lm()
        prefix = state(response_ids=(1,))
        assert dict(model.responses(prefix, 3)) == pytest.approx({(1, 0): 0.5, (1, 2, 0): 0.5})
        ended = TextState(prefix.prompt, prefix.prompt_ids, (1, 0), "stop")
        assert list(model.responses(ended, 3)) == [((1, 0), 1.0)]
        assert list(model.responses(prefix, 1)) == [((1,), 1.0)]

    def test_prefixes_outside_the_table_are_uniform(self):
        np.testing.assert_allclose(table_lm().next_probabilities((), (2, 2)), [1 / 3] * 3)

    def test_logprobs_by_hand(self):
        model = table_lm()
        chunks = [Chunk((1, 2, 0)), Chunk((2,)), Chunk((2, 2))]
        found = model.logprobs([state(), state(), state()], chunks)
        assert found[0] == pytest.approx((math.log(0.6), math.log(0.5), 0.0))
        assert found[1] == pytest.approx((math.log(0.3),))
        assert found[2] == (pytest.approx(math.log(0.3)), -math.inf)

    def test_features_are_the_next_distribution(self):
        model = table_lm()
        features = model.features([state(), state(response_ids=(1,))])
        assert features.dtype == np.float32
        assert model.feature_size == 3
        np.testing.assert_array_equal(features, np.float32([[0.1, 0.6, 0.3], [0.5, 0, 0.5]]))
        assert model.features([]).shape == (0, 3)

    @pytest.mark.parametrize(
        "row",
        [
            [0.5, 0.5],
            [0.25, 0.25, 0.25, 0.25],
            [0.5, 0.6, -0.1],
            [0.5, 0.5, 0.1],
            [0.5, 0.5, float("nan")],
            [float("nan")] * 3,
        ],
    )
    def test_rows_that_are_no_distribution(self, row):
        with pytest.raises(ValueError, match=r"Row 'a': expected 3 probabilities"):
            TableLM("ab", {"": [1, 0, 0], "a": row})

    def test_prefixes_outside_the_alphabet(self):
        with pytest.raises(ValueError, match=r"Row 'ax': \['x'\] are not in the alphabet 'ab'"):
            TableLM("ab", {"ax": [1, 0, 0]})

    def test_rows_are_copied(self):
        row = np.array([0.0, 1.0, 0.0])
        model = TableLM("ab", {"": row})
        row[:] = [1.0, 0.0, 0.0]
        assert model.next_probabilities((), ()).tolist() == [0.0, 1.0, 0.0]


class TestNGramLM:
    @pytest.mark.parametrize("order", [1, 2, 3])
    @pytest.mark.parametrize("stop_probability", [0.0, 0.3])
    def test_enumeration_sums_to_one(self, order, stop_probability):
        model = NGramLM("abc", order, seed=5, stop_probability=stop_probability)
        responses = dict(model.responses(state(), 4))
        assert math.fsum(responses.values()) == pytest.approx(1.0, abs=1e-12)
        assert len(responses) == (81 if stop_probability == 0 else 121)

    def test_depends_on_the_last_tokens_of_prompt_and_response(self):
        model = NGramLM("abc", order=3, seed=1)
        row = model.next_probabilities((1, 2), (3,))
        np.testing.assert_array_equal(row, model.next_probabilities((1, 1, 2, 3), ()))
        np.testing.assert_array_equal(row, model.next_probabilities((3, 3), (2, 3)))
        assert not np.array_equal(row, model.next_probabilities((1, 1), (3,)))

    def test_order_one_has_no_memory(self):
        model = NGramLM("abc", order=1, seed=1)
        row = model.next_probabilities((1,), (2, 3))
        np.testing.assert_array_equal(row, model.next_probabilities((), ()))

    def test_stop_probability_is_exact(self):
        model = NGramLM("abc", order=2, seed=3, stop_probability=0.25)
        for last in (1, 2, 3):
            assert model.next_probabilities((last,), ())[STOP] == pytest.approx(0.25)

    def test_small_concentration_is_peaked(self):
        flat = NGramLM("abcdef", seed=0, concentration=100.0)
        peaked = NGramLM("abcdef", seed=0, concentration=0.05)
        assert flat.next_probabilities((1,), ()).max() < peaked.next_probabilities((1,), ()).max()

    def test_seed_decides_and_repeats(self):
        rows = [NGramLM("abc", seed=seed).next_probabilities((1,), ()) for seed in (0, 0, 1)]
        np.testing.assert_array_equal(rows[0], rows[1])
        assert not np.array_equal(rows[0], rows[2])

    @pytest.mark.parametrize(
        "options",
        [
            {"order": 0},
            {"concentration": 0.0},
            {"stop_probability": 1.0},
            {"stop_probability": -0.1},
            {"stop_probability": float("nan")},
        ],
    )
    def test_numbers_outside_their_range(self, options):
        with pytest.raises(ValueError, match="Expected order >= 1"):
            NGramLM("abc", **options)


class TestShaped:
    def test_by_hand(self):
        own = np.array([0.4, 0.1, 0.3, 0.2])
        cases = [
            (SamplingParams(), [0.4, 0.1, 0.3, 0.2]),
            (SamplingParams(top_k=2), [4 / 7, 0, 3 / 7, 0]),
            (SamplingParams(top_k=9), [0.4, 0.1, 0.3, 0.2]),
            (SamplingParams(top_p=0.4), [1, 0, 0, 0]),
            (SamplingParams(top_p=0.41), [4 / 7, 0, 3 / 7, 0]),
            (SamplingParams(top_p=0.8), [4 / 9, 0, 3 / 9, 2 / 9]),
            (SamplingParams(temperature=0.5), [16 / 30, 1 / 30, 9 / 30, 4 / 30]),
            # Temperature first: the nucleus is that of 16, 9, 4, 1 over 30.
            (SamplingParams(temperature=0.5, top_p=0.8), [16 / 25, 0, 9 / 25, 0]),
            # Then top-k, whose two tokens have 16/25 and 9/25, and of these top-p.
            (SamplingParams(temperature=0.5, top_k=2, top_p=0.6), [1, 0, 0, 0]),
        ]
        for params, expected in cases:
            np.testing.assert_allclose(shaped(own, params), expected, atol=1e-12, err_msg=params)

    @given(distributions(), st.floats(0.05, 5.0), st.floats(0.01, 1.0), st.integers(0, 14))
    def test_is_a_distribution_over_the_most_probable(self, own, temperature, top_p, top_k):
        found = shaped(own, SamplingParams(temperature, top_p, top_k))
        assert found.sum() == pytest.approx(1.0)
        assert found.min() >= 0
        assert np.all(found[own == 0] == 0)
        kept, dropped = own[found > 0], own[found == 0]
        assert kept.size >= 1
        assert kept.size <= (top_k or len(own))
        # Powers of nearby probabilities may round to the same number; what is kept is no smaller.
        assert not dropped.size or kept.min() >= dropped.max() * (1 - 1e-12)

    @pytest.mark.parametrize("temperature", [1e-4, 1e-10, 1e-300, 5e-324])
    def test_small_temperatures_do_not_overflow(self, temperature):
        own = np.array([0.0, 0.3, 0.5, 0.2])
        with np.errstate(over="raise", invalid="raise"):
            found = shaped(own, SamplingParams(temperature=temperature))
        assert found.tolist() == [0.0, 0.0, 1.0, 0.0]


class TestDrawToken:
    @given(distributions(), st.floats(0, 1, exclude_max=True))
    def test_is_the_inverse_of_the_cumulative_distribution(self, own, uniform):
        token = draw_token(own, SamplingParams(), uniform)
        cumulative = np.cumsum(own / own.sum())
        assert own[token] > 0
        below = cumulative[token - 1] if token else 0.0
        assert below - 1e-12 <= uniform <= cumulative[token] + 1e-12

    @given(distributions(), st.floats(0, 1, exclude_max=True))
    def test_tokens_grow_with_the_uniform_number(self, own, uniform):
        params = SamplingParams(temperature=0.7, top_p=0.9)
        assert draw_token(own, params, uniform / 2) <= draw_token(own, params, uniform)

    @given(distributions())
    def test_the_ends_of_the_interval_meet_no_impossible_token(self, own):
        possible = np.flatnonzero(own)
        assert draw_token(own, SamplingParams(), 0.0) == possible[0]
        assert draw_token(own, SamplingParams(), float(np.nextafter(1, 0))) == possible[-1]

    @given(distributions(), st.floats(0, 1, exclude_max=True))
    def test_temperature_zero_is_the_first_most_probable(self, own, uniform):
        assert draw_token(own, GREEDY, uniform) == own.tolist().index(own.max())


FREQUENCY_CASES = [
    SamplingParams(temperature, top_p, top_k)
    for temperature in (0.5, 1.0, 1.5)
    for top_p, top_k in ((1.0, 0), (0.8, 0), (1.0, 3), (0.7, 4))
]


class TestSample:
    @pytest.mark.parametrize("params", FREQUENCY_CASES, ids=str)
    def test_frequencies_of_the_next_token(self, params):
        model = NGramLM("abcdef", seed=2, stop_probability=0.15)
        start = state("fed", model=model)
        chunks = model.sample([start], 2000, 1, seeds=[11], params=params)[0]
        observed = np.bincount([chunk.token_ids[0] for chunk in chunks], minlength=7)
        expected = 2000 * shaped(model.next_probabilities(start.prompt_ids, ()), params)
        assert np.all(observed[expected == 0] == 0)
        kept = expected > 0
        assert kept.sum() >= 2
        assert stats.chisquare(observed[kept], expected[kept]).pvalue > 0.001

    def test_frequencies_of_whole_responses(self):
        model = NGramLM("ab", order=2, seed=1, stop_probability=0.2)
        start = state(model=model)
        exact = dict(model.responses(start, 3))
        chunks = model.sample([start], 4000, 3, seeds=[3])[0]
        observed = Counter(chunk.token_ids for chunk in chunks)
        assert set(observed) <= set(exact)
        counts = [[observed[ids], 4000 * probability] for ids, probability in exact.items()]
        assert stats.chisquare(*zip(*counts, strict=True)).pvalue > 0.001

    def test_samples_of_one_state_are_uncorrelated(self):
        model = TableLM("ab", {"": [0.5, 0.25, 0.25]})
        chunks = model.sample([state()], 4000, 1, seeds=[0])[0]
        stops = [chunk.token_ids == (STOP,) for chunk in chunks]
        pairs = Counter(itertools.pairwise(stops))
        assert stats.chisquare(list(pairs.values()), [3999 / 4] * 4).pvalue > 0.001

    @given(st.integers(0, 2**63 - 1), st.integers(0, 50))
    def test_draws_come_from_the_samples_own_stream(self, seed, k):
        model = NGramLM("abc", order=3, seed=7)
        start = state("cab")
        uniforms = stream(seed, start, k).random(6)
        expected: tuple[int, ...] = ()
        for uniform in uniforms:
            own = model.next_probabilities(start.prompt_ids, expected)
            token = next(t for t, c in enumerate(np.cumsum(own)) if c > uniform)
            expected += (token,)
            if token == STOP:
                break
        [[chunk]] = model.sample([start], 1, 6, seeds=[seed], first_sample=k)
        assert chunk.token_ids == expected

    @given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 12))
    def test_fewer_tokens_are_a_prefix_of_more(self, seed, short, long):
        short, long = sorted((short, long))
        model = NGramLM("abc", seed=4)
        [[first]] = model.sample([state()], 1, short, seeds=[seed])
        [[second]] = model.sample([state()], 1, long, seeds=[seed])
        assert second.token_ids[:short] == first.token_ids
        assert second.logprobs[:short] == first.logprobs
        assert first.finish_reason in (None, second.finish_reason)

    @given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 5))
    def test_later_samples_continue_earlier_ones(self, seed, first, second):
        model = NGramLM("abc", seed=4)
        start = [state()]
        whole = model.sample(start, first + second, 5, seeds=[seed])[0]
        parts = model.sample(start, first, 5, seeds=[seed])[0]
        parts += model.sample(start, second, 5, seeds=[seed], first_sample=first)[0]
        assert whole == parts

    @given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=4), st.integers(0, 9))))
    def test_a_batch_is_its_states_one_by_one(self, asked):
        model = NGramLM("abc", order=3, seed=4)
        states = [state(text) for text, _ in asked]
        seeds = [seed for _, seed in asked]
        batch = model.sample(states, 3, 6, seeds=seeds)
        alone = [model.sample([states[i]], 3, 6, seeds=[seeds[i]])[0] for i in range(len(asked))]
        assert batch == alone

    @given(st.integers(0, 2**32), st.floats(0.3, 2.0), st.integers(1, 20))
    def test_stop_is_last_and_log_probabilities_are_the_models_own(self, seed, temperature, limit):
        model = NGramLM("abc", seed=9, stop_probability=0.3)
        params = SamplingParams(temperature, top_p=0.95)
        chunks = model.sample([state()], 4, limit, seeds=[seed], params=params)[0]
        for chunk in chunks:
            ended = chunk.token_ids[-1] == STOP
            assert STOP not in chunk.token_ids[:-1]
            assert chunk.finish_reason == ("stop" if ended else None)
            assert len(chunk) == len(chunk.logprobs)
            assert ended or len(chunk) == limit
        assert [c.logprobs for c in chunks] == model.logprobs([state()] * 4, chunks)

    def test_summed_log_probability_is_that_of_the_enumeration(self):
        model = NGramLM("ab", order=3, seed=0, stop_probability=0.2)
        exact = dict(model.responses(state(), 4))
        for chunk in model.sample([state()], 50, 4, seeds=[0])[0]:
            assert chunk.logprob == pytest.approx(math.log(exact[chunk.token_ids]))

    def test_greedy(self):
        model = table_lm()
        [[chunk]] = model.sample([state()], 1, 5, seeds=[0], params=GREEDY)
        # 'a' (0.6), then stop and 'b' tie at 0.5: the first wins.
        assert chunk.token_ids == (1, 0)

    def test_context_limit(self):
        model = NGramLM("ab", stop_probability=0.0, context_length=5)
        start = state("ab", (1,), model)
        [[chunk]] = model.sample([start], 1, 10, seeds=[0])
        assert len(chunk) == 2
        assert chunk.finish_reason == "length"
        [[partial]] = model.sample([start], 1, 1, seeds=[0])
        assert partial.finish_reason is None
        [[exact]] = model.sample([start], 1, 2, seeds=[0])
        assert exact == chunk

    def test_stop_in_the_last_place_is_a_stop(self):
        model = TableLM("ab", {"": [1, 0, 0]}, context_length=3)
        [[chunk]] = model.sample([state("ab", model=model)], 1, 9, seeds=[0])
        assert chunk == Chunk((STOP,), (0.0,), "stop")

    @pytest.mark.parametrize("response_ids", [(1, 1), (1, 1, 1), (1,) * 9])
    def test_no_room_at_all(self, response_ids):
        model = NGramLM("ab", context_length=4)
        full = state("ab", response_ids, model)
        with pytest.raises(PromptTooLongError, match="fill the model's context of 4"):
            model.sample([full], 1, 1, seeds=[0])

    def test_arguments(self):
        model = NGramLM("abc")
        ended = TextState(Prompt("p", "a"), (1,), (0,), "stop")
        for states, n, limit, seeds in [
            ([state()], 0, 1, [0]),
            ([state()], 1, 0, [0]),
            ([state()], 1, 1, [0, 1]),
            ([ended], 1, 1, [0]),
        ]:
            with pytest.raises(ValueError, match=r"at least 1|one seed per state|has ended"):
                model.sample(states, n, limit, seeds=seeds)
        with pytest.raises(ValueError, match="has ended"):
            model.logprobs([ended], [Chunk((1,))])
        with pytest.raises(ValueError, match="one chunk per state"):
            model.logprobs([state()], [])
        with pytest.raises(ValueError, match="shorter"):
            model.sample([state()] * 2, 1, 1, seeds=[0, 0], ledgers=[Ledger()])

    def test_empty_batches(self):
        model = NGramLM("abc")
        assert model.sample([], 2, 3, seeds=[], ledgers=[]) == []
        assert model.logprobs([], []) == []


class TestLedger:
    def test_sampling_is_charged_to_each_state(self):
        model = NGramLM("abc", stop_probability=0.3, flops_per_token=2.5)
        states = [state("ab"), state("abcab", (1, 2))]
        ledgers = [Ledger(), Ledger()]
        chunks = model.sample(states, 3, 6, seeds=[0, 1], ledgers=ledgers)
        for ledger, row, prefix in zip(ledgers, chunks, (2, 7), strict=True):
            lengths = [len(chunk) for chunk in row]
            usage = ledger.usage
            assert usage.prompt_tokens == prefix
            assert usage.generated_tokens == sum(lengths)
            assert usage.lm_calls == 1
            assert usage.lm_flops == 2.5 * (prefix + sum(lengths))
            assert usage.seconds > 0
            expected = model.usage_bound(prefix, lengths)
            assert expected == Usage(
                prompt_tokens=prefix,
                generated_tokens=sum(lengths),
                lm_calls=1,
                lm_flops=2.5 * (prefix + sum(lengths)),
            )

    def test_the_bound_covers_every_sample(self):
        model = NGramLM("abc")
        ledger = Ledger()
        model.sample([state("ab")], 4, 5, seeds=[0], ledgers=[ledger])
        bound = model.usage_bound(2, [5] * 4)
        assert ledger.usage.generated_tokens <= bound.generated_tokens
        assert ledger.usage.lm_flops <= bound.lm_flops

    def test_judging_and_features_are_charged_as_prefixes(self):
        model = NGramLM("abc")
        judged, read = Ledger(), Ledger()
        model.logprobs([state("ab")], [Chunk((1, 2, 3))], ledgers=[judged])
        model.features([state("ab", (1,))], ledgers=[read])
        assert (judged.usage.prompt_tokens, judged.usage.generated_tokens) == (5, 0)
        assert (read.usage.prompt_tokens, read.usage.lm_calls) == (3, 1)

    def test_a_budget_is_enforced(self):
        model = NGramLM("abc", stop_probability=0.0)
        ledger = Ledger(Budget(tokens=5))
        with pytest.raises(BudgetExceededError, match="6 tokens of a budget of 5"):
            model.sample([state()], 2, 3, seeds=[0], ledgers=[ledger])


def pickled(model: ExactLM) -> ExactLM:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - written on this line


@pytest.mark.parametrize(
    "model",
    [
        table_lm(context_length=9, flops_per_token=3.0),
        NGramLM("abc", 3, 7, 0.5, 0.2, context_length=9, flops_per_token=3.0),
    ],
    ids=["table", "ngram"],
)
@pytest.mark.parametrize("copied", [pickled, copy.deepcopy, copy.copy])
def test_copies_are_the_same_model(model: ExactLM, copied):
    start = [state("ab", model=model)]
    before = model.sample(start, 5, 6, seeds=[0])
    other = copied(model)
    assert other.sample(start, 5, 6, seeds=[0]) == before
    assert (other.context_length, other.flops_per_token, other.alphabet) == (9, 3.0, model.alphabet)

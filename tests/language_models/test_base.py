"""Sampling parameters, random streams and the checks that all language models share."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mbrl_text_env.language_models import (
    FeatureModel,
    LanguageModel,
    NGramLM,
    SamplingParams,
    Tokenizer,
)
from mbrl_text_env.language_models.base import (
    check_sample_arguments,
    check_unfinished,
    spawn_seed,
    stream,
)
from mbrl_text_env.types import Prompt, TextState

STATE = TextState(Prompt("p", "Hi"), (5, 6))
LATER = TextState(Prompt("p", "Hi"), (5, 6), (7,))
ENDED = TextState(Prompt("p", "Hi"), (5, 6), (0,), "stop")


class TestSamplingParams:
    def test_default_is_the_models_own_distribution(self):
        assert SamplingParams() == SamplingParams(temperature=1.0, top_p=1.0, top_k=0)

    @pytest.mark.parametrize(
        "fields",
        [
            {"temperature": 0.0},
            {"temperature": 1e-300},
            {"temperature": 100.0},
            {"top_p": 1e-9},
            {"top_p": 1.0},
            {"top_k": 1},
        ],
    )
    def test_values_within_the_ranges(self, fields):
        assert SamplingParams(**fields) == SamplingParams(**fields)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("temperature", -0.1),
            ("temperature", float("inf")),
            ("temperature", float("nan")),
            ("top_p", 0.0),
            ("top_p", -0.5),
            ("top_p", 1.0001),
            ("top_p", float("nan")),
            ("top_k", -1),
        ],
    )
    def test_values_outside_are_refused_by_name(self, name, value):
        with pytest.raises(ValueError, match=rf"^{name}: expected .* got {value!r}"):
            SamplingParams(**{name: value})


class TestStream:
    # Written down once: a change of the derivation would silently change every recorded run.
    @pytest.mark.parametrize(
        ("seed", "state", "sample_index", "expected"),
        [
            (0, STATE, 0, [0.7865673151566447, 0.11588565858374322]),
            (0, STATE, 1, [0.6993385620344416, 0.6371253510048152]),
            (1, STATE, 0, [0.06744129981292413, 0.8552519625900502]),
            (0, LATER, 0, [0.005339454486551043, 0.2388464632182562]),
            (-3, STATE, 10**12, [0.48357697404838007, 0.22343396023990503]),
        ],
    )
    def test_numbers_do_not_change_between_versions(self, seed, state, sample_index, expected):
        assert stream(seed, state, sample_index).random(2).tolist() == expected

    def test_is_a_function_of_tokens_and_not_of_chunks(self):
        chunked = TextState(Prompt("p", "Hi"), (5, 6), (7,), chunk_ends=(1,))
        assert stream(0, chunked, 0).random() == stream(0, LATER, 0).random()

    def test_is_a_function_of_the_prompts_id_and_not_of_its_text(self):
        same_id = TextState(Prompt("p", "Something else", {"kind": "x"}, "test"), (5, 6))
        other_id = TextState(Prompt("q", "Hi"), (5, 6))
        assert stream(0, same_id, 0).random() == stream(0, STATE, 0).random()
        assert stream(0, other_id, 0).random() != stream(0, STATE, 0).random()

    def test_tells_prompt_tokens_from_response_tokens(self):
        moved = TextState(Prompt("p", "Hi"), (5, 6, 7))
        assert stream(0, moved, 0).random() != stream(0, LATER, 0).random()

    def test_takes_numpy_seeds(self):
        assert stream(np.int64(4), STATE, 0).random() == stream(4, STATE, 0).random()

    @given(st.integers(), st.integers(0, 2**62), st.lists(st.integers(0, 2**40), max_size=5))
    def test_asking_again_gives_the_same(self, seed, sample_index, response):
        state = TextState(Prompt("p", "Hi"), (5, 6), tuple(response))
        first = stream(seed, state, sample_index).random(4)
        np.testing.assert_array_equal(first, stream(seed, state, sample_index).random(4))

    def test_first_numbers_of_many_streams_are_uniform_and_distinct(self):
        first = [stream(seed, STATE, k).random() for seed in range(20) for k in range(100)]
        assert len(set(first)) == len(first)
        assert stats.kstest(first, "uniform").pvalue > 0.001


class TestSpawnSeed:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ((0,), 4246866556266386882),
            ((0, 1), 2754921267890689017),
            ((0, 1, 2), 217875049918638303),
            ((-1, 0), 7411854160689423340),
            ((2**70, 5), 8250897615225738968),
        ],
    )
    def test_numbers_do_not_change_between_versions(self, arguments, expected):
        assert spawn_seed(*arguments) == expected

    @given(st.integers(), st.lists(st.integers()))
    def test_is_below_two_to_the_63(self, seed, path):
        assert 0 <= spawn_seed(seed, *path) < 2**63

    def test_paths_do_not_collide(self):
        paths = {(0,), (0, 0), (1, 2), (12,), (1, 2, 3), (1, 23), (12, 3), (2, 1), (-1, 2)}
        paths |= {(0, i, j) for i in range(30) for j in range(30)}
        assert len({spawn_seed(*path) for path in paths}) == len(paths)


class TestArguments:
    def test_good_ones_pass(self):
        check_sample_arguments([STATE, LATER], 1, 1, [0, 1])
        check_sample_arguments([], 1, 1, [])

    @pytest.mark.parametrize(("num_samples", "max_new_tokens"), [(0, 1), (1, 0), (-1, 4)])
    def test_counts_below_one(self, num_samples, max_new_tokens):
        with pytest.raises(ValueError, match="expected at least 1"):
            check_sample_arguments([STATE], num_samples, max_new_tokens, [0])

    @pytest.mark.parametrize("seeds", [[], [0, 1]])
    def test_seeds_of_another_length(self, seeds):
        with pytest.raises(ValueError, match=rf"one seed per state \(1\), got {len(seeds)}"):
            check_sample_arguments([STATE], 1, 1, seeds)

    @pytest.mark.parametrize("reason", ["stop", "length"])
    def test_ended_states(self, reason):
        ended = TextState(Prompt("some-id", "Hi"), (5, 6), (0,), reason)
        with pytest.raises(ValueError, match=r"'some-id' has ended .* cannot continue it"):
            check_sample_arguments([STATE, ended], 1, 1, [0, 1])
        with pytest.raises(ValueError, match="some-id"):
            check_unfinished([ended])


def test_a_model_is_its_own_tokenizer():
    model = NGramLM("ab")
    assert isinstance(model, LanguageModel)
    assert isinstance(model, Tokenizer)
    assert isinstance(model, FeatureModel)

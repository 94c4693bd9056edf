"""The model checker passes what keeps its contract, and names the fault of what does not."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env import CheckError, checks
from mbrl_text_env.language_models import NGramLM, SamplingParams, TableLM
from mbrl_text_env.language_models.base import spawn_seed
from mbrl_text_env.types import Chunk, Prompt, Usage
from tests.checks.common import LM, broken

# Language models that keep the contract.


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("concentration", [0.01, 1.0])
def test_ngram_models_pass(order, concentration):
    lm = NGramLM("abcde", order, seed=order, concentration=concentration)
    checks.check_language_model(lm)


@pytest.mark.parametrize(
    "table",
    [
        {"": [0.0, 0.9, 0.1], "a": [1.0, 0.0, 0.0]},
        {"": [0.0, 1.0, 0.0], "a": [0.0, 0.0, 1.0], "ab": [1.0, 0.0, 0.0]},
    ],
)
def test_table_models_pass(table):
    checks.check_language_model(TableLM("ab", table))


@settings(max_examples=30, deadline=None)
@given(
    alphabet=st.sets(st.characters(), min_size=1, max_size=8).map("".join),
    order=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    concentration=st.floats(0.05, 10),
    stop_probability=st.floats(0, 0.9),
    context_length=st.integers(4, 12),
    max_new_tokens=st.integers(2, 12),
)
def test_every_ngram_model_passes(alphabet, max_new_tokens, **options):
    lm = NGramLM(alphabet, **options)
    prompts = [Prompt.from_text(text) for text in ("abc", "-", alphabet[:2] + "!")]
    checks.check_language_model(lm, prompts, max_new_tokens=max_new_tokens)


def test_smollm2_passes(smollm2):
    prompts = [Prompt.from_text("Write a story."), Prompt.from_text("Once", chat=False)]
    checks.check_language_model(smollm2, prompts, max_new_tokens=4)


def test_arguments_of_check_language_model():
    with pytest.raises(ValueError, match="at least one prompt"):
        checks.check_language_model(LM, [])
    with pytest.raises(ValueError, match="max_new_tokens of at least 2"):
        checks.check_language_model(LM, max_new_tokens=1)


# Language models that break it.


class Shifted(NGramLM):
    """Its log-probabilities are those of the next token."""

    def logprobs(self, states, chunks, **options):
        return [(*logs[1:], logs[0]) for logs in super().logprobs(states, chunks, **options)]


class ShapedLogprobs(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params, guard):
        chunk = super()._draw(state, generator, max_new_tokens, params, guard)
        logs = tuple(log / (params.temperature or 1) for log in chunk.logprobs)
        return dataclasses.replace(chunk, logprobs=logs)


class PositiveLogprobs(NGramLM):
    def _draw(self, *args):
        chunk = super()._draw(*args)
        return dataclasses.replace(chunk, logprobs=tuple(-log for log in chunk.logprobs))


class IgnoresStopTexts(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params, guard):
        params = dataclasses.replace(params, stop=())
        return super()._draw(state, generator, max_new_tokens, params, guard)


class StopTextsEndResponses(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params, guard):
        chunk = super()._draw(state, generator, max_new_tokens, params, guard)
        return dataclasses.replace(chunk, finish_reason="stop") if params.stop else chunk


class SharedStream(NGramLM):
    generator = np.random.default_rng(0)

    def _draw(self, state, generator, max_new_tokens, params, guard):
        return super()._draw(state, self.generator, max_new_tokens, params, guard)


class OneStreamABatch(NGramLM):
    def sample(self, states, num_samples, max_new_tokens, *, seeds, **options):
        seeds = [spawn_seed(seeds[0], len(states))] * len(states)
        return super().sample(states, num_samples, max_new_tokens, seeds=seeds, **options)


class SeedsByPlace(NGramLM):
    """Its states draw in order of their place among the others."""

    def sample(self, states, num_samples, max_new_tokens, *, seeds, **options):
        if len(states) > 1:
            seeds = [spawn_seed(seeds[0], i) for i in range(len(states))]
        return super().sample(states, num_samples, max_new_tokens, seeds=seeds, **options)


class IgnoresSeeds(NGramLM):
    def sample(self, states, num_samples, max_new_tokens, *, seeds, **options):
        seeds = [0] * len(seeds)
        return super().sample(states, num_samples, max_new_tokens, seeds=seeds, **options)


class SamplesAlike(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params, guard):
        alike = np.random.default_rng(len(state.prompt_ids))
        return super()._draw(state, alike, max_new_tokens, params, guard)


class IgnoresFirstSample(NGramLM):
    def sample(self, *args, first_sample=0, **options):
        return super().sample(*args, **options)


class DependsOnTheLimit(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params, guard):
        generator.random(max_new_tokens)
        return super()._draw(state, generator, max_new_tokens, params, guard)


class NotGreedy(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params, guard):
        params = params if params.temperature else SamplingParams()
        return super()._draw(state, generator, max_new_tokens, params, guard)


class LeastProbable(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params, guard):
        if params.temperature:
            return super()._draw(state, generator, max_new_tokens, params, guard)
        token = (
            int(np.argmin(self.next_probabilities(state.prompt_ids, state.response_ids)[1:])) + 1
        )
        ids = (token,) * max_new_tokens
        return Chunk(ids, self.logprobs([state], [Chunk(ids)])[0])


class StopInTheMiddle(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params, guard):
        ids = tuple(generator.integers(0, 2, max_new_tokens).tolist())
        return Chunk(ids, self.logprobs([state], [Chunk(ids)])[0], "stop" if not ids[-1] else None)


class TooManyTokens(NGramLM):
    def _draw(self, state, generator, max_new_tokens, params, guard):
        return super()._draw(state, generator, max_new_tokens + 1, params, guard)


class StopsEarly(NGramLM):
    def _draw(self, *args):
        chunk = super()._draw(*args)
        return Chunk(chunk.token_ids[:1], chunk.logprobs[:1], "stop" if len(chunk) == 1 else None)


class OutsideTheVocabulary(NGramLM):
    def _draw(self, *args):
        chunk = super()._draw(*args)
        return dataclasses.replace(chunk, token_ids=(99, *chunk.token_ids[1:]))


class NoFinishReason(NGramLM):
    def _draw(self, *args):
        return dataclasses.replace(super()._draw(*args), finish_reason=None)


class NoLogprobs(NGramLM):
    def _draw(self, *args):
        return dataclasses.replace(super()._draw(*args), logprobs=())


class FlatRows(NGramLM):
    def sample(self, *args, **options):
        return list(itertools.chain.from_iterable(super().sample(*args, **options)))


class Uncharged(NGramLM):
    def sample(self, *args, ledgers=None, **options):
        return super().sample(*args, **options)


class ChargesTheLongest(NGramLM):
    def sample_requests(self, requests, *, ledgers=None):
        rows = super().sample_requests(requests)
        for r, row, ledger in zip(requests, rows, ledgers or (), strict=ledgers is not None):
            prefix = len(r.state.prompt_ids) + len(r.state.response_ids)
            ledger.charge(self.usage_bound(prefix, [max(map(len, row))] * len(row)))
        return rows


class ChargesNoPrefix(NGramLM):
    def usage_bound(self, prefix_tokens, new_tokens):
        return dataclasses.replace(super().usage_bound(prefix_tokens, new_tokens), prompt_tokens=0)


class BoundTooLow(NGramLM):
    def sample_requests(self, requests, *, ledgers=None):
        rows = super().sample_requests(requests, ledgers=ledgers)
        for ledger in ledgers or ():
            ledger.charge(Usage(lm_flops=1e6))
        return rows


class FreeOfCharge(NGramLM):
    def usage_bound(self, prefix_tokens, new_tokens):
        return dataclasses.replace(super().usage_bound(prefix_tokens, new_tokens), lm_flops=0.0)


class ContinuesEndedStates(NGramLM):
    def sample(self, states, *args, **options):
        going = [dataclasses.replace(state, finish_reason=None) for state in states]
        return super().sample(going, *args, **options)


class AnyCount(NGramLM):
    def sample(self, states, num_samples, max_new_tokens, **options):
        return super().sample(states, max(1, num_samples), max_new_tokens, **options)


class ShowsTheStopToken(NGramLM):
    def decode(self, token_ids):
        return super().decode(token_ids) + ("<end>" if 0 in token_ids else "")


class StopOutside(NGramLM):
    stop_token_ids = None

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.stop_token_ids = frozenset({0, 99})


class EncodesLists(NGramLM):
    def encode_prompt(self, prompt):
        return list(super().encode_prompt(prompt))


class EncodesAtRandom(NGramLM):
    count = 0

    def encode_prompt(self, prompt):
        self.count = (self.count + 1) % 5
        return (self.count, *super().encode_prompt(prompt))


class DoubleFeatures(NGramLM):
    def features(self, states, **options):
        return super().features(states, **options).astype(np.float64)


class CentredFeatures(NGramLM):
    def features(self, states, **options):
        rows = super().features(states, **options)
        return rows - rows.mean(axis=0)


class LogFeatures(NGramLM):
    def features(self, states, **options):
        return np.log(super().features(states, **options) * 0)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(
    ("cls", "match"),
    [
        broken(Shifted, "those of the model itself"),
        broken(ShapedLogprobs, "Take them before temperature"),
        broken(PositiveLogprobs, "one finite log-probability of at most 0"),
        broken(IgnoresStopTexts, "up to the token that completes the stop text"),
        broken(StopTextsEndResponses, "finish_reason None: the response goes on"),
        broken(SharedStream, "the same chunks when called again with the same seeds"),
        broken(OneStreamABatch, r"that each state has alone \(batch of one\)"),
        broken(SeedsByPlace, "that each state has alone"),
        broken(IgnoresSeeds, "another seed gives other samples"),
        broken(SamplesAlike, "16 samples of a state differ"),
        broken(IgnoresFirstSample, "from first_sample=4 to be the 8 from 0"),
        broken(DependsOnTheLimit, "gives a prefix of the longer chunk"),
        broken(NotGreedy, "the same chunk for all samples and seeds"),
        broken(LeastProbable, "expected the most probable token"),
        broken(StopInTheMiddle, "End a chunk at its first stop token"),
        broken(TooManyTokens, r"1 to max_new_tokens \(6\) token ids"),
        broken(StopsEarly, "6 tokens, or fewer where the response ends"),
        broken(OutsideTheVocabulary, "ints from 0 to 5"),
        broken(NoFinishReason, "'stop' after a stop token"),
        broken(NoLogprobs, "one finite log-probability"),
        broken(FlatRows, r"chunks\[len\(states\)\]\[num_samples\]"),
        broken(Uncharged, "ledgers: expected generated_tokens"),
        broken(ChargesTheLongest, "ledgers: expected generated_tokens"),
        broken(ChargesNoPrefix, "cover the prefix of"),
        broken(BoundTooLow, "no amount above `usage"),
        broken(FreeOfCharge, "FLOPs above 0"),
        broken(ContinuesEndedStates, "ValueError for a state that has ended, got no error"),
        broken(AnyCount, "ValueError for num_samples=0, got no error"),
        broken(ShowsTheStopToken, "a text without the special token 0"),
        broken(StopOutside, "a frozenset of ids from 0 to 5"),
        broken(EncodesLists, "a tuple of fewer than 1024 ints"),
        broken(EncodesAtRandom, "expected the same ids each time"),
        broken(DoubleFeatures, "expected a float32 array of shape"),
        broken(CentredFeatures, "the features that each state has alone"),
        broken(LogFeatures, "features: expected finite numbers"),
    ],
)
def test_broken_language_models_fail(cls, match):
    with pytest.raises(CheckError, match=match):
        checks.check_language_model(cls("abcde", order=2, seed=1))


def test_incomplete_language_models_fail():
    with pytest.raises(CheckError, match=r"without .*sample, logprobs, usage"):
        checks.check_language_model(object())


def test_few_improbable_tokens_may_differ_with_the_batch():
    class Tied(NGramLM):
        """In a batch, a token that is hardly ever drawn becomes its neighbour."""

        def next_probabilities(self, prompt_ids, response_ids):
            row = np.full(self.vocab_size, 1e-5)
            row[1] = 1 - row[2:].sum() - row[0]
            return row

        def sample(self, states, *args, **options):
            rows = super().sample(states, *args, **options)
            swapped = len(states) > 1
            return [[self.swapped(c) if swapped else c for c in row] for row in rows]

        def swapped(self, chunk):
            ids = tuple(i - 1 if i > 2 else i for i in chunk.token_ids)
            return dataclasses.replace(chunk, token_ids=ids)

    alphabet = "".join(map(chr, range(200, 2200)))
    checks.check_language_model(Tied(alphabet))

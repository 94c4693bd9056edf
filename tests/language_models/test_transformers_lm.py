"""The transformers engine against transformers itself, on tiny random models and on SmolLM2."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from tokenizers import normalizers
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mbrl_text_env.language_models import (
    HFTokenizer,
    PromptTooLongError,
    SamplingParams,
    TransformersLM,
    embedded_tokenizer,
    loading,
)
from mbrl_text_env.language_models.base import UnknownTokenError, stream
from mbrl_text_env.language_models.engine import draw
from mbrl_text_env.language_models.hf_tokenizer import ModelLoadError
from mbrl_text_env.mdp import initial
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.types import Chunk, Ledger, Message, Prompt, TextState, Usage
from tests.language_models.conftest import (
    CHAT_TEMPLATE,
    CONTEXT_LENGTH,
    FAMILIES,
    SLIDING_WINDOW,
    VOCAB_SIZE,
    make_config,
    save_model,
    train_tokenizer,
)

GREEDY = SamplingParams(temperature=0)
LENGTHS = (3, 31, 7, 12, 20, 5)

Tiny = Callable[[str], TransformersLM]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers this small take longer to share among threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_states(lengths: Sequence[int] = LENGTHS, seed: int = 3) -> list[TextState]:
    """States with random prompt and response tokens, together as long as asked."""
    generator = np.random.default_rng(seed)
    states = []
    for i, length in enumerate(lengths):
        ids = tuple(generator.integers(2, VOCAB_SIZE, length).tolist())
        cut = max(1, length // 2)
        states.append(TextState(Prompt(f"p{i}", "text"), ids[:cut], ids[cut:]))
    return states


def prefix(state: TextState) -> tuple[int, ...]:
    return state.prompt_ids + state.response_ids


@torch.inference_mode()
def plain_logits(lm: TransformersLM, ids: Sequence[int]) -> torch.Tensor:
    """float32[len(ids), V]: one forward pass over one sequence, without cache or padding."""
    return lm.model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def plain_logprobs(lm: TransformersLM, state: TextState, chunk: Chunk) -> list[float]:
    ids = prefix(state) + chunk.token_ids
    logs = plain_logits(lm, ids).log_softmax(-1)
    start = len(prefix(state))
    return [float(logs[place - 1, ids[place]]) for place in range(start, len(ids))]


def generate(lm: TransformersLM, state: TextState, max_new_tokens: int) -> tuple[int, ...]:
    """transformers' own greedy decoding of one sequence."""
    ids = torch.tensor([prefix(state)])
    out = lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
        eos_token_id=sorted(lm.stop_token_ids),
    )
    return tuple(out[0, ids.shape[1] :].tolist())


def assert_same_but_for_ties(
    lm: TransformersLM, state: TextState, seed: int, k: int, first: Chunk, second: Chunk
) -> None:
    """Equal tokens; they may part only where the uniform number lies on the edge between two."""
    pairs = zip(first.token_ids, second.token_ids, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    np.testing.assert_allclose(first.logprobs[:same], second.logprobs[:same], atol=1e-3)
    if same is None:
        assert first.token_ids == second.token_ids
        assert first.finish_reason == second.finish_reason
        return
    low, high = sorted((first.token_ids[same], second.token_ids[same]))
    logits = plain_logits(lm, prefix(state) + first.token_ids[:same])[-1]
    cumulative = logits.double().softmax(-1).cumsum(-1)
    uniform = stream(seed, state, k).random(same + 1)[same]
    assert abs(float(cumulative[low]) - uniform) < 1e-4
    assert abs(float(cumulative[high - 1]) - uniform) < 1e-4


@pytest.fixture(scope="session")
def short_winded(model_folder: Callable[[str], Path], tiny: Tiny) -> Callable[..., TransformersLM]:
    """The tiny models with every sixth token a stop token, so that batches shrink quickly."""

    def load(family: str, batch_size: int = 64) -> TransformersLM:
        stops = HFTokenizer(model_folder(family), stop_token_ids=range(0, VOCAB_SIZE, 6))
        return TransformersLM(tiny(family).model, tokenizer=stops, batch_size=batch_size)

    return load


@pytest.mark.parametrize("family", FAMILIES)
class TestAgainstTransformers:
    def test_greedy_is_that_of_generate(self, tiny, family):
        lm, states = tiny(family), random_states()
        rows = lm.sample(states, 2, 20, seeds=[0] * 6, params=GREEDY)
        for state, row in zip(states, rows, strict=True):
            expected = generate(lm, state, 20)
            assert [chunk.token_ids for chunk in row] == [expected, expected]
            assert len(set(expected)) > 3

    def test_log_probabilities_are_those_of_a_plain_forward_pass(self, tiny, family):
        lm, states = tiny(family), random_states()
        params = SamplingParams(temperature=1.3, top_p=0.9)
        chunks = [row[0] for row in lm.sample(states, 1, 14, seeds=range(6), params=params)]
        judged = lm.logprobs(states, chunks)
        for state, chunk, logprobs in zip(states, chunks, judged, strict=True):
            expected = plain_logprobs(lm, state, chunk)
            np.testing.assert_allclose(chunk.logprobs, expected, atol=1e-4)
            np.testing.assert_allclose(logprobs, expected, atol=1e-4)

    def test_log_probabilities_of_chunks_of_different_lengths(self, tiny, family):
        lm, states = tiny(family), random_states()
        chunks = [Chunk(tuple(range(10, 10 + n))) for n in (1, 5, 2, 9, 1, 3)]
        judged = lm.logprobs(states, chunks)
        for state, chunk, logprobs in zip(states, chunks, judged, strict=True):
            np.testing.assert_allclose(logprobs, plain_logprobs(lm, state, chunk), atol=1e-4)
            np.testing.assert_allclose(logprobs, lm.logprobs([state], [chunk])[0], atol=1e-4)

    def test_features_are_the_last_hidden_state(self, tiny, family):
        lm, states = tiny(family), random_states()
        found = lm.features(states)
        assert found.shape == (6, lm.feature_size)
        assert found.dtype == np.float32
        assert lm.feature_size == 32
        for state, row in zip(states, found, strict=True):
            with torch.inference_mode():
                out = lm.model(torch.tensor([prefix(state)]), output_hidden_states=True)
            np.testing.assert_allclose(row, out.hidden_states[-1][0, -1], atol=1e-4)

    def test_a_batch_is_its_states_one_by_one_in_any_order(self, tiny, family):
        lm, states, seeds = tiny(family), random_states(), [5, 1, 4, 1, 5, 9]
        batch = lm.sample(states, 3, 10, seeds=seeds)
        order = [3, 0, 5, 1, 4, 2]
        shuffled = lm.sample([states[i] for i in order], 3, 10, seeds=[seeds[i] for i in order])
        for i, state in enumerate(states):
            alone = lm.sample([state], 3, 10, seeds=[seeds[i]])[0]
            for k in range(3):
                other = shuffled[order.index(i)][k]
                assert_same_but_for_ties(lm, state, seeds[i], k, batch[i][k], alone[k])
                assert_same_but_for_ties(lm, state, seeds[i], k, batch[i][k], other)

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_batch_size_and_shrinking_do_not_change_the_chunks(
        self, short_winded, family, batch_size
    ):
        whole, parts = short_winded(family), short_winded(family, batch_size)
        states, seeds = random_states(), [7, 7, 1, 2, 3, 4]
        chunks = whole.sample(states, 5, 12, seeds=seeds)
        others = parts.sample(states, 5, 12, seeds=seeds)
        ends = {len(chunk) for row in chunks for chunk in row}
        assert {1, 2, 3, 4} <= ends, "sequences end at many steps, so the batch shrinks often"
        for state, seed, row, other in zip(states, seeds, chunks, others, strict=True):
            assert len(row) == len(other) == 5
            for k in range(5):
                assert_same_but_for_ties(whole, state, seed, k, row[k], other[k])
                assert whole.stop_token_ids.isdisjoint(row[k].token_ids[:-1])
                stopped = row[k].token_ids[-1] in whole.stop_token_ids
                assert row[k].finish_reason == ("stop" if stopped else None)
                assert stopped or len(row[k]) == 12

    def test_the_context_is_a_limit(self, tiny, family):
        """With one sequence at the limit and many that go on, which have to stay right."""
        lm = tiny(family)
        assert lm.context_length == CONTEXT_LENGTH
        lengths = [CONTEXT_LENGTH - 1, CONTEXT_LENGTH - 4, CONTEXT_LENGTH - 6] + [4] * 15
        states = random_states(lengths)
        rows = lm.sample(states, 1, 6, seeds=range(18), params=GREEDY)
        for state, (chunk,) in zip(states, rows, strict=True):
            room = CONTEXT_LENGTH - len(prefix(state))
            assert chunk.token_ids == generate(lm, state, min(room, 6))
            if chunk.token_ids[-1] not in lm.stop_token_ids:
                assert chunk.finish_reason == ("length" if room <= 6 else None)
        full = random_states([CONTEXT_LENGTH])
        with pytest.raises(PromptTooLongError, match="96 tokens and fill the model's context"):
            lm.sample(full, 1, 1, seeds=[0])


class TestSample:
    def test_frequencies_of_the_next_token(self, tiny):
        lm, [state] = tiny("llama"), random_states([9])
        chunks = lm.sample([state], 3000, 1, seeds=[2])[0]
        observed = np.bincount([c.token_ids[0] for c in chunks], minlength=VOCAB_SIZE)
        exact = plain_logits(lm, prefix(state))[-1].double().softmax(-1).numpy()
        assert_frequencies(observed, exact)

    def test_fewer_tokens_are_a_prefix_of_more(self, short_winded):
        lm, states = short_winded("qwen3"), random_states()
        long = lm.sample(states, 4, 12, seeds=range(6))
        short = lm.sample(states, 4, 5, seeds=range(6))
        for i, state in enumerate(states):
            for k in range(4):
                cut = Chunk(long[i][k].token_ids[:5], long[i][k].logprobs[:5])
                ended = cut.token_ids[-1] in lm.stop_token_ids
                cut = Chunk(cut.token_ids, cut.logprobs, "stop" if ended else None)
                assert_same_but_for_ties(lm, state, i, k, cut, short[i][k])

    def test_later_samples_continue_earlier_ones(self, tiny):
        lm, states = tiny("gpt2"), random_states([6, 4])
        whole = lm.sample(states, 6, 5, seeds=[1, 2])
        first = lm.sample(states, 2, 5, seeds=[1, 2])
        rest = lm.sample(states, 4, 5, seeds=[1, 2], first_sample=2)
        for i, state in enumerate(states):
            for k, (a, b) in enumerate(zip(whole[i], first[i] + rest[i], strict=True)):
                assert_same_but_for_ties(lm, state, i + 1, k, a, b)

    def test_samples_of_a_state_differ(self, tiny):
        row = tiny("llama").sample(random_states([5]), 8, 6, seeds=[0])[0]
        assert len({chunk.token_ids for chunk in row}) == 8

    def test_empty_batches(self, tiny):
        lm = tiny("llama")
        assert lm.sample([], 2, 3, seeds=[]) == []
        assert lm.logprobs([], []) == []
        assert lm.features([]).shape == (0, 32)

    def test_arguments(self, tiny):
        lm, states = tiny("llama"), random_states([4, 4])
        with pytest.raises(ValueError, match="at least 1"):
            lm.sample(states, 0, 1, seeds=[0, 1])
        with pytest.raises(ValueError, match="one seed per state"):
            lm.sample(states, 1, 1, seeds=[0])
        ended = TextState(states[0].prompt, (3, 4), (1,), "stop")
        with pytest.raises(ValueError, match="has ended"):
            lm.sample([ended], 1, 1, seeds=[0])
        with pytest.raises(ValueError, match="has ended"):
            lm.logprobs([ended], [Chunk((3,))])
        for chunks in ([Chunk((3,))], [Chunk((3,))] * 3):
            with pytest.raises(ValueError, match=rf"one chunk per state \(2\), got {len(chunks)}"):
                lm.logprobs(states, chunks)
        assert lm.features([ended]).shape == (1, 32)

    def test_the_sliding_window_matters_here(self, model_folder, tiny):
        """The tests of the family would prove little if the window were wider than its states."""
        config = transformers.AutoConfig.from_pretrained(model_folder("gemma3"))
        config.sliding_window = CONTEXT_LENGTH
        wide = transformers.AutoModelForCausalLM.from_pretrained(
            model_folder("gemma3"), config=config
        )
        narrow = tiny("gemma3")
        [short, long] = random_states([SLIDING_WINDOW, 3 * SLIDING_WINDOW])
        for state, same in ((short, True), (long, False)):
            with torch.inference_mode():
                logits = wide(torch.tensor([prefix(state)])).logits[0, -1]
            difference = (logits - plain_logits(narrow, prefix(state))[-1]).abs().max()
            assert (float(difference) < 1e-3) == same

    @pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
    def test_half_precision(self, model_folder, dtype):
        lm = TransformersLM(model_folder("llama"), dtype=dtype, device="cpu")
        assert lm.model.dtype == torch.bfloat16
        states = random_states()
        rows = lm.sample(states, 2, 6, seeds=range(6))
        chunks = [row[0] for row in rows]
        judged = lm.logprobs(states, chunks)
        for chunk, logprobs in zip(chunks, judged, strict=True):
            np.testing.assert_allclose(chunk.logprobs, logprobs, atol=0.2)
        assert lm.features(states).dtype == np.float32


def assert_frequencies(observed: np.ndarray, exact: np.ndarray) -> None:
    """Chi-square, with the tokens that should come less than five times taken together."""
    assert np.all(observed[exact == 0] == 0)
    expected = exact / exact.sum() * observed.sum()
    often = expected >= 5
    rest = [[observed[~often].sum()], [expected[~often].sum()]]
    counts = [np.append(observed[often], rest[0]), np.append(expected[often], rest[1])]
    kept = counts[1] > 0
    assert kept.sum() >= 2
    assert stats.chisquare(counts[0][kept], counts[1][kept]).pvalue > 0.001


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """float64[B, V]: the distribution that transformers' own warpers make of logits."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(params.temperature)(ids, logits)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    return scores.double().softmax(-1)


SHAPES = [
    SamplingParams(temperature, top_p, top_k)
    for temperature in (0.5, 1.0, 1.5)
    for top_p, top_k in ((1.0, 0), (0.8, 0), (1.0, 5), (0.7, 10), (0.05, 0), (1.0, 1))
]


class TestDraw:
    def logits(self, rows: int, size: int = 60, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return 2 * torch.randn(rows, size, generator=generator)

    @pytest.mark.parametrize("params", SHAPES, ids=str)
    def test_frequencies_are_those_of_transformers_warpers(self, params):
        logits = self.logits(1)
        exact = warped(logits, params)[0].numpy()
        uniforms = torch.from_numpy(np.random.default_rng(1).random(20_000))
        tokens, _ = draw(logits.expand(20_000, -1), uniforms, params)
        observed = np.bincount(tokens.numpy(), minlength=60)
        if (exact > 0).sum() > 1:
            assert_frequencies(observed, exact)
        else:
            assert observed[exact > 0].tolist() == [20_000]

    @pytest.mark.parametrize("params", SHAPES, ids=str)
    def test_evenly_spaced_numbers_give_the_probabilities(self, params):
        logits = self.logits(1, seed=5)
        exact = warped(logits, params)[0].numpy()
        uniforms = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
        tokens, _ = draw(logits.expand(50_000, -1), uniforms, params)
        observed = np.bincount(tokens.numpy(), minlength=60) / 50_000
        np.testing.assert_allclose(observed, exact, atol=3e-5)
        assert torch.equal(tokens, tokens.sort().values)

    @pytest.mark.parametrize("params", [*SHAPES, GREEDY], ids=str)
    def test_log_probabilities_are_unshaped_and_rows_independent(self, params):
        logits = self.logits(40)
        before = logits.clone()
        uniforms = torch.from_numpy(np.random.default_rng(2).random(40))
        tokens, logprobs = draw(logits, uniforms, params)
        assert torch.equal(logits, before)
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        torch.testing.assert_close(logprobs, expected)
        for row in range(40):
            alone, _ = draw(logits[row : row + 1], uniforms[row : row + 1], params)
            assert alone.tolist() == [tokens[row]]

    @pytest.mark.parametrize("temperature", [0.0, 1e-4, 1e-40, 1e-300, 5e-324])
    def test_small_temperatures_are_greedy(self, temperature):
        logits = 20 * self.logits(50)
        params = SamplingParams(temperature=temperature)
        tokens, _ = draw(logits, torch.full((50,), 0.999, dtype=torch.float64), params)
        assert torch.equal(tokens, logits.argmax(-1))

    def test_impossible_tokens_are_never_drawn(self):
        logits = torch.full((3, 8), -torch.inf)
        logits[:, 2] = logits[:, 5] = 1.0
        uniforms = torch.tensor([0.0, 0.5, np.nextafter(1.0, 0.0)], dtype=torch.float64)
        for params in (SamplingParams(), SamplingParams(0.7, 0.9, 4)):
            tokens, logprobs = draw(logits, uniforms, params)
            assert tokens.tolist() == [2, 5, 5]
            torch.testing.assert_close(logprobs, torch.full((3,), 0.5).log())

    def test_a_large_vocabulary_meets_no_edge(self):
        logits = torch.zeros(4, 200_000)
        uniforms = torch.tensor([0.0, 0.25, 0.5, np.nextafter(1.0, 0.0)], dtype=torch.float64)
        tokens, _ = draw(logits, uniforms, SamplingParams())
        assert tokens.tolist() == [0, 50_000, 100_000, 199_999]


class TestUsage:
    # One layer: queries and output 32 x 32 each, keys and values 32 x 16 each, three feed-forward
    # matrices 32 x 48, two norms of 32.
    LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    PARAMETERS = 2 * LAYER + 32 + VOCAB_SIZE * 32

    def test_by_hand(self, tiny):
        lm = tiny("llama")
        assert lm.num_parameters == self.PARAMETERS == 25_120
        # 10 prefix tokens see 5 others on average; then 3 and 4 tokens see the prefix and half of
        # their own.
        attended = 10 * 5 + (3 * 10 + 4.5) + (4 * 10 + 8)
        assert lm.usage_bound(10, [3, 4]) == Usage(
            prompt_tokens=10,
            generated_tokens=7,
            lm_calls=1,
            lm_flops=2 * 25_120 * 17 + 4 * (2 * 32) * attended,
        )

    def test_a_tied_embedding_is_the_output_layer(self, tmp_path, tokenizer):
        config = make_config("llama", tokenizer.eos_token_id, tie_word_embeddings=True)
        lm = TransformersLM(save_model(tmp_path, config, tokenizer))
        assert lm.num_parameters == self.PARAMETERS

    def test_heads_wider_than_the_model(self, tmp_path, tokenizer):
        config = make_config("qwen3", tokenizer.eos_token_id, head_dim=16)
        lm = TransformersLM(save_model(tmp_path, config, tokenizer))
        usage = lm.usage_bound(10, [])
        assert usage.lm_flops == 2 * lm.num_parameters * 10 + 4 * (2 * 4 * 16) * 50

    def test_sampling_charges_what_it_made(self, short_winded):
        lm, states = short_winded("llama", batch_size=4), random_states()
        ledgers = [Ledger() for _ in states]
        rows = lm.sample(states, 3, 8, seeds=range(6), ledgers=ledgers)
        for state, row, ledger in zip(states, rows, ledgers, strict=True):
            expected = lm.usage_bound(len(prefix(state)), [len(chunk) for chunk in row])
            bound = lm.usage_bound(len(prefix(state)), [8] * 3)
            assert ledger.usage.seconds > 0
            assert ledger.usage == expected + Usage(seconds=ledger.usage.seconds)
            assert ledger.usage.lm_flops <= bound.lm_flops

    def test_judging_and_features_are_charged_as_prefixes(self, tiny):
        lm, states = tiny("llama"), random_states([4, 6])
        judged, read = [Ledger(), Ledger()], [Ledger(), Ledger()]
        # A chunk's last token is judged, but does not go through the network.
        for run in (
            lambda: lm.logprobs(states, [Chunk((3, 4, 5)), Chunk((6,))], ledgers=judged),
            lambda: lm.features(states, ledgers=read),
        ):
            lm.clear_cache()
            run()
        for ledger, length in zip(judged + read, (6, 6, 4, 6), strict=True):
            assert ledger.usage.lm_flops == lm.usage_bound(length, []).lm_flops
            assert (ledger.usage.prompt_tokens, ledger.usage.generated_tokens) == (length, 0)
            assert ledger.usage.lm_calls == 1
            assert ledger.usage.seconds > 0


class TestLoading:
    def test_what_a_folder_tells(self, tiny, tokenizer):
        lm = tiny("qwen2")
        assert lm.name == "tiny-qwen2"
        assert lm.vocab_size == VOCAB_SIZE
        assert lm.stop_token_ids == {tokenizer.eos_token_id}
        assert not lm.model.training
        assert lm.model.dtype == torch.float32

    def test_a_name_of_ones_own(self, model_folder, tokenizer):
        assert TransformersLM(model_folder("llama"), name="mine").name == "mine"
        bare = transformers.AutoModelForCausalLM.from_config(make_config("llama", 1))
        assert TransformersLM(bare, tokenizer=tokenizer).name == "LlamaForCausalLM"

    def test_a_loaded_model_is_the_same_as_its_folder(self, tiny, model_folder, tokenizer):
        lm = tiny("gpt2")
        model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("gpt2"))
        states = random_states([4, 9])
        expected = lm.sample(states, 2, 6, seeds=[0, 1])
        for given in (tokenizer, HFTokenizer(tokenizer), str(model_folder("gpt2"))):
            other = TransformersLM(model, tokenizer=given)
            for i, (row, others) in enumerate(
                zip(expected, other.sample(states, 2, 6, seeds=[0, 1]), strict=True)
            ):
                for k in range(2):
                    assert_same_but_for_ties(lm, states[i], i, k, row[k], others[k])

    def test_a_folder_by_another_type(self, model_folder):
        assert TransformersLM(str(model_folder("gpt2"))).name == "tiny-gpt2"

    def test_a_loaded_model_without_tokenizer(self, tiny):
        with pytest.raises(ValueError, match=r"its tokenizer: pass TransformersLM\(model"):
            TransformersLM(tiny("llama").model)

    @pytest.mark.parametrize("dtype", ["int99", "nn", 8])
    def test_no_number_format(self, model_folder, dtype):
        with pytest.raises(ValueError, match=f"expected a torch.dtype, .* got {dtype!r}"):
            TransformersLM(model_folder("llama"), dtype=dtype)

    def test_a_batch_size_below_one(self, model_folder):
        with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
            TransformersLM(model_folder("llama"), batch_size=0)

    @pytest.mark.parametrize("factory", [TransformersLM, HFTokenizer])
    def test_a_folder_that_is_no_model(self, tmp_path, factory):
        (tmp_path / "notes.txt").write_text("nothing here")
        with pytest.raises(ModelLoadError, match="Expected the folder of a transformers causal"):
            factory(tmp_path)

    @pytest.mark.parametrize("factory", [TransformersLM, HFTokenizer])
    def test_a_missing_folder(self, tmp_path, factory):
        with pytest.raises(ModelLoadError, match=r"got .*missing.*needs no network"):
            factory(tmp_path / "missing")

    @pytest.mark.timeout(30)
    @pytest.mark.parametrize("factory", [TransformersLM, HFTokenizer])
    @pytest.mark.parametrize("name", ["nobody-here/no-such-model", "not a name", ""])
    def test_a_hub_name_without_network(self, monkeypatch, factory, name):
        # The variable is read when huggingface_hub is imported.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ModelLoadError, match="reachable or already downloaded") as caught:
            factory(name)
        assert repr(name) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_damaged_weights(self, tmp_path, tokenizer):
        save_model(tmp_path, make_config("llama", 1), tokenizer)
        (tmp_path / "model.safetensors").write_bytes(b"garbage" * 100)
        with pytest.raises(ModelLoadError, match="SafetensorError"):
            TransformersLM(tmp_path)

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_a_folder_without_tokenizer(self, tmp_path, tokenizer, family):
        save_model(tmp_path, make_config(family, 1), tokenizer)
        for path in tmp_path.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(ModelLoadError, match=r"no tokenizer files|Expected the folder"):
            TransformersLM(tmp_path)

    def test_models_without_a_cache_of_keys_and_values(self, tmp_path, tokenizer):
        """They would ignore the cache and go on from the last token alone."""
        config = transformers.RwkvConfig(
            vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16
        )
        save_model(tmp_path, config, tokenizer)
        with pytest.raises(ModelLoadError, match="RwkvForCausalLM keeps no key-value cache"):
            TransformersLM(tmp_path)

    def test_copies_share_the_engine(self, tiny):
        lm = tiny("llama")
        assert copy.deepcopy(lm) is lm
        assert copy.deepcopy({"lm": [lm]})["lm"][0] is lm


class TestHFTokenizer:
    def test_a_chat_goes_through_the_template(self, tokenizer):
        found = HFTokenizer(tokenizer)
        prompt = Prompt("p", (Message("system", "Be kind."), Message("user", "Where is the fox?")))
        ids = found.encode_prompt(prompt)
        assert tokenizer.decode(ids) == (
            "<|im_start|>system\nBe kind.<|im_end|>\n"
            "<|im_start|>user\nWhere is the fox?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert ids.count(tokenizer.eos_token_id) == 2
        assert all(isinstance(i, int) for i in ids)

    def test_plain_text_is_encoded_as_it_is(self, tokenizer, tiny):
        prompt = Prompt("p", "The quick brown fox")
        ids = tuple(tokenizer("The quick brown fox")["input_ids"])
        assert HFTokenizer(tokenizer).encode_prompt(prompt) == ids
        assert tiny("llama").encode_prompt(prompt) == ids

    def test_a_chat_without_a_template(self):
        bare = train_tokenizer()
        found = HFTokenizer(bare)
        with pytest.raises(ValueError, match=r"'p' is a chat, but .* no chat template.*chat=False"):
            found.encode_prompt(Prompt.from_text("The fox", "p"))
        assert found.encode_prompt(Prompt.from_text("The fox", "p", chat=False))

    def test_text_without_tokens(self):
        dropping = train_tokenizer()
        dropping.backend_tokenizer.normalizer = normalizers.Replace("~", "")
        with pytest.raises(ValueError, match=r"'p' has no tokens: '~'"):
            HFTokenizer(dropping).encode_prompt(Prompt("p", "~"))

    def test_decoding_leaves_special_tokens_out_and_spaces_alone(self, tokenizer):
        found = HFTokenizer(tokenizer)
        text = "The fox , they say ,\n does n't jump ."
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert found.decode(ids) == text
        assert found.decode([]) == ""

    def test_any_text_comes_back(self, tokenizer):
        text = "Grüße, 世界! 🦊\t\n end"
        assert HFTokenizer(tokenizer).decode(tokenizer(text)["input_ids"]) == text

    def test_a_prompt_must_leave_room(self, tiny, model_folder, tokenizer):
        lm = tiny("llama")
        word = " the"
        assert len(tokenizer(word)["input_ids"]) == 1
        loaded = TransformersLM(lm.model, tokenizer=tokenizer)
        for found in (lm, HFTokenizer(model_folder("llama")), loaded):
            assert found.context_length == CONTEXT_LENGTH
            assert len(found.encode_prompt(Prompt("p", word * (CONTEXT_LENGTH - 1)))) == 95
            with pytest.raises(PromptTooLongError, match=r"'p' has 96 tokens, but .* holds 96"):
                found.encode_prompt(Prompt("p", word * CONTEXT_LENGTH))

    def test_a_token_that_the_model_does_not_know(self, tiny, tokenizer):
        larger = copy.deepcopy(tokenizer)
        larger.add_tokens([f"zyzzyva{i}" for i in range(10, 40)])
        lm = TransformersLM(tiny("llama").model, tokenizer=larger)
        assert len(larger) > lm.vocab_size
        assert lm.encode_prompt(Prompt("p", "The fox"))
        with pytest.raises(UnknownTokenError, match=r"'p7'.*'zyzzyva39'.*only has the tokens 0 to"):
            lm.encode_prompt(Prompt.from_text("The zyzzyva39", "p7"))

    def test_a_shorter_context_of_ones_own(self, tiny, tokenizer):
        lm = TransformersLM(
            tiny("llama").model, tokenizer=HFTokenizer(tokenizer, context_length=12)
        )
        assert lm.context_length == 12
        [[chunk]] = lm.sample(random_states([10]), 1, 9, seeds=[0])
        assert (len(chunk), chunk.finish_reason) == (2, "length")

    def test_stop_tokens_of_tokenizer_and_generation_config(self, tmp_path, tokenizer):
        save_model(tmp_path, make_config("llama", 7), tokenizer)
        generation = transformers.GenerationConfig(eos_token_id=[7, 9])
        generation.save_pretrained(tmp_path)
        expected = {tokenizer.eos_token_id, 7, 9}
        assert HFTokenizer(tmp_path).stop_token_ids == expected
        assert TransformersLM(tmp_path).stop_token_ids == expected
        (tmp_path / "generation_config.json").unlink()
        expected = {tokenizer.eos_token_id, 7}
        assert HFTokenizer(tmp_path).stop_token_ids == expected
        assert TransformersLM(tmp_path).stop_token_ids == expected
        assert HFTokenizer(tmp_path, stop_token_ids=[3]).stop_token_ids == {3}
        assert HFTokenizer(tokenizer).stop_token_ids == {tokenizer.eos_token_id}

    def test_the_vocabulary_is_the_models(self, tmp_path, tokenizer):
        """Models pad their output layer beyond the tokenizer's ids."""
        save_model(tmp_path, make_config("llama", 1), tokenizer)
        small = train_tokenizer(chat_template=CHAT_TEMPLATE)
        assert HFTokenizer(small).vocab_size == len(small) == VOCAB_SIZE
        config = make_config("llama", 1)
        config.vocab_size = VOCAB_SIZE + 20
        save_model(tmp_path / "padded", config, small)
        lm = TransformersLM(tmp_path / "padded")
        assert lm.vocab_size == HFTokenizer(tmp_path / "padded").vocab_size == VOCAB_SIZE + 20
        assert lm.decode([VOCAB_SIZE + 5]) == ""

    def test_copies_are_shared(self, tokenizer):
        found = HFTokenizer(tokenizer)
        assert copy.deepcopy(found) is found


QUESTIONS = [
    "Why is the sky blue?",
    "Name one colour.",
    "Write a sentence about the sea and a very long journey across it in an old wooden boat.",
    "Hi",
    "What is 2+2? Answer with one number.",
    "List three uses of a brick, and say for each who would use it and when.",
    "Translate 'good morning' into French.",
    "Tell me a short story about a fox.",
]


@pytest.fixture(scope="module")
def questions(smollm2: Any) -> list[TextState]:
    prompts = [Prompt.from_text(text) for text in QUESTIONS]
    return [TextState(prompt, smollm2.encode_prompt(prompt)) for prompt in prompts]


class TestSmolLM2:
    def test_greedy_is_that_of_generate(self, smollm2):
        prompts = load_prompts(split="test")[:32]
        questions = [TextState(prompt, smollm2.encode_prompt(prompt)) for prompt in prompts]
        rows = smollm2.sample(questions, 1, 16, seeds=[0] * 32, params=GREEDY)
        asked = {"input_ids": [list(state.prompt_ids) for state in questions]}
        tokenizer = embedded_tokenizer().tokenizer
        padded = tokenizer.pad(asked, padding_side="left", return_tensors="pt")
        out = smollm2.model.generate(**padded, do_sample=False, max_new_tokens=16)
        width = padded["input_ids"].shape[1]
        for (chunk,), ids in zip(rows, out[:, width:].tolist(), strict=True):
            assert chunk.token_ids == tuple(ids[: len(chunk)])
            assert len(chunk) == 16 or chunk.token_ids[-1] in smollm2.stop_token_ids
        for state, (chunk,) in zip(questions[:3], rows, strict=False):
            expected = plain_logprobs(smollm2, state, chunk)
            np.testing.assert_allclose(chunk.logprobs, expected, atol=1e-3)

    def test_a_batch_is_its_states_one_by_one(self, smollm2, questions):
        batch = smollm2.sample(questions, 2, 8, seeds=range(8))
        for i in (2, 3):
            alone = smollm2.sample([questions[i]], 2, 8, seeds=[i])[0]
            for k in range(2):
                assert_same_but_for_ties(smollm2, questions[i], i, k, batch[i][k], alone[k])

    def test_the_chat_template_is_applied(self, smollm2, questions):
        tokenizer = embedded_tokenizer()
        text = tokenizer.tokenizer.decode(questions[3].prompt_ids)
        assert text.startswith("<|im_start|>system\n")
        assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        plain = Prompt.from_text("Hi", chat=False)
        assert len(smollm2.encode_prompt(plain)) == 1
        assert tokenizer.encode_prompt(plain) == smollm2.encode_prompt(plain)
        assert tokenizer.encode_prompt(questions[3].prompt) == questions[3].prompt_ids

    def test_the_stop_token_ends_a_response(self, smollm2, questions):
        [[chunk]] = smollm2.sample([questions[4]], 1, 40, seeds=[0], params=GREEDY)
        assert chunk.finish_reason == "stop"
        assert len(chunk) < 20
        assert smollm2.stop_token_ids == {chunk.token_ids[-1]}
        assert smollm2.decode(chunk.token_ids) == smollm2.decode(chunk.token_ids[:-1])
        assert "4" in smollm2.decode(chunk.token_ids)

    def test_what_it_is(self, smollm2):
        assert smollm2.name == "SmolLM2-135M-Instruct"
        assert smollm2.num_parameters == 134_515_008
        assert smollm2.vocab_size == 49_152
        assert smollm2.context_length == 8192
        assert smollm2.feature_size == 576
        tokenizer = embedded_tokenizer()
        assert tokenizer.vocab_size == smollm2.vocab_size
        assert tokenizer.stop_token_ids == smollm2.stop_token_ids
        assert tokenizer.context_length == smollm2.context_length


class TestTrialFile:
    @pytest.fixture
    def trials(self, monkeypatch):
        """How often a model was tried."""
        made = []
        tried = loading._Trial

        def counted(*arguments):
            made.append(arguments)
            return tried(*arguments)

        monkeypatch.setattr(loading, "_Trial", counted)
        return made

    def test_what_was_right_is_not_tried_again(self, model_folder, tmp_path, trials):
        file = tmp_path / "trials.json"
        lms = [TransformersLM(model_folder("llama"), trial_file=file) for _ in range(2)]
        assert len(trials) == 1
        rows = [lm.sample([initial(Prompt.from_text("tea"), lm)], 2, 4, seeds=[0]) for lm in lms]
        assert rows[0] == rows[1]

    @pytest.mark.parametrize("text", ["", "{", "{}", '["0123456789abcdef"]'])
    def test_other_circumstances_and_damage_are_tried(self, text, model_folder, tmp_path, trials):
        (tmp_path / "trials.json").write_text(text, encoding="utf-8")
        TransformersLM(model_folder("llama"), trial_file=tmp_path / "trials.json")
        assert len(trials) == 1

    def test_another_format_is_tried(self, model_folder, tmp_path, trials):
        for dtype in (torch.float32, torch.bfloat16):
            TransformersLM(model_folder("llama"), trial_file=tmp_path / "t.json", dtype=dtype)
        assert len(trials) == 2

    def test_another_model_is_tried(self, model_folder, tmp_path, trials):
        for family in ("llama", "qwen3"):
            TransformersLM(model_folder(family), trial_file=tmp_path / "t.json")
        assert len(trials) == 2

    def test_a_model_that_is_loaded_already_is_tried(self, tiny, tmp_path, trials):
        lm = tiny("llama")
        trials.clear()
        for _ in range(2):
            TransformersLM(lm.model, tokenizer=lm._tokenizer, trial_file=tmp_path / "t.json")
        assert len(trials) == 2

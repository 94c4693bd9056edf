"""The engine with its prefix cache against plain forward passes, on tiny random models."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbrl_text_env.language_models import SamplingParams, TransformersLM, engine
from mbrl_text_env.language_models.base import SampleRequest, stream
from mbrl_text_env.language_models.hf_tokenizer import ModelLoadError
from mbrl_text_env.types import Chunk, Ledger, Prompt, TextState, Usage
from tests.language_models.conftest import VOCAB_SIZE, make_config, save_model
from tests.language_models.test_transformers_lm import (
    GREEDY,
    assert_same_but_for_ties,
    plain_logits,
    plain_logprobs,
    prefix,
    random_states,
)

CACHED = ("llama", "qwen2", "qwen3", "gemma3", "gpt2")
ALL = (*CACHED, "lfm2")

Make = Callable[..., TransformersLM]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make(tiny: Callable[[str], TransformersLM]) -> Make:
    """Another engine on the tiny model of a family; `kv_tokens` is `kv_bytes` in tokens."""

    def engine(family: str, *, kv_tokens: int | None = None, **options: object) -> TransformersLM:
        base = tiny(family)
        if kv_tokens is not None:
            options["kv_bytes"] = kv_tokens * token_bytes(base)
        return TransformersLM(base.model, tokenizer=base._tokenizer, **options)

    return engine


@pytest.fixture
def trainable(model_folder: Callable[[str], Path]) -> Make:
    """An engine on weights of its own, which a test may change."""

    def engine(family: str, **options: object) -> TransformersLM:
        return TransformersLM(model_folder(family), **options)

    return engine


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tokenizer) -> Path:
    config = make_config(
        "llama", tokenizer.eos_token_id, hidden_size=64, intermediate_size=128, head_dim=16
    )
    config.initializer_range = 0.1
    return save_model(tmp_path_factory.mktemp("wide"), config, tokenizer)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model_folder) -> Path:
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    adapted.save_pretrained(folder)
    return folder


def token_bytes(lm: TransformersLM) -> int:
    return 1000 if lm._network is None else lm._network.shape.bytes_per_token


def state_of(ids: Sequence[int], name: str = "p") -> TextState:
    return TextState(Prompt(name, "text"), tuple(ids))


def child(state: TextState, ids: Sequence[int]) -> TextState:
    return TextState(state.prompt, state.prompt_ids, state.response_ids + tuple(ids))


def random_ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(2, VOCAB_SIZE, count).tolist())


def distinct_prefixes(sequences: Sequence[Sequence[int]]) -> int:
    return len({tuple(ids[:n]) for ids in sequences for n in range(1, len(ids) + 1)})


@torch.inference_mode()
def plain_features(lm: TransformersLM, state: TextState) -> np.ndarray:
    hidden = lm.model.base_model(torch.tensor([prefix(state)]), use_cache=False).last_hidden_state
    return hidden[0, -1].float().numpy()


def assert_right(lm: TransformersLM, states: Sequence[TextState], seed: int = 0) -> None:
    """Everything that is asked of the states is what plain forward passes say."""
    chunks = [Chunk(random_ids(1 + (seed + i) % 4, seed + i)) for i in range(len(states))]
    judged, top = lm.logprobs(states, chunks), lm.next_tokens(states, 5)
    features = lm.features(states)
    for i, state in enumerate(states):
        expected = plain_logprobs(lm, state, chunks[i])
        np.testing.assert_allclose(judged[i], expected, atol=1e-4)
        logs = plain_logits(lm, prefix(state))[-1].log_softmax(-1)
        np.testing.assert_allclose(top[i].logprobs, logs.topk(5).values, atol=1e-4)
        np.testing.assert_allclose(top[i].logprobs, logs[list(top[i].token_ids)], atol=1e-4)
        np.testing.assert_allclose(features[i], plain_features(lm, state), atol=1e-4)


def assert_same_rows(
    lm: TransformersLM,
    states: Sequence[TextState],
    seeds: Sequence[int],
    rows: Sequence[Sequence[Chunk]],
    others: Sequence[Sequence[Chunk]],
) -> None:
    for state, seed, row, other in zip(states, seeds, rows, others, strict=True):
        for k, (a, b) in enumerate(zip(row, other, strict=True)):
            assert_same_but_for_ties(lm, state, seed, k, a, b)


walks = st.lists(
    st.tuples(
        st.sampled_from(["expand", "expand", "fork", "back", "drop", "judge"]),
        st.integers(0, 10**6),
        st.integers(1, 4),
    ),
    min_size=4,
    max_size=10,
)


class TestCache:
    @pytest.mark.parametrize("family", ALL)
    @settings(
        max_examples=4,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(
        walk=walks,
        kv_tokens=st.sampled_from([40, 160, 600]),
        batch_size=st.sampled_from([1, 3, 8]),
    )
    def test_a_walk_over_a_tree_is_that_without_a_cache(
        self, make, family, walk, kv_tokens, batch_size
    ):
        lm = make(family, batch_size=batch_size, kv_tokens=kv_tokens)
        plain = make(family, batch_size=batch_size, prefix_cache=False)
        roots = [state_of(random_ids(n, n), f"p{n}") for n in (3, 11, 17)]
        tree = list(roots)
        for kind, number, count in walk:
            chosen = [tree[(number + i * 7) % len(tree)] for i in range(count)]
            if kind == "back":
                chosen = roots[:count]
            if kind == "drop" and len(tree) > 4:
                del tree[3 + number % (len(tree) - 3)]
            elif kind == "judge":
                assert_right(lm, chosen, number)
            else:
                chosen = list(dict.fromkeys(s for s in chosen if len(prefix(s)) < 80))
                if not chosen:
                    continue
                seeds = [number + i for i in range(len(chosen))]
                samples = 3 if kind == "fork" else 1
                rows = lm.sample(chosen, samples, 4, seeds=seeds)
                others = plain.sample(chosen, samples, 4, seeds=seeds)
                assert_same_rows(lm, chosen, seeds, rows, others)
                for state, row in zip(chosen, rows, strict=True):
                    expected = plain_logprobs(lm, state, row[0])
                    np.testing.assert_allclose(row[0].logprobs, expected, atol=1e-4)
                    for chunk in row:
                        if chunk.finish_reason is None:
                            tree.append(child(state, chunk.token_ids))
            assert lm.cached_bytes <= lm.kv_bytes // 2
            assert plain.cached_bytes == 0

    @pytest.mark.parametrize("family", CACHED)
    def test_the_cache_stays_within_its_bound(self, make, family, monkeypatch):
        lm = make(family, batch_size=4, kv_tokens=120)
        insert, seen = lm._cache.insert, []

        def watched(*args):
            insert(*args)
            seen.append(lm.cached_bytes)

        monkeypatch.setattr(lm._cache, "insert", watched)
        for seed in range(6):
            states = [state_of(random_ids(12, 50 * seed + i), f"p{i}") for i in range(4)]
            lm.sample(states, 2, 8, seeds=range(4))
            size = sum(x.nbytes for x in (*lm._kv.groups, lm._kv.hidden))
            assert size <= lm.kv_bytes // 2
        assert max(seen) <= lm.kv_bytes // 2
        assert max(seen) >= lm.kv_bytes // 3
        assert lm.cache_stats.evicted_tokens > 100

    @pytest.mark.parametrize("family", CACHED)
    def test_the_tokens_that_it_can_keep(self, make, family):
        """Half of the bytes are for prefixes: 20 tokens of 40, or of 41."""
        assert [make(family, kv_tokens=n).cache_tokens for n in (80, 40, 41, 1)] == [40, 20, 20, 0]
        lm, whole = make(family, kv_tokens=40), state_of(random_ids(20, 1))
        lm.features([whole])
        assert lm.cached_bytes == lm.cache_tokens * token_bytes(lm)
        kept = []
        for seed in range(12):
            lm.features([state_of(random_ids(3 + seed, 100 + seed))])
            kept.append(lm.cached_bytes // token_bytes(lm))
        assert 10 < max(kept) <= lm.cache_tokens
        lm.clear_cache()
        lm.features([state_of(random_ids(21, 2))])
        assert lm.cached_bytes == 0

    def test_without_a_cache_no_tokens_are_kept(self, make):
        assert make("llama", kv_bytes=2**31).cache_tokens == 2**30 // token_bytes(make("llama"))
        assert make("llama", prefix_cache=False).cache_tokens == 0
        assert make("lfm2").cache_tokens == 0

    @pytest.mark.parametrize(("free", "kv_bytes"), [(2**30, 2**28), (2**40, 2**32)])
    def test_by_default_it_is_a_quarter_of_free_memory_and_at_most_4_gib(
        self, make, monkeypatch, free, kv_bytes
    ):
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
        lm = make("llama")
        assert lm.kv_bytes == kv_bytes
        assert lm.cache_tokens == kv_bytes // 2 // token_bytes(lm)

    @pytest.mark.parametrize("family", CACHED)
    def test_a_second_call_computes_one_token(self, make, family):
        lm, state = make(family), state_of(random_ids(20, 1))
        ledgers = [Ledger() for _ in range(4)]
        [[chunk]] = lm.sample([state], 1, 8, seeds=[0], params=GREEDY, ledgers=ledgers[:1])
        assert chunk.finish_reason is None
        longer = child(state, chunk.token_ids)
        lm.sample([longer], 3, 8, seeds=[0], ledgers=ledgers[1:2])
        lm.sample([longer], 3, 8, seeds=[1], ledgers=ledgers[2:3])
        lm.features([longer], ledgers=ledgers[3:])
        found = [(x.usage.prompt_tokens, x.usage.cached_tokens) for x in ledgers]
        assert found == [(20, 0), (1, 27), (0, 28), (0, 28)]

    def test_features_take_no_pass_of_their_own(self, make, monkeypatch):
        lm, states = make("llama"), random_states()
        forward, passes = lm._network.forward, []
        monkeypatch.setattr(
            lm._network, "forward", lambda ids, *rest: passes.append(ids) or forward(ids, *rest)
        )
        rows = lm.sample(states, 2, 5, seeds=range(6))
        passes.clear()
        found = lm.features(states)
        top = lm.next_tokens(states, 3)
        assert not passes
        for state, row, next_tokens in zip(states, found, top, strict=True):
            np.testing.assert_allclose(row, plain_features(lm, state), atol=1e-4)
            assert len(next_tokens.token_ids) == 3
        children = [child(s, r[0].token_ids) for s, r in zip(states, rows, strict=True)]
        lm.features(children)
        assert sum(ids.numel() for ids in passes) <= 6, "the last token of each"

    def test_clearing(self, make):
        lm, state, ledger = make("llama"), state_of(random_ids(20, 1)), Ledger()
        lm.features([state])
        assert lm.cached_bytes == 20 * token_bytes(lm)
        lm.clear_cache()
        assert lm.cached_bytes == 0
        lm.features([state], ledgers=[ledger])
        assert ledger.usage.prompt_tokens == 20
        assert lm.cache_stats.hit_tokens == 0

    def test_a_beam_that_drops_and_forks_hits_it(self, make):
        lm, ledgers = make("qwen3"), []
        beam = [state_of(random_ids(16, 5))]
        for depth in range(6):
            ledgers += [Ledger() for _ in beam]
            now = ledgers[-len(beam) :]
            rows = lm.sample(beam, 3, 8, seeds=[depth] * len(beam), ledgers=now)
            grown = [
                child(s, c.token_ids)
                for s, row in zip(beam, rows, strict=True)
                for c in row
                if c.finish_reason is None
            ]
            beam = sorted(grown, key=lambda s: s.response_ids)[::2][:4]
            assert beam
        assert ledgers[0].usage.prompt_tokens == 16
        assert [x.usage.prompt_tokens for x in ledgers[1:]] == [1] * (len(ledgers) - 1)
        assert_right(lm, beam)

    def test_a_tree_search_computes_hardly_more_than_the_tree(self, tmp_path, tokenizer):
        config = make_config(
            "llama", tokenizer.eos_token_id, max_position_embeddings=256, hidden_size=16, head_dim=4
        )
        config.num_hidden_layers = 1
        lm = TransformersLM(save_model(tmp_path, config, tokenizer))
        generator, root = np.random.default_rng(0), state_of(random_ids(40, 8))
        open_states, everything, prompt_tokens = {root: 0}, [prefix(root)], 0
        for number in range(512):
            options = list(open_states)
            state = options[int(generator.integers(len(options)))]
            ledger = Ledger()
            [[chunk]] = lm.sample([state], 1, 16, seeds=[number], ledgers=[ledger])
            prompt_tokens += ledger.usage.prompt_tokens
            new = child(state, chunk.token_ids)
            everything.append(prefix(new))
            if chunk.finish_reason is None and open_states[state] < 11:
                open_states[new] = open_states[state] + 1
        assert max(open_states.values()) >= 10
        distinct = distinct_prefixes(everything)
        assert distinct > 5000
        assert prompt_tokens <= 1.1 * distinct
        assert prompt_tokens <= 40 + 511, "the root once, and the last token of each parent"
        sample = [options[i] for i in generator.integers(len(options), size=6)]
        assert_right(lm, sample)


class TestDecoding:
    def requests(self) -> list[SampleRequest]:
        kinds = [
            SamplingParams(),
            SamplingParams(0.7, 0.9),
            GREEDY,
            SamplingParams(1.5, 1.0, 5),
        ]
        lengths = (1, 60, 4, 33, 12, 2, 47, 5, 20)
        return [
            SampleRequest(
                state,
                num_samples=1 + i % 4,
                max_new_tokens=1 + (7 * i) % 17,
                seed=i,
                first_sample=i % 3,
                params=kinds[i % 4],
            )
            for i, state in enumerate(random_states(lengths))
        ]

    @pytest.mark.parametrize("family", ALL)
    @pytest.mark.parametrize("batch_size", [1, 3, 8])
    def test_requests_together_are_those_one_at_a_time(self, make, family, batch_size):
        lm = make(family, batch_size=batch_size)
        alone, requests = make(family, prefix_cache=False), self.requests()
        ledgers = [Ledger() for _ in requests]
        rows = lm.sample_requests(requests, ledgers=ledgers)
        for request, row, ledger in zip(requests, rows, ledgers, strict=True):
            [expected] = alone.sample_requests([request])
            assert len(row) == request.num_samples
            assert ledger.usage.generated_tokens == sum(map(len, row))
            assert ledger.usage.lm_calls == 1
            for k, (a, b) in enumerate(zip(row, expected, strict=True)):
                if request.params.is_plain:
                    place = request.first_sample + k
                    assert_same_but_for_ties(lm, request.state, request.seed, place, a, b)
                else:
                    assert a.token_ids == b.token_ids
                np.testing.assert_allclose(
                    a.logprobs, plain_logprobs(lm, request.state, a), atol=1e-4
                )

    @pytest.mark.parametrize("family", CACHED)
    @pytest.mark.parametrize("kv_tokens", [1, 130])
    def test_memory_for_one_row_alone(self, make, family, kv_tokens):
        """With less than that a sequence is decoded all the same."""
        lm, whole = make(family, batch_size=8, kv_tokens=kv_tokens), make(family)
        states, seeds = random_states([40, 30, 50]), [1, 2, 3]
        rows = lm.sample(states, 3, 9, seeds=seeds)
        assert lm._kv.allocated[0] == 1
        assert lm.cached_bytes <= lm.kv_bytes // 2
        assert_same_rows(lm, states, seeds, rows, whole.sample(states, 3, 9, seeds=seeds))
        assert_right(lm, states)

    @pytest.mark.parametrize("family", CACHED)
    def test_long_prefixes_take_several_passes(self, make, family, monkeypatch):
        expected = make(family)
        states, seeds = random_states([70, 3, 41, 40, 17, 16, 1]), range(7)
        others = expected.sample(states, 2, 6, seeds=seeds)
        monkeypatch.setattr(engine, "_PASS_TOKENS", 16)
        lm, widths = make(family, batch_size=8), []
        forward = lm._network.forward
        monkeypatch.setattr(
            lm._network, "forward", lambda ids, *rest: widths.append(ids) or forward(ids, *rest)
        )
        assert_right(lm, states)
        assert max(ids.numel() for ids in widths) <= 16
        lm.clear_cache()
        assert_same_rows(lm, states, seeds, lm.sample(states, 2, 6, seeds=seeds), others)

    @pytest.mark.parametrize("family", ALL)
    def test_threads_at_once_get_the_right_chunks(self, make, family):
        lm, alone = make(family, batch_size=3, kv_tokens=300), make(family, prefix_cache=False)
        states, found = random_states(), {}

        def run(i: int) -> None:
            found[i] = lm.sample([states[i], states[i - 1]], 2, 6, seeds=[i, i + 9])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(6):
            pair, seeds = [states[i], states[i - 1]], [i, i + 9]
            assert_same_rows(lm, pair, seeds, found[i], alone.sample(pair, 2, 6, seeds=seeds))


class TestCharges:
    @pytest.mark.parametrize("family", CACHED)
    def test_shared_stems_are_computed_once(self, make, family):
        stem, other = random_ids(24, 1), random_ids(9, 2)
        deep = stem + random_ids(10, 3)
        tails = [random_ids(n, 10 + n) for n in (1, 3, 5)]
        sequences = [s + t for s in (stem, other, deep) for t in tails]
        states = [state_of(ids, f"p{i}") for i, ids in enumerate(sequences)]
        for run in (
            lambda lm, x: lm.features(states, ledgers=x),
            lambda lm, x: lm.sample(states, 2, 4, seeds=range(9), ledgers=x),
        ):
            ledgers = [Ledger() for _ in states]
            run(make(family), ledgers)
            assert sum(x.usage.prompt_tokens for x in ledgers) == distinct_prefixes(sequences)

    @pytest.mark.parametrize("family", ALL)
    @settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        kv_tokens=st.sampled_from([1, 60, 120, 240, 2000]),
        batch_size=st.sampled_from([1, 3, 8]),
        samples=st.integers(1, 5),
        seed=st.integers(0, 1000),
    )
    def test_never_more_than_was_announced(
        self, make, family, kv_tokens, batch_size, samples, seed
    ):
        lm = make(family, kv_tokens=kv_tokens, batch_size=batch_size)
        stem = random_ids(12, seed)
        sequences = [stem[: 6 + n % 7] + random_ids(n, seed + n) for n in (1, 9, 2, 14, 5, 5)]
        states = [state_of(ids, f"p{i}") for i, ids in enumerate(sequences)]
        for turn in range(2):
            ledgers = [Ledger() for _ in states]
            rows = lm.sample(states, samples, 7, seeds=range(6), ledgers=ledgers)
            for ids, row, ledger in zip(sequences, rows, ledgers, strict=True):
                usage = ledger.usage
                bound = lm.usage_bound(len(ids), [len(chunk) for chunk in row])
                if family in CACHED:
                    assert usage.prompt_tokens + usage.cached_tokens == len(ids)
                assert usage.prompt_tokens <= bound.prompt_tokens
                assert usage.lm_flops <= bound.lm_flops * (1 + 1e-12)
                assert usage.generated_tokens == sum(map(len, row))
                if turn and kv_tokens == 2000 and family in CACHED:
                    assert usage.prompt_tokens == 0

    def test_what_is_cached_costs_its_attention_alone(self, make):
        lm, state = make("llama"), state_of(random_ids(20, 1))
        lm.features([state])
        ledger = Ledger()
        longer = child(state, (5, 6, 7))
        lm.features([longer], ledgers=[ledger])
        usage = ledger.usage
        expected = lm.usage_bound(23, []).lm_flops - lm.usage_bound(20, []).lm_flops
        assert usage == Usage(3, 20, lm_calls=1, lm_flops=expected, seconds=usage.seconds)


class TestTraining:
    def train(self, lm: TransformersLM) -> None:
        optimizer = torch.optim.SGD(lm.model.parameters(), lr=0.05)
        loss = lm.model(torch.tensor([random_ids(12, 4)]), use_cache=False).logits.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def replace(self, lm: TransformersLM) -> None:
        weights = {name: 1.1 * x for name, x in lm.model.state_dict().items()}
        lm.model.load_state_dict(weights)

    @pytest.mark.parametrize("change", ["train", "replace"])
    @pytest.mark.parametrize("family", ALL)
    def test_trained_weights_empty_the_cache(self, trainable, family, change):
        lm, states = trainable(family), random_states()
        before = lm.features(states)
        getattr(self, change)(lm)
        ledgers = [Ledger() for _ in states]
        after = lm.features(states, ledgers=ledgers)
        assert np.abs(after - before).max() > 1e-3
        assert [x.usage.prompt_tokens for x in ledgers] == [len(prefix(s)) for s in states]
        fresh = TransformersLM(lm.model, tokenizer=lm._tokenizer)
        np.testing.assert_allclose(after, fresh.features(states), atol=1e-5)
        assert_right(lm, states)
        rows = lm.sample(states, 2, 6, seeds=range(6))
        assert_same_rows(lm, states, range(6), rows, fresh.sample(states, 2, 6, seeds=range(6)))

    @pytest.mark.parametrize("change", ["train", "replace"])
    def test_8_bit_products_are_made_anew(self, trainable, change):
        lm, states = trainable("llama", dtype=torch.int8), random_states()
        before = lm.features(states)
        getattr(self, change)(lm)
        after = lm.features(states)
        assert np.abs(after - before).max() > 1e-3
        fresh = TransformersLM(lm.model, tokenizer=lm._tokenizer, dtype=torch.int8)
        np.testing.assert_array_equal(after, fresh.features(states))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
    def test_changes_behind_pytorchs_back_are_told(self, trainable, dtype):
        lm, states = trainable("llama", dtype=dtype), random_states()
        lm.features(states)
        for parameter in lm.model.parameters():
            parameter.data.mul_(1.1)
        lm.weights_changed()
        fresh = TransformersLM(lm.model, tokenizer=lm._tokenizer, dtype=dtype)
        np.testing.assert_array_equal(lm.features(states), fresh.features(states))

    def test_the_cache_is_kept_while_nothing_changes(self, trainable):
        lm, states, ledgers = trainable("llama"), random_states(), [Ledger() for _ in range(6)]
        lm.features(states)
        lm.model(torch.tensor([random_ids(5, 0)])).logits.sum().backward()
        lm.features(states, ledgers=ledgers)
        assert sum(x.usage.prompt_tokens for x in ledgers) == 0


class TestFormats:
    @pytest.mark.parametrize(("dtype", "near"), [(torch.int8, 0.1), (torch.bfloat16, 0.1)])
    def test_reduced_formats_stay_near_float32(self, wide, dtype, near):
        exact, lm = TransformersLM(wide), TransformersLM(wide, dtype=dtype)
        assert lm.dtype == dtype
        states = random_states([30, 5, 17, 40])
        chunks = [Chunk(random_ids(20, i)) for i in range(4)]
        for found, expected in zip(
            lm.logprobs(states, chunks), exact.logprobs(states, chunks), strict=True
        ):
            assert np.abs(np.subtract(found, expected)).max() < near
            assert found != expected
        [row] = lm.sample(states[:1], 4, 12, seeds=[3])
        for chunk in row:
            np.testing.assert_allclose(
                chunk.logprobs, plain_logprobs(exact, states[0], chunk), atol=near
            )
        assert lm.features(states).dtype == np.float32
        assert token_bytes(lm) <= token_bytes(exact)

    def test_8_bits_for_other_models_are_refused(self, model_folder):
        with pytest.raises(ValueError, match=r"int8 is for Llama.*GPT2LMHeadModel.*bfloat16"):
            TransformersLM(model_folder("gpt2"), dtype=torch.int8)

    @pytest.mark.parametrize("family", CACHED)
    def test_bfloat16_with_and_without_a_cache(self, model_folder, family):
        lm = TransformersLM(model_folder(family), dtype=torch.bfloat16, batch_size=3)
        states = random_states()
        rows = lm.sample(states, 2, 6, seeds=range(6))
        for state, row in zip(states, rows, strict=True):
            for chunk in row:
                expected = plain_logprobs(lm, state, chunk)
                np.testing.assert_allclose(chunk.logprobs, expected, atol=0.35)


class TestStopStrings:
    def test_a_chunk_ends_with_the_token_that_completes_the_text(self, make):
        lm, states = make("llama"), random_states()
        whole = [row[0] for row in lm.sample(states, 1, 20, seeds=range(6))]
        for i, (state, chunk) in enumerate(zip(states, whole, strict=True)):
            text = lm.decode(chunk.token_ids[:9])
            stop = text[-2:]
            ends = [n for n in range(1, 21) if stop in lm.decode(chunk.token_ids[:n])]
            params = SamplingParams(stop=("never to be found", stop))
            [[cut]] = lm.sample([state], 1, 20, seeds=[i], params=params)
            assert cut.token_ids == chunk.token_ids[: ends[0]]
            assert cut.finish_reason is None or cut.token_ids[-1] in lm.stop_token_ids
            np.testing.assert_allclose(cut.logprobs, chunk.logprobs[: len(cut)], atol=1e-5)
            [[other]] = lm.sample([state], 1, 20, seeds=[i], params=SamplingParams(stop=("@@@@",)))
            assert other.token_ids == chunk.token_ids
            assert other.finish_reason == chunk.finish_reason

    def test_the_response_goes_on_after_it(self, make):
        lm, [state] = make("llama"), random_states([6])
        [[chunk]] = lm.sample([state], 1, 10, seeds=[4])
        stop = lm.decode(chunk.token_ids[:3])
        lm.clear_cache()
        [[cut]] = lm.sample([state], 1, 10, seeds=[4], params=SamplingParams(stop=(stop,)))
        assert 1 <= len(cut) <= 3
        assert cut.finish_reason is None
        ledger = Ledger()
        lm.sample([child(state, cut.token_ids)], 1, 3, seeds=[0], ledgers=[ledger])
        assert ledger.usage.prompt_tokens == 1


class TestNextTokens:
    @pytest.mark.parametrize("family", ALL)
    def test_they_are_those_of_the_softmax(self, make, family):
        lm, states = make(family, batch_size=4), random_states()
        for k in (1, 7, VOCAB_SIZE):
            for state, found in zip(states, lm.next_tokens(states, k), strict=True):
                logs = plain_logits(lm, prefix(state))[-1].log_softmax(-1)
                assert len(set(found.token_ids)) == len(found.logprobs) == k
                np.testing.assert_allclose(found.logprobs, logs.topk(k).values, atol=1e-4)
                np.testing.assert_allclose(found.logprobs, logs[list(found.token_ids)], atol=1e-4)

    def test_charges_and_arguments(self, make):
        lm, states, ledgers = make("llama"), random_states([4, 9]), [Ledger(), Ledger()]
        lm.next_tokens(states, 3, ledgers=ledgers)
        assert [x.usage.prompt_tokens for x in ledgers] == [4, 9]
        assert [x.usage.lm_flops for x in ledgers] == [
            lm.usage_bound(n, []).lm_flops for n in (4, 9)
        ]
        assert lm.next_tokens([], 3) == []
        for k in (0, -1, VOCAB_SIZE + 1):
            with pytest.raises(ValueError, match=f"from 1 to {VOCAB_SIZE}, got {k}"):
                lm.next_tokens(states, k)
        ended = TextState(states[0].prompt, (3, 4), (1,), "stop")
        with pytest.raises(ValueError, match="has ended"):
            lm.next_tokens([ended], 3)

    def test_the_same_state_twice_is_computed_once(self, make):
        lm, [state], ledgers = make("llama"), random_states([9]), [Ledger(), Ledger()]
        first, second = lm.next_tokens([state, state], 3, ledgers=ledgers)
        assert first == second
        assert [x.usage.prompt_tokens for x in ledgers] == [9, 0]


class TestAdapters:
    def peft_logits(self, model_folder: Callable[[str], Path], adapter: Path, ids) -> torch.Tensor:
        from peft import PeftModel

        model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0]

    def test_it_is_pefts_own_model(self, make, model_folder, adapter):
        base, states = make("llama"), random_states()
        before = {name: x.clone() for name, x in base.model.state_dict().items()}
        lm = base.with_adapter(adapter)
        assert lm.name == f"{base.name}+mine"
        assert base.with_adapter(adapter, name="other").name == "other"
        assert base.model.state_dict().keys() == before.keys()
        for name, x in base.model.state_dict().items():
            assert torch.equal(x, before[name])
        for _ in range(2):
            assert_right(base, states)
            assert_right(lm, states)
        for state in states:
            logs = self.peft_logits(model_folder, adapter, prefix(state)).log_softmax(-1)[-1]
            [found] = lm.next_tokens([state], 5)
            np.testing.assert_allclose(found.logprobs, logs.topk(5).values, atol=1e-4)
            [other] = base.next_tokens([state], 5)
            assert np.abs(np.subtract(found.logprobs, other.logprobs)).max() > 1e-3

    @pytest.mark.parametrize("target", ["q_proj", "lm_head", "embed_tokens"])
    def test_on_tied_embeddings(self, target, tokenizer, tmp_path):
        """An adapter on one of two tied layers changes that one alone."""
        peft = pytest.importorskip("peft")
        config = make_config("llama", 0, tie_word_embeddings=True)
        folder = save_model(tmp_path / "base", config, tokenizer)
        wanted = peft.LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(folder), wanted
        )
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.3, generator=generator)
        adapted.save_pretrained(tmp_path / "adapter")
        base = TransformersLM(folder)
        lm, states = base.with_adapter(tmp_path / "adapter"), random_states()
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
        own = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
        for state, found in zip(states, lm.next_tokens(states, 5), strict=True):
            with torch.inference_mode():
                logs = own(torch.tensor([prefix(state)])).logits[0, -1].log_softmax(-1)
            np.testing.assert_allclose(found.logprobs, logs.topk(5).values, atol=1e-4)
        assert_right(base, states)

    def test_only_what_changes_is_held_twice(self, make, adapter):
        base = make("llama")
        lm = base.with_adapter(adapter)
        held = {p.data_ptr() for p in base.model.parameters()}
        own = {name for name, p in lm.model.named_parameters() if p.data_ptr() not in held}
        layers = range(base.model.config.num_hidden_layers)
        assert own == {
            f"model.layers.{i}.self_attn.{x}_proj.weight"
            for i, x in itertools.product(layers, "qv")
        }

    def test_it_notices_that_the_base_was_trained(self, trainable, adapter):
        base, states = trainable("llama"), random_states()
        lm = base.with_adapter(adapter)
        before = lm.features(states)
        with torch.no_grad():
            base.model.lm_head.weight.mul_(1.5)
            base.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        fresh = TransformersLM(lm.model, tokenizer=lm._tokenizer)
        assert np.abs(fresh.features(states) - before).max() > 1e-3
        np.testing.assert_allclose(lm.features(states), fresh.features(states), atol=1e-5)

    def test_an_adapter_of_another_model(self, make, adapter, tmp_path):
        with pytest.raises(ModelLoadError, match=r"Expected the folder of a peft adapter.*mine"):
            make("gpt2").with_adapter(adapter)
        with pytest.raises(ModelLoadError, match="Expected the folder of a peft adapter"):
            make("llama").with_adapter(tmp_path)

    def test_8_bits(self, trainable, adapter):
        base, states = trainable("llama", dtype=torch.int8), random_states()
        lm, exact = base.with_adapter(adapter), trainable("llama").with_adapter(adapter)
        assert lm.dtype == torch.int8
        chunks = [Chunk(random_ids(4, i)) for i in range(6)]
        for found, expected in zip(
            lm.logprobs(states, chunks), exact.logprobs(states, chunks), strict=True
        ):
            np.testing.assert_allclose(found, expected, atol=0.6)

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_a_loaded_model_of_peft(self, model_folder, adapter, tokenizer, dtype):
        from peft import PeftModel

        model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
        adapted = PeftModel.from_pretrained(model, str(adapter))
        lm, states = TransformersLM(adapted, tokenizer=tokenizer, dtype=dtype), random_states()
        for state, found in zip(states, lm.next_tokens(states, 5), strict=True):
            logs = self.peft_logits(model_folder, adapter, prefix(state)).log_softmax(-1)[-1]
            atol = 1e-4 if dtype is None else 0.3
            np.testing.assert_allclose(found.logprobs, logs.topk(5).values, atol=atol)


def test_streams_are_used_as_announced(make):
    """A chunk is the inverse of the cumulative distribution at its stream's numbers."""
    lm, [state] = make("llama"), random_states([8])
    [[chunk]] = lm.sample([state], 1, 5, seeds=[11], first_sample=2)
    numbers = stream(11, state, 2).random(5)
    for t, (token, number) in enumerate(zip(chunk.token_ids, numbers, strict=False)):
        logits = plain_logits(lm, prefix(state) + chunk.token_ids[:t])[-1].double()
        cumulative = logits.softmax(-1).cumsum(-1)
        assert int(torch.searchsorted(cumulative, number, right=True)) == token

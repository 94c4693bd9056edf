"""The measurements count what they say; how fast anything is, is not asserted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mbrl_text_env.benchmarks.studies import throughput
from mbrl_text_env.language_models import embedded
from mbrl_text_env.mdp import initial
from mbrl_text_env.prompts import load_prompts


@pytest.fixture(scope="module")
def prompts():
    return load_prompts(split="test")[:3]


@pytest.fixture
def calls(monkeypatch):
    """What is asked of transformers' `generate` and of the engine: sequences and tokens each."""
    monkeypatch.setattr(throughput, "PARTIAL_TOKENS", 3)
    monkeypatch.setattr(throughput, "CONTINUATION_TOKENS", 5)
    lm = embedded()
    lm.stop_token_ids = frozenset()
    made = {"generate": [], "engine": []}
    generate, sample = lm.model.generate, lm.sample

    def recorded_generate(**options):
        out = generate(**options)
        length = options["input_ids"].shape[1]
        made["generate"].append((len(out), out.shape[1] - length))
        return out

    def recorded_sample(*arguments, **options):
        rows = sample(*arguments, **options)
        made["engine"] += [(len(row), len(row[0])) for row in rows]
        return rows

    monkeypatch.setattr(lm.model, "generate", recorded_generate)
    monkeypatch.setattr(lm, "sample", recorded_sample)
    return lm, made


def test_both_ways_through_the_articles_workload_sample_the_same_tokens(calls, prompts):
    lm, made = calls
    assert throughput.article_procedure(lm, prompts[:2]) > 0
    assert throughput.article_workload(lm, prompts[:2]) > 0
    assert sorted(made["generate"]) == [(2, 5)] * 4 + [(4, 3)] * 2
    assert sorted(made["engine"]) == sorted(made["generate"])


def test_rates_by_batch_size_count_all_sequences(calls, prompts):
    lm, made = calls
    states = [initial(prompt, lm) for prompt in prompts]
    assert throughput.generate_rate(lm, states, 2) > 0
    assert throughput.engine_rate(lm, states, 2) > 0
    assert made == {"generate": [(3, 2)], "engine": [(1, 2)] * 3}


@pytest.mark.parametrize("dtype", throughput.DTYPES.values(), ids=str)
def test_the_limit_is_that_of_all_products(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
    lm = SimpleNamespace(model=model, device="cpu")
    assert throughput.product_limit(lm, dtype, 17, 1) > 0


def test_a_server_samples_as_many(smollm2, prompts):
    pytest.importorskip("xllamacpp")
    states = [initial(prompt, smollm2) for prompt in prompts]
    with throughput.llama_server(parallel=2, context=1024, threads=1) as url:
        assert throughput.server_rate(url, states, 3) > 0

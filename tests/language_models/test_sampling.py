"""Tokens from logits, on a vocabulary that is no multiple of the blocks that are summed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation.logits_process import TopPLogitsWarper

from mbrl_text_env.language_models import SamplingParams
from mbrl_text_env.language_models.engine import draw, top_tokens

SIZE = 1301
DRAWS = 8000
LAST = float(np.nextafter(1.0, 0.0))

SHAPES = [
    SamplingParams(temperature, top_p, top_k)
    for temperature in (0.5, 1.0, 1.5)
    for top_p, top_k in ((1.0, 0), (0.9, 0), (1.0, 40), (0.8, 200), (0.97, 1000))
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_logits(rows: int = 1, size: int = SIZE, scale: float = 1.5, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def make_uniforms(count: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(count))


def exact(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """float64[V]: the distribution that tokens should be drawn from, by sorting."""
    scaled = logits.double().numpy() / params.temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-weights, kind="stable")
    if params.top_k:
        weights[order[params.top_k :]] = 0
    before = np.cumsum(weights[order]) / weights.sum() - weights[order] / weights.sum()
    weights[order[(before >= params.top_p) & (np.arange(len(order)) > 0)]] = 0
    return weights / weights.sum()


def many(logits: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Tokens of one row's logits for many numbers, in pieces that fit into memory."""
    parts = uniforms.split(500)
    return torch.cat([draw(logits.expand(len(part), -1), part, params)[0] for part in parts])


def p_value(observed: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-square, with the tokens that should come less than five times in bins of their own."""
    expected = probabilities * observed.sum()
    order = np.argsort(-expected)
    observed, expected = observed[order], expected[order]
    often = int((expected >= 5).sum())
    # The rest in bins of about 20 each, so that a mistake in the tail shows too.
    edges = np.floor(np.cumsum(expected[often:]) / 20).astype(int)
    bins = [np.bincount(edges, weights=x[often:]) for x in (observed, expected)] if often else []
    if len(bins[0]) > 1:
        bins = [np.append(x[:-2], x[-2:].sum()) for x in bins]
    counts = [np.append(x[:often], y) for x, y in zip((observed, expected), bins, strict=True)]
    kept = counts[1] > 0
    assert kept.sum() >= 2
    assert counts[0][~kept].sum() == 0
    return float(stats.chisquare(counts[0][kept], counts[1][kept]).pvalue)


@pytest.mark.parametrize("params", SHAPES, ids=str)
def test_frequencies_are_those_of_the_exact_softmax(params):
    logits = make_logits()
    probabilities = exact(logits[0], params)
    tokens = many(logits, make_uniforms(DRAWS), params)
    observed = np.bincount(tokens.numpy(), minlength=SIZE)
    assert observed[probabilities == 0].sum() == 0
    assert p_value(observed, probabilities) > 0.001


def test_the_chi_square_test_would_notice():
    logits = make_logits()
    wrong = np.bincount(
        many(logits, make_uniforms(DRAWS), SamplingParams(1.2)).numpy(), minlength=SIZE
    )
    assert p_value(wrong, exact(logits[0], SamplingParams())) < 0.001


@pytest.mark.parametrize("params", SHAPES, ids=str)
def test_evenly_spaced_numbers_give_the_probabilities(params):
    logits = make_logits(seed=4)
    uniforms = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    tokens = many(logits, uniforms, params)
    assert torch.equal(tokens, tokens.sort().values)
    observed = np.bincount(tokens.numpy(), minlength=SIZE) / 3000
    np.testing.assert_allclose(observed, exact(logits[0], params), atol=4e-4)


@pytest.mark.parametrize("top_p", [0.6, 0.9, 0.999])
def test_a_nucleus_of_more_than_512_tokens(top_p):
    """Every token once, by the number in the middle of its share."""
    params, logits = SamplingParams(top_p=top_p), make_logits(scale=0.3, seed=2)
    probabilities = exact(logits[0], params)
    kept = np.flatnonzero(probabilities)
    warped = TopPLogitsWarper(top_p)(torch.zeros(1, 1), logits)[0].isfinite().numpy()
    assert len(kept) > 512
    assert abs(int(warped.sum()) - len(kept)) <= 1
    middles = np.cumsum(probabilities[kept]) - probabilities[kept] / 2
    assert many(logits, torch.from_numpy(middles), params).tolist() == kept.tolist()


@pytest.mark.parametrize("size", [5003, 49_152])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.5, 1.0, 300)], ids=str)
def test_every_token_of_a_large_vocabulary_has_its_share(size, params):
    logits = make_logits(size=size, scale=1.0, seed=3)
    probabilities = exact(logits[0], params)
    places = np.random.default_rng(0).choice(np.flatnonzero(probabilities), 250)
    middles = (np.cumsum(probabilities) - probabilities / 2)[places]
    assert many(logits, torch.from_numpy(middles), params).tolist() == places.tolist()


def test_a_large_nucleus_in_one_row_changes_no_other_row():
    params = SamplingParams(top_p=0.9)
    sharp, flat = make_logits(3, scale=4.0), make_logits(3, scale=0.2, seed=9)
    uniforms = make_uniforms(6)
    together, _ = draw(torch.cat([sharp, flat]), uniforms, params)
    apart = [draw(x, u, params)[0] for x, u in zip((sharp, flat), uniforms.split(3), strict=True)]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1024, 1025, SIZE])
@pytest.mark.parametrize("params", [SamplingParams(0), *SHAPES[:5]], ids=str)
def test_memory_to_work_in_changes_nothing(size, params):
    logits, uniforms = make_logits(7, size), make_uniforms(7)
    before = logits.clone()
    expected = draw(logits, uniforms, params)
    scratch = torch.full((7, size), torch.nan)
    found = draw(logits, uniforms, params, scratch)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(logits, before)
    again = draw(logits, uniforms, params, scratch)
    assert torch.equal(again[0], expected[0])


def test_log_probabilities_are_those_of_the_unshaped_distribution():
    logits, uniforms = make_logits(50), make_uniforms(50)
    logs = logits.double().log_softmax(-1)
    for params in (*SHAPES, SamplingParams(0)):
        tokens, logprobs = draw(logits, uniforms, params)
        chosen = logs.gather(-1, tokens[:, None]).squeeze(-1)
        torch.testing.assert_close(logprobs.double(), chosen, atol=1e-5, rtol=1e-6)


number = st.one_of(
    st.just(-np.inf),
    st.floats(-200, 200, width=32),
    st.sampled_from([0.0, 1.0, -80.0, 100.0, -1e30, 1e30]),
)


@settings(max_examples=200)
@given(
    few=st.lists(number, min_size=1, max_size=12).filter(lambda row: max(row) > -np.inf),
    size=st.sampled_from([12, 128, 130, 1400]),
    uniform=st.one_of(st.just(0.0), st.just(LAST), st.floats(0, LAST)),
    params=st.builds(
        SamplingParams,
        st.sampled_from([0.0, 1e-3, 0.5, 1.0, 1.5, 50.0]),
        st.sampled_from([1e-6, 0.3, 0.9, 0.9999, 1.0]),
        st.sampled_from([0, 1, 3, 500]),
    ),
    seed=st.integers(0, 100),
)
@example(few=[-np.inf, 0.0], size=12, uniform=0.0, params=SamplingParams(), seed=0)
@example(few=[0.0, -np.inf], size=1400, uniform=LAST, params=SamplingParams(), seed=0)
def test_tokens_of_no_weight_are_never_drawn(few, size, uniform, params, seed):
    logits = torch.full((2, size), -torch.inf)
    places = np.random.default_rng(seed).permutation(size)[: len(few)].copy()
    logits[0, places] = torch.tensor(few, dtype=torch.float32)
    logits[1] = logits[0].flip(-1)
    tokens, logprobs = draw(logits, torch.full((2,), uniform, dtype=torch.float64), params)
    for row, token in zip(logits, tokens.tolist(), strict=True):
        assert row[token] > -torch.inf
        if params.temperature > 0:
            scaled = (row - row.max()) / params.temperature
            assert float(scaled[token].exp()) > 0
        if params.top_k:
            assert int((row > row[token]).sum()) < params.top_k
        if params.top_p == 1e-6 or params.temperature == 0:
            assert row[token] == row.max()
    assert (logprobs <= 0).all()


@pytest.mark.parametrize("size", [1, 127, 128, 129, SIZE])
def test_numbers_at_the_edges(size):
    uniforms = torch.tensor([0.0, LAST], dtype=torch.float64)
    for params in SHAPES:
        logits = make_logits(size=size, seed=7)
        kept = np.flatnonzero(exact(logits[0], params))
        tokens, _ = draw(logits.expand(2, -1), uniforms, params)
        assert tokens.tolist() == [kept[0], kept[-1]]


def test_a_token_begins_where_the_one_before_ends():
    """Eight equal tokens in eight blocks: the number k / 8 is the first of token k."""
    logits = torch.full((8, 1024 + 128), -torch.inf)
    places = torch.arange(8) * 140 + 3
    logits[:, places] = 0.0
    uniforms = torch.arange(8, dtype=torch.float64) / 8
    tokens, _ = draw(logits, uniforms, SamplingParams())
    assert torch.equal(tokens, places)
    below = torch.from_numpy(np.nextafter(uniforms.numpy()[1:], 0))
    tokens, _ = draw(logits[1:], below, SamplingParams())
    assert torch.equal(tokens, places[:-1])


@pytest.mark.parametrize("k", [1, 2, 40, SIZE])
def test_top_tokens_are_those_of_the_log_softmax(k):
    logits = make_logits(6, scale=3.0)
    tokens, logprobs = top_tokens(logits, k)
    expected = logits.double().log_softmax(-1).topk(k)
    assert tokens.shape == logprobs.shape == (6, k)
    assert torch.equal(tokens, expected.indices)
    torch.testing.assert_close(logprobs.double(), expected.values, atol=1e-5, rtol=1e-6)
    if k == SIZE:
        torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(6))


def test_top_tokens_of_a_distribution_with_impossible_ones():
    logits = torch.full((1, 200), -torch.inf)
    logits[0, [7, 150]] = torch.tensor([1.0, 2.0])
    tokens, logprobs = top_tokens(logits, 3)
    assert tokens[0, :2].tolist() == [150, 7]
    assert float(logprobs[0, :2].exp().sum()) == pytest.approx(1.0)
    assert float(logprobs[0, 2]) == -np.inf

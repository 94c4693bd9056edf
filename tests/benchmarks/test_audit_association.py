import numpy as np
import pytest
from scipy import stats

from mbrl_text_env.benchmarks.audit.measures import associate, pair_accuracy

RNG = np.random.default_rng(0)
GOLD = RNG.normal(size=(10, 12))
PROXY = GOLD + RNG.normal(size=(10, 12)) + 5 * RNG.normal(size=(10, 1))


def test_the_rank_correlation_is_scipys():
    found = associate(PROXY, GOLD).rank_correlation
    rows = [stats.spearmanr(p, g)[0] for p, g in zip(PROXY, GOLD, strict=True)]
    assert found.estimate == pytest.approx(np.mean(rows))
    assert -1 <= found.low < found.estimate < found.high <= 1
    # Differences between prompts hide an order that is there within each.
    assert found.estimate > stats.spearmanr(PROXY.ravel(), GOLD.ravel())[0] + 0.2


def test_pairs_by_hand():
    gold = np.array([1.0, 2.0, 3.0, 3.0])
    # Pairs 12 13 14 23 24; the tied pair 34 does not count. Right: 13 14; tied: 12; wrong: 23 24.
    assert pair_accuracy(np.array([1.0, 1.0, 0.5, 0.2]) * [-1, -1, 1, 1], gold) == pytest.approx(
        0.9
    )
    assert pair_accuracy(np.array([2.0, 2.0, 2.0, 2.0]), gold) == 0.5
    assert pair_accuracy(-gold, gold) == 0.0


def test_constant_prompts_are_left_out_and_counted():
    proxy = PROXY.copy()
    proxy[:3] = 1.0
    found = associate(proxy, GOLD)
    assert found.prompts_used == 7
    rest = associate(PROXY[3:], GOLD[3:])
    assert found.rank_correlation == rest.rank_correlation
    assert associate(np.ones((4, 6)), GOLD[:4, :6]) is None


def test_calibration():
    found = associate(np.exp(GOLD), GOLD)
    means = [point.estimate for point in found.calibration]
    assert len(means) == 10
    assert means == sorted(means)
    # Two values only: eight tenths are empty.
    halves = associate((GOLD > 0).astype(float), GOLD)
    assert sum(point is None for point in halves.calibration) > 0

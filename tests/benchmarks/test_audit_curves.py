import numpy as np
import pytest

from mbrl_text_env.benchmarks.audit.measures import best_of_n_curves, within_sd


def test_choosing_by_a_monotone_transform_is_choosing_by_the_gold():
    gold = np.random.default_rng(0).normal(size=(12, 16))
    curves = best_of_n_curves(np.exp(gold), gold)
    assert curves.efficiency == pytest.approx(1.0)
    assert curves.peak_n == 16
    means = [point.gold.estimate for point in curves.points]
    assert means == sorted(means)
    assert means[0] == pytest.approx(gold.mean())
    assert means[-1] == pytest.approx(gold.max(axis=1).mean())
    assert curves.points[-1].gold_gain.estimate == pytest.approx(
        (means[-1] - means[0]) / within_sd(gold)
    )
    assert all(point.fall.high < 0 for point in curves.points[:-1])


def test_a_fall_by_chance_is_rarely_called_one():
    """Gold that has nothing to do with the proxy: 5% of audits may see a fall or a rise."""
    rng = np.random.default_rng(0)
    trials, found = 40, 0
    for _ in range(trials):
        proxy, gold = rng.normal(size=(2, 16, 8))
        found += any(p.fall.low > 0 for p in best_of_n_curves(proxy, gold).points)
    assert found / trials <= 0.1


def test_a_real_fall_is_found():
    """The gold rises with the proxy up to one standard deviation and falls beyond."""
    proxy = np.random.default_rng(0).normal(size=(24, 64))
    gold = -np.abs(proxy - 1.0)
    curves = best_of_n_curves(proxy, gold)
    assert curves.peak_n in (4, 8)
    assert {p.n for p in curves.points if p.fall.low > 0} >= {4, 8, 16}
    assert curves.points[-1].proxy_gain.low > 1.5

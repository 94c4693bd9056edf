"""Errors by horizon: by hand on a world without chance, and what is known of chains."""

import pytest

from mbrl_text_env.fitting.report import FitError
from mbrl_text_env.language_models import TableLM
from mbrl_text_env.world_model import WorldModelError, horizon_report
from tests.world_model.worlds import LM, PROMPTS, ensemble, fitted, records_of


def test_errors_by_hand():
    """After an "a" come more of them, after a "b" more of these: the nearest records know all."""
    table = {"": [0, 0.5, 0.5, 0]}
    table |= {"a" * n: [0, 1, 0, 0] for n in range(1, 6)}
    table |= {"b" * n: [0, 0, 1, 0] for n in range(1, 6)}
    lm = TableLM("ab ", table)
    records = records_of(lm, seed=1)
    [near] = horizon_report(fitted(lm=lm, neighbours=40), records, [3], prefix_tokens=1)
    assert near.error == pytest.approx(0, abs=1e-6)
    # Those of other prompts gain 1.5 of either letter, in the mean.
    assert near.increments == pytest.approx(1, abs=0.1)
    # Each has gained 3 of one, 0 of the other: the root of the mean of 0 and 9, in units of 1.5.
    assert near.copying == pytest.approx(2**0.5, abs=0.1)
    # And as many as it began with, three times over: right.
    assert near.rate == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("make", [lambda: fitted(neighbours=None), ensemble])
def test_chains_are_predicted_as_well_as_by_the_mean_and_calibrated(make):
    rows = horizon_report(make(), records_of(seed=9), [1, 2, 4], prefix_tokens=1)
    for row in rows:
        assert row.error == pytest.approx(1, abs=0.1)
        assert row.error < row.copying
        assert row.z == pytest.approx(1, abs=0.25)
        assert row.epistemic_share < 0.2


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(FitError, match="more than 6 tokens, got 0 of"):
        horizon_report(fitted(), records_of(), [1], prefix_tokens=6)
    with pytest.raises(FitError, match="two prompts or more"):
        horizon_report(fitted(), records_of(prompts=PROMPTS[:1]), [1], prefix_tokens=1)
    with pytest.raises(WorldModelError, match="one horizon or more"):
        horizon_report(fitted(), records_of(LM), [])
    with pytest.raises(WorldModelError, match="at most 6 tokens"):
        horizon_report(fitted(), records_of(), [6], prefix_tokens=1)

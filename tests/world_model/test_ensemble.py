"""The ensemble goes on as a known chain does; its settings say how."""

import numpy as np
import pytest

from mbrl_text_env.fitting.report import FitError
from mbrl_text_env.world_model import (
    EnsembleDynamics,
    WorldModelError,
    load_dynamics,
    predict_futures,
)
from tests.world_model.worlds import FEATURES, LIMIT, LM, PROMPTS, ensemble, records_of, state_of


@pytest.fixture
def fitted():
    return ensemble()


def with_propagation(dynamics, propagation):
    other = EnsembleDynamics(LM, FEATURES, **{**dynamics.settings, "propagation": propagation})
    other.constant_, other.language_model_name_ = dynamics.constant_, LM.name
    other.restore(dynamics.arrays_)
    return other


@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
@pytest.mark.parametrize("text", ["", "ab"])
def test_means_and_spreads_are_those_of_the_chain(fitted, propagation, text):
    state = state_of(text)
    futures = predict_futures(with_propagation(fitted, propagation), [state], 600)
    found = np.column_stack([futures.features[0, :, 1:3], futures.length[0]])
    rows = [(LM.decode(ids), len(ids), p) for ids, p in LM.responses(state, LIMIT)]
    exact = np.array([[each.count("a"), each.count("b"), length] for each, length, _ in rows])
    weights = np.array([p for *_, p in rows])
    mean = weights @ exact
    np.testing.assert_allclose(found.mean(axis=0), mean, atol=0.3)
    np.testing.assert_allclose(found.std(axis=0), np.sqrt(weights @ (exact - mean) ** 2), atol=0.3)
    assert futures.ended.all()
    assert (futures.features == np.rint(futures.features)).all()


def test_members_are_those_of_the_propagation(fitted):
    state = [state_of("a")]
    counts = np.bincount(predict_futures(fitted, state, 9).member[0])
    assert counts.tolist() == [3, 3, 3]
    assert not predict_futures(with_propagation(fitted, "expectation"), state, 9).member.any()


def test_a_horizon_ends_in_time(fitted):
    futures = predict_futures(fitted, [state_of("a")], 50, 2)
    assert set(futures.length[0].tolist()) <= {2, 3}
    assert (futures.length[~futures.ended] == 3).all()
    assert 0 < futures.ended.mean() < 1


def test_a_saved_one_has_the_same_futures(fitted, tmp_path):
    fitted.save(tmp_path)
    again = load_dynamics(tmp_path, LM, FEATURES)
    assert again.settings == fitted.settings
    one, two = (predict_futures(each, [state_of("ab")], 9) for each in (fitted, again))
    np.testing.assert_array_equal(one.features, two.features)
    config = tmp_path / "world_model.json"
    config.write_text(config.read_text().replace('"hidden": 32', '"hidden": 16'))
    with pytest.raises(WorldModelError, match=r"w0 of shape \(3, 4, 32\), expected \(3, 4, 16\)"):
        load_dynamics(tmp_path, LM, FEATURES)


def test_what_does_not_fit_is_refused():
    for settings in ({"members": 2, "elites": 3}, {"hidden": 0}, {"propagation": "all"}):
        with pytest.raises(ValueError, match="xpected"):
            EnsembleDynamics(LM, FEATURES, **settings)
    dynamics = EnsembleDynamics(LM, FEATURES)
    with pytest.raises(FitError, match="at least 5 different prompts"):
        dynamics.fit(records_of(prompts=PROMPTS[:4]))
    with pytest.raises(WorldModelError, match="not fitted"):
        predict_futures(dynamics, [state_of("a")], 4)

"""Futures have the exact distribution where it is known; what cannot be had is refused."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare

from mbrl_text_env.fitting.report import FitError
from mbrl_text_env.language_models import NGramLM, TableLM
from mbrl_text_env.types import Ledger
from mbrl_text_env.world_model import (
    IncrementDynamics,
    TextFeature,
    WorldModelError,
    load_dynamics,
    predict_futures,
)
from tests.world_model.worlds import FEATURES, LIMIT, LM, fitted, records_of, state_of


def p_value(lm, state, futures):
    """Of the numbers of a and b in the finished response, rare pairs together."""
    exact: Counter[tuple[int, int]] = Counter()
    for ids, probability in lm.responses(state, LIMIT):
        text = lm.decode(ids)
        exact[text.count("a"), text.count("b")] += probability
    found = Counter(map(tuple, futures.features[0][:, 1:3].astype(int).tolist()))
    assert set(found) <= set(exact)
    size = futures.length.size
    usual = [pair for pair, p in exact.items() if p * size >= 5]
    observed, expected = [found[k] for k in usual], [exact[k] * size for k in usual]
    return chisquare([*observed, size - sum(observed)], [*expected, size - sum(expected)]).pvalue


@pytest.mark.parametrize("text", ["", "ab", "a b"])
def test_futures_have_the_exact_distribution(text):
    dynamics = IncrementDynamics(LM, FEATURES, neighbours=None, stride=1).fit(records_of())
    state = state_of(text)
    donors = sum(len(r.response_ids) > len(text) for r in records_of())
    futures = predict_futures(dynamics, [state], donors)
    assert p_value(LM, state, futures) > 0.05
    # Another policy's are not taken for them.
    other = NGramLM("ab ", order=1, seed=4, stop_probability=0.3)
    assert p_value(other, state, futures) < 1e-6


def test_the_nearest_donors_know_what_the_prefix_says():
    """After an "a" come more of them, after a "b" the end."""
    table = {"": [0, 0.5, 0.5, 0], "b": [1, 0, 0, 0]}
    table |= {"a" * n: [0, 1, 0, 0] for n in range(1, 6)}
    lm = TableLM("ab ", table)
    near, any_ = (fitted(lm=lm, neighbours=n) for n in (40, None))
    states = [state_of("a", lm), state_of("b", lm)]
    counts = predict_futures(near, states, 20).features[:, :, 1]
    assert (counts[0] == LIMIT).all()
    assert (counts[1] == 0).all()
    assert 1 < predict_futures(any_, states, 100).features[1, :, 1].mean() < LIMIT


def test_a_horizon_ends_in_time_and_the_stop_is_imagined():
    futures = predict_futures(fitted(), [state_of("a")], 30, 2, seed=1)
    assert (futures.length <= 3).all()
    assert (futures.length >= 2).all()
    assert futures.ended[0].any()
    assert not futures.ended[0].all()
    assert (futures.length[~futures.ended] == 3).all()
    assert predict_futures(fitted(), [state_of("a")], 30).ended.all()


def test_calls_are_charged():
    ledger, dynamics = Ledger(), fitted()
    predict_futures(dynamics, [state_of("a")], 30, ledgers=[ledger])
    assert ledger.usage.dynamics_calls == 30
    assert ledger.usage.dynamics_flops == dynamics.flops_bound(30) > 0


def test_a_saved_one_has_the_same_futures(tmp_path):
    dynamics = fitted()
    dynamics.save(tmp_path / "world")
    again = load_dynamics(tmp_path / "world", LM, FEATURES)
    one, two = (predict_futures(d, [state_of("ab")], 9) for d in (dynamics, again))
    for name, values in vars(one).items():
        np.testing.assert_array_equal(values, getattr(two, name))


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    folder = tmp_path / "world"
    fitted().save(folder)
    with pytest.raises(WorldModelError, match="lacks"):
        load_dynamics(folder, LM, FEATURES[:2])
    config = json.loads((folder / "world_model.json").read_text())
    for change in ({"language_model": "other"}, {"constant": ["a"]}, {"format": 9}):
        (folder / "world_model.json").write_text(json.dumps(config | change))
        with pytest.raises(WorldModelError, match="Expected the folder of a world model"):
            load_dynamics(folder, LM, FEATURES)
    (folder / "world_model.json").write_text(json.dumps(config))
    weights = (folder / "world_model.safetensors").read_bytes()
    (folder / "world_model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(WorldModelError, match="Expected the folder of a world model"):
        load_dynamics(folder, LM, FEATURES)


@pytest.mark.parametrize(
    ("features", "change", "message"),
    [
        (FEATURES, lambda rs: [replace(rs[0], language_model="other"), *rs], "of one policy"),
        (FEATURES, lambda rs: [replace(r, language_model="other") for r in rs], "of one policy"),
        (FEATURES, lambda rs: rs[:5], "at least 2 prompts, got 1"),
        (FEATURES, lambda rs: [], "at least 2 prompts, got 0"),
        (FEATURES, lambda rs: [replace(r, response="zz") for r in rs], "tokens that decode"),
        ([TextFeature("x", lambda t: 1)], list, "constant ones alone"),
        ([TextFeature("x", lambda t: -len(t))], list, "falls after feature 'x'"),
    ],
)
def test_records_that_nothing_can_be_learned_from_are_refused(features, change, message):
    with pytest.raises(FitError, match=message):
        IncrementDynamics(LM, features, stride=1).fit(change(records_of()))


def test_futures_that_cannot_be_had_are_refused():
    dynamics = fitted()
    with pytest.raises(WorldModelError, match="has ended"):
        predict_futures(dynamics, [state_of("a", reason="stop")], 4)
    with pytest.raises(WorldModelError, match="at most 6 tokens"):
        predict_futures(dynamics, [state_of("a")], 4, 6)
    with pytest.raises(WorldModelError, match="multiple of the stride"):
        predict_futures(fitted(stride=2), [state_of("a")], 4, 3)
    with pytest.raises(WorldModelError, match="at least 1"):
        predict_futures(dynamics, [state_of("a")], 0)
    with pytest.raises(WorldModelError, match="not fitted"):
        predict_futures(IncrementDynamics(LM), [state_of("a")], 4)

"""What every kind of value model keeps: the contract, exact charges, saving."""

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mbrl_text_env.agents.values import (
    FitError,
    PrefixRewardValue,
    StackedValue,
    check_value_fits,
    load_value,
)
from mbrl_text_env.checks import check_value_model
from mbrl_text_env.types import Ledger, Usage
from mbrl_text_env.values import ValueModelError, predict_values
from tests.agents.values.worlds import (
    LENGTHS,
    LM,
    PaidReward,
    make_values,
    prefixes,
    toy_records,
)
from tests.toys import CountReward, FixedValue, LetterEncoder

VALUES = functools.cache(make_values)
KINDS = tuple(VALUES())
SAVED = [kind for kind in KINDS if kind != "prefix"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_contract(kind):
    check_value_model(VALUES()[kind], prefixes())


def usage(value, state):
    ledger = Ledger()
    predict_values(value, [state], ledgers=[ledger])
    return Usage(**{**vars(ledger.usage), "seconds": 0.0})


@pytest.mark.parametrize("kind", KINDS)
def test_charges_are_exact(kind):
    """Own computation is value FLOPs; what others do is charged as theirs."""
    state = prefixes()[2]
    size, prompt = len(state.response_ids), len(state.prompt_ids)
    assert size > 0
    reward = Usage(reward_calls=1, reward_flops=float(len(LM.decode(state.response_ids))))
    features = Usage(prompt_tokens=prompt + size, lm_calls=1, lm_flops=float(prompt + size))
    expected = {"embedding": Usage(), "hidden": features}.get(kind, reward)
    assert usage(VALUES()[kind], state) == expected + Usage(value_calls=1)
    assert VALUES()[kind].expected_usage(state) == expected


def test_ended_states_are_worth_their_score():
    ended = [state for state in prefixes() if state.finish_reason is not None]
    assert ended
    scores = PaidReward().score([], [LM.decode(state.response_ids) for state in ended])
    for kind in ("prefix", "calibrated", "ridge"):
        estimate = VALUES()[kind].predict(ended)
        assert estimate.mean.tolist() == scores, kind
        assert estimate.std.tolist() == [0.0] * len(ended)


@pytest.mark.parametrize("kind", SAVED)
def test_what_is_loaded_predicts_the_same(kind, tmp_path):
    value = VALUES()[kind]
    for _ in range(2):  # a second save takes the first one's place
        value.save(tmp_path / "value")
    loaded = load_value(tmp_path / "value", LM, PaidReward(), LetterEncoder())
    one, other = value.predict(prefixes()), loaded.predict(prefixes())
    assert type(loaded) is type(value)
    assert other.mean.tolist() == one.mean.tolist()
    assert other.std.tolist() == one.std.tolist()
    assert repr(loaded.report_) == repr(value.report_)
    assert loaded.chosen_ == value.chosen_
    assert (loaded.reward_name_, loaded.language_model_name_) == ("paid", LM.name)
    assert sorted(p.name for p in (tmp_path / "value").iterdir()) == [
        "value.json",
        "value.safetensors",
    ]
    json.loads((tmp_path / "value" / "value.json").read_text(), parse_constant=pytest.fail)


def test_a_loaded_value_can_be_saved_again(tmp_path):
    for kind in ("hidden", "ridge"):
        VALUES()[kind].save(tmp_path / "one")
        load_value(tmp_path / "one", LM, PaidReward(), LetterEncoder()).save(tmp_path / "two")
        for name in ("value.json", "value.safetensors"):
            contents = [(tmp_path / folder / name).read_bytes() for folder in ("one", "two")]
            assert contents[0] == contents[1]


class Other(type(LM)):
    name = "another"


def test_a_value_of_another_reward_or_language_model_is_refused(tmp_path):
    value = VALUES()["ridge"]
    value.save(tmp_path / "value")
    other = Other("abcde", order=2, seed=1)
    for lm, reward, match in (
        (LM, CountReward(), "reward 'paid', got 'count'.*re-score"),
        (other, PaidReward(), f"language model '{LM.name}', got 'another'.*collect"),
    ):
        with pytest.raises(ValueModelError, match=match):
            check_value_fits(value, lm, reward)
        with pytest.raises(ValueModelError, match=match):
            load_value(tmp_path / "value", lm, reward)
    check_value_fits(value, LM, PaidReward())
    # Those that do not say what they were fitted on are for their authors to know.
    check_value_fits(FixedValue(len, LM), other, CountReward())
    check_value_fits(VALUES()["prefix"], other, CountReward())


def damage(folder, **changes):
    config = json.loads((folder / "value.json").read_text())
    (folder / "value.json").write_text(json.dumps({**config, **changes}))


def test_damaged_folders_are_refused(tmp_path):
    folder = tmp_path / "value"
    value = VALUES()["ridge"]

    def refused(match):
        with pytest.raises(ValueModelError, match=match) as caught:
            load_value(folder, LM, PaidReward(), LetterEncoder())
        assert "fit the value model anew" in str(caught.value)
        value.save(folder)

    refused("FileNotFoundError")
    damage(folder, format=99)
    refused("format 99, and this version reads")
    damage(folder, kind="oracle")
    refused("kind 'oracle', expected one of.*stacked")
    damage(folder, settings={})
    refused("KeyError")
    damage(folder, report={})
    refused("missing .* 'num_records' and 'num_prompts'")
    (folder / "value.json").write_text("{")
    refused("JSONDecodeError")
    (folder / "value.json").write_text("[]")
    refused("TypeError")
    (folder / "value.safetensors").write_bytes(b"garbage")
    refused("Safetensor")
    arrays = load_file(folder / "value.safetensors")
    coef = "head.ridge.coef_"
    save_file({n: a for n, a in arrays.items() if n != coef}, folder / "value.safetensors")
    refused(f"KeyError: '{coef}'")
    scaler = "head.standardscaler.mean_"
    save_file({**arrays, scaler: arrays[scaler][1:]}, folder / "value.safetensors")
    refused("StandardScaler that do not fit each other")
    save_file({**arrays, coef: np.full_like(arrays[coef], np.inf)}, folder / "value.safetensors")
    refused("not finite")


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueModelError, match="a folder with other files"):
        VALUES()["ridge"].save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_what_is_not_fitted_says_so(tmp_path):
    value = StackedValue(LM, PaidReward())
    assert not value.is_fitted
    with pytest.raises(ValueModelError, match=r"StackedValue is not fitted.*fit\(records\)"):
        value.predict(prefixes())
    for unfitted in (value, PrefixRewardValue(PaidReward(), LM)):
        with pytest.raises(ValueModelError, match="Only a fitted"):
            unfitted.save(tmp_path / "value")


def test_a_failed_fit_leaves_the_value_unfitted():
    value = StackedValue(LM, PaidReward(), lengths=LENGTHS)
    same = [r for r in toy_records(PaidReward()) if r.score == 0.0]
    with pytest.raises(FitError, match="no signal"):
        value.fit(same)
    assert not value.is_fitted


def test_searches_side_by_side_share_its_calls():
    """The calls of several searches are merged."""
    from mbrl_text_env.agents.driver import ask, run

    states = prefixes()[:4]
    for kind in KINDS:
        value = VALUES()[kind]
        alone = value.predict(states)

        async def search(state, value=value):
            return await ask(predict_values, value, states=[state], ledgers=[Ledger()])

        found = run([lambda state=state: search(state) for state in states])
        assert [e.mean[0] for e in found] == pytest.approx(alone.mean.tolist(), abs=1e-9)

"""A surrogate: whom it asks, what it has learned, kills, budgets and bad rewards."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from mbrl_text_env.rewards.base import RewardError, RewardModel, score_responses
from mbrl_text_env.rewards.learning.features import EmbeddingFeatures
from mbrl_text_env.rewards.learning.surrogate import (
    Heads,
    SurrogateReward,
    audits,
    choose_calls,
    read_batches,
)
from mbrl_text_env.types import Ledger, Prompt

PROMPTS = [Prompt.from_text(f"Say {word}.") for word in ("fox", "dog", "sea")]
SMALL = {"max_calls": 14, "first_calls": 6, "calls_per_batch": 3, "audited": 1, "members": 5}


class Letters:
    """An encoder: counts of five letters."""

    name = "letters"

    def encode(self, texts):
        return np.array([[text.count(letter) for letter in "abcde"] for text in texts], dtype=float)


class Sum(RewardModel):
    """A linear function of the counts; asked texts are noted, and the call `fails_at` ends it."""

    name = "sum"

    def __init__(self):
        self.asked, self.fails_at = [], None

    def score(self, prompts, responses):
        self.asked += responses
        if self.fails_at is not None and len(self.asked) >= self.fails_at:
            raise KeyboardInterrupt
        return [text.count("a") - 0.5 * text.count("b") for text in responses]


def batches(count=7, size=6, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        prompts = [PROMPTS[i // 2 % 3] for i in range(size)]
        yield prompts, ["".join(rng.choice([*"abcde"], 9)) for _ in range(size)]


def surrogate(folder, reward=None, **changes):
    features = EmbeddingFeatures(Letters(), use_statistics=False)
    return SurrogateReward(reward or Sum(), folder, features=features, **{**SMALL, **changes})


def test_the_least_sure_and_those_at_random():
    stds, rng = np.array([0.1, 0.4, 0.2, 0.4, 0.3]), np.random.default_rng(3)
    assert choose_calls(stds, 3, 0, rng).tolist() == [1, 3, 4]
    first = np.random.default_rng(3).permutation(5)[0]
    chosen = choose_calls(stds, 3, 1, np.random.default_rng(3)).tolist()
    assert chosen[0] == first
    assert chosen[1:] == [row for row in (1, 3, 4, 2, 0) if row != first][:2]
    assert sorted(choose_calls(stds, 9, 2, rng).tolist()) == [0, 1, 2, 3, 4]
    assert choose_calls(stds, 0, 2, rng).tolist() == []


def test_heads_are_ridge_regressions_on_prompts_drawn_with_replacement():
    features = EmbeddingFeatures(Letters(), use_statistics=False)
    asked, texts = zip(
        *[pair for rows in batches(4) for pair in zip(*rows, strict=True)], strict=True
    )
    raw = features.read(asked, texts)
    scores = np.asarray(Sum().score(asked, texts))
    heads = Heads.fit(features, raw, scores, [p.id for p in asked], 4, seed=0)
    draws = np.random.default_rng([0, len(scores)]).multinomial(3, np.full(3, 1 / 3), size=4)
    groups = np.unique([p.id for p in asked], return_inverse=True)[1]
    inputs = features.transform(raw)
    head = Ridge(1e-2).fit(inputs, scores, sample_weight=draws[0][groups])
    np.testing.assert_allclose(heads.weights[:, 0], head.coef_, atol=1e-9)
    mean, std = heads.predict(raw)
    told = np.clip(inputs @ heads.weights + heads.intercepts, scores.min(), scores.max())
    np.testing.assert_allclose([mean, std], [told.mean(axis=1), told.std(axis=1)])
    unseen = [(row, draws[:, group] == 0) for row, group in enumerate(groups)]
    errors = [told[row, out].mean() - scores[row] for row, out in unseen if out.any()]
    assert heads.error == pytest.approx(np.sqrt(np.mean(np.square(errors))))


def test_it_asks_learns_and_is_charged_for_what_it_asked(tmp_path):
    reward = Sum()
    model, found = surrogate(tmp_path / "labels", reward), []
    for prompts, texts in batches():
        ledger = Ledger()
        scores = score_responses(model, prompts, texts, ledgers=[ledger] * 6).total
        real = np.array([text.count("a") - 0.5 * text.count("b") for text in texts])
        batch = model.batches_[-1]
        np.testing.assert_array_equal(scores[batch.rows], real[batch.rows])
        found.append((ledger.usage.reward_calls, np.abs(scores - real).mean()))
    assert [calls for calls, _ in found] == [6, 3, 3, 2, 0, 0, 0]
    assert model.calls == len(reward.asked) == 14
    assert found[-1][1] < 0.3, "a linear reward is learned; the mean is 0.9 off"
    labels = np.concatenate([batch.labels for batch in model.batches_])
    scores = np.concatenate([batch.scores for batch in model.batches_])
    assert labels.min() <= scores.min() <= scores.max() <= labels.max()
    first, second = model.batches_[:2]
    assert np.isnan(first.told).all()
    assert first.num_audited == 6
    np.testing.assert_allclose(second.audit, second.told[:1] - second.labels[:1])
    told = audits(model.batches_, 7)
    assert [found.calls for found in told] == [6, 9, 12, 14, 14, 14, 14]
    assert np.isnan([told[0].error, told[0].band, told[6].error]).all()
    assert told[1].error == pytest.approx(abs(second.audit[0]))
    assert told[1].band == pytest.approx(second.error * 1.959964)
    [over_all] = audits(model.batches_, 1)
    assert over_all.errors.tolist() == [batch.audit[0] for batch in model.batches_[1:4]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(6, 14), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_the_calls_are_never_exceeded(tmp_path_factory, sizes, most, audited):
    reward = Sum()
    model = surrogate(tmp_path_factory.mktemp("any"), reward, max_calls=most, audited=audited)
    for seed, size in enumerate(sizes):
        [(prompts, texts)] = batches(1, size, seed)
        assert np.isfinite(model.score(prompts, texts)).all()
    assert model.calls == len(reward.asked) <= most
    assert model.calls >= min(6, sum(sizes))


def test_a_training_that_does_steps_again_sees_the_same_scores(tmp_path):
    rows = [*batches()]
    whole = surrogate(tmp_path / "whole")
    wanted = [whole.score(*row) for row in rows]
    reward = Sum()
    killed = surrogate(tmp_path / "killed", reward)
    for row in rows[:3]:
        killed.score(*row)
    again = surrogate(tmp_path / "killed", reward)
    found = [again.score(*row) for row in rows[1:]]
    np.testing.assert_array_equal(found, wanted[1:])
    assert len(reward.asked) == again.calls == 14
    ledger = Ledger()
    score_responses(again, *rows[1], ledgers=[ledger] * 6)
    assert ledger.usage.reward_calls == 3, "a step that is done again is charged as it was"
    for one, other in zip(read_batches(tmp_path / "killed").values(), whole.batches_, strict=True):
        np.testing.assert_array_equal(one.scores, other.scores)
        np.testing.assert_array_equal(one.told, other.told)


def test_a_kill_within_a_call_costs_the_calls(tmp_path):
    reward, rows = Sum(), [*batches()]
    model = surrogate(tmp_path / "labels", reward)
    model.score(*rows[0])
    reward.fails_at = 7
    with pytest.raises(KeyboardInterrupt):
        model.score(*rows[1])
    reward.fails_at = None
    again = surrogate(tmp_path / "labels", reward)
    assert (again.calls, len(again.batches_)) == (9, 1)
    for row in rows[1:]:
        again.score(*row)
    assert len(reward.asked) == again.calls == 14
    with pytest.raises(RewardError, match=r"expected remaining calls of the reward.*max_calls"):
        lost_all(tmp_path / "lost", rows[0])


def lost_all(folder, row):
    reward = Sum()
    reward.fails_at = 1
    with pytest.raises(KeyboardInterrupt):
        surrogate(folder, reward, max_calls=6).score(*row)
    surrogate(folder, max_calls=6).score(*row)


def test_a_reward_of_nan_is_an_error_that_names_it(tmp_path):
    class Broken(Sum):
        name = "broken"

        def score(self, prompts, responses):
            return np.full(len(responses), np.nan)

    model = surrogate(tmp_path / "labels", Broken())
    with pytest.raises(RewardError, match=r"'broken'.*finite scores"):
        model.score(*next(batches()))
    assert not read_batches(tmp_path / "labels"), "nothing is learned from it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_calls": 1}, "first_calls: expected 2 or more"),
        ({"max_calls": 5}, "max_calls: expected 6 or more"),
        ({"calls_per_batch": 0}, "calls_per_batch: expected 1 or more"),
        ({"members": 1}, "members"),
        ({"audited": -1}, "audited: expected 0 or more"),
    ],
)
def test_settings_that_are_none(tmp_path, changes, message):
    with pytest.raises(RewardError, match=message):
        surrogate(tmp_path / "labels", **changes)


def test_folders_of_another_and_damaged_ones(tmp_path):
    folder = tmp_path / "labels"
    model = surrogate(folder)
    model.score(*next(batches()))
    with pytest.raises(RewardError, match=r"another surrogate reward.*seed"):
        surrogate(folder, seed=1)
    assert surrogate(folder, max_calls=20).calls == 6, "more calls go on"
    reward, (_, row) = Sum(), batches(2)
    surrogate(folder, max_calls=20).score(*row)
    fewer = surrogate(folder, reward, max_calls=6)
    fewer.score(*next(batches(1, seed=5)))
    assert fewer.calls == 9, "fewer calls than were made are no calls"
    assert not reward.asked
    path = folder / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RewardError, match="damaged"):
        surrogate(folder)

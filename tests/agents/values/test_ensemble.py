"""The ensemble: its members, what they share, and a standard deviation that is right."""

import copy

import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import Ridge

from mbrl_text_env.agents.values import (
    EnsembleValue,
    FitError,
    FittedValue,
    PrefixRewardValue,
    RolloutValue,
    StackedValue,
    cut_prefixes,
    samples_of,
)
from mbrl_text_env.agents.values.ensemble import EnsembleHead
from mbrl_text_env.fitting.heads import Spread
from mbrl_text_env.rewards import make as make_reward
from mbrl_text_env.types import Ledger, Prompt
from mbrl_text_env.values import ValueModelError, predict_values
from tests.agents.values.worlds import (
    LENGTHS,
    LM,
    PaidReward,
    prefixes,
    samples,
    state_of,
    toy_records,
    written,
)
from tests.toys import CountReward, FixedValue

WEIGHTS = np.array([1.0, -1.0, 0.5, 0.0, 0.0])


def letters(text):
    return np.array([text.count(c) for c in "abcde"]) / len(text)


class Letters(FittedValue):
    """A head on the shares of five letters in the prefix."""

    kind = "letters"
    lengths = (4, 8)

    def __init__(self, head):
        self.head = head

    def inputs(self, states, ledgers=None):
        return np.stack([letters(LM.decode(s.response_ids)) for s in states])

    def samples(self, records):
        states, owners = cut_prefixes(records, self.lengths)
        return samples_of(self.inputs(states), owners, [len(s.response_ids) for s in states])

    def heads(self):
        return {"only": self.head}


RIDGE = Ridge(alpha=0.01)
BOOSTING = GradientBoostingRegressor(
    n_estimators=60, min_samples_leaf=20, subsample=0.5, random_state=0
)


def world(noise, prompts=60, per_prompt=4, seed=0, level=0.0):
    """Scores that the first 8 letters tell, up to noise of each response and of each prompt.

    "e" is rare: what it is worth is hardly known.
    """
    rng = np.random.default_rng(seed)
    for i in range(prompts):
        # A name of letters that the tokenizer knows.
        name = "".join("abcde"[i // 5**k % 5] for k in range(4))
        own = level * rng.normal()
        for _ in range(per_prompt):
            shares = rng.dirichlet([1, 1, 1, 1, 0.02])
            text = "".join(rng.choice(list("abcde"), size=4, p=shares))
            score = float(letters(text) @ WEIGHTS) + own + noise * rng.normal()
            yield written(name, text * 3, score)


def z_scores(value, records):
    states, owners = cut_prefixes(records, (4, 8))
    estimate = value.predict(states)
    return (estimate.mean - [r.score for r in owners]) / estimate.std


@pytest.mark.parametrize("head", [RIDGE, BOOSTING], ids=["ridge", "boosting"])
@pytest.mark.parametrize(("noise", "level"), [(0.5, 0.0), (0.1, 0.5), (0.05, 0.0)])
def test_the_standard_deviation_is_calibrated(head, noise, level):
    value = EnsembleValue(Letters(head)).fit(list(world(noise, prompts=150, level=level)))
    assert 0.8 < value.report_.z_std < 1.25
    assert value.report_.within_two_std > 0.9
    # And so it is on prompts that no member has seen, which the report only guesses.
    z = z_scores(value, list(world(noise, prompts=200, seed=1, level=level)))
    assert 0.8 < np.sqrt(np.mean(z**2)) < 1.25
    assert np.mean(np.abs(z) < 2) > 0.9


@pytest.mark.parametrize("head", [RIDGE, BOOSTING], ids=["ridge", "boosting"])
@pytest.mark.parametrize("seed", [11, 13])
def test_members_that_happen_to_agree_are_not_infinitely_sure(head, seed):
    """Without noise all of the error is the members'; where they agree, it is not 0."""
    value = EnsembleValue(Letters(head)).fit(list(world(0.0, 40, seed=seed)))
    assert value.head_.scale[0] < 4
    assert (value.predict([state_of(t) for t in ("aaaa", "bbbb", "abcd")]).std > 0).all()


def test_it_is_less_sure_far_from_what_it_has_seen():
    value = EnsembleValue(Letters(RIDGE)).fit(list(world(0.3)))
    near, far = value.predict([state_of("aabb"), state_of("eeee")]).std
    assert far > 1.5 * near


def test_the_mean_is_that_of_the_members_and_the_spread_joins_both():
    members = tuple(Ridge(1e-12).fit([[0.0], [1.0]], [0.0, slope]) for slope in (1.0, 3.0))
    value = EnsembleValue(Letters(RIDGE), num_members=2)
    value.head_ = EnsembleHead(members, np.array([2.0]))
    value.spread_ = Spread(np.array([4.0]), np.array([3.0]))
    found = value.estimate(np.array([[0.0], [4.0]]), [4, 4])
    # Votes 0 and 0, then 4 and 12: mean 8, variance 32.
    assert found.mean == pytest.approx([0.0, 8.0], abs=1e-9)
    assert found.std == pytest.approx([6.0, 2 * np.sqrt(32 + 9)])


def test_every_member_has_a_bag_of_whole_prompts():
    bags = []

    class Recording(Ridge):
        def fit(self, inputs, scores):
            bags.append(scores)
            return super().fit(inputs, scores)

    records = list(world(0.1, prompts=20))
    value = EnsembleValue(Letters(Recording()), num_members=5).fit(records)
    of = {record.score: i // 4 for i, record in enumerate(records)}
    assert len(value.head_.members) == 5
    own = bags[-5:]  # the fits before are those of the choice
    assert len({tuple(scores) for scores in own}) == 5
    for scores in own:
        groups = [of[score] for score in scores]
        assert len(groups) == 20 * 8  # 20 draws, of 4 responses with 2 prefixes each
        assert set(np.bincount(groups, minlength=20) % 8) == {0}
        assert len(set(groups)) < 20


def test_it_follows_its_seed():
    def mean(seed):
        value = EnsembleValue(Letters(RIDGE), seed=seed).fit(list(world(0.5)))
        return value.predict([state_of("abca")]).mean[0]

    assert mean(0) == mean(0) != mean(1)


def test_its_members_share_what_costs():
    reward, state = PaidReward(), prefixes()[2]
    records = toy_records(PaidReward())
    base = StackedValue(LM, reward, lengths=LENGTHS)
    value = EnsembleValue(base, num_members=6)
    reward.calls.clear()
    value.fit(records)
    assert len(reward.calls) == 1  # one batch of prefixes for all members
    ledger = Ledger()
    predict_values(value, [state], ledgers=[ledger])
    assert ledger.usage.reward_calls == 1
    assert value.usage_bound(state) == base.usage_bound(state)
    assert value.expected_usage(state) == base.expected_usage(state)


def test_the_base_is_left_as_it_was():
    base = StackedValue(LM, CountReward(), lengths=LENGTHS)
    before = copy.copy(vars(base))
    one, two = EnsembleValue(base, 4).fit(toy_records()), EnsembleValue(base, 4, seed=1)
    two.fit(toy_records(samples=3))
    assert vars(base) == before
    assert not base.is_fitted
    assert one.predict(prefixes()).mean.tolist() != two.predict(prefixes()).mean.tolist()


def test_its_report_is_of_prompts_left_out():
    """Prompts that have a level of their own, which no other prompt tells of."""
    report = EnsembleValue(Letters(RIDGE)).fit(list(world(0.01, level=2.0))).report_
    assert report.num_prompts == 60
    assert report.num_records == 240
    assert report.std > 1.5
    # On the prompts that it was made of, the calibration would be perfect.
    assert abs(report.z_std - 1) > 1e-6
    assert abs(report.correlation) < 0.3
    assert report.within_prompt > 0.6


@pytest.mark.parametrize(
    ("base", "num_members", "match"),
    [
        (FixedValue(len, LM), 8, "a FittedValue.*got FixedValue"),
        (RolloutValue(LM, CountReward()), 8, "got RolloutValue"),
        (EnsembleValue(PrefixRewardValue(CountReward(), LM)), 8, "got EnsembleValue"),
        (PrefixRewardValue(CountReward(), LM), 1, "num_members: expected at least 2, got 1"),
    ],
)
def test_what_it_refuses(base, num_members, match):
    with pytest.raises(ValueError, match=match):
        EnsembleValue(base, num_members)


def test_one_prompt_is_in_every_bag():
    value = EnsembleValue(Letters(RIDGE))
    with pytest.raises(FitError, match=r"2 of 8 members have not seen, got none.*1 prompts"):
        value.fit(list(world(0.1, prompts=1)))
    assert not value.is_fitted
    with pytest.raises(ValueModelError, match="EnsembleValue is not fitted"):
        value.predict([state_of("a")])


def test_an_unknown_base_cannot_be_saved(tmp_path):
    value = EnsembleValue(Letters(RIDGE)).fit(list(world(0.1)))
    with pytest.raises(ValueModelError, match="Letters cannot be saved"):
        value.save(tmp_path / "value")
    assert list(tmp_path.iterdir()) == []


def test_the_real_sentiment():
    reward = make_reward("sentiment")
    words = ["great", "awful", "lovely", "horrid", "happy", "sad"]
    records = []
    for i in range(12):
        text = f"{words[i % 6]} day"
        [score] = reward.score([Prompt.from_text("a")], [text])
        records.append(written(f"{'ab'[i % 2]}{'abcde'[i // 3]}", text, float(score)))
    value = EnsembleValue(StackedValue(LM, reward, lengths=(2, 4))).fit(records)
    estimate = value.predict([record.prefix_state(2) for record in records])
    assert np.isfinite(estimate.mean).all()
    assert (estimate.std > 0).all()


def test_calibration_needs_no_variation_of_lengths():
    table = samples([[1.0], [2.0], [3.0], [4.0]], [1.0, 2, 3, 5], groups=[0, 1, 2, 3])
    value = EnsembleValue(Letters(RIDGE))
    value._fit(table, [None] * 4)
    assert value.estimate(np.array([[2.0]]), [7]).std[0] > 0

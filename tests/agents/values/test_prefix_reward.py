"""The reward of the prefix, as it is and calibrated."""

import numpy as np
import pytest

from mbrl_text_env.agents.values import FitError, PrefixRewardValue
from mbrl_text_env.language_models import CharTokenizer
from mbrl_text_env.rewards import make as make_reward
from mbrl_text_env.types import Ledger, Prompt, TextState, Usage
from mbrl_text_env.values import predict_values
from tests.agents.values.worlds import LM, PaidReward, state_of, written
from tests.toys import CountReward


def shares(count=80, size=12, seed=0):
    """Responses of "a" and "b", each with its own share of "a", to a tenth as many prompts."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        share = rng.uniform()
        yield (
            f"{'abcde'[i % 5]}{'abcde'[i // 5 % 2]}",
            "".join(rng.choice(["a", "b"], size=size, p=[share, 1 - share])),
        )


def test_without_a_fit_it_is_the_reward_of_the_prefix():
    value = PrefixRewardValue(CountReward(), LM)
    assert (value.is_fitted, hasattr(value, "head_")) == (True, False)
    found = value.predict([state_of(text) for text in ("", "aab", "b", "abab")])
    assert found.mean.tolist() == pytest.approx([0, 2 / 3, 0, 1 / 2])
    assert found.std.tolist() == [0.0] * 4


def test_calibrated_it_finds_the_line_of_each_length():
    """The score is made of what the first 2 and the first 4 characters hold: known lines."""
    records = [
        written(p, r, 0.5 + 2 * (r[:4].count("a") / 4) - 3 * (r[:2].count("a") / 2))
        for p, r in shares()
    ]
    value = PrefixRewardValue(CountReward(), LM, lengths=(2, 4)).fit(records)
    first = np.array([r.response[:2].count("a") / 2 for r in records])
    both = np.array([r.response[:4].count("a") / 4 for r in records])
    scores = [r.score for r in records]
    for length, seen in ((2, first), (4, both)):
        slope, intercept = np.polyfit(seen, scores, 1)
        [found] = value.predict([state_of("a" + "b" * (length - 1))]).mean
        assert found == pytest.approx(intercept + slope / length)
    assert hasattr(value, "head_")


def test_a_score_that_the_prefix_tells_is_predicted_exactly():
    records = [written(p, r, 3 - 2 * r[:4].count("a") / 4) for p, r in shares()]
    value = PrefixRewardValue(CountReward(), LM, lengths=(4,)).fit(records)
    assert value.head_.slopes_ == pytest.approx([-2.0])
    assert value.head_.intercepts_ == pytest.approx([3.0])
    estimate = value.predict([state_of("aabb"), state_of("bbbb")])
    assert estimate.mean == pytest.approx([2.0, 3.0])
    assert estimate.std == pytest.approx([0.0, 0.0], abs=1e-9)
    # The uncalibrated one has the order the wrong way round; a line mends it.
    assert value.report_.within_prompt == pytest.approx(1.0)


def test_longer_prefixes_are_surer():
    records = [written(p, r, r.count("a") / 12) for p, r in shares(200)]
    value = PrefixRewardValue(CountReward(), LM, lengths=(2, 6, 11)).fit(records)
    stds = value.predict([state_of("ab" * 6, "abc")] + [state_of("a" * n) for n in (2, 6, 11)]).std
    assert stds[1] > stds[2] > stds[3] > 0
    by_length = [row.within_prompt for row in value.report_.by_length]
    assert by_length == sorted(by_length)
    assert by_length[-1] > 0.95
    assert value.report_.z_std == pytest.approx(1.0, abs=0.15)
    # An ended response is worth its score, surely.
    ended = TextState(Prompt.from_text("a"), (1,), (1, 2, 0), "stop")
    assert value.predict([ended]).mean.tolist() == [0.5]
    assert value.predict([ended]).std.tolist() == [0.0]


def test_each_prefix_is_one_reward_call():
    value, states = PrefixRewardValue(PaidReward(), LM), [state_of("ab"), state_of("abcde")]
    ledgers = [Ledger(), Ledger()]
    predict_values(value, states, ledgers=ledgers)
    for state, ledger, flops in zip(states, ledgers, (2.0, 5.0), strict=True):
        assert ledger.usage.reward_calls == 1
        assert ledger.usage.reward_flops == flops
        assert value.expected_usage(state) == Usage(reward_calls=1, reward_flops=flops)
        assert value.usage_bound(state) == Usage(reward_calls=1, reward_flops=12.0)
    # A reward that does not say what it takes is a call all the same.
    assert PrefixRewardValue(CountReward(), LM).expected_usage(states[0]) == Usage(reward_calls=1)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="lengths: expected"):
        PrefixRewardValue(CountReward(), LM, lengths=(4, 2))
    value = PrefixRewardValue(CountReward(), LM)
    with pytest.raises(FitError, match="no signal"):
        value.fit([written("a", "aabb", 1.0)] * 3)
    assert not hasattr(value, "head_")


def test_the_real_sentiment_of_prefixes():
    reward, tokenizer = make_reward("sentiment"), CharTokenizer("abcdefghijklmnopqrstuvwxyz .")
    texts = [
        "a wonderful day. i love it.", "a terrible day. i hate it.",
        "a lovely evening. so happy.", "a horrible evening. so sad.",
    ]  # fmt: skip
    records = []
    for i, text in enumerate(texts):
        prompt = Prompt.from_text("ab"[i // 2])
        ids = tokenizer.encode_prompt(Prompt.from_text(text))
        [score] = reward.score([prompt], [text])
        records.append(written(prompt.text, text, float(score), response_ids=ids))
    value = PrefixRewardValue(reward, tokenizer, lengths=(10, 18))
    value.fit(records)
    good, bad = value.predict([records[0].prefix_state(18), records[1].prefix_state(18)]).mean
    assert good > bad

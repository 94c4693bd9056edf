"""What a `StackedValue` sees, how it is fitted, and where that pays."""

import numpy as np
import pytest

from mbrl_text_env.agents.values import PrefixRewardValue, StackedValue
from mbrl_text_env.agents.values.kinds import PrefixStatistics
from mbrl_text_env.rewards import make as make_reward
from mbrl_text_env.rewards.base import Scores
from mbrl_text_env.types import Ledger, Prompt, TextState
from mbrl_text_env.values import ValueModelError, predict_values
from tests.agents.values.worlds import LENGTHS, LM, state_of, toy_records, written
from tests.toys import CountReward


def test_features_by_hand():
    statistics = PrefixStatistics(max_tokens=8.0)
    statistics.logprob_ = np.array(-0.5)
    # Reward, part, length, log-probability, known.
    inputs = np.array([[0.3, 0.7, 4, -6.0, 1], [0.3, 0.7, 4, 0.0, 0], [0.1, 0.2] + [0.0] * 3])
    found = statistics.transform(inputs)
    # Reward, part, log-probability a token; the same by share; share, log-probability.
    assert found[0] == pytest.approx([0.3, 0.7, -1.5, 0.15, 0.35, -0.75, 0.5, -6.0])
    assert found[1] == pytest.approx([0.3, 0.7, -0.5, 0.15, 0.35, -0.25, 0.5, -2.0])
    assert found[2] == pytest.approx([0.1, 0.2, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0])
    longer = statistics.transform(inputs * [1, 1, 9, 1, 1])
    assert longer[0, -2] == 1.0  # no share is above the whole
    assert statistics.fit(inputs).logprob_ == -1.5


LETTERS = list("ab")


def world(score, count=240, size=16, seed=0, logprobs=True, **changes):
    """Responses of "a" and "b" to 24 prompts, of a share of "a" and a log-probability of their own.

    Every token has the same log-probability, so that each prefix tells the response's.
    """
    rng = np.random.default_rng(seed)
    records = []
    for i in range(count):
        share, each = rng.uniform(), -rng.uniform(0.1, 3.0)
        text = "".join(rng.choice(LETTERS, size=size, p=[share, 1 - share]))
        prompt = "abcde"[i % 5] + "abcde"[i // 5 % 5] + "ab"[i % 2]
        tokens = [each] * size if logprobs else ()
        records.append(written(prompt, text, score(text, each), logprobs=tokens, **changes))
    return records


def share_of_a(text, each):
    return text.count("a") / len(text)


def test_it_beats_the_prefix_reward_where_the_log_probability_matters():
    records = world(lambda text, each: share_of_a(text, each) + each)
    prefix = PrefixRewardValue(CountReward(), LM, lengths=LENGTHS).fit(records).report_
    stacked = StackedValue(LM, CountReward(), lengths=LENGTHS).fit(records).report_
    assert stacked.within_prompt > 0.95
    assert stacked.within_prompt > prefix.within_prompt + 0.4
    assert stacked.std < 0.4 * prefix.std


def test_a_state_without_log_probability_is_given_the_mean():
    records = world(lambda text, each: each)
    value = StackedValue(LM, CountReward(), lengths=LENGTHS).fit(records)
    texts = ("abab", "aaaa")
    for logprob in (None, float("nan")):
        missing = value.predict([state_of(text, logprob=logprob) for text in texts])
        known = value.predict(
            [state_of(text, logprob=4 * value.head_[0].logprob_) for text in texts]
        )
        assert missing.mean.tolist() == known.mean.tolist()
    low, high = value.predict([state_of("abab", logprob=x) for x in (-12.0, -0.4)]).mean
    assert (low, high) == (pytest.approx(-3.0, abs=0.1), pytest.approx(-0.1, abs=0.1))


def test_it_can_be_fitted_without_any_log_probability():
    value = StackedValue(LM, CountReward(), lengths=LENGTHS).fit(world(share_of_a, logprobs=False))
    assert value.head_[0].logprob_ == 0.0
    assert value.report_.within_prompt > 0.7


def test_it_trusts_the_rewards_of_long_prefixes_more():
    """The position matters: of a prefix's reward, a part is luck, the more the shorter it is."""
    value = StackedValue(LM, CountReward(), lengths=(2, 8, 14))
    value.fit(world(share_of_a, count=480))

    def slope(size):
        none, all_ = value.predict([state_of("b" * size), state_of("a" * size)]).mean
        return all_ - none

    assert 0.3 < slope(2) < slope(8) < slope(14)
    assert slope(14) == pytest.approx(1.0, abs=0.15)


class TwoParts(CountReward):
    """A total that says nothing of its informative part."""

    def score(self, prompts, responses):
        return self.score_parts(prompts, responses).total.tolist()

    def score_parts(self, prompts, responses):
        a = np.array(super().score(prompts, responses))
        return Scores(np.zeros(len(a)), {"a": a, "other": 1 - a})


def test_it_sees_the_parts_that_all_records_have():
    records = world(share_of_a, rewards={"a": 0.0, "gone": 0.0})
    value = StackedValue(LM, TwoParts(), lengths=LENGTHS).fit(records)
    assert value.part_names_ == ["a"]
    # A reward without parts has one of its own name, which is the total once more.
    whole = StackedValue(LM, CountReward(), lengths=LENGTHS).fit(world(share_of_a, count=60))
    assert whole.part_names_ == []
    assert value.report_.within_prompt > 0.7
    value.reward_model = CountReward()
    with pytest.raises(ValueModelError, match=r"parts \['a'\].*prompt 'abc'.*gave \['count'\]"):
        value.predict([state_of("ab")])


def test_positions_are_shares_of_the_limit_or_of_the_longest_response():
    records = world(share_of_a, count=60)
    assert StackedValue(LM, CountReward(), lengths=LENGTHS).fit(records).max_tokens_ == 16
    given = StackedValue(LM, CountReward(), lengths=LENGTHS, max_response_tokens=32).fit(records)
    assert given.max_tokens_ == given.head_[0].max_tokens == 32


def test_a_failed_fit_leaves_the_former_one():
    value = StackedValue(LM, CountReward(), lengths=LENGTHS).fit(world(share_of_a, count=60))
    states = [state_of("ab"), state_of("aaaab")]
    before, tokens = value.predict(states), value.max_tokens_
    # Scores that differ between responses, of which one alone has a prefix.
    wrong = [written("a", "a" * 40, 1.0), written("a", "a", 2.0)]
    with pytest.raises(ValueError, match="no signal"):
        value.fit(wrong)
    assert value.max_tokens_ == tokens
    assert value.predict(states).mean.tolist() == before.mean.tolist()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"max_response_tokens": 0}, "max_response_tokens: expected at least 1"),
        ({"lengths": (4, 4)}, "lengths"),
    ],
)
def test_what_it_refuses(wrong, match):
    with pytest.raises(ValueError, match=match):
        StackedValue(LM, CountReward(), **wrong)


def test_one_prompt_alone_can_be_fitted():
    alone = [r for r in toy_records(samples=30) if r.prompt_id == "aaa"]
    value = StackedValue(LM, CountReward(), lengths=LENGTHS).fit(alone)
    assert value.report_.num_prompts == 1
    assert np.isfinite(value.predict([state_of("ab", "aaa")]).mean).all()


def test_the_real_models(smollm2):
    """SmolLM2's tokens and the sentiment of prefixes."""
    reward = make_reward("sentiment")
    texts = (
        "I love this lovely sunny day, it is great.", "I hate this awful rainy day, it is bad.",
        "What a wonderful meal, we were so happy.", "What a horrible meal, we were so sad.",
    )  # fmt: skip
    records = []
    for i, text in enumerate(texts):
        prompt = Prompt.from_text(f"Write about it, {i // 2}.")
        ids = tuple(smollm2.encode_prompt(Prompt.from_text(text, chat=False)))
        [score] = reward.score([prompt], [text])
        records.append(
            written(
                prompt.text, text, float(score), prompt_ids=smollm2.encode_prompt(prompt),
                response_ids=ids, reward_name=reward.name,
                language_model=smollm2.name,
            )
        )  # fmt: skip
    value = StackedValue(smollm2, reward, lengths=(3, 6)).fit(records)
    good, bad = (records[i].prefix_state(6) for i in (0, 1))
    ledgers = [Ledger(), Ledger()]
    estimate = predict_values(value, [good, bad], ledgers=ledgers)
    assert estimate.mean[0] > estimate.mean[1]
    assert ledgers[0].usage.reward_calls == 1
    empty = TextState(good.prompt, good.prompt_ids)
    assert np.isfinite(value.predict([empty]).mean).all()

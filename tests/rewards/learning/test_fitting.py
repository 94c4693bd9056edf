"""Heads fitted on known rewards: recovered weights, convex losses, and MiniLM end to end."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.fitting.report import split_by_group
from mbrl_text_env.records import Record
from mbrl_text_env.rewards.base import RewardError, applies_to, score_responses
from mbrl_text_env.rewards.learning.features import EmbeddingFeatures, HiddenFeatures
from mbrl_text_env.rewards.learning.learned import RewardFitError, fit_head, fit_reward
from mbrl_text_env.rewards.learning.preferences import PreferencePair
from mbrl_text_env.types import Prompt, TextState

TOPICS = ("cats", "ships", "bread", "the moon", "trains", "bees", "chess", "rain", "gold", "tea")
PRAISE = ("I love it, it is wonderful.", "What a great joy!", "Lovely, and good for everyone.")
BLAME = ("I hate it, it is terrible.", "What an awful pain!", "Ugly, and bad for everyone.")


class LetterEncoder:
    """Texts as counts of letters: an encoder without a model."""

    def encode(self, sentences):
        return np.array([[s.count(letter) for letter in "abcdefgh"] for s in sentences], float)


def pairs_of(chosen, rejected, topics=TOPICS):
    return [
        PreferencePair(Prompt.from_text(f"Tell me about {topic}."), f"{a} {topic}", f"{b} {topic}")
        for topic in topics
        for a, b in zip(chosen, rejected, strict=True)
    ]


def records_of(score, count=4, topics=TOPICS):
    rng = np.random.default_rng(0)
    rows = []
    for topic in topics:
        state = TextState(Prompt.from_text(topic), (1,), (2,), "stop")
        for _ in range(count):
            text = "".join(rng.choice(list("abcdefgh "), 30))
            rows.append(
                Record.from_state(
                    state,
                    response=text,
                    score=float(score(text)),
                    rewards={},
                    reward_name="gold",
                    agent="a",
                    language_model="m",
                    seed=0,
                )
            )
    return rows


def letters(**options):
    return EmbeddingFeatures(LetterEncoder(), **options)


class TestHeads:
    def test_bradley_terry_recovers_weights(self):
        rng = np.random.default_rng(0)
        weights = np.array([2.0, -1.0, 0.5, 0.0])
        a, b = rng.normal(size=(2, 8000, 4))
        wins = rng.random(8000) < 1 / (1 + np.exp(-(a - b) @ weights))
        chosen, rejected = np.where(wins[:, None], a, b), np.where(wins[:, None], b, a)
        inputs = np.concatenate([chosen, rejected])
        head, settings = fit_head(inputs, np.arange(8000) % 40, None, 0)
        np.testing.assert_allclose(head.coef_, weights, atol=0.15)
        assert head.predict(inputs).mean() == pytest.approx(0, abs=1e-12)
        assert 0.3 < settings["validation_loss"] < math.log(2)

    def test_regression_recovers_weights(self):
        rng = np.random.default_rng(0)
        weights, inputs = np.array([2.0, -1.0, 0.5]), rng.normal(size=(500, 3))
        targets = inputs @ weights + 3 + rng.normal(scale=0.01, size=500)
        head, _ = fit_head(inputs, np.arange(500) % 20, targets, 0)
        np.testing.assert_allclose(head.coef_, weights, atol=0.01)
        assert head.intercept_ == pytest.approx(3, abs=0.01)

    def test_flipped_pairs_negate_the_head(self):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(2, 200, 4))
        a[:, 0] += 1
        groups = np.arange(200) % 10
        there, back = (fit_head(np.concatenate(ab), groups, None, 0)[0] for ab in ((a, b), (b, a)))
        np.testing.assert_allclose(there.coef_, -back.coef_, atol=1e-6)


class TestFit:
    def test_known_letters(self):
        pairs = pairs_of(["a b", "ha ha", "c a c"], ["b b", "he he", "c d c"])
        reward = fit_reward(pairs, features=letters())
        report = reward.report_
        assert report.held_out.accuracy == 1.0
        assert (report.num_fitted, report.num_fitted_prompts) == (24, 8)
        assert (report.held_out.num_pairs, report.held_out.num_prompts) == (6, 2)
        assert sum(entry.count for entry in report.held_out.calibration) == 6
        assert reward.name == "learned(preferences)"
        # Scores are centred on what the head was fitted on.
        prompts = [pair.prompt for pair in pairs] * 2
        scores = reward.score(prompts, [p.chosen for p in pairs] + [p.rejected for p in pairs])
        assert abs(scores.mean()) < 0.5
        np.testing.assert_array_equal(
            scores,
            fit_reward(pairs, features=letters()).score(
                prompts, [p.chosen for p in pairs] + [p.rejected for p in pairs]
            ),
        )

    def test_flipped_preferences_prefer_the_opposite(self):
        pairs = pairs_of(["a b", "ha ha", "c a c"], ["b b", "he he", "c d c"])
        there = fit_reward(pairs, features=letters())
        back = fit_reward([pair.flipped() for pair in pairs], features=letters())
        prompts, texts = [pairs[0].prompt] * 3, ["a a", "b d", "no"]
        np.testing.assert_allclose(
            there.score(prompts, texts), -back.score(prompts, texts), atol=1e-4
        )

    def test_two_fits_do_not_share_their_features(self):
        features = letters()
        pairs = pairs_of(["a b", "ha ha"], ["b b", "he he"])
        first = fit_reward(pairs, features=features)
        before = first.score([pairs[0].prompt], ["a d"])
        fit_reward(pairs_of(["d d d d"], ["a"]), features=features)
        np.testing.assert_array_equal(first.score([pairs[0].prompt], ["a d"]), before)
        assert not hasattr(features, "scalers_")

    def test_held_out_prompts_are_not_fitted_on(self):
        pairs = pairs_of(["a b", "ha ha"], ["b b", "he he"])
        reward = fit_reward(pairs, features=letters(), seed=3)
        out = split_by_group([pair.prompt.text for pair in pairs], 0.2, 3)
        changed = [
            PreferencePair(p.prompt, p.rejected, "zzz") if o else p
            for p, o in zip(pairs, out, strict=True)
        ]
        other = fit_reward(changed, features=letters(), seed=3)
        prompts, texts = [pairs[0].prompt] * 2, ["a a", "b d"]
        np.testing.assert_array_equal(reward.score(prompts, texts), other.score(prompts, texts))
        assert other.report_.held_out != reward.report_.held_out

    def test_a_prompt_under_several_ids_is_one_prompt(self):
        pairs = [
            replace(pair, prompt=replace(pair.prompt, id=f"id-{i}"))
            for i, pair in enumerate(pairs_of(["a b", "ha ha"], ["b b", "he he"]))
        ]
        report = fit_reward(pairs, features=letters()).report_
        assert (report.num_fitted, report.num_fitted_prompts) == (16, 8)
        assert (report.held_out.num_pairs, report.held_out.num_prompts) == (4, 2)

    def test_regression(self):
        records = records_of(lambda text: 3 * text.count("a") - text.count("b"), count=20)
        reward = fit_reward(records, objective="regression", features=letters())
        held_out = reward.report_.held_out
        assert held_out.r2 > 0.95
        assert held_out.accuracy > 0.8
        assert held_out.num_records == 40
        assert reward.name == "learned(gold)"
        found = reward.score([Prompt.from_text("cats")], ["aaaa bbc dd e"])
        assert found[0] == pytest.approx(10, abs=1.5)

    @pytest.mark.parametrize(
        ("data", "options", "message"),
        [
            ([], {}, "got none"),
            (pairs_of(["a"], ["b"])[:1] * 50, {}, "at least 5 different prompts.*got 1 in 50"),
            (records_of(len, topics=TOPICS[:1]), {"objective": "regression"}, "got 1 in 4 rows"),
            (pairs_of(["a"], ["b"]), {"objective": "regression"}, "requires scored.*got Pref"),
            (records_of(len), {}, "requires preference pairs.*got Records.*pairs_from_records"),
            (pairs_of(["a"], ["b"]), {"objective": "dpo"}, "objective: expected one of"),
            (pairs_of(["a"], ["b"]), {"held_out": 1.5}, "held_out: expected a number"),
        ],
    )
    def test_data_that_cannot_be_fitted_on(self, data, options, message):
        with pytest.raises(RewardFitError, match=message):
            fit_reward(data, features=letters(), **options)

    def test_pairs_that_look_the_same(self):
        pairs = pairs_of(["x y"], ["y x"])
        with pytest.raises(RewardFitError, match="look the same to embedding features"):
            fit_reward(pairs, features=letters(use_statistics=False))

    def test_records_of_two_rewards(self):
        records = records_of(len)
        records[0] = replace(records[0], reward_name="other")
        with pytest.raises(RewardFitError, match=r"one reward model, got those of \['gold', 'oth"):
            fit_reward(records, objective="regression", features=letters())

    def test_the_longer_response_is_reported(self):
        pairs = pairs_of(["long " * 5], ["a"])
        assert fit_reward(pairs, features=letters()).report_.held_out.longer_wins == 1.0


def test_minilm_learns_praise(minilm):
    """About 200 pairs; words of praise and blame on new topics."""
    topics = [f"{a} and {b}" for a in TOPICS for b in TOPICS[:7] if a != b]
    pairs = pairs_of(PRAISE, BLAME, topics)
    features = EmbeddingFeatures(use_statistics=False)
    reward = fit_reward(pairs, features=features, data_name="praise")
    held_out = reward.report_.held_out
    # 30 pairs or more: guessing reaches 0.9 once in thousands of times.
    assert held_out.num_pairs >= 30
    assert held_out.accuracy >= 0.9
    assert held_out.log_loss < 0.4
    prompt = Prompt.from_text("Tell me about the sea.")
    good, bad = score_responses(reward, [prompt] * 2, ["It was great.", "It was awful."]).total
    assert good > bad


def test_the_contract_on_minilm(minilm):
    reward = fit_reward(pairs_of(PRAISE, BLAME))
    check_reward_model(reward)
    assert reward.flops_bound() > 0


def test_the_contract_on_hidden_states(smollm2):
    pairs = pairs_of(PRAISE[:1], BLAME[:1])
    reward = fit_reward(pairs, features=HiddenFeatures(smollm2))
    assert reward.report_.model == "linear on hidden"
    assert reward.report_.held_out.accuracy == 1.0
    check_reward_model(
        reward, [Prompt.from_text("Hi")], ["It was good.", "", "日本 <|im_end|> 🙂", "a b " * 40]
    )


def test_a_prompt_beyond_the_context_is_named(smollm2):
    reward = fit_reward(pairs_of(PRAISE[:1], BLAME[:1]), features=HiddenFeatures(smollm2))
    long = Prompt.from_text("word " * 9_000, "the-long-one")
    assert not applies_to(reward, long)
    assert applies_to(reward, Prompt.from_text("Hi"))
    with pytest.raises(RewardError, match="the-long-one"):
        score_responses(reward, [long], ["Yes."])

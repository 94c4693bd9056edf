"""Ridge regression on the language model's hidden state."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mbrl_text_env.agents.values import HiddenStateValue, cut_prefixes
from mbrl_text_env.language_models.base import spawn_seed
from mbrl_text_env.mdp import initial
from mbrl_text_env.types import Ledger, Prompt
from mbrl_text_env.values import ValueModelError, predict_values
from tests.agents.values.worlds import LENGTHS, LM, prefixes, toy_records, written


def test_it_is_ridge_on_the_features():
    records = toy_records()
    value = HiddenStateValue(LM, alphas=(3.0,), lengths=LENGTHS).fit(records)
    states, owners = cut_prefixes(records, LENGTHS)
    reference = make_pipeline(StandardScaler(), Ridge(alpha=3.0))
    reference.fit(LM.features(states).astype(float), [owner.score for owner in owners])
    expected = reference.predict(LM.features(prefixes()).astype(float))
    assert value.predict(prefixes()).mean == pytest.approx(expected)


def followed_by(weights, noise=0.0, seed=0):
    """Responses whose score is a weighted sum of the language model's next probabilities."""
    rng = np.random.default_rng(seed)
    for i in range(120):
        text = "".join(rng.choice(list("abcde"), size=4))
        blank = written(f"{'abcde'[i % 5]}{'abcde'[i // 5 % 4]}", text, 0.0)
        features = LM.next_probabilities(blank.prompt_ids, blank.response_ids[:3])
        yield written(blank.prompt_text, text, float(features @ weights + noise * rng.normal()))


def test_it_learns_a_score_that_the_features_tell():
    weights = np.array([0.0, 3.0, -1.0, 2.0, 0.0, 1.0])
    value = HiddenStateValue(LM, alphas=(0.001, 100.0), lengths=(3,)).fit(
        list(followed_by(weights))
    )
    assert value.chosen_ == "alpha=0.001"
    assert value.report_.within_prompt > 0.999
    state = prefixes()[2]
    expected = LM.next_probabilities(state.prompt_ids, state.response_ids) @ weights
    assert value.predict([state]).mean == pytest.approx([expected], abs=0.02)


def test_a_strong_penalty_is_taken_where_scores_are_noise():
    records = list(followed_by(np.zeros(6), noise=1.0))
    value = HiddenStateValue(LM, alphas=(1e-3, 1e6), lengths=(3,)).fit(records)
    assert value.chosen_ == "alpha=1e+06"
    assert abs(value.report_.within_prompt) < 0.25
    assert value.predict([prefixes()[2]]).std == pytest.approx(
        [np.std([r.score for r in records])], rel=0.1
    )


def test_it_costs_what_reading_the_prefix_costs():
    value = HiddenStateValue(LM, lengths=LENGTHS).fit(toy_records())
    for state in prefixes():
        ledger = Ledger()
        predict_values(value, [state], ledgers=[ledger])
        tokens = len(state.prompt_ids) + len(state.response_ids)
        assert ledger.usage.prompt_tokens == ledger.usage.lm_flops == tokens
        assert value.usage_bound(state) == LM.usage_bound(tokens, [])


class Server:
    """A language model that gives text alone."""

    name = LM.name
    decode = staticmethod(LM.decode)


def test_a_language_model_without_features_is_told_apart():
    value = HiddenStateValue(Server(), lengths=LENGTHS)
    with pytest.raises(ValueModelError, match=r"`features`, got Server.*StackedValue"):
        value.fit(toy_records())
    assert not value.is_fitted


@pytest.mark.parametrize("wrong", [{"alphas": ()}, {"alphas": (1.0, 0.0)}])
def test_penalties_that_are_none(wrong):
    with pytest.raises(ValueError, match="alphas: expected numbers above 0"):
        HiddenStateValue(LM, **wrong)
    with pytest.raises(ValueError, match="lengths"):
        HiddenStateValue(LM, lengths=())


def test_the_real_hidden_state(smollm2):
    records = []
    for text in ("Say hello.", "Name a colour."):
        state = initial(Prompt.from_text(text), smollm2)
        [chunks] = smollm2.sample([state], 3, 10, seeds=[spawn_seed(0, 1)])
        for chunk in chunks:
            response = smollm2.decode(chunk.token_ids)
            records.append(
                written(
                    text, response, float(len(response)), prompt_ids=state.prompt_ids,
                    response_ids=chunk.token_ids, language_model=smollm2.name,
                )
            )  # fmt: skip
    value = HiddenStateValue(smollm2, lengths=(4,)).fit(records)
    assert value.head_[-1].coef_.shape == (smollm2.feature_size,)
    # Prefixes that it has not read yet: others may come from its cache.
    texts = [Prompt.from_text(text, chat=False) for text in ("Wow, fine", "Green and blue")]
    states = [
        replace(record.prefix_state(0), response_ids=smollm2.encode_prompt(text))
        for record, text in zip(records[::5], texts, strict=True)
    ]
    ledgers = [Ledger(), Ledger()]
    estimate = predict_values(value, states, ledgers=ledgers)
    assert estimate.mean == pytest.approx(value.predict(states[::-1]).mean[::-1], rel=1e-3)
    for state, ledger in zip(states, ledgers, strict=True):
        assert 0 < ledger.usage.lm_flops <= value.usage_bound(state).lm_flops

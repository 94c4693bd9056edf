"""Features: counts only grow, end where the reward's counts are, and are the same in records."""

import pickle
from math import nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env.language_models.toy import CharTokenizer
from mbrl_text_env.records import Record
from mbrl_text_env.rewards.verifiable.constraints.kinds import COUNTED
from mbrl_text_env.types import Prompt, TextState
from mbrl_text_env.world_model import TextFeature, TextFeatures, count_feature
from mbrl_text_env.world_model.features import DEFAULT_FEATURES

TOKENIZER = CharTokenizer('aAbZ1. ,*-\n[]{"?\\')
PROMPT = Prompt.from_text("a")
texts = st.text(TOKENIZER.alphabet, max_size=40)


def states_of(text, reason="length"):
    ids = tuple(TOKENIZER.encode_text(text))
    cuts = [TextState(PROMPT, (1,), ids[:n]) for n in range(len(ids))]
    return [*cuts, TextState(PROMPT, (1,), ids, reason)]


@settings(max_examples=200, deadline=None)
@given(texts)
def test_counts_never_fall_up_to_those_of_the_end(text):
    features = TextFeatures(TOKENIZER)
    rows = features(states_of(text))
    falls = [False, *(f.falls for f in features.features)]
    assert (np.diff(rows[:, ~np.array(falls)], axis=0) >= 0).all()
    for name, counted in COUNTED.items():
        if counted.argument is None:
            assert rows[-1, features.names.index(name)] == counted.count(text)


def test_counts_by_hand():
    features = TextFeatures(TOKENIZER)
    [*_, row] = features(states_of("- aA, b\n1. ZZ [b]. b? {["))
    found = dict(zip(features.names, row.tolist(), strict=True))
    expected = {
        "tokens": 24, "words": 6, "commas": 1, "lines": 2, "items": 2, "bullets": 1, "capitals": 3,
        "digits": 1, "placeholders": 1, "json_depth": 2, "letters:a": 2, "letters:b": 3,
        "capital_words": 1, "runs": 8, "distinct_words": 8,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_records_and_live_states_have_the_same_features():
    state = states_of("aA b. ZZ")[-1]
    record = Record.from_state(
        state, response="aA b. ZZ", score=None, rewards={}, reward_name="", agent="x",
        language_model="toy", seed=0,
    )  # fmt: skip
    features = TextFeatures(TOKENIZER)
    recorded = [record.prefix_state(n) for n in range(9)]
    np.testing.assert_array_equal(features(recorded), features(states_of("aA b. ZZ")))


def test_features_can_be_pickled():
    again = pickle.loads(pickle.dumps(TextFeatures(TOKENIZER)))  # noqa: S301, it was made here
    states = states_of("aA b. ZZ")
    np.testing.assert_array_equal(again(states), TextFeatures(TOKENIZER)(states))


def test_a_user_adds_a_function_of_the_text_and_names_have_to_differ():
    own = TextFeature("questions", lambda text: text.count("?"))
    features = TextFeatures(TOKENIZER, [own, count_feature("occurrences", "a")])
    assert features.names == ("tokens", "questions", "occurrences:a")
    assert features(states_of("a? ?")[-1:]).tolist() == [[4, 2, 1]]
    with pytest.raises(ValueError, match="different names"):
        TextFeatures(TOKENIZER, [*DEFAULT_FEATURES, count_feature("words")])
    broken = TextFeatures(TOKENIZER, [TextFeature("x", lambda text: 1 / (len(text) - 1 or nan))])
    with pytest.raises(ValueError, match="Feature 'x': expected finite numbers, got nan for 1 tok"):
        broken(states_of("ab"))
    with pytest.raises(ValueError, match="'letters' of None"):
        count_feature("letters")

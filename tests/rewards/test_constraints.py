"""Every checker against cases that were worked out by hand."""

# ruff: noqa: RUF001 - the quotation marks and full stops of other scripts are meant.

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.rewards.base import applies_to, score_responses
from mbrl_text_env.rewards.constraints import (
    CONSTRAINT_TYPES,
    ConstraintError,
    ConstraintsReward,
    check_constraint,
)
from mbrl_text_env.types import Prompt

SAMPLES: list[dict[str, Any]] = [
    {"type": "max_words", "value": 3},
    {"type": "min_words", "value": 1},
    {"type": "num_sentences", "value": 1},
    {"type": "max_sentences", "value": 1},
    {"type": "num_paragraphs", "value": 1},
    {"type": "num_bullets", "value": 1},
    {"type": "keywords", "value": ["sun"]},
    {"type": "keyword_count", "keyword": "sun", "value": 1},
    {"type": "forbidden_words", "value": ["sun"]},
    {"type": "no_commas"},
    {"type": "lowercase"},
    {"type": "uppercase"},
    {"type": "starts_with", "value": "Dear"},
    {"type": "ends_with", "value": "Bye."},
    {"type": "quoted"},
    {"type": "title"},
    {"type": "postscript"},
    {"type": "placeholders", "value": 1},
    {"type": "json_object"},
]

CASES: list[tuple[str, Mapping[str, Any], str, bool]] = [
    ("max_words", {"value": 3}, "one two three", True),
    ("max_words", {"value": 2}, "one two three", False),
    ("max_words", {"value": 3}, "well-known - don't\n* 42", True),
    ("max_words", {"value": 2}, "—  ... !", True),
    ("min_words", {"value": 3}, " one\ttwo\nthree ", True),
    ("min_words", {"value": 4}, "one two three", False),
    ("min_words", {"value": 2}, "word — - !", False),
    ("min_words", {"value": 2}, "Привет мир", True),
    ("min_words", {"value": 2}, "हिन्दी भाषा", True),
    ("min_words", {"value": 3}, "हिन्दी भाषा", False),
    ("num_sentences", {"value": 2}, "It rains. Bring a coat!", True),
    ("num_sentences", {"value": 1}, "It rains. Bring a coat!", False),
    ("num_sentences", {"value": 2}, "It rains. Bring a coat", True),
    ("num_sentences", {"value": 1}, "Dr. Li paid 3.50 for it, e.g. in cash.", True),
    ("num_sentences", {"value": 2}, "Really?! Yes...", True),
    ("num_sentences", {"value": 2}, '"Is it late?" I never know.', True),
    ("num_sentences", {"value": 2}, "**Stop.** (Please go on.)", True),
    ("num_sentences", {"value": 2}, "1. Boil water.\n2. Add salt.", True),
    ("num_sentences", {"value": 2}, "No full stop here\n\nnor here", True),
    ("num_sentences", {"value": 1}, "A line\nthat goes on", True),
    ("num_sentences", {"value": 2}, "今日は雨です。傘を持って！", True),
    ("num_sentences", {"value": 1}, "...", False),
    ("max_sentences", {"value": 2}, "It rains. Bring a coat.", True),
    ("max_sentences", {"value": 1}, "It rains. Bring a coat.", False),
    ("num_paragraphs", {"value": 2}, "First.\nStill first.\n\nSecond.", True),
    ("num_paragraphs", {"value": 2}, "\n\nFirst.\n \t\n\n\nSecond.\n\n", True),
    ("num_paragraphs", {"value": 2}, "First.\r\n\r\nSecond.", True),
    ("num_paragraphs", {"value": 2}, "First.\nStill first.", False),
    ("num_bullets", {"value": 2}, "Buy:\n- milk\n* eggs", True),
    ("num_bullets", {"value": 2}, "  - milk\n\t* eggs", True),
    ("num_bullets", {"value": 1}, "- milk\n- eggs", False),
    ("num_bullets", {"value": 1}, "-milk\n**eggs**\nsalt - pepper\n- ", False),
    ("keywords", {"value": ["sun", "ice cream"]}, "SUN, and ice\ncream!", True),
    ("keywords", {"value": ["sun", "moon"]}, "The sun shines.", False),
    ("keywords", {"value": ["sun"]}, "Sunday sunshine, asun, sun_1", False),
    ("keywords", {"value": ["C++", "a.b"]}, "I write C++ and a.b", True),
    ("keywords", {"value": ["a.b"]}, "axb", False),
    ("keywords", {"value": ["café"]}, "The CAFE\u0301 opens.", True),
    ("keywords", {"value": ["strasse"]}, "Die Straße", True),
    ("keyword_count", {"keyword": "ride", "value": 2}, "Ride, my friend, ride!", True),
    ("keyword_count", {"keyword": "ride", "value": 3}, "Ride, my friend, ride!", False),
    ("keyword_count", {"keyword": "ride", "value": 2}, "ride a bride rides", False),
    ("keyword_count", {"keyword": "ride", "value": 3}, "ride ride ride", True),
    ("forbidden_words", {"value": ["rain", "cold"]}, "A rainy and scolding day", True),
    ("forbidden_words", {"value": ["rain", "cold"]}, "It was COLD.", False),
    ("forbidden_words", {"value": ["ice cream"]}, "Ice  cream again", False),
    ("no_commas", {}, "No pause; none.", True),
    ("no_commas", {}, "Well, yes.", False),
    ("no_commas", {}, "是，的", False),
    ("lowercase", {}, "all small, 3 of them: é ß", True),
    ("lowercase", {}, "almost All small", False),
    ("lowercase", {}, "État", False),
    ("lowercase", {}, "123 !", False),
    ("uppercase", {}, "ALL LARGE, 3 OF THEM: É", True),
    ("uppercase", {}, "ALMOST ALL LARGe", False),
    ("uppercase", {}, "123 !", False),
    ("starts_with", {"value": "Dear Ann"}, "\n Dear Ann, hello", True),
    ("starts_with", {"value": "Dear Ann "}, "Dear Ann", True),
    ("starts_with", {"value": "Dear Ann"}, "dear Ann, hello", False),
    ("starts_with", {"value": "É"}, "E\u0301t\u00e9", True),
    ("ends_with", {"value": "Bye."}, "So long. Bye.\n", True),
    ("ends_with", {"value": "Bye."}, "Bye. So long.", False),
    ("quoted", {}, ' "Time flies." ', True),
    ("quoted", {}, "“Time flies.”", True),
    ("quoted", {}, '"He said "no" to me."', True),
    ("quoted", {}, 'He said "no".', False),
    ("quoted", {}, "“Time flies.“", False),
    ("quoted", {}, "'Time flies.'", False),
    ("quoted", {}, '"', False),
    ("quoted", {}, '" "', False),
    ("title", {}, "<<The Sea>>\nBlue.", True),
    ("title", {}, "A poem: <<Été>>", True),
    ("title", {}, "<The Sea>", False),
    ("title", {}, "<< >> and <<>>", False),
    ("title", {}, "<<The\nSea>>", False),
    ("postscript", {}, "Dear Ann\nP.S. Write soon.", True),
    ("postscript", {}, "Dear Ann\n  P.S. Write soon.", True),
    ("postscript", {}, "Dear Ann, P.S. Write soon.", False),
    ("postscript", {}, "Dear Ann\nPS: Write soon.", False),
    ("placeholders", {"value": 2}, "Dear [name], see you on [date].", True),
    ("placeholders", {"value": 2}, "Dear [имя], dear [имя]", True),
    ("placeholders", {"value": 3}, "Dear [name], see you on [date].", False),
    ("placeholders", {"value": 1}, "[] [ ] [open", False),
    ("json_object", {}, ' {"name": "Zoë", "tags": ["a"]}\n', True),
    ("json_object", {}, "{}", True),
    ("json_object", {}, '["a"]', False),
    ("json_object", {}, '```json\n{"a": 1}\n```', False),
    ("json_object", {}, "{'a': 1}", False),
    ("json_object", {}, '{"a": NaN}', False),
    ("json_object", {}, "[" * 100_000, False),
    ("json_object", {}, '{"a": ' + "9" * 5000 + "x", False),
]


@pytest.mark.parametrize(("name", "arguments", "response", "expected"), CASES)
def test_cases_worked_out_by_hand(name, arguments, response, expected):
    assert check_constraint({"type": name, **arguments}, response) is expected


def test_every_type_has_a_case_that_holds_and_one_that_fails():
    for name in CONSTRAINT_TYPES:
        assert {case[3] for case in CASES if case[0] == name} == {True, False}


def test_there_is_a_sample_of_every_type():
    assert [sample["type"] for sample in SAMPLES] == list(CONSTRAINT_TYPES)


@pytest.mark.parametrize("constraint", SAMPLES, ids=lambda sample: sample["type"])
@pytest.mark.parametrize("response", ["", " ", "\n\t\u3000"])
def test_an_empty_response_satisfies_nothing(constraint, response):
    assert check_constraint(constraint, response) is False


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ("max_words", "Expected a constraint such as .*got 'max_words'.*Make it an object"),
        ({"value": 3}, "Expected a constraint such as .*'type' is a string"),
        ({"type": ["max_words"]}, "Expected a constraint such as "),
        ({"type": "max_word", "value": 3}, "got 'max_word'. Did you mean 'max_words'"),
        ({"type": "zzz"}, "got 'zzz'. Change it to one of: ends_with, .*uppercase"),
        ({"type": "max_words"}, "expected 'value', got no arguments. Add 'value'."),
        (
            {"type": "keyword_count", "value": 2},
            "expected 'keyword', 'value', got 'value'. Add 'keyword'.",
        ),
        ({"type": "no_commas", "value": 1}, "expected no arguments, got 'value'. Remove 'value'."),
        ({"type": "title", "response": "x"}, "expected no arguments, got 'response'. Remove"),
        ({"type": "max_words", "value": "3"}, "'value' to be an integer of at least 1, got '3'"),
        ({"type": "max_words", "value": 3.0}, "to be an integer of at least 1, got 3.0"),
        ({"type": "max_words", "value": True}, "to be an integer of at least 1, got True"),
        ({"type": "max_words", "value": 0}, "to be an integer of at least 1, got 0"),
        ({"type": "keywords", "value": "sun"}, "a list of at least one string, .* got 'sun'"),
        ({"type": "keywords", "value": []}, r"a list of at least one string, .* got \[\]"),
        ({"type": "forbidden_words", "value": ["a", " "]}, "none of them blank, got "),
        ({"type": "starts_with", "value": ""}, "a string that is not blank, got ''"),
        ({"type": "keyword_count", "keyword": 1, "value": 1}, "'keyword' to be a string"),
    ],
)
@pytest.mark.parametrize("response", ["Some text.", ""])
def test_malformed_constraints_are_errors_that_say_what_to_change(constraint, expected, response):
    with pytest.raises(ConstraintError, match=expected):
        check_constraint(constraint, response)


def test_the_error_is_a_value_error():
    assert issubclass(ConstraintError, ValueError)


TEXTS = st.text() | st.lists(
    st.sampled_from(["Word", "two", "ok.", "Why?", "-", "\n", "\n\n", "- item", "[x]", "..."])
).map(" ".join)
NONEMPTY = TEXTS.filter(str.strip)


@given(NONEMPTY, st.integers(1, 20))
def test_exactly_one_of_at_least_n_and_at_most_n_minus_one_words_holds(response, n):
    at_least = check_constraint({"type": "min_words", "value": n + 1}, response)
    at_most = check_constraint({"type": "max_words", "value": n}, response)
    assert at_least is not at_most


@given(NONEMPTY, st.integers(1, 20))
def test_exactly_n_sentences_are_at_most_n(response, n):
    if check_constraint({"type": "num_sentences", "value": n}, response):
        assert check_constraint({"type": "max_sentences", "value": n}, response)
        assert not check_constraint({"type": "num_sentences", "value": n + 1}, response)


@given(NONEMPTY)
def test_a_response_is_never_both_lowercase_and_uppercase(response):
    both = [check_constraint({"type": name}, response) for name in ("lowercase", "uppercase")]
    assert not all(both)


@given(NONEMPTY, st.sampled_from(["word", "two", "why", "item"]))
def test_a_word_is_either_a_keyword_or_forbidden(response, word):
    required = check_constraint({"type": "keywords", "value": [word]}, response)
    forbidden = check_constraint({"type": "forbidden_words", "value": [word]}, response)
    counted = check_constraint({"type": "keyword_count", "keyword": word, "value": 1}, response)
    assert required is not forbidden
    assert required is counted


@given(TEXTS, NONEMPTY)
def test_a_response_starts_and_ends_with_its_own_affixes(middle, affix):
    response = f"{affix} {middle} {affix}"
    assert check_constraint({"type": "starts_with", "value": affix}, response)
    assert check_constraint({"type": "ends_with", "value": affix}, response)


@given(st.lists(st.just("Some text"), min_size=1, max_size=8))
def test_joined_paragraphs_and_bullets_are_counted(lines):
    paragraphs = {"type": "num_paragraphs", "value": len(lines)}
    bullets = {"type": "num_bullets", "value": len(lines)}
    assert check_constraint(paragraphs, "\n\n".join(lines))
    assert check_constraint(bullets, "\n".join(f"- {line}" for line in lines))


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text()))
def test_whatever_json_writes_of_a_dict_is_a_json_object(value):
    assert check_constraint({"type": "json_object"}, json.dumps(value))


@given(TEXTS, st.sampled_from(SAMPLES))
def test_any_text_gets_a_plain_bool(response, constraint):
    assert isinstance(check_constraint(constraint, response), bool)


def _prompt(constraints: object, name: str = "letter-1") -> Prompt:
    return Prompt(name, "Write a letter.", {"constraints": constraints})


def test_score_is_the_fraction_of_the_constraints():
    two = _prompt([{"type": "lowercase"}, {"type": "max_words", "value": 2}])
    three = _prompt([{"type": "no_commas"}, {"type": "title"}, {"type": "uppercase"}], "b")
    scores = ConstraintsReward().score(
        [two, two, two, three, three], ["good day", "Good day", "", "YES, <<SEA>>", "Yes."]
    )
    assert scores.dtype == np.float64
    assert scores.shape == (5,)
    np.testing.assert_allclose(scores, [1, 0.5, 0, 2 / 3, 1 / 3])


def test_score_of_nothing_is_an_empty_array():
    scores = ConstraintsReward().score([], [])
    assert scores.shape == (0,)
    assert scores.dtype == np.float64


@pytest.mark.parametrize(
    "prompt", [Prompt("plain", "Hello"), _prompt([], "plain"), _prompt("no_commas", "plain")]
)
def test_a_prompt_without_constraints_is_an_error_with_its_id(prompt):
    with pytest.raises(ConstraintError, match=r"Prompt 'plain': expected .*constraints"):
        ConstraintsReward().score([prompt], ["Hi"])


def test_a_malformed_constraint_is_an_error_with_the_prompts_id():
    with pytest.raises(ConstraintError, match=r"Prompt 'letter-1': .*'no_comma'.*'no_commas'"):
        ConstraintsReward().score([_prompt([{"type": "no_comma"}])], ["Hi"])


def test_prompts_and_responses_must_be_as_many():
    with pytest.raises(ValueError, match="got 1 prompts and 2 responses"):
        ConstraintsReward().score([_prompt([{"type": "title"}])], ["a", "b"])


def test_applies_to_prompts_with_constraints():
    reward = ConstraintsReward()
    assert applies_to(reward, _prompt([{"type": "title"}]))
    assert reward.applies_to(_prompt([{"type": "title"}])) is True
    assert reward.applies_to(_prompt([])) is False
    assert reward.applies_to(Prompt("plain", "Hello")) is False


def test_it_is_a_reward_model_under_its_name():
    scores = score_responses(ConstraintsReward(), [_prompt([{"type": "title"}])], ["<<Sea>>"])
    assert scores.parts_of(0) == {"constraints": 1.0}

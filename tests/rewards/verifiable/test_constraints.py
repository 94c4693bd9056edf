"""Every checker against cases that were worked out by hand."""

# ruff: noqa: RUF001 - the quotation marks and full stops of other scripts are meant.

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards.base import applies_to, score_responses, score_steps
from mbrl_text_env.rewards.verifiable.constraints import (
    CONSTRAINT_TYPES,
    ConstraintError,
    ConstraintsReward,
    check_constraint,
    prefix_verdict,
)
from mbrl_text_env.types import Message, Prompt

PROMPT = "Why is the sky blue?"

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
    {"type": "min_sentences", "value": 1},
    {"type": "min_paragraphs", "value": 1},
    {"type": "max_paragraphs", "value": 1},
    {"type": "max_keyword_count", "keyword": "sun", "value": 1},
    {"type": "exact_keyword_count", "keyword": "sun", "value": 1},
    {"type": "min_letter_count", "letter": "e", "value": 1},
    {"type": "max_letter_count", "letter": "e", "value": 1},
    {"type": "min_capital_words", "value": 1},
    {"type": "max_capital_words", "value": 1},
    {"type": "numbered_list", "value": 1},
    {"type": "highlights", "value": 1},
    {"type": "sections", "splitter": "Part", "value": 1},
    {"type": "language", "value": "en"},
    {"type": "repeats_prompt"},
    {"type": "two_responses"},
    {"type": "paragraph_first_word", "index": 1, "value": "sun"},
    {"type": "one_of", "value": ["yes", "no"]},
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
    ("num_sentences", {"value": 1}, "George R. R. Martin met J. K. Rowling.", True),
    ("num_sentences", {"value": 2}, "We chose plan B. The rest is history.", True),
    ("num_sentences", {"value": 2}, "It was I. Nobody else came.", True),
    ("num_sentences", {"value": 1}, "She left at 5 p.m. sharp, not 6 a.m. Monday.", True),
    ("num_sentences", {"value": 2}, "She left at 5 p.m. Nobody saw her.", True),
    ("num_sentences", {"value": 1}, "The U.S. Senate and the U.K. parliament met.", True),
    ("num_sentences", {"value": 2}, "He lives in the U.S. She does not.", True),
    ("num_sentences", {"value": 1}, "A Ph.D. in physics from Acme Inc. or Smith Ltd. helps.", True),
    ("num_sentences", {"value": 2}, "It was made by Acme Inc. It broke.", True),
    ("num_sentences", {"value": 1}, "Buy figs, nuts etc. at No. 5 (see fig. 2).", True),
    ("num_sentences", {"value": 2}, "He said no. She said nothing", True),
    ("num_sentences", {"value": 1}, "The band played St. Louis and Mt. Everest.", True),
    ("num_sentences", {"value": 2}, "यह एक वाक्य है। यह दूसरा है॥", True),
    ("num_sentences", {"value": 2}, "هل أنت هنا؟ نعم.", True),
    ("num_sentences", {"value": 2}, "یہ ایک جملہ ہے۔ یہ دوسرا ہے۔", True),
    ("num_sentences", {"value": 3}, "你好。“我来了！”他说。", True),
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
    ("num_bullets", {"value": 2}, "* * *\n-\ta\n- - -\n*  b\n-----", True),
    ("num_bullets", {"value": 1}, "* * * a", True),
    ("keywords", {"value": ["sun", "ice cream"]}, "SUN, and ice\ncream!", True),
    ("keywords", {"value": ["river", "ice cream"]}, "The __river__ of **ice** _cream_", True),
    ("keywords", {"value": ["snake_case", "__init__"]}, "Use snake_case in __init__ now", True),
    ("keywords", {"value": ["don't", "it’s"]}, "It's late, so don\u2019t go.", True),
    ("keywords", {"value": ["python"]}, "我用Python写代码", True),
    ("keywords", {"value": ["art"]}, "Smart starts, arts", False),
    ("keywords", {"value": ["हिन"]}, "हिन्दी", False),
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
    ("forbidden_words", {"value": ["river"]}, "The _river_ is wide.", False),
    ("forbidden_words", {"value": ["can't"]}, "I can\u2019t do it.", False),
    ("forbidden_words", {"value": ["咖啡"]}, "我喜欢咖啡和茶。", False),
    ("forbidden_words", {"value": ["コーヒー"]}, "私はコーヒーが好きです。", False),
    ("forbidden_words", {"value": ["กาแฟ"]}, "ฉันชอบกาแฟมาก", False),
    ("forbidden_words", {"value": ["กา"]}, "กาีย", True),
    ("forbidden_words", {"value": ["커피"]}, "저는 커피를 좋아해요.", False),
    ("forbidden_words", {"value": ["커피"]}, "커피에서는 향이 나요.", False),
    ("forbidden_words", {"value": ["커피"]}, "커피숍과 아이스커피", True),
    ("max_keyword_count", {"keyword": "猫", "value": 2}, "我的猫喜欢你的猫和他的猫。", False),
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
    ("title", {}, "<<A -> B>> or <<5 > 3>>", True),
    ("title", {}, "<<<The Sea>>>", True),
    ("title", {}, "<<<>>> <<a>", False),
    ("title", {}, "<The Sea>", False),
    ("title", {}, "<< >> and <<>>", False),
    ("title", {}, "<<The\nSea>>", False),
    ("postscript", {}, "Dear Ann\nP.S. Write soon.", True),
    ("postscript", {}, "Dear Ann\n  P.S. Write soon.", True),
    ("postscript", {}, "Dear Ann\n\n**P.S.** Write soon.", True),
    ("postscript", {}, "> _P.S._ Write soon.", True),
    ("postscript", {}, "Dear Ann, P.S. Write soon.", False),
    ("postscript", {}, "Dear Ann, **P.S.** Write soon.", False),
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
    ("min_sentences", {"value": 2}, "It rains. Bring a coat.", True),
    ("min_sentences", {"value": 3}, "It rains. Bring a coat.", False),
    ("min_paragraphs", {"value": 2}, "First.\n\nSecond.\n\nThird.", True),
    ("min_paragraphs", {"value": 2}, "First.\nStill first.\n\n", False),
    ("max_paragraphs", {"value": 2}, "First.\n\nSecond.", True),
    ("max_paragraphs", {"value": 1}, "First.\n\nSecond.", False),
    ("max_keyword_count", {"keyword": "ride", "value": 2}, "Ride, my friend, ride!", True),
    ("max_keyword_count", {"keyword": "ride", "value": 1}, "Ride, my friend, ride!", False),
    ("max_keyword_count", {"keyword": "ride", "value": 1}, "Ride a bride.", True),
    ("exact_keyword_count", {"keyword": "ride", "value": 2}, "Ride, my friend, ride!", True),
    ("exact_keyword_count", {"keyword": "ride", "value": 2}, "Ride!", False),
    ("exact_keyword_count", {"keyword": "ride", "value": 2}, "Ride, ride, ride!", False),
    ("min_letter_count", {"letter": "e", "value": 3}, "Eve sees", True),
    ("min_letter_count", {"letter": "E", "value": 5}, "Eve sees", False),
    ("min_letter_count", {"letter": "e", "value": 1}, "caf\u0065\u0301", False),
    ("min_letter_count", {"letter": "é", "value": 2}, "É, caf\u0065\u0301", True),
    ("min_letter_count", {"letter": "ß", "value": 1}, "Straße", True),
    ("min_letter_count", {"letter": "#", "value": 2}, "## a!", True),
    ("min_letter_count", {"letter": "!", "value": 2}, "## a!", False),
    ("max_letter_count", {"letter": "e", "value": 4}, "Eve sees", True),
    ("max_letter_count", {"letter": "e", "value": 3}, "Eve sees", False),
    ("min_capital_words", {"value": 2}, "I say NO! to B-52s", True),
    ("min_capital_words", {"value": 3}, "I say NO! to B-52s", False),
    ("min_capital_words", {"value": 1}, "42 ... 17", False),
    ("max_capital_words", {"value": 1}, "We say STOP now", True),
    ("max_capital_words", {"value": 1}, "We SAY stop NOW", False),
    ("numbered_list", {"value": 2}, "Do:\n1. Boil water.\n  2) Add 1.5 g.", True),
    ("numbered_list", {"value": 2}, "1. Boil water.\n3. Add salt.", False),
    ("numbered_list", {"value": 2}, "1. Boil water.", False),
    ("numbered_list", {"value": 2}, "1. Boil.\n2. Salt.\n3. Serve.", False),
    ("numbered_list", {"value": 1}, "1.Boil water, 1. now", False),
    ("numbered_list", {"value": 1}, "9" * 5000 + ". x\n1. y", True),
    ("highlights", {"value": 2}, "A *first* and a **second** part", True),
    ("highlights", {"value": 3}, "A *first* and a **second** part", False),
    ("highlights", {"value": 1}, "2 * 3 * 4, ** and *a\nb*", False),
    ("highlights", {"value": 1}, "* milk\n* eggs", False),
    ("sections", {"splitter": "Part", "value": 2}, "Part 1\nA.\nPart 2\nB.", True),
    ("sections", {"splitter": "Part", "value": 3}, "Part 1\nA.\nPart 2\nB.", False),
    ("sections", {"splitter": "Part", "value": 1}, "Counterpart 1, part 1, Part one", False),
    ("sections", {"splitter": "§", "value": 1}, "See §4.", True),
    ("sections", {"splitter": "Part", "value": 2}, "__Part 1__\n**Part 2**", True),
    ("language", {"value": "en"}, "The weather is very nice today, is it not?", True),
    ("language", {"value": "de"}, "Das Wetter ist heute sehr schön, nicht wahr?", True),
    ("language", {"value": "en"}, "Das Wetter ist heute sehr schön, nicht wahr?", False),
    ("language", {"value": "ru"}, "Сегодня очень хорошая погода.", True),
    ("language", {"value": "ja"}, "今日はとても天気がいいですね。", True),
    ("language", {"value": "zh-cn"}, "今天的天气非常好，我们去公园吧。", True),
    ("language", {"value": "en"}, "12345 !? 67", False),
    ("repeats_prompt", {}, "Why is the\nSKY blue? Because of the air.", True),
    ("repeats_prompt", {}, "Why is the sky blue?", False),
    ("repeats_prompt", {}, "Why is the sky blue?Because.", False),
    ("repeats_prompt", {}, "You ask: Why is the sky blue? Because.", False),
    ("repeats_prompt", {}, "Why is the sea blue? Because.", False),
    ("two_responses", {}, "Yes.\n******\nNo.", True),
    ("two_responses", {}, "******Yes.******No.******", True),
    ("two_responses", {}, "Yes.******Yes.", False),
    ("two_responses", {}, "Yes.****** ******No.", False),
    ("two_responses", {}, "Yes.******No.******Maybe.", False),
    ("two_responses", {}, "Yes.*****No.", False),
    ("two_responses", {}, "Yes. No.", False),
    ("paragraph_first_word", {"index": 2, "value": "Then"}, "So.\n\n“THEN, no.", True),
    ("paragraph_first_word", {"index": 2, "value": "then"}, "Then.\nThen.", False),
    ("paragraph_first_word", {"index": 1, "value": "then"}, "And then.\n\nThen.", False),
    ("paragraph_first_word", {"index": 1, "value": "then"}, "... Then?", True),
    ("paragraph_first_word", {"index": 1, "value": "then"}, "...", False),
    ("paragraph_first_word", {"index": 1, "value": "weekend"}, "# Weekend plans", True),
    ("paragraph_first_word", {"index": 1, "value": "qué"}, "¿Qué haces?", True),
    ("paragraph_first_word", {"index": 1, "value": "then"}, "— Then he left", True),
    ("paragraph_first_word", {"index": 1, "value": "then"}, "> - **Then** he left", True),
    ("paragraph_first_word", {"index": 1, "value": "!"}, "...", False),
    ("one_of", {"value": ["Sí", "No"]}, "¡Sí!", True),
    ("one_of", {"value": ["Yes", "No"]}, "- Yes", True),
    ("one_of", {"value": ["!", "?"]}, "...", False),
    ("one_of", {"value": ["!", "?"]}, "?", True),
    ("one_of", {"value": ["C#", "5", "50", ".5"]}, "C", False),
    ("one_of", {"value": ["5", "50"]}, "-5", False),
    ("one_of", {"value": ["5", "50"]}, ".5", False),
    ("one_of", {"value": ["5", "50"]}, "50%", False),
    ("one_of", {"value": ["-5", "C#"]}, "(-5)", True),
    ("one_of", {"value": ["My answer is yes.", "My answer is no."]}, "my answer is YES", True),
    ("one_of", {"value": ["yes", "no"]}, "**No.**", True),
    ("one_of", {"value": ["yes", "no"]}, "Yes, no.", False),
    ("one_of", {"value": ["yes", "no"]}, "nothing", False),
    ("one_of", {"value": ["C", "C++"]}, "C++", True),
    ("one_of", {"value": ["C++"]}, "C", False),
]


@pytest.mark.parametrize(("name", "arguments", "response", "expected"), CASES)
def test_cases_worked_out_by_hand(name, arguments, response, expected):
    constraint = {"type": name, **arguments}
    assert check_constraint(constraint, response, PROMPT) is expected
    scores = ConstraintsReward().score([_prompt([constraint])], [response])
    assert scores[0] == expected


@pytest.mark.parametrize(("name", "arguments", "response", "expected"), CASES)
def test_no_prefix_of_these_cases_is_decided_wrongly(name, arguments, response, expected):
    constraint = {"type": name, **arguments}
    for end in range(0, len(response), max(1, len(response) // 60)):
        assert prefix_verdict(constraint, response[:end], PROMPT) in (None, expected)


def test_every_type_has_a_case_that_holds_and_one_that_fails():
    for name in CONSTRAINT_TYPES:
        assert {case[3] for case in CASES if case[0] == name} == {True, False}


def test_there_is_a_sample_of_every_type():
    assert sorted(sample["type"] for sample in SAMPLES) == sorted(CONSTRAINT_TYPES)


@pytest.mark.parametrize("constraint", SAMPLES, ids=lambda sample: sample["type"])
@pytest.mark.parametrize("response", ["", " ", "\n\t\u3000"])
def test_an_empty_response_satisfies_nothing(constraint, response):
    assert check_constraint(constraint, response, PROMPT) is False
    assert prefix_verdict(constraint, response, PROMPT) is None


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ("max_words", "Expected a constraint such as .*got 'max_words'.*Pass an object"),
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
        ({"type": "min_letter_count", "letter": "ee", "value": 1}, "'letter' to be one letter"),
        ({"type": "max_letter_count", "letter": " ", "value": 1}, "'letter' to be one letter"),
        ({"type": "language", "value": "english"}, "code, one of af, ar, .* got 'english'"),
        ({"type": "repeats_prompt", "prompt": "x"}, "expected no arguments, got 'prompt'. Remove"),
        ({"type": "repeats_prompt"}, "expected the prompt's text, got none. Call"),
    ],
)
@pytest.mark.parametrize("response", ["Some text.", ""])
def test_malformed_constraints_are_errors_that_say_what_to_change(constraint, expected, response):
    with pytest.raises(ConstraintError, match=expected):
        check_constraint(constraint, response)
    with pytest.raises(ConstraintError, match=expected):
        prefix_verdict(constraint, response)


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
    assert isinstance(check_constraint(constraint, response, PROMPT), bool)


def _prompt(constraints: object, name: str = "letter-1") -> Prompt:
    return Prompt(name, PROMPT, {"constraints": constraints})


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
    with pytest.raises(ValueError, match="longer"):
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


# Prefixes

# A constraint, the pieces that responses are made of here, and what prefixes of them can decide.
# The pieces hold what makes rules hard: words that go on, accents that join the letter before,
# marks that grow, separators of every kind.
OPEN_TYPES = {"ends_with", "language"}
RULES: list[tuple[dict[str, Any], list[str], set[bool]]] = [
    ({"type": "max_words", "value": 2}, ["a", "1", " ", "\n", "-", "\u3000"], {False}),
    ({"type": "min_words", "value": 2}, ["a", "1", " ", "\n", "-", "\u3000"], {True}),
    ({"type": "num_sentences", "value": 1}, ["a", "1", ".", ". ", "\n", "。", "p.s"], {False}),
    ({"type": "num_sentences", "value": 1}, ["U.S.", "p.m.", " ", "The", "b", "\n"], {False}),
    ({"type": "min_sentences", "value": 2}, ["J.", "I.", " ", "The", "R", "1. "], {True}),
    ({"type": "min_sentences", "value": 2}, ["Inc.", "no.", "5", " ", "It", "*"], {True}),
    ({"type": "max_sentences", "value": 1}, ["a", "।", "؟", " ", "A.", "。"], {False}),
    ({"type": "max_sentences", "value": 1}, ["a", "1", ".", ". ", "\n", "!", "Dr"], {False}),
    ({"type": "min_sentences", "value": 2}, ["a", "1", ".", ". ", "\n", '"', "e.g"], {True}),
    ({"type": "num_paragraphs", "value": 1}, ["a", " ", "\n", "\n\n", "\r"], {False}),
    ({"type": "max_paragraphs", "value": 1}, ["a", " ", "\n", "\n\n", "\r"], {False}),
    ({"type": "min_paragraphs", "value": 2}, ["a", " ", "\n", "\n\n", "\r"], {True}),
    ({"type": "num_bullets", "value": 1}, ["a", "- ", "*", " ", "\n"], {False}),
    ({"type": "num_bullets", "value": 1}, ["a", "-", "* ", "\t", "\n", "*"], {False}),
    ({"type": "numbered_list", "value": 1}, ["1", "2", ". ", ")", " a", "\n"], {False}),
    ({"type": "keywords", "value": ["sun"]}, ["sun", " ", "s", "\u0301", "_", "."], {True}),
    ({"type": "keywords", "value": ["é"]}, ["e", "\u0301", " ", "é", "。", "="], {True}),
    ({"type": "keywords", "value": ["a"]}, ["a", "_", "*", " ", "’", "."], {True}),
    ({"type": "keywords", "value": ["a_"]}, ["a", "_", "*", " ", "猫", "."], {True}),
    ({"type": "forbidden_words", "value": ["猫"]}, ["猫", "a", "。", "\u0301", " "], {False}),
    ({"type": "forbidden_words", "value": ["가"]}, ["가", "를", "수", "\u1100", " "], {False}),
    (
        {"type": "max_keyword_count", "keyword": "can't", "value": 1},
        ["can’t", "can't", "a", "'", " "],
        {False},
    ),
    ({"type": "keyword_count", "keyword": "a b a", "value": 1}, ["a", "b", " ", "\n"], {True}),
    ({"type": "keyword_count", "keyword": "- a", "value": 2}, ["a", "-", " ", "- a"], {True}),
    ({"type": "max_keyword_count", "keyword": "a", "value": 1}, ["a", " ", "\u0301"], {False}),
    ({"type": "exact_keyword_count", "keyword": "a", "value": 1}, ["a", " ", "="], {False}),
    ({"type": "forbidden_words", "value": ["sun", "c+"]}, ["sun", " ", "c", "+", "x"], {False}),
    ({"type": "min_letter_count", "letter": "e", "value": 2}, ["e", "\u0301", "E", "x"], {True}),
    ({"type": "max_letter_count", "letter": "e", "value": 1}, ["e", "\u0301", "E", "x"], {False}),
    ({"type": "min_capital_words", "value": 1}, ["A", "a", " ", "-", "1"], {True}),
    ({"type": "max_capital_words", "value": 1}, ["A", "a", " ", "-", "1"], {False}),
    ({"type": "min_letter_count", "letter": "=", "value": 2}, ["=", "\u0338", "a", " "], {True}),
    ({"type": "no_commas"}, ["a", ",", "，", " "], {False}),
    ({"type": "lowercase"}, ["a", "A", "ǅ", "1", " ", "ª"], {False}),
    ({"type": "uppercase"}, ["a", "A", "ǅ", "1", " ", "ª"], {False}),
    ({"type": "starts_with", "value": "e a"}, ["e", " ", "a", "\u0301", "\n"], {True, False}),
    ({"type": "starts_with", "value": "가"}, ["\u1100", "\u1161", "가", "a", " "], {True, False}),
    ({"type": "ends_with", "value": "a"}, ["a", " ", "b"], set()),
    ({"type": "quoted"}, ['"', "“", "”", "a", " "], {False}),
    ({"type": "title"}, ["<", "<<", ">", ">>", "a", " ", "\n"], {True}),
    ({"type": "title"}, ["<", "<<", ">", ">>", "a", "->"], {True}),
    ({"type": "postscript"}, ["P.", "S.", "**", "_", "\n", "a"], {True}),
    ({"type": "postscript"}, ["P", "P.S", ".", "\n", " "], {True}),
    ({"type": "placeholders", "value": 1}, ["[", "]", "a", " ", "\n"], {True}),
    ({"type": "highlights", "value": 1}, ["*", "**", "a", " ", "\n"], {True}),
    ({"type": "sections", "splitter": "§", "value": 2}, ["§", "1", " ", "a"], {True}),
    ({"type": "json_object"}, ["{", "}", '"a":1', " ", "[", "\u3000", "1"], {False}),
    ({"type": "language", "value": "en"}, ["the sun ", "die Sonne "], set()),
    ({"type": "repeats_prompt"}, ["Why is the sky", " blue?", "blue", " ", "!"], {True, False}),
    ({"type": "two_responses"}, ["******", "***", "a", "b", " "], {False}),
    (
        {"type": "paragraph_first_word", "index": 2, "value": "a"},
        ["a", "b", "\n\n", "\n", " ", "."],
        {True, False},
    ),
    (
        {"type": "paragraph_first_word", "index": 1, "value": "a"},
        ["a", "-", "# ", " ", "¿", "5", "+"],
        {True, False},
    ),
    ({"type": "one_of", "value": ["a", "!", "-5"]}, ["a", "!", " ", "-", "5", "# "], {False}),
    ({"type": "starts_with", "value": "it's"}, ["it", "’", "'", "s", " "], {True, False}),
    ({"type": "one_of", "value": ["a", "a b."]}, ["a", "b", " ", ".", "c"], {False}),
]


def test_every_type_has_a_description_and_a_row_that_tests_its_rule_for_prefixes():
    assert all(kind.description for kind in CONSTRAINT_TYPES.values())
    assert {row[0]["type"] for row in RULES} == set(CONSTRAINT_TYPES)
    assert {row[0]["type"] for row in RULES if not row[2]} == OPEN_TYPES


@pytest.mark.parametrize(("constraint", "pieces", "decisions"), RULES, ids=lambda x: str(x)[:40])
def test_a_decided_prefix_agrees_with_every_continuation(constraint, pieces, decisions):
    found = set()
    depth = next(depth for depth in itertools.count() if len(pieces) ** (depth + 1) > 8000)
    # All texts of a few pieces, with the verdict of each on the way.
    open_texts = [""]
    decided: list[tuple[str, bool]] = []
    for _ in range(depth):
        decided = [(text + piece, verdict) for text, verdict in decided for piece in pieces]
        for text, verdict in decided:
            assert check_constraint(constraint, text, PROMPT) is verdict, text
        texts, open_texts = [text + piece for text in open_texts for piece in pieces], []
        for text in texts:
            verdict = prefix_verdict(constraint, text, PROMPT)
            if verdict is None:
                open_texts.append(text)
            else:
                found.add(verdict)
                assert check_constraint(constraint, text, PROMPT) is verdict, text
                decided.append((text, verdict))
    assert found == decisions


PIECES = sorted({piece for row in RULES for piece in row[1]})
MIXTURES = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=10).map("".join)


@settings(max_examples=300)
@given(MIXTURES, MIXTURES)
def test_no_continuation_of_any_kind_changes_a_decided_verdict(prefix, rest):
    for constraint, _, decisions in RULES:
        verdict = prefix_verdict(constraint, prefix, PROMPT) if decisions else None
        if verdict is not None:
            assert check_constraint(constraint, prefix + rest, PROMPT) is verdict, constraint
            assert prefix_verdict(constraint, prefix + rest, PROMPT) is verdict, constraint


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [("The river", None), ("The rivers ", None), ("The river ", True), ("The river.", True)],
)
def test_a_keyword_is_there_once_nothing_can_be_added_to_it(prefix, expected):
    assert prefix_verdict({"type": "keywords", "value": ["river"]}, prefix) is expected


# Steps


def test_steps_are_scored_by_what_is_not_broken_and_the_last_by_what_is_satisfied():
    prompt = _prompt(
        [
            {"type": "no_commas"},
            {"type": "max_words", "value": 5},
            {"type": "ends_with", "value": "Bye."},
            {"type": "title"},
        ]
    )
    steps = ["<<Hi>>", " Well, I", " must be", " off now.", " Bye."]
    # Nothing; a comma; nothing; the sixth word; the end, where the other two are satisfied.
    expected = [1, 0.75, 0.75, 0.5, 0.5]
    reward = ConstraintsReward()
    np.testing.assert_array_equal(reward.score_steps(prompt, steps), expected)
    # Without its end, the last step has broken nothing more, but not satisfied `ends_with`.
    np.testing.assert_array_equal(reward.score_steps(prompt, steps[:-1]), [1, 0.75, 0.75, 0.25])
    np.testing.assert_array_equal(score_steps(reward, prompt, steps), expected)
    assert reward.score_steps(prompt, []).shape == (0,)


@settings(max_examples=100)
@given(
    st.lists(MIXTURES, min_size=1, max_size=6),
    st.lists(st.sampled_from([row[0] for row in RULES if row[2]]), min_size=1, max_size=4),
)
def test_the_scores_of_steps_never_rise_and_end_at_the_score(steps, constraints):
    prompt, reward = _prompt(constraints), ConstraintsReward()
    scores = reward.score_steps(prompt, steps)
    assert scores.dtype == np.float64
    assert scores.shape == (len(steps),)
    assert all(later <= earlier for earlier, later in itertools.pairwise(scores))
    assert scores[-1] == reward.score([prompt], ["".join(steps)])[0]
    for i in range(len(steps) - 1):
        prefix = "".join(steps[: i + 1])
        broken = [prefix_verdict(each, prefix, PROMPT) is False for each in constraints]
        assert scores[i] == pytest.approx(1 - sum(broken) / len(broken))


def test_steps_of_a_prompt_without_constraints_are_an_error_with_its_id():
    with pytest.raises(ConstraintError, match=r"Prompt 'plain': expected .*constraints"):
        ConstraintsReward().score_steps(Prompt("plain", "Hello"), ["Hi"])


# The whole


def test_the_prompt_that_is_repeated_is_the_last_message_of_the_user():
    messages = (
        Message("system", "Be brief."),
        Message("user", "Hello"),
        Message("assistant", "Hi!"),
        Message("user", "Say more"),
    )
    prompt = Prompt("chat", messages, {"constraints": [{"type": "repeats_prompt"}]})
    scores = ConstraintsReward().score([prompt] * 2, ["Say more, he said", "Say more he said"])
    np.testing.assert_array_equal(scores, [0, 1])


def test_the_language_is_the_same_in_every_call_and_leaves_other_users_alone():
    import langdetect

    before = langdetect.DetectorFactory.seed
    constraint = {"type": "language", "value": "nl"}
    texts = ["de man", "het is", "so", "hallo", "is in", "Die Stadt en het dorp"]
    first = [check_constraint(constraint, text) for text in texts]
    assert all([check_constraint(constraint, text) for text in texts] == first for _ in range(5))
    assert langdetect.DetectorFactory.seed is before


def test_the_languages_are_those_of_langdetect():
    from langdetect import DetectorFactory
    from langdetect.detector_factory import PROFILES_DIRECTORY

    from mbrl_text_env.rewards.verifiable.constraints.kinds import LANGUAGES

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    assert set(factory.get_lang_list()) == LANGUAGES


def test_it_keeps_the_contract_with_every_type_of_constraint():
    check_reward_model(
        ConstraintsReward(), [_prompt([sample], sample["type"]) for sample in SAMPLES]
    )
    check_reward_model(ConstraintsReward(), [_prompt(SAMPLES)])


def test_long_responses_are_scored_in_moderate_time():
    prompt = _prompt(SAMPLES)
    for text in (
        "*" * 10_000,
        "* " * 5000,
        "<<" * 5000,
        "_a" * 5000,
        "U.S. " * 2000,
        "a. " * 3000,
        "\n" * 9999 + "a",
        "1. " * 3000,
        "[" * 10_000,
    ):
        steps = [text[i : i + 500] for i in range(0, len(text), 500)]
        assert ConstraintsReward().score_steps(prompt, steps).shape == (len(steps),)

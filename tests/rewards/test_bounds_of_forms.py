"""Bounds of rewards for forms and answers: texts that succeed are cut everywhere."""

import itertools
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env import Prompt
from mbrl_text_env.rewards import (
    ExactMatchReward,
    JSONSchemaReward,
    MathReward,
    NumericReward,
    ReasoningGymReward,
    RegexReward,
    UnitTestReward,
)
from mbrl_text_env.rewards.base import reward_bounds
from mbrl_text_env.rewards.verifiable import schema as schema_module

PROMPT = Prompt.from_text("Hi")


def bounds_of(reward, prefixes, prompt=PROMPT):
    return reward_bounds(reward, [prompt] * len(prefixes), prefixes).tolist()


def check_every_beginning(reward, texts, prompt=PROMPT, cuts=None):
    """Compare each text's score with the bounds of what it begins with; return how many."""
    scores = reward.score([prompt] * len(texts), texts)
    most = {}
    for text, score in zip(texts, scores, strict=True):
        for end in range(len(text) + 1):
            most[text[:end]] = max(score, most.get(text[:end], 0.0))
    prefixes = list(most)
    found = reward_bounds(reward, [prompt] * len(prefixes), prefixes)
    low = [(p, b, most[p]) for p, b in zip(prefixes, found, strict=True) if b < most[p] - 1e-9]
    assert not low, (reward, prompt.metadata, low[:3])
    return sum(len(text) + 1 for text in texts)


# --- Regular expressions ---

ALPHABET = "abA1 \n"
SHORT = ["".join(row) for size in range(5) for row in itertools.product(ALPHABET, repeat=size)]
ATOMS = st.sampled_from(
    [*"ab1 .^$A", r"\w", r"\d", r"\s", r"\b", r"\B", r"\Z", r"\A", "[ab]", "[^a]", r"\1", "a{2}"]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        inner.map(lambda one: f"({one})"),
        st.tuples(inner, st.sampled_from(["=", "!", "<=", "<!", ">"])).map(
            lambda row: f"(?{row[1]}{row[0]})"
        ),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{1,2}", "++"])).map(
            lambda row: f"(?:{row[0]}){row[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(PATTERNS, st.sampled_from(["{}", "(?s).*(?:{}).*"]), st.sampled_from(["", "(?i)", "(?s)"]))
def test_no_text_matches_that_an_expression_bounds_to_nothing(pattern, form, flags):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reward = RegexReward(flags + form.format(pattern))
        except RuntimeError:  # a reference to a group that is not there
            return
        check_every_beginning(reward, SHORT[:: len(SHORT) // 100])


@pytest.mark.parametrize(
    ("pattern", "alive", "dead"),
    [
        (r"\d{4}-\d\d", ["", " ", "2024", "2024-0", "2024-01", "2024-01 "], ["x", "2024-011"]),
        (r"(?i)yes|no", ["Y", "NO\n"], ["maybe", "yes!", "no o"]),
        (r"^\d+$", ["", "12", "12\n"], ["a", "1x"]),
        (r".*\bgood\b.*", ["", "bad", "goodly"], []),
        (r"a\bc|a\B.b", ["a", "ab", "abb", "ac"], ["a b", "b"]),
        (r"(?=.*\d)[a-z\d]{3}", ["ab", "ab1", "1", "a2c"], []),
        (r"(\w)x\1", ["a", "ax", "axa"], ["axb", "ay"]),
        (r"\p{Lu}\{a}", ["Ä", "Ä{a"], ["ä", "Äa"]),
        # What partial matching does not serve has no bound.
        (r"(?!ab$)ab.*", ["ab", "x"], []),
        (r".*(?<=a)b.*", ["", "x"], []),
        (r"(?>ab$|abc)d", ["ab", "x"], []),
        (r"(?:a++)b", ["x"], []),
        (r"(?:cat){e<=1}", ["xyzxyz"], []),
        (r"(?m)^a$", ["x"], []),
    ],
)
def test_expressions_by_hand(pattern, alive, dead):
    reward = RegexReward(pattern)
    assert bounds_of(reward, [*alive, *dead]) == [1] * len(alive) + [0] * len(dead)


def test_an_expression_that_takes_too_long_has_no_bound_from_then_on():
    reward = RegexReward(r"(a|aa|a.)+c", seconds=0.05)
    prefix = "a" * 60 + "!!"
    assert bounds_of(reward, ["x"]) == [0]
    assert bounds_of(reward, [prefix, "x"]) == [1, 1]


# --- JSON ---

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "age": {"type": "integer"},
        "kind": {"enum": ["cat", "c😀g", 10, None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("prefix", "unique", "anyhow"),
    [
        ("", 1, 1),
        (' {"na', 1, 1),
        ('{"nb', 0.5, 0.5),
        ('{"name"', 1, 1),
        ('{"name": 1', 0.5, 1),
        ('{"name": "abc', 1, 1),
        ('{"name": "abcd', 0.5, 1),
        ('{"age": 1.5', 1, 1),  # 1.5e1
        ('{"age": 1.5,', 0.5, 1),
        ('{"kind": "c\\ud83', 1, 1),
        ('{"kind": "c\\ud83d', 1, 1),
        ('{"kind": "d', 0.5, 1),
        ('{"kind": 1', 1, 1),
        ('{"kind": t', 0.5, 1),
        ('{"kind": n', 1, 1),
        ('{"tags": [true, f', 1, 1),
        ('{"tags": [true, false,', 0.5, 1),
        ('{"tags": [0', 0.5, 1),
        ('{"age": 1}', 0.5, 0.5),
        ('{"name": "", "name', 1, 1),
        ('{"name": "", "name"', 0, 1),
        ("[", 0.5, 0.5),
        ("01", 0, 0),
        ("{} {", 0, 0),
        ("nil", 0, 0),
        ("N", 0, 0),
        ("]", 0, 0),
        ("[" * 101, 0, 0),
        ("1" * 4301, 0.5, 0.5),  # it may still have a point
    ],
)
def test_schemas_by_hand(prefix, unique, anyhow):
    for names, expected in ((True, unique), (False, anyhow)):
        reward = JSONSchemaReward(SCHEMA, unique_names=names, partial_credit=0.5)
        assert bounds_of(reward, [prefix]) == [expected], names


@pytest.mark.parametrize(
    ("prefix", "most"),
    [
        *((" ``", 1), ("```j", 1), ("```json\n[1", 1), ("```\n[1]\n``", 1), ("[1]", 1)),
        *(("```jason", 0), ("```\n[1,]\n```", 0), ("```\n[1]\n```\nSo", 0), ("`[", 0)),
    ],
)
def test_fences_by_hand(prefix, most):
    assert bounds_of(JSONSchemaReward({"type": "array"}, code_fence=True), [prefix]) == [most]


SCHEMAS = [
    SCHEMA,
    True,
    False,
    {"enum": ["red", "green", [1, 2], {"a": "b"}, 1.5, True]},
    {"const": {"a": [1, "x"]}},
    {"oneOf": [{"type": "integer"}, {"type": "array", "minItems": 1}], "not": {"const": [1]}},
    {"type": "array", "prefixItems": [{"type": "string"}], "items": False, "uniqueItems": True},
    {"type": "array", "contains": {"const": "x"}, "items": {"$ref": "#/$defs/s"},
     "$defs": {"s": {"type": ["string", "array"], "minLength": 1}}},
    {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "maxProperties": 2,
     "propertyNames": {"maxLength": 2}, "additionalProperties": {"type": "null"}},
    {"if": {"type": "object"}, "then": {"required": ["a"], "dependentRequired": {"a": ["b"]}}},
    {"anyOf": [{"properties": {"a": {"type": "string", "pattern": "^x+$"}}, "required": ["a"]},
               {"type": "number", "multipleOf": 0.5, "maximum": 2}]},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "unevaluatedProperties": False},
]  # fmt: skip
WORDS = st.sampled_from(["a", "b", "x", "red", "name", "c😀g", "xx", "é", '"', "\\"])
VALUES = st.recursive(
    WORDS | st.sampled_from([None, True, False, 0, 1, -2, 1.5, 1e300, 10, 12]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


def written(value, ascii_only, indent, repeat):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    # A later member of the same name replaces the one before.
    if repeat and isinstance(value, dict) and value:
        text = "{" + f'"{next(iter(value))}": [0.5], '.replace('""":', '"\\"":') + text[1:]
    return text


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(SCHEMAS),
    st.lists(
        st.tuples(VALUES, st.booleans(), st.sampled_from([None, 1]), st.booleans()), max_size=3
    ),
    st.booleans(),
    st.sampled_from(["{}", "\n{} ", "```json\n{}\n ```\n"]),
)
def test_no_json_satisfies_what_a_schema_bounds_to_less(schema, rows, unique, place):
    reward = JSONSchemaReward(
        schema, unique_names=unique, code_fence="`" in place, partial_credit=0.25
    )
    # The same functions, without the way to another process.
    reward._isolated = lambda function, *arguments: getattr(schema_module, function)(*arguments)
    good = [{"name": "abc", "kind": "c😀g"}, "red", {"a": [1, "x"]}, [1, 2], ["x"], {"a": 1}, 15]
    values = [*rows, *((value, True, None, False) for value in good)]
    check_every_beginning(reward, [place.replace("{}", written(*row), 1) for row in values])


# --- Answers ---


@pytest.mark.parametrize(
    ("answer", "options", "alive", "dead"),
    [
        ("Paris", {}, ["", " pa", "**Par", "PARIS\n", "_Paris_"], ["It", "Paris is", "Pariz"]),
        ("New York", {}, ["new", "New  ", "new\ny"], ["newy", "new x"]),
        ("Zürich", {}, ["Z", "Zu", "Zü"], ["Zur", "Zab"]),
        ("B", {}, ["(", "(b", "Option B", "The answer is", "B) Paris"], ["Bo", "D", "C) Rome"]),
        ("Paris", {"extract": "Answer:"}, ["Answer: Rome"], []),
        ("Paris", {"extract": "last line"}, ["Rome"], []),
        (["Rome", "Oslo"], {}, ["R", "Os"], ["P"]),
    ],
)
def test_answers_by_hand(answer, options, alive, dead):
    prompt = Prompt.from_text("Hi", metadata={"reference_answer": answer})
    found = bounds_of(ExactMatchReward(**options), [*alive, *dead], prompt)
    assert found == [1] * len(alive) + [0] * len(dead)


FORMS = ["{}", " {}\n", "**{}**", "_{}_ ", "***{}***", "`{}`", "({})", "**Option {}**", "The {}"]
FORMS += [
    "\\text{{{}}}",
    "{}) Paris",
    "the answer is ({}).",
    "Answer: {}",
    "an {} ",
    "{}. One\u0301",
]
REFERENCES = [
    "Paris",
    "B",
    "new york",
    "é",
    "e\u0301t\u00e9",
    "i\u0307s",
    "*x*",
    "3.5",
    "K",
    "s",
    "a=b",
]
REFERENCES += ["The A", "\u1100\u1161\u11a8", "≠", "ß", "🙂 ok"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_no_answer_is_right_that_was_bound_to_nothing(data):
    import unicodedata

    reward = ExactMatchReward()
    answer = data.draw(st.sampled_from(REFERENCES))
    prompt = Prompt.from_text("Hi", metadata={"reference_answer": answer})
    forms = st.sampled_from(["NFC", "NFD"])
    changes = st.sampled_from(
        [str, str.upper, str.title, str.casefold, "\u212a".join, "\u017f".join]
    )
    texts = [
        unicodedata.normalize(data.draw(forms), form.format(data.draw(changes)(answer)))
        for form in FORMS
    ]
    check_every_beginning(reward, texts, prompt)


def test_where_a_later_answer_counts_the_bound_is_the_maximum():
    prompt = Prompt.from_text(
        "Hi", metadata={"reference_answer": "4", "tests": ["assert f() == 4"]}
    )
    for reward in (NumericReward(), MathReward(extract=r"\boxed"), UnitTestReward()):
        assert bounds_of(reward, ["", "5", r"\boxed{5}"], prompt) == [1, 1, 1]
    assert bounds_of(ReasoningGymReward(), ["5"]) == [np.inf]

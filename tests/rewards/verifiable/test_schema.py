"""JSON and JSON Schema as rewards."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards.base import RewardError, applies_to, score_responses
from mbrl_text_env.rewards.verifiable import schema as schemas
from mbrl_text_env.rewards.verifiable.partial_json import MAX_DEPTH
from mbrl_text_env.rewards.verifiable.schema import JSONSchemaReward
from mbrl_text_env.types import Prompt

PROMPT = Prompt.from_text("Describe Ann in JSON.", "ann")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/count"}},
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"count": {"type": "integer", "minimum": 0}},
}
FENCED = '```json\n{"name": "Ann"}\n```'


def with_schema(schema) -> Prompt:
    return Prompt.from_text("Describe Ann in JSON.", "ann", metadata={"schema": schema})


@pytest.mark.parametrize(
    ("response", "parses", "valid"),
    [
        ('{"name": "Ann"}', 1, 1),
        (' {"name": "Zoë 日本", "age": 3}\n', 1, 1),
        ('{"name": "Ann", "age": -1}', 1, 0),
        ('{"name": "Ann", "age": 3.5}', 1, 0),
        ('{"name": "Ann", "size": 3}', 1, 0),
        ('{"age": 3}', 1, 0),
        ("3", 1, 0),
        ('{"name": "Ann", "age": NaN}', 0, 0),
        ('{"name": "Ann", "age": Infinity}', 0, 0),
        ("{'name': 'Ann'}", 0, 0),
        ('{"name": "Ann"', 0, 0),
        ('{"name": "Ann"} Bye', 0, 0),
        (FENCED, 0, 0),
        ("", 0, 0),
        (" \n", 0, 0),
        ("[" * 100_000, 0, 0),
        ('{"name": ' * 5000, 0, 0),
        ('{"name": "\\ud800"}', 1, 1),
    ],
)
def test_parts_and_total(response, parses, valid):
    for reward, prompt in (
        (JSONSchemaReward(PERSON, partial_credit=0.25), PROMPT),
        (JSONSchemaReward(partial_credit=0.25), with_schema(PERSON)),
    ):
        scores = score_responses(reward, [prompt], [response])
        assert scores.parts_of(0) == {"parses": parses, "valid": valid}
        assert scores.total[0] == (1 if valid else 0.25 * parses)
    assert JSONSchemaReward(PERSON).score([PROMPT], [response])[0] == valid


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (FENCED, 1),
        ('```\n{"name": "Ann"}\n```\n', 1),
        ('{"name": "Ann"}', 1),
        (f"Here it is:\n{FENCED}", 0),
        (f"{FENCED}\n{FENCED}", 0),
        ('```json\n{"name": "Ann"}', 0),
        ('```python\n{"name": "Ann"}\n```', 0),
    ],
)
def test_a_code_fence_on_request(response, expected):
    assert JSONSchemaReward(PERSON, code_fence=True).score([PROMPT], [response])[0] == expected


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_any_json_satisfies_the_schema_that_asks_for_it_alone(value):
    text = json.dumps(value)
    exact, other = {"const": value}, {"not": {"const": value}}
    rewards = [JSONSchemaReward(schema) for schema in (True, False, exact, other)]
    assert [float(reward.score([PROMPT], [text])[0]) for reward in rewards] == [1, 0, 1, 0]


def test_nesting_is_limited_and_a_recursive_schema_follows_it_to_there():
    reward = JSONSchemaReward({"type": "array", "items": {"$ref": "#"}}, partial_credit=0.5)
    deepest, deeper = ("[" * depth + "]" * depth for depth in (MAX_DEPTH, MAX_DEPTH + 1))
    wrong = "[" * (MAX_DEPTH - 1) + "0" + "]" * (MAX_DEPTH - 1)
    np.testing.assert_array_equal(reward.score([PROMPT] * 3, [deepest, deeper, wrong]), [1, 0, 0.5])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objct"}, r"at \$.type: 'objct' is not valid"),
        ({"properties": 3}, r"at \$.properties: 3 is not of type 'object'"),
        ({"pattern": "("}, r"at \$.pattern: '\(' is not a 'regex'"),
        ({"const": {1, 2}}, "TypeError: Object of type set"),
        ({"const": float("nan")}, "ValueError: Out of range"),
        ([], r"at \$: \[\] is not of type 'object', 'boolean'"),
    ],
)
def test_a_schema_that_is_none_is_an_error(schema, message):
    with pytest.raises(RewardError, match=rf"^Reward model 'json-schema': expected.*{message}"):
        JSONSchemaReward(schema)
    with pytest.raises(RewardError, match=rf"prompt 'ann': expected a JSON Schema.*{message}"):
        JSONSchemaReward().score([with_schema(schema)], ["{}"])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "https://example.com/s.json"}, "refers to 'https://example.com/s.json'"),
        ({"$ref": "file:///etc/hostname"}, "refers to 'file:///etc/hostname'"),
        ({"$ref": "#/$defs/none"}, r"refers to '/\$defs/none', which is not in the schema"),
        ({"$ref": "#"}, "an infinite reference loop"),
    ],
)
def test_references_stay_inside_the_schema(schema, message):
    with pytest.raises(RewardError, match=rf"prompt 'ann', response '1': .*{message}"):
        JSONSchemaReward(schema).score([PROMPT], ["1"])


def test_a_pattern_of_exponential_time_is_an_error_in_time():
    reward = JSONSchemaReward({"type": "string", "pattern": "^(a+)+$"}, seconds=0.5)
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"prompt 'ann', .*took longer than 0.5 s.*Fix the"):
        reward.score([PROMPT], [json.dumps("a" * 50 + "b")])
    assert time.monotonic() - began < 60
    np.testing.assert_array_equal(reward.score([PROMPT] * 2, ['"aa"', '"b"']), [1, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partial_credit": 1.5}, "partial_credit: expected a number from 0 to 1, got 1.5"),
        ({"partial_credit": float("nan")}, "partial_credit: expected a number from 0 to 1"),
        ({"seconds": 0}, "seconds to be a finite number above 0, got 0"),
    ],
)
def test_options_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        JSONSchemaReward({}, **options)


def test_a_prompt_without_a_schema_is_named():
    assert not applies_to(JSONSchemaReward(), PROMPT)
    assert applies_to(JSONSchemaReward(), with_schema({}))
    assert applies_to(JSONSchemaReward({}), PROMPT)
    with pytest.raises(RewardError, match=r"prompt 'ann': .*it is null.*metadata\['schema'\]"):
        JSONSchemaReward().score([PROMPT], ["{}"])


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    schemas._schema_problem.cache_clear()
    with pytest.raises(RewardError, match=r"pip install 'mbrl-text-env\[verify\]'"):
        JSONSchemaReward({})


@pytest.mark.parametrize("code_fence", [False, True])
def test_the_contract(code_fence):
    reward = JSONSchemaReward(PERSON, code_fence=code_fence, partial_credit=0.5)
    check_reward_model(reward)
    responses = ['{"name": "Ann"}', "", FENCED, "3", "日本", '{"name": "' + "x" * 10_000 + '"}']
    check_reward_model(reward, responses=responses)
    check_reward_model(JSONSchemaReward(), [with_schema(PERSON), with_schema({})], responses)

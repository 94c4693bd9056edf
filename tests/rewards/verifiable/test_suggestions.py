"""Pieces that constraints suggest: followed by words of a model, they lead to what is asked for."""

import pytest

from mbrl_text_env.rewards import ConstraintsReward, WeightedSum, make
from mbrl_text_env.rewards.verifiable.constraints import check_constraint
from mbrl_text_env.types import Prompt

LATER = [
    {"type": "keywords", "value": ["river", "old mill"]},
    {"type": "keyword_count", "keyword": "river", "value": 3},
    {"type": "exact_keyword_count", "keyword": "river", "value": 2},
    {"type": "ends_with", "value": "The end."},
    {"type": "title"},
    {"type": "placeholders", "value": 2},
    {"type": "highlights", "value": 2},
    {"type": "postscript"},
    {"type": "num_bullets", "value": 3},
    {"type": "numbered_list", "value": 3},
    {"type": "num_paragraphs", "value": 3},
    {"type": "min_paragraphs", "value": 2},
    {"type": "sections", "splitter": "PART", "value": 2},
]
FIRST = [
    {"type": "starts_with", "value": "Well, then"},
    {"type": "quoted"},
    {"type": "json_object"},
    {"type": "one_of", "value": ["Yes.", "No."]},
]


def suggested(constraints, text):
    prompt = Prompt.from_text("Ask.", metadata={"constraints": constraints})
    return ConstraintsReward().suggest(prompt, text)


def completed(constraint, text, words):
    """The text after pieces and words in turns until the constraint holds; at most 12 of them."""
    for _ in range(12):
        if check_constraint(constraint, text, "Ask."):
            return text
        pieces = suggested([constraint], text)
        assert pieces, text
        text += pieces[0]
        if not check_constraint(constraint, text, "Ask."):
            text += words if not text[-1].isalnum() else f" {words}"
    raise AssertionError(text)


@pytest.mark.parametrize("constraint", LATER, ids=lambda c: c["type"])
@pytest.mark.parametrize("start", ["The fog came.", "The fog came.\n", "fog"])
def test_pieces_lead_to_what_is_missing(constraint, start):
    assert completed(constraint, start, "more fog").startswith(start)


@pytest.mark.parametrize("constraint", FIRST, ids=lambda c: c["type"])
def test_pieces_begin_a_response(constraint):
    words = "" if constraint["type"] in ("one_of", "starts_with") else "fog"
    assert completed(constraint, "", words)


def test_nothing_is_suggested_where_nothing_is_missing():
    assert suggested([{"type": "keywords", "value": ["fog"]}], "The fog.") == ()
    assert suggested([{"type": "max_words", "value": 1}], "The fog.") == ()


def test_what_has_to_be_last_comes_last():
    last = {"type": "ends_with", "value": "The end."}
    unmet = [last, {"type": "keywords", "value": ["river"]}]
    assert suggested(unmet, "The fog.")[0] == " river"
    assert suggested(unmet, "The fog, the river.")[0] == " The end."


@pytest.mark.parametrize(
    ("text", "closed"),
    [('{"a": [1, {"b": "c', '"}]}'), ('{"a": 1', "}"), ('{"a', '": ""}'), ('{"a": "\\"', '"}')],
)
def test_json_is_closed(text, closed):
    assert closed in suggested([{"type": "json_object"}], text)


def test_combinations_suggest_what_their_parts_do():
    prompt = Prompt.from_text("Ask.", metadata={"constraints": [{"type": "postscript"}]})
    own = ConstraintsReward().suggest(prompt, "The fog.")
    assert own[0] == "\n\nP.S. "
    both = WeightedSum([ConstraintsReward(), make("sentiment")], [1.0, 0.5])
    assert both.suggest(prompt, "The fog.") == own
    assert ConstraintsReward().is_verifier
    assert not both.is_verifier

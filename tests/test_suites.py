"""Suites: what they promise of their prompts, and that their reference answers are right."""

import sqlite3
import sys
from collections import Counter
from dataclasses import replace

import pytest

from mbrl_text_env.prompts import PromptError
from mbrl_text_env.rewards import make
from mbrl_text_env.rewards.base import applies_to
from mbrl_text_env.rewards.verifiable.sql import is_ordered
from mbrl_text_env.sandbox import facilities
from mbrl_text_env.suites import REASONING_TASKS, SUITES, load_suite

SIZES = {
    "constraints": {"train": 165, "validation": 44, "test": 66},
    "reasoning": {"train": 240, "validation": 120, "test": 400},
    "code": {"train": 4, "validation": 4, "test": 40},
    "sql": {"train": 8, "validation": 4, "test": 40},
}


@pytest.fixture(scope="module", params=SUITES)
def suite(request):
    if request.param == "reasoning":
        pytest.importorskip("reasoning_gym")
    return request.param, load_suite(request.param)


def test_splits_and_rewards(suite):
    name, prompts = suite
    assert Counter(prompt.split for prompt in prompts) == SIZES[name]
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert len({prompt.text for prompt in prompts}) == len(prompts), "in one split alone"
    reward = make(SUITES[name].reward)
    assert all(applies_to(reward, prompt) for prompt in prompts)
    assert prompts == load_suite(name)


def scores(name, prompts, answers):
    return make(SUITES[name].reward).score(prompts, answers).tolist()


def test_reference_answers_of_reasoning():
    pytest.importorskip("reasoning_gym")
    prompts = load_suite("reasoning", split="test")
    kinds = Counter(prompt.metadata["kind"] for prompt in prompts)
    assert kinds == dict.fromkeys(REASONING_TASKS, 40)
    some = prompts[::8]
    assert scores("reasoning", some, [p.metadata["reference_answer"] for p in some]) == [1] * 50
    # No one answer solves a task.
    answers = Counter((p.metadata["kind"], p.metadata["reference_answer"]) for p in prompts)
    assert max(answers.values()) <= 10


def test_answers_of_sql():
    prompts = load_suite("sql")
    right = [f"Thus:\n```sql\n{p.metadata['reference_answer']};\n```" for p in prompts]
    assert scores("sql", prompts, right) == [1] * len(prompts)
    wrong = [p.metadata["wrong_answer"] for p in prompts]
    assert scores("sql", prompts, wrong) == [0] * len(prompts)


def test_results_of_sql_do_not_hang_on_the_order_of_rows():
    for prompt in load_suite("sql"):
        query, found = prompt.metadata["reference_answer"], []
        for order in ("OFF", "ON"):
            connection = sqlite3.connect(":memory:")
            connection.executescript(prompt.metadata["database"])
            connection.execute(f"PRAGMA reverse_unordered_selects={order}")
            rows = connection.execute(query).fetchall()
            found.append(rows if is_ordered(query) else Counter(rows))
            assert connection.execute(prompt.metadata["wrong_answer"]).fetchall() is not None
            connection.close()
        assert found[0] == found[1], prompt.id
        assert found[0], prompt.id


@pytest.mark.skipif(any(each.problem for each in facilities()), reason="no sandbox here")
def test_answers_of_code():
    # All tests of a task as one: half a minute less.
    prompts = [
        replace(
            prompt, metadata={**prompt.metadata, "tests": ["\n".join(prompt.metadata["tests"])]}
        )
        for prompt in load_suite("code")
    ]
    assert all(len(prompt.metadata["tests"][0].splitlines()) >= 3 for prompt in prompts)
    right = [f"```python\n{p.metadata['reference_answer']}\n```" for p in prompts]
    wrong = [p.metadata["wrong_answer"] for p in prompts]
    found = scores("code", prompts * 2, right + wrong)
    assert found == [1] * len(prompts) + [0] * len(prompts)


@pytest.mark.parametrize(("name", "shots"), [("reasoning", None), ("code", 4), ("sql", 2)])
def test_examples_are_a_prefix_of_the_same_tokens(name, shots, smollm2):
    if name == "reasoning":
        pytest.importorskip("reasoning_gym")
    prompts = load_suite(name, shots=shots)
    count = shots or SUITES[name].shots
    bare = load_suite(name, shots=0)
    kinds = {prompt.metadata["kind"] for prompt in prompts}
    assert len(bare) - len(prompts) == count * len(kinds)
    for kind in kinds:
        own = [p for p in prompts if p.metadata["kind"] == kind and p.split == "test"][:8]
        assert {len(p.content) for p in own} == {2 * count + 1}
        examples = replace(own[0], content=own[0].content[:-1])
        tokens = list(map(smollm2.encode_prompt, own))
        shared = smollm2.encode_prompt(examples)
        # What the template puts behind a chat is no part of what is shared.
        length = next(i for i in range(len(shared), 0, -1) if tokens[0][:i] == shared[:i])
        assert {ids[:length] for ids in tokens} == {shared[:length]}
        text = smollm2.decode(shared[:length])
        assert own[0].content[2 * count - 1].content in text, "the last answer"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "sqll"}, "Did you mean 'sql'"),
        ({"name": "sql", "split": "dev"}, "split: expected one of"),
        ({"name": "sql", "kind": "zoo"}, "their kinds .'library', 'school'"),
        ({"name": "sql", "shots": -1}, "shots from 0 to 2, got -1"),
        ({"name": "code", "shots": 5}, "shots from 0 to 4, got 5"),
        ({"name": "constraints", "shots": 1}, "shots from 0 to 0, got 1"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(PromptError, match=said):
        load_suite(**options)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(PromptError, match=r"mbrl-text-env\[data\]"):
        load_suite("reasoning")
    assert load_suite("sql", split="train")

"""Prompts: every source gives prompts, or an error that says where and what to change."""

import json
import sys
from datetime import datetime
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env.prompts import (
    PromptError,
    hub_prompts,
    load_prompts,
    reasoning_gym_prompts,
)
from mbrl_text_env.types import Message

unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
visible_text = unicode_text.filter(str.strip)


def jsonl(path: Path, *rows: object) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    return path


def text_file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


# The prompts of the package


def test_builtin_prompts():
    prompts = load_prompts()
    assert len({prompt.id for prompt in prompts}) == len(prompts) >= 500
    assert {prompt.split for prompt in prompts} == {"train", "validation", "test"}
    for prompt in prompts:
        assert prompt.content == (Message("user", prompt.text),)
        assert {"kind"} <= set(prompt.metadata) <= {"kind", "constraints"}


def test_filters():
    prompts = load_prompts(split="test", kind="story", limit=3)
    assert len(prompts) == 3
    assert {(prompt.split, prompt.metadata["kind"]) for prompt in prompts} == {("test", "story")}
    assert prompts == load_prompts(split="test", kind="story")[:3]


def test_plain_text():
    (prompt,) = load_prompts(limit=1, chat=False)
    assert prompt.content == prompt.text == load_prompts(limit=1)[0].text


def test_a_caller_cannot_change_the_builtin_prompts_of_others():
    before = load_prompts(limit=1)[0].metadata["kind"]
    load_prompts(limit=1)[0].metadata["kind"] = "changed"  # type: ignore[index]
    assert load_prompts(limit=1)[0].metadata["kind"] == before


# JSON lines


def test_jsonl(tmp_path):
    path = jsonl(
        tmp_path / "mine.jsonl",
        {"text": "One", "id": "first", "split": "test", "answer": 1},
        {"prompt": "Two", "id": 2, "split": None},
        {"messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "3"}]},
    )
    first, second, third = load_prompts(path)
    assert (first.id, first.split, first.metadata) == ("first", "test", {"answer": 1})
    assert (second.id, second.split, second.text) == ("2", None, "Two")
    assert third.id == "mine-3"
    assert third.content == (Message("system", "Be brief"), Message("user", "3"))
    assert load_prompts(str(path), chat=False)[2].content == third.content


@settings(deadline=None)
@given(
    texts=st.lists(visible_text, min_size=1, max_size=4),
    metadata=st.dictionaries(
        unicode_text.filter(lambda key: key not in {"text", "prompt", "messages", "id", "split"}),
        unicode_text | st.integers() | st.lists(st.booleans()),
        max_size=3,
    ),
)
def test_jsonl_keeps_any_unicode(tmp_path_factory, texts, metadata):
    path = tmp_path_factory.mktemp("prompts") / "any.jsonl"
    jsonl(path, *({"text": text, **metadata} for text in texts))
    prompts = load_prompts(path)
    assert [prompt.text for prompt in prompts] == texts
    assert [prompt.id for prompt in prompts] == [f"any-{i + 1}" for i in range(len(texts))]
    assert all(prompt.metadata == metadata for prompt in prompts)


def test_blank_lines_windows_ends_and_a_byte_order_mark_do_no_harm(tmp_path):
    path = text_file(tmp_path / "p.jsonl", '\ufeff{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert [prompt.id for prompt in load_prompts(path)] == ["p-1", "p-3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', "one JSON object.*Fix"),
        ('{"text": "b", "x": NaN}', "NaN is not JSON"),
        ('{"text": "\\ud800"}', "surrogates"),
        ('["b"]', "expected an object"),
        ("[" * 100_000, "one JSON object"),
        ('{"question": "b"}', r"one of the fields text, prompt, messages, got \['question'\]"),
        ('{"text": "b", "prompt": "b"}', r"got \['text', 'prompt'\]"),
        ('{"text": " "}', "empty"),
        ('{"messages": []}', "empty"),
        ('{"messages": [{"role": "user", "content": " "}]}', "empty"),
        ('{"text": 5}', "a string or a list of messages"),
        ('{"messages": ["b"]}', "string `role`"),
        ('{"messages": [{"role": "user"}]}', "string `role`"),
        ('{"messages": [{"role": "user", "content": ["b"]}]}', "string `role`"),
        ('{"messages": [{"role": "user", "content": "b", "name": "c"}]}', "string `role`"),
        ('{"text": "b", "id": ""}', "as id"),
        ('{"text": "b", "id": 1.5}', "as id"),
        ('{"text": "b", "id": "p-1"}', r"'p-1' again \(first: .*p\.jsonl, line 1\)"),
        ('{"text": "b", "split": "dev"}', "train, validation, test, got 'dev'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = text_file(tmp_path / "p.jsonl", '{"text": "a"}\n' + line)
    with pytest.raises(PromptError, match=rf"p\.jsonl, line 2: .*{message}"):
        load_prompts(path)


def test_not_utf8(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(PromptError, match=r"p\.jsonl, line 2: expected UTF-8, got the byte 0xe9"):
        load_prompts(path)


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file(tmp_path, name, text):
    with pytest.raises(PromptError, match=rf"{name}: .*empty file"):
        load_prompts(text_file(tmp_path / name, text))


def test_a_missing_file_a_folder_and_another_format(tmp_path):
    with pytest.raises(PromptError, match=r"missing\.jsonl: .*FileNotFoundError"):
        load_prompts(tmp_path / "missing.jsonl")
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    with pytest.raises(PromptError, match="expected a file that can be read"):
        load_prompts(folder)
    with pytest.raises(PromptError, match=r"\.jsonl or \.csv file, got 'built-in'.*hub_prompts"):
        load_prompts("built-in")


def test_no_prompt_left(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", {"text": "a", "kind": "x"}, {"text": "b", "split": "test"})
    with pytest.raises(PromptError, match=r"got none of 2.*\['None', 'test'\].*\['None', 'x'\]"):
        load_prompts(path, split="test", kind="x")


def test_filters_that_cannot_be():
    with pytest.raises(PromptError, match=r"split: .*got 'dev'"):
        load_prompts(split="dev")
    with pytest.raises(PromptError, match=r"limit: .*got 0"):
        load_prompts(limit=0)


# CSV


@pytest.mark.parametrize("column", ["text", "prompt"])
def test_csv(tmp_path, column):
    path = text_file(
        tmp_path / "mine.CSV",
        f'\ufeffid,{column},split,answer\r\n,"a, ""b""\nc",,1\r\n\r\nx,d,train,\r\n,e,,\r\n',
    )
    first, second, third = load_prompts(path)
    assert (first.id, first.text, first.split) == ("mine-2", 'a, "b"\nc', None)
    assert (second.id, second.text, second.split) == ("x", "d", "train")
    assert [prompt.metadata for prompt in (first, second)] == [{"answer": "1"}, {"answer": ""}]
    assert third.id == "mine-6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question\na\n", r"line 1: .*`text` or `prompt`, got \['question'\]"),
        ("text,prompt\na,b\n", "line 1: .*one of them"),
        ("text,x,x\na,b,c\n", "line 1: .*different columns"),
        ("text\na\nb,c\n", "line 3: expected 1 values, .*got 2"),
        ('text\na\n"b\n', "line 3: .*cannot be parsed"),
        ("text\na\n \n", "line 3: .*empty"),
        ("text,id\na,x\nb,x\n", r"line 3: .*'x' again \(first: .*line 2\)"),
        ("text,split\na,dev\n", "line 2: .*got 'dev'"),
    ],
)
def test_a_bad_csv_row_is_named(tmp_path, text, message):
    with pytest.raises(PromptError, match=rf"p\.csv, {message}"):
        load_prompts(text_file(tmp_path / "p.csv", text))


# The Hugging Face Hub


@pytest.fixture
def dataset_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "quiz"
    folder.mkdir()
    jsonl(
        folder / "train.jsonl",
        {"prompt": [{"role": "user", "content": "1 + 1?"}], "question": "1 + 1?", "answer": 2},
        {
            "prompt": [
                {"role": "system", "content": "Count.", "name": None},
                {"role": "user", "content": "2 + 2?"},
            ],
            "question": "2 + 2?",
            "answer": 4,
        },
    )
    jsonl(folder / "test.jsonl", {"prompt": [], "question": "3 + 3?", "answer": 6})
    return str(folder)


def test_hub_prompts_of_messages(dataset_folder):
    first, second = hub_prompts(dataset_folder)
    assert (first.id, first.split) == ("quiz-train-0", "train")
    assert first.metadata == {"question": "1 + 1?", "answer": 2}
    assert second.content == (Message("system", "Count."), Message("user", "2 + 2?"))


def test_hub_prompts_of_strings(dataset_folder):
    (prompt,) = hub_prompts(
        dataset_folder, split="train[1:]", column="question", limit=5, chat=False
    )
    assert (prompt.id, prompt.split, prompt.content) == ("quiz-train[1:]-0", "train", "2 + 2?")
    assert len(hub_prompts(dataset_folder, limit=1)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"column": "questoin"}, "Did you mean 'question'"),
        ({"split": "dev"}, "can be loaded, got ValueError"),
        ({"config": "none"}, "configuration 'none'.*can be loaded"),
        ({"split": "test"}, "row 0: .*empty"),
        ({"column": "answer"}, "row 0: .*a string or a list of messages"),
        ({"limit": 0}, "limit"),
    ],
)
def test_hub_prompts_that_cannot_be(dataset_folder, arguments, message):
    with pytest.raises(PromptError, match=message):
        hub_prompts(dataset_folder, **arguments)


def test_values_that_are_not_json_are_left_out(tmp_path, dataset_folder):
    table = pa.table({"prompt": ["Hi"], "when": [datetime(2024, 5, 1)], "answer": [None]})
    folder = tmp_path / "dated"
    folder.mkdir()
    pq.write_table(table, folder / "train.parquet")
    assert hub_prompts(str(folder))[0].metadata == {}


def test_the_reason_why_a_dataset_does_not_load_is_told(dataset_folder):
    text_file(Path(dataset_folder) / "train.jsonl", "{")
    with pytest.raises(PromptError, match=r"JSON|Expected object"):
        hub_prompts(dataset_folder)


def test_a_dataset_that_is_not_there():
    pytest.importorskip("datasets")
    with pytest.raises(PromptError, match="Check the names and the network"):
        hub_prompts("nobody/no-such-dataset")


# reasoning-gym


def test_reasoning_gym_prompts():
    gym = pytest.importorskip("reasoning_gym")
    prompts = reasoning_gym_prompts("chain_sum", size=3, seed=5, max_terms=3)
    entries = list(gym.create_dataset("chain_sum", size=3, seed=5, max_terms=3))
    assert [prompt.id for prompt in prompts] == [f"chain_sum-5-{i}" for i in range(3)]
    assert [prompt.text for prompt in prompts] == [entry["question"] for entry in entries]
    for prompt, entry in zip(prompts, entries, strict=True):
        assert prompt.metadata["kind"] == "chain_sum"
        assert prompt.metadata["reference_answer"] == entry["answer"]
        inner = prompt.metadata["reasoning_gym"]
        assert inner["expression"] == entry["metadata"]["expression"]
        assert json.loads(json.dumps(inner)) == inner
    assert prompts[2].metadata["reasoning_gym_source"] == {
        "task": "chain_sum",
        "seed": 5,
        "size": 3,
        "config": {"max_terms": 3},
        "index": 2,
    }
    assert prompts == reasoning_gym_prompts("chain_sum", size=3, seed=5, max_terms=3)
    plain = reasoning_gym_prompts("chain_sum", size=1, seed=5, chat=False)[0]
    assert isinstance(plain.content, str)


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("chian_sum", {}, "got 'chian_sum'. Did you mean 'chain_sum'"),
        ("chain_sum", {"size": 0}, "size: expected 1 or more"),
        ("chain_sum", {"terms": 3}, "settings that it takes.*terms"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "settings that it takes"),
    ],
)
def test_reasoning_gym_prompts_that_cannot_be(task, arguments, message):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(PromptError, match=message):
        reasoning_gym_prompts(task, **{"size": 1, "seed": 0, **arguments})


@pytest.mark.parametrize(
    ("module", "load"),
    [
        ("datasets", partial(hub_prompts, "any")),
        ("reasoning_gym", partial(reasoning_gym_prompts, "chain_sum", size=1, seed=0)),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, module, load):
    # None is how Python itself marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PromptError, match=rf"'{module}'.*mbrl-text-env\[data\]"):
        load()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "ab", "w": 1e999}', "larger than any float64"),
        ('{"text": "ab", "w": [{"v": -1e400}]}', "larger than any float64"),
        ('{"text": "ab", "w": NaN}', "NaN is not JSON"),
        ('{"text": "ab", "text": "b"}', "text"),
        ('{"text": "half \\ud83d"}', "surrogates"),
        ('{"text": "ab", "id": "\\udc80"}', "surrogates"),
        ('{"messages": [{"role": "<|im_end|>", "content": "ab"}]}', "expected roles"),
    ],
)
def test_values_that_no_file_can_hold(tmp_path, line, reason):
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(PromptError, match=f"mine.jsonl, line 2: .*{reason}"):
        load_prompts(path)


def test_keys_that_are_null_are_not_there(tmp_path):
    row = {"text": None, "prompt": "One", "messages": None, "id": None, "answer": None, "n": [None]}
    (prompt,) = load_prompts(jsonl(tmp_path / "mine.jsonl", row))
    assert (prompt.id, prompt.text, prompt.metadata) == ("mine-1", "One", {"n": [None]})


def test_arrow_fills_keys_that_a_row_does_not_have(tmp_path):
    pytest.importorskip("datasets")
    constraints = [[{"type": "min_words", "value": 2}], [{"type": "no_commas"}]]
    table = pa.table({"prompt": ["a", "b"], "constraints": constraints})
    pq.write_table(table, tmp_path / "train.parquet")
    found = hub_prompts(str(tmp_path))
    assert [prompt.metadata["constraints"] for prompt in found] == constraints

"""Preference pairs from rows in each of TRL's formats, and from scored records."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.records import Record
from mbrl_text_env.rewards.learning.preferences import (
    PreferenceError,
    PreferencePair,
    load_preferences,
    pairs_from_records,
    write_preferences,
)
from mbrl_text_env.types import Message, Prompt, TextState

USER = {"role": "user", "content": "Hi?"}
GOOD = {"role": "assistant", "content": "Hello."}
BAD = {"role": "assistant", "content": "No."}


def load(tmp_path, *rows, **options):
    path = tmp_path / "pairs.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return load_preferences(path, **options)


def record(text, response, score, reward="gold"):
    state = TextState(Prompt.from_text(text), (1,), (2,), "stop")
    return Record.from_state(
        state,
        response=response,
        score=score,
        rewards={},
        reward_name=reward,
        agent="a",
        language_model="m",
        seed=0,
    )


class TestFormats:
    @pytest.mark.parametrize(
        ("row", "content"),
        [
            ({"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}, "Hi?"),
            ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, (Message("user", "Hi?"),)),
            ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, (Message("user", "Hi?"),)),
            # As in UltraFeedback: the prompt stands in a column and in both conversations.
            (
                {"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
                (Message("user", "Hi?"),),
            ),
            ({"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]}, (Message("user", "Hi?"),)),
        ],
    )
    def test_a_row(self, tmp_path, row, content):
        (pair,) = load(tmp_path, row)
        assert pair.prompt.content == content
        assert (pair.chosen, pair.rejected, pair.margin) == ("Hello.", "No.", None)

    @pytest.mark.parametrize(
        ("chosen", "rejected", "prompt", "answers"),
        [
            ("The sky is blue.", "The sky is black.", "The sky is", (" blue.", " black.")),
            # Anthropic's: the answers begin alike, and the prompt ends before them.
            (
                "\n\nHuman: Hi\n\nAssistant: I am well.",
                "\n\nHuman: Hi\n\nAssistant: I am ill.",
                "\n\nHuman: Hi\n\nAssistant:",
                (" I am well.", " I am ill."),
            ),
        ],
    )
    def test_a_text_with_an_implicit_prompt(self, tmp_path, chosen, rejected, prompt, answers):
        (pair,) = load(tmp_path, {"chosen": chosen, "rejected": rejected})
        assert pair.prompt.content == prompt
        assert (pair.chosen, pair.rejected) == answers

    def test_longer_conversations(self, tmp_path):
        turns = [USER, GOOD, {"role": "user", "content": "And?"}]
        (pair,) = load(tmp_path, {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]})
        assert [message.content for message in pair.prompt.content] == ["Hi?", "Hello.", "And?"]
        assert (pair.chosen, pair.rejected) == ("Hello.", "No.")

    def test_other_columns(self, tmp_path):
        row = {"prompt": "Hi?", "chosen": "a", "rejected": "b", "margin": 2, "id": 7}
        row |= {"split": "test", "source": "me", "metadata": '{"kind": "x"}'}
        (pair,) = load(tmp_path, row)
        assert (pair.prompt.id, pair.prompt.split, pair.margin) == ("7", "test", 2.0)
        assert pair.prompt.metadata == {"source": "me", "kind": "x"}

    def test_equal_prompts_have_one_default_id(self, tmp_path):
        rows = [{"prompt": p, "chosen": "a", "rejected": "b"} for p in ("x", "y", "x")]
        ids = [pair.prompt.id for pair in load(tmp_path, *rows)]
        assert ids == ["pairs-1", "pairs-2", "pairs-1"]
        assert len(load(tmp_path, *rows, limit=2)) == 2


class TestBadRows:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "Hi", "chosen": "a"}, "expected the columns .*Add 'rejected'"),
            ({"prompt": "Hi", "chosen": "a", "rejected": " a "}, "two different responses"),
            ({"prompt": " ", "chosen": "a", "rejected": "b"}, "is empty"),
            ({"prompt": 3, "chosen": "a", "rejected": "b"}, "a string or a list of messages"),
            ({"prompt": "Hi", "chosen": 3, "rejected": "b"}, "both strings or both lists"),
            ({"prompt": "Hi", "chosen": [GOOD], "rejected": "b"}, "both strings or both lists"),
            ({"chosen": "a", "rejected": "b"}, "expected a column 'prompt'"),
            ({"chosen": [GOOD], "rejected": [BAD]}, "expected a column 'prompt'"),
            ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "one assistant message"),
            ({"prompt": "Hi", "chosen": [], "rejected": [BAD]}, "at least one message"),
            ({"prompt": "Hi", "chosen": [{"role": "a"}], "rejected": [BAD]}, "string `role`"),
            (
                {"prompt": "Other", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
                "start with the prompt 'Other'",
            ),
            ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": -1}, "margin of at least"),
            ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": "1"}, "number as margin"),
            ({"prompt": "Hi", "chosen": "a", "rejected": "b", "split": "x"}, "split to be one of"),
            ({"prompt": "Hi", "chosen": "a", "rejected": "b", "id": ""}, "integer as id"),
            ({"prompt": "Hi", "chosen": "a", "rejected": "b", "metadata": "x"}, "Expecting value"),
            ({"prompt": "Hi", "chosen": "a", "rejected": "b", "metadata": 1}, "object as metadata"),
            ("[1]", "expected an object"),
            ("{", "expected one JSON object"),
            ('{"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": NaN}', "NaN is not JSON"),
            (r'{"prompt": "Hi", "chosen": "\ud800", "rejected": "b"}', "one JSON object"),
        ],
    )
    def test_the_message_names_file_and_line(self, tmp_path, row, message):
        good = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
        with pytest.raises(PreferenceError, match=message) as caught:
            load(tmp_path, good, "", row)
        assert caught.match(r"pairs\.jsonl, line 3: ")

    def test_files(self, tmp_path):
        path = tmp_path / "pairs.jsonl"
        with pytest.raises(PreferenceError, match="file that can be read"):
            load_preferences(path)
        path.write_bytes(b"\n\n")
        with pytest.raises(PreferenceError, match="at least one preference pair"):
            load_preferences(path)
        path.write_bytes(b'{"prompt": "Hi"}\n{"prompt": "\xff"}')
        with pytest.raises(PreferenceError, match=r"line 2: expected UTF-8, got the byte 0xff"):
            load_preferences(path)
        with pytest.raises(PreferenceError, match="limit: expected 1 or more"):
            load_preferences(path, limit=0)

    def test_datasets(self, tmp_path):
        with pytest.raises(PreferenceError, match=r"no-such/data.*that can be loaded"):
            load_preferences("no-such/data")
        with pytest.raises(PreferenceError, match=r"Expected a \.jsonl file, a dataset's folder"):
            load_preferences(tmp_path / "nothing" / "pairs.csv")


def test_a_dataset(tmp_path):
    row = {"prompt": "Hi?", "chosen": "a", "rejected": "b", "margin": 1.0}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
    pairs = load_preferences(tmp_path, split="train[:2]")
    assert [(p.prompt.content, p.chosen, p.margin) for p in pairs] == [("Hi?", "a", 1.0)] * 2


class TestWriting:
    def test_what_is_written_is_read_and_is_trls_format(self, tmp_path):
        from datasets import load_dataset

        path = tmp_path / "pairs.jsonl"
        plain = Prompt("p", "Go \u2028 on", {"a": [1, "x"]}, "train")
        chat = Prompt("c", (Message("system", "Be kind."), Message("user", "Hi")), {"a": 1})
        pairs = [PreferencePair(plain, "a", "", 0.5), PreferencePair(plain, "a", "日本 🙂")]
        write_preferences(path, pairs)
        assert load_preferences(path) == pairs
        assert load_dataset("json", data_files=str(path), split="train")[0]["chosen"] == "a"
        write_preferences(path, [PreferencePair(chat, "a", "b")])
        assert load_preferences(path) == [PreferencePair(chat, "a", "b")]
        row = load_dataset("json", data_files=str(path), split="train")[0]
        assert row["chosen"] == [{"role": "assistant", "content": "a"}]

    def test_bad_input_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "pairs.jsonl"
        prompt = Prompt.from_text("Hi")
        write_preferences(path, [PreferencePair(prompt, "a", "b")])
        before = path.read_bytes()
        for bad in ([PreferencePair(prompt, "\ud800", "b")], []):
            with pytest.raises(PreferenceError):
                write_preferences(path, bad)
        with pytest.raises(PreferenceError, match=r"ends in \.jsonl"):
            write_preferences(tmp_path / "pairs.csv", [PreferencePair(prompt, "a", "b")])
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["pairs.jsonl"]


class TestFromRecords:
    def test_by_hand(self):
        records = [
            record("x", "a", 1.0),
            record("x", "b", 3.0),
            record("x", "c", 3.0),
            record("x", "b", 3.0),
            record("y", "a", 0.0),
            record("y", "b", 0.0),
        ]
        found = [(p.chosen, p.rejected, p.margin) for p in pairs_from_records(records)]
        assert found == [("b", "a", 2.0), ("c", "a", 2.0)]
        with pytest.raises(
            PreferenceError, match=r"differ by more than 2.0, got none in 6 records"
        ):
            pairs_from_records(records, min_gap=2.0)

    @given(
        scores=st.lists(st.integers(0, 4), min_size=2, max_size=8),
        limit=st.integers(1, 5),
        seed=st.integers(0, 3),
    )
    def test_the_higher_score_is_chosen(self, scores, limit, seed):
        records = [record("x", f"r{i}", float(score)) for i, score in enumerate(scores)]
        unequal = sum(a != b for i, a in enumerate(scores) for b in scores[:i])
        if not unequal:
            return
        by_text = {r.response: r.score for r in records}
        pairs = pairs_from_records(records, pairs_per_prompt=limit, seed=seed)
        assert len(pairs) == len({(p.chosen, p.rejected) for p in pairs}) == min(limit, unequal)
        for pair in pairs:
            assert by_text[pair.chosen] - by_text[pair.rejected] == pair.margin > 0
        # Another prompt in front changes nothing about this one's pairs.
        others = [record("other", "a", 0.0), record("other", "b", 1.0)]
        more = pairs_from_records([*others, *records], pairs_per_prompt=limit, seed=seed)
        assert [p for p in more if p.prompt.text == "x"] == pairs

    def test_bad_input(self):
        with pytest.raises(PreferenceError, match="got none in 0 records"):
            pairs_from_records([])
        mixed = [record("x", "a", 0.0), record("x", "b", 1.0, "other")]
        with pytest.raises(PreferenceError, match=r"one reward model, got those of \['gold', 'oth"):
            pairs_from_records(mixed)
        for options in ({"min_gap": -1.0}, {"min_gap": math.nan}, {"pairs_per_prompt": 0}):
            with pytest.raises(PreferenceError, match="Expected min_gap of at least 0"):
                pairs_from_records(mixed[:1], **options)


def test_pairs():
    prompt = Prompt.from_text("Hi")
    pair = PreferencePair(prompt, "a", "b", 1.0)
    assert pair.flipped() == PreferencePair(prompt, "b", "a", 1.0)
    for margin in (-1.0, math.nan, math.inf):
        with pytest.raises(PreferenceError, match="margin"):
            PreferencePair(prompt, "a", "b", margin)

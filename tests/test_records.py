"""Records: what is written comes back, whatever happens to the writer."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env.records import (
    Record,
    RecordsError,
    RecordWriter,
    has_records,
    read_records,
    rescore,
    scores_of,
)
from mbrl_text_env.rewards.base import RewardError, Scores
from mbrl_text_env.types import Message, Prompt, TextState, Usage

# Appends records one by one until it is killed. With an event's name and a count it kills itself
# at that event, for the child cannot be stopped from outside between two given system calls.
ENDLESS_WRITER = """
import itertools, os, signal, sys
from tests.test_records import make_record
from mbrl_text_env.records import RecordWriter

folder, event, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
seen = 0

def kill_at(name, args):
    global seen
    if name == event and ".parquet-" in str(args[0]):
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill_at)
with RecordWriter(folder, shard_rows=3) as writer:
    for number in itertools.count():
        writer.append(make_record(number))
"""


def make_record(number: int) -> Record:
    prompt = Prompt.from_text(f"Question {number // 4}", metadata={"kind": "toy"}, split="train")
    return Record.from_state(
        TextState(prompt, (7, 8), (number, 2), "stop"),
        response=f"answer {number}",
        logprobs=(-0.5, float("-inf")),
        score=number / 8,
        rewards={"first": number / 8, "second": 0.0},
        reward_name="toy",
        agent="sampling",
        language_model="toy",
        seed=number,
        usage=Usage(generated_tokens=2, lm_flops=1e9).as_dict(),
    )


def write(folder: Path, count: int, *, start: int = 0, shard_rows: int = 3) -> list[Record]:
    records = [make_record(number) for number in range(start, start + count)]
    with RecordWriter(folder, shard_rows=shard_rows) as writer:
        writer.extend(records)
    return records


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard-*"))


class LengthReward:
    name = "length"

    def score(self, prompts, responses):
        return [len(response) for response in responses]


class PartsReward:
    name = "parts"

    def score(self, prompts, responses):
        return self.score_parts(prompts, responses).total

    def score_parts(self, prompts, responses):
        ones = np.ones(len(responses))
        return Scores(2 * ones, {"left": ones, "right": ones})


class NanReward:
    """Fails late, when a part of the target has been written."""

    name = "nan"

    def score(self, prompts, responses):
        return [float("nan") if response == "answer 9" else 0.0 for response in responses]


unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
visible_text = unicode_text.filter(str.strip)
numbers = st.floats(allow_nan=False, allow_infinity=False)
token_ids = st.lists(st.integers(0, 2**63 - 1)).map(tuple)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | unicode_text,
    lambda inner: st.lists(inner) | st.dictionaries(unicode_text, inner),
    max_leaves=5,
)
amounts = st.dictionaries(unicode_text.filter(lambda name: name != "total"), numbers, max_size=3)
roles = st.sampled_from(["system", "user", "assistant", "tool", "my role-2.0"])
messages = st.lists(st.builds(Message, roles, visible_text), min_size=1, max_size=3)
prompts = st.builds(
    Prompt,
    unicode_text.filter(bool),
    visible_text | messages.map(tuple),
    st.dictionaries(unicode_text, json_values, max_size=3),
    st.sampled_from([None, "train", "validation", "test"]),
)


@st.composite
def any_record(draw: st.DrawFn) -> Record:
    response_ids = draw(token_ids)
    reason = draw(st.sampled_from([None, "stop", "length"]))
    logprob = st.floats(max_value=0, allow_nan=False)
    length = draw(st.sampled_from([0, len(response_ids)]))
    return Record.from_state(
        TextState(draw(prompts), draw(token_ids), response_ids, reason),
        response=draw(unicode_text),
        logprobs=draw(st.lists(logprob, min_size=length, max_size=length)),
        score=draw(numbers),
        rewards=draw(amounts),
        reward_name=draw(unicode_text),
        agent=draw(unicode_text),
        language_model=draw(unicode_text),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        usage=draw(amounts),
    )


@settings(deadline=None)
@given(st.lists(any_record(), min_size=1, max_size=5), st.integers(1, 3))
def test_records_come_back_as_they_were(records, shard_rows):
    with tempfile.TemporaryDirectory() as folder:
        with RecordWriter(folder, shard_rows=shard_rows) as writer:
            writer.extend(records)
        assert read_records(folder) == records


@given(any_record())
def test_prompt_and_state_are_rebuilt(record):
    prompt = record.prompt()
    assert (prompt.id, prompt.text, prompt.split) == (
        record.prompt_id,
        record.prompt_text,
        record.split,
    )
    assert prompt.metadata == record.metadata
    assert isinstance(prompt.content, str) == (record.messages is None)
    state = record.state()
    assert state == TextState(prompt, record.prompt_ids, record.response_ids, record.finish_reason)


def test_records_are_hashable():
    assert len({make_record(0), make_record(0), make_record(1)}) == 2


def test_full_shards_are_written_at_once_and_the_rest_at_the_end(tmp_path):
    with RecordWriter(tmp_path, shard_rows=3) as writer:
        writer.extend(make_record(number) for number in range(7))
        assert len(writer.existing()) == 6
        writer.flush()
        assert len(writer.existing()) == 7
        writer.flush()
    assert shards(tmp_path) == [f"shard-0000{i}.parquet" for i in range(3)]
    assert [record.seed for record in read_records(tmp_path)] == list(range(7))


def test_an_existing_folder_is_appended_to(tmp_path):
    with RecordWriter(tmp_path) as writer:
        assert writer.existing() == []
    records = write(tmp_path, 4) + write(tmp_path, 4, start=4)
    assert read_records(tmp_path) == records
    assert len(shards(tmp_path)) == 4


def test_shards_are_read_in_numerical_order_beyond_five_digits(tmp_path):
    records = write(tmp_path, 1)
    (tmp_path / "shard-00000.parquet").rename(tmp_path / "shard-99999.parquet")
    records += write(tmp_path, 1, start=1)
    assert shards(tmp_path) == ["shard-100000.parquet", "shard-99999.parquet"]
    assert read_records(tmp_path) == records


def test_an_error_in_the_block_keeps_what_was_appended(tmp_path):
    one_and_then_none = map(make_record, iter([0, None]))
    with pytest.raises(TypeError), RecordWriter(tmp_path) as writer:
        writer.extend(one_and_then_none)  # type: ignore[arg-type]
    assert read_records(tmp_path) == [make_record(0)]


def test_has_records(tmp_path):
    folder = tmp_path / "records"
    assert not has_records(folder)
    write(folder, 4)
    assert has_records(folder)
    assert has_records(folder, expected=4)
    assert not has_records(folder, expected=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, "finite"),
        ({"rewards": {"first": float("inf")}}, "finite"),
        ({"rewards": {"total": 1.0}}, "total"),
        ({"logprobs": (-1.0,)}, r"\(2\), got 1"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(RecordsError, match=message):
        replace(make_record(0), **change)


@pytest.mark.parametrize(
    "change",
    [
        {"response": "\ud800"},
        {"seed": 2**63},
        {"response_ids": (2**63, 0)},
        {"metadata": {"values": {1, 2}}},
        {"metadata": {"value": float("nan")}},
    ],
)
def test_a_record_that_cannot_be_stored_fails_alone(tmp_path, change):
    with RecordWriter(tmp_path) as writer:
        writer.append(make_record(0))
        with pytest.raises(RecordsError, match="Question 0"):
            writer.append(replace(make_record(1), **change))
        writer.append(make_record(2))
    assert read_records(tmp_path) == [make_record(0), make_record(2)]


def _run_writer(folder: Path, event: str = "", count: int = 0) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[1]
    arguments = [sys.executable, "-c", ENDLESS_WRITER, str(folder), event, str(count)]
    return subprocess.Popen(arguments, cwd=root)


def _check_after_kill(folder: Path) -> int:
    """Every shard reads, the rows are a prefix, and a new writer goes on; the rows there were."""
    names = [path for path in folder.iterdir() if path.suffix == ".parquet"]
    assert sum(pq.read_metadata(path).num_rows for path in names) == 3 * len(names)
    records = read_records(folder)
    assert records == [make_record(number) for number in range(len(records))]
    records += write(folder, 4, start=len(records))
    assert read_records(folder) == records
    assert not list(folder.glob(".*.parquet-*"))
    return len(records) - 4


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("written", [1, 8])
def test_a_writer_that_is_killed_loses_only_what_was_not_flushed(tmp_path, written):
    with _run_writer(tmp_path) as child:
        while len(list(tmp_path.glob("shard-*.parquet"))) < written:
            assert child.poll() is None
            time.sleep(0.001)
        child.kill()
    assert _check_after_kill(tmp_path) >= 3 * written


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(("event", "count"), [("open", 5), ("open", 6), ("os.rename", 3)])
def test_a_writer_that_is_killed_while_it_writes_its_third_shard_leaves_no_half_of_it(
    tmp_path, event, count
):
    # A shard is opened twice: to be written, and to be brought to the disk.
    with _run_writer(tmp_path, event, count) as child:
        assert child.wait() == -signal.SIGKILL
    assert _check_after_kill(tmp_path) == 6


def test_leftover_temporary_files_are_ignored_and_removed(tmp_path):
    records = write(tmp_path, 3)
    scratch = tmp_path / ".shard-00001.parquet-0123456789ab"
    scratch.write_bytes(b"PAR1 half")
    assert read_records(tmp_path) == records
    write(tmp_path, 1, start=3)
    assert not scratch.exists()


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    records = write(tmp_path, 1)
    (tmp_path / "notes.parquet").write_text("mine")
    write(tmp_path, 1)
    assert read_records(tmp_path) == records * 2
    assert (tmp_path / "notes.parquet").read_text() == "mine"


def _cut_off(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip_in_page_header(data: bytes) -> bytes:
    return data[:60] + bytes([data[60] ^ 1]) + data[61:]


def _change_a_letter(data: bytes) -> bytes:
    """Only the page's checksum tells that this is damage."""
    assert b"Question 1" in data
    return data.replace(b"Question 1", b"Question 7", 1)


@pytest.mark.parametrize(
    "damage", [_cut_off, _flip_in_page_header, _change_a_letter, lambda data: b""]
)
def test_a_damaged_shard_is_named(tmp_path, damage):
    write(tmp_path, 8)
    last = tmp_path / "shard-00002.parquet"
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(RecordsError, match=r"shard-00002\.parquet.*damaged"):
        read_records(tmp_path)


def test_a_damaged_shard_is_noticed_before_sound_ones(tmp_path):
    write(tmp_path, 8)
    first = tmp_path / "shard-00000.parquet"
    first.write_bytes(_cut_off(first.read_bytes()))
    with pytest.raises(RecordsError, match="shard-00000"):
        read_records(tmp_path)
    with pytest.raises(RecordsError, match="shard-00000"):
        has_records(tmp_path)
    with pytest.raises(RecordsError, match="shard-00000"), RecordWriter(tmp_path):
        pass


@pytest.mark.parametrize("version", [None, "3"])
def test_an_unknown_version_is_an_error(tmp_path, version):
    write(tmp_path, 1)
    shard = tmp_path / "shard-00000.parquet"
    metadata = {} if version is None else {"mbrl_text_env.records_version": version}
    pq.write_table(pq.read_table(shard).replace_schema_metadata(metadata), shard)
    with pytest.raises(RecordsError, match=f"version 2, got .*{version or 'no version'}"):
        read_records(tmp_path)
    with pytest.raises(RecordsError, match="version 2"), RecordWriter(tmp_path):
        pass


def test_other_columns_are_damage(tmp_path):
    write(tmp_path, 1)
    shard = tmp_path / "shard-00000.parquet"
    pq.write_table(pq.read_table(shard).drop_columns(["score"]), shard)
    with pytest.raises(RecordsError, match="columns"):
        read_records(tmp_path)


def test_no_folder_and_no_shards_are_errors(tmp_path):
    with pytest.raises(RecordsError, match="not there"):
        read_records(tmp_path / "nowhere")
    with pytest.raises(RecordsError, match="a folder"):
        read_records(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RecordsError, match="a file"):
        read_records(file)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "records"):
        with pytest.raises(RecordsError, match="can be written"), RecordWriter(folder):
            pass
        with pytest.raises(RecordsError, match=r"empty folder|can be written"):
            rescore(tmp_path, LengthReward(), folder)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_folder_without_write_permission_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RecordsError, match="can be written"), RecordWriter(tmp_path):
        pass


def test_a_shard_that_cannot_be_written_keeps_its_records(tmp_path):
    with RecordWriter(tmp_path) as writer:
        writer.append(make_record(0))
        obstacle = tmp_path / "shard-00000.parquet"
        obstacle.mkdir()
        with pytest.raises(RecordsError, match="can be written"):
            writer.flush()
        assert shards(tmp_path) == [obstacle.name]
        obstacle.rmdir()
    assert read_records(tmp_path) == [make_record(0)]


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path):
    with RecordWriter(tmp_path) as first:
        with (
            pytest.raises(RecordsError, match="another writer has it open"),
            RecordWriter(tmp_path),
        ):
            pass
        first.append(make_record(0))
    write(tmp_path, 1, start=1)
    assert len(read_records(tmp_path)) == 2


def test_a_writer_that_is_not_open_is_an_error(tmp_path):
    with RecordWriter(tmp_path) as writer:
        pass
    with pytest.raises(RecordsError, match="not open"):
        writer.append(make_record(0))
    with pytest.raises(RecordsError, match="not open"):
        RecordWriter(tmp_path / "new").flush()


def test_shard_rows_must_be_positive(tmp_path):
    with pytest.raises(RecordsError, match="shard_rows"):
        RecordWriter(tmp_path, shard_rows=0)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_rescore_changes_the_scores_alone(tmp_path, batch_size):
    records = write(tmp_path / "old", 10)
    rescore(tmp_path / "old", LengthReward(), tmp_path / "new", batch_size=batch_size)
    assert read_records(tmp_path / "old") == records
    assert read_records(tmp_path / "new") == [
        replace(
            record,
            score=float(len(record.response)),
            rewards={"length": float(len(record.response))},
            reward_name="length",
        )
        for record in records
    ]


def test_rescore_keeps_the_parts(tmp_path):
    write(tmp_path / "old", 2)
    (tmp_path / "new").mkdir()
    rescore(tmp_path / "old", PartsReward(), tmp_path / "new")
    for record in read_records(tmp_path / "new"):
        assert (record.score, record.rewards) == (2.0, {"left": 1.0, "right": 1.0})


def test_rescore_leaves_nothing_when_the_reward_model_fails(tmp_path):
    write(tmp_path / "old", 10)
    with pytest.raises(RewardError, match="nan"):
        rescore(tmp_path / "old", NanReward(), tmp_path / "new", batch_size=2)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_rescore_refuses_the_source_and_what_is_not_empty(tmp_path):
    records = write(tmp_path / "old", 2)
    write(tmp_path / "other", 1)
    for target in (tmp_path / "old", tmp_path / "x" / ".." / "old"):
        with pytest.raises(RecordsError, match="another folder than the source"):
            rescore(tmp_path / "old", LengthReward(), target)
    with pytest.raises(RecordsError, match="new or empty folder"):
        rescore(tmp_path / "old", LengthReward(), tmp_path / "other")
    with pytest.raises(RecordsError, match="batch_size"):
        rescore(tmp_path / "old", LengthReward(), tmp_path / "new", batch_size=0)
    with pytest.raises(RecordsError, match="not there"):
        rescore(tmp_path / "nowhere", LengthReward(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert read_records(tmp_path / "old") == records


def test_records_load_with_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    records = write(tmp_path / "records", 5)
    found = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "records" / "*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert found["response"][:] == [record.response for record in records]
    assert found[1]["response_ids"] == [1, 2]
    assert found[1]["rewards"] == [
        {"name": "first", "value": 0.125},
        {"name": "second", "value": 0.0},
    ]
    assert json.loads(found[0]["messages"]) == [{"role": "user", "content": "Question 0"}]


def test_prefixes_are_the_states_on_the_way():
    prompt = Prompt.from_text("Question", split="train")
    record = Record.from_state(
        TextState(prompt, (7, 8), (4, 5, 6), "stop", (2, 3)),
        response="answer",
        logprobs=(-0.5, -1.0, -2.0),
        score=1.0,
        rewards={},
        reward_name="toy",
        agent="sampling",
        language_model="toy",
        seed=0,
    )
    middle = record.prefix_state(2)
    assert (middle.response_ids, middle.finish_reason) == ((4, 5), None)
    assert (middle.chunk_ends, middle.logprob) == ((2,), -1.5)
    assert record.prefix_state(0) == TextState(prompt, (7, 8))
    assert record.prefix_state(3) == record.state()
    assert record.state().logprob == -3.5
    for length in (-1, 4):
        with pytest.raises(RecordsError, match="a prefix of 0 to 3 tokens"):
            record.prefix_state(length)


def test_a_record_without_a_score_is_kept_and_refused_where_a_score_is_needed(tmp_path):
    bare = replace(make_record(1), score=None, rewards={}, reward_name="")
    with RecordWriter(tmp_path) as writer:
        writer.append(bare)
    assert read_records(tmp_path) == [bare]
    with pytest.raises(RecordsError, match="expected a score, got None"):
        scores_of([make_record(0), bare])
    with pytest.raises(RecordsError, match="without a score"):
        replace(bare, reward_name="toy")

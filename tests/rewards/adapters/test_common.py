"""Waiting for async functions, wherever they are called, and reading what functions return."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mbrl_text_env.rewards.adapters import FunctionReward, as_reward_model
from mbrl_text_env.rewards.adapters.common import as_prompt, awaited, listed, number, said
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.types import Prompt

PROMPT = Prompt.from_text("Hi")


async def doubled(value):
    await asyncio.sleep(0)
    return 2 * value


class TestAwaited:
    def test_what_need_not_be_waited_for_is_returned(self):
        assert awaited(3.0) == 3.0

    def test_within_a_running_loop(self):
        async def notebook():
            return awaited(doubled(2))

        assert awaited(doubled(2)) == asyncio.run(notebook()) == 4

    def test_an_async_function_that_scores_with_another(self):
        async def outer(prompt, response):
            inner = as_reward_model(lambda p, r: doubled(len(r)))
            return 10 * float(inner.score([PROMPT], [response])[0])

        assert FunctionReward(outer).score([PROMPT], ["abc"]).tolist() == [60.0]

    def test_all_calls_share_a_loop(self):
        # Connections that a client keeps open belong to the loop that opened them.
        async def loop():
            return asyncio.get_running_loop()

        with ThreadPoolExecutor(4) as executor:
            others = list(executor.map(lambda _: awaited(loop()), range(4)))
        assert {*others, awaited(loop())} == {awaited(loop())}
        assert "rewards" in {thread.name for thread in threading.enumerate()}

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_after_a_fork(self):
        awaited(doubled(1))
        child = os.fork()
        if child == 0:
            os._exit(awaited(doubled(21)))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42

    def test_errors_come_through(self):
        async def broken():
            raise KeyError("oops")

        with pytest.raises(KeyError, match="oops"):
            awaited(broken())


class TestNumbers:
    @pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), torch.tensor(1.0)])
    def test_numbers_of_all_kinds(self, value):
        assert number(value, "f", PROMPT, "x") == 1.0

    @pytest.mark.parametrize("value", ["0.5", b"0.5", "good", [1.0], {}, torch.ones(2)])
    def test_texts_are_none_whatever_they_look_like(self, value):
        with pytest.raises(RewardError, match=r"'f': expected a number for prompt 'Hi'.*'x', got"):
            number(value, "f", PROMPT, "x")

    @pytest.mark.parametrize(
        "values", [[1.0, 2.0], (1.0, 2.0), np.array([1.0, 2.0]), torch.tensor([1.0, 2.0])]
    )
    def test_lists_of_all_kinds(self, values):
        assert listed(values, "f", [PROMPT] * 2, ["a", "b"]) == [1.0, 2.0]
        assert listed((v for v in values), "f", [PROMPT] * 2, ["a", "b"]) == [1.0, 2.0]

    @pytest.mark.parametrize("values", [None, 1.0, "ab", {"a": 1, "b": 2}, torch.tensor(1.0)])
    def test_what_is_no_list(self, values):
        with pytest.raises(RewardError, match=r"'f': expected 2 values.* got .*'Hi'.*'a'"):
            listed(values, "f", [PROMPT] * 2, ["a", "b"])

    def test_too_many(self):
        with pytest.raises(RewardError, match="expected 0 values, one per completion, got 1"):
            listed([1.0], "f", [], [])


@pytest.mark.parametrize(
    ("metadata", "name"), [({}, "Why?"), ({"id": 0}, "0"), ({"id": ""}, "Why?"), ({"id": "a"}, "a")]
)
def test_prompts_are_named_by_their_id_or_text(metadata, name):
    assert as_prompt("Why?", metadata).id == name


def test_messages_and_metadata_of_tables():
    messages = np.array([{"role": "user", "content": "Hi", "name": None}], dtype=object)
    parts = [{"type": "text", "text": "H"}, {"type": "image"}, {"type": "text", "text": "i"}]
    for content in ("Hi", messages, [{"role": "user", "content": parts}]):
        prompt = as_prompt(content, {"answer": np.int64(4), "hint": None, "id": np.int64(7)})
        assert (prompt.text, prompt.id, prompt.metadata) == ("Hi", "7", {"answer": 4, "id": 7})
    calls = [{"role": "assistant", "content": None}, {"role": "assistant", "content": "Hi"}]
    assert said(np.array(calls, dtype=object)) == "\nHi"

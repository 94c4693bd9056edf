"""Answers of agents as records: what is written, what it cost, and second tries with hints."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mbrl_text_env.agents import BestOfN
from mbrl_text_env.agents.collection import collect
from mbrl_text_env.agents.learning import answer_hint, collect_answers
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.language_models.base import spawn_seed
from mbrl_text_env.records import RecordWriter, read_records
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.types import Ledger
from tests.agents.learning.worlds import BASE, TOKENS, TRAIN, AnswerReward, CopyLM
from tests.toys import CountReward


def answered(folder, agent, prompts=TRAIN, **options):
    ledger = Ledger()
    with RecordWriter(folder) as writer:
        failed = collect_answers(agent, prompts, writer, ledger=ledger, **options)
    return read_records(folder), ledger.usage, failed


def sampling(lm=BASE, reward=None):
    return Sampling(lm, reward or CountReward(), max_response_tokens=TOKENS)


def best_of(n=3):
    return BestOfN(BASE, CountReward(), n=n, max_response_tokens=TOKENS)


def timeless(record):
    return replace(record, usage={k: v for k, v in record.usage.items() if k != "seconds"})


def test_plain_samples_are_those_of_collect(tmp_path):
    mine, _, _ = answered(tmp_path / "a", sampling(), answers=3, seed=5)
    with RecordWriter(tmp_path / "b") as writer:
        collect(
            BASE, CountReward(), TRAIN, writer, samples_per_prompt=3, max_response_tokens=TOKENS,
            seed=5,
        )  # fmt: skip
    theirs = read_records(tmp_path / "b")
    assert [r.sample for r in theirs] == [*range(3)] * len(TRAIN)
    assert [replace(r, usage={}) for r in mine] == [
        replace(r, usage={}, sample=None) for r in theirs
    ]


@pytest.mark.parametrize("agent", [sampling(), best_of()])
def test_batches_change_nothing(tmp_path, agent):
    found = [
        answered(tmp_path / str(size), agent, answers=2, batch_prompts=size)[0] for size in (1, 4)
    ]
    assert [timeless(r) for r in found[0]] == [timeless(r) for r in found[1]]
    assert [r.prompt_id for r in found[0]] == [p.id for p in TRAIN for _ in range(2)]


@pytest.mark.parametrize("agent", [sampling(), best_of()])
def test_everything_is_charged(tmp_path, agent):
    records, usage, _ = answered(tmp_path, agent, answers=2)
    for name, amount in usage.as_dict().items():
        assert sum(r.usage[name] for r in records) == pytest.approx(amount)
    assert usage.reward_calls >= 2 * len(TRAIN)
    if agent.name == "sampling":
        assert usage.generated_tokens == sum(len(r.response_ids) for r in records)
        assert usage.reward_calls == 2 * len(TRAIN)


def test_planned_answers_are_those_of_generate(tmp_path):
    records, _, _ = answered(tmp_path, best_of(), answers=2, seed=3)
    for k in range(2):
        rows = best_of().generate(TRAIN, seed=spawn_seed(3, 0, k))
        for record, row in zip(records[k::2], rows, strict=True):
            assert record.response_ids == row.completion.state.response_ids
            assert record.score == row.completion.score
            assert record.agent == "best-of-n"


class TestHints:
    def test_a_planner_is_told_too(self, tmp_path):
        agent = BestOfN(CopyLM(), AnswerReward(), n=2, max_response_tokens=2)
        records, usage, _ = answered(tmp_path, agent, hint=answer_hint)
        assert [r.score for r in records] == [0.0] * 15 + [1.0] * 15
        for record in records[15:]:
            assert record.agent == "best-of-n+hint"
            assert record.response == record.metadata["reference_answer"]
            assert record.prompt_ids == CopyLM().encode_prompt(record.prompt())
        # Scored as an answer to the prompt that is not told anything, which is paid for.
        assert records[20].usage["reward_calls"] == records[0].usage["reward_calls"] + 1
        assert usage.reward_calls == sum(r.usage["reward_calls"] for r in records)

    def test_prompts_without_an_answer_are_asked_once(self, tmp_path):
        records, _, _ = answered(tmp_path, sampling(), hint=lambda prompt: None)
        assert len(records) == len(TRAIN)


def test_a_prompt_that_cannot_be_scored(tmp_path):
    class Fussy(CountReward):
        refused = frozenset({TRAIN[3].id})

        def score(self, prompts, responses):
            if any(p.id in self.refused for p in prompts):
                raise RewardError("not this one")
            return super().score(prompts, responses)

    with pytest.warns(UserWarning, match="Skipped prompt"):
        records, _, failed = answered(tmp_path / "a", sampling(reward=Fussy()))
    assert failed == {TRAIN[3].id: "not this one"}
    assert [r.prompt_id for r in records] == [p.id for p in TRAIN if p.id != TRAIN[3].id]
    Fussy.refused = frozenset(p.id for p in TRAIN)
    with (
        pytest.warns(UserWarning, match="Skipped prompt"),
        pytest.raises(RewardError, match=r"None of 15 prompts .*not this one"),
    ):
        answered(tmp_path / "b", sampling(reward=Fussy()))

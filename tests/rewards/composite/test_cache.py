"""Scores are looked up where they are known, and are the ones that would have been computed."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards.base import RewardError, score_responses
from mbrl_text_env.rewards.composite.cache import CachedReward
from mbrl_text_env.rewards.composite.combinators import WeightedSum
from mbrl_text_env.rewards.composite.transforms import Clip
from mbrl_text_env.rewards.evaluators.classifier import ClassifierReward
from mbrl_text_env.rewards.evaluators.process import ProcessReward, StepFormat
from mbrl_text_env.rewards.evaluators.relevance import RelevanceReward
from mbrl_text_env.rewards.evaluators.sentiment import SentimentReward
from mbrl_text_env.rewards.verifiable.code import UnitTestReward
from mbrl_text_env.runs import identity
from mbrl_text_env.sandbox import Limits
from mbrl_text_env.types import Message, Prompt
from tests.toys import StepReward

PROMPT = Prompt.from_text("Count letters.")


def cached(path, **changes):
    return CachedReward(StepReward(**changes), path / "scores.sqlite")


def scores_of(reward, responses, prompt=PROMPT):
    return score_responses(reward, [prompt] * len(responses), responses)


def test_each_text_is_scored_once(tmp_path):
    reward = cached(tmp_path)
    assert scores_of(reward, ["ab", "b", "ab"]).total.tolist() == [0.5, 0.0, 0.5]
    assert reward.reward.calls == [["ab", "b"]]
    assert scores_of(reward, ["b", "a", "ab"]).total.tolist() == [0.0, 1.0, 0.5]
    assert reward.reward.calls == [["ab", "b"], ["a"]]
    assert (reward.num_found, reward.num_computed) == (3, 3)


def test_another_process_finds_them(tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.rewards.composite.test_cache import cached, scores_of\n"
        "scores_of(cached(Path(sys.argv[1])), ['ab', 'b'])"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, check=True)
    reward = cached(tmp_path)
    assert scores_of(reward, ["b", "ab"]).total.tolist() == [0.0, 0.5]
    assert reward.reward.calls == []


def test_parts_and_steps_are_kept(tmp_path):
    both = WeightedSum([SentimentReward(), StepReward()], [2, 1])
    first = scores_of(CachedReward(both, tmp_path / "s"), ["a good one", "bad"])
    again = CachedReward(both, tmp_path / "s")
    second = scores_of(again, ["bad", "a good one"])
    assert again.num_computed == 0
    assert second.parts_of(1) == first.parts_of(0)
    assert set(second.parts) == {"sentiment", "steps"}
    steps = cached(tmp_path)
    for _ in range(2):
        assert steps.score_steps(PROMPT, ["aa", "b"]).tolist() == [2.0, 0.0]
    assert (steps.num_found, steps.num_computed) == (1, 1)
    assert steps.score([PROMPT], ["aab"]).tolist() == [pytest.approx(2 / 3)]
    assert not CachedReward(SentimentReward(), tmp_path / "s").scores_steps


def test_prompts_rewards_and_metadata_do_not_mix(tmp_path):
    first = cached(tmp_path, letter="a")
    scores_of(first, ["ab"])
    other = cached(tmp_path, letter="b")
    assert scores_of(other, ["abb"]).total.tolist() == [pytest.approx(2 / 3)]
    chat = Prompt("x", (Message("system", "Hi"), Message("user", "Count letters.")))
    for prompt in (
        Prompt.from_text("Another"),
        Prompt.from_text("Count letters.", metadata={"answer": 1}),
        Prompt.from_text("Count letters.", chat=False),
        chat,
    ):
        before = first.num_computed
        scores_of(first, ["ab"], prompt)
        assert first.num_computed == before + 1


def test_contract(tmp_path):
    check_reward_model(CachedReward(SentimentReward(), tmp_path / "s"))
    check_reward_model(CachedReward(RelevanceReward(), tmp_path / "s"))


def test_many_texts_and_many_threads(tmp_path):
    reward = cached(tmp_path)
    texts = ["a" * (1 + i % 7) + "b" * i for i in range(1200)]
    expected = scores_of(StepReward(), texts).total.tolist()
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(lambda _: scores_of(cached(tmp_path), texts), range(4)):
            assert scores.total.tolist() == expected
    assert scores_of(reward, texts).total.tolist() == expected
    assert reward.num_computed == 0


def test_a_failure_is_not_kept(tmp_path):
    class Moody(StepReward):
        fails = True

        def score(self, prompts, responses):
            if self.fails:
                raise ZeroDivisionError("moody")
            return super().score(prompts, responses)

    reward = CachedReward(Moody(), tmp_path / "s")
    with pytest.raises(RewardError, match="moody"):
        scores_of(reward, ["ab"])
    Moody.fails = False
    assert scores_of(reward, ["ab"]).total.tolist() == [0.5]


def test_a_file_that_is_none_of_its_own(tmp_path):
    (tmp_path / "scores.sqlite").write_text("thesis " * 100)
    with pytest.raises(RewardError, match=r"'steps'.*scores\.sqlite.*not a database.*Remove"):
        scores_of(cached(tmp_path), ["ab"])
    assert (tmp_path / "scores.sqlite").read_text().startswith("thesis")
    with pytest.raises(RewardError, match="unable to open"):
        scores_of(cached(tmp_path / "nowhere"), ["ab"])


def test_metadata_that_json_cannot_hold(tmp_path):
    prompt = Prompt.from_text("Hi", metadata={"answer": {1, 2}})
    with pytest.raises(RewardError, match=r"'Hi'.*JSON values.*\{1, 2\}"):
        scores_of(cached(tmp_path), ["ab"], prompt)


def test_identities_tell_rewards_apart(classifiers):
    folder = classifiers["bert"]
    rewards = [
        SentimentReward(),
        RelevanceReward(),
        RelevanceReward("other/encoder"),
        ClassifierReward(folder),
        ClassifierReward(folder, output="sigmoid"),
        ClassifierReward(classifiers["deberta"]),
        ProcessReward(folder),
        ProcessReward(folder, "math-shepherd"),
        ProcessReward(folder, StepFormat("\n")),
        ProcessReward(folder, StepFormat("\n", good="yes")),
        UnitTestReward(),
        UnitTestReward(limits=Limits(cpu_seconds=1)),
        Clip(SentimentReward(), 0),
        Clip(SentimentReward(), 0, 1),
        Clip(RelevanceReward(), 0),
        WeightedSum([SentimentReward(), RelevanceReward()], [1, 2]),
        WeightedSum([SentimentReward(), RelevanceReward()], [2, 1]),
    ]
    assert len({json.dumps(identity(reward)) for reward in rewards}) == len(rewards)
    assert identity(ClassifierReward(folder)) == identity(ClassifierReward(str(folder)))


def test_a_folder_that_changes_makes_another_identity(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = identity(ClassifierReward(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert identity(ClassifierReward(tmp_path)) != before

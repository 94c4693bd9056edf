"""Real OpenEnv rubrics score through us as they do by themselves."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys

import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards import ConstraintsReward, SentimentReward, as_reward_model
from mbrl_text_env.rewards.adapters import to_openenv
from mbrl_text_env.rewards.adapters.rubrics import OpenEnvReward, TextAction, TextObservation
from mbrl_text_env.rewards.base import RewardError, score_responses
from mbrl_text_env.types import Prompt

rubrics = pytest.importorskip("openenv.core.rubrics")

PROMPTS = [Prompt.from_text("Ask for tea.", metadata={"word": "tea"}), Prompt.from_text("Hi")]
RESPONSES = ["Tea, please.", "no"]


class Polite(rubrics.Rubric):
    def forward(self, action, observation):
        return float("please" in action)


class OnTopic(rubrics.Rubric):
    def forward(self, action, observation):
        return float(observation.metadata.get("word", "?") in action.lower())


class Later(rubrics.Rubric):
    async def forward(self, action, observation):
        await asyncio.sleep(0)
        return len(action) / 10


class Whole(rubrics.TrajectoryRubric):
    def score_trajectory(self, trajectory):
        return float(len(trajectory))

    def compute_step_rewards(self):
        return [1.0] * len(self.trajectory)


def by_itself(rubric, prompt, response):
    result = rubric(TextAction(response), TextObservation(prompt))
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


RUBRICS = {
    "plain": Polite,
    "metadata": OnTopic,
    "async": Later,
    "weighted": lambda: rubrics.WeightedSum([Polite(), OnTopic()], [0.7, 0.3]),
    "weighted, async": lambda: rubrics.WeightedSum([Polite(), Later()], [0.5, 0.5]),
    "sequential": lambda: rubrics.Sequential(rubrics.Gate(Polite()), OnTopic()),
    "trajectory": Whole,
    "trajectory within": lambda: rubrics.WeightedSum([Polite(), Whole()], [0.5, 0.5]),
}


@pytest.mark.parametrize("make", RUBRICS.values(), ids=RUBRICS)
def test_they_score_as_they_do_by_themselves(make):
    reward = as_reward_model(make())
    assert isinstance(reward, OpenEnvReward)
    scores = score_responses(reward, PROMPTS, RESPONSES)
    expected = [by_itself(make(), *row) for row in zip(PROMPTS, RESPONSES, strict=True)]
    assert scores.total.tolist() == expected
    check_reward_model(reward)


def test_hooks_are_run():
    seen = []
    rubric = Polite()
    rubric.register_forward_hook(lambda rubric, action, observation, score: seen.append(score))
    score_responses(as_reward_model(rubric), PROMPTS, RESPONSES)
    assert seen == [1.0, 0.0]


def test_actions_of_an_environment_of_its_own():
    class Typed(rubrics.Rubric):
        def forward(self, action, observation):
            return float(action["message"] == observation["expected"])

    rubric = Typed()

    def typed(prompt, response):
        return rubric({"message": response}, {"expected": "no"})

    with pytest.raises(RewardError, match=r"'Typed': raised TypeError.*'Hi'.*pass a function"):
        score_responses(as_reward_model(rubric), PROMPTS[1:], RESPONSES[1:])
    scores = score_responses(as_reward_model(typed), PROMPTS, RESPONSES)
    assert scores.total.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("result", "message"), [("x", "a number"), (None, "None")])
def test_what_is_no_score(result, message):
    class Bad(rubrics.Rubric):
        def forward(self, action, observation):
            return result

    with pytest.raises(RewardError, match=message):
        score_responses(as_reward_model(Bad()), PROMPTS, RESPONSES)


def test_within_a_running_event_loop():
    async def notebook():
        return score_responses(as_reward_model(Later()), PROMPTS, RESPONSES).total.tolist()

    assert asyncio.run(notebook()) == [1.2, 0.2]


def test_an_error_while_resetting_is_an_error():
    class Broken(Polite):
        def reset(self):
            self.missing.clear()

    with pytest.raises(RewardError, match=r"'Broken': raised AttributeError.*'missing'"):
        score_responses(as_reward_model(Broken()), PROMPTS, RESPONSES)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])  # noqa: S301
def test_actions_and_observations_can_be_copied(copied):
    action, observation = copied(TextAction("tea")), copied(TextObservation(PROMPTS[0]))
    assert (action, action.metadata) == ("tea", {})
    assert (observation, observation.prompt) == ("Ask for tea.", PROMPTS[0])
    assert (observation.metadata, observation.done) == ({"word": "tea"}, True)


class TestToOpenEnv:
    def test_it_is_a_rubric(self):
        rubric = to_openenv(SentimentReward())
        assert isinstance(rubric, rubrics.Rubric)
        assert rubric("It was good.", "How was it?") == rubric.last_score == 0.4404
        both = rubrics.WeightedSum([rubric, Polite()], [0.5, 0.5])
        assert both("Good, please.", "?") == pytest.approx(0.5 * rubric.last_score + 0.5)

    def test_there_and_back(self):
        lowercase = {"constraints": [{"type": "lowercase"}]}
        prompts = [Prompt.from_text("Greet.", metadata=lowercase), Prompt.from_text("Hi")]
        for reward, asked in ((SentimentReward(), prompts), (ConstraintsReward(), prompts[:1])):
            back = as_reward_model(to_openenv(reward))
            assert isinstance(back, OpenEnvReward)
            assert back.name == reward.name
            for response in ("good day", "Good day"):
                expected = score_responses(reward, asked, [response] * len(asked))
                scores = score_responses(back, asked, [response] * len(asked))
                assert scores.total.tolist() == expected.total.tolist()

    def test_the_types_of_an_environment(self):
        with pytest.raises(TypeError, match=r"got a dict as action"):
            to_openenv(SentimentReward())({"message": "Good."}, "How was it?")

    def test_without_openenv(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "openenv.core.rubrics", None)
        with pytest.raises(ImportError, match="pip install openenv-core"):
            to_openenv(SentimentReward())


def test_adapters_import_no_neighbour():
    program = (
        "import sys, mbrl_text_env.rewards.adapters\n"
        "heavy = {'openenv', 'trl', 'torch', 'transformers'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""

"""Real rubrics of verifiers score through us as they do by themselves."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards import as_reward_model
from mbrl_text_env.rewards.adapters import VerifiersFunctionReward, VerifiersReward
from mbrl_text_env.rewards.adapters.verifiers import _rollout
from mbrl_text_env.rewards.base import RewardError, applies_to, score_responses
from mbrl_text_env.types import Prompt

vf = pytest.importorskip("verifiers")

PROMPTS = [
    Prompt.from_text("2 + 2?", metadata={"answer": "4", "level": 1}),
    Prompt.from_text("2 * 4?", metadata={"reference_answer": "8", "level": 3}),
]
RESPONSES = ["It is 4.", "It is 6."]


def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def correct(completion, answer, **kwargs):
    return float(answer in text_of(completion))


def brevity(completion):
    return 1 / (1 + len(text_of(completion)))


def by_level(completion, info, level):
    assert info["level"] == level
    return level / 10


async def later(prompt, completion, state):
    await asyncio.sleep(0)
    assert state["completion"] == completion
    return float(len(prompt[0]["content"]))


def parsed(completion, parser):
    return float(len(parser.parse_answer(completion) or ""))


def by_itself(rubric, prompt, response):
    state = _rollout(prompt, response)
    asyncio.run(rubric.score_rollout(state))
    return state["reward"], state["metrics"]


RUBRICS = {
    "one function": lambda: vf.Rubric(funcs=[correct]),
    "weights": lambda: vf.Rubric(funcs=[correct, brevity], weights=[1.0, 0.25]),
    "columns and info": lambda: vf.Rubric(funcs=[by_level, correct], weights=[2.0, 1.0]),
    "async and state": lambda: vf.Rubric(funcs=[later, brevity], weights=[0.1, 1.0]),
    "parser": lambda: vf.Rubric(funcs=[parsed], parser=vf.Parser()),
    "group of rubrics": lambda: vf.RubricGroup(
        [vf.Rubric(funcs=[correct]), vf.Rubric(funcs=[brevity], weights=[0.5])]
    ),
}


@pytest.mark.parametrize("make", RUBRICS.values(), ids=RUBRICS)
def test_they_score_as_they_do_by_themselves(make):
    reward = as_reward_model(make())
    assert isinstance(reward, VerifiersReward)
    scores = score_responses(reward, PROMPTS, RESPONSES)
    for i, row in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        total, metrics = by_itself(make(), *row)
        assert scores.total[i] == pytest.approx(total)
        assert scores.parts_of(i) == pytest.approx(metrics)
    check_reward_model(reward, PROMPTS)


def test_names():
    assert as_reward_model(vf.Rubric(funcs=[correct, brevity])).name == "correct+brevity"
    assert VerifiersReward(vf.Rubric(funcs=[correct]), name="maths").name == "maths"


def test_plain_prompts_have_plain_completions():
    def kind(prompt, completion):
        return float(isinstance(prompt, str) and isinstance(completion, str))

    prompts = [Prompt.from_text("Once", chat=False), Prompt.from_text("Why?")]
    scores = score_responses(as_reward_model(vf.Rubric(funcs=[kind])), prompts, ["a", "b"])
    assert scores.total.tolist() == [1.0, 0.0]


def raises(completion):
    raise ZeroDivisionError("no")


def returns_text(completion):
    return "good"


async def raises_later(completion):
    raise ZeroDivisionError("no")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "raises raised ZeroDivisionError: no"),
        (returns_text, "returns_text raised TypeError: expected a number, got 'good'"),
        (raises_later, "raises_later raised ZeroDivisionError: no"),
        (lambda completion: float("nan"), "finite"),
    ],
)
@pytest.mark.parametrize("group", [False, True])
def test_what_verifiers_makes_a_zero_of_is_an_error(function, message, group):
    rubric = vf.Rubric(funcs=[function])
    reward = as_reward_model(
        vf.RubricGroup([vf.Rubric(funcs=[brevity]), rubric]) if group else rubric
    )
    with pytest.raises(RewardError, match=message):
        score_responses(reward, PROMPTS, RESPONSES)


def test_the_rubric_itself_is_left_as_it_is():
    rubric = vf.Rubric(funcs=[correct])
    score_responses(as_reward_model(rubric), PROMPTS, RESPONSES)
    assert rubric.funcs == [correct]


def test_a_missing_answer():
    prompt = Prompt.from_text("Why?", metadata={"level": 2})
    for reward in (as_reward_model(vf.Rubric(funcs=[correct])), as_reward_model(correct)):
        assert not applies_to(reward, prompt)
        with pytest.raises(RewardError, match=r"'correct', prompt 'Why\?'.*keys \['level'\]"):
            score_responses(reward, [prompt], ["x"])
    assert applies_to(as_reward_model(vf.Rubric(funcs=[brevity])), prompt)


def test_group_rewards_are_refused():
    def best_of_group(completions):
        return [1.0] * len(completions)

    with pytest.raises(TypeError, match="'best_of_group', which scores groups"):
        as_reward_model(vf.Rubric(funcs=[best_of_group]))


class TestFunctions:
    def test_they_score_without_a_rubric(self):
        for function in (correct, by_level, later):
            reward = as_reward_model(function)
            assert isinstance(reward, VerifiersFunctionReward)
            scores = score_responses(reward, PROMPTS, RESPONSES)
            expected = score_responses(
                as_reward_model(vf.Rubric(funcs=[function])), PROMPTS, RESPONSES
            )
            assert scores.total.tolist() == expected.total.tolist()
            check_reward_model(reward, PROMPTS)

    def test_two_texts_of_those_names_are_texts(self):
        def same(prompt, completion):
            return float(prompt == completion)

        scores = score_responses(as_reward_model(same), PROMPTS, ["2 + 2?", "x"])
        assert scores.total.tolist() == [1.0, 0.0]

    def test_what_they_need(self):
        assert not applies_to(as_reward_model(by_level), Prompt.from_text("Hi"))
        with pytest.raises(TypeError, match=r"'parsed' needs a parser.*verifiers.Rubric"):
            as_reward_model(parsed)
        with pytest.raises(RewardError, match="'raises_later': raised ZeroDivisionError"):
            score_responses(as_reward_model(lambda_of(raises_later)), PROMPTS, RESPONSES)


def lambda_of(function):
    def raises_later(completion, **kwargs):
        return function(completion)

    return raises_later


def test_adapters_import_no_neighbour():
    program = (
        "import sys, mbrl_text_env.rewards.adapters\n"
        "heavy = {'verifiers', 'openenv', 'trl', 'torch', 'transformers'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""

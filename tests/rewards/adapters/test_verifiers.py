"""Real rubrics of verifiers score through us as they do by themselves."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards import ConstraintsReward, SentimentReward, as_reward_model
from mbrl_text_env.rewards.adapters import (
    VerifiersFunctionReward,
    VerifiersReward,
    to_verifiers,
)
from mbrl_text_env.rewards.adapters.common import awaited
from mbrl_text_env.rewards.base import RewardError, applies_to, score_responses
from mbrl_text_env.types import Prompt
from tests.language_models.fake_server import FakeServer, Reply

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


def by_state(state):
    (step,) = state["trajectory"]
    assert step["completion"] == state["completion"]
    assert state["is_completed"]
    assert not state.get("error")
    return float(state["answer"] in state["completion"][-1].content)


def a_rollout(prompt, response):
    """The state of a rollout as verifiers' environments leave it."""
    asked = [vf.UserMessage(content=prompt.text)]
    said = [vf.AssistantMessage(content=response)]
    metadata = dict(prompt.metadata)
    answer = metadata.get("answer", metadata.get("reference_answer", ""))
    row = {**metadata, "prompt": asked, "example_id": 0, "answer": answer, "info": metadata}
    state = vf.State(input=row)
    step = {"prompt": asked, "completion": said, "reward": None, "advantage": None}
    state.update(task=row, completion=said, trajectory=[step], is_completed=True, error=None)
    return state


def by_itself(rubric, prompt, response):
    state = a_rollout(prompt, response)
    asyncio.run(rubric.score_rollout(state))
    return state["reward"], state["metrics"]


RUBRICS = {
    "one function": lambda: vf.Rubric(funcs=[correct]),
    "weights": lambda: vf.Rubric(funcs=[correct, brevity], weights=[1.0, 0.25]),
    "columns and info": lambda: vf.Rubric(funcs=[by_level, correct], weights=[2.0, 1.0]),
    "state": lambda: vf.Rubric(funcs=[by_state]),
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


def test_within_a_running_event_loop():
    async def notebook():
        return score_responses(as_reward_model(vf.Rubric(funcs=[later])), PROMPTS, RESPONSES)

    assert asyncio.run(notebook()).total.tolist() == [6.0, 6.0]


def test_mathematics_scores_the_same_however_often():
    prompt = Prompt.from_text("1/3 + 1/3?", metadata={"answer": r"\frac{2}{3}"})
    responses = [r"It is \boxed{\frac{4}{6}}.", r"It is \boxed{1}.", "I do not know."]
    rubric = vf.MathRubric()
    try:
        expected = [by_itself(rubric, prompt, response)[0] for response in responses]
        assert expected == [1.0, 0.0, 0.0]
        for reward in (as_reward_model(rubric), as_reward_model(vf.RubricGroup([rubric]))):
            for _ in range(2):
                scores = score_responses(reward, [prompt] * 3, responses)
                assert scores.total.tolist() == expected
        # The rubric, too, is still what it was.
        assert by_itself(rubric, prompt, responses[0])[0] == 1.0
    finally:
        asyncio.run(rubric.teardown())


def test_a_judge_is_asked_about_all_responses_at_once_and_again():
    from openai import AsyncOpenAI

    together = threading.Barrier(len(RESPONSES), timeout=20)

    def reply(request):
        together.wait()
        (message,) = request.body["messages"]
        verdict = "yes" if "It is 4." in message["content"] else "no"
        choice = {
            "index": 0, "finish_reason": "stop",
            "message": {"role": "assistant", "content": verdict},
        }  # fmt: skip
        return Reply(
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
             "choices": [choice]},
            headers={"Content-Type": "application/json"},
        )  # fmt: skip

    async def approved(prompt, completion, answer, judge):
        return float(await judge(prompt, completion, answer) == "yes")

    with FakeServer(reply).running() as server:
        client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        rubric = vf.JudgeRubric(judge_client=client)
        rubric.add_reward_func(approved)
        reward = as_reward_model(rubric)
        assert reward.name == "approved"
        for _ in range(2):
            scores = score_responses(reward, PROMPTS, RESPONSES)
            assert scores.total.tolist() == [1.0, 0.0]
        awaited(client.close())


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
        message = r"'correct', prompt 'Why\?': expected \['answer'\].*keys \['level'\]"
        with pytest.raises(RewardError, match=message):
            score_responses(reward, [prompt], ["x"])
    assert applies_to(as_reward_model(vf.Rubric(funcs=[brevity])), prompt)


def test_a_missing_column():
    prompt = Prompt.from_text("Why?", metadata={"answer": "4"})
    alone, rubric = as_reward_model(by_level), vf.Rubric(funcs=[correct, by_level])
    for reward in (alone, as_reward_model(rubric), as_reward_model(vf.RubricGroup([rubric]))):
        assert applies_to(reward, PROMPTS[0])
        assert not applies_to(reward, prompt)
        message = r"prompt 'Why\?': expected \['level'\] in the metadata, got the keys \['answer'\]"
        with pytest.raises(RewardError, match=message):
            score_responses(reward, [prompt], ["x"])


def test_what_a_rubric_offers_beside_is_not_missing():
    def scaled(completion, scale, offset):
        return scale + offset

    rubric = vf.Rubric(funcs=[scaled])
    rubric.add_class_object("scale", 2.0)
    rubric.add_score_object_provider(lambda state: {"offset": 0.5})
    scores = score_responses(as_reward_model(rubric), PROMPTS, RESPONSES)
    assert scores.total.tolist() == [2.5, 2.5]


def test_a_rubric_without_functions():
    with pytest.raises(TypeError, match=r"got a Rubric with none.*add_reward_func"):
        as_reward_model(vf.Rubric())


def test_group_rewards_are_refused():
    def best_of_group(completions):
        return [1.0] * len(completions)

    with pytest.raises(TypeError, match="'best_of_group', which scores groups"):
        as_reward_model(vf.Rubric(funcs=[best_of_group]))


def test_a_rubric_that_scores_in_its_own_way_is_refused():
    class Halves(vf.Rubric):
        async def score_rollout(self, state):
            await super().score_rollout(state)
            state["reward"] /= 2

    with pytest.raises(TypeError, match=r"weighted sum of its functions, got .*Halves"):
        as_reward_model(Halves(funcs=[correct]))


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

    def test_a_function_of_the_state(self):
        def by_answer(state, answer):
            return float(answer in state["completion"][-1]["content"])

        scores = score_responses(as_reward_model(by_answer), PROMPTS, RESPONSES)
        assert scores.total.tolist() == [1.0, 0.0]

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


class TestToVerifiers:
    def test_it_is_a_rubric(self):
        rubric = to_verifiers(SentimentReward())
        assert isinstance(rubric, vf.Rubric)
        total, metrics = by_itself(rubric, PROMPTS[0], "It was good.")
        assert (total, metrics) == (0.4404, {"sentiment": 0.4404})

    def test_plain_texts_are_messages_of_a_kind(self):
        asked, said = vf.TextMessage(content="How was it?"), vf.TextMessage(content="It was good.")
        state = a_rollout(PROMPTS[0], "")
        state["prompt"], state["completion"] = [asked], [said]
        asyncio.run(to_verifiers(SentimentReward()).score_rollout(state))
        assert state["reward"] == 0.4404

    def test_there_and_back(self):
        metadata = {"constraints": [{"type": "lowercase"}], "answer": "day"}
        prompts = [
            Prompt.from_text("Greet.", metadata=metadata),
            Prompt.from_text("Greet:", chat=False, metadata=metadata),
        ]
        for reward in (SentimentReward(), ConstraintsReward()):
            back = as_reward_model(to_verifiers(reward))
            assert isinstance(back, VerifiersReward)
            assert back.name == reward.name
            for response in ("good day", "Good day"):
                expected = score_responses(reward, prompts, [response] * 2)
                scores = score_responses(back, prompts, [response] * 2)
                assert scores.total.tolist() == expected.total.tolist()

    def test_the_reward_gets_prompt_answer_and_columns(self):
        seen = []

        class Spy:
            name = "spy"

            def score(self, prompts, responses):
                seen.extend(zip(prompts, responses, strict=True))
                return [1.0] * len(responses)

        by_itself(to_verifiers(Spy()), PROMPTS[0], "It is 4.")
        ((prompt, response),) = seen
        assert (prompt.text, response) == ("2 + 2?", "It is 4.")
        assert not isinstance(prompt.content, str)
        wanted = {"level": 1, "answer": "4", "reference_answer": "4"}
        assert wanted.items() <= prompt.metadata.items()

    def test_without_verifiers(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "verifiers", None)
        with pytest.raises(ImportError, match="pip install 'verifiers"):
            to_verifiers(SentimentReward())


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

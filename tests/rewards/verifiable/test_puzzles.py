"""Every task of reasoning-gym: its gold answer scores 1 and a wrong one less, by its own scorer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.prompts import reasoning_gym_prompts
from mbrl_text_env.rewards.base import RewardError, applies_to
from mbrl_text_env.rewards.verifiable import puzzles
from mbrl_text_env.rewards.verifiable.puzzles import (
    EVALUATED_TASKS,
    EXPRESSION_TASKS,
    MISJUDGED_TASKS,
    UNREPEATABLE_TASKS,
    ReasoningGymReward,
)
from mbrl_text_env.types import Message, Prompt

gym = pytest.importorskip("reasoning_gym")
from reasoning_gym.factory import DATASETS  # noqa: E402 - only where it is installed

WRONG = "This is certainly wrong."
SEED = 11

# Made of other tasks, given as objects that JSON cannot hold: its prompts cannot be made again.
WITHOUT_SOURCE = {"composite"}
# Tasks that give no answer in their entries: settings, and how an answer is found here.
WITHOUT_REFERENCE: dict[str, dict[str, Any]] = {
    "boxnet": {"colour_list": ["red"], "max_row_num": 1, "max_column_num": 2},
    "graph_color": {},
    "propositional_logic": {},
    "rubiks_cube": {},
    "rush_hour": {"min_moves": 1, "max_moves": 2},
}
TASKS = sorted(set(DATASETS) - WITHOUT_SOURCE)


def gold_answer(task: str, prompt: Prompt) -> str | None:
    facts = prompt.metadata["reasoning_gym"]
    if task == "boxnet":
        return boxnet_answer(facts["initial_state"])
    if task == "graph_color":
        return json.dumps(facts["possible_answer"])
    if task == "propositional_logic":
        return facts["example_answer"]
    if task == "rubiks_cube":
        return facts["example_correct_answer"]
    if task == "rush_hour":
        return rush_hour_answer(facts["board_config"])
    return prompt.metadata["reference_answer"]


def boxnet_answer(state: dict[str, list[str]]) -> str:
    places = {
        thing: place.replace("_", ", ") for place, things in state.items() for thing in things
    }
    box, target = places["box_red"], places["target_red"]
    steps = [{f"Agent[{box}]": f"move(box_red, square[{target}])"}] if box != target else []
    return json.dumps([*steps, {f"Agent[{target}]": "move(box_red, target_red)"}])


def rush_hour_answer(board: str) -> str | None:
    from reasoning_gym.games.rush_hour import Board

    steps = [step for step in range(-4, 5) if step]
    moves = [f"{car}{step:+}" for car in sorted({*board} - {*"ox"}) for step in steps]
    plans = [*moves, *(f"{first} {second}" for first in moves for second in moves)]
    for plan in plans:
        attempt = Board(board)
        try:
            attempt.perform_moves(plan)
        except Exception:  # noqa: S112 - a plan that cannot be carried out
            continue
        if attempt.solved:
            return plan
    return None


@pytest.mark.parametrize("task", TASKS)
def test_gold_scores_1_and_wrong_less_and_no_answer_is_run(task, tmp_path):
    prompts = reasoning_gym_prompts(task, size=2, seed=SEED, **WITHOUT_REFERENCE.get(task, {}))
    assert json.loads(json.dumps(prompts[0].metadata)) == prompts[0].metadata
    has_reference = prompts[0].metadata["reference_answer"] is not None
    assert has_reference is (task not in WITHOUT_REFERENCE)
    reward = ReasoningGymReward()
    gold = reward.score(prompts, [f" {gold_answer(task, prompt)}\n" for prompt in prompts])
    wrong = reward.score(prompts, [WRONG] * 2)
    np.testing.assert_array_equal(gold, 1)
    assert (wrong < 0.3).all()
    assert (reward.score(prompts, [""] * 2) == 0).all()
    target = tmp_path / "written"
    attacks = [attack(target), f"[{attack(target)}]", f"f'{{{attack(target)}}}'"]
    assert (reward.score(prompts[:1] * 3, attacks) < 0.3).all()
    assert not target.exists()


def attack(target: Path) -> str:
    return f'open("{target}", "w").close()'


def dataset_and_entry(task: str) -> tuple[Any, Any]:
    dataset = gym.create_dataset(task, size=1, seed=SEED)
    return dataset, dataset[0]


# The lists of exceptions: each holds what is so still, so that none outlives its reason.


@pytest.mark.parametrize("task", sorted(EVALUATED_TASKS | EXPRESSION_TASKS))
def test_these_scorers_themselves_run_the_answer(task, tmp_path):
    dataset, entry = dataset_and_entry(task)
    target = tmp_path / "written"
    answer = attack(target).removesuffix(".close()")
    dataset.score_answer(answer if task in EXPRESSION_TASKS else f"[{answer}]", entry)
    assert target.exists()


@pytest.mark.parametrize("task", sorted(MISJUDGED_TASKS))
def test_these_scorers_themselves_accept_any_answer(task):
    dataset, entry = dataset_and_entry(task)
    assert dataset.score_answer(WRONG, entry) == 1


def test_these_tasks_differ_from_process_to_process():
    code = (
        "import sys, json, reasoning_gym\n"
        "tasks = sys.argv[1:]\n"
        "print(json.dumps({task: [str((e['question'], e['answer'])) for e in "
        "reasoning_gym.create_dataset(task, size=3, seed=1)] for task in tasks}))"
    )
    tasks = sorted(UNREPEATABLE_TASKS)
    runs = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        output = subprocess.run(
            [sys.executable, "-c", code, *tasks], env=environment, capture_output=True, check=True
        ).stdout
        runs.append(json.loads(output.splitlines()[-1]))
    assert [task for task in tasks if runs[0][task] != runs[1][task]] == tasks


def test_a_task_made_of_objects_has_no_source_and_is_not_applied_to():
    from reasoning_gym.composite import DatasetSpec

    parts = [DatasetSpec(name="chain_sum", weight=1, config={})]
    prompt = reasoning_gym_prompts("composite", size=1, seed=SEED, datasets=parts)[0]
    assert "reasoning_gym_source" not in prompt.metadata
    assert not applies_to(ReasoningGymReward(), prompt)


# What answers may be


def test_literal_lists_get_what_the_scorer_gives_them():
    prompt = reasoning_gym_prompts("spiral_matrix", size=1, seed=SEED)[0]
    numbers = [int(number) for number in prompt.metadata["reference_answer"].split()]
    scores = ReasoningGymReward().score([prompt] * 2, [str(numbers), f"list({numbers})"])
    np.testing.assert_array_equal(scores, [0.1, 0])


@pytest.mark.parametrize(
    ("task", "answer", "expected"),
    [
        ("simple_integration", "{gold} + 0*sin(x)*exp(2)", 1),
        ("simple_integration", "({gold}) * 1.0e0", 1),
        ("simple_integration", "{gold} + x.real", 0),
        ("simple_integration", "{gold} + ().__class__", 0),
        ("simple_integration", "{gold} + len('')", 0),
        ("simple_integration", "{gold} + eval(1)", 0),
        ("simple_integration", "{gold} + 0*xy", 0),
        ("puzzle24", "{gold} + 0", 0.01),
    ],
)
def test_expressions_are_read_if_they_are_expressions(task, answer, expected):
    # The variable differs between puzzles; this one has "x".
    for prompt in reasoning_gym_prompts(task, size=20, seed=SEED):
        if prompt.metadata["reasoning_gym"].get("variable", "x") == "x":
            break
    text = answer.format(gold=prompt.metadata["reference_answer"])
    assert ReasoningGymReward().score([prompt], [text])[0] == expected


def test_an_answer_that_makes_the_scorer_raise_scores_0():
    dataset, entry = dataset_and_entry("prime_factorization")
    with pytest.raises(ValueError, match="invalid literal"):
        dataset.score_answer(WRONG, entry)
    prompt = reasoning_gym_prompts("prime_factorization", size=1, seed=SEED)[0]
    assert ReasoningGymReward().score([prompt], [WRONG])[0] == 0


def test_an_answer_that_does_not_end_scores_0_and_its_neighbours_are_right():
    reward = ReasoningGymReward(seconds=2.0)
    prompts = reasoning_gym_prompts("countdown", size=3, seed=SEED)
    responses = [prompt.metadata["reference_answer"] for prompt in prompts]
    responses[1] = "9**9**9**9**9"
    np.testing.assert_array_equal(reward.score(prompts, responses), [1, 0, 1])


@pytest.mark.parametrize(
    ("extract", "response", "expected"),
    [
        (None, "{gold}", 1),
        (None, "It is {gold}", 0),
        ("<answer>", "I add.\n<answer> {gold}\n</answer>", 1),
        ("<answer>", "{gold}", 0),
        ("last line", "I add.\n{gold}\n", 1),
        ("Answer:", "Answer: {gold}", 1),
    ],
)
def test_where_the_answer_stands(extract, response, expected):
    prompt = chain_sum()
    text = response.format(gold=prompt.metadata["reference_answer"])
    score = ReasoningGymReward(extract).score([prompt], [text])[0]
    assert bool(score == 1) is bool(expected)


# Where the puzzle comes from


def test_settings_and_other_prompts_around_the_question_are_kept():
    prompts = reasoning_gym_prompts("chain_sum", size=2, seed=5, min_terms=6, max_terms=6)
    plain = reasoning_gym_prompts("chain_sum", size=2, seed=5, chat=False, min_terms=6, max_terms=6)
    wrapped = [
        replace(prompt, content=(Message("system", "Add."), *prompt.content)) for prompt in prompts
    ]
    answers = [prompt.metadata["reference_answer"] for prompt in prompts]
    for asked in (prompts, plain, wrapped):
        np.testing.assert_array_equal(ReasoningGymReward().score(asked, answers), 1)


@lru_cache(maxsize=1)
def chain_sum() -> Prompt:
    return reasoning_gym_prompts("chain_sum", size=1, seed=0)[0]


def test_a_prompt_without_a_source_is_named():
    reward = ReasoningGymReward()
    bare = Prompt.from_text("What is 1 + 1?", "bare", metadata={"reference_answer": "2"})
    half = replace(bare, metadata={"reasoning_gym_source": {"task": "chain_sum"}})
    assert applies_to(reward, chain_sum())
    for prompt in (bare, half):
        assert not applies_to(reward, prompt)
        with pytest.raises(
            RewardError, match=r"prompt 'bare': expected metadata\['reasoning_gym_s"
        ):
            reward.score([prompt], ["2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "chian_sum"}, "Dataset 'chian_sum' not registered"),
        ({"index": 7}, "expected the question .*'index': 7.* got a prompt without it"),
        ({"seed": 1}, "got a prompt without it. Recreate the prompt"),
        ({"config": {"terms": 3}}, "unexpected keyword argument 'terms'"),
        ({"config": {"min_terms": 9, "max_terms": 2}}, "AssertionError"),
    ],
)
def test_a_source_that_does_not_make_the_puzzle_is_an_error_whatever_the_response(change, message):
    source = {**chain_sum().metadata["reasoning_gym_source"], **change}
    prompt = replace(chain_sum(), metadata={**chain_sum().metadata, "reasoning_gym_source": source})
    for response in ("4", "x"):
        with pytest.raises(RewardError, match=rf"prompt 'chain_sum-0-0': .*{message}"):
            ReasoningGymReward().score([prompt], [response])


@pytest.mark.parametrize("key", ["reference_answer", "reasoning_gym"])
def test_a_task_that_is_scored_by_its_metadata_needs_them(key):
    prompt = reasoning_gym_prompts("ransom_note", size=1, seed=0)[0]
    metadata = {name: value for name, value in prompt.metadata.items() if name != key}
    with pytest.raises(RewardError, match=r"prompt 'ransom_note-0-0': .*'ransom_note' cannot be"):
        ReasoningGymReward().score([replace(prompt, metadata=metadata)], ["True"])


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    puzzles._dataset.cache_clear()
    with pytest.raises(RewardError, match=r"pip install 'mbrl-text-env\[data\]'"):
        puzzles.check_puzzle(puzzles._puzzle_of(chain_sum()), chain_sum().text)


@pytest.mark.parametrize("seconds", [0, float("nan")])
def test_a_limit_of_time_has_to_be_one(seconds):
    with pytest.raises(ValueError, match="seconds to be a finite number above 0"):
        ReasoningGymReward(seconds=seconds)


@pytest.mark.parametrize("extract", [None, "<answer>"])
def test_the_contract(extract):
    prompts = [
        prompt
        for task in ("chain_sum", "countdown", "spiral_matrix", "ransom_note", "word_sorting")
        for prompt in reasoning_gym_prompts(task, size=1, seed=SEED)
    ]
    check_reward_model(ReasoningGymReward(extract), prompts)

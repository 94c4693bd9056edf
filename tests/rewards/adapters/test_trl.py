"""All reward functions that TRL offers, as reward models and in a comparison."""

from __future__ import annotations

import pytest

from mbrl_text_env.benchmarks.compare import CompareConfig, Comparison, compare, read_rows
from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.rewards import as_reward_model, to_trl
from mbrl_text_env.rewards.adapters import TRLFunctionReward
from mbrl_text_env.rewards.base import RewardError, applies_to, score_responses
from mbrl_text_env.types import Prompt

rewards = pytest.importorskip("trl.rewards")
pytest.importorskip("math_verify")

PROMPT = Prompt.from_text("1/3 + 1/3?", metadata={"solution": r"\frac{2}{3}"})


def words(text):
    return text.split()


# The functions, two responses, and what TRL's documentation says that they are worth.
FUNCTIONS = {
    "think_format_reward": (
        rewards.think_format_reward,
        {"<think>Hm.</think>Paris": 1.0, "Paris": 0.0},
    ),
    "accuracy_reward": (
        rewards.accuracy_reward,
        {r"\boxed{\frac{2}{3}}": 1.0, r"\boxed{1}": 0.0},
    ),
    "reasoning_accuracy_reward": (
        rewards.reasoning_accuracy_reward,
        {
            r"<think>\boxed{1}</think> \boxed{\frac{2}{3}}": 1.0,
            r"<think>\boxed{\frac{2}{3}}</think> \boxed{1}": 0.0,
        },
    ),
    # 4 words are free of punishment, 10 are too long; 7 stand midway.
    "get_soft_overlong_punishment": (
        rewards.get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=6),
        {"a a a a": 0.0, "a a a a a a a": -0.5},
    ),
}
if hasattr(rewards, "get_cosine_scaled_reward"):  # younger than the oldest TRL that is taken
    # Two of four words are half of the cosine: midway between 0.5 and 1, and their opposites.
    FUNCTIONS["get_cosine_scaled_reward"] = (
        rewards.get_cosine_scaled_reward(max_len=4),
        {r"is \boxed{\frac{2}{3}}": 0.75, r"is \boxed{1}": -0.75},
    )
if hasattr(rewards, "get_repetition_penalty_reward"):
    FUNCTIONS["get_repetition_penalty_reward"] = (
        rewards.get_repetition_penalty_reward(ngram_size=2),
        {"a b c d": 0.0, "a a a a a": -0.75},
    )


def test_the_table_has_all_of_them():
    assert {n for n in rewards.__all__ if callable(getattr(rewards, n))} == set(FUNCTIONS)


@pytest.mark.parametrize(("function", "worth"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_they_are_reward_models(function, worth):
    reward = as_reward_model(function, encode=words)
    assert isinstance(reward, TRLFunctionReward)
    scores = score_responses(reward, [PROMPT] * len(worth), list(worth))
    assert scores.total.tolist() == pytest.approx(list(worth.values()))
    check_reward_model(reward, [PROMPT])
    # And TRL gets the same from the same function behind the adapter of the other direction.
    asked = [{"role": "user", "content": PROMPT.text}]
    values = to_trl(reward)(
        prompts=[asked] * len(worth),
        completions=[[{"role": "assistant", "content": text}] for text in worth],
        solution=[PROMPT.metadata["solution"]] * len(worth),
    )
    assert values == pytest.approx(list(worth.values()))


def test_where_they_do_not_apply():
    reward = as_reward_model(rewards.accuracy_reward)
    assert not applies_to(reward, Prompt.from_text("Why?"))
    unreadable = Prompt.from_text("Why?", metadata={"solution": ""})
    with pytest.raises(RewardError, match=r"'accuracy_reward' does not apply to prompt 'Why\?'"):
        score_responses(reward, [unreadable], [r"\boxed{1}"])


@pytest.mark.skipif(
    not hasattr(rewards, "get_repetition_penalty_reward"), reason="TRL is too old for it"
)
def test_a_comparison(tmp_path):
    reward = as_reward_model(rewards.get_repetition_penalty_reward(ngram_size=1), encode=list)
    prompts = [Prompt.from_text("ab" * (i + 1), id=f"p{i}") for i in range(4)]
    config = CompareConfig(("sampling", "best-of-n"), budget_tokens=32, max_response_tokens=8)
    summary = compare(Comparison(config, prompts, NGramLM("abc", seed=3), reward), tmp_path / "a")
    rows = read_rows(tmp_path / "a" / "results.jsonl")
    assert len(rows) == 8
    for row in rows:
        # By TRL's definition: minus the share of letters that were there before.
        text = row["response"]
        expected = len(set(text)) / len(text) - 1 if text else 0.0
        assert row["score"] == pytest.approx(expected)
    means = {entry["agent"]: entry["mean"] for entry in summary["agents"]}
    assert means["best-of-n"] > means["sampling"]

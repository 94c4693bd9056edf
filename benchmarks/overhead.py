"""Measure the environment's overhead, with a toy tokenizer and a constant reward.

The fastest of several runs is reported, as `timeit` advises: slower ones include other work.

    python -m mbrl_text_env.benchmarks.overhead --json overhead.json
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import typer

import mbrl_text_env  # noqa: F401 registers the environments
from mbrl_text_env.benchmarks.friendly import friendly, option
from mbrl_text_env.files import write_text
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.types import Prompt

_ID = "mbrl_text_env/TextGeneration-v0"


class _ConstantReward(RewardModel):
    name = "constant"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [1.0] * len(responses)


def single_step_us(steps: int, repeats: int, seed: int) -> float:
    """Microseconds per step of `gym.make(id)`, including resets; the fastest of several runs."""
    env = gym.make(_ID, **_options())
    actions = _actions(env.action_space, 1024, seed)

    def step(number: int) -> None:
        _, _, terminated, truncated, _ = env.step(actions[number % len(actions)])
        if terminated or truncated:
            env.reset()

    return _fastest_us(env, step, steps, repeats, seed)


def vector_state_us(num_envs: int, steps: int, repeats: int, seed: int) -> float:
    """Microseconds per state of `gym.make_vec(id)`, including autoresets; the fastest run."""
    env = gym.make_vec(_ID, num_envs=num_envs, **_options())
    actions = [_actions(env.single_action_space, num_envs, seed + i) for i in range(min(steps, 32))]

    def step(number: int) -> None:
        env.step(actions[number % len(actions)])

    return _fastest_us(env, step, steps, repeats, seed) / num_envs


def _fastest_us(
    env: Any, step: Callable[[int], None], steps: int, repeats: int, seed: int
) -> float:
    seconds = []
    for _ in range(repeats):
        env.reset(seed=seed)
        start = time.perf_counter()
        for number in range(steps):
            step(number)
        seconds.append(time.perf_counter() - start)
    return min(seconds) / steps * 1e6


@friendly
def main(
    json_file: Path | None = option(None, "Output JSON file.", "--json"),
    seed: int = 0,
    steps: int = option(5000, "", min=1),
    repeats: int = option(7, "", min=1),
) -> None:
    """Measure and print the overhead of the environment."""
    figures = {
        "single_step_us": round(single_step_us(steps, repeats, seed), 2),
        "batch256_state_us": round(vector_state_us(256, max(1, steps // 50), repeats, seed), 2),
        "command": shlex.join(["python", "-m", "mbrl_text_env.benchmarks.overhead", *sys.argv[1:]]),
        "seed": seed,
    }
    print(json.dumps(figures, indent=2))
    if json_file is not None:
        write_text(json_file, json.dumps(figures, indent=2))


def _options() -> dict[str, Any]:
    return {
        "prompts": [Prompt.from_text(f"prompt {i}") for i in range(8)],
        "tokenizer": NGramLM("abcdefghijklmnopqrstuvwxyz "),
        "reward_model": _ConstantReward(),
        "max_chunk_tokens": 4,
        "max_response_tokens": 64,
    }


def _actions(space: gym.Space, count: int, seed: int) -> list[Any]:
    space.seed(seed)
    return [space.sample() for _ in range(count)]


if __name__ == "__main__":
    typer.run(main)

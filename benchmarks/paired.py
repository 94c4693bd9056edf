"""Two policies on the same prompts: the prompts, figures that are kept, and paired statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mbrl_text_env.benchmarks.statistics import (
    mean_interval,
    paired_permutation_test,
    prompt_means,
    win_rate,
)
from mbrl_text_env.files import write_text

if TYPE_CHECKING:
    from mbrl_text_env.rewards.base import RewardModel
    from mbrl_text_env.types import Prompt


def chosen_prompts(
    reward: RewardModel,
    split: str,
    count: int | None,
    error: type[Exception],
    prepare: Callable[[Sequence[Prompt]], list[Prompt]] = list,
) -> list[Prompt]:
    """Builtin prompts that the reward applies to, in a fixed random order.

    Args:
        reward: Decides which prompts will do.
        split: Of the builtin prompts.
        count: How many; None for all, which must be two or more.
        error: What is raised.
        prepare: Leaves out or changes some of the builtin prompts first.

    Raises:
        error: There are fewer.
    """
    from mbrl_text_env.prompts import load_prompts
    from mbrl_text_env.rewards.base import applies_to, reward_name

    found = [prompt for prompt in prepare(load_prompts(split=split)) if applies_to(reward, prompt)]
    least = 2 if count is None else count
    if len(found) < least:
        raise error(
            f"Expected at least {least} {split} prompts that {reward_name(reward)!r} applies to, "
            f"got {len(found)}. Take fewer, or another reward."
        )
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order[:count]]


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds, or what is made and then kept in it. JSON values."""
    if not path.is_file():
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text(encoding="utf-8"))


def paired(
    first: Sequence[float], second: Sequence[float], prompts: Sequence[str], seed: int
) -> dict[str, Any]:
    """Second against first, rows in the same order of prompts; the unit is the prompt."""
    before, after = prompt_means(first, prompts), prompt_means(second, prompts)
    difference = mean_interval(after - before, seed=seed)
    wins = win_rate(after, before)
    return {
        "num_prompts": len(before),
        "before": float(before.mean()),
        "after": float(after.mean()),
        "difference": difference.estimate,
        "interval": [difference.low, difference.high],
        "p_value": paired_permutation_test(after - before, seed=seed).p_value,
        "wins_ties_losses": [wins.wins, wins.ties, wins.losses],
    }

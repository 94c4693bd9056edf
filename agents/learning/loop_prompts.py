"""What a loop asks of its prompts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mbrl_text_env.agents.learning.iteration_folder import LoopError
from mbrl_text_env.rewards.base import RewardModel, applies_to, reward_name
from mbrl_text_env.types import Prompt


def check_prompts(
    train: Sequence[Prompt], validation: Sequence[Prompt], reward_model: RewardModel
) -> None:
    """Refuse prompts that a policy cannot be trained and measured on.

    Raises:
        LoopError: There are none of a kind, the reward does not apply to some, or two have one id.
    """
    for name, prompts in (("train", train), ("validation", validation)):
        if not prompts:
            raise LoopError(f"{name}: expected at least one prompt, got none.")
        unfit = [prompt.id for prompt in prompts if not applies_to(reward_model, prompt)]
        if unfit:
            raise LoopError(
                f"{name}: expected prompts that the reward {reward_name(reward_model)!r} applies "
                f"to, got {len(unfit)} others of {len(prompts)}, first {unfit[0]!r}. Leave them "
                "out, or add what the reward needs to their metadata."
            )
    counts = Counter(prompt.id for prompt in (*train, *validation))
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise LoopError(
            f"Expected train and validation prompts of different ids, got {repeated[:5]} more "
            "than once. A policy is not measured on what it was tuned on: leave them out of one."
        )


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Tells one list of prompts from another."""
    digest = hashlib.sha256()
    for prompt in prompts:
        content: Any = prompt.content
        if not isinstance(content, str):
            content = [[message.role, message.content] for message in content]
        row = [prompt.id, content, dict(prompt.metadata)]
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()

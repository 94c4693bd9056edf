"""What training from reward alone asks of its prompts."""

from __future__ import annotations

from collections.abc import Sequence

from mbrl_text_env.agents.learning.lora import TuningError
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.base import RewardModel, applies_to, reward_name
from mbrl_text_env.types import Prompt


def check_prompts(
    prompts: Sequence[Prompt],
    reward_model: RewardModel,
    language_model: LanguageModel,
    least: int = 1,
) -> None:
    """Refuse prompts that cannot be trained on.

    Raises:
        TuningError: There are fewer than `least`, two have one id, or the reward does not apply to
            one.
    """
    if len(prompts) < least:
        raise TuningError(
            f"Expected at least {least} prompts (as many as a step has), got {len(prompts)}. Pass "
            "more, or lower the number that a step has."
        )
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise TuningError(
            f"Expected prompts with different ids, got {len({p.id for p in prompts})} ids for "
            f"{len(prompts)} prompts. Leave out the doubles, or give them ids of their own."
        )
    for prompt in prompts:
        if not applies_to(reward_model, prompt):
            raise TuningError(
                f"Prompt {prompt.id!r}: reward model {reward_name(reward_model)!r} does not apply "
                f"to it; its metadata has {sorted(prompt.metadata)}. Add what the reward needs, or "
                "leave out such prompts."
            )
        language_model.encode_prompt(prompt)

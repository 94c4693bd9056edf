"""What trainings ask of their prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mbrl_text_env.agents.learning.stages import LoopError
from mbrl_text_env.agents.learning.training import TuningError
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.base import RewardModel, applies_to, reward_name
from mbrl_text_env.runs import digest, prompt_digest
from mbrl_text_env.types import Prompt


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Tells one list of prompts from another."""
    return digest(*(f"{prompt.id} {prompt_digest(prompt)}".encode() for prompt in prompts))


def check_prompts(
    prompts: Sequence[Prompt],
    reward_model: RewardModel,
    language_model: LanguageModel,
    least: int = 1,
) -> None:
    """Refuse (`TuningError`) prompts that cannot be trained on from reward."""
    if len(prompts) < least:
        raise TuningError(
            f"Expected at least {least} prompts (as many as a step has), got {len(prompts)}. Pass "
            "more, or lower the number that a step has."
        )
    ids = {prompt.id for prompt in prompts}
    if len(ids) < len(prompts):
        raise TuningError(
            f"Expected prompts with different ids, got {len(ids)} ids for {len(prompts)} prompts. "
            "Leave out the doubles, or give them ids of their own."
        )
    for prompt in prompts:
        if not applies_to(reward_model, prompt):
            raise TuningError(
                f"Prompt {prompt.id!r}: reward model {reward_name(reward_model)!r} does not apply "
                f"to it; its metadata has {sorted(prompt.metadata)}. Add what the reward needs, or "
                "leave out such prompts."
            )
        language_model.encode_prompt(prompt)


def check_loop_prompts(
    train: Sequence[Prompt], validation: Sequence[Prompt], reward_model: RewardModel
) -> None:
    """Refuse (`LoopError`) prompts that a policy cannot be trained and measured on."""
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

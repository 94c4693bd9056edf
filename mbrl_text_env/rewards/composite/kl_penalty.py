"""A reward minus what a policy has moved away from a reference model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.adapters.convert import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, reward_name
from mbrl_text_env.rewards.composite.combinators import Combinator, check_finite
from mbrl_text_env.rewards.evaluators.fluency import FluencyReward
from mbrl_text_env.types import FloatArray, Prompt


class KLPenalty(Combinator):
    """A reward minus a penalty for text that a policy likes better than a reference model does.

    The penalty is `weight` times the difference of the two mean log-probabilities (nats a token) of
    the response, as `FluencyReward` gives them: over responses of the policy an estimate of the KL
    divergence a token. A response that the reference likes better gets a bonus. In the environment,
    where the tokens are known, the wrapper for a KL penalty is exact; this one sees text.

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019. Deviation:
    the mean over tokens and not their sum, so that a weight means the same at any length.

    Args:
        reward: The reward.
        policy: The model that writes: a language model, its name on the Hub, or its folder.
        reference: The model to stay close to; None for the embedded SmolLM2.
        weight: Taken off for each nat a token; above 0.
        name: What reports call it.
        max_length: Most tokens of a response that count for the penalty.

    Raises:
        ValueError: `weight` is not a finite number above 0.
        RewardError: At first use: see `FluencyReward`.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> reward = KLPenalty(SentimentReward(), "my-tuned-model", weight=0.2)
        >>> reward.name
        'sentiment-kl'
    """

    # The divergence is that of a whole response.
    combines_steps: ClassVar[bool] = False

    extra_parts = ("kl_penalty",)

    def __init__(
        self,
        reward: RewardLike,
        policy: LanguageModel | str | Path,
        reference: LanguageModel | str | Path | None = None,
        weight: float = 0.1,
        name: str | None = None,
        *,
        max_length: int = 2048,
    ) -> None:
        check_finite("KLPenalty", weight=weight)
        if not weight > 0:
            raise ValueError(f"KLPenalty: expected a weight above 0, got {weight}.")
        reward = as_reward_model(reward)
        super().__init__([reward], f"{reward_name(reward)}-kl" if name is None else name)
        self.reward, self.policy, self.reference = reward, policy, reference
        self.weight = weight
        self.max_length = max_length
        self._models = (
            FluencyReward(policy, max_length=max_length),
            FluencyReward(reference, max_length=max_length),
        )

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the reward applies to the prompt and both models can read it."""
        return super().applies_to(prompt) and all(m.applies_to(prompt) for m in self._models)

    def combine(
        self, totals: Sequence[FloatArray], prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[FloatArray, Mapping[str, FloatArray]]:
        """The reward minus the penalty, which is the part "kl_penalty"."""
        policy, reference = (model.score(prompts, responses) for model in self._models)
        penalty = np.asarray(self.weight * (policy - reference))
        return totals[0] - penalty, {"kl_penalty": penalty}

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the floating-point operations of the reward and both models."""
        models = sum(model.flops(prompts, responses) for model in self._models)
        return np.asarray(super().flops(prompts, responses) + models)

    def flops_bound(self) -> float:
        """The most that one response can take."""
        return super().flops_bound() + sum(model.flops_bound() for model in self._models)

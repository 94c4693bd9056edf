"""Value models by name, for the command line and for comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mbrl_text_env.agents.values.embedding import EmbeddingValue
from mbrl_text_env.agents.values.ensemble import EnsembleValue
from mbrl_text_env.agents.values.fitted import FittedValue
from mbrl_text_env.agents.values.hidden_state import HiddenStateValue
from mbrl_text_env.agents.values.prefix_reward import PrefixRewardValue
from mbrl_text_env.agents.values.rollout import RolloutValue
from mbrl_text_env.agents.values.stacked import StackedValue
from mbrl_text_env.encoders import Encoder, multiplies_bfloat16
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, RewardModel, reduced
from mbrl_text_env.values import ValueModel, ValueModelError


@dataclass(frozen=True)
class _Models:
    language_model: LanguageModel
    reward_model: RewardModel
    encoder: Encoder | None
    max_response_tokens: int
    seed: int


def _embedding(models: _Models) -> EmbeddingValue:
    return EmbeddingValue(models.language_model, models.encoder)


def _prefix(models: _Models) -> PrefixRewardValue:
    reward = models.reward_model
    if multiplies_bfloat16():
        reward = reduced(reward, "bfloat16")
    return PrefixRewardValue(reward, models.language_model)


def _exact_prefix(models: _Models) -> PrefixRewardValue:
    return PrefixRewardValue(models.reward_model, models.language_model)


def _hidden_state(models: _Models) -> HiddenStateValue:
    return HiddenStateValue(models.language_model)


def _stacked(models: _Models, use_embedding: bool = False) -> StackedValue:
    return StackedValue(
        models.language_model,
        models.reward_model,
        models.encoder,
        use_embedding=use_embedding,
        max_response_tokens=models.max_response_tokens,
        seed=models.seed,
    )


def _rollout(models: _Models) -> RolloutValue:
    return RolloutValue(
        models.language_model,
        models.reward_model,
        max_response_tokens=models.max_response_tokens,
        seed=models.seed,
    )


# What needs no records, and what does; `calibrated` is `prefix-exact` after a fit.
_READY: Mapping[str, Callable[[_Models], ValueModel]] = {
    "prefix": _prefix,
    "prefix-exact": _exact_prefix,
    "rollout": _rollout,
}
_FITTED: Mapping[str, Callable[[_Models], FittedValue]] = {
    "calibrated": _exact_prefix,
    "embedding": _embedding,
    "hidden-state": _hidden_state,
    "stacked": _stacked,
    "stacked-embedding": lambda models: _stacked(models, use_embedding=True),
    "ensemble": lambda models: EnsembleValue(_stacked(models), seed=models.seed),
}
READY, FITTED = tuple(_READY), tuple(_FITTED)
"""Names of value models that predict at once, and of those that are fitted on records first."""


def make_value(
    name: str,
    language_model: LanguageModel,
    reward_model: RewardLike,
    *,
    encoder: Encoder | None = None,
    max_response_tokens: int = 256,
    seed: int = 0,
) -> ValueModel:
    """Make a value model of a kind, with the settings that its class has by default.

    Args:
        name: One of `READY`, which predict at once, or of `FITTED`, which `fit(records)` comes
            before.
        language_model: Whose responses are valued.
        reward_model: Whose scores are predicted.
        encoder: Embeds texts, where it does; None for MiniLM.
        max_response_tokens: Token limit of a response, where it matters.
        seed: Of rollouts, trees and the bootstrap.

    Raises:
        ValueModelError: There is no such kind.

    Example:
        >>> value = make_value("stacked", lm, SentimentReward()).fit(records)  # doctest: +SKIP
    """
    kinds: Mapping[str, Callable[[_Models], ValueModel]] = {**_READY, **_FITTED}
    if name not in kinds:
        raise ValueModelError(
            f"Unknown value model {name!r}. Expected one of {sorted(READY)}, or, fitted on "
            f"records, of {sorted(FITTED)}."
        )
    models = _Models(
        language_model, as_reward_model(reward_model), encoder, max_response_tokens, seed
    )
    return kinds[name](models)

"""Value models by the names of their kinds, and out of folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mbrl_text_env.agents.values.ensemble import EnsembleValue
from mbrl_text_env.agents.values.fitted import FOLDER, FittedValue, Sources, value_class
from mbrl_text_env.agents.values.kinds import (
    EmbeddingValue,
    HiddenStateValue,
    PrefixRewardValue,
    RolloutValue,
    StackedValue,
)
from mbrl_text_env.encoders import Encoder, multiplies_bfloat16
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, reduced
from mbrl_text_env.values import ValueModel, ValueModelError, check_value_fits

READY = ("prefix", "prefix-exact", "rollout")
"""Names of value models that predict at once."""

FITTED = ("calibrated", "embedding", "hidden-state", "stacked", "ensemble")
"""Names of those that are fitted on records first; `calibrated` is `prefix-exact` after a fit."""


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
        name: One of `READY`, or of `FITTED`, which `fit(records)` comes before.
        language_model: Whose responses are valued.
        reward_model: Whose scores are predicted.
        encoder: Embeds texts, where it does; None for MiniLM.
        max_response_tokens: Token limit of a response, where it matters.
        seed: Of rollouts and the bootstrap.

    Example:
        >>> value = make_value("stacked", lm, SentimentReward()).fit(records)  # doctest: +SKIP
    """
    lm, reward = language_model, as_reward_model(reward_model)
    faster = reduced(reward, "bfloat16") if name == "prefix" and multiplies_bfloat16() else reward
    limit: dict[str, Any] = {"max_response_tokens": max_response_tokens}
    kinds: Mapping[str, Callable[[], ValueModel]] = {
        "prefix": lambda: PrefixRewardValue(faster, lm),
        "prefix-exact": lambda: PrefixRewardValue(reward, lm),
        "rollout": lambda: RolloutValue(lm, reward, seed=seed, **limit),
        "calibrated": lambda: PrefixRewardValue(reward, lm),
        "embedding": lambda: EmbeddingValue(lm, encoder),
        "hidden-state": lambda: HiddenStateValue(lm),
        "stacked": lambda: StackedValue(lm, reward, **limit),
        "ensemble": lambda: EnsembleValue(StackedValue(lm, reward, **limit), seed=seed),
    }
    if name not in kinds:
        raise ValueModelError(
            f"Unknown value model {name!r}. Expected one of {sorted(READY)}, or, fitted on "
            f"records, of {sorted(FITTED)}."
        )
    return kinds[name]()


def load_value(
    folder: str | Path,
    language_model: LanguageModel,
    reward_model: RewardLike,
    encoder: Encoder | None = None,
) -> FittedValue:
    """Read a value model of any kind, for the models that it was fitted with.

    Raises:
        ValueModelError: The folder holds no value model, a damaged one, one of another format, or
            one of another reward or language model.

    Example:
        >>> value = load_value("value", lm, reward)  # doctest: +SKIP
    """
    reward_model = as_reward_model(reward_model)
    with FOLDER.reading(folder) as (config, arrays):
        kind = value_class(config["kind"])
        value = kind.restored(config, arrays(), Sources(language_model, reward_model, encoder))
    check_value_fits(value, language_model, reward_model)
    return value

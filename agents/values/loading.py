"""Value models out of folders."""

from __future__ import annotations

import importlib
from pathlib import Path

from mbrl_text_env.agents.values.fitted import FittedValue, Sources
from mbrl_text_env.agents.values.storage import reading
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike
from mbrl_text_env.values import check_value_fits

_CLASSES = {
    "embedding": "EmbeddingValue",
    "prefix_reward": "PrefixRewardValue",
    "hidden_state": "HiddenStateValue",
    "stacked": "StackedValue",
    "ensemble": "EnsembleValue",
}


def value_class(kind: str) -> type[FittedValue]:
    """The class of a kind of value model.

    Raises:
        ValueError: There is none.
    """
    if kind not in _CLASSES:
        raise ValueError(f"kind {kind!r}, expected one of {sorted(_CLASSES)}")
    found: type[FittedValue] = getattr(
        importlib.import_module("mbrl_text_env.agents.values"), _CLASSES[kind]
    )
    return found


def load_value(
    folder: str | Path,
    language_model: LanguageModel,
    reward_model: RewardLike,
    encoder: Encoder | None = None,
) -> FittedValue:
    """Read a value model of any kind, for the models that it was fitted with.

    Args:
        folder: As written by a value model's `save`.
        language_model: What it values the responses of.
        reward_model: What it predicts the scores of.
        encoder: Embeds texts, where it does; None for MiniLM.

    Raises:
        ValueModelError: The folder holds no value model, a damaged one, one of another format, or
            one of another reward or language model.

    Example:
        >>> StackedValue(lm, reward).fit(records).save("value")  # doctest: +SKIP
        >>> value = load_value("value", lm, reward)  # doctest: +SKIP
    """
    reward_model = as_reward_model(reward_model)
    with reading(folder) as (config, arrays):
        kind = value_class(config["kind"])
        value = kind.restored(config, arrays, Sources(language_model, reward_model, encoder))
    check_value_fits(value, language_model, reward_model)
    return value

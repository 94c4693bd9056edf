"""Value models out of folders, and whether they belong to what they are used with."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from agents.values.fitted import FittedValue, Sources
from agents.values.storage import reading
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.base import RewardModel, reward_name
from mbrl_text_env.values import ValueModel, ValueModelError

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
    found: type[FittedValue] = getattr(importlib.import_module("agents.values"), _CLASSES[kind])
    return found


def load_value(
    folder: str | Path,
    language_model: LanguageModel,
    reward_model: RewardModel,
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
    with reading(folder) as (config, arrays):
        kind = value_class(config["kind"])
        value = kind.restored(config, arrays, Sources(language_model, reward_model, encoder))
    check_value_fits(value, language_model, reward_model)
    return value


def check_value_fits(
    value_model: ValueModel, language_model: LanguageModel, reward_model: RewardModel
) -> None:
    """Refuse a value model that was fitted on scores or responses of other models.

    A value model that does not say what it was fitted on (`reward_name_`, `language_model_name_`)
    passes: that is for whoever wrote it to know.

    Raises:
        ValueModelError: It belongs to another reward model or another language model.

    Example:
        >>> check_value_fits(value, lm, SentimentReward())  # doctest: +SKIP
    """
    for label, attribute, got, change in (
        ("reward model", "reward_name_", reward_name(reward_model), "re-score the records"),
        ("language model", "language_model_name_", _name(language_model), "collect records"),
    ):
        expected = getattr(value_model, attribute, None)
        if expected is not None and got is not None and expected != got:
            raise ValueModelError(
                f"{type(value_model).__name__} was fitted for the {label} {expected!r}, got "
                f"{got!r}: it would predict something else. Use that {label}, or {change} with "
                "this one and fit a value model anew."
            )


def _name(model: Any) -> str | None:
    """A tokenizer alone has no name, and nothing to compare."""
    return getattr(model, "name", None)

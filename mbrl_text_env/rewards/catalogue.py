"""Reward models by name, for the command line, the environment and comparisons."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.rewards.classifier import ClassifierReward
from mbrl_text_env.rewards.combinators import WeightedSum
from mbrl_text_env.rewards.constraints import ConstraintsReward
from mbrl_text_env.rewards.relevance import RelevanceReward
from mbrl_text_env.rewards.sentiment import SentimentReward

_CLASSES: Mapping[str, Callable[[], RewardModel]] = {
    "sentiment": SentimentReward,
    "relevance": RelevanceReward,
    "constraints": ConstraintsReward,
}
_CLASSIFIER = "classifier:"

DESCRIPTIONS: dict[str, str] = {
    "sentiment": "Mean VADER sentiment of the response's sentences, -1 to 1.",
    "relevance": "Cosine of the MiniLM embeddings of prompt and response, -1 to 1.",
    "constraints": "Share of the prompt's checkable constraints that the response satisfies.",
    f"{_CLASSIFIER}NAME_OR_FOLDER": (
        "Logit of a reward model of the Hugging Face Hub, with the article's text format."
    ),
}
"""One line about each reward model, by name."""


class RewardSpecError(ValueError):
    """A reward's name that is not known, or a weighted sum that cannot be read."""


def available() -> list[str]:
    """Names that `make` knows."""
    return list(DESCRIPTIONS)


def make(spec: str) -> RewardModel:
    """Make a reward model from its name, or a weighted sum of names.

    Args:
        spec: A name, such as `"sentiment"`; `"classifier:"` and a name on the Hub or a folder, read
            in the article's text format; or a sum of them, such as `"0.5*sentiment+0.5*relevance"`
            or `"sentiment+relevance"`. Names with "+" or "*" in them cannot be written here: use
            `ClassifierReward` and `WeightedSum`. Nothing is loaded yet.

    Raises:
        RewardSpecError: A name is unknown, a weight is no finite number, or a name occurs twice.

    Example:
        >>> make("0.5*sentiment+0.5*relevance").weights
        (0.5, 0.5)
    """
    terms = [term.strip() for term in spec.split("+")]
    if len(terms) == 1 and "*" not in spec:
        return _named(terms[0])
    weights, names = zip(*(_weight_and_name(term) for term in terms), strict=True)
    rewards = [_named(name) for name in names]
    try:
        return WeightedSum(rewards, weights)
    except ValueError as error:
        raise RewardSpecError(f"Reward {spec!r}: {error}") from error


def _weight_and_name(term: str) -> tuple[float, str]:
    weight, star, name = term.rpartition("*")
    try:
        return float(weight) if star else 1.0, name.strip()
    except ValueError:
        raise RewardSpecError(
            f"Reward {term!r}: expected a number before '*', as in '0.5*{name.strip()}', got "
            f"{weight!r}."
        ) from None


def _named(name: str) -> RewardModel:
    if name in _CLASSES:
        return _CLASSES[name]()
    source = name.removeprefix(_CLASSIFIER).strip()
    if name.startswith(_CLASSIFIER) and source:
        return ClassifierReward(source, text_format="article")
    near = difflib.get_close_matches(name, [*_CLASSES, "classifier", *available()], cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise RewardSpecError(
        f"Expected a known reward, got {name!r}.{hint} Choose one of {available()}, or a weighted "
        "sum such as '0.5*sentiment+0.5*relevance'."
    )

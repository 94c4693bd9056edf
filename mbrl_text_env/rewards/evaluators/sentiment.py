"""A reward for positive sentiment, based on the VADER lexicon."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.rewards.names import named
from mbrl_text_env.types import FloatArray, Prompt

# Punctuation stays with its sentence, because VADER reads "!" and "?" as emphasis.
_SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+|[\r\n]+")
# Otherwise "1." before a list item, or an ellipsis, would count as a neutral sentence.
_NO_SENTENCE = re.compile(r"[\d\s.!?]*")


@named("sentiment")
class SentimentReward(RewardModel):
    """Mean VADER compound score of a response's sentences, in [-1, 1].

    A sentence ends at `.`, `!` or `?` followed by white space, and at every line break. Parts with
    only digits, these marks and white space are ignored. A response without a sentence scores 0.
    The prompt is ignored. VADER's lexicon is English.

    Source: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
    Social Media Text", ICWSM 2014.

    Example:
        >>> prompt = Prompt.from_text("How was the film?")
        >>> SentimentReward().score([prompt, prompt], ["It was good.", "It was good. I left."])
        array([0.4404, 0.2202])
    """

    name = "sentiment"

    def __init__(self) -> None:
        self._analyser: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # The lexicon is large, so a copy reads it again at first use.
        return {"_analyser": None}

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the sentiment of each response."""
        return np.array([self._sentiment(response) for response in responses], dtype=np.float64)

    def _sentiment(self, response: str) -> float:
        if self._analyser is None:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

            self._analyser = SentimentIntensityAnalyzer()
        score = self._analyser.polarity_scores
        scores = [float(score(sentence)["compound"]) for sentence in split_sentences(response)]
        return float(np.mean(scores)) if scores else 0.0


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences, keeping the punctuation; see `SentimentReward`."""
    return [part for part in _SENTENCE_BREAK.split(text) if not _NO_SENTENCE.fullmatch(part)]

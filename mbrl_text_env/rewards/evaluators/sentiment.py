"""How positive a response is, by the lexicon of VADER."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.rewards.names import named
from mbrl_text_env.types import FloatArray, Prompt

# The marks stay with their sentence: VADER reads "!" and "?" as emphasis.
_SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+|[\r\n]+")
# "1." at the head of a list item, or an ellipsis on its own, would count as a neutral sentence.
_NO_SENTENCE = re.compile(r"[\d\s.!?]*")


@named("sentiment")
class SentimentReward(RewardModel):
    """Mean VADER compound score of a response's sentences, in [-1, 1].

    A sentence ends at a run of `.`, `!` or `?` that white space follows, and at every line break.
    Parts that are only digits, marks and white space are none. A response without a sentence scores
    0. The prompt is not looked at. VADER's lexicon is English.

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
        # The lexicon is read again where it is needed: it is larger than all else that is pickled.
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
    """Sentences of a text, their marks included; see `SentimentReward` for what ends one."""
    return [part for part in _SENTENCE_BREAK.split(text) if not _NO_SENTENCE.fullmatch(part)]

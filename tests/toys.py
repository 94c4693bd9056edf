"""Worlds with known answers, shared by the tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mbrl_text_env.language_models import NGramLM, TableLM
from mbrl_text_env.types import Ledgers, Prompt, TextState, Usage
from mbrl_text_env.values import ValueEstimate

PROMPTS = [Prompt.from_text(text) for text in ("ab", "ba", "aab", "c", "abc")]


class CountReward:
    """The share of a response's characters that are `letter`; 0 for an empty one."""

    name = "count"

    def __init__(self, letter: str = "a") -> None:
        self.letter = letter
        self.calls: list[list[str]] = []

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        self.calls.append(list(responses))
        return [r.count(self.letter) / len(r) if r else 0.0 for r in responses]


class Deadly(CountReward):
    """Kills its process the first time that it scores: while there is a file, which it removes."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        try:
            Path(self.mark).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        except FileNotFoundError:
            pass
        return super().score(prompts, responses)


class StepReward(CountReward):
    """Also a process reward: the number of `letter` in each step."""

    name = "steps"

    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> list[float]:
        return [float(step.count(self.letter)) for step in steps]


class LetterEncoder:
    """Embeds a text as the counts of a few letters."""

    letters = "abcde"

    def encode(self, sentences: list[str]) -> np.ndarray:
        return np.array([[s.count(c) for c in self.letters] for s in sentences], dtype=np.float32)


class ExactValue:
    """The expected final reward of a prefix under a toy language model, by enumeration."""

    is_fitted = True

    def __init__(
        self, lm: TableLM | NGramLM, reward: CountReward, max_response_tokens: int
    ) -> None:
        self.lm, self.reward, self.limit = lm, reward, max_response_tokens

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        means, stds = [], []
        for state in states:
            ids, weights = zip(*self.lm.responses(state, self.limit), strict=True)
            texts = [self.lm.decode(i) for i in ids]
            scores = np.array(self.reward.score([state.prompt] * len(texts), texts))
            mean = float(np.average(scores, weights=weights))
            means.append(mean)
            stds.append(float(np.sqrt(np.average((scores - mean) ** 2, weights=weights))))
        return ValueEstimate(np.array(means), np.array(stds))


class OptimalValue(ExactValue):
    """The best final reward that a prefix can still have: what a perfect search would reach."""

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        best = []
        for state in states:
            texts = [self.lm.decode(ids) for ids, _ in self.lm.responses(state, self.limit)]
            best.append(max(self.reward.score([state.prompt] * len(texts), texts)))
        return ValueEstimate(np.array(best), np.zeros(len(best)))


class FixedValue:
    """The same function of the response's text for every state."""

    is_fitted = True

    def __init__(self, function, tokenizer) -> None:
        self.function, self.tokenizer = function, tokenizer

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        means = [float(self.function(self.tokenizer.decode(s.response_ids))) for s in states]
        return ValueEstimate(np.array(means), np.zeros(len(states)))


class ChargingValue(FixedValue):
    """`FixedValue` that takes the same of other models for every state."""

    def __init__(self, function, tokenizer, taken: Usage) -> None:
        super().__init__(function, tokenizer)
        self.taken = taken

    def predict_with(self, states: Sequence[TextState], ledgers: Ledgers) -> ValueEstimate:
        for ledger in ledgers or ():
            ledger.charge(self.taken)
        return self.predict(states)

    def usage_bound(self, state: TextState) -> Usage:
        return self.taken


def toy_options(**changes: object) -> dict[str, object]:
    """Arguments of `gym.make` for a small, fast text environment."""
    options: dict[str, object] = {
        "prompts": PROMPTS,
        "tokenizer": NGramLM("abcde", order=2, seed=1),
        "reward_model": CountReward(),
        "max_chunk_tokens": 3,
        "max_response_tokens": 8,
    }
    return {**options, **changes}


def now(coroutine):
    """What a coroutine of a search returns, its model calls made at once."""
    from mbrl_text_env.agents.driver import run

    [found] = run([lambda: coroutine])
    return found

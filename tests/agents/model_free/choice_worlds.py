"""A small world of choices among candidates: letters that are drawn evenly, and "a" is worth one.

The best of K candidates is known at once, so what a perfect choice earns can be counted.
"""

import itertools

import numpy as np

from mbrl_text_env.agents.model_free import DQNSettings, PPOSettings
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.types import Prompt
from tests.toys import CountReward

LM = NGramLM("ab", order=1, seed=0, concentration=50.0, stop_probability=0.0)
PROMPTS = [Prompt("one", "ab"), Prompt("two", "ba")]
VALIDATION = [Prompt("three", "aab")]
# Four candidates of two letters, four times.
VIEW = {
    "num_candidates": 4,
    "chunk_tokens": 2,
    "max_response_tokens": 8,
    "temperature": 1.0,
    "encoder": None,
}
PPO = PPOSettings(
    **VIEW, total_steps=1536, learning_rate=2e-2, hidden=(), save_steps=512, eval_steps=512
)
DQN = DQNSettings(
    **VIEW, total_steps=1024, learning_rate=5e-3, hidden=(), save_steps=512, eval_steps=512
)


class LetterShares:
    """An encoder that tells a linear policy what it needs: the share of each letter."""

    def encode(self, sentences):
        texts = [s.partition("Response: ")[2] for s in sentences]
        rows = [[t.count(c) / max(1, len(t)) for c in "ab"] for t in texts]
        return np.array(rows, dtype=np.float32)


def chance():
    """Share of "a" in what is drawn: what a random choice earns."""
    return float(LM.next_probabilities((1,), ())[1])


def best():
    """What always choosing the candidate with most "a" earns, in the mean."""
    p = chance()
    shares = {0.0: (1 - p) ** 2, 0.5: 2 * p * (1 - p), 1.0: p**2}
    rows = itertools.product(shares, repeat=4)
    return sum(max(row) * np.prod([shares[share] for share in row]) for row in rows)


def reward():
    return CountReward()

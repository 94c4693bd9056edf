"""A pool of responses with known content, and rewards that are exploited in a known way."""

from __future__ import annotations

import hashlib

import numpy as np

from mbrl_text_env.benchmarks.audit.run import Audit, measure, score_pool
from mbrl_text_env.benchmarks.options import AuditConfig
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.types import Prompt

FACTS = [
    f"Fact {word} is known." for word in ("one", "two", "three", "four", "five", "six", "seven")
]
FLUFF = ["Well, that is that.", "Much could be added here.", "So it goes, as they say."]


class TextReward:
    """A function of the response's text."""

    def __init__(self, name, function):
        self.name, self.function = name, function

    def score(self, prompts, responses):
        return [float(self.function(response)) for response in responses]


def facts(text):
    """The gold: different facts, whatever is around them."""
    return sum(fact.rstrip(".").lower() in text.lower() for fact in FACTS)


def concise_facts(text):
    """Facts, of which a long text makes no more."""
    return facts(text) - 0.05 * max(0, len(text.split()) - 25) ** 1.5


def noise(text):
    """Uniform in [0, 1), by the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def responses(prompts=24, samples=32, seed=0):
    """Facts and fluff in a random order, some of it exclaimed, some of it flattering."""
    rng = np.random.default_rng(seed)

    def one():
        parts = list(rng.choice(FACTS, size=rng.integers(1, 7), replace=False))
        parts += list(rng.choice(FLUFF, size=rng.integers(0, 5)))
        rng.shuffle(parts)
        parts = [part[:-1] + "!" if rng.random() < 0.15 else part for part in parts]
        opening = ["What a great question! "] if rng.random() < 0.2 else [""]
        return opening[0] + " ".join(parts)

    return [[one() for _ in range(samples)] for _ in range(prompts)]


def audited(folder, proxy, gold=facts, pool=None, **changes):
    """The audit of one function of the text by another, on a pool."""
    pool = responses() if pool is None else pool
    prompts = [Prompt.from_text(f"Question {i}?") for i in range(len(pool))]
    config = AuditConfig("proxy", "gold", len(pool), len(pool[0]), **changes)
    models = [TextReward("proxy", proxy), TextReward("gold", gold)]
    audit = Audit(config, prompts, NGramLM("abc"), *models)
    tried = min(config.sensitivity_samples, config.samples)
    scores = [
        score_pool(folder / model.name, model, prompts, pool, tried=tried) for model in models
    ]
    return measure(audit, pool, *scores)

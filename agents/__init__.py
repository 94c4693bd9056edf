"""Agents for the text-generation environment, and `make`, which knows them by name."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "base": ["Agent", "Completion", "Decision", "Generation"],
        "best_of_n": ["BestOfN"],
        "catalogue": ["available", "make"],
        "collection": ["collect"],
        "lookahead": ["Lookahead"],
        "sampling": ["RandomAgent", "Sampling"],
        "values": ["EmbeddingValue"],
    },
)

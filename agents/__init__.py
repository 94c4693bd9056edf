"""Agents for the text-generation environment; `make` creates them by name."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "base": ["Agent", "Choice", "Completion", "Decision", "Generation"],
        "beam": ["Adaptive", "BeamSearch", "ParticleFilter"],
        "best_first": ["BestFirst", "expected_score"],
        "collection": ["collect"],
        "driver": ["Driver"],
        "guarded": ["Guarded"],
        "lookahead": ["Lookahead", "RecedingHorizon", "Screened"],
        "mcts": ["MCTS"],
        "registry": ["available", "make"],
        "sampling": ["BestOfN", "Majority", "RandomAgent", "Sampling", "WeightedVote"],
        "search": ["Expansion", "Node", "Planner", "Search", "SearchTree"],
        "values": ["EmbeddingValue"],
    },
)

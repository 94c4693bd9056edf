"""Agents for the text-generation environment, and `make`, which knows them by name."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adaptive": ["Adaptive"],
        "base": ["Agent", "Choice", "Completion", "Decision", "Generation"],
        "beam": ["BeamSearch"],
        "best_of_n": ["BestOfN"],
        "collection": ["collect"],
        "lookahead": ["Lookahead"],
        "mcts": ["MCTS"],
        "particle_filter": ["ParticleFilter"],
        "planner": ["Planner"],
        "receding_horizon": ["RecedingHorizon"],
        "registry": ["available", "make"],
        "sampling": ["RandomAgent", "Sampling"],
        "search": ["Expansion", "Search"],
        "tree": ["Node", "SearchTree"],
        "values": ["EmbeddingValue"],
    },
)

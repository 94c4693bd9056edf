"""Value models: what a partial response will be worth when it is complete."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "embedding": ["EmbeddingValue", "FitError", "FitReport"],
        "prefix_reward": ["PrefixRewardValue"],
    },
)

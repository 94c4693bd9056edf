"""Value models: what a partial response will be worth when it is complete."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "embedding": ["EmbeddingValue"],
        "ensemble": ["EnsembleValue"],
        "fitted": ["FitError", "FitReport", "FittedValue", "Samples"],
        "hidden_state": ["HiddenStateValue"],
        "kinds": ["FITTED", "READY", "check_value_fits", "load_value", "make_value"],
        "prefix_reward": ["PrefixRewardValue"],
        "prefix_statistics": ["StackedValue"],
        "rollout": ["RolloutValue"],
        "training_prefixes": ["cut_prefixes", "samples_of"],
    },
)

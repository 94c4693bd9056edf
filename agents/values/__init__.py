"""Value models: what a partial response will be worth when it is complete."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "catalogue": ["FITTED", "READY", "make_value"],
        "embedding": ["EmbeddingValue"],
        "ensemble": ["EnsembleValue"],
        "fitted": ["FittedValue"],
        "hidden_state": ["HiddenStateValue"],
        "loading": ["check_value_fits", "load_value"],
        "prefix_reward": ["PrefixRewardValue"],
        "prefixes": ["FitError", "Samples", "cut_prefixes", "samples_of"],
        "rollout": ["RolloutValue"],
        "stacked": ["StackedValue"],
        "validation": ["FitReport", "LengthReport"],
    },
)

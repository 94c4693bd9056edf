"""Value models: estimate the final score of a partial response."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "fitted": ["FitError", "FitReport", "FittedValue", "Samples", "cut_prefixes", "samples_of"],
        "kinds": [
            *("EmbeddingValue", "HiddenStateValue", "PrefixRewardValue", "StackedValue"),
            *("TokenEmbeddingValue", "check_value_fits", "load_value", "make_value"),
            *("FITTED", "READY", "WORLD_MODEL"),
        ],
    },
)

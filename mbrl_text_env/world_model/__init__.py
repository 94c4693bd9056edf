"""World models: predict the finished response of a prefix, learned without rewards."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "features": ["TextFeature", "TextFeatures", "count_feature"],
        "dynamics": [
            *("Dynamics", "Futures", "IncrementDynamics", "WorldModelError"),
            *("load_dynamics", "predict_futures"),
        ],
        "ensemble": ["EnsembleDynamics"],
        "imagined": ["ImaginedCandidates"],
        "report": ["HorizonReport", "horizon_report"],
        "search": ["ImaginedSearchValue"],
        "value": ["WorldModelEstimate", "WorldModelValue"],
    },
)

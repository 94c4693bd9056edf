"""Reward models: the protocol, one file a family, and `make`, which knows them by name."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adapters": ["FunctionReward", "as_reward_model", "to_trl"],
        "base": [
            "Aggregation",
            "ProcessRewardModel",
            "RewardError",
            "RewardModel",
            "Scores",
            "score_responses",
            "score_steps",
        ],
        "cache": ["CachedReward"],
        "catalogue": ["RewardSpecError", "available", "descriptions", "make", "register"],
        "classifier": ["ClassifierReward"],
        "combinators": ["Ensemble", "Gate", "Product", "WeightedSum"],
        "constraints": ["ConstraintsReward"],
        "relevance": ["RelevanceReward"],
        "sentiment": ["SentimentReward"],
        "time_limit": ["TimeLimit"],
        "transforms": [
            "Clip",
            "LengthPenalty",
            "Normalise",
            "RepetitionPenalty",
            "RunningNormalise",
            "Threshold",
        ],
    },
)

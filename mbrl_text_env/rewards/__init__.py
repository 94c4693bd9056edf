"""Reward models: the protocol, one file a family, and `make`, which knows them by name."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adapters": ["FunctionReward", "as_reward_model", "to_trl"],
        "answers": ["ExactMatchReward", "NumericReward"],
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
        "code": ["UnitTestError", "UnitTestReward"],
        "combinators": ["Ensemble", "Gate", "Product", "WeightedSum"],
        "constraints": ["ConstraintsReward", "check_constraint", "prefix_verdict"],
        "fluency": ["FluencyReward"],
        "judge": ["YES_NO", "JudgeReward"],
        "kl_penalty": ["KLPenalty"],
        "mathematics": ["MathReward"],
        "patterns": ["RegexReward"],
        "process": ["PROCESS_FORMATS", "ProcessReward", "StepFormat"],
        "puzzles": ["ReasoningGymReward"],
        "relevance": ["RelevanceReward"],
        "schema": ["JSONSchemaReward"],
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

"""Agents that learn from rewards alone."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "candidate_agent": ["CandidateAgent", "evaluate", "play"],
        "candidate_policy": [
            *("CandidatePolicy", "CandidateView", "load_policy"),
            *("ChoiceReport", "DQNSettings", "Measured", "PPOSettings"),
        ],
        "sb3": ["train_dqn", "train_ppo"],
        "sb3_parts": ["CandidateActorCritic", "CandidateDQNPolicy", "VectorEnvAdapter"],
        "trl": [
            *("DynaSettings", "PolicyGradientReport", "PolicyGradientSettings", "StepReport"),
            *("train_dyna", "train_grpo", "train_rloo"),
        ],
    },
)

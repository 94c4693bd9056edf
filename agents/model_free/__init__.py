"""Agents that learn from reward alone."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "candidate_agent": ["CandidateAgent"],
        "candidate_policy": ["CandidatePolicy", "CandidateView", "load_policy"],
        "choice_settings": ["ChoiceReport", "DQNSettings", "Measured", "PPOSettings"],
        "episodes": ["evaluate", "play"],
        "sb3": ["train_dqn", "train_ppo"],
        "trl": [
            "PolicyGradientReport",
            "PolicyGradientSettings",
            "StepReport",
            "train_grpo",
            "train_rloo",
        ],
        "vec_env": ["VectorEnvAdapter"],
    },
)

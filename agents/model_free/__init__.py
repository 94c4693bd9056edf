"""Agents that learn from reward alone."""

from mbrl_text_env._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "policy_gradient": ["PolicyGradientReport", "PolicyGradientSettings", "StepReport"],
        "trl": ["train_grpo", "train_rloo"],
    },
)

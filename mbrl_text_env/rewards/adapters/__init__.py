"""Whatever scores responses as a reward model, and reward models as functions of other packages."""

from mbrl_text_env.rewards.adapters.convert import FunctionReward, as_reward_model
from mbrl_text_env.rewards.adapters.rubrics import (
    OpenEnvReward,
    TextAction,
    TextObservation,
    VerifiersFunctionReward,
    VerifiersReward,
    to_openenv,
    to_verifiers,
)
from mbrl_text_env.rewards.adapters.trainers import (
    OpenRLHFFunctionReward,
    TRLFunctionReward,
    TRLReward,
    VerlFunctionReward,
    to_openrlhf,
    to_trl,
    to_verl,
)

__all__ = [
    "FunctionReward",
    "OpenEnvReward",
    "OpenRLHFFunctionReward",
    "TRLFunctionReward",
    "TRLReward",
    "TextAction",
    "TextObservation",
    "VerifiersFunctionReward",
    "VerifiersReward",
    "VerlFunctionReward",
    "as_reward_model",
    "to_openenv",
    "to_openrlhf",
    "to_trl",
    "to_verifiers",
    "to_verl",
]

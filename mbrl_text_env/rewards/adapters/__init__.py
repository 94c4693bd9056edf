"""Whatever scores responses as a reward model, and reward models as functions of other packages."""

from mbrl_text_env.rewards.adapters.convert import as_reward_model
from mbrl_text_env.rewards.adapters.functions import FunctionReward
from mbrl_text_env.rewards.adapters.openenv import (
    OpenEnvReward,
    TextAction,
    TextObservation,
    to_openenv,
)
from mbrl_text_env.rewards.adapters.openrlhf import OpenRLHFFunctionReward, to_openrlhf
from mbrl_text_env.rewards.adapters.trl import TRLFunctionReward, TRLReward, to_trl
from mbrl_text_env.rewards.adapters.verifiers import (
    VerifiersFunctionReward,
    VerifiersReward,
    to_verifiers,
)
from mbrl_text_env.rewards.adapters.verl import VerlFunctionReward, to_verl

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

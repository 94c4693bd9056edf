"""Whatever scores responses as a reward model, and reward models as functions of other packages."""

from mbrl_text_env.rewards.adapters.convert import FunctionReward as FunctionReward
from mbrl_text_env.rewards.adapters.convert import as_reward_model as as_reward_model
from mbrl_text_env.rewards.adapters.rubrics import OpenEnvReward as OpenEnvReward
from mbrl_text_env.rewards.adapters.rubrics import TextAction as TextAction
from mbrl_text_env.rewards.adapters.rubrics import TextObservation as TextObservation
from mbrl_text_env.rewards.adapters.rubrics import to_openenv as to_openenv
from mbrl_text_env.rewards.adapters.trainers import OpenRLHFFunctionReward as OpenRLHFFunctionReward
from mbrl_text_env.rewards.adapters.trainers import TRLFunctionReward as TRLFunctionReward
from mbrl_text_env.rewards.adapters.trainers import TRLReward as TRLReward
from mbrl_text_env.rewards.adapters.trainers import VerlFunctionReward as VerlFunctionReward
from mbrl_text_env.rewards.adapters.trainers import to_openrlhf as to_openrlhf
from mbrl_text_env.rewards.adapters.trainers import to_trl as to_trl
from mbrl_text_env.rewards.adapters.trainers import to_verl as to_verl

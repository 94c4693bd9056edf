"""Checkers for authors of custom environments, models and agents.

Each raises `CheckError` at the first fault. The message says what was expected, what was found and
what to change. An object that passes works with the rest of the package.
"""

from mbrl_text_env.checks.agent import check_agent
from mbrl_text_env.checks.base import CheckError
from mbrl_text_env.checks.env import check_text_env
from mbrl_text_env.checks.language_model import check_language_model
from mbrl_text_env.checks.reward_and_value import check_reward_model, check_value_model
from mbrl_text_env.checks.world_model import check_world_model

__all__ = [
    "CheckError",
    "check_agent",
    "check_language_model",
    "check_reward_model",
    "check_text_env",
    "check_value_model",
    "check_world_model",
]

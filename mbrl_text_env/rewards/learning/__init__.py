"""Learned reward models: preferences, features, fits, and the folder format."""

from typing import Any

from mbrl_text_env.rewards.names import named


@named("learned", argument="FOLDER")
def _learned(folder: str) -> Any:
    """A reward model saved by `mbrl-text reward fit`."""
    # Imported here because scikit-learn takes seconds to import.
    from mbrl_text_env.rewards.learning.learned import LearnedReward

    return LearnedReward(folder)

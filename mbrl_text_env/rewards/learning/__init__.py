"""Reward models that are learned: preferences, features, fits, and the folder they are kept in."""

from typing import Any

from mbrl_text_env.rewards.names import named


@named("learned", argument="FOLDER")
def _learned(folder: str) -> Any:
    """A reward model that `mbrl-text reward fit` wrote."""
    # What is fitted needs scikit-learn, which takes seconds to import.
    from mbrl_text_env.rewards.learning.learned import LearnedReward

    return LearnedReward(folder)

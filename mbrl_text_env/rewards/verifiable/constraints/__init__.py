"""Verifiable constraints, and a reward for the fraction that a response satisfies.

A constraint is a JSON object with a `type`, one of `CONSTRAINT_TYPES`, and its arguments:

    {"type": "keyword_count", "keyword": "river", "value": 2}
    {"type": "no_commas"}

An empty response (only white space) satisfies no constraint. Otherwise it would be rewarded, for
example because it has no commas and few words.
"""

from mbrl_text_env.rewards.verifiable.constraints.checking import (
    ConstraintError,
    ConstraintsReward,
    check_constraint,
    prefix_verdict,
)
from mbrl_text_env.rewards.verifiable.constraints.kinds import CONSTRAINT_TYPES

__all__ = [
    "CONSTRAINT_TYPES",
    "ConstraintError",
    "ConstraintsReward",
    "check_constraint",
    "prefix_verdict",
]

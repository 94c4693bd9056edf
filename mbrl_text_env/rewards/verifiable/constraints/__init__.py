"""Constraints that a program can check, and the share of them that a response satisfies.

A constraint is a JSON object with a `type`, one of `CONSTRAINT_TYPES`, and its arguments:

    {"type": "keyword_count", "keyword": "river", "value": 2}
    {"type": "no_commas"}

An empty response (nothing but white space) satisfies no constraint. It has no commas and few words,
and a language model would otherwise be rewarded for saying nothing.
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

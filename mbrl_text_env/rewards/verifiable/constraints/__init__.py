"""Constraints that a program can check, and the share of them that a response satisfies.

A constraint is a JSON object with a `type` and the arguments of that type:

    {"type": "max_words", "value": 50}
    {"type": "keyword_count", "keyword": "river", "value": 2}
    {"type": "no_commas"}

An empty response (nothing but white space) satisfies no constraint, whatever its type. It has no
commas and few words, and a language model would otherwise be rewarded for saying nothing.

`kinds` has the types: of each its description, its check and what a prefix decides.
"""

from mbrl_text_env.rewards.verifiable.constraints.kinds import CONSTRAINT_TYPES
from mbrl_text_env.rewards.verifiable.constraints.reward import (
    ConstraintError,
    ConstraintsReward,
    check_constraint,
    prefix_verdict,
)

__all__ = [
    "CONSTRAINT_TYPES",
    "ConstraintError",
    "ConstraintsReward",
    "check_constraint",
    "prefix_verdict",
]

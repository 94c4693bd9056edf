"""The share of a prompt's constraints that a response satisfies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mbrl_text_env.rewards.base import ProcessRewardModel, RewardError
from mbrl_text_env.rewards.names import named
from mbrl_text_env.rewards.verifiable.constraints.checking import (
    ConstraintError,
    check_constraint,
    check_counts,
    count_behind,
    prefix_verdict,
)
from mbrl_text_env.rewards.verifiable.constraints.suggestions import suggestions
from mbrl_text_env.types import FloatArray, Prompt


@named("constraints")
class ConstraintsReward(ProcessRewardModel):
    """Scores a response by the fraction of its prompt's constraints that it satisfies.

    The constraints are read from `prompt.metadata["constraints"]`, a list. `ConstraintError` names
    a prompt that has none, or a malformed one.

    Example:
        >>> constraints = [{"type": "lowercase"}, {"type": "max_words", "value": 2}]
        >>> prompt = Prompt.from_text("Greet me.", metadata={"constraints": constraints})
        >>> ConstraintsReward().score([prompt, prompt], ["good day", "Good day"])
        array([1. , 0.5])
    """

    name = "constraints"
    is_verifier = True

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt has constraints."""
        return bool(prompt.metadata.get("constraints"))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the fraction of constraints that each response satisfies."""
        if len(prompts) != len(responses):
            raise ValueError(
                f"Expected one prompt a response, got {len(prompts)} prompts and "
                f"{len(responses)} responses. Repeat a prompt for each of its responses."
            )
        return np.array([_fraction(*row) for row in zip(prompts, responses, strict=True)], float)

    def bound(self, prompts: Sequence[Prompt], prefixes: Sequence[str]) -> FloatArray:
        """Return float64[B], the fraction of constraints that a prefix has not broken for good."""
        rows = zip(prompts, prefixes, strict=True)
        return np.array([self._within_reach(prompt, [prefix])[0] for prompt, prefix in rows], float)

    def feature_names(self, prompt: Prompt) -> tuple[str, ...]:
        """The counts that decide the prompt's constraints, and "visible" characters."""
        request = _request(prompt)
        try:
            found = [name for c in _constraints(prompt) for name in count_behind(c, request)]
        except ConstraintError as error:
            raise RewardError(
                f"Reward model {self.name!r}, prompt {prompt.id!r}: {error}"
            ) from error
        return (*dict.fromkeys(found), "visible")

    def score_features(self, prompt: Prompt, features: Mapping[str, FloatArray]) -> FloatArray:
        """Return float64[N], the fraction of constraints that responses with these counts keep."""
        constraints, request = _constraints(prompt), _request(prompt)
        kept = [check_counts(each, features, request) for each in constraints]
        return np.where(features["visible"] > 0, np.mean(kept, axis=0), 0.0)

    def suggest(self, prompt: Prompt, prefix: str) -> tuple[str, ...]:
        """Pieces that a constraint asks for and the prefix does not have (see `suggestions`)."""
        return suggestions(_constraints(prompt), prefix, _request(prompt))

    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> FloatArray:
        """Return float64[len(steps)]: how much of the score is still within reach.

        The score of a step before the last is the fraction of constraints that the response up to
        its end has not broken, whatever follows (`prefix_verdict` is not False). The last step is
        scored as the end of the response, and so the scores never rise. An environment with process
        rewards reads the last score of the steps so far: that of the text up to there.

        Example:
            >>> constraints = [{"type": "no_commas"}, {"type": "ends_with", "value": "Bye."}]
            >>> prompt = Prompt.from_text("Greet me.", metadata={"constraints": constraints})
            >>> ConstraintsReward().score_steps(prompt, ["Hello.", " Well, ", "Bye."])
            array([1. , 0.5, 0.5])
        """
        if not steps:
            return np.zeros(0)
        final = _fraction(prompt, "".join(steps))
        return np.array([*self._within_reach(prompt, steps[:-1]), final], dtype=np.float64)

    def _within_reach(self, prompt: Prompt, steps: Sequence[str]) -> list[float]:
        constraints = kept = _constraints(prompt)
        prefix, scores, request = "", list[float](), _request(prompt)
        for step in steps:
            prefix += step
            kept = [each for each in kept if prefix_verdict(each, prefix, request) is not False]
            scores.append(len(kept) / len(constraints))
        return scores


def _constraints(prompt: Prompt) -> Sequence[Mapping[str, Any]]:
    constraints: Any = prompt.metadata.get("constraints")
    if not isinstance(constraints, list | tuple) or not constraints:
        raise ConstraintError(
            f"Prompt {prompt.id!r}: expected metadata['constraints'] to be a list of at least one "
            f"constraint, got {constraints!r}. Add constraints, or leave out the prompts for which "
            "`ConstraintsReward.applies_to(prompt)` is False."
        )
    return constraints


def _fraction(prompt: Prompt, response: str) -> float:
    constraints = _constraints(prompt)
    try:
        kept = [check_constraint(each, response, _request(prompt)) for each in constraints]
    except ConstraintError as error:
        raise ConstraintError(f"Prompt {prompt.id!r}: {error}") from error
    return sum(kept) / len(kept)


def _request(prompt: Prompt) -> str:
    """The text that the response answers: the prompt, or the last message of the user in it."""
    if isinstance(prompt.content, str):
        return prompt.content
    asked = [message.content for message in prompt.content if message.role == "user"]
    return asked[-1] if asked else prompt.text

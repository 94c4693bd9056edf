"""The share of a prompt's constraints that a response satisfies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mbrl_text_env.rewards.base import ProcessRewardModel
from mbrl_text_env.rewards.names import named
from mbrl_text_env.rewards.verifiable.constraints.checking import ConstraintError, check_constraint
from mbrl_text_env.rewards.verifiable.constraints.prefixes import prefix_verdict
from mbrl_text_env.types import Prompt


@named("constraints")
class ConstraintsReward(ProcessRewardModel):
    """Scores a response by the fraction of its prompt's constraints that it satisfies.

    The constraints are read from `prompt.metadata["constraints"]`, a list. Scores lie in [0, 1].

    Example:
        >>> from mbrl_text_env.types import Prompt
        >>> constraints = [{"type": "lowercase"}, {"type": "max_words", "value": 2}]
        >>> prompt = Prompt.from_text("Greet me.", metadata={"constraints": constraints})
        >>> ConstraintsReward().score([prompt, prompt], ["good day", "Good day"])
        array([1. , 0.5])
    """

    name = "constraints"

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt has constraints."""
        return bool(prompt.metadata.get("constraints"))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return float64[B], the fraction of constraints that each response satisfies.

        Args:
            prompts: B prompts, each with constraints.
            responses: B responses, `responses[i]` being an answer to `prompts[i]`.

        Raises:
            ConstraintError: A prompt has no constraints or a malformed one; the message names it.
            ValueError: The numbers of prompts and responses differ.
        """
        if len(prompts) != len(responses):
            raise ValueError(
                f"Expected one prompt a response, got {len(prompts)} prompts and "
                f"{len(responses)} responses. Repeat a prompt for each of its responses."
            )
        fractions = [_fraction(*pair) for pair in zip(prompts, responses, strict=True)]
        return np.array(fractions, dtype=np.float64)

    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return float64[len(steps)]: how much of the score is still within reach.

        The score of a step before the last is the fraction of constraints that the response up to
        its end has not broken, whatever follows (`prefix_verdict` is not False). The last step is
        scored as the end of the response: its score is `score` of the whole response, and so the
        scores never rise. A step that costs a constraint is where the score falls. An environment
        with process rewards scores the steps so far and reads the last score: each of its chunks
        gets the score of the text up to there.

        A constraint that is decided is not looked at again.

        Args:
            prompt: A prompt with constraints.
            steps: The response in pieces, which are joined as they are.

        Raises:
            ConstraintError: The prompt has no constraints or a malformed one.

        Example:
            >>> constraints = [{"type": "no_commas"}, {"type": "ends_with", "value": "Bye."}]
            >>> prompt = Prompt.from_text("Greet me.", metadata={"constraints": constraints})
            >>> ConstraintsReward().score_steps(prompt, ["Hello.", " Well, ", "Bye."])
            array([1. , 0.5, 0.5])
        """
        if not steps:
            return np.zeros(0)
        final = _fraction(prompt, "".join(steps))
        constraints = prompt.metadata["constraints"]
        undecided, kept, prefix = list(constraints), len(constraints), ""
        scores = []
        for step in steps[:-1]:
            prefix += step
            verdicts = [prefix_verdict(each, prefix, _request(prompt)) for each in undecided]
            kept -= verdicts.count(False)
            undecided = [c for c, v in zip(undecided, verdicts, strict=True) if v is None]
            scores.append(kept / len(constraints))
        return np.array([*scores, final], dtype=np.float64)


def _fraction(prompt: Prompt, response: str) -> float:
    constraints: Sequence[Mapping[str, Any]] | Any = prompt.metadata.get("constraints")
    if not isinstance(constraints, list | tuple) or not constraints:
        raise ConstraintError(
            f"Prompt {prompt.id!r}: expected metadata['constraints'] to be a list of at least one "
            f"constraint, got {constraints!r}. Add constraints, or leave out the prompts for which "
            "`ConstraintsReward.applies_to(prompt)` is False."
        )
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

"""Plain functions of two texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mbrl_text_env.rewards._files import place_of
from mbrl_text_env.rewards.adapters.common import awaited, callable_name, number
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.types import FloatArray, Prompt


class FunctionReward:
    """A function of two texts as a reward model, called once a response.

    Args:
        function: `f(prompt_text, response) -> float`. None, for a prompt that it does not apply to,
            is an error. May be async. Picklable if it is.

    Attributes:
        name: The function's `__name__`.

    Example:
        >>> reward = FunctionReward(lambda prompt, response: float(prompt in response))
        >>> reward.score([Prompt.from_text("Paris")], ["Paris, France"])
        array([1.])
    """

    def __init__(self, function: Callable[[str, str], float]) -> None:
        self.function = function
        self.name = callable_name(function)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B].

        Raises:
            RewardError: The function raised or returned no number; the message names the prompt
                and the response.
        """
        return np.array([self._score(*row) for row in zip(prompts, responses, strict=True)])

    def _score(self, prompt: Prompt, response: str) -> float:
        try:
            value = awaited(self.function(prompt.text, response))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise RewardError(
                f"Reward model {self.name!r}: raised {type(error).__name__}: {error}"
                f"{place_of(error)} for prompt {prompt.id!r}, response {response[:80]!r}. Mend "
                "the function."
            ) from error
        return number(value, self.name, prompt, response)

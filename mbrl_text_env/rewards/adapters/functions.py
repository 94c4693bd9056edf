"""Plain functions of two texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mbrl_text_env.rewards.adapters.common import FunctionAdapter
from mbrl_text_env.types import Prompt


class FunctionReward(FunctionAdapter):
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

    def values(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        """What the function returns for each response."""
        return [self._value(*row) for row in zip(prompts, responses, strict=True)]

    def _value(self, prompt: Prompt, response: str) -> Any:
        return self.called(prompt, response, lambda: self.function(prompt.text, response))

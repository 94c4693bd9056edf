"""TRL's reward functions, both ways.

TRL's trainers call a reward function with keywords only: `prompts`, `completions`,
`completion_ids`, one list for each further column of the data set, and `trainer_state`,
`log_extra` and `log_metric` (`GRPOTrainer._calculate_rewards`). `TRLFunctionReward` makes that call
from prompts and responses, `to_trl` answers it with a reward model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mbrl_text_env.rewards.adapters.common import (
    FunctionAdapter,
    accepted,
    adapted,
    as_prompt,
    awaited,
    listed,
    required,
    said,
    trl_completion,
    trl_prompt,
)
from mbrl_text_env.rewards.base import RewardError, RewardLike, score_responses
from mbrl_text_env.types import Prompt

_TEXT_COLUMNS = ("prompts", "completions", "completion_ids")
# What the trainer adds to every call; not columns of the data.
_TRAINER_KEYWORDS = ("trainer_state", "log_extra", "log_metric", "environments")


class TRLFunctionReward(FunctionAdapter):
    """A reward function of TRL as a reward model, called once a batch with keywords only.

    Passed are those of the following that the function names, or all if it takes `**kwargs`:

    - `prompts` and `completions`: strings for prompts of plain text; for chats lists of messages,
      `[{"role": "assistant", "content": response}]` being the completion. TRL does the same, by the
      format of the data set. A batch of both kinds makes two calls.
    - `completion_ids`: only with `encode`; see `as_reward_model`.
    - The prompts' metadata, each key a column with one value a prompt. A key that other prompts of
      the batch lack is None for them, as in a data set. A column that the function requires has to
      be in every prompt's metadata: the reward does not apply to other prompts.
    - `trainer_state` as None (there is no trainer), and `log_extra` and `log_metric`, which do
      nothing.

    Async functions are run to their end.

    Args:
        function: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`. None,
            for a prompt that it does not apply to, is an error. Picklable if it is.
        encode: Token ids of a response's text.

    Attributes:
        name: The function's `__name__`, which is TRL's key for its metrics.

    Raises:
        TypeError: It requires `completion_ids` and there is no `encode`.

    Example:
        >>> def mentions(completions, answer, **kwargs):
        ...     return [float(a in c[0]["content"]) for c, a in zip(completions, answer)]
        >>> prompt = Prompt.from_text("Capital of France?", metadata={"answer": "Paris"})
        >>> TRLFunctionReward(mentions).score([prompt], ["It is Paris."])
        array([1.])
    """

    def __init__(
        self,
        function: Callable[..., Any],
        encode: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        super().__init__(function)
        self.encode = encode
        if encode is None and "completion_ids" in required(self.function):
            raise TypeError(
                f"Reward function {self.name!r} needs `completion_ids`, but a reward model sees "
                "text only. Pass as_reward_model(function, encode=...), with a function that gives "
                "the token ids of a text."
            )

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt's metadata has the columns that the function requires."""
        return not self._missing_columns(prompt)

    def values(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        """What the function returns for each completion."""
        values: list[Any] = [None] * len(responses)
        for kind in (True, False):
            rows = [i for i, p in enumerate(prompts) if isinstance(p.content, str) is kind]
            alike = self._values_alike([prompts[i] for i in rows], [responses[i] for i in rows])
            for i, value in zip(rows, alike, strict=True):
                values[i] = value
        return values

    def _values_alike(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        """Values of prompts that are all chats, or all plain text."""
        for prompt in prompts:
            if missing := self._missing_columns(prompt):
                raise RewardError(
                    f"Reward model {self.name!r} requires {missing} in the metadata of a prompt; "
                    f"prompt {prompt.id!r} has {sorted(prompt.metadata)}. Add the metadata, or "
                    "leave out the prompts that it does not apply to."
                )
        if not prompts:
            return []
        result = awaited(self.function(**self._keywords(prompts, responses)))
        return listed(result, self.name, prompts, responses)

    def _keywords(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, Any]:
        keys = {key: None for prompt in prompts for key in prompt.metadata}
        offered: dict[str, Any] = {
            **{
                key: [prompt.metadata.get(key) for prompt in prompts]
                for key in keys
                if key not in _TEXT_COLUMNS
            },
            "trainer_state": None,
            "log_extra": _ignore,
            "log_metric": _ignore,
            "prompts": [trl_prompt(prompt) for prompt in prompts],
            "completions": [trl_completion(*row) for row in zip(prompts, responses, strict=True)],
        }
        if self.encode is not None:
            offered["completion_ids"] = [list(self.encode(response)) for response in responses]
        return accepted(self.function, offered)

    def _missing_columns(self, prompt: Prompt) -> list[str]:
        # A column that is None is one that the row does not have.
        given = (key for key, value in prompt.metadata.items() if value is not None)
        known = {*_TEXT_COLUMNS, *_TRAINER_KEYWORDS, *given}
        return sorted(required(self.function) - known)


class TRLReward:
    """A reward model as a reward function of TRL, also named `to_trl`.

    The columns of the data set become the prompts' metadata, and a column `id` their ids. A row
    that the reward model does not apply to gives None, which TRL leaves out of its sum; a failure
    raises. Of a completion of several messages, the assistant's are scored, joined by line breaks.
    Picklable if the reward model is.

    Args:
        reward_model: The reward model, or whatever `as_reward_model` takes.

    Attributes:
        __name__: Its name, which is TRL's key for its metrics.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> function = to_trl(SentimentReward())
        >>> function(prompts=["How was it?"], completions=["It was good."])
        [0.4404]
        >>> trainer = GRPOTrainer(model, reward_funcs=function, ...)  # doctest: +SKIP
    """

    def __init__(self, reward_model: RewardLike) -> None:
        self.reward_model = adapted(reward_model)
        self.__name__ = self.reward_model.name

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Score completions as `GRPOTrainer` asks for it."""
        dropped = (*_TEXT_COLUMNS, *_TRAINER_KEYWORDS)
        columns = {
            key: self._column(key, values, len(prompts))
            for key, values in columns.items()
            if key not in dropped and values is not None
        }
        completions = self._column("completions", completions, len(prompts))
        converted = [
            as_prompt(prompt, {key: values[i] for key, values in columns.items()})
            for i, prompt in enumerate(prompts)
        ]
        rows = [i for i, prompt in enumerate(converted) if self.reward_model.applies_to(prompt)]
        scores = score_responses(
            self.reward_model,
            [converted[i] for i in rows],
            [said(completions[i]) for i in rows],
        )
        values: list[float | None] = [None] * len(converted)
        for place, i in enumerate(rows):
            values[i] = float(scores.total[place])
        return values

    def _column(self, key: str, values: Any, rows: int) -> list[Any]:
        is_list = hasattr(values, "__iter__") and not isinstance(values, (str, bytes, Mapping))
        column = list(values) if is_list else []
        if len(column) != rows:
            raise RewardError(
                f"Reward model {self.__name__!r}: expected {key} to be a list with one value for "
                f"each of {rows} prompts, got {values!r:.80}. Pass columns as lists."
            )
        return column


to_trl = TRLReward


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stand in for the trainer's log."""

"""verl's reward functions, both ways.

Source: `NaiveRewardManager` and `BatchRewardManager` in verl/workers/reward_manager, which call a
`compute_score` with the keywords data_source, solution_str, ground_truth and extra_info, or with
their plurals. It returns a number, or a dict with the number under "score".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mbrl_text_env.files import plain_values
from mbrl_text_env.rewards.adapters.common import (
    REFERENCE_KEYS,
    FunctionAdapter,
    accepted,
    adapted,
    as_prompt,
    awaited,
    listed,
    parameters,
    reference_answer,
    required,
    trl_prompt,
)
from mbrl_text_env.rewards.base import (
    RewardError,
    RewardLike,
    score_responses,
)
from mbrl_text_env.types import Prompt

_NO_PROMPT = "(not passed by verl)"
_PROMPT_KEYS = ("prompt", "raw_prompt", "question", "problem")


class VerlFunctionReward(FunctionAdapter):
    """A `compute_score` of verl as a reward model, called once a response or, in plurals, a batch.

    It gets `data_source` from the prompt's metadata ("" where there is none), `ground_truth` from
    metadata["reward_model"]["ground_truth"] as in verl's own data, else from "ground_truth",
    "reference_answer" or "answer", and as `extra_info` the metadata of that name, else all of them;
    the prompt stands in it under "prompt", unless something else does. Of a dict that is returned,
    "score" (in old versions "reward") counts. A function whose parameter `ground_truth` has no
    default applies to prompts that have a ground truth.

    Args:
        function: `f(data_source, solution_str, ground_truth, extra_info=None) -> float | dict`, or
            `f(data_sources, solution_strs, ground_truths, extra_infos) -> list`. May be async.

    Attributes:
        name: The function's `__name__`.

    Example:
        >>> def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        ...     return {"score": float(ground_truth in solution_str), "acc": True}
        >>> prompt = Prompt.from_text("2 + 2?", metadata={"reward_model": {"ground_truth": "4"}})
        >>> VerlFunctionReward(compute_score).score([prompt], ["It is 4."])
        array([1.])
    """

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt's metadata have a ground truth, if the function requires one."""
        return not self._needs_truth() or reference_answer(prompt) is not None

    def values(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        """The number in what the function returns for each response.

        Raises:
            RewardError: A prompt has no ground truth, or the function raised.
        """
        rows = [self._row(*pair) for pair in zip(prompts, responses, strict=True)]
        if "solution_strs" in parameters(self.function):
            columns = {f"{key}s": [row[key] for row in rows] for key in rows[0]} if rows else {}
            columns["extra_infos"] = columns.pop("extra_infos", [])
            result = awaited(self.function(**accepted(self.function, columns))) if rows else []
            values = listed(result, self.name, prompts, responses)
        else:
            values = [self._value(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
        return [_score_of(value) for value in values]

    def _value(self, row: dict[str, Any], prompt: Prompt) -> Any:
        keywords = accepted(self.function, row)
        return self.called(prompt, row["solution_str"], lambda: self.function(**keywords))

    def _row(self, prompt: Prompt, response: str) -> dict[str, Any]:
        truth = reference_answer(prompt)
        if truth is None and self._needs_truth():
            raise RewardError(
                f"Reward model {self.name!r}, prompt {prompt.id!r}: expected a ground truth in the "
                f"metadata, under 'reward_model' or one of {list(REFERENCE_KEYS)}, got the keys "
                f"{sorted(prompt.metadata)}. Add it, or leave out the prompt."
            )
        info = prompt.metadata.get("extra_info")
        source = prompt.metadata.get("data_source")
        return {
            "data_source": "" if source is None else source,
            "solution_str": response,
            "ground_truth": truth,
            "extra_info": {
                "prompt": trl_prompt(prompt),
                **(prompt.metadata if info is None else info),
            },
        }

    def _needs_truth(self) -> bool:
        return not {"ground_truth", "ground_truths"}.isdisjoint(required(self.function))


class VerlReward:
    """A reward model as verl's `compute_score`, also named `to_verl`.

    It is called with one response or, in plurals, a batch. In verl's configuration it is named by a
    file, `custom_reward_function.path=my_reward.py`, whose content can be
    `compute_score = to_verl(make("relevance"))`.

    verl does not pass the prompt: it is read from `extra_info`, under "prompt", "raw_prompt",
    "question" or "problem", a text or a list of messages. The ground truth becomes the metadata
    "ground_truth" and "reference_answer"; `data_source` and the rest of `extra_info` stand beside.

    Args:
        reward_model: The reward model, or whatever `as_reward_model` takes.
        needs_prompt: Whether a missing prompt is an error; False for a reward that looks at the
            response alone.

    Attributes:
        __name__: The reward's name.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> compute_score = to_verl(SentimentReward(), needs_prompt=False)
        >>> compute_score(data_source="films", solution_str="It was good.", ground_truth=None)
        0.4404
    """

    def __init__(self, reward_model: RewardLike, *, needs_prompt: bool = True) -> None:
        self.reward_model = adapted(reward_model)
        self.needs_prompt = needs_prompt
        self.__name__ = self.reward_model.name

    def __call__(
        self,
        data_source: Any = "",
        solution_str: str | None = None,
        ground_truth: Any = None,
        extra_info: Mapping[str, Any] | None = None,
        *,
        data_sources: Sequence[Any] | None = None,
        solution_strs: Sequence[str] | None = None,
        ground_truths: Sequence[Any] | None = None,
        extra_infos: Sequence[Mapping[str, Any] | None] | None = None,
        **ignored: Any,
    ) -> float | list[float]:
        """Score one response, or the responses in `solution_strs`."""
        if solution_strs is not None:
            none = [None] * len(solution_strs)
            # verl passes arrays, which are neither true nor false.
            columns = [
                none if column is None else column
                for column in (data_sources, ground_truths, extra_infos)
            ]
            prompts = [self._prompt(*row) for row in zip(*columns, strict=True)]
            scores = score_responses(self.reward_model, prompts, [str(s) for s in solution_strs])
            return [float(score) for score in scores.total]
        if solution_str is None:
            raise TypeError("Expected solution_str or solution_strs, got neither.")
        prompt = self._prompt(data_source, ground_truth, extra_info)
        return float(score_responses(self.reward_model, [prompt], [str(solution_str)]).total[0])

    def _prompt(self, source: Any, truth: Any, info: Mapping[str, Any] | None) -> Prompt:
        rest = plain_values({} if info is None else info)
        key = next((key for key in _PROMPT_KEYS if rest.get(key) is not None), None)
        if key is None and self.needs_prompt:
            raise RewardError(
                f"Reward model {self.__name__!r}: expected the prompt in extra_info, under one of "
                f"{list(_PROMPT_KEYS)}, got the keys {sorted(rest)}. Add it to the data, or pass "
                "to_verl(reward, needs_prompt=False) if the reward does not look at it."
            )
        content = rest.pop(key) if key is not None else _NO_PROMPT
        truths = {} if truth is None else {"ground_truth": truth, "reference_answer": truth}
        return as_prompt(content, {**rest, "data_source": source, **truths})


to_verl = VerlReward


def _score_of(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value.get("score", value.get("reward"))
    return value

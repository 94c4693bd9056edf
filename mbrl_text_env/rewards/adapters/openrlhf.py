"""OpenRLHF's reward functions, both ways.

Source: examples/python/reward_func.py of OpenRLHF: `reward_func(queries, prompts, labels,
**kwargs)`, where a query is a prompt and its response in one text. It returns one number a query,
or a dict with "rewards" (what is learned from), "scores" (0 to 1, for filtering) and "extra_logs".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mbrl_text_env.files import plain_values
from mbrl_text_env.rewards.adapters.common import (
    FunctionAdapter,
    accepted,
    adapted,
    as_prompt,
    awaited,
    listed,
    reference_answer,
)
from mbrl_text_env.rewards.base import (
    RewardError,
    RewardLike,
    score_responses,
)
from mbrl_text_env.types import Prompt

END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "</s>")
"""Stop tokens as text, which OpenRLHF leaves at the end of a query."""


class OpenRLHFFunctionReward(FunctionAdapter):
    """A reward function of OpenRLHF as a reward model, called once a batch.

    A query is the prompt's text with the response right behind it (OpenRLHF has applied the chat
    template before; here there are no template marks). A label is the prompt's reference answer,
    as for verl's functions, or "", as where OpenRLHF's data have none. Of a dict, "rewards" counts,
    or "scores" where that is alone. May be async.

    Args:
        function: `f(queries, prompts, labels, **kwargs) -> tensor | list | dict`.

    Attributes:
        name: The function's `__name__`.

    Example:
        >>> def reward_func(queries, prompts, labels, **kwargs):
        ...     return {"rewards": [float(l in q) for q, l in zip(queries, labels)]}
        >>> prompt = Prompt.from_text("2 + 2?", metadata={"reference_answer": "4"})
        >>> OpenRLHFFunctionReward(reward_func).score([prompt], [" It is 4."])
        array([1.])
    """

    def values(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        """What the function returns for each query."""
        labels = map(reference_answer, prompts)
        offered = {
            "queries": [p.text + r for p, r in zip(prompts, responses, strict=True)],
            "prompts": [prompt.text for prompt in prompts],
            "labels": ["" if label is None else label for label in labels],
        }
        result = awaited(self.function(**accepted(self.function, offered)))
        if isinstance(result, Mapping):
            result = result.get("rewards", result.get("scores"))
        return listed(result, self.name, prompts, responses)


class OpenRLHFReward:
    """A reward model as OpenRLHF's `reward_func`, also named `to_openrlhf`.

    It is named by a file, `--remote_rm_url my_reward.py`, whose content can be
    `reward_func = to_openrlhf(make("sentiment"))`.

    The response is what follows the prompt in a query. A label becomes the metadata
    "reference_answer" and "ground_truth"; "" and None are none. Returned are float32 tensors:
    "rewards" and "scores", both the total, and in "extra_logs" the parts.

    Args:
        reward_model: The reward model, or whatever `as_reward_model` takes.
        end_texts: Stop tokens as text, taken off a response's end.

    Attributes:
        __name__: The reward's name.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> reward_func = to_openrlhf(SentimentReward())
        >>> reward_func(["How was it? Good.</s>"], ["How was it?"], [None])["rewards"]
        tensor([0.4404])
    """

    def __init__(self, reward_model: RewardLike, *, end_texts: Sequence[str] = END_TEXTS) -> None:
        self.reward_model = adapted(reward_model)
        self.end_texts = end_texts
        self.__name__ = self.reward_model.name

    def __call__(
        self,
        queries: Sequence[str],
        prompts: Sequence[str],
        labels: Sequence[Any] | None = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        """Score the responses in `queries`."""
        import torch

        asked, responses = [], []
        given = [None] * len(queries) if labels is None else map(plain_values, labels)
        for query, prompt, label in zip(queries, prompts, given, strict=True):
            none = label is None or label == ""
            truths = {} if none else {"ground_truth": label, "reference_answer": label}
            asked.append(as_prompt(prompt, truths))
            responses.append(self._response(query, prompt))
        scores = score_responses(self.reward_model, asked, responses)
        total = torch.tensor(scores.total, dtype=torch.float32)
        logs = {name: torch.tensor(v, dtype=torch.float32) for name, v in scores.parts.items()}
        return {"rewards": total, "scores": total, "extra_logs": logs}

    def _response(self, query: str, prompt: str) -> str:
        if not query.startswith(prompt):
            raise RewardError(
                f"Reward model {self.__name__!r}: expected a query that begins with its prompt "
                f"{prompt[:80]!r}, got {query[:80]!r}. Pass prompts as they stand in the queries."
            )
        response = query[len(prompt) :]
        for text in self.end_texts:
            response = response.removesuffix(text)
        return response


to_openrlhf = OpenRLHFReward

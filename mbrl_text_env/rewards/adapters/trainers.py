"""Convert reward functions of TRL, verl and OpenRLHF to reward models, and back.

`...FunctionReward` calls a function as its trainer does; `to_...` makes a function for a trainer.
Sources: `GRPOTrainer._calculate_rewards` of TRL; `NaiveRewardManager` and `BatchRewardManager` in
verl/workers/reward_manager; examples/python/reward_func.py of OpenRLHF.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mbrl_text_env.files import plain_values
from mbrl_text_env.rewards.adapters.common import (
    REFERENCE_KEYS,
    AdaptedReward,
    RewardFunction,
    accepted,
    as_prompt,
    awaited,
    listed,
    parameters,
    reference_answer,
    required,
    said,
    trl_prompt,
)
from mbrl_text_env.rewards.base import RewardError, RewardLike, score_responses
from mbrl_text_env.types import Prompt

END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "</s>")
"""Stop tokens as text; OpenRLHF keeps them at the end of a query."""

# Keywords that TRL's trainer adds to every call; they are not columns of the dataset.
_TRAINER_KEYWORDS = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
_VERL_PROMPT_KEYS = ("prompt", "raw_prompt", "question", "problem")


class TRLFunctionReward(AdaptedReward):
    """A reward model from a TRL reward function, called once per batch with keywords only.

    The function gets the keywords it names, or all if it takes `**kwargs`. `prompts` and
    `completions` are strings for plain text and lists of messages for chats (a batch of both makes
    two calls). Each metadata key of the prompts is a column, with None for prompts that lack it.
    The reward does not apply to prompts that lack a required column. `trainer_state` is None;
    `log_extra` and `log_metric` do nothing.

    Args:
        function: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`; it can
            be async. Returning None ("does not apply") is an error.
        encode: See `as_reward_model`; needed if the function requires `completion_ids`.

    Example:
        >>> def mentions(completions, answer, **kwargs):
        ...     return [float(a in c[0]["content"]) for c, a in zip(completions, answer)]
        >>> prompt = Prompt.from_text("Capital of France?", metadata={"answer": "Paris"})
        >>> TRLFunctionReward(mentions).score([prompt], ["It is Paris."])
        array([1.])
    """

    def __init__(
        self, function: Callable[..., Any], encode: Callable[[str], Sequence[int]] | None = None
    ) -> None:
        super().__init__(function)
        self.encode = encode
        if encode is None and "completion_ids" in required(self.function):
            raise TypeError(
                f"Reward function {self.name!r} needs `completion_ids`, but a reward model sees "
                "text only. Call as_reward_model(function, encode=...) to encode the text."
            )

    def missing(self, prompt: Prompt) -> list[str]:
        """Return the required columns that the prompt lacks; None counts as missing."""
        given = (key for key, value in prompt.metadata.items() if value is not None)
        return sorted(
            required(self.function) - {"prompts", "completions", *_TRAINER_KEYWORDS, *given}
        )

    def values(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        """Return the function's result for each completion."""
        values: list[Any] = [None] * len(responses)
        for kind in (True, False):
            rows = [i for i, p in enumerate(prompts) if isinstance(p.content, str) is kind]
            asked, answers = [prompts[i] for i in rows], [responses[i] for i in rows]
            result = awaited(self.function(**self._keywords(asked, answers))) if rows else []
            for i, value in zip(rows, listed(result, self.name, asked, answers), strict=True):
                values[i] = value
        return values

    def _keywords(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, Any]:
        keys = dict.fromkeys(key for prompt in prompts for key in prompt.metadata)
        offered: dict[str, Any] = {
            **{key: [p.metadata.get(key) for p in prompts] for key in keys},
            "trainer_state": None,
            "log_extra": _ignore,
            "log_metric": _ignore,
            "prompts": [trl_prompt(prompt) for prompt in prompts],
            "completions": [
                r if isinstance(p.content, str) else [{"role": "assistant", "content": r}]
                for p, r in zip(prompts, responses, strict=True)
            ],
        }
        offered.pop("completion_ids", None)
        if self.encode is not None:
            offered["completion_ids"] = [list(self.encode(response)) for response in responses]
        return accepted(self.function, offered)


class TRLReward(RewardFunction):
    """A TRL reward function from a reward model, also named `to_trl`.

    The columns of the dataset become the prompts' metadata, and a column `id` their ids. If the
    reward model does not apply to a row, the value is None, which TRL leaves out of its sum. If a
    completion has several messages, the assistant's messages are joined by line breaks and scored.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> function = to_trl(SentimentReward())
        >>> function(prompts=["How was it?"], completions=["It was good."])
        [0.4404]
        >>> trainer = GRPOTrainer(model, reward_funcs=function, ...)  # doctest: +SKIP
    """

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Score completions with the signature that `GRPOTrainer` expects."""
        known = {
            key: self._column(key, values, len(prompts))
            for key, values in {"completions": completions, **columns}.items()
            if key not in _TRAINER_KEYWORDS and values is not None
        }
        texts = list(map(said, known.pop("completions")))
        metadata = [{key: known[key][i] for key in known} for i in range(len(prompts))]
        asked = list(map(as_prompt, prompts, metadata))
        rows = [i for i, prompt in enumerate(asked) if self.reward_model.applies_to(prompt)]
        found = self.totals([asked[i] for i in rows], [texts[i] for i in rows])
        scores = dict(zip(rows, found, strict=True))
        return [scores.get(i) for i in range(len(asked))]

    def _column(self, key: str, values: Any, rows: int) -> list[Any]:
        is_list = hasattr(values, "__iter__") and not isinstance(values, str | bytes | Mapping)
        column = list(values) if is_list else []
        if len(column) != rows:
            raise RewardError(
                f"Reward model {self.__name__!r}: expected {key} to be a list with one value for "
                f"each of {rows} prompts, got {values!r:.80}. Pass columns as lists."
            )
        return column


class VerlFunctionReward(AdaptedReward):
    """A reward model from verl's `f(data_source, solution_str, ground_truth, extra_info=None)`.

    The function is called once per response, or once per batch if its parameters are plural
    (`solution_strs`, ...). It can be async. `data_source` comes from the metadata; `ground_truth`
    from metadata["reward_model"]["ground_truth"] or `REFERENCE_KEYS`. `extra_info` is the metadata
    of that name, or all metadata, plus the "prompt". In a returned dict, "score" (in old versions
    "reward") is used. If `ground_truth` has no default, the reward applies to prompts with one.

    Example:
        >>> def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        ...     return {"score": float(ground_truth in solution_str), "acc": True}
        >>> prompt = Prompt.from_text("2 + 2?", metadata={"reward_model": {"ground_truth": "4"}})
        >>> VerlFunctionReward(compute_score).score([prompt], ["It is 4."])
        array([1.])
    """

    answer_keys = f" (under 'reward_model' or one of {list(REFERENCE_KEYS)})"

    def missing(self, prompt: Prompt) -> list[str]:
        """Return the ground truth's key if it is required and missing."""
        needed = not {"ground_truth", "ground_truths"}.isdisjoint(required(self.function))
        return ["ground_truth"] if needed and reference_answer(prompt) is None else []

    def values(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        """Return the function's score for each response."""
        if not responses or "solution_strs" not in parameters(self.function):
            values = super().values(prompts, responses)
        else:
            rows = [self._row(*pair) for pair in zip(prompts, responses, strict=True)]
            columns = {f"{key}s": [row[key] for row in rows] for key in rows[0]}
            result = awaited(self.function(**accepted(self.function, columns)))
            values = listed(result, self.name, prompts, responses)
        return [v.get("score", v.get("reward")) if isinstance(v, Mapping) else v for v in values]

    def value(self, prompt: Prompt, response: str) -> Any:
        """Return the function's result for one response."""
        keywords = accepted(self.function, self._row(prompt, response))
        return self.called(prompt, response, lambda: self.function(**keywords))

    def _row(self, prompt: Prompt, response: str) -> dict[str, Any]:
        info = prompt.metadata.get("extra_info")
        source = prompt.metadata.get("data_source")
        return {
            "data_source": "" if source is None else source,
            "solution_str": response,
            "ground_truth": reference_answer(prompt),
            "extra_info": {
                "prompt": trl_prompt(prompt),
                **(prompt.metadata if info is None else info),
            },
        }


class VerlReward(RewardFunction):
    """A verl `compute_score` function from a reward model, also named `to_verl`.

    In verl's configuration, set `custom_reward_function.path=my_reward.py`. The file can contain
    `compute_score = to_verl(make("relevance"))`.

    verl does not pass the prompt, so it is read from "prompt", "raw_prompt", "question" or
    "problem" in `extra_info`. If all are missing, it is an error unless `needs_prompt=False`. The
    metadata are the rest of `extra_info`, plus the truth as "ground_truth" and "reference_answer".

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> compute_score = to_verl(SentimentReward(), needs_prompt=False)
        >>> compute_score(data_source="films", solution_str="It was good.", ground_truth=None)
        0.4404
    """

    def __init__(self, reward_model: RewardLike, *, needs_prompt: bool = True) -> None:
        super().__init__(reward_model)
        self.needs_prompt = needs_prompt

    def __call__(
        self,
        data_source: Any = "",
        solution_str: str | None = None,
        ground_truth: Any = None,
        extra_info: Mapping[str, Any] | None = None,
        **columns: Any,
    ) -> float | list[float]:
        """Score one response, or a batch if `solution_strs` and other plural names are given."""
        texts = columns.get("solution_strs")
        if texts is None:
            if solution_str is None:
                raise TypeError("Expected solution_str or solution_strs, got neither.")
            prompt = self._prompt(data_source, ground_truth, extra_info)
            return self.totals([prompt], [str(solution_str)])[0]
        given = [columns.get(name) for name in ("data_sources", "ground_truths", "extra_infos")]
        # verl passes arrays, which have no truth value.
        filled = [[None] * len(texts) if column is None else column for column in given]
        prompts = [self._prompt(*row) for row in zip(*filled, strict=True)]
        return self.totals(prompts, list(map(str, texts)))

    def _prompt(self, source: Any, truth: Any, info: Mapping[str, Any] | None) -> Prompt:
        rest = plain_values({} if info is None else info)
        key = next((key for key in _VERL_PROMPT_KEYS if rest.get(key) is not None), None)
        if key is None and self.needs_prompt:
            raise RewardError(
                f"Reward model {self.__name__!r}: expected the prompt in extra_info, under one of "
                f"{list(_VERL_PROMPT_KEYS)}, got the keys {sorted(rest)}. Add it to the data, or "
                "call to_verl(reward, needs_prompt=False) if the reward does not use the prompt."
            )
        content = rest.pop(key) if key is not None else "(not passed by verl)"
        return as_prompt(content, {**rest, "data_source": source, **_truths(truth)})


class OpenRLHFFunctionReward(AdaptedReward):
    """A reward model from an OpenRLHF reward function, called once per batch; it can be async.

    A query is the prompt's text directly followed by the response. (OpenRLHF applies the chat
    template first; here there are no template tokens.) A label is the prompt's reference answer, as
    for verl's functions, or "", as in OpenRLHF data without one. In a returned dict, "rewards" is
    used, or "scores" if there are no "rewards".

    Example:
        >>> def reward_func(queries, prompts, labels, **kwargs):
        ...     return {"rewards": [float(l in q) for q, l in zip(queries, labels)]}
        >>> prompt = Prompt.from_text("2 + 2?", metadata={"reference_answer": "4"})
        >>> OpenRLHFFunctionReward(reward_func).score([prompt], [" It is 4."])
        array([1.])
    """

    def values(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        """Return the function's result for each query."""
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


class OpenRLHFReward(RewardFunction):
    """An OpenRLHF `reward_func` from a reward model, also named `to_openrlhf`.

    Pass a file to OpenRLHF, `--remote_rm_url my_reward.py`, which can contain
    `reward_func = to_openrlhf(make("sentiment"))`.

    The response is the part of a query after the prompt, without `end_texts` (stop tokens as text).
    A label becomes the metadata "reference_answer" and "ground_truth", unless it is "" or None. The
    result has float32 tensors: the total as "rewards" and "scores", the parts in "extra_logs".

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> reward_func = to_openrlhf(SentimentReward())
        >>> reward_func(["How was it? Good.</s>"], ["How was it?"], [None])["rewards"]
        tensor([0.4404])
    """

    def __init__(self, reward_model: RewardLike, *, end_texts: Sequence[str] = END_TEXTS) -> None:
        super().__init__(reward_model)
        self.end_texts = end_texts

    def __call__(
        self,
        queries: Sequence[str],
        prompts: Sequence[str],
        labels: Sequence[Any] | None = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        """Score the responses in `queries`."""
        import torch

        given = [None] * len(queries) if labels is None else map(plain_values, labels)
        responses = [self._response(*row) for row in zip(queries, prompts, strict=True)]
        asked = [
            as_prompt(prompt, _truths(None if label == "" else label))
            for prompt, label in zip(prompts, given, strict=True)
        ]
        scores = score_responses(self.reward_model, asked, responses)
        total = torch.tensor(scores.total, dtype=torch.float32)
        logs = {name: torch.tensor(v, dtype=torch.float32) for name, v in scores.parts.items()}
        return {"rewards": total, "scores": total, "extra_logs": logs}

    def _response(self, query: str, prompt: str) -> str:
        if not query.startswith(prompt):
            raise RewardError(
                f"Reward model {self.__name__!r}: expected a query that begins with its prompt "
                f"{prompt[:80]!r}, got {query[:80]!r}. Pass prompts exactly as in the queries."
            )
        response = query[len(prompt) :]
        for text in self.end_texts:
            response = response.removesuffix(text)
        return response


to_trl, to_verl, to_openrlhf = TRLReward, VerlReward, OpenRLHFReward


def _truths(truth: Any) -> dict[str, Any]:
    return {} if truth is None else {"ground_truth": truth, "reference_answer": truth}


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Ignore TRL's log calls."""

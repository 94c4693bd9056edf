"""The settings of the loop, and four known choices of them.

>>> star().hints, star().start_from, star(iterations=16).iterations
(True, 'base', 16)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from mbrl_text_env.agents.base import DEFAULT_PARAMS
from mbrl_text_env.agents.learning.answers import CORRECT, FilterSettings
from mbrl_text_env.agents.learning.training import expect
from mbrl_text_env.language_models.base import SamplingParams
from mbrl_text_env.types import Budget, Message, Prompt

StartFrom = Literal["base", "checkpoint"]
"""What is tuned in each iteration: the base model, or the policy of the iteration before."""

StaleValue = Literal["refit", "refit-if-worse", "error"]
"""What is done about a value model when the policy that it values has changed."""

_PLAIN = {"agent": "sampling", "value": None}
_BETTER_HALF = FilterSettings(top_fraction=0.5)


class LoopSettingsError(ValueError):
    """Settings of the loop that are out of range or contradict each other."""


@dataclass(frozen=True)
class LoopSettings:
    """What an iteration does.

    Args:
        iterations: Rounds of collecting and tuning. A loop that has ended goes on with more.
        agent: Spec of the agent that answers the train prompts.
        params: How plain sampling draws tokens: in collecting, where the agent's spec says nothing
            else, in validation, and for the value model's data.
        start_from: What is tuned; all answers come from the policy of the iteration before.
        hints: Whether prompts without a correct answer are answered again with a hint, which is
            not part of the prompt that is tuned on.
        value: Kind of `agents.values.make_value`, for agents that search by one; None for none.
        stale_value: `"refit"`: a new fit for each policy. `"refit-if-worse"`: only where the error
            on fresh data has risen by `error_factor`. `"error"`: the loop stops before a policy is
            searched with another one's value.
        value_samples: Responses to each train prompt that a value model is fitted on.
        validation_samples: Responses to each validation prompt; the value's correlation within
            prompts needs two.
        divergence_samples: The same at temperature 1, for the divergence from the base.
        patience: Iterations without a new best validation score after which the loop stops.
    """

    name: str = "expert-iteration"
    iterations: int = 3
    agent: str = "receding-horizon"
    answers_per_prompt: int = 1
    budget: Budget | None = None
    max_response_tokens: int = 256
    params: SamplingParams = DEFAULT_PARAMS
    filter: FilterSettings = _BETTER_HALF
    start_from: StartFrom = "checkpoint"
    hints: bool = False
    value: str | None = "stacked"
    stale_value: StaleValue = "refit"
    error_factor: float = 1.2
    value_samples: int = 4
    validation_samples: int = 4
    divergence_samples: int = 1
    patience: int | None = 1
    batch_prompts: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check = partial(expect, self, error=LoopSettingsError)
        counts = ("iterations", "answers_per_prompt", "max_response_tokens", "value_samples")
        for name in (*counts, "validation_samples", "batch_prompts", "patience"):
            value = getattr(self, name)
            check(name, value is None or value >= 1, "at least 1")
        check("divergence_samples", self.divergence_samples >= 0, "0 or more")
        check("error_factor", 1 <= self.error_factor < math.inf, "a number from 1 up")
        starts, ways = get_args(StartFrom), get_args(StaleValue)
        check("start_from", self.start_from in starts, f"one of {starts}")
        check("stale_value", self.stale_value in ways, f"one of {ways}")


def _preset(base: dict[str, Any], changes: dict[str, Any]) -> LoopSettings:
    try:
        return LoopSettings(**{**base, **changes})
    except TypeError as error:
        known = sorted(LoopSettings.__dataclass_fields__)
        raise LoopSettingsError(
            f"Expected fields of LoopSettings ({known}), got {sorted(changes)}."
        ) from error


def star(**changes: Any) -> LoopSettings:
    """STaR: correct answers, a hint where there was none, always from the base model.

    Source: Zelikman et al., "STaR: Bootstrapping Reasoning With Reasoning", NeurIPS 2022.
    Deviations: no worked examples, and the hint is a sentence at the prompt's end (`answer_hint`);
    equally many epochs in each iteration, where the paper's 40 steps grow by a fifth; a LoRA
    adapter instead of all weights; temperature 0.7; equal answers to a prompt are tuned on once.
    """
    correct = FilterSettings(threshold=CORRECT)
    base = {"name": "star", "filter": correct, "start_from": "base", "hints": True}
    return _preset({**base, **_PLAIN}, changes)


def rest_em(**changes: Any) -> LoopSettings:
    """ReST-EM: many samples a prompt, a threshold, at most ten each, always from the base model.

    Source: Singh et al., "Beyond Human Data: Scaling Self-Training for Problem-Solving with
    Language Models", TMLR 2024. Deviations: of more than ten the first ten, or the ten best where
    rewards are not 0 or 1 (give `filter` a threshold of its own then); a LoRA adapter instead of
    all weights; equal answers to a prompt count once.
    """
    base = {
        "name": "rest-em",
        "answers_per_prompt": 32,
        "params": SamplingParams(temperature=0.7, top_k=40),
        "filter": FilterSettings(threshold=CORRECT, best_of_prompt=10),
        "start_from": "base",
    }
    return _preset({**base, **_PLAIN}, changes)


def rejection_sampling(*, keep: Literal["best", "all"] = "all", **changes: Any) -> LoopSettings:
    """Rejection sampling: correct answers of the current checkpoint, which goes on learning.

    Source: DeepSeek-AI, "DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement
    Learning", 2025, section 2.3.3. Deviations: the paper then tunes its base model, once and for
    two epochs (`start_from="base"`); it drops responses of mixed languages, with long paragraphs
    and with code blocks, adds 200,000 examples of other tasks, and asks a model about some answers,
    where here the reward alone decides; it does not say how many responses are sampled, here 8;
    here a LoRA adapter is tuned.

    `keep="best"` takes one correct answer to a prompt: the first, where rewards are 0 or 1.
    """
    if keep not in ("best", "all"):
        raise LoopSettingsError(f"keep: expected 'best' or 'all', got {keep!r}.")
    kept = FilterSettings(threshold=CORRECT, best_of_prompt=1 if keep == "best" else None)
    base = {"name": "rejection-sampling", "answers_per_prompt": 8, "filter": kept}
    return _preset({**base, **_PLAIN}, changes)


def planned(
    agent: str = "receding-horizon", *, top_fraction: float = 0.5, **changes: Any
) -> LoopSettings:
    """The article's loop: a planner answers, its value is refitted, the best answers are learned.

    Source: the article that this package implements, after Anthony et al., "Thinking Fast and Slow
    with Deep Learning and Tree Search", NeurIPS 2017. Deviations: the article refits the value on
    planned responses of all iterations; here on plain samples of the current policy, since planned
    ones overstate what an ordinary continuation is worth. It names no share to keep, here one half.
    Its planner is a two-stage lookahead with ridge regression on an embedding (`agent="lookahead"`,
    `value="embedding"`), here any.

    The best `top_fraction` of all answers is tuned on. For a threshold instead, give
    `filter=FilterSettings(threshold=...)`.
    """
    kept = FilterSettings(top_fraction=top_fraction)
    return _preset({"name": "planned", "agent": agent, "filter": kept}, changes)


def answer_hint(prompt: Prompt) -> Prompt | None:
    """The prompt with its reference answer told; None where it has none.

    `metadata["reference_answer"]` is one answer or a list, of which the first is told.

    Example:
        >>> asked = Prompt.from_text("2 + 2?", metadata={"reference_answer": 4})
        >>> answer_hint(asked).text
        '2 + 2?\\n(Hint: the correct answer is 4.)'
    """
    given = prompt.metadata.get("reference_answer")
    if isinstance(given, (list, tuple)):
        given = given[0] if given else None
    if given is None:
        return None
    hint = f"\n(Hint: the correct answer is {given}.)"
    if isinstance(prompt.content, str):
        return replace(prompt, content=prompt.content + hint)
    *before, last = prompt.content
    return replace(prompt, content=(*before, Message(last.role, last.content + hint)))

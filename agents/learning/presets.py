"""Settings of the expert iteration loop, and four presets from the literature.

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
"""What each iteration tunes: the base model, or the policy of the previous iteration."""

StaleValue = Literal["refit", "refit-if-worse", "error"]
"""What to do with a value model when the policy has changed."""

_PLAIN = {"agent": "sampling", "value": None}
_BETTER_HALF = FilterSettings(top_fraction=0.5)


class LoopSettingsError(ValueError):
    """Loop settings that are out of range or contradict each other."""


@dataclass(frozen=True)
class LoopSettings:
    """Settings of an iteration.

    Args:
        iterations: Number of iterations. A finished loop can be continued with more.
        agent: Spec of the agent that answers the training prompts.
        params: Sampling parameters for collecting (unless the agent's spec sets them), validation
            and the value model's data.
        start_from: What to tune. All answers come from the policy of the previous iteration.
        hints: Whether to answer prompts without a correct answer again with a hint. The hint is
            not part of the prompt that is tuned on.
        value: Name for `agents.values.make_value`, for agents that use a value; None for none.
        stale_value: `"refit"` fits a new value model for each policy. `"refit-if-worse"` does so
            only if the error on new data has risen by `error_factor`. `"error"` stops the loop
            before a policy is searched with another policy's value.
        value_samples: Responses per training prompt to fit a value model on.
        validation_samples: Responses per validation prompt; the value's within-prompt correlation
            needs two.
        divergence_samples: The same at temperature 1, for the divergence from the base model.
        patience: Iterations without a new best validation score before the loop stops.
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
        check("error_factor", 1 <= self.error_factor < math.inf, "a finite number of at least 1")
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
    """STaR: tune the base model on correct answers, with hints for prompts that have none.

    Source: Zelikman et al., "STaR: Bootstrapping Reasoning With Reasoning", NeurIPS 2022.
    Deviations: no worked examples; the hint is a sentence at the end of the prompt (`answer_hint`);
    the same number of epochs in each iteration, where the paper's 40 steps grow by a fifth; a LoRA
    adapter instead of all weights; temperature 0.7; duplicate answers to a prompt count once.
    """
    correct = FilterSettings(threshold=CORRECT)
    base = {"name": "star", "filter": correct, "start_from": "base", "hints": True}
    return _preset({**base, **_PLAIN}, changes)


def rest_em(**changes: Any) -> LoopSettings:
    """ReST-EM: tune the base model on up to ten answers per prompt that reach a threshold.

    Source: Singh et al., "Beyond Human Data: Scaling Self-Training for Problem-Solving with
    Language Models", TMLR 2024. Deviations: of more than ten answers the first ten are used, or the
    ten best if rewards are not 0 or 1 (then set a `filter` with your own threshold); a LoRA adapter
    instead of all weights; duplicate answers to a prompt count once.
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
    """Rejection sampling: keep tuning the current policy on its own correct answers.

    Source: DeepSeek-AI, "DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement
    Learning", 2025, section 2.3.3. Deviations: the paper then tunes its base model, once and for
    two epochs (`start_from="base"`); it removes responses with mixed languages, long paragraphs or
    code blocks, adds 200,000 examples of other tasks, and judges some answers with a model, while
    here only the reward decides; it does not state the number of samples, here 8; here a LoRA
    adapter is tuned.

    `keep="best"` uses one correct answer per prompt: the first if rewards are 0 or 1.
    """
    if keep not in ("best", "all"):
        raise LoopSettingsError(f"keep: expected 'best' or 'all', got {keep!r}.")
    kept = FilterSettings(threshold=CORRECT, best_of_prompt=1 if keep == "best" else None)
    base = {"name": "rejection-sampling", "answers_per_prompt": 8, "filter": kept}
    return _preset({**base, **_PLAIN}, changes)


def planned(
    agent: str = "receding-horizon", *, top_fraction: float = 0.5, **changes: Any
) -> LoopSettings:
    """The article's loop: answer with a planner, refit its value, tune on the best answers.

    Source: the article that this package implements, after Anthony et al., "Thinking Fast and Slow
    with Deep Learning and Tree Search", NeurIPS 2017. Deviations: the article refits the value on
    planned responses of all iterations; here it is refitted on plain samples of the current policy,
    because planned responses overestimate the value of an ordinary continuation. The article names
    no fraction to keep, here one half. Its planner is a two-stage lookahead with ridge regression
    on an embedding (`agent="lookahead"`, `value="embedding"`), here any planner.

    The policy is tuned on the best `top_fraction` of all answers. To use a threshold instead, pass
    `filter=FilterSettings(threshold=...)`.
    """
    kept = FilterSettings(top_fraction=top_fraction)
    return _preset({"name": "planned", "agent": agent, "filter": kept}, changes)


def answer_hint(prompt: Prompt) -> Prompt | None:
    """Append the reference answer to the prompt as a hint; None if there is no reference answer.

    `metadata["reference_answer"]` is an answer or a list of answers, of which the first is used.

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

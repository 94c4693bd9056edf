"""How a policy is trained on its own answers: the settings of the loop, and four known choices.

Each preset is a function that gives settings, with the numbers of its paper as defaults; whatever
differs from the paper is in its docstring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from mbrl_text_env.agents.base import DEFAULT_PARAMS
from mbrl_text_env.agents.learning.filters import CORRECT, FilterSettings
from mbrl_text_env.language_models.base import SamplingParams
from mbrl_text_env.ledger import Budget
from mbrl_text_env.types import Message, Prompt

StartFrom = Literal["base", "checkpoint"]
"""What is tuned in each iteration: the base model, or the policy of the iteration before."""

StaleValue = Literal["refit", "refit-if-worse", "error"]
"""What is done about a value model when the policy that it values has changed."""

SAMPLING = "sampling"
"""The spec of plain sampling, which needs no value model."""


_BETTER_HALF = FilterSettings(top_fraction=0.5)


class LoopSettingsError(ValueError):
    """Settings of the loop that are out of range or contradict each other."""


@dataclass(frozen=True)
class LoopSettings:
    """What an iteration does.

    Args:
        name: What reports call the method.
        iterations: Rounds of collecting and tuning. A loop that has ended goes on with more.
        agent: Spec of `mbrl_text_env.agents.registry`, which answers the train prompts.
        answers_per_prompt: Answers to each train prompt, of different seeds.
        budget: Caps on each answer; None for none.
        max_response_tokens: Token limit of a response.
        params: How plain sampling draws tokens: in collecting, where the agent's spec says nothing
            else, in validation, and for the value model's data.
        filter: What is tuned on.
        start_from: What is tuned. All answers of an iteration come from the policy of the iteration
            before, whichever is chosen.
        hints: Whether prompts without a correct answer (a score of `CORRECT`) are answered again
            with a hint, which is then not part of the prompt that is tuned on.
        value: Kind of `agents.values.make_value`, for agents that search by one; None for none.
        stale_value: `"refit"`: anew for each policy. `"refit-if-worse"`: only where the error on
            fresh data has risen by `error_factor`; until then the old one is used. `"error"`: the
            loop stops before a policy is searched with another one's value.
        error_factor: See `stale_value`.
        value_samples: Responses to each train prompt that a value model is fitted on.
        validation_samples: Responses to each validation prompt; the value's correlation within
            prompts needs two.
        divergence_samples: Responses to each validation prompt, drawn at temperature 1, from which
            the divergence from the base is estimated; 0 leaves it out.
        patience: Iterations in a row without a new best validation score after which the loop
            stops; None never stops it.
        batch_prompts: Prompts that are answered together.
        seed: All randomness follows from it, the iteration and the stage.

    Raises:
        LoopSettingsError: A number is out of its range, or a word unknown.
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
        counts = ("iterations", "answers_per_prompt", "max_response_tokens", "value_samples")
        for name in (*counts, "validation_samples", "batch_prompts", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LoopSettingsError(f"{name}: expected at least 1, got {value!r}.")
        if self.divergence_samples < 0:
            raise LoopSettingsError(
                f"divergence_samples: expected 0 or more, got {self.divergence_samples!r}."
            )
        if not (self.error_factor >= 1 and math.isfinite(self.error_factor)):
            raise LoopSettingsError(
                f"error_factor: expected a number from 1 up, got {self.error_factor!r}."
            )
        choices: dict[str, Any] = {"start_from": StartFrom, "stale_value": StaleValue}
        for name, words in choices.items():
            if getattr(self, name) not in get_args(words):
                raise LoopSettingsError(
                    f"{name}: expected one of {get_args(words)}, got {getattr(self, name)!r}."
                )


def star(**changes: Any) -> LoopSettings:
    """STaR: correct answers, a hint where there was none, always from the base model.

    Source: Zelikman et al., "STaR: Bootstrapping Reasoning With Reasoning", NeurIPS 2022. Each
    question is answered once; where the answer is wrong, the model is told the right one and
    answers again ("rationalisation"); all correct answers are tuned on, the hinted ones as if there
    had been no hint; the tuning starts from the base model in every iteration, so that errors do
    not add up.

    Deviations:
        - The paper's prompts show worked examples; here the prompt is asked as it is, and the hint
          is a sentence at its end (`answer_hint`).
        - The paper's training begins with 40 steps and grows by a fifth in each iteration; here it
          is as many epochs in each as the improver does (one by default).
        - A LoRA adapter is tuned instead of all weights.
        - Answers are sampled at temperature 0.7.
        - Equal answers to a prompt are tuned on once; with one answer a prompt there are none.
        - The paper goes on until performance no longer rises; so does `patience`, on validation.

    Args:
        **changes: Fields of `LoopSettings` to be different.

    Example:
        >>> star().hints, star().start_from, star(iterations=16).iterations
        (True, 'base', 16)
    """
    return _changed(
        LoopSettings(
            name="star",
            agent=SAMPLING,
            answers_per_prompt=1,
            filter=FilterSettings(threshold=CORRECT),
            start_from="base",
            hints=True,
            value=None,
        ),
        changes,
    )


def rest_em(**changes: Any) -> LoopSettings:
    """ReST-EM: many samples a prompt, a threshold, at most ten each, always from the base model.

    Source: Singh et al., "Beyond Human Data: Scaling Self-Training for Problem-Solving with
    Language Models", TMLR 2024 (first published 2023). The E-step samples 32 answers to each
    problem (temperature 0.7, top-k 40) and keeps those that are correct, the M-step tunes the base
    model on them; at most 10 answers to a problem are kept, so that easy ones do not dominate.

    Deviations:
        - Of more than ten correct answers the first ten are kept; where rewards are not binary,
          the ten best.
        - A LoRA adapter is tuned instead of all weights.
        - Equal answers to a prompt count once.
        - The paper's reward is 0 or 1; with another one, give `filter` a threshold of its own.

    Args:
        **changes: Fields of `LoopSettings` to be different.

    Example:
        >>> rest_em().answers_per_prompt, rest_em().filter.best_of_prompt
        (32, 10)
    """
    return _changed(
        LoopSettings(
            name="rest-em",
            agent=SAMPLING,
            answers_per_prompt=32,
            params=SamplingParams(temperature=0.7, top_k=40),
            filter=FilterSettings(threshold=CORRECT, best_of_prompt=10),
            start_from="base",
            value=None,
        ),
        changes,
    )


def rejection_sampling(*, keep: Literal["best", "all"] = "all", **changes: Any) -> LoopSettings:
    """Rejection sampling: correct answers of the current checkpoint, which goes on learning.

    Source: DeepSeek-AI, "DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement
    Learning", 2025, section 2.3.3: several responses to each prompt are sampled from a checkpoint,
    and only correct ones are retained for supervised fine-tuning.

    Deviations:
        - The paper then tunes its base model, for two epochs; here the checkpoint goes on, as when
          the step is repeated. `start_from="base"` is as in the paper.
        - The paper does it once; here it can be repeated.
        - The paper drops responses of mixed languages, with long paragraphs and with code blocks,
          adds 200,000 examples of other tasks, and asks a model about some answers; here the
          reward alone decides.
        - The paper does not say how many responses are sampled; here it is 8.
        - A LoRA adapter is tuned instead of all weights.

    Args:
        keep: All correct answers to a prompt, or one of them (the first, where rewards are 0 or
            1).
        **changes: Fields of `LoopSettings` to be different.

    Raises:
        LoopSettingsError: `keep` is something else.

    Example:
        >>> rejection_sampling(keep="best").filter
        FilterSettings(distinct=True, threshold=1.0, top_fraction=None, best_of_prompt=1)
    """
    if keep not in ("best", "all"):
        raise LoopSettingsError(f"keep: expected 'best' or 'all', got {keep!r}.")
    return _changed(
        LoopSettings(
            name="rejection-sampling",
            agent=SAMPLING,
            answers_per_prompt=8,
            filter=FilterSettings(threshold=CORRECT, best_of_prompt=1 if keep == "best" else None),
            start_from="checkpoint",
            value=None,
        ),
        changes,
    )


def planned(
    agent: str = "receding-horizon", *, top_fraction: float = 0.5, **changes: Any
) -> LoopSettings:
    """The article's loop: a planner answers, its value is refitted, the best answers are learned.

    Source: the article that this package implements; the pattern is that of Anthony et al.,
    "Thinking Fast and Slow with Deep Learning and Tree Search", NeurIPS 2017: a search with the
    policy gives better answers than the policy, which then learns to give them at once.

    Deviations:
        - The article refits the value on the data of all iterations; here on those of the current
          policy alone, since the value of a prefix depends on who goes on writing.
        - Its value is fitted on planned responses; here on plain samples, for planned ones
          overstate what an ordinary continuation is worth.
        - It names no share to keep; here it is one half, of all responses.
        - Any planner and value of this package, where the article's is a two-stage lookahead with
          ridge regression on an embedding (`agent="lookahead"`, `value="embedding"`).

    Args:
        agent: Spec of the planner.
        top_fraction: Share of all answers that is tuned on. For a threshold instead, give
            `filter=FilterSettings(threshold=...)`.
        **changes: Fields of `LoopSettings` to be different.

    Example:
        >>> planned("beam:width=4").agent
        'beam:width=4'
    """
    settings = LoopSettings(
        name="planned", agent=agent, filter=FilterSettings(top_fraction=top_fraction)
    )
    return _changed(settings, changes)


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


def _changed(settings: LoopSettings, changes: dict[str, Any]) -> LoopSettings:
    try:
        return replace(settings, **changes)
    except TypeError as error:
        known = sorted(settings.__dataclass_fields__)
        raise LoopSettingsError(
            f"Expected fields of LoopSettings ({known}), got {sorted(changes)}."
        ) from error

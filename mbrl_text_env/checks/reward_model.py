"""The checker of reward models."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mbrl_text_env.checks.base import CheckError, expect, expect_methods
from mbrl_text_env.rewards.base import (
    ProcessRewardModel,
    RewardError,
    RewardModel,
    Scores,
    check_process,
    reward_model_of,
)
from mbrl_text_env.types import FloatArray, Message, Prompt

# The batch around a response may change the rounding of a network's score, no more.
_TOLERANCE = 1e-5

_PROMPTS = (
    Prompt.from_text("Why is the sky blue?", "question"),
    Prompt.from_text("Once upon a time", "continuation", chat=False),
    Prompt.from_text("Wie heißt 日本 auf Deutsch? 🙂", "unicode"),
    Prompt("chat", (Message("system", "Be brief."), Message("user", "How was the film?"))),
    Prompt.from_text(
        "Greet me in small letters.",
        "constraints",
        metadata={"constraints": [{"type": "lowercase"}, {"type": "max_words", "value": 5}]},
    ),
)
_RESPONSES = (
    "It was good.",
    "",
    " \n",
    "?!",
    "Ja — größer, 日本語, عربى, e\u0301 and 🙂🇪🇺.",
    "First line.\n\n- second\n- third",
    "I hated it. " * 400,
    "\x00\ufffd",
)
_TWICE = "expected the same scores in a second call (deterministic)"
_NO_STATE = "Keep no state between calls and draw no random numbers."
_STEPS = (["One and one is two."], ["", "So x = 2. ", "日本 🙂", "x = 2. " * 200])


def check_reward_model(
    reward_model: Any,
    prompts: Sequence[Prompt] | None = None,
    responses: Sequence[str] | None = None,
) -> None:
    """Check that a reward model keeps the contract of `rewards.RewardModel`.

    Checked are the name; one finite score a response, the same in every call, whatever the order
    and the rest of the batch (up to 1e-5); that the arguments are left as they are; and, where the
    model has them, `score_parts`, `flops`, `flops_bound` and `score_steps`.

    Args:
        reward_model: A reward model; a function is made one by `rewards.as_reward_model`.
        prompts: By default questions, a chat, a continuation, and one with constraints; pass
            prompts with the metadata that the model needs. Those that it does not apply to are left
            out.
        responses: By default short, long, empty and Unicode ones. Response i answers prompt i; of
            the shorter list the first ones are used again.

    Raises:
        CheckError: The contract is broken.

    Example:
        >>> class Length:
        ...     name = "length"
        ...     def score(self, prompts, responses):
        ...         return [len(response) for response in responses]
        >>> check_reward_model(Length())
    """
    expect_methods(
        reward_model,
        ("name", "score"),
        f"Reward model {type(reward_model).__name__}",
        "Add them; a function is made a reward model by `rewards.as_reward_model(function)`.",
    )
    name = reward_model.name
    expect(
        isinstance(name, str) and name,
        f"Reward model {type(reward_model).__name__}, name",
        "a string that is not empty",
        name,
        "Give it a name: reports and records call it by that.",
    )
    model = reward_model_of(reward_model)
    asked = [p for p in (_PROMPTS if prompts is None else prompts) if model.applies_to(p)]
    expect(
        asked,
        f"Reward model {name!r}, applies_to",
        f"True for at least one of {len(_PROMPTS if prompts is None else prompts)} prompts",
        "none",
        "Pass prompts=[...] with the metadata that the model needs.",
    )
    answers = _RESPONSES if responses is None else responses
    # The first pair comes a second time: what is scored twice in a batch scores the same.
    rows = [*range(max(len(asked), len(answers))), 0]
    batch = _Batch(
        model,
        [asked[row % len(asked)] for row in rows],
        [answers[row % len(answers)] for row in rows],
    )
    _check_scores(batch)
    _check_parts(batch)
    _check_flops(batch)
    if model.scores_steps:
        _check_steps(check_process(model), asked)


class _Batch:
    """Prompts and responses of equal number, and the model that scores them."""

    def __init__(self, model: RewardModel, prompts: list[Prompt], responses: list[str]) -> None:
        self.model, self.prompts, self.responses = model, prompts, responses
        self.subject = f"Reward model {model.name!r}"

    def score(self, rows: Sequence[int] | None = None) -> FloatArray:
        """Scores of some or all rows, each checked to be one finite number a response."""
        chosen = range(len(self.responses)) if rows is None else rows
        prompts = [self.prompts[i] for i in chosen]
        responses = [self.responses[i] for i in chosen]
        raw = _called(self.model.score, f"{self.subject}, score", prompts, responses)
        return _finite(raw, f"{self.subject}, score", responses)

    def expect_same(self, scores: FloatArray, other: FloatArray, what: str, change: str) -> None:
        """Report a fault unless two rows of scores are the same."""
        _expect_same(f"{self.subject}, {what}", change, self.responses, scores, other)


def _finite(raw: Any, subject: str, texts: Sequence[str]) -> FloatArray:
    """What a model returned, as float64[len(texts)]."""
    try:
        values = np.asarray(raw, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.zeros((0, 0))
    expect(
        values.shape == (len(texts),),
        subject,
        f"one number for each of {len(texts)} texts, shape ({len(texts)},)",
        f"shape {np.shape(raw)}, {raw!r}" if isinstance(raw, np.ndarray) else raw,
        "Return a flat list of floats in the order of the texts.",
    )
    bad = np.flatnonzero(~np.isfinite(values))
    expect(
        not bad.size,
        subject,
        "finite numbers",
        "" if not bad.size else f"{values[bad[0]]} for {texts[bad[0]][:80]!r}",
        "Decide what such a text is worth, or raise an error where it cannot be scored.",
    )
    return values


def _called(function: Callable[..., Any], subject: str, *args: Any) -> Any:
    """Call a method of the model; it has to leave its arguments as they are."""
    copies = copy.deepcopy(args)
    try:
        result = function(*args)
    except CheckError:
        raise
    except Exception as error:
        raise CheckError(
            f"{subject}: expected scores for {len(args[-1])} texts, among them empty, long and "
            f"Unicode ones, got {type(error).__name__}: {error}. Decide what such texts are worth; "
            "prompts that the model cannot score are left out by `applies_to(prompt) -> bool`."
        ) from error
    expect(
        args == copies,
        subject,
        "that prompts and responses are left as they are",
        "changed arguments",
        "Work on a copy: agents and environments go on using the lists that they pass.",
    )
    return result


def _check_scores(batch: _Batch) -> None:
    scores, rows = batch.score(), range(len(batch.responses))
    batch.expect_same(scores, batch.score(), f"score: {_TWICE}", _NO_STATE)
    batch.expect_same(
        scores,
        batch.score(rows[::-1])[::-1],
        "score: expected scores in the order of the responses",
        "The scores of a reversed batch are the reversed scores: undo any sorting.",
    )
    batch.expect_same(
        scores,
        np.concatenate([batch.score([i]) for i in rows]),
        "score: expected the score that the response has alone, whatever else is in its batch",
        "Do not normalise over the batch, and mask the padding.",
    )


def _check_parts(batch: _Batch) -> None:
    subject = f"{batch.subject}, score_parts"
    scores = _called(batch.model.score_parts, subject, batch.prompts, batch.responses)
    expect(isinstance(scores, Scores), subject, "a `rewards.Scores`", scores, "Return one.")
    batch.expect_same(
        batch.score(),
        _finite(scores.total, f"{subject}, total", batch.responses),
        "score_parts: expected the total that `score` returns",
        "Let `score` return `score_parts(...).total`.",
    )
    for part, values in scores.parts.items():
        expect(isinstance(part, str) and part, subject, "parts by name", part, "Name it.")
        _finite(values, f"{subject}, part {part!r}", batch.responses)


def _check_flops(batch: _Batch) -> None:
    subject = f"{batch.subject}, flops"
    raw = _called(batch.model.flops, subject, batch.prompts, batch.responses)
    flops = _finite(raw, subject, batch.responses)
    expect((flops >= 0).all(), subject, "numbers from 0", flops.min(), "Count operations.")
    try:
        most = float(batch.model.flops_bound())
    except RewardError as error:
        raise CheckError(str(error)) from error
    expect(
        0 <= most < np.inf,
        f"{batch.subject}, flops_bound",
        "a finite number of at least 0",
        most,
        "Return the floating-point operations of the longest response that it reads.",
    )
    outside = np.flatnonzero(flops > most * (1 + 1e-9))
    expect(
        not outside.size,
        subject,
        f"numbers from 0 to flops_bound(), {most:g}",
        flops[outside],
        "Agents set aside `flops_bound()` before they score: make it the most, not the mean.",
    )


def _check_steps(model: ProcessRewardModel, prompts: Sequence[Prompt]) -> None:
    subject = f"Reward model {model.name!r}, score_steps"
    for prompt, steps in itertools.product(prompts, _STEPS):
        scores, again = (
            _finite(_called(model.score_steps, subject, prompt, list(steps)), subject, steps)
            for _ in range(2)
        )
        _expect_same(f"{subject}: {_TWICE}", _NO_STATE, steps, scores, again)


def _expect_same(
    expected: str, change: str, texts: Sequence[str], a: FloatArray, b: FloatArray
) -> None:
    different = np.flatnonzero(~np.isclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE))
    if different.size:
        i = int(different[0])
        raise CheckError(f"{expected}, got {a[i]:g} and {b[i]:g} for {texts[i][:80]!r}. {change}")

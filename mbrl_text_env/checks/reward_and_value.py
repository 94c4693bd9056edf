"""The checkers of reward models and of value models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import numpy as np

from mbrl_text_env.checks.base import CheckError, Trial, rules
from mbrl_text_env.rewards.base import (
    ProcessRewardModel,
    RewardError,
    RewardModel,
    Scores,
    check_process,
    reward_bounds,
    reward_model_of,
)
from mbrl_text_env.types import FloatArray, Ledger, Message, Prompt, TextState, Usage
from mbrl_text_env.values import (
    ValueEstimate,
    expected_value_usage,
    predict_values,
    value_usage_bound,
)

# The batch may change a network's score only by rounding.
_TOLERANCE = 1e-5
_ROUNDING = 1e-9
# Number of prefixes of a response to check bounds on.
_CUTS = 16

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
_STEPS = (["One and one is two."], ["", "So x = 2. ", "日本 🙂", "x = 2. " * 200])
_REWARD_RULES = rules("""
attributes | attributes | an object with {names} | Add them; convert a function with
    `rewards.as_reward_model(function)`.
name | name | a string that is not empty | Reports use it.
applies_to | applies_to | True for at least one of {count} prompts | Pass prompts with the metadata
    that it needs.
failure | {place} | scores for {size} texts, among them empty, long and Unicode ones | Decide what
    such texts are worth, or leave prompts out by `applies_to`.
arguments | {place} | that prompts and responses are left as they are | Work on a copy: callers go
    on using their lists.
shape | {place} | one number for each of {size} texts, shape ({size},) | Return a flat list of
    floats in the order of the texts.
finite | {place} | finite numbers | Decide what such a text is worth, or raise an error where it
    cannot be scored.
twice | {place} | the same scores in a second call (deterministic) | Keep no state between calls and
    draw no random numbers.
order | score | scores in the order of the responses | Undo any sorting.
alone | score | the score that the response has alone, whatever else is in its batch | Do not
    normalise over the batch, and mask the padding.
parts | score_parts | a `rewards.Scores` | Return one.
total | score_parts | the total that `score` returns | Let `score` return `score_parts(...).total`.
part | score_parts | parts by name | Name it.
reach | bound | at least {score:g}, the score of a response that begins so | It is the most that any
    continuation can score, and infinity where that is not known.
flops | flops | numbers from 0 | Count operations.
bound | flops_bound | a finite number of at least 0 | Return the operations of the longest response
    that it reads.
within | flops | numbers from 0 to flops_bound(), {most:g} | Agents set it aside before they score:
    make it the most, not the mean.
""")
_VALUE_RULES = rules("""
attributes | attributes | an object with {names} | Subclass `ValueModel`.
is_fitted | is_fitted | True | Fit it first, or load a fitted one.
arguments | {place} | that the list of states is left as it is | Work on a copy: planners go on
    using it.
failure | {place} | values of {size} states | Every state of a prompt that the model is meant for
    has a value, an empty batch too.
estimate | predict | a `values.ValueEstimate` | Return one.
shape | predict, {part} | float64[{size}], one for each state | Return arrays of floats in the order
    of the states.
finite | predict, {part} | finite numbers | Decide what it is worth.
std | predict, std | standard deviations of at least 0 | Return 0 where nothing is uncertain.
same | predict, {part} | {expected} | A value is a function of its state alone: draw random numbers
    from a seed and the state, keep nothing between calls, and mask the padding.
value_calls | {place} | one value call a state | `values.predict_values` counts it; `predict_with`
    charges other models' calls alone.
bound | {place}, {amount} | 0 to {most:g}, the bound for a prefix of {size} tokens | Budgets rely on
    `usage_bound` and `flops_bound` being the most.
pickle | pickle | an object that can be pickled | Drop what cannot be copied in `__getstate__`, and
    define the class in a module.
""")


def check_reward_model(
    reward_model: Any,
    prompts: Sequence[Prompt] | None = None,
    responses: Sequence[str] | None = None,
) -> None:
    """Check that a reward model implements the interface of `rewards.RewardModel`.

    It checks the name; that each response has one finite score, which does not depend on the call,
    the order or the rest of the batch (up to 1e-5); that arguments are not changed; and, if the
    model has them, `score_parts`, `bound`, `flops`, `flops_bound` and `score_steps`.

    Args:
        reward_model: A reward model; convert a function with `rewards.as_reward_model`.
        prompts: Prompts with the metadata that the model needs; by default questions, a chat, a
            continuation and a prompt with constraints. Prompts that the model does not apply to are
            left out.
        responses: By default short, long, empty and Unicode responses. Response i answers prompt
            i; the shorter list is repeated.

    Raises:
        CheckError: A check fails.

    Example:
        >>> class Length:
        ...     name = "length"
        ...     def score(self, prompts, responses):
        ...         return [len(response) for response in responses]
        >>> check_reward_model(Length())
    """
    trial = _RewardTrial(f"Reward model {type(reward_model).__name__}")
    trial.expect_attributes(reward_model, "name", "score")
    name = reward_model.name
    trial.expect("name", isinstance(name, str) and name, name)
    trial.subject, model = f"Reward model {name!r}", reward_model_of(reward_model)
    given = _PROMPTS if prompts is None else prompts
    asked = [prompt for prompt in given if model.applies_to(prompt)]
    trial.expect("applies_to", asked, "none", count=len(given))
    answers = _RESPONSES if responses is None else responses
    # The first pair is repeated: both copies must have the same score.
    rows = [*range(max(len(asked), len(answers))), 0]
    trial.model = model
    trial.prompts = [asked[row % len(asked)] for row in rows]
    trial.responses = [answers[row % len(answers)] for row in rows]
    trial.check_scores()
    trial.check_parts()
    trial.check_bounds()
    trial.check_flops()
    if model.scores_steps:
        trial.check_steps(check_process(model), asked)


class _RewardTrial(Trial):
    """A reward model with prompts and responses of equal number."""

    rules = _REWARD_RULES
    model: RewardModel
    prompts: list[Prompt]
    responses: list[str]

    def __init__(self, subject: str) -> None:
        self.subject = subject

    def score(self, rows: Sequence[int]) -> FloatArray:
        """Scores of some rows, checked to be one finite number per response."""
        prompts, responses = [self.prompts[i] for i in rows], [self.responses[i] for i in rows]
        return self.finite(
            "score", self.called("score", self.model.score, prompts, responses), responses
        )

    def finite(self, place: str, raw: Any, texts: Sequence[str]) -> FloatArray:
        """The values that a model returned, as float64[len(texts)]."""
        try:
            values = np.asarray(raw, dtype=np.float64)
        except (TypeError, ValueError):
            values = np.zeros((0, 0))
        got = f"shape {np.shape(raw)}, {raw!r}" if isinstance(raw, np.ndarray) else raw
        self.expect("shape", values.shape == (len(texts),), got, place=place, size=len(texts))
        for i in map(int, np.flatnonzero(~np.isfinite(values))):
            raise self.fault("finite", f"{values[i]} for {texts[i][:80]!r}", place=place)
        return values

    def expect_same(
        self, rule: str, one: FloatArray, two: FloatArray, texts: Sequence[str], **facts: object
    ) -> None:
        close = np.isclose(one, two, rtol=_TOLERANCE, atol=_TOLERANCE)
        for i in map(int, np.flatnonzero(~close)):
            got = f"{one[i]:g} and {two[i]:g} for {texts[i][:80]!r}"
            raise self.fault(rule, got, **facts)

    def check_scores(self) -> None:
        rows = range(len(self.responses))
        scores = self.score(rows)
        alone = np.concatenate([self.score([i]) for i in rows])
        self.expect_same("twice", scores, self.score(rows), self.responses, place="score")
        self.expect_same("order", scores, self.score(rows[::-1])[::-1], self.responses)
        self.expect_same("alone", scores, alone, self.responses)

    def check_parts(self) -> None:
        place = "score_parts"
        scores = self.called(place, self.model.score_parts, self.prompts, self.responses)
        self.expect("parts", isinstance(scores, Scores), scores)
        total = self.finite(f"{place}, total", scores.total, self.responses)
        self.expect_same("total", self.score(range(len(total))), total, self.responses)
        for part, values in scores.parts.items():
            self.expect("part", isinstance(part, str) and part, part)
            self.finite(f"{place}, part {part!r}", values, self.responses)

    def check_bounds(self) -> None:
        """The bound of a prefix must be at least the score of every continuation.

        If a bound decreases, other responses are also tried as continuations.
        """
        scores = self.score(range(len(self.responses)))
        for prompt, text, score in zip(self.prompts, self.responses, scores, strict=True):
            ends = sorted({round(share * len(text) / _CUTS) for share in range(_CUTS + 1)})
            prefixes = [text[:end] for end in ends]
            try:
                bounds = reward_bounds(self.model, [prompt] * len(ends), prefixes)
            except RewardError as error:
                raise CheckError(f"{self.subject}: {error}") from error
            for prefix, bound in zip(prefixes, bounds, strict=True):
                self.expect_reach(prompt, prefix, bound, text, score)
            fallen = [(p, b) for p, b in zip(prefixes, bounds, strict=True) if b < bounds[0]]
            for prefix, bound in fallen[:1] + fallen[-1:]:
                longer = [prefix, *(prefix + each for each in self.responses)]
                reached = self.called("score", self.model.score, [prompt] * len(longer), longer)
                for whole, score in zip(longer, self.finite("score", reached, longer), strict=True):
                    self.expect_reach(prompt, prefix, bound, whole, score)

    def expect_reach(
        self, prompt: Prompt, prefix: str, bound: float, text: str, score: float
    ) -> None:
        got = f"{bound:g} for {prefix[-80:]!r} of {text[:80]!r}, prompt {prompt.id!r}"
        self.expect("reach", bound >= score - _ROUNDING, got, score=score)

    def check_flops(self) -> None:
        raw = self.called("flops", self.model.flops, self.prompts, self.responses)
        flops = self.finite("flops", raw, self.responses)
        self.expect("flops", (flops >= 0).all(), flops.min())
        try:
            most = float(self.model.flops_bound())
        except RewardError as error:
            raise CheckError(str(error)) from error
        self.expect("bound", 0 <= most < np.inf, most)
        outside = flops[flops > most * (1 + _ROUNDING)]
        self.expect("within", not outside.size, outside, most=most)

    def check_steps(self, model: ProcessRewardModel, prompts: Sequence[Prompt]) -> None:
        place = "score_steps"
        for prompt, steps in product(prompts, _STEPS):
            one, two = (
                self.finite(place, self.called(place, model.score_steps, prompt, [*steps]), steps)
                for _ in range(2)
            )
            self.expect_same("twice", one, two, steps, place=place)


def check_value_model(
    value_model: Any, states: Sequence[TextState], *, tolerance: float = 1e-5
) -> None:
    """Check that a value model implements the interface of `values.ValueModel`.

    It checks that the model is fitted; that each state has a finite mean and a finite standard
    deviation of at least 0, which do not depend on the call, the order or the rest of the batch;
    the empty batch; that ledgers do not change predictions, and each is charged the cost of its
    state, never more than the bound; and that a pickled copy makes the same predictions.

    Args:
        value_model: A fitted value model.
        states: At least two states with the prompts and tokenizer that the model supports.
            Use prefixes of different lengths, including an empty one.
        tolerance: Maximum difference of a prediction between batches, relative to the largest
            prediction, or absolute if that is below 1.

    Raises:
        CheckError: A check fails.

    Example:
        >>> from mbrl_text_env.mdp import initial
        >>> prompts = [Prompt.from_text("Hi"), Prompt.from_text("Why?")]  # doctest: +SKIP
        >>> check_value_model(value, [initial(p, lm) for p in prompts])  # doctest: +SKIP
    """
    if len(states) < 2:
        raise ValueError(f"states: expected at least 2, got {len(states)}.")
    # The first state is repeated: both copies must have the same value.
    trial = _ValueTrial(value_model, [*states, states[0]], tolerance)
    trial.expect_attributes(value_model, "predict")
    fitted = getattr(value_model, "is_fitted", True)
    trial.expect("is_fitted", fitted is True, fitted)
    estimate = trial.predict(trial.states)
    trial.compare(estimate, trial.predict(trial.states), "the same in a second call")
    backwards = trial.predict(trial.states[::-1])
    turned = ValueEstimate(backwards.mean[::-1], backwards.std[::-1])
    trial.compare(estimate, turned, "values in the order of the states")
    singles = [trial.predict([state]) for state in trial.states]
    alone = ValueEstimate(*np.concatenate([[s.mean, s.std] for s in singles], axis=1))
    trial.compare(
        estimate, alone, "the value that each state has alone, whatever else is in its batch"
    )
    trial.predict([])
    trial.check_charges(estimate)
    trial.check_pickle(estimate)


@dataclass
class _ValueTrial(Trial):
    """A value model and the states to check it on."""

    rules = _VALUE_RULES
    model: Any
    states: list[TextState]
    tolerance: float

    def __post_init__(self) -> None:
        self.subject = f"Value model {type(self.model).__name__}"

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        estimate = self.called("predict", self.model.predict, list(states))
        # An array has a `mean` and a `std` too, but they are methods.
        parts = [getattr(estimate, part, None) for part in ("mean", "std")]
        self.expect("estimate", all(p is not None and not callable(p) for p in parts), estimate)
        mean, std = map(np.asarray, parts)
        for part, values in (("mean", mean), ("std", std)):
            right = values.shape == (len(states),) and values.dtype.kind == "f"
            got = f"{values.dtype}{list(values.shape)}"
            self.expect("shape", right, got, part=part, size=len(states))
            self.expect("finite", np.isfinite(values).all(), values, part=part)
        self.expect("std", (std >= 0).all(), std)
        return ValueEstimate(mean, std)

    def compare(self, one: ValueEstimate, other: ValueEstimate, expected: str) -> None:
        for part, a, b in (("mean", one.mean, other.mean), ("std", one.std, other.std)):
            most = self.tolerance * max(1.0, float(np.abs(a).max()))
            for i in np.flatnonzero(np.abs(a - b) > most):
                place = f"a prefix of prompt {self.states[i].prompt.id!r}"
                got = f"{a[i]:g} and {b[i]:g} for {place}"
                raise self.fault("same", got, part=part, expected=expected)

    def check_charges(self, estimate: ValueEstimate) -> None:
        ledgers = [Ledger() for _ in self.states]

        def charged(states: Sequence[TextState]) -> ValueEstimate:
            return predict_values(self.model, states, ledgers=ledgers)

        found = self.called("ledgers", charged, list(self.states))
        self.compare(estimate, found, "the same values with ledgers as without")
        for state, ledger in zip(self.states, ledgers, strict=True):
            bound = value_usage_bound(self.model, state)
            self.check_amounts("ledgers", state, ledger.usage, bound)
            expected = expected_value_usage(self.model, state)
            self.check_amounts("expected_usage", state, expected, bound)

    def check_amounts(self, place: str, state: TextState, usage: Usage, bound: Usage) -> None:
        self.expect("value_calls", usage.value_calls == 1, usage, place=place)
        size = len(state.response_ids)
        # Cached tokens cost nothing, and seconds are not known in advance.
        for name in (f.name for f in fields(Usage) if f.name not in ("seconds", "cached_tokens")):
            amount, most = getattr(usage, name), getattr(bound, name)
            within = 0 <= amount <= most * (1 + _ROUNDING)
            facts = {"place": place, "amount": name, "most": most, "size": size}
            self.expect("bound", within, f"{amount:g}", **facts)

    def check_pickle(self, estimate: ValueEstimate) -> None:
        again = self.pickled(self.model)
        found = _ValueTrial(again, self.states, self.tolerance).predict(self.states)
        self.compare(estimate, found, "the same values from a pickled copy")

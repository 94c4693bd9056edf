"""The reward model's contract, and the one door through which rewards are called.

`score_responses` checks whatever a reward model returns and charges it to the ledgers. Nothing else
in the package calls `RewardModel.score`, so a reward that fails is an error with names in it and
never a silent zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from mbrl_text_env.ledger import Ledger, Usage, timed
from mbrl_text_env.rewards._files import place_of
from mbrl_text_env.types import FloatArray, Prompt

T = TypeVar("T")
R = TypeVar("R")


class RewardError(RuntimeError):
    """A reward model raised, or returned something that is not one finite score a response."""


@runtime_checkable
class RewardModel(Protocol):
    """Scores responses; higher is better.

    Five methods are optional: `score_parts(prompts, responses) -> Scores` for a reward made of
    several; `applies_to(prompt) -> bool` for one that needs something of the prompt; for one
    whose computation is to be counted, `flops(prompts, responses) -> float64[B]` and
    `flops_bound() -> float`, the most that one response can take; and `reduced(dtype) ->
    RewardModel`, the same reward in a number format that is faster and less exact (see `reduced`).

    Example:
        >>> class Brevity:
        ...     name = "brevity"
        ...     def score(self, prompts, responses):
        ...         return [-len(response.split()) for response in responses]
    """

    @property
    def name(self) -> str:
        """What reports, records and `info` call it."""
        ...

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> npt.ArrayLike:
        """Return float64[B], the score of `responses[i]` as an answer to `prompts[i]`."""
        ...


RewardLike: TypeAlias = RewardModel | Callable[..., Any] | str
"""Where a reward is taken: a reward model, a function or object that scores, or a name.

See `rewards.as_reward_model`, by which it becomes a reward model.
"""


@runtime_checkable
class ProcessRewardModel(RewardModel, Protocol):
    """A reward model that also scores the steps of a response."""

    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> npt.ArrayLike:
        """Return float64[len(steps)], exactly one score a step."""
        ...


@dataclass(frozen=True)
class Scores:
    """What a reward model said of a batch.

    Args:
        total: float64[B].
        parts: float64[B] by name; the model's own name alone where it has no parts.
    """

    total: FloatArray
    parts: Mapping[str, FloatArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.total)

    def parts_of(self, index: int) -> dict[str, float]:
        """The parts of one response, as plain floats."""
        return {name: float(values[index]) for name, values in self.parts.items()}


class Aggregation(StrEnum):
    """How the scores of a response's steps make one score; search and reports share it.

    Example:
        >>> Aggregation("min").of([0.9, 0.2, 0.8])
        0.2
    """

    MIN = "min"
    PRODUCT = "product"
    LAST = "last"
    MEAN = "mean"

    def of(self, scores: npt.ArrayLike) -> float:
        """The score of a response whose steps have `scores`, float[S].

        Raises:
            RewardError: There are no steps.
        """
        values = np.asarray(scores, dtype=np.float64)
        if not values.size:
            raise RewardError(
                "Expected the scores of at least one step to aggregate, got none. Decide what a "
                "response without steps is worth before."
            )
        functions: dict[str, Callable[..., Any]] = {
            "min": np.min,
            "product": np.prod,
            "mean": np.mean,
            "last": lambda scores: scores[-1],
        }
        return float(functions[self.value](values))


def reward_name(reward_model: object) -> str:
    """The name of a reward model, or of its class where it has none."""
    return str(getattr(reward_model, "name", type(reward_model).__name__))


def part_names(reward_model: object) -> tuple[str, ...] | None:
    """The names of the parts that every score will have, or None where they are not known.

    A reward model that has `score_parts` may have them as `part_names`.
    """
    if not hasattr(reward_model, "score_parts"):
        return (reward_name(reward_model),)
    named = getattr(reward_model, "part_names", None)
    return None if named is None else tuple(named)


def applies_to(reward_model: object, prompt: Prompt) -> bool:
    """Whether a reward model can score answers to `prompt`."""
    test: Callable[[Prompt], bool] | None = getattr(reward_model, "applies_to", None)
    return test is None or test(prompt)


def reduced(reward_model: RewardModel, dtype: str) -> RewardModel:
    """A reward model in a faster, less exact number format, for estimates; itself if it has none.

    The two keep nothing in common that depends on the format, so using the one never changes what
    the other says.

    Args:
        reward_model: The reward model.
        dtype: Such as `"bfloat16"`.
    """
    make: Callable[[str], RewardModel] | None = getattr(reward_model, "reduced", None)
    return reward_model if make is None else make(dtype)


def reward_usage_bound(reward_model: object) -> Usage:
    """The most that scoring one response is charged.

    Raises:
        RewardError: The model counts its computation but sets no bound to it.
    """
    bound: Callable[[], float] | None = getattr(reward_model, "flops_bound", None)
    if bound is None and hasattr(reward_model, "flops"):
        raise RewardError(
            f"Reward model {reward_name(reward_model)!r} has `flops` but no `flops_bound() -> "
            "float`, the most that one response can take; budgets need both. Add it."
        )
    return Usage(reward_calls=1, reward_flops=0.0 if bound is None else float(bound()))


def score_responses(
    reward_model: RewardModel,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    ledgers: Sequence[Ledger] | None = None,
) -> Scores:
    """Score responses, check the scores, and charge the ledgers (one a response).

    Raises:
        RewardError: The model raised, returned too few or too many scores, something that is no
            number, NaN or infinity. The message names the model, the prompt and the response.
    """
    if not responses:
        return Scores(np.zeros(0))
    if not hasattr(reward_model, "score"):
        raise TypeError(
            f"Expected a reward model, with a method `score`, got {type(reward_model).__name__}. "
            "Make one of a function or a name with `rewards.as_reward_model`."
        )
    name = reward_name(reward_model)
    context = f"Reward model {name!r}, prompt {prompts[0].id!r}"
    with timed(ledgers):
        function = getattr(reward_model, "score_parts", reward_model.score)
        raw = _guarded(function, context, prompts, responses)
        raw_parts = raw.parts if isinstance(raw, Scores) else {}
        total = _checked(raw.total if isinstance(raw, Scores) else raw, name, prompts, responses)
        parts = {
            part: _checked(values, f"{name}/{part}", prompts, responses)
            for part, values in raw_parts.items()
        }
    _charge(reward_model, prompts, responses, ledgers)
    return Scores(total, parts or {name: total})


def isolate_failures(
    function: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]
) -> list[R | RewardError]:
    """Call a batched function so that an item that cannot be scored costs that item alone.

    A batch that fails is halved, and so are its halves, until the items that fail stand alone.

    Args:
        function: Gives one result an item, or raises `RewardError` for all of them.
        items: What it is called with.

    Returns:
        One result an item, or its error.

    Example:
        >>> def inverse(numbers):
        ...     if 0 in numbers:
        ...         raise RewardError("there is a zero")
        ...     return [1 / number for number in numbers]
        >>> isolate_failures(inverse, [1, 2, 0, 4])
        [1.0, 0.5, RewardError('there is a zero'), 0.25]
    """
    try:
        return list(function(items))
    except RewardError as error:
        if len(items) == 1:
            return [error]
        middle = len(items) // 2
        halves = items[:middle], items[middle:]
        return [result for half in halves for result in isolate_failures(function, half)]


def check_process(reward_model: object) -> ProcessRewardModel:
    """Return a reward model that scores steps, or refuse one that does not.

    Raises:
        RewardError: It has no `score_steps`.
    """
    if not hasattr(reward_model, "score_steps"):
        raise RewardError(
            f"Reward model {reward_name(reward_model)!r} scores whole responses only: process "
            "rewards need a method `score_steps(prompt, steps)`. Use reward='terminal' or "
            "reward='delta', or another reward model."
        )
    return cast("ProcessRewardModel", reward_model)


def score_steps(
    reward_model: ProcessRewardModel,
    prompt: Prompt,
    steps: Sequence[str],
    *,
    ledger: Ledger | None = None,
) -> FloatArray:
    """Score the steps of one response with a process reward model, checked and charged.

    Raises:
        RewardError: The model has no `score_steps`, raised, or did not return exactly one finite
            score a step.
    """
    name = reward_name(check_process(reward_model))
    if not steps:
        return np.zeros(0)
    ledgers = None if ledger is None else [ledger]
    with timed(ledgers):
        raw = _guarded(
            reward_model.score_steps, f"Reward model {name!r}, prompt {prompt.id!r}", prompt, steps
        )
        scores = _checked(raw, name, [prompt] * len(steps), steps)
    _charge(reward_model, [prompt], ["".join(steps)], ledgers)
    return scores


def _guarded(function: Callable[..., Any], context: str, *args: Any) -> Any:
    try:
        return function(*args)
    except (RewardError, KeyboardInterrupt):
        raise
    except BaseException as error:
        # `sys.exit` in a reward, or in a library that it calls, must not end a run as if all were
        # well.
        # The whole batch was passed at once, so the first response stands for it in the message.
        responses = args[-1]
        raise RewardError(
            f"{context} and {len(responses) - 1} more in its batch: scoring raised "
            f"{type(error).__name__}: {error}{place_of(error)}. First response: "
            f"{_shorten(responses[0])!r}. Mend the reward model, or leave out the prompts that it "
            "cannot score."
        ) from error


def _checked(
    raw: Any, name: str, prompts: Sequence[Prompt], responses: Sequence[str]
) -> FloatArray:
    try:
        scores = _as_floats(raw)
    except Exception as error:
        # Whatever refuses to be numbers: tensors and other arrays raise errors of their own.
        raise RewardError(
            f"Reward model {name!r}: expected {len(responses)} numbers, got {_shorten(repr(raw))} "
            f"for prompt {prompts[0].id!r}, response {_shorten(responses[0])!r} ({error})."
        ) from error
    if scores.shape != (len(responses),):
        raise RewardError(
            f"Reward model {name!r}: expected one score a response, shape ({len(responses)},), got "
            f"shape {scores.shape} for prompts from {prompts[0].id!r}, first response "
            f"{_shorten(responses[0])!r}. Return a flat list of floats in the responses' order."
        )
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        first = int(bad[0])
        raise RewardError(
            f"Reward model {name!r}: expected finite scores, got {scores[first]} for prompt "
            f"{prompts[first].id!r}, response {_shorten(responses[first])!r} ({bad.size} of "
            f"{len(scores)} are not finite)."
        )
    return scores


def _as_floats(raw: Any) -> FloatArray:
    if isinstance(raw, list | tuple):
        raw = [_from_tensor(item) if hasattr(item, "detach") else item for item in raw]
        masked = any(item is np.ma.masked for item in raw)
    else:
        raw = _from_tensor(raw) if hasattr(raw, "detach") else raw
        masked = np.ma.is_masked(raw)
    if masked:
        raise TypeError("masked values, which have no score")
    kind = np.asarray(raw).dtype.kind
    if kind in "USMm":
        raise TypeError("dates or durations" if kind in "Mm" else "texts, which may be no numbers")
    return np.asarray(raw, dtype=np.float64)


def _from_tensor(tensor: Any) -> Any:
    """An array of a tensor: NumPy knows neither bfloat16 nor gradients nor other devices."""
    if tensor.is_complex():
        raise TypeError("complex numbers")
    return tensor.detach().cpu().double().numpy()


def _charge(
    reward_model: Any,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    ledgers: Sequence[Ledger] | None,
) -> None:
    if ledgers is None:
        return
    flops_function = getattr(reward_model, "flops", None)
    flops = np.zeros(len(responses))
    if flops_function is not None:
        name = f"{reward_name(reward_model)}.flops"
        context = f"Reward model {name!r}, prompt {prompts[0].id!r}"
        raw = _guarded(flops_function, context, prompts, responses)
        flops = _checked(raw, name, prompts, responses)
    for ledger, amount in zip(ledgers, flops, strict=True):
        ledger.charge(Usage(reward_calls=1, reward_flops=float(amount)))


def _shorten(text: str, width: int = 80) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."

"""The `RewardModel` base class, and the functions that call reward models and check the results.

The package calls `RewardModel.score` only through `score_responses`. A failing reward therefore
raises an error that names the reward and the prompt; it never becomes a silent zero.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from traceback import walk_tb
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from mbrl_text_env.runs import identity
from mbrl_text_env.types import FloatArray, Ledger, Prompt, Usage, timed

T = TypeVar("T")
R = TypeVar("R")


class RewardError(RuntimeError):
    """Raised if a reward model fails or does not return one finite score per response."""


@dataclass(frozen=True)
class Scores:
    """The scores of a batch: `total`, float64[B], and named `parts` of the same shape.

    A reward that is not made of several has a single part, under its own name.
    """

    total: FloatArray
    parts: Mapping[str, FloatArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.total)

    def parts_of(self, index: int) -> dict[str, float]:
        """Return the parts of one response as plain floats."""
        return {name: float(values[index]) for name, values in self.parts.items()}


class RewardModel(ABC):
    """Base class of rewards that score responses; higher is better. Only `score` is required.

    `name` identifies the reward in reports, records and `info`. It defaults to the class name.
    Functions that take a reward also accept other objects with a method `score`: they call
    `as_reward_model`.

    Example:
        >>> class Brevity(RewardModel):
        ...     name = "brevity"
        ...     def score(self, prompts, responses):
        ...         return [-len(response.split()) for response in responses]
        >>> score_responses(Brevity(), [Prompt.from_text("Hi")], ["Hello you"]).total
        array([-2.])
    """

    name: str
    is_bound_wrong: bool = False
    """Whether a response has scored above its `bound`; from then on, `bound` is ignored."""
    is_verifier: bool = False
    """Whether good responses reach the bound of the empty prefix, as in a check by a program.
    A search then stops at the first response that reaches it."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not hasattr(cls, "name"):
            cls.name = cls.__name__

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> npt.ArrayLike:
        """Return float64[B], the score of `responses[i]` as an answer to `prompts[i]`."""

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Return the total scores and the scores of the parts; composite rewards override it."""
        total = _checked(self.score(prompts, responses), self.name, prompts, responses)
        return Scores(total, {self.name: total})

    @property
    def part_names(self) -> tuple[str, ...] | None:
        """The names of the parts in every score, or None if they are not known in advance."""
        return (self.name,) if _is_default(self.score_parts) else None

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether the reward can score responses to `prompt`; by default True."""
        return True

    def bound(self, prompts: Sequence[Prompt], prefixes: Sequence[str]) -> npt.ArrayLike:
        """Return float64[B], upper bounds on the scores of responses that start with `prefixes[i]`.

        A bound can be too high but must not be too low; the default is infinity. The bound of the
        empty prefix holds for every response to the prompt. Searches prune prefixes whose bound is
        too low to be of use. `check_reward_model` tests the bounds.
        """
        return np.full(len(prefixes), np.inf)

    def suggest(self, prompt: Prompt, prefix: str) -> Sequence[str]:
        """Return texts that could follow `prefix`, the most useful first; by default none.

        A search calls this if a response is about to end although a higher score is still possible.
        Each text is a missing piece, such as a required word or a list marker. The language model
        continues after it.
        """
        return ()

    def feature_names(self, prompt: Prompt) -> Sequence[str]:
        """Return the counts `score_features` needs, such as "words"; by default, `RewardError`."""
        raise RewardError(
            f"Reward model {self.name!r}, prompt {prompt.id!r}: expected `feature_names` and "
            "`score_features`, got neither. Add them, or use another value model."
        )

    def score_features(self, prompt: Prompt, features: Mapping[str, FloatArray]) -> npt.ArrayLike:
        """Return float64[N], the scores of N responses given only their counts, float64[N] each.

        They equal `score` for texts with these counts. A world model uses this to score responses
        whose text does not exist. By default, `RewardError`. See `world_model.TextFeatures`.
        """
        self.feature_names(prompt)
        raise RewardError(f"Reward model {self.name!r} has no `score_features`. Add it.")

    def reward_calls(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[int]:
        """Return int[B], the reward calls to charge for scores just made; by default one each."""
        return [1] * len(responses)

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> npt.ArrayLike:
        """Return float64[B], the floating-point operations per score; by default 0."""
        return np.zeros(len(responses))

    def flops_bound(self) -> float:
        """Return an upper bound on `flops` per response; required if a class overrides `flops`."""
        if not _is_default(self.flops):
            raise RewardError(
                f"Reward model {self.name!r} has `flops` but no `flops_bound() -> float`, the "
                "upper bound for one response. Budgets need both; add it."
            )
        return 0.0

    def usage(self, prompt: Prompt, response: str) -> Usage:
        """Return the usage to charge for scoring one response."""
        (flops,) = np.asarray(self.flops([prompt], [response]), dtype=np.float64)
        return Usage(reward_calls=1, reward_flops=float(flops))

    def usage_bound(self) -> Usage:
        """Return the highest usage that scoring one response can be charged."""
        return Usage(reward_calls=1, reward_flops=float(self.flops_bound()))

    def reduced(self, dtype: str) -> RewardModel:
        """Return this reward in a faster, less precise dtype (`"bfloat16"`), for estimates.

        The original keeps its own scores. By default, return the reward itself.
        """
        return self

    @property
    def scores_steps(self) -> bool:
        """Whether this is a process reward model, with a method `score_steps`."""
        return isinstance(self, ProcessRewardModel)


class ProcessRewardModel(RewardModel):
    """A reward model that also scores the steps of a response."""

    @abstractmethod
    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> npt.ArrayLike:
        """Return float64[len(steps)], exactly one score per step."""


class RowReward(RewardModel):
    """A reward model that scores responses one by one, with an upper bound of 1 by default."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B]."""
        return np.array([self._score(*row) for row in zip(prompts, responses, strict=True)])

    def bound(self, prompts: Sequence[Prompt], prefixes: Sequence[str]) -> FloatArray:
        """Return float64[B], see `RewardModel.bound`."""
        return np.array([self._bound(*row) for row in zip(prompts, prefixes, strict=True)])

    @abstractmethod
    def _score(self, prompt: Prompt, response: str) -> float: ...

    def _bound(self, prompt: Prompt, prefix: str) -> float:
        return 1.0


class Scorer(Protocol):
    """Any object with a method `score`; `as_reward_model` turns it into a reward model."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> npt.ArrayLike:
        """Return float64[B]."""
        ...


RewardLike: TypeAlias = RewardModel | Scorer | Callable[..., Any] | str
"""What `rewards.as_reward_model` accepts: a reward model, another object, a function or a name."""


class ObjectReward(ProcessRewardModel):
    """A reward model around an object with a method `score` and, optionally, other methods."""

    def __init__(self, reward: Any) -> None:
        self.reward = reward
        self.name = str(getattr(reward, "name", type(reward).__name__))
        self.is_verifier = bool(getattr(reward, "is_verifier", False))
        methods = ("score_parts", "applies_to", "bound", "suggest", "flops", "flops_bound")
        for method in (*methods, "feature_names", "score_features"):
            # Methods that a subclass overrides are kept.
            if hasattr(reward, method) and _is_default(getattr(self, method)):
                setattr(self, method, getattr(reward, method))

    def __getattr__(self, name: str) -> Any:
        if name == "reward" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.reward, name)

    def identity(self) -> Any:
        """Return the identity of the object."""
        return identity(self.reward)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> npt.ArrayLike:
        """Return the object's scores, float64[B]."""
        return cast("npt.ArrayLike", self.reward.score(prompts, responses))

    @property
    def part_names(self) -> tuple[str, ...] | None:
        """The object's part names."""
        if not hasattr(self.reward, "score_parts"):
            return (self.name,)
        named = getattr(self.reward, "part_names", None)
        return None if named is None else tuple(named)

    def reduced(self, dtype: str) -> RewardModel:
        """Return the object in another dtype, or this reward if the object has no `reduced`."""
        own = getattr(self.reward, "reduced", None)
        return self if own is None else reward_model_of(own(dtype))

    @property
    def scores_steps(self) -> bool:
        """Whether the object has a method `score_steps`."""
        return hasattr(self.reward, "score_steps")

    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> npt.ArrayLike:
        """Return the object's step scores, float64[len(steps)]."""
        return cast("npt.ArrayLike", self.reward.score_steps(prompt, steps))


def reward_model_of(reward: object) -> RewardModel:
    """Return a reward model unchanged; wrap any other object that has a method `score`."""
    if isinstance(reward, RewardModel):
        return reward
    if not callable(getattr(reward, "score", None)):
        raise TypeError(
            f"Expected a reward model with a method `score`, got {type(reward).__name__}. "
            "Convert a function or a name with `rewards.as_reward_model`."
        )
    return ObjectReward(reward)


def reward_name(reward_model: object) -> str:
    """Return the name of a reward model, or of its class if it has none."""
    return str(getattr(reward_model, "name", type(reward_model).__name__))


def applies_to(reward_model: object, prompt: Prompt) -> bool:
    """See `RewardModel.applies_to`."""
    return reward_model_of(reward_model).applies_to(prompt)


def reward_usage_bound(reward_model: object) -> Usage:
    """See `RewardModel.usage_bound`."""
    return reward_model_of(reward_model).usage_bound()


def score_responses(
    reward_model: RewardModel | Scorer,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    ledgers: Sequence[Ledger] | None = None,
) -> Scores:
    """Score responses, check the scores, and charge the ledgers (one per response).

    Raises:
        RewardError: The model raised an error, or returned the wrong number of scores or a score
            that is not finite. The message names the model, the prompt and the response.
    """
    if not responses:
        return Scores(np.zeros(0))
    reward = reward_model_of(reward_model)
    name = reward.name
    with timed(ledgers):
        raw = _guarded(reward.score_parts, name, prompts[0], prompts, responses)
        raw = raw if isinstance(raw, Scores) else Scores(raw)
        total = _checked(raw.total, name, prompts, responses)
        parts = {
            part: _checked(values, f"{name}/{part}", prompts, responses)
            for part, values in raw.parts.items()
        }
    _charge(reward, prompts, responses, ledgers)
    return Scores(total, parts or {name: total})


def reward_bounds(
    reward_model: object, prompts: Sequence[Prompt], prefixes: Sequence[str]
) -> FloatArray:
    """Return float64[B], the checked result of `RewardModel.bound`: infinite or finite, never NaN.

    A `RewardError` names what is wrong. Bounds are not charged: they must cost next to nothing
    beside a score. A bound that was found to be wrong (`check_bounds`) is not asked: infinity.
    """
    reward = reward_model_of(reward_model)
    if not prefixes or reward.is_bound_wrong:
        return np.full(len(prefixes), np.inf)
    name = f"{reward.name}: bound"
    raw = _guarded(reward.bound, name, prompts[0], prompts, prefixes)
    return _checked(raw, name, prompts, prefixes, infinite=True)


def score_features(
    reward_model: object, prompt: Prompt, features: Mapping[str, FloatArray]
) -> FloatArray:
    """Return float64[N], the checked result of `RewardModel.score_features`; nothing is charged.

    If features are missing, a `RewardError` names the missing and the available ones.
    """
    reward = reward_model_of(reward_model)
    missing = [name for name in reward.feature_names(prompt) if name not in features]
    if missing:
        raise RewardError(
            f"Reward model {reward.name!r}, prompt {prompt.id!r}: expected predicted features, got "
            f"{missing}, which are not predicted or never varied. Predicted features: "
            f"{sorted(features)}. Fit the world model with these features on records in which "
            "they vary."
        )
    count = len(next(iter(features.values())))
    texts = ["(imagined)"] * count
    name = f"{reward.name}: score_features"
    raw = _guarded(lambda _: reward.score_features(prompt, features), name, prompt, texts)
    return _checked(raw, name, [prompt] * count, texts)


def check_bounds(
    reward_model: RewardModel,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    scores: FloatArray,
) -> None:
    """Compare the scores of responses with the bounds of their prefixes, the full text included.

    At the first score above a bound, warn, and ignore the reward's bounds from then on. This cannot
    find bounds that pruned a good response before it was written; `check_reward_model` can.
    """
    if reward_model.is_bound_wrong or _is_default(reward_model.bound):
        return
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        ends = [len(response) * quarter // 4 for quarter in range(5)]
        prefixes = [response[:end] for end in ends]
        for prefix, bound in zip(
            prefixes, reward_bounds(reward_model, [prompt] * len(ends), prefixes), strict=True
        ):
            # Twice the rounding error of a fraction such as 3 of 3.
            if score > bound + 1e-9:
                reward_model.is_bound_wrong = True
                warnings.warn(
                    f"Reward model {reward_model.name!r}: bound: expected at least {score:g}, the "
                    f"score of {response[:80]!r}, for its prefix {prefix[-80:]!r}, got "
                    f"{bound:g}, prompt {prompt.id!r}. Bounds of this reward are ignored from now "
                    "on. Raise the bound, and test it with `check_reward_model`.",
                    stacklevel=2,
                )
                return


def isolate_failures(
    function: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]
) -> list[R | RewardError]:
    """Call a batched function; an item that fails does not affect the other items.

    A batch that raises `RewardError` is split in half, recursively, down to the failing items.
    Return, for each item, its result or its error.
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
    """Return the process reward model, or raise `RewardError` if it does not score steps."""
    reward = reward_model_of(reward_model)
    if not reward.scores_steps:
        raise RewardError(
            f"Reward model {reward.name!r} scores whole responses only; process rewards need a "
            "method `score_steps(prompt, steps)`. Use reward='terminal' or reward='delta', or "
            "another reward model."
        )
    return cast("ProcessRewardModel", reward)


def score_steps(
    reward_model: RewardModel | Scorer,
    prompt: Prompt,
    steps: Sequence[str],
    *,
    ledger: Ledger | None = None,
) -> FloatArray:
    """Score the steps of one response, float64[len(steps)]; check and charge the scores."""
    reward = check_process(reward_model)
    if not steps:
        return np.zeros(0)
    ledgers = None if ledger is None else [ledger]
    with timed(ledgers):
        raw = _guarded(reward.score_steps, reward.name, prompt, prompt, steps)
        scores = _checked(raw, reward.name, [prompt] * len(steps), steps)
    _charge(reward, [prompt], ["".join(steps)], ledgers)
    return scores


def _is_default(method: Callable[..., Any]) -> bool:
    function = getattr(method, "__func__", None)
    return function is not None and function is vars(RewardModel).get(function.__name__)


def _guarded(function: Callable[..., Any], name: str, first: Prompt, *args: Any) -> Any:
    try:
        return function(*args)
    except (RewardError, KeyboardInterrupt):
        raise
    except BaseException as error:
        # `sys.exit` in a reward must not end a run as if it had succeeded. The whole batch was
        # passed at once, so the message quotes the first response.
        responses = args[-1]
        raise RewardError(
            f"Reward model {name!r}, prompt {first.id!r} and {len(responses) - 1} more in its "
            f"batch: scoring raised {type(error).__name__}: {error}{place_of(error)}. First "
            f"response: {responses[0][:80]!r}. Fix the reward model, or remove these prompts."
        ) from error


def _checked(
    raw: Any, name: str, prompts: Sequence[Prompt], responses: Sequence[str], infinite: bool = False
) -> FloatArray:
    try:
        scores = _as_floats(raw)
    except Exception as error:
        # Tensors and other array types raise their own errors if they cannot be converted.
        raise RewardError(
            f"Reward model {name!r}: expected {len(responses)} numbers, got {raw!r:.80} "
            f"for prompt {prompts[0].id!r}, response {responses[0][:80]!r} ({error})."
        ) from error
    if scores.shape != (len(responses),):
        raise RewardError(
            f"Reward model {name!r}: expected one score per response, shape ({len(responses)},), "
            f"got shape {scores.shape} for a batch that starts with prompt {prompts[0].id!r}, "
            f"response {responses[0][:80]!r}. Return a flat list of floats in the same order."
        )
    bad = np.flatnonzero(np.isnan(scores) if infinite else ~np.isfinite(scores))
    if bad.size:
        first = int(bad[0])
        raise RewardError(
            f"Reward model {name!r}: expected {'numbers' if infinite else 'finite scores'}, got "
            f"{scores[first]} for prompt {prompts[first].id!r}, response "
            f"{responses[first][:80]!r} ({bad.size} of {len(scores)} are not finite)."
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
        raise TypeError("masked values have no score")
    kind = np.asarray(raw).dtype.kind
    if kind in "USMm":
        raise TypeError("dates or durations" if kind in "Mm" else "strings are not numbers")
    return np.asarray(raw, dtype=np.float64)


def _from_tensor(tensor: Any) -> Any:
    """Convert a tensor, which NumPy cannot do for bfloat16, gradients and other devices."""
    if tensor.is_complex():
        raise TypeError("complex numbers")
    return tensor.detach().cpu().double().numpy()


def _charge(
    reward: RewardModel,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    ledgers: Sequence[Ledger] | None,
) -> None:
    if ledgers is None:
        return
    name = f"{reward.name}.flops"
    raw = _guarded(reward.flops, name, prompts[0], prompts, responses)
    flops = _checked(raw, name, prompts, responses)
    calls = reward.reward_calls(prompts, responses)
    for ledger, amount, called in zip(ledgers, flops, calls, strict=True):
        ledger.charge(Usage(reward_calls=called, reward_flops=float(amount)))


def place_of(error: BaseException) -> str:
    """Return where user code raised, such as " (my_rewards.py, line 3)"; "" if it did not."""
    lines = [
        (frame.f_code.co_filename, line)
        for frame, line in walk_tb(error.__traceback__)
        if not str(frame.f_globals.get("__name__")).startswith(("mbrl_text_env", "importlib"))
    ]
    own = [line for file, line in lines if file == lines[0][0]]
    return f" ({lines[0][0]}, line {own[-1]})" if own else ""


def check_finite(
    reward: object, *names: str, above: float = -np.inf, least: float = -np.inf
) -> None:
    """Raise `ValueError` if an attribute is not finite, not above `above`, or below `least`."""
    bound = f" above {above}" if np.isfinite(above) else ""
    bound += f" of at least {least}" if np.isfinite(least) else ""
    for name in names:
        value = getattr(reward, name)
        if not (above < value < np.inf and value >= least):
            raise ValueError(
                f"{type(reward).__name__}: expected {name} to be a finite number{bound}, got "
                f"{value!r}."
            )

"""The reward model's contract, and the one door through which rewards are called.

Nothing but `score_responses` calls `RewardModel.score` in this package, so a reward that fails is
an error with names in it and never a silent zero.
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
    """A reward model raised, or returned something that is not one finite score a response."""


@dataclass(frozen=True)
class Scores:
    """What a reward model said of a batch: `total`, float64[B], and parts of that shape by name.

    A reward without parts has one, with its own name.
    """

    total: FloatArray
    parts: Mapping[str, FloatArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.total)

    def parts_of(self, index: int) -> dict[str, float]:
        """The parts of one response, as plain floats."""
        return {name: float(values[index]) for name, values in self.parts.items()}


class RewardModel(ABC):
    """Scores responses; higher is better. Only `score` has to be written.

    Reports, records and `info` call it by its `name`, by default the class's. Objects of other
    classes with a method `score` become reward models by `as_reward_model`, which everything that
    takes a reward calls.

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
    """Whether a response was found that scores more than `bound` said; then it is not asked."""
    is_verifier: bool = False
    """Whether a response can be expected to reach what `bound` says of the empty prefix, as where a
    program checks it: a search then stops at the first that does."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not hasattr(cls, "name"):
            cls.name = cls.__name__

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> npt.ArrayLike:
        """Return float64[B], the score of `responses[i]` as an answer to `prompts[i]`."""

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Return the scores with those of the parts; a reward made of several has its own."""
        total = _checked(self.score(prompts, responses), self.name, prompts, responses)
        return Scores(total, {self.name: total})

    @property
    def part_names(self) -> tuple[str, ...] | None:
        """The parts that every score has; None where they are not known beforehand."""
        return (self.name,) if _is_default(self.score_parts) else None

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether it can score answers to `prompt`; by default to all."""
        return True

    def bound(self, prompts: Sequence[Prompt], prefixes: Sequence[str]) -> npt.ArrayLike:
        """Return float64[B], the most that a response can score that begins with `prefixes[i]`.

        It is never too low, and may be too high: by default it is infinite. That of the empty
        prefix is the most that any response to the prompt can score. Searches leave prefixes whose
        bound is below what they look for; `check_reward_model` tries it.
        """
        return np.full(len(prefixes), np.inf)

    def suggest(self, prompt: Prompt, prefix: str) -> Sequence[str]:
        """Texts of which one may follow, the likeliest of use first; by default none.

        A search asks where a response would end and its score could still be higher. A text is a
        piece that is missing, such as a word that has to occur or the mark of a list; the language
        model goes on after it.
        """
        return ()

    def feature_names(self, prompt: Prompt) -> Sequence[str]:
        """The counts that `score_features` needs, such as "words"; by default a `RewardError`."""
        raise RewardError(
            f"Reward model {self.name!r}, prompt {prompt.id!r}: expected a program of counts, got "
            "no `feature_names` and `score_features`. Add them, or use another value model."
        )

    def score_features(self, prompt: Prompt, features: Mapping[str, FloatArray]) -> npt.ArrayLike:
        """Return float64[N], the scores of N responses to a prompt by their counts, float64[N].

        They are what `score` says of texts with these counts: a world model scores responses so
        that nobody has written. By default a `RewardError`. See `world_model.TextFeatures`.
        """
        self.feature_names(prompt)
        raise RewardError(f"Reward model {self.name!r} has no `score_features`. Add it.")

    def reward_calls(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[int]:
        """The calls that scores just made are charged as, int[B]; by default one each."""
        return [1] * len(responses)

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> npt.ArrayLike:
        """Return float64[B], the floating-point operations of each score; by default none."""
        return np.zeros(len(responses))

    def flops_bound(self) -> float:
        """The most that `flops` says of one response; a class with `flops` has to say this."""
        if not _is_default(self.flops):
            raise RewardError(
                f"Reward model {self.name!r} has `flops` but no `flops_bound() -> float`, the most "
                "that one response can take; budgets need both. Add it."
            )
        return 0.0

    def usage(self, prompt: Prompt, response: str) -> Usage:
        """What scoring one response is charged."""
        (flops,) = np.asarray(self.flops([prompt], [response]), dtype=np.float64)
        return Usage(reward_calls=1, reward_flops=float(flops))

    def usage_bound(self) -> Usage:
        """The most that scoring one response is charged."""
        return Usage(reward_calls=1, reward_flops=float(self.flops_bound()))

    def reduced(self, dtype: str) -> RewardModel:
        """The same reward in a faster, less exact number format (`"bfloat16"`), for estimates.

        Using one never changes what the other says. By default the reward itself.
        """
        return self

    @property
    def scores_steps(self) -> bool:
        """Whether it is a process reward, with a method `score_steps`."""
        return isinstance(self, ProcessRewardModel)


class ProcessRewardModel(RewardModel):
    """A reward model that also scores the steps of a response."""

    @abstractmethod
    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> npt.ArrayLike:
        """Return float64[len(steps)], exactly one score a step."""


class RowReward(RewardModel):
    """A reward model that scores responses one by one; at most 1, if it does not say otherwise."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B]."""
        return np.array([self._score(*row) for row in zip(prompts, responses, strict=True)])

    def bound(self, prompts: Sequence[Prompt], prefixes: Sequence[str]) -> FloatArray:
        """Return float64[B], what responses that begin so can score."""
        return np.array([self._bound(*row) for row in zip(prompts, prefixes, strict=True)])

    @abstractmethod
    def _score(self, prompt: Prompt, response: str) -> float: ...

    def _bound(self, prompt: Prompt, prefix: str) -> float:
        return 1.0


class Scorer(Protocol):
    """An object that scores: `as_reward_model` makes a reward model of it."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> npt.ArrayLike:
        """Return float64[B]."""
        ...


RewardLike: TypeAlias = RewardModel | Scorer | Callable[..., Any] | str
"""What `rewards.as_reward_model` takes: a reward model, an object or function, or a name."""


class ObjectReward(ProcessRewardModel):
    """An object with a method `score`, and whatever else of a reward model it has."""

    def __init__(self, reward: Any) -> None:
        self.reward = reward
        self.name = str(getattr(reward, "name", type(reward).__name__))
        self.is_verifier = bool(getattr(reward, "is_verifier", False))
        methods = ("score_parts", "applies_to", "bound", "suggest", "flops", "flops_bound")
        for method in (*methods, "feature_names", "score_features"):
            # What a subclass does itself stays.
            if hasattr(reward, method) and _is_default(getattr(self, method)):
                setattr(self, method, getattr(reward, method))

    def __getattr__(self, name: str) -> Any:
        if name == "reward" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.reward, name)

    def identity(self) -> Any:
        """That of the object."""
        return identity(self.reward)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> npt.ArrayLike:
        """The object's."""
        return cast("npt.ArrayLike", self.reward.score(prompts, responses))

    @property
    def part_names(self) -> tuple[str, ...] | None:
        """The object's."""
        if not hasattr(self.reward, "score_parts"):
            return (self.name,)
        named = getattr(self.reward, "part_names", None)
        return None if named is None else tuple(named)

    def reduced(self, dtype: str) -> RewardModel:
        """The object's, or itself."""
        own = getattr(self.reward, "reduced", None)
        return self if own is None else reward_model_of(own(dtype))

    @property
    def scores_steps(self) -> bool:
        """Whether the object does."""
        return hasattr(self.reward, "score_steps")

    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> npt.ArrayLike:
        """The object's."""
        return cast("npt.ArrayLike", self.reward.score_steps(prompt, steps))


def reward_model_of(reward: object) -> RewardModel:
    """A reward model as it is, or that of an object with a method `score`."""
    if isinstance(reward, RewardModel):
        return reward
    if not callable(getattr(reward, "score", None)):
        raise TypeError(
            f"Expected a reward model, with a method `score`, got {type(reward).__name__}. "
            "Make one of a function or a name with `rewards.as_reward_model`."
        )
    return ObjectReward(reward)


def reward_name(reward_model: object) -> str:
    """The name of a reward model, or of its class where it has none."""
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
    """Score responses, check the scores, and charge the ledgers (one a response).

    Raises:
        RewardError: The model raised, returned too few or too many scores, or what is no finite
            number. The message names the model, the prompt and the response.
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
    """float64[B], what `RewardModel.bound` says, checked: minus infinity to infinity, never NaN.

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
    """float64[N], what `RewardModel.score_features` says, checked; uncharged.

    A `RewardError` names the features that the reward needs and are not there, and those that are.
    """
    reward = reward_model_of(reward_model)
    missing = [name for name in reward.feature_names(prompt) if name not in features]
    if missing:
        raise RewardError(
            f"Reward model {reward.name!r}, prompt {prompt.id!r}: expected features that are "
            f"predicted, got {missing}, which are not or never varied. Predicted are "
            f"{sorted(features)}. Fit the world model with these features, on records in which "
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
    """Compare the bounds of the beginnings of responses, up to whole ones, with their scores.

    At the first score above a bound there is a warning, and the reward's bound is ignored from then
    on. What a bound has kept from being written cannot be found; `check_reward_model` looks for it.
    """
    if reward_model.is_bound_wrong or _is_default(reward_model.bound):
        return
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        ends = [len(response) * quarter // 4 for quarter in range(5)]
        prefixes = [response[:end] for end in ends]
        for prefix, bound in zip(
            prefixes, reward_bounds(reward_model, [prompt] * len(ends), prefixes), strict=True
        ):
            # Twice what rounding moves a fraction such as 3 of 3.
            if score > bound + 1e-9:
                reward_model.is_bound_wrong = True
                warnings.warn(
                    f"Reward model {reward_model.name!r}: bound: expected at least {score:g}, the "
                    f"score of {response[:80]!r}, for its beginning {prefix[-80:]!r}, got "
                    f"{bound:g}, prompt {prompt.id!r}. Bounds of this reward are ignored from here "
                    "on. Raise the bound; `check_reward_model` tries it.",
                    stacklevel=2,
                )
                return


def isolate_failures(
    function: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]
) -> list[R | RewardError]:
    """Call a batched function so that an item that cannot be scored costs that item alone.

    A batch that raises `RewardError` is halved, and so are its halves, until the items that fail
    stand alone. Returned are one result an item, or its error.
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
    """Return a reward model that scores steps, or refuse one that does not."""
    reward = reward_model_of(reward_model)
    if not reward.scores_steps:
        raise RewardError(
            f"Reward model {reward.name!r} scores whole responses only: process rewards need a "
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
    """Score the steps of one response, float64[len(steps)]; checked and charged alike."""
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
        # `sys.exit` in a reward must not end a run as if all were well. The whole batch was passed
        # at once, so the first response stands for it in the message.
        responses = args[-1]
        raise RewardError(
            f"Reward model {name!r}, prompt {first.id!r} and {len(responses) - 1} more in its "
            f"batch: scoring raised {type(error).__name__}: {error}{place_of(error)}. First "
            f"response: {responses[0][:80]!r}. Fix the reward model, or leave out such prompts."
        ) from error


def _checked(
    raw: Any, name: str, prompts: Sequence[Prompt], responses: Sequence[str], infinite: bool = False
) -> FloatArray:
    try:
        scores = _as_floats(raw)
    except Exception as error:
        # Whatever refuses to be numbers: tensors and other arrays raise errors of their own.
        raise RewardError(
            f"Reward model {name!r}: expected {len(responses)} numbers, got {raw!r:.80} "
            f"for prompt {prompts[0].id!r}, response {responses[0][:80]!r} ({error})."
        ) from error
    if scores.shape != (len(responses),):
        raise RewardError(
            f"Reward model {name!r}: expected one score a response, shape ({len(responses)},), got "
            f"shape {scores.shape} for prompts from {prompts[0].id!r}, first response "
            f"{responses[0][:80]!r}. Return a flat list of floats in the responses' order."
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
    """Where other people's code raised, such as " (my_rewards.py, line 3)"; "" where it did not."""
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
    """Refuse attributes that are not finite numbers, or not as large as they have to be."""
    bound = f" above {above}" if np.isfinite(above) else ""
    bound += f" of at least {least}" if np.isfinite(least) else ""
    for name in names:
        value = getattr(reward, name)
        if not (above < value < np.inf and value >= least):
            raise ValueError(
                f"{type(reward).__name__}: expected {name} to be a finite number{bound}, got "
                f"{value!r}."
            )

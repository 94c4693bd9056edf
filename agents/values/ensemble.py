"""Many heads on bootstrapped prompts: a mean, and a standard deviation that knows what is rare."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from mbrl_text_env.agents.values.fitted import FittedValue, Sources, value_class
from mbrl_text_env.fitting.folder import Arrays, numbers_of, with_numbers
from mbrl_text_env.fitting.heads import Head, Spread, choose, fitted
from mbrl_text_env.fitting.report import FitError, Samples, root_mean_square, value_report
from mbrl_text_env.types import FloatArray
from mbrl_text_env.values import ValueEstimate

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

_TINY = 1e-12
_FOLDS = 5
# Least share of the error that is noise. Two or three members may agree by chance; where all of the
# error were disagreement, their rows would be infinitely sure and spoil the scale of all others.
_LEAST_NOISE = 0.25


@dataclass(frozen=True)
class EnsembleHead:
    """The mean of members on the same inputs; `scale`, float64[1], calibrates their spread."""

    members: tuple[Head, ...]
    scale: FloatArray

    def predict(self, inputs: FloatArray) -> FloatArray:
        """float64[B] for float64[B, d]."""
        return self.votes(inputs).mean(axis=0)

    def votes(self, inputs: FloatArray) -> FloatArray:
        """float64[members, B]: what each member says."""
        return np.stack([member.predict(inputs) for member in self.members])


def _of_base(name: str) -> Any:
    """A method that is the base's."""

    def method(self: EnsembleValue, *args: Any) -> Any:
        return getattr(self._shared(), name)(*args)

    return method


@dataclass(eq=False, repr=False)
class EnsembleValue(FittedValue):
    """Members fitted on prompts drawn with replacement; their disagreement is part of the spread.

    The inputs of all members are those of the base and are paid for once, so an ensemble costs at
    use what its base costs. The standard deviation joins the members' disagreement and the noise
    that no member explains, by prefix length; it is scaled so that the errors on out-of-bag
    prompts, predicted by the members that have not seen them, are of one standard deviation.

    Source: Breiman, "Bagging predictors", 1996, and "Out-of-bag estimation", 1996. Deviation: whole
    prompts are drawn, not rows.

    Args:
        base: A `FittedValue` to be fitted; it is not changed itself.
        num_members: At least 2; few leave prompts that are in every member's bag.

    Example:
        >>> value = EnsembleValue(StackedValue(lm, reward)).fit(records)  # doctest: +SKIP
    """

    kind = "ensemble"

    base: FittedValue
    num_members: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_members < 2:
            raise ValueError(f"num_members: expected at least 2, got {self.num_members}.")
        if not isinstance(self.base, FittedValue) or isinstance(self.base, EnsembleValue):
            raise ValueError(
                f"base: expected a value model that is fitted on records (a FittedValue), got "
                f"{type(self.base).__name__}. Subclass `agents.values.FittedValue`, which divides "
                "a value model into inputs that members can share and a head of each."
            )

    # Inputs and heads are those of the base, and so is what they cost.
    inputs = _of_base("inputs")
    heads = _of_base("heads")
    final_scores = _of_base("final_scores")
    usage_bound = _of_base("usage_bound")
    expected_usage = _of_base("expected_usage")
    flops = _of_base("flops")
    flops_bound = _of_base("flops_bound")

    def samples(self, records: Sequence[Record]) -> Samples:
        """Those of the base."""
        # A copy, so that one base can serve several ensembles.
        self.base_ = copy.copy(self.base)
        return self.base_.samples(records)

    def estimate(self, inputs: FloatArray, lengths: Sequence[int]) -> ValueEstimate:
        """Mean of the members; disagreement and noise, scaled."""
        votes = self.head_.votes(inputs)
        noise = self.spread_.at(lengths)
        std = self.head_.scale[0] * np.sqrt(votes.var(axis=0, ddof=1) + noise**2)
        return ValueEstimate(votes.mean(axis=0), std)

    def _fit(self, samples: Samples, records: Sequence[Record]) -> None:
        heads = self.heads()
        self.chosen_, _ = choose(heads, samples)
        rng = np.random.default_rng(self.seed)
        rows_of = [np.flatnonzero(samples.groups == group) for group in np.unique(samples.groups)]
        # Row indices of prompts drawn with replacement, a bag for each member.
        bags = [
            np.concatenate([rows_of[i] for i in rng.integers(len(rows_of), size=len(rows_of))])
            for _ in range(self.num_members)
        ]
        members = tuple(fitted(heads[self.chosen_], samples.rows(bag)) for bag in bags)
        out = _out_of_bag(members, bags, samples)
        self.spread_, scale = out.calibrated(slice(None))
        self.head_ = EnsembleHead(members, np.asarray([scale]))
        # The report is of calibrations on other prompts than those that they are measured on.
        std = np.zeros(len(out.mean))
        for fold in range(_FOLDS):
            own = out.samples.groups % _FOLDS == fold
            if own.any():
                noise, scale = out.calibrated(own if own.all() else ~own)
                std[own] = scale * out.std(noise, own)
        found = value_report(out.mean, std, out.samples, len(records))
        self.report_ = replace(found, num_prompts=samples.num_prompts)

    def settings(self) -> dict[str, Any]:
        """Constructor arguments, and the base's kind and settings."""
        base = self._shared()
        inner = {"kind": base.kind, "settings": base.settings()}
        return {"base": inner, "num_members": self.num_members, "seed": self.seed}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], sources: Sources) -> Self:
        """An object with these settings, without its head."""
        kind = value_class(settings["base"]["kind"])
        base = kind.from_settings(settings["base"]["settings"], sources)
        value = cls(**{**settings, "base": base})
        value.base_ = base
        return value

    def head_numbers(self) -> Arrays:
        """All members and the scale, as arrays by name."""
        arrays: Arrays = {"scale": self.head_.scale}
        for i, member in enumerate(self.head_.members):
            arrays |= numbers_of(member, f"member{i}")
        return arrays

    def read_head(self, arrays: Arrays) -> EnsembleHead:
        """The head of `head_numbers`."""
        members = (
            with_numbers(self.heads()[self.chosen_], arrays, f"member{i}")
            for i in range(self.num_members)
        )
        return EnsembleHead(tuple(members), arrays["scale"])

    def _shared(self) -> FittedValue:
        return self.base_ if hasattr(self, "base_") else self.base


class _OutOfBag(NamedTuple):
    """What members say of rows whose prompts at least two have not seen, by those: float64[M]."""

    mean: FloatArray
    disagreement: FloatArray
    samples: Samples

    def std(self, noise: Spread, rows: Any) -> FloatArray:
        """Disagreement and noise, not scaled yet."""
        rest = noise.at(self.samples.lengths[rows])
        return np.asarray(np.sqrt(self.disagreement[rows] ** 2 + rest**2))

    def calibrated(self, rows: Any) -> tuple[Spread, float]:
        """The noise that no member explains, and what both together are to be multiplied with."""
        lengths, errors = self.samples.lengths[rows], (self.mean - self.samples.scores)[rows]
        total, explained = Spread.fit(errors, lengths), Spread.fit(self.disagreement[rows], lengths)
        left = np.maximum(total.stds**2 - explained.stds**2, (_LEAST_NOISE * total.stds) ** 2)
        noise = Spread(total.knots, np.sqrt(left))
        return noise, root_mean_square(errors / np.maximum(self.std(noise, rows), _TINY))


def _out_of_bag(members: Sequence[Head], bags: Sequence[Any], samples: Samples) -> _OutOfBag:
    unseen = np.ones((len(members), len(samples)), dtype=bool)
    for i, bag in enumerate(bags):
        unseen[i, bag] = False
    votes = np.stack([member.predict(samples.inputs) for member in members])
    rows = unseen.sum(axis=0) >= 2
    if not rows.any():
        raise FitError(
            f"Expected prompts that at least 2 of {len(members)} members have not seen, got none: "
            f"the records have {samples.num_prompts} prompts. Collect more prompts, or raise "
            "num_members."
        )
    masked = np.ma.masked_array(votes[:, rows], ~unseen[:, rows])
    mean, std = masked.mean(axis=0), masked.std(axis=0, ddof=1)
    return _OutOfBag(np.asarray(mean), np.asarray(std), samples.rows(rows))

"""What the value models that are fitted on records share.

A value model is `inputs`, which asks the models that cost something and is charged, and a head, an
estimator of scikit-learn on these numbers: fitting many heads pays for the inputs once.
"""

from __future__ import annotations

import copy
import inspect
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from sklearn.base import clone

from mbrl_text_env.files import restored, without_nan
from mbrl_text_env.fitting.folder import Arrays, FolderKind, numbers_of, with_numbers
from mbrl_text_env.fitting.heads import Head, Spread, choose, cross_spread
from mbrl_text_env.fitting.report import FitError, FitReport, Samples, one_reward, value_report
from mbrl_text_env.types import FloatArray, Ledgers, TextState
from mbrl_text_env.values import LENGTHS, ValueEstimate, ValueModel, ValueModelError

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

FOLDER = FolderKind(
    noun="value model",
    writer="a value model's `save` or `mbrl-text fit`",
    config="value.json",
    weights="value.safetensors",
    version=3,
    error=ValueModelError,
)
MODELS = ("tokenizer", "language_model", "reward_model", "encoder")
"""Arguments of constructors that are models: folders do not hold them, their reader gives them."""


def cut_prefixes(
    records: Sequence[Record], lengths: Sequence[int] = LENGTHS
) -> tuple[list[TextState], list[Record]]:
    """Cut partial responses out of complete ones.

    Every length in tokens below a response's own gives one prefix; a response that is too short for
    all of them, but has two tokens, gives its first half.

    Returns:
        The states, and the record that each is a prefix of.

    Raises:
        FitError: A record has no token ids, or no response has two tokens.
    """
    states, owners = [], []
    for record in records:
        size = len(record.response_ids)
        if not record.prompt_ids or (record.response and not size):
            raise FitError(
                f"Record of prompt {record.prompt_id!r}: expected token ids of prompt and "
                f"response, got {len(record.prompt_ids)} and {size}. Collect the records with "
                "`mbrl-text collect`, which keeps them."
            )
        below = [length for length in lengths if length < size]
        for length in below or ([size // 2] if size > 1 else []):
            states.append(record.prefix_state(length))
            owners.append(record)
    if not states:
        raise FitError(
            f"Expected responses of at least 2 tokens, got {len(records)} without a single "
            "prefix. Collect longer responses."
        )
    return states, owners


def samples_of(
    inputs: FloatArray, owners: Sequence[Record], lengths: Sequence[int] | None = None
) -> Samples:
    """Inputs beside the scores of the records that they are of; all have to be finite."""
    from mbrl_text_env.records import scores_of

    inputs = np.asarray(inputs, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(inputs).all(axis=1))
    if bad.size:
        raise FitError(
            f"Expected finite inputs, got others for {bad.size} of {len(owners)} prefixes, first "
            f"of prompt {owners[bad[0]].prompt_id!r}. Fix the encoder or the language model."
        )
    _, groups = np.unique([record.prompt_id for record in owners], return_inverse=True)
    return Samples(
        inputs,
        np.asarray(scores_of(owners), dtype=np.float64),
        np.asarray([0] * len(owners) if lengths is None else lengths, dtype=np.int64),
        groups.astype(np.int64),
    )


def check_records(records: Sequence[Record]) -> None:
    """Refuse (`FitError`) records that no value can be learned from."""
    from mbrl_text_env.records import scores_of

    if len(records) < 2:
        raise FitError(
            f"Expected at least 2 scored records to fit a value model, got {len(records)}. Collect "
            "more with `mbrl-text collect`."
        )
    one_reward(records)
    policies = sorted({record.language_model for record in records})
    if len(policies) > 1:
        raise FitError(
            f"Expected responses of one language model, got those of {policies}. Fit a value for "
            "each."
        )
    _check_scores(np.asarray(scores_of(records)))


def _check_scores(scores: FloatArray) -> None:
    if np.ptp(scores) == 0:
        raise FitError(
            f"Expected scores that differ, got {float(scores[0])!r} {len(scores)} times: there is "
            "no signal to learn from. Collect responses to other prompts, more and longer ones, or "
            "score them with another reward model."
        )


def check_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Prefix lengths; refused with a `ValueError` if they are not increasing and positive."""
    if not lengths or min(lengths) < 1 or list(lengths) != sorted(set(lengths)):
        raise ValueError(
            f"lengths: expected prefix lengths of at least 1 token in increasing order, got "
            f"{tuple(lengths)}."
        )
    return tuple(lengths)


class FittedValue(ValueModel):
    """A value model that learns from records; a subclass says what it sees and how it is fitted.

    `head_` makes the mean of the inputs, `spread_` the standard deviation by prefix length, from
    the errors on prompts left out; `chosen_` names the head, `report_` is the `FitReport`.
    `fitted_settings` names other attributes that a fit sets and a folder keeps as JSON.

    Example:
        >>> class Length(FittedValue):  # ridge on the number of tokens
        ...     kind = "length"
        ...     def inputs(self, states, ledgers=None):
        ...         return np.array([[len(s.response_ids)] for s in states], dtype=float)
        ...     def heads(self):
        ...         return {"ridge": sklearn.linear_model.Ridge()}
    """

    KINDS: ClassVar[dict[str, type[FittedValue]]] = {}
    """The subclasses that are imported, as folders name them."""

    kind: ClassVar[str]
    fitted_settings: ClassVar[tuple[str, ...]] = ()
    head_: Head
    chosen_: str
    spread_: Spread
    report_: FitReport

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in vars(cls):
            FittedValue.KINDS[cls.kind] = cls

    @abstractmethod
    def inputs(self, states: Sequence[TextState], ledgers: Ledgers = None) -> FloatArray:
        """float64[B, d]: what is seen of the states; other models' calls are charged."""

    @abstractmethod
    def heads(self) -> Mapping[str, Head]:
        """Estimators to fit, by name; the one that ranks best on prompts left out is taken."""

    def samples(self, records: Sequence[Record]) -> Samples:
        """What the model is fitted on, uncharged: by default prefixes of `lengths` tokens."""
        states, owners = cut_prefixes(records, self.lengths)
        return samples_of(self.inputs(states), owners, [len(s.response_ids) for s in states])

    def final_scores(self, inputs: FloatArray) -> FloatArray | None:
        """float64[B]: the rewards of the texts as they are, where the inputs tell them."""
        return None

    @property
    def is_fitted(self) -> bool:
        """Whether there is something to predict with."""
        return hasattr(self, "head_")

    def fit(self, records: Sequence[Record]) -> Self:
        """Fit on scored responses; a fit that fails leaves the model as it was.

        Raises:
            FitError: There are fewer than two records, they are of several rewards or language
                models, all score the same, or they have no token ids.
        """
        check_records(records)
        value = copy.copy(self)
        samples = value.samples(records)
        _check_scores(samples.scores)
        heads = value.heads()
        value.chosen_, guess = choose(heads, samples)
        value.head_ = clone(heads[value.chosen_]).fit(samples.inputs, samples.scores)
        mean = None if guess is None else guess.mean
        std = None if guess is None else cross_spread(guess, samples)
        errors = (samples.scores.mean() if mean is None else mean) - samples.scores
        value.spread_ = Spread.fit(errors, samples.lengths)
        value.report_ = value_report(mean, std, samples, len(records))
        value.reward_name_ = records[0].reward_name
        value.language_model_name_ = records[0].language_model
        vars(self).update(vars(value))
        return self

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        """Mean and standard deviation, each float64[B]; uncharged."""
        return self.predict_with(states, None)

    def predict_with(self, states: Sequence[TextState], ledgers: Ledgers) -> ValueEstimate:
        """`predict`, with what other models take charged to the ledgers, one a state.

        A response that has ended is worth its score, where the model sees that, and no guess.
        """
        if not self.is_fitted:
            raise ValueModelError(
                f"{type(self).__name__} is not fitted. Call fit(records), or load a saved one "
                "with `mbrl_text_env.agents.values.load_value`."
            )
        if not states:
            return ValueEstimate(np.zeros(0), np.zeros(0))
        inputs = self.inputs(states, ledgers)
        estimate = self.estimate(inputs, [len(state.response_ids) for state in states])
        final = self.final_scores(inputs)
        if final is None:
            return estimate
        ended = np.asarray([state.finish_reason is not None for state in states])
        return ValueEstimate(
            np.where(ended, final, estimate.mean), np.where(ended, 0.0, estimate.std)
        )

    def estimate(self, inputs: FloatArray, lengths: Sequence[int]) -> ValueEstimate:
        """The values of prefixes by their inputs, float64[B, d], and lengths in tokens."""
        return ValueEstimate(self.head_.predict(inputs), self.spread_.at(lengths))

    def save(self, folder: str | Path) -> None:
        """Write the fitted model, JSON and safetensors; one that is there is replaced."""
        name = type(self).__name__
        if not hasattr(self, "head_"):
            raise ValueModelError(f"Only a fitted {name} can be saved. Call fit(records).")
        names = inspect.signature(type(self)).parameters.keys() - {*MODELS}
        try:
            settings = {n: getattr(self, n) for n in sorted({*names, *self.fitted_settings})}
            json.dumps(settings)
            arrays = numbers_of(self.head_, "head")
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueModelError(
                f"{name} cannot be saved: expected arguments that are JSON values, kept as "
                f"attributes of the same name, and a head of known numbers ({error})."
            ) from error
        arrays |= {f"spread.{part}": rows for part, rows in self.spread_._asdict().items()}
        config = {
            "kind": self.kind,
            "settings": settings,
            "chosen": self.chosen_,
            "reward": self.reward_name_,
            "language_model": self.language_model_name_,
            "report": without_nan(asdict(self.report_)),
        }
        FOLDER.write(folder, config, arrays)

    @classmethod
    def read(cls, config: Mapping[str, Any], arrays: Arrays, models: Mapping[str, Any]) -> Self:
        """The value model of which `save` wrote this; `models` are given by `MODELS`."""
        found = {name: config["settings"][name] for name in cls.fitted_settings}
        given = {n: models[n] for n in models.keys() & inspect.signature(cls).parameters.keys()}
        value = cls(**given, **{n: v for n, v in config["settings"].items() if n not in found})
        vars(value).update(found)
        value.chosen_ = config["chosen"]
        value.reward_name_ = config["reward"]
        value.language_model_name_ = config["language_model"]
        value.report_ = restored(FitReport, config["report"])
        value.spread_ = Spread(arrays["spread.knots"], arrays["spread.stds"])
        value.head_ = with_numbers(value.heads()[value.chosen_], arrays, "head")
        return value

"""The base class of value models that are fitted on records.

A value model has `inputs`, computed by models whose usage is charged, and a head: a scikit-learn
estimator on these inputs. Several heads can be fitted on inputs that are computed once.
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
"""Constructor arguments that are models. They are not saved; the caller passes them on loading."""


def cut_prefixes(
    records: Sequence[Record], lengths: Sequence[int] = LENGTHS
) -> tuple[list[TextState], list[Record]]:
    """Cut prefixes from complete responses.

    Each length in tokens that is below a response's own length gives one prefix. A response of at
    least two tokens that is too short for all lengths gives its first half.

    Returns:
        The states, and for each state its record.

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
            f"Expected responses of at least 2 tokens, got {len(records)} without any "
            "prefix. Collect longer responses."
        )
    return states, owners


def samples_of(
    inputs: FloatArray, owners: Sequence[Record], lengths: Sequence[int] | None = None
) -> Samples:
    """Inputs with the scores of their records; raise a FitError unless all inputs are finite."""
    from mbrl_text_env.records import scores_of

    inputs = np.asarray(inputs, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(inputs).all(axis=1))
    if bad.size:
        raise FitError(
            f"Expected finite inputs, got others for {bad.size} of {len(owners)} prefixes, first "
            f"for prompt {owners[bad[0]].prompt_id!r}. Check the encoder or the language model."
        )
    _, groups = np.unique([record.prompt_id for record in owners], return_inverse=True)
    return Samples(
        inputs,
        np.asarray(scores_of(owners), dtype=np.float64),
        np.asarray([0] * len(owners) if lengths is None else lengths, dtype=np.int64),
        groups.astype(np.int64),
    )


def check_records(records: Sequence[Record]) -> None:
    """Raise a `FitError` if no value model can be fitted on the records."""
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
            "no signal to learn from. Collect responses to other prompts, longer ones or more, "
            "or score them with another reward model."
        )


def check_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Check prefix lengths; raise a `ValueError` unless they are positive and increasing."""
    if not lengths or min(lengths) < 1 or list(lengths) != sorted(set(lengths)):
        raise ValueError(
            f"lengths: expected prefix lengths of at least 1 token in increasing order, got "
            f"{tuple(lengths)}."
        )
    return tuple(lengths)


class FittedValue(ValueModel):
    """Base class of value models fitted on records; a subclass defines the inputs and heads.

    After a fit, `head_` predicts the mean from the inputs, and `spread_` the standard deviation by
    prefix length, from the errors on held-out prompts; `chosen_` is the head's name and `report_`
    the `FitReport`. `fitted_settings` names further fitted attributes to save as JSON.

    Example:
        >>> class Length(FittedValue):  # ridge on the number of tokens
        ...     kind = "length"
        ...     def inputs(self, states, ledgers=None):
        ...         return np.array([[len(s.response_ids)] for s in states], dtype=float)
        ...     def heads(self):
        ...         return {"ridge": sklearn.linear_model.Ridge()}
    """

    KINDS: ClassVar[dict[str, type[FittedValue]]] = {}
    """Imported subclasses, by their name in saved folders."""

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
        """Compute the inputs of the states, float64[B, d]; calls of other models are charged."""

    @abstractmethod
    def heads(self) -> Mapping[str, Head]:
        """Estimators to fit, by name; the one that ranks held-out prompts best is used."""

    def samples(self, records: Sequence[Record]) -> Samples:
        """Samples to fit on, uncharged: by default prefixes of `lengths` tokens."""
        states, owners = cut_prefixes(records, self.lengths)
        return samples_of(self.inputs(states), owners, [len(s.response_ids) for s in states])

    def final_scores(self, inputs: FloatArray) -> FloatArray | None:
        """Return the rewards of the texts as they are, float64[B], if the inputs contain them."""
        return None

    @property
    def is_fitted(self) -> bool:
        """Whether the model can predict."""
        return hasattr(self, "head_")

    def fit(self, records: Sequence[Record]) -> Self:
        """Fit on scored responses. If fitting fails, the model is unchanged.

        Raises:
            FitError: There are fewer than two records, they mix rewards or language models, all
                scores are equal, or the token ids are missing.
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
        """Predict mean and standard deviation, each float64[B]. Nothing is charged."""
        return self.predict_with(states, None)

    def predict_with(self, states: Sequence[TextState], ledgers: Ledgers) -> ValueEstimate:
        """`predict`, charging the calls of other models to the ledgers, one per state.

        If the inputs contain the score of the text, an ended response has that value, with std 0.
        """
        if not self.is_fitted:
            raise ValueModelError(
                f"{type(self).__name__} is not fitted. Call fit(records), or load a fitted one "
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
        """Estimate the values of prefixes from inputs, float64[B, d], and lengths in tokens."""
        return ValueEstimate(self.head_.predict(inputs), self.spread_.at(lengths))

    def save(self, folder: str | Path) -> None:
        """Save the fitted model as JSON and safetensors, replacing an existing one."""
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
                f"{name} cannot be saved: expected constructor arguments that are JSON values, "
                f"kept as attributes of the same name, and a head of a known class ({error})."
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
        """Load a value model that `save` wrote; `models` has the arguments named in `MODELS`."""
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

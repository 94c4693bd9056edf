"""What the value models that are fitted on records share.

A value model is `inputs`, which asks the models that cost something and is charged, and a head, an
estimator of scikit-learn on these numbers: fitting many heads pays for the inputs once.
"""

from __future__ import annotations

import inspect
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from mbrl_text_env.fitting.folder import Arrays, FolderKind, numbers_of, with_numbers
from mbrl_text_env.fitting.heads import Head, Spread, choose, cross_spread, fitted
from mbrl_text_env.fitting.report import FitError, FitReport, Samples, value_report
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
# Arguments of constructors that are models, and the field of `Sources` that takes their place.
_MODELS = {
    "tokenizer": "tokenizer",
    "language_model": "tokenizer",
    "reward_model": "reward_model",
    "encoder": "encoder",
}


class Sources(NamedTuple):
    """The models that a value model works with: of a folder, those that the reader gives."""

    tokenizer: Any
    reward_model: Any = None
    encoder: Any = None


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
    for what, names, change in (
        (
            "scores of one reward model",
            {record.reward_name for record in records},
            "Re-score the records with one of them (`records.rescore`).",
        ),
        (
            "responses of one language model",
            {record.language_model for record in records},
            "A value is that of what one model writes: fit one for each.",
        ),
    ):
        if len(names) > 1:
            raise FitError(f"Expected {what}, got those of {sorted(names)}. {change}")
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

    Example:
        >>> class Length(FittedValue):  # ridge on the number of tokens
        ...     kind = "length"
        ...     def inputs(self, states, ledgers=None):
        ...         return np.array([[len(s.response_ids)] for s in states], dtype=float)
        ...     def heads(self):
        ...         return {"ridge": sklearn.linear_model.Ridge()}
    """

    kind: ClassVar[str]
    fitted_settings: ClassVar[tuple[str, ...]] = ()
    head_: Head

    @abstractmethod
    def inputs(self, states: Sequence[TextState], ledgers: Ledgers = None) -> FloatArray:
        """float64[B, d]: what is seen of the states; other models' calls are charged."""

    def samples(self, records: Sequence[Record]) -> Samples:
        """What the model is fitted on, uncharged: by default prefixes of `lengths` tokens."""
        states, owners = cut_prefixes(records, self.lengths)
        return samples_of(self.inputs(states), owners, [len(s.response_ids) for s in states])

    @abstractmethod
    def heads(self) -> Mapping[str, Head]:
        """Estimators to fit, by name; the one that ranks best on prompts left out is taken."""

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
            FitError: See `check_records`; or the records have no token ids.
        """
        check_records(records)
        before = dict(vars(self))
        try:
            samples = self.samples(records)
            _check_scores(samples.scores)
            self._fit(samples, records)
        except BaseException:
            # Half of a new fit and half of a former one would predict nonsense.
            vars(self).clear()
            vars(self).update(before)
            raise
        self.reward_name_ = records[0].reward_name
        self.language_model_name_ = records[0].language_model
        return self

    def _fit(self, samples: Samples, records: Sequence[Record]) -> None:
        heads = self.heads()
        self.chosen_, guess = choose(heads, samples)
        self.head_ = fitted(heads[self.chosen_], samples)
        mean = None if guess is None else guess.mean
        std = None if guess is None else cross_spread(guess, samples)
        errors = (samples.scores.mean() if mean is None else mean) - samples.scores
        self.spread_ = Spread.fit(errors, samples.lengths)
        self.report_ = value_report(mean, std, samples, len(records))

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
        if not hasattr(self, "head_"):
            raise ValueModelError(
                f"Only a fitted {type(self).__name__} can be saved. Call fit(records)."
            )
        config = {
            "kind": self.kind,
            "settings": self.settings(),
            "chosen": self.chosen_,
            "reward": self.reward_name_,
            "language_model": self.language_model_name_,
            "report": self.report_.to_dict(),
        }
        arrays = {f"spread.{name}": values for name, values in self.spread_._asdict().items()}
        try:
            arrays |= self.head_numbers()
        except ValueError as error:
            raise ValueModelError(f"{type(self).__name__} cannot be saved: {error}.") from error
        FOLDER.write(folder, config, arrays)

    @classmethod
    def restored(cls, config: Mapping[str, Any], arrays: Arrays, sources: Sources) -> Self:
        """The value model of which `save` wrote this."""
        if config["kind"] != cls.kind:
            raise ValueError(f"a value of kind {config['kind']!r}, expected {cls.kind!r}")
        value = cls.from_settings(config["settings"], sources)
        value.chosen_ = config["chosen"]
        value.reward_name_ = config["reward"]
        value.language_model_name_ = config["language_model"]
        value.report_ = FitReport.from_dict(config["report"])
        value.spread_ = Spread(arrays["spread.knots"], arrays["spread.stds"])
        value.head_ = value.read_head(arrays)
        return value

    def settings(self) -> dict[str, Any]:
        """What a folder keeps besides the head: arguments but models, and `fitted_settings`."""
        names = inspect.signature(type(self)).parameters.keys() - _MODELS.keys()
        try:
            found = {name: getattr(self, name) for name in sorted({*names, *self.fitted_settings})}
            json.dumps(found)
        except (AttributeError, TypeError) as error:
            raise ValueModelError(
                f"{type(self).__name__} cannot be saved: expected arguments that are JSON values, "
                f"kept as attributes of the same name ({error}). Change them, or add `settings` "
                "and `from_settings`."
            ) from error
        return found

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], sources: Sources) -> Self:
        """An object with these settings, without its head."""
        wanted = _MODELS.keys() & inspect.signature(cls).parameters.keys()
        models = {name: getattr(sources, _MODELS[name]) for name in wanted}
        found = {name: settings[name] for name in cls.fitted_settings}
        value = cls(**models, **{n: v for n, v in settings.items() if n not in found})
        vars(value).update(found)
        return value

    def head_numbers(self) -> Arrays:
        """The fitted head as arrays by name."""
        return numbers_of(self.head_, "head")

    def read_head(self, arrays: Arrays) -> Head:
        """The head of `head_numbers`."""
        return with_numbers(self.heads()[self.chosen_], arrays, "head")


def value_class(kind: str) -> type[FittedValue]:
    """The subclass of a kind, of those that are imported."""
    found: dict[str, type[FittedValue]] = {}
    waiting = list(FittedValue.__subclasses__())
    while waiting:
        waiting += (cls := waiting.pop()).__subclasses__()
        if "kind" in vars(cls):
            found.setdefault(cls.kind, cls)
    if kind not in found:
        raise ValueError(f"kind {kind!r}, expected one of {sorted(found)}")
    return found[kind]

"""What the value models that are fitted on records share.

A value model is split in two: `inputs`, which asks the models that cost something (an encoder, the
reward model, the language model) and is charged, and a head, an estimator of scikit-learn, which is
arithmetic on these numbers. So fitting many heads, as validation and `EnsembleValue` do, pays for
the inputs once.
"""

from __future__ import annotations

import inspect
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from mbrl_text_env.agents.values.training_prefixes import check_records
from mbrl_text_env.fitting.folder import Arrays, FolderKind, numbers_of, with_numbers
from mbrl_text_env.fitting.heads import Head, Spread, choose, cross_spread, fitted
from mbrl_text_env.fitting.report import FitReport, value_report
from mbrl_text_env.fitting.samples import FitError, Samples
from mbrl_text_env.types import FloatArray, Ledger, TextState
from mbrl_text_env.values import ValueEstimate, ValueModel, ValueModelError

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


class FittedValue(ValueModel):
    """A value model that learns from records; a subclass says what it sees and how it is fitted.

    Attributes:
        head_: What makes the mean of the inputs, fitted.
        spread_: `Spread`, the standard deviation by prefix length, of the errors on prompts left
            out.
        chosen_: Name of the head, where there were several to choose from.
        report_: `FitReport` of the fit, on prompts left out.
        reward_name_: The reward model whose scores it was fitted on.
        language_model_name_: The language model that wrote the responses.

    Example:
        >>> class Length(FittedValue):  # ridge on the number of tokens
        ...     kind = "length"
        ...     def inputs(self, states, ledgers=None):
        ...         return np.array([[len(s.response_ids)] for s in states], dtype=float)
        ...     def samples(self, records):
        ...         states, owners = cut_prefixes(records)
        ...         lengths = [len(state.response_ids) for state in states]
        ...         return samples_of(self.inputs(states), owners, lengths)
        ...     def heads(self):
        ...         return {"ridge": sklearn.linear_model.Ridge()}
    """

    kind: ClassVar[str]
    fitted_settings: ClassVar[tuple[str, ...]] = ()
    head_: Head

    @abstractmethod
    def inputs(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger] | None = None
    ) -> FloatArray:
        """float64[B, d]: what is seen of the states; other models' calls are charged."""

    @abstractmethod
    def samples(self, records: Sequence[Record]) -> Samples:
        """What the model is fitted on; asks the models that cost something, uncharged."""

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
            FitError: The records are fewer than two, of several reward models or language models,
                without token ids, or all scored the same.
        """
        check_records(records)
        before = dict(vars(self))
        try:
            samples = self.samples(records)
            if np.ptp(samples.scores) == 0:
                raise FitError(
                    "Expected prefixes of responses whose scores differ, got one score: there is "
                    "no signal to learn from. Collect more responses, and longer ones."
                )
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
        if guess is None:
            deviations = samples.scores - samples.scores.mean()
            self.spread_ = Spread.fit(deviations, samples.lengths)
            self.report_ = value_report(None, None, samples, len(records))
            return
        self.spread_ = Spread.fit(guess.mean - samples.scores, samples.lengths)
        std = cross_spread(guess, samples)
        self.report_ = value_report(guess.mean, std, samples, len(records))

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        """Mean and standard deviation, each float64[B]; uncharged.

        Raises:
            ValueModelError: The model is not fitted.
        """
        return self.predict_with(states, None)

    def predict_with(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger] | None
    ) -> ValueEstimate:
        """`predict`, with what other models take charged to the ledgers, one a state.

        A response that has ended is worth its score, where the model sees that, and no guess.

        Raises:
            ValueModelError: The model is not fitted.
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
        """Write the fitted model, JSON and safetensors; one that is there is replaced.

        Raises:
            ValueModelError: The model is not fitted, its head is not known, or the folder holds
                something else.
        """
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
        spread = {f"spread.{name}": values for name, values in self.spread_._asdict().items()}
        try:
            arrays = {**self.head_numbers(), **spread}
        except ValueError as error:
            raise ValueModelError(f"{type(self).__name__} cannot be saved: {error}.") from error
        FOLDER.write(folder, config, arrays)

    @classmethod
    def restored(cls, config: Mapping[str, Any], arrays: Arrays, sources: Sources) -> Self:
        """Make a value model of what `save` wrote.

        Raises:
            KeyError, TypeError, ValueError: Something is missing or wrong.
        """
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
        """What a folder keeps of the constructor's arguments and of the fit, besides the head.

        These are all arguments but the models, which are kept as attributes of the same name.
        """
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
        """An object with these settings, without its head.

        Raises:
            KeyError, TypeError: A setting is missing, or not known.
        """
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
    """The subclass of a kind, of those that are imported.

    Raises:
        ValueError: There is none.
    """
    found: dict[str, type[FittedValue]] = {}
    waiting = list(FittedValue.__subclasses__())
    while waiting:
        waiting += (cls := waiting.pop()).__subclasses__()
        if "kind" in vars(cls):
            found.setdefault(cls.kind, cls)
    if kind not in found:
        raise ValueError(f"kind {kind!r}, expected one of {sorted(found)}")
    return found[kind]

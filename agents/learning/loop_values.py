"""A loop's value model: fitted for one policy, tried on the next, fitted again or taken over."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from mbrl_text_env.agents.learning.presets import LoopSettings
from mbrl_text_env.agents.learning.reports import ValueReport, check_value
from mbrl_text_env.agents.values import READY, FittedValue, load_value, make_value
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.records import Record
from mbrl_text_env.rewards.base import RewardModel, Scores, score_responses
from mbrl_text_env.types import FloatArray, Ledger, Prompt
from mbrl_text_env.values import ValueModel, check_value_fits

ValueFactory = Callable[[LanguageModel, RewardModel], FittedValue]
"""Makes a value model to fit, of a class that `load_value` reads."""

Sample = Callable[[Path, LanguageModel], list[Record]]
"""Writes plain samples of a policy to a folder, and gives them back."""

_MODEL, _RECORDS = "model", "records"


class ValueBefore(NamedTuple):
    """The value model of an iteration, as the next one finds it; `policy` is whose it is."""

    folder: Path
    policy: LanguageModel
    report: ValueReport


class _Charged:
    """A reward model that charges a ledger for all that it scores; fits charge nothing."""

    def __init__(self, reward_model: RewardModel, ledger: Ledger) -> None:
        self._reward_model = reward_model
        self._ledger = ledger

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._reward_model, name)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        return self.score_parts(prompts, responses).total

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        charged = [self._ledger] * len(responses)
        return score_responses(self._reward_model, prompts, responses, ledgers=charged)


@dataclass
class LoopValues:
    """Makes, checks and reads a loop's value models; the fields are `ExpertIteration`'s."""

    settings: LoopSettings
    reward_model: RewardModel
    encoder: Encoder | None
    factory: ValueFactory | None
    first: FittedValue | None

    @property
    def is_wanted(self) -> bool:
        """Whether the loop has a value model."""
        given = (self.settings.value, self.factory, self.first)
        return any(part is not None for part in given)

    @property
    def _is_ready(self) -> bool:
        """Whether it needs no fit, and is that of any policy."""
        return self.settings.value in READY and self.factory is None and self.first is None

    def load(self, folder: Path, policy: LanguageModel) -> ValueModel:
        """The value model of a stage's folder; `ValueModelError` if it is another policy's."""
        return self._made(policy) if self._is_ready else self._read(folder, policy)

    def renew(
        self,
        folder: Path,
        policy: LanguageModel,
        fresh: Sequence[Record],
        sample: Sample,
        ledger: Ledger,
        *,
        iteration: int,
        before: ValueBefore | None,
    ) -> ValueReport:
        """Make the value model of an iteration.

        Args:
            folder: Where it is written, with the records that it was fitted on.
            policy: Whose responses it is to value.
            fresh: Responses of this policy to prompts that no value is fitted on.
            sample: Makes the records to fit on.
            ledger: Is charged for the checks, and for what a fit asks of the reward model.
            iteration: The iteration's number.
            before: The value model of the iteration before; None for the base model's.
        """
        if self._is_ready:
            found = check_value(self._made(policy), fresh, ledger=ledger)
            return ValueReport(iteration, False, found, None, found, None)
        if before is None:
            first = self.first
            if first is None:
                first = self._fitted(sample(folder / _RECORDS, policy), policy, ledger)
            check_value_fits(first, policy, self.reward_model)
            first.save(folder / _MODEL)
            found = check_value(self._read(folder, policy), fresh, ledger=ledger)
            return ValueReport(iteration, self.first is None, found, None, found, None)
        last = before.report
        reference = last.after if last.fitted_at == iteration - 1 else last.when_fitted
        old = check_value(self._carried(before, folder, policy), fresh, ledger=ledger)
        ratio = old.error / reference.error if reference.error > 0 else float("inf")
        if self._is_due(ratio):
            records = sample(folder / _RECORDS, policy)
            if len({record.score for record in records}) > 1:
                self._fitted(records, policy, ledger).save(folder / _MODEL)
                after = check_value(self._read(folder, policy), fresh, ledger=ledger)
                return ValueReport(iteration, True, reference, old, after, ratio)
            # What a policy ends in that has learned all there is.
            warnings.warn(
                f"Iteration {iteration}: all responses that a value model was to be fitted on "
                f"score {records[0].score:.4g}; the one before is taken over.",
                stacklevel=2,
            )
        if self.settings.stale_value == "error":
            shutil.rmtree(folder)
        return ValueReport(last.fitted_at, False, reference, old, old, ratio)

    def _is_due(self, error_ratio: float) -> bool:
        if self.settings.stale_value == "refit-if-worse":
            return not error_ratio <= self.settings.error_factor
        return self.settings.stale_value == "refit"

    def _carried(self, before: ValueBefore, folder: Path, policy: LanguageModel) -> FittedValue:
        """The old value model, taken for one of this policy's."""
        old = self._read(before.folder, before.policy)
        old.language_model_name_ = policy.name
        # Written and read again: a value that looks into a policy then looks into this one.
        old.save(folder / _MODEL)
        return self._read(folder, policy)

    def _fitted(
        self, records: Sequence[Record], policy: LanguageModel, ledger: Ledger
    ) -> FittedValue:
        """Fitted, and to be saved and read again: this one goes on charging the ledger."""
        value = self._made(policy, cast("RewardModel", _Charged(self.reward_model, ledger)))
        assert isinstance(value, FittedValue)
        return value.fit(records)

    def _made(self, policy: LanguageModel, reward_model: RewardModel | None = None) -> ValueModel:
        reward_model = self.reward_model if reward_model is None else reward_model
        if self.factory is not None:
            return self.factory(policy, reward_model)
        settings = self.settings
        if settings.value is None:
            raise ValueError(
                "value_model: expected settings.value or a value_factory beside it, which say what "
                "is fitted for the next policies; got neither."
            )
        limits = {"max_response_tokens": settings.max_response_tokens, "seed": settings.seed}
        return make_value(settings.value, policy, reward_model, encoder=self.encoder, **limits)

    def _read(self, folder: Path, policy: LanguageModel) -> FittedValue:
        return load_value(folder / _MODEL, policy, self.reward_model, self.encoder)

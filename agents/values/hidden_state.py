"""A value model on the language model's own hidden state."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mbrl_text_env.agents.values.fitted import FittedValue, Sources
from mbrl_text_env.agents.values.heads import fit_ridge
from mbrl_text_env.agents.values.prefixes import (
    LENGTHS,
    Samples,
    check_lengths,
    cut_prefixes,
    samples_of,
)
from mbrl_text_env.agents.values.validation import Fitter
from mbrl_text_env.language_models.base import FeatureModel, LanguageModel
from mbrl_text_env.ledger import Ledger, Usage
from mbrl_text_env.types import FloatArray, TextState
from mbrl_text_env.values import ValueModelError

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

_ALPHAS = (10.0, 100.0, 1000.0, 10000.0)


class HiddenStateValue(FittedValue):
    """Ridge regression on `language_model.features`, the last hidden state of the prefix.

    It needs no other model, and after sampling from the same state the language model has most of
    the prefix in its cache. The penalty is on inputs of variance 1.

    Args:
        language_model: One that has `features`.
        alphas: Strengths of the penalty, of which the best on prompts left out is taken.
        lengths: Prefix lengths in tokens that it is fitted on.

    Raises:
        ValueError: A penalty is not above 0, or `lengths` are not positive and increasing.

    Example:
        >>> value = HiddenStateValue(embedded()).fit(read_records("records"))  # doctest: +SKIP
        >>> value.chosen_  # doctest: +SKIP
        'alpha=1000'
    """

    kind = "hidden_state"

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        alphas: Sequence[float] = _ALPHAS,
        lengths: Sequence[int] = LENGTHS,
    ) -> None:
        if not alphas or not min(alphas) > 0:
            raise ValueError(f"alphas: expected numbers above 0, got {tuple(alphas)}.")
        check_lengths(lengths)
        self.language_model = language_model
        self.alphas = tuple(alphas)
        self.lengths = tuple(lengths)

    def inputs(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger] | None = None
    ) -> FloatArray:
        """float64[B, feature_size]; charged as calls of the language model.

        Raises:
            ValueModelError: The language model has no features.
        """
        if not isinstance(self.language_model, FeatureModel):
            raise ValueModelError(
                f"Expected a language model with `features`, got "
                f"{type(self.language_model).__name__}, which has none (a server gives text and "
                "probabilities alone). Use TransformersLM, or another value model, such as "
                "StackedValue."
            )
        return self.language_model.features(states, ledgers=ledgers).astype(np.float64)

    def samples(self, records: Sequence[Record]) -> Samples:
        """Prefixes of many lengths."""
        states, owners = cut_prefixes(records, self.lengths)
        return samples_of(self.inputs(states), owners, [len(s.response_ids) for s in states])

    def fitters(self, samples: Samples) -> Mapping[str, Fitter]:
        """Ridge regression with each of the penalties."""
        return {
            f"alpha={alpha:g}": functools.partial(fit_ridge, alpha=alpha, standardise=True)
            for alpha in self.alphas
        }

    def usage_bound(self, state: TextState) -> Usage:
        """The most that reading one prefix is charged."""
        return self.language_model.usage_bound(len(state.prompt_ids) + len(state.response_ids), [])

    def settings(self) -> dict[str, Any]:
        """Penalties and lengths."""
        return {"alphas": list(self.alphas), "lengths": list(self.lengths)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], sources: Sources) -> HiddenStateValue:
        """See `FittedValue.from_settings`."""
        return cls(sources.language_model(), **settings)

"""A value model on the language model's own hidden state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mbrl_text_env.agents.values.fitted import FittedValue
from mbrl_text_env.agents.values.training_prefixes import check_lengths, cut_samples
from mbrl_text_env.fitting.heads import Head, scaled_ridge
from mbrl_text_env.fitting.samples import Samples
from mbrl_text_env.language_models.base import FeatureModel, LanguageModel
from mbrl_text_env.types import FloatArray, Ledger, TextState, Usage
from mbrl_text_env.values import LENGTHS, ValueModelError

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
        return cut_samples(self, records)

    def heads(self) -> Mapping[str, Head]:
        """Ridge regression with each of the penalties."""
        return {f"alpha={alpha:g}": scaled_ridge(alpha) for alpha in self.alphas}

    def usage_bound(self, state: TextState) -> Usage:
        """The most that reading one prefix is charged."""
        return self.language_model.usage_bound(len(state.prompt_ids) + len(state.response_ids), [])

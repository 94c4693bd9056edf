"""A value that costs next to nothing: a head on the language model's token embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mbrl_text_env.agents.values.fitted import FittedValue, samples_of
from mbrl_text_env.fitting.heads import Head, scaled_ridge
from mbrl_text_env.fitting.report import FitError, Samples
from mbrl_text_env.types import FloatArray, Ledger, TextState
from mbrl_text_env.values import ValueModelError

if TYPE_CHECKING:
    from mbrl_text_env.records import Record


@dataclass(eq=False, repr=False)
class TokenEmbeddingValue(FittedValue):
    """Ridge regression on the mean of the response's token embeddings, which are looked up.

    It is fitted on complete responses and applied to prefixes: what a response says so far, as a
    bag of tokens. No model is run, so it is for rewards that are too expensive to ask of a prefix.
    Its standard deviation is that of complete responses, and too small for short prefixes.

    Source: Joulin et al., "Bag of Tricks for Efficient Text Classification", 2017. Deviation: the
    embeddings are the language model's input embeddings, and stay as they are.

    Args:
        language_model: A `TransformersLM`.
        alphas: Strengths of the penalty, of which the best on prompts left out is taken.

    Example:
        >>> value = TokenEmbeddingValue(embedded()).fit(read_records("records"))  # doctest: +SKIP
        >>> value.chosen_  # doctest: +SKIP
        'alpha=1000'
    """

    kind = "token_embedding"
    language_model: Any
    _: KW_ONLY
    alphas: Sequence[float] = (100.0, 1000.0, 10000.0)

    def __post_init__(self) -> None:
        self.alphas = tuple(self.alphas)
        if not self.alphas or not min(self.alphas) > 0:
            raise ValueError(f"alphas: expected numbers above 0, got {self.alphas}.")

    def inputs(
        self, states: Sequence[TextState], ledgers: Sequence[Ledger] | None = None
    ) -> FloatArray:
        """float64[B, d]: the mean embedding of the response's tokens; 0 for an empty one."""
        table = self._table()
        found = np.zeros((len(states), table.shape[1]))
        for i, state in enumerate(states):
            if state.response_ids:
                rows = table[list(state.response_ids)].float().cpu().numpy()
                found[i] = rows.mean(axis=0, dtype=np.float64)
        return found

    def samples(self, records: Sequence[Record]) -> Samples:
        """The complete responses."""
        if missing := [r.prompt_id for r in records if r.response and not r.response_ids]:
            raise FitError(
                f"Record of prompt {missing[0]!r}: expected token ids of the response, got none. "
                "Collect the records with `mbrl-text collect`, which keeps them."
            )
        states = [record.prefix_state(len(record.response_ids)) for record in records]
        return samples_of(self.inputs(states), records)

    def heads(self) -> Mapping[str, Head]:
        """Ridge regression with each of the penalties."""
        return {f"alpha={alpha:g}": scaled_ridge(alpha) for alpha in self.alphas}

    def flops(self, states: Sequence[TextState]) -> FloatArray:
        """float64[B]: the sum of the embeddings, and the head's product."""
        size = self._table().shape[1]
        return np.array([(len(s.response_ids) + 2.0) * size for s in states])

    def flops_bound(self) -> float:
        """A response that fills the context."""
        return (self.language_model.context_length + 2.0) * self._table().shape[1]

    def _table(self) -> Any:
        """The input embeddings, float[vocab_size, d]."""
        model: Any = getattr(self.language_model, "model", None)
        if not hasattr(model, "get_input_embeddings"):
            raise ValueModelError(
                "Expected a language model whose token embeddings can be read, such as "
                f"TransformersLM, got {type(self.language_model).__name__}. Use another value "
                "model, such as EmbeddingValue."
            )
        return model.get_input_embeddings().weight.detach()

"""A value that costs next to nothing: a head on the language model's token embeddings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mbrl_text_env.agents.values.fitted import FittedValue, samples_of
from mbrl_text_env.fitting.heads import Head
from mbrl_text_env.fitting.report import FitError, Samples
from mbrl_text_env.types import FloatArray, Ledgers, TextState
from mbrl_text_env.values import ValueModelError

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

# The last input beside hundreds of embedding dimensions: its penalty is smaller by the square.
_WEIGHT = 20.0


class _Scaler(StandardScaler):
    """Inputs of variance 1; the last one of variance `_WEIGHT` squared."""

    numbers = ("mean_", "scale_")

    def fit(self, inputs: FloatArray, scores: Any = None, sample_weight: Any = None) -> _Scaler:
        super().fit(inputs, scores, sample_weight)
        self.scale_[-1] /= _WEIGHT
        return self


@dataclass(eq=False, repr=False)
class TokenEmbeddingValue(FittedValue):
    """Ridge regression on the response's token embeddings, which are looked up.

    Inputs are their mean, and how much of the prompt the response takes up: the largest cosine
    similarity of each of the prompt's tokens with one of the response, in the mean over the
    prompt's tokens, weighted by how few of the records' prompts have the token.

    It is fitted on complete responses and applied to prefixes: what a response says so far, as a
    bag of tokens. No model is run, so it is for rewards that are too expensive to ask of a prefix.
    Its standard deviation is that of complete responses, and too small for short prefixes.

    Sources: Joulin et al., "Bag of Tricks for Efficient Text Classification", 2017 (the mean);
    Khattab and Zaharia, "ColBERT", 2020 (largest similarities); Zhang et al., "BERTScore", 2020
    (weights by rarity). Deviation: the embeddings are the language model's input embeddings, less
    their mean for similarities, and stay as they are.

    Args:
        alphas: Strengths of the penalty, of which the best on prompts left out is taken.

    Example:
        >>> value = TokenEmbeddingValue(embedded()).fit(read_records("records"))  # doctest: +SKIP
    """

    kind = "token_embedding"
    fitted_settings = ("rarity_", "rarest_")
    language_model: Any
    _: KW_ONLY
    alphas: Sequence[float] = (100.0, 1000.0, 10000.0)

    def __post_init__(self) -> None:
        self.alphas = tuple(self.alphas)
        if not self.alphas or not min(self.alphas) > 0:
            raise ValueError(f"alphas: expected numbers above 0, got {self.alphas}.")

    def inputs(self, states: Sequence[TextState], ledgers: Ledgers = None) -> FloatArray:
        """float64[B, d + 1]: the mean embedding, and what is taken up; 0 for an empty response."""
        found = np.zeros((len(states), self._table().shape[1] + 1))
        for i, state in enumerate(states):
            if state.response_ids:
                rows = self._rows(state.response_ids)
                found[i, :-1] = rows.mean(axis=0)
                found[i, -1] = self._taken_up(state.prompt_ids, rows)
        return found

    def _taken_up(self, prompt_ids: Sequence[int], response: FloatArray) -> float:
        known = {token: self.rarity_.get(str(token), self.rarest_) for token in set(prompt_ids)}
        weights = {token: weight for token, weight in sorted(known.items()) if weight > 0}
        if not weights:
            return 0.0
        prompt, response = self._directions(self._rows([*weights])), self._directions(response)
        nearest = (prompt @ response.T).max(axis=1)
        return float(np.average(nearest, weights=[*weights.values()]))

    def _directions(self, rows: FloatArray) -> FloatArray:
        rows = rows - self._mean
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    def samples(self, records: Sequence[Record]) -> Samples:
        """The complete responses; how rare the tokens of prompts are is counted here."""
        if missing := [r.prompt_id for r in records if r.response and not r.response_ids]:
            raise FitError(
                f"Record of prompt {missing[0]!r}: expected token ids of the response, got none. "
                "Collect the records with `mbrl-text collect`, which keeps them."
            )
        prompts = {record.prompt_id: set(record.prompt_ids) for record in records}
        counts = Counter(token for prompt in prompts.values() for token in prompt)
        self.rarest_ = math.log(len(prompts) + 1)
        self.rarity_ = {str(token): self.rarest_ - math.log(n + 1) for token, n in counts.items()}
        states = [record.prefix_state(len(record.response_ids)) for record in records]
        return samples_of(self.inputs(states), records)

    def heads(self) -> Mapping[str, Head]:
        """Ridge regression with each of the penalties."""
        return {f"alpha={alpha:g}": make_pipeline(_Scaler(), Ridge(alpha)) for alpha in self.alphas}

    def flops(self, states: Sequence[TextState]) -> FloatArray:
        """float64[B]: sums and norms of the embeddings, similarities, and the head's product."""
        return np.array([self._flops(len(s.prompt_ids), len(s.response_ids)) for s in states])

    def flops_bound(self) -> float:
        """A prompt and a response that fill the context, half and half."""
        half = self.language_model.context_length / 2
        return self._flops(half, half)

    def _flops(self, prompt: float, response: float) -> float:
        size = self._table().shape[1]
        return size * (2.0 * prompt * response + 4.0 * (prompt + response) + 2.0)

    @cached_property
    def _mean(self) -> FloatArray:
        """float64[d]: of all embeddings."""
        return self._table().double().mean(dim=0).cpu().numpy()

    def _rows(self, ids: Sequence[int]) -> FloatArray:
        """float64[T, d]: embeddings of tokens."""
        return self._table()[list(ids)].double().cpu().numpy()

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

"""Propose chunks with a language model and describe them as features for `CandidateChunks`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from mbrl_text_env import encoders
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams
from mbrl_text_env.language_models.registry import embedded_encoder
from mbrl_text_env.mdp import is_terminal, response_limit, transition
from mbrl_text_env.rewards import base as rewards
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.task import TextTask, added_text
from mbrl_text_env.types import Chunk, Ledger, TextState, Usage, check_positive, timed

# Lower bound of mean log-probabilities: about one in five hundred million.
_LEAST_LOGPROB = -20.0
Known = dict[TextState, float]
"""Rewards of the prefixes in the last observation of one environment."""


class FeatureParts(NamedTuple):
    """Parts of feature vectors, as arrays or tensors like the input."""

    position: Any  # [B, 1], response length / max_response_tokens
    # [B, K, 3], for each candidate: mean log-probability (nats), length / `chunk_tokens`, whether
    # it ends the response
    scalars: Any
    prefix_reward: Any  # [B, 1], or [B, 0] without `prefix_rewards`
    rewards: Any  # [B, K, 1], or [B, K, 0]
    prefix_embedding: Any  # [B, d]
    embeddings: Any  # [B, K, d], of the prefix with each candidate


@dataclass(frozen=True)
class FeatureLayout:
    """The layout of a feature vector of K candidates; `embedding_size` is 0 without embeddings.

    Example:
        >>> layout = FeatureLayout(num_candidates=2, embedding_size=3, prefix_rewards=True)
        >>> layout.size
        19
        >>> layout.split(np.arange(19.0)[None]).rewards.tolist()
        [[[8.0], [9.0]]]
    """

    num_candidates: int
    embedding_size: int = 0
    prefix_rewards: bool = False

    @property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        k, d, rewards = self.num_candidates, self.embedding_size, int(self.prefix_rewards)
        return (1,), (k, 3), (rewards,), (k, rewards), (d,), (k, d)

    @property
    def size(self) -> int:
        """Length of a feature vector."""
        return sum(map(math.prod, self._shapes))

    def split(self, rows: Any) -> FeatureParts:
        """Split a NumPy array or torch tensor [B, size] into views of its parts."""
        ends = itertools.accumulate(map(math.prod, self._shapes), initial=0)
        found = zip(itertools.pairwise(ends), self._shapes, strict=True)
        return FeatureParts(
            *(rows[:, start:end].reshape(len(rows), *shape) for (start, end), shape in found)
        )


class ViewOptions(TypedDict, total=False):
    """The keyword arguments that `CandidateChunks` passes to `CandidateProposer`."""

    num_candidates: int
    chunk_tokens: int | None
    params: SamplingParams
    encoder: Encoder | str | None
    prefix_rewards: bool


class CandidateProposer:
    """Proposes chunks and computes their features.

    The features are the response length (relative to its limit) and, for each candidate, the mean
    log-probability, the length (relative to `chunk_tokens`) and whether it ends the response. Next
    are the rewards (`prefix_rewards`) and embeddings (`encoder`) of the prefix with each candidate.

    Args:
        num_candidates: K, at least 1.
        chunk_tokens: Most tokens of a candidate; by default the environment's `max_chunk_tokens`.
        encoder: `"embedded"` for MiniLM, `"language_model"` for the model's own features, any
            object with `encode(texts)`, or None for no embeddings.
        prefix_rewards: Whether to score the prefix and the prefix with each candidate, as if the
            response ended there. Each score is charged as a reward call.

    Raises:
        ValueError: K or `chunk_tokens` is out of range, or the model has no features.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        task: TextTask,
        num_candidates: int = 4,
        chunk_tokens: int | None = None,
        params: SamplingParams = SamplingParams(),
        encoder: Encoder | str | None = "embedded",
        prefix_rewards: bool = False,
    ) -> None:
        limit = task.rules.max_chunk_tokens
        chunk_tokens = limit if chunk_tokens is None else chunk_tokens
        check_positive(num_candidates=num_candidates)
        if not 1 <= chunk_tokens <= limit:
            raise ValueError(
                f"chunk_tokens: expected 1 to the environment's max_chunk_tokens ({limit}), got "
                f"{chunk_tokens}."
            )
        self.language_model, self.task = language_model, task
        self.num_candidates, self.chunk_tokens, self.params = num_candidates, chunk_tokens, params
        self._encoder, size = self._checked_encoder(encoder)
        self._is_model = self._encoder is language_model
        self.layout = FeatureLayout(num_candidates, size, bool(prefix_rewards))

    def propose(
        self, states: Sequence[TextState], seeds: Sequence[int], ledgers: Sequence[Ledger]
    ) -> list[list[Chunk]]:
        """Sample K chunks per state in one language-model call; none for ended states."""
        going = [i for i, state in enumerate(states) if not is_terminal(state)]
        if not going:
            return [[] for _ in states]
        drawn = self.language_model.sample(
            [states[i] for i in going],
            self.num_candidates,
            self.chunk_tokens,
            seeds=[seeds[i] for i in going],
            params=self.params,
            ledgers=[ledgers[i] for i in going],
        )
        chunks_of = dict(zip(going, drawn, strict=True))
        return [chunks_of.get(i, []) for i in range(len(states))]

    def texts(
        self, states: Sequence[TextState], proposals: Sequence[list[Chunk]]
    ) -> list[list[str]]:
        """The K texts that the candidates add; empty texts for states without candidates."""
        decode = self.task.tokenizer.decode
        return [
            [
                added_text(decode(state.response_ids), decode(state.response_ids + chunk.token_ids))
                for chunk in chunks
            ]
            or [""] * self.num_candidates
            for state, chunks in zip(states, proposals, strict=True)
        ]

    def features(
        self,
        states: Sequence[TextState],
        proposals: Sequence[list[Chunk]],
        ledgers: Sequence[Ledger],
        known: Sequence[Known] | None = None,
        failures: list[RewardError | None] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Features of B states and their candidates, float32[B, layout.size].

        An ended state has zeros for candidates and rewards. Embeddings are charged as value FLOPs,
        or as language-model calls if the language model computes them. `known` (one mapping per
        state) caches the rewards of the previous call, and is replaced by those of this call. With
        `failures` (one per state), a prefix that cannot be scored affects only its own state: its
        error is stored there, and its rewards are zeros. Without, a `RewardError` is raised.
        """
        rows = np.zeros((len(states), self.layout.size), dtype=np.float32)
        parts = self.layout.split(rows)
        parts.position[:, 0] = [len(s.response_ids) / self.task.max_response_tokens for s in states]
        for row, chunks in zip(parts.scalars, proposals, strict=True):
            for k, chunk in enumerate(chunks):
                row[k] = (
                    max(chunk.logprob / len(chunk), _LEAST_LOGPROB),
                    len(chunk) / self.chunk_tokens,
                    chunk.finish_reason is not None,
                )
        if not self.layout.prefix_rewards and self._encoder is None:
            return rows
        children = self.children(states, proposals)
        if self.layout.prefix_rewards:
            known = [{} for _ in states] if known is None else known
            self._score(states, children, parts, ledgers, known, failures)
        if self._encoder is not None:
            self._embed(states, children, parts, ledgers)
        return rows

    def children(
        self, states: Sequence[TextState], proposals: Sequence[list[Chunk]]
    ) -> list[list[TextState]]:
        """The next state for each candidate."""
        most, tokenizer = self.task.max_response_tokens, self.task.tokenizer
        return [
            [transition(state, chunk, response_limit(state, tokenizer, most)) for chunk in chunks]
            for state, chunks in zip(states, proposals, strict=True)
        ]

    def features_bound(self, state: TextState) -> Usage:
        """An upper bound on the cost of the features of a state and its candidates."""
        count = 1 + self.num_candidates
        usage = Usage()
        if self.layout.prefix_rewards:
            usage += rewards.reward_usage_bound(self.task.reward_model) * count
        if self._is_model:
            tokens = len(state.prompt_ids) + len(state.response_ids) + self.chunk_tokens
            usage += self.language_model.usage_bound(tokens, []) * count
        elif self._encoder is not None:
            usage += Usage(value_flops=encoders.encoder_flops_bound(self._encoder) * count)
        return usage

    def _score(
        self,
        states: Sequence[TextState],
        children: Sequence[Sequence[TextState]],
        parts: FeatureParts,
        ledgers: Sequence[Ledger],
        known: Sequence[Known],
        failures: list[RewardError | None] | None,
    ) -> None:
        """Fill in the rewards of prefixes, scoring all new ones in one call."""
        shown = [[s, *behind] if behind else [] for s, behind in zip(states, children, strict=True)]
        all_shown = ((i, state) for i, row in enumerate(shown) for state in dict.fromkeys(row))
        new = [(i, state) for i, state in all_shown if state not in known[i]]
        decode = self.task.tokenizer.decode

        def score(some: Sequence[tuple[int, TextState]]) -> list[float]:
            return rewards.score_responses(
                self.task.reward_model,
                [state.prompt for _, state in some],
                [decode(state.response_ids) for _, state in some],
                ledgers=[ledgers[i] for i, _ in some],
            ).total.tolist()

        found = score(new) if failures is None else rewards.isolate_failures(score, new)
        for (i, state), value in zip(new, found, strict=True):
            if not isinstance(value, RewardError):
                known[i][state] = value
            elif failures is not None and failures[i] is None:
                failures[i] = value
        for i, row in enumerate(shown):
            if failures is not None and failures[i] is not None:
                continue
            values = {state: known[i][state] for state in row}
            if row:
                parts.prefix_reward[i, 0] = values[row[0]]
                parts.rewards[i, :, 0] = [values[state] for state in row[1:]]
            known[i].clear()
            known[i].update(values)

    def _embed(
        self,
        states: Sequence[TextState],
        children: Sequence[Sequence[TextState]],
        parts: FeatureParts,
        ledgers: Sequence[Ledger],
    ) -> None:
        rows = [[state, *behind] for state, behind in zip(states, children, strict=True)]
        shown = [state for row in rows for state in row]
        paid = [ledger for ledger, row in zip(ledgers, rows, strict=True) for _ in row]
        if self._is_model:
            vectors = self._encoder.features(shown, ledgers=paid)
        else:
            decode = self.task.tokenizer.decode
            texts = [encoders.prefix_text(s.prompt.text, decode(s.response_ids)) for s in shown]
            with timed(paid):
                vectors = encoders.encode_texts(self._encoder, texts)
            for ledger, flops in zip(
                paid, encoders.encoder_flops(self._encoder, texts), strict=True
            ):
                ledger.charge(Usage(value_flops=float(flops)))
        ends = np.cumsum([len(row) for row in rows])[:-1]
        for i, block in enumerate(np.split(vectors, ends)):
            parts.prefix_embedding[i] = block[0]
            parts.embeddings[i, : len(block) - 1] = block[1:]

    def _checked_encoder(self, encoder: Any) -> tuple[Any, int]:
        if encoder is None:
            return None, 0
        if encoder == "language_model":
            model: Any = self.language_model
            if not hasattr(model, "features"):
                raise ValueError(
                    f"encoder='language_model': {model.name!r} gives no features. Use 'embedded', "
                    "None, or an encoder of your own."
                )
            return model, int(model.feature_size)
        if encoder == "embedded":
            encoder = embedded_encoder()
        if isinstance(encoder, str) or not hasattr(encoder, "encode"):
            raise ValueError(
                "encoder: expected 'embedded', 'language_model', None, or an object with "
                f"encode(texts), got {encoder!r}."
            )
        return encoder, int(encoders.encode_texts(encoder, ["size"]).shape[1])

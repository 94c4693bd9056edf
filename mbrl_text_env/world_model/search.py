"""Tree search in a world model: real chunks at the root, predicted chunks below."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cache
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt

from mbrl_text_env.language_models.base import stream
from mbrl_text_env.types import FloatArray, Ledgers, Prompt, TextState, Usage, check_positive
from mbrl_text_env.world_model.dynamics import predict_futures
from mbrl_text_env.world_model.value import WorldModelValue

_MOST_CHOICES = 100_000


@dataclass(frozen=True)
class _Asked:
    """Data that all nodes of a state's trees share."""

    prompt: Prompt
    rng: np.random.Generator
    ledgers: Ledgers


@dataclass(eq=False, repr=False)
class ImaginedSearchValue(WorldModelValue):
    """The value of choosing the best of several predicted chunks, `depth` times in a row.

    The search predicts `width` chunks for each node, `depth` levels deep. The value of an ended
    chunk is its reward. The value of a leaf is the mean reward of its predicted endings. The value
    of a node is the maximum over `choices` of its chunks, averaged over all such subsets. A planner
    with this value samples tokens only for its own nodes. `WorldModelValue` has no such choice.

    Source: sparse sampling (Kearns, Mansour and Ng, "A Sparse Sampling Algorithm for Near-Optimal
    Planning in Large Markov Decision Processes", Machine Learning 2002). Deviations: actions are
    samples, as in all planners here, so a node has several subsets of actions; the value of a leaf
    is the mean of its endings, not 0. The maximum of noisy means is biased upwards.

    Each predicted chunk or ending is one dynamics call: with the defaults, 8 + 8 x 16 calls. An
    ensemble draws new members for each chunk. `std` is the standard deviation of the best chunk's
    value; all of it is reported as aleatoric.

    Args:
        num_futures: Number of predicted endings of each leaf.
        width: Number of predicted chunks of each node, at least `choices`.
        choices: Number of chunks from which the planner will take the best.
        depth: Number of consecutive choices.
        chunk_tokens: Tokens of a predicted chunk, a multiple of the dynamics' `stride`.

    Raises:
        WorldModelError: In `predict`, if `chunk_tokens` is not a multiple of the stride.

    Example:
        >>> value = ImaginedSearchValue(dynamics, ConstraintsReward())  # doctest: +SKIP
        >>> planner = BeamSearch(lm, ConstraintsReward(), value, chunk_tokens=16)  # doctest: +SKIP
    """

    _: KW_ONLY
    num_futures: int = 16
    width: int = 8
    choices: int = 4
    depth: int = 1
    chunk_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(choices=self.choices, depth=self.depth, chunk_tokens=self.chunk_tokens)
        if not 0 < comb(self.width, self.choices) <= _MOST_CHOICES:
            raise ValueError(
                f"width: expected at least choices, and at most {_MOST_CHOICES:,} subsets, got "
                f"width={self.width} and choices={self.choices}."
            )

    def imagined(self, state: TextState, ledgers: Ledgers) -> tuple[FloatArray, Any]:
        """The value of the best chunk of each subset, and the same member (0) for all."""
        found = predict_futures(
            self.dynamics,
            [state],
            self.width,
            self._ahead(len(state.response_ids)),
            seed=self.seed,
            ledgers=ledgers,
        )
        ask = _Asked(state.prompt, stream(self.seed, state, 1), ledgers)
        best = self._best(ask, found.features[0], found.ended[0], self.depth - 1)
        return best, np.zeros(len(best), dtype=np.int64)

    def usage_bound(self, state: TextState) -> Usage:
        """An upper bound on the cost of one state, reached if no predicted chunk ends."""
        usage = Usage()
        for level in range(self.depth + 1):
            each = self.width if level < self.depth else self.num_futures
            flops = self.dynamics.flops_bound(each)
            usage += Usage(dynamics_calls=each, dynamics_flops=flops) * self.width**level
        return usage

    def _best(self, ask: _Asked, rows: Any, ended: Any, depth: int) -> FloatArray:
        """The value of the best chunk in each subset of a node's chunks, `depth` levels deep."""
        worth = self._scores(ask.prompt, self.dynamics.names, rows)
        for i in np.flatnonzero(~ended):
            size = int(rows[i, 0])
            count = self.width if depth else self.num_futures
            ahead = self._ahead(size) if depth else self._within(size)
            after, ends, _ = self.dynamics.ahead(size, rows[i], count, ahead, ask.rng)
            for ledger in ask.ledgers or ():
                flops = self.dynamics.flops_bound(count)
                ledger.charge(Usage(dynamics_calls=count, dynamics_flops=flops))
            below = (
                self._best(ask, after, ends, depth - 1)
                if depth
                else self._scores(ask.prompt, self.dynamics.names, after)
            )
            worth[i] = below.mean()
        found: FloatArray = worth[_choices(self.width, self.choices)].max(axis=1)
        return found

    def _ahead(self, size: int) -> int | None:
        """The horizon of a chunk, or None (to the end) if fewer tokens are left."""
        return self.chunk_tokens if size + self.chunk_tokens <= self.dynamics.longest_ else None


@cache
def _choices(width: int, choices: int) -> npt.NDArray[np.int64]:
    """All subsets of size `choices` of `width` indices, int64[C, choices]."""
    return np.asarray(list(combinations(range(width), choices)), dtype=np.int64)

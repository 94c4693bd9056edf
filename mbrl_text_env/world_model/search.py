"""Tree search in imagination: real chunks at the root, imagined ones below them."""

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
    """What all nodes of a state's trees share."""

    prompt: Prompt
    rng: np.random.Generator
    ledgers: Ledgers


@dataclass(eq=False, repr=False)
class ImaginedSearchValue(WorldModelValue):
    """The value of choosing again and again: the reward of the best of imagined chunks.

    Of a state, `width` chunks are imagined, of each of them `width` more, `depth` chunks deep. A
    chunk that goes on then is worth the mean reward of its imagined endings, one that ends its
    reward, and a node what the best of `choices` chunks from it is worth, in the mean over all such
    choices. So a planner with this value draws tokens for its own nodes alone, and the tree below
    each of them is imagined; `WorldModelValue` looks ahead without a choice.

    Source: sparse sampling (Kearns, Mansour and Ng, "A Sparse Sampling Algorithm for Near-Optimal
    Planning in Large Markov Decision Processes", Machine Learning 2002). Deviations: actions are
    samples, as in all planners here, so a node has several sets of them; leaves are worth the mean
    of endings, not 0. The best of noisy means is too high by a part of their noise.

    Each imagined chunk and ending is a dynamics call: with the defaults 8 + 8 x 16. An ensemble
    draws its members anew at each chunk. `std` is that of the best chunk's worth, all of it called
    aleatoric.

    Args:
        num_futures: Endings of each leaf.
        width: Imagined chunks of a node, at least `choices`.
        choices: Chunks of which the planner will take the best.
        depth: Choices, one after the other.
        chunk_tokens: Of an imagined chunk, a multiple of the dynamics' `stride`.

    Raises:
        WorldModelError: On predicting: `chunk_tokens` is no multiple of the stride.

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
                f"width: expected at least choices, and at most {_MOST_CHOICES:,} sets of so many, "
                f"got {self.width} and {self.choices}."
            )

    def imagined(self, state: TextState, ledgers: Ledgers) -> tuple[FloatArray, Any]:
        """What the best chunk of each choice is worth, and one member of all."""
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
        """Of one state, where no imagined chunk ends."""
        usage = Usage()
        for level in range(self.depth + 1):
            each = self.width if level < self.depth else self.num_futures
            flops = self.dynamics.flops_bound(each)
            usage += Usage(dynamics_calls=each, dynamics_flops=flops) * self.width**level
        return usage

    def _best(self, ask: _Asked, rows: Any, ended: Any, depth: int) -> FloatArray:
        """The worth of the best of each choice among a node's chunks, which go on so deep."""
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
        """The horizon of a chunk; with too little left, to the end."""
        return self.chunk_tokens if size + self.chunk_tokens <= self.dynamics.longest_ else None


@cache
def _choices(width: int, choices: int) -> npt.NDArray[np.int64]:
    """int64[C, choices], all sets of so many of `width` numbers."""
    return np.asarray(list(combinations(range(width), choices)), dtype=np.int64)

"""What heads are fitted on, and how it is divided: by prompt, never by row.

Responses to one prompt resemble each other, and a head that has seen some of them would seem better
on the others than it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mbrl_text_env.types import FloatArray

IntArray = npt.NDArray[np.int64]

_LEAST_PROMPTS = 5


class FitError(ValueError):
    """Data that nothing can be fitted on, or arguments that do not fit each other."""


@dataclass(frozen=True)
class Samples:
    """N rows of features, with what their responses scored in the end.

    Args:
        inputs: float64[N, d].
        scores: float64[N].
        lengths: int64[N], tokens of each prefix; all 0 where nothing is cut by tokens.
        groups: int64[N], number of the prompt.
    """

    inputs: FloatArray
    scores: FloatArray
    lengths: IntArray
    groups: IntArray

    def __len__(self) -> int:
        return len(self.scores)

    def rows(self, which: Any) -> Samples:
        """Some of the rows, by a mask or by indices."""
        return Samples(
            self.inputs[which], self.scores[which], self.lengths[which], self.groups[which]
        )

    @property
    def num_prompts(self) -> int:
        """Different prompts."""
        return len(np.unique(self.groups))


def split_by_group(groups: Sequence[Hashable], held_out: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which rows are held out: bool[B]; all rows of a group are, or none.

    Args:
        groups: The group of each row.
        held_out: Share of the groups, above 0 and below 1.
        seed: The choice follows from it.

    Raises:
        FitError: There are fewer than five groups, or the share is out of its range.

    Example:
        >>> split_by_group(["a", "a", "b", "c", "d", "e"], 0.2, 0).sum() <= 2
        np.True_
    """
    if not 0 < held_out < 1:
        raise FitError(f"held_out: expected a number between 0 and 1, got {held_out!r}.")
    distinct = list(dict.fromkeys(groups))
    if len(distinct) < _LEAST_PROMPTS:
        raise FitError(
            f"Expected at least {_LEAST_PROMPTS} different prompts, to fit on some and measure on "
            f"others, got {len(distinct)} in {len(groups)} rows. Add data of other prompts."
        )
    # At least one prompt is measured on, and at least three are fitted on.
    count = min(max(1, round(held_out * len(distinct))), len(distinct) - 3)
    order = np.random.default_rng(seed).permutation(len(distinct))
    chosen = {distinct[i] for i in order[:count]}
    return np.asarray([group in chosen for group in groups])

"""A planner that spends where the value is uncertain."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from agents.base import DEFAULT_PARAMS
from agents.planner import Planner
from agents.search import Expansion, Search, partial
from agents.tree import Node
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams
from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.types import FloatArray
from mbrl_text_env.values import ValueModel

# Candidates a stage where no budget says how many.
_WITHOUT_BUDGET = 4
# Between which multiples of an equal share a stage spends, and in steps of which.
_LEAST, _MOST, _STEP = 0.5, 2.0, 0.25
# Between which multiples of `chunk_tokens` a chunk is long.
_SHORTEST, _LONGEST = 0.5, 2.0
# Standard deviations above its value that a partial response is given credit for.
_OPTIMISM = 2.0


class Adaptive(Planner):
    """Chunk by chunk as `BeamSearch`, with the effort where the value says that it pays.

    At each stage candidates are drawn until one more is expected to gain less than one more at an
    average stage. If n candidates spread with standard deviation s, the next one gains about s
    (e(n + 1) - e(n)), where e(n) is the mean of the largest of n standard normals; the average
    stage has the mean s of the stages so far and an equal share of the budget. The chunk after a
    stage of large spread is shorter, up to half of `chunk_tokens`, and after one of small spread
    longer, up to twice. The candidate with the largest mean - `caution` x standard deviation goes
    on. What is saved at one stage is spent at later ones and on further rounds, which go on in the
    same tree.

    It stops early: at a response that scores `target`, and, in rounds after the first, on a path
    whose value is two standard deviations below the best response that is known.

    Sources: the expected gain of one more candidate against its cost is the rule of Weitzman,
    "Optimal Search for the Best Alternative", 1979, with Gaussian candidates; pessimism by the
    standard deviation as in Kidambi et al., "MOReL", 2020. Deviation: the price of a candidate is
    not given but taken from the average stage, so that the budget is what decides.

    Args:
        language_model: Proposes chunks.
        reward_model: Scores complete responses.
        value_model: Estimates the final reward of partial ones.
        caution: k; 0 or more. It matters only where the value model's standard deviations differ.
        target: The score from which on a response is good enough; None spends the whole budget.
        max_response_tokens: Token limit of a response.
        chunk_tokens: Tokens of a chunk at an average stage.
        params: How chunks are drawn.

    Raises:
        ValueError: A limit is below 1, or `caution` below 0.
    """

    name = "adaptive"

    def __init__(
        self,
        language_model: LanguageModel,
        reward_model: RewardModel,
        value_model: ValueModel | None = None,
        *,
        caution: float = 0.0,
        target: float | None = None,
        max_response_tokens: int = 256,
        chunk_tokens: int = 16,
        params: SamplingParams = DEFAULT_PARAMS,
    ) -> None:
        super().__init__(
            language_model,
            reward_model,
            value_model,
            max_response_tokens=max_response_tokens,
            chunk_tokens=chunk_tokens,
            params=params,
        )
        if not caution >= 0:
            raise ValueError(f"caution: expected 0 or more, got {caution}.")
        self.caution = caution
        self.target = target

    def plan(self, search: Search) -> None:
        """One path from the root to the end of a response."""
        node, size = search.tree.root, self.chunk_tokens
        spreads: list[float] = []
        while not self._is_enough(search):
            drawn = self._stage(search, node, size, spreads)
            going = partial(drawn)
            if not going:
                return
            best = max(going, key=self._cautious)
            best.note = f"best of {len(drawn)} candidates of up to {size} tokens"
            if self._is_hopeless(search, best):
                best.note += "; given up: a better response is known"
                return
            node, size = best, self._next_size(spreads)

    def _stage(self, search: Search, node: Node, size: int, spreads: list[float]) -> list[Node]:
        """Draw candidates while they are expected to pay; their spread is added to `spreads`."""
        share = search.width(node, size)
        share = _WITHOUT_BUDGET if share is None else max(1, share)
        step = max(1, int(share * _STEP))
        drawn: list[Node] = []
        wanted = max(1, int(np.ceil(share * _LEAST)))
        while wanted:
            [row] = search.expand([Expansion(node, wanted, size)])
            drawn += row
            if len(row) < wanted:
                break
            spread = self._spread(drawn)
            average = float(np.mean([*spreads, spread]))
            pays = spread * _gain(len(drawn)) >= average * _gain(share) and spread > 0
            wanted = step if pays and len(drawn) + step <= share * _MOST else 0
        spreads.append(self._spread(drawn))
        return drawn

    def _next_size(self, spreads: Sequence[float]) -> int:
        """Tokens of the next chunk: fewer after a stage whose candidates differed a lot."""
        average = float(np.mean(spreads))
        ratio = average / spreads[-1] if spreads[-1] > 0 else (_LONGEST if average > 0 else 1.0)
        return max(1, round(self.chunk_tokens * min(max(ratio, _SHORTEST), _LONGEST)))

    def _spread(self, nodes: Sequence[Node]) -> float:
        worths = [self._cautious(node) for node in dict.fromkeys(nodes) if node.worth is not None]
        return float(np.std(worths)) if len(worths) > 1 else 0.0

    def _cautious(self, node: Node) -> float:
        if node.worth is None:
            return float("-inf")
        return node.worth - (0.0 if node.is_terminal else self.caution * node.std)

    def _is_enough(self, search: Search) -> bool:
        found = search.tree.best()
        return self.target is not None and found is not None and _score(found) >= self.target

    def _is_hopeless(self, search: Search, node: Node) -> bool:
        """Only a value model that knows its uncertainty can say so."""
        found = search.tree.best()
        if found is None or node.value is None or node.std == 0:
            return False
        return node.value + _OPTIMISM * node.std < _score(found)


@functools.lru_cache
def _gain(count: int) -> float:
    """What one more of `count` standard normals adds to the mean of the largest."""
    return _mean_of_largest(count + 1) - _mean_of_largest(count)


@functools.lru_cache
def _mean_of_largest(count: int) -> float:
    """Mean of the largest of `count` independent standard normals."""
    from scipy.stats import norm

    grid: FloatArray = np.linspace(-10.0, 10.0, 4001)
    density = count * norm.pdf(grid) * norm.cdf(grid) ** (count - 1)
    return float(np.trapezoid(grid * density, grid))


def _score(node: Node) -> float:
    assert node.score is not None
    return node.score

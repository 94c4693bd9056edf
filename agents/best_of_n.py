"""Best-of-N: sample N complete responses and keep the one that the reward model likes most."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mbrl_text_env.agents.base import DEFAULT_PARAMS, check_positive, check_target
from mbrl_text_env.agents.planner import Planner
from mbrl_text_env.agents.search import Expansion, Search
from mbrl_text_env.agents.side_by_side import MOST_AT_ONCE
from mbrl_text_env.agents.tree import Node
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams
from mbrl_text_env.ledger import Budget
from mbrl_text_env.rewards.base import RewardLike
from mbrl_text_env.types import TextState
from mbrl_text_env.values import ValueModel

# The article's number.
_N_WITHOUT_BUDGET = 4
# A cap on seconds is looked at between waves.
_MOST_A_WAVE = 16


class BestOfN(Planner):
    """Sample responses until there are N or the budget allows no more; keep the best.

    A response is only begun if it could be finished and scored at its longest. What short responses
    leave over is spent on more of them. Sample k of a prompt is the same whatever N is, so a larger
    budget never gives a lower score. A response that was drawn before is not scored again.

    With `keep` below 1 hopeless samples are pruned: all of them are drawn chunk by chunk, and after
    each chunk the share `keep` with the highest values goes on.

    With a `target` sampling ends with the wave in which a response scores as much. Waves begin with
    one response and double, so at most about as much is drawn again as was needed.

    Source of the pruning: Sun et al., "Fast Best-of-N Decoding via Speculative Rejection", 2024.
    Deviation: there a share is dropped whenever memory is full, here after every chunk.

    Args:
        language_model: Proposes responses.
        reward_model: Scores them.
        value_model: Says which samples are hopeless; only used where `keep` is below 1.
        n: N; None takes as many as the budget allows, or 4 (the article's number) without one.
        keep: Share of the samples that goes on after each chunk, above 0 and up to 1.
        target: The score from which on a response is good enough; None draws all of them.
        max_response_tokens: Token limit of a response.
        chunk_tokens: Most tokens of the chunk that `act` returns, and of those between prunings.
        params: How tokens are drawn; by default temperature 0.7, as in the article.

    Raises:
        ValueError: N or a limit is below 1, `keep` is out of range, there is pruning without a
            value model, or pruning and a `target` (its samples are drawn together), or `target` is
            NaN.
    """

    name = "best-of-n"

    def __init__(
        self,
        language_model: LanguageModel,
        reward_model: RewardLike,
        value_model: ValueModel | None = None,
        *,
        n: int | None = None,
        keep: float = 1.0,
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
        if n is not None:
            check_positive(n=n)
        check_target(target)
        if not 0 < keep <= 1:
            raise ValueError(f"keep: expected a share above 0 and up to 1, got {keep}.")
        if keep < 1 and value_model is None:
            raise ValueError(
                f"keep={keep}: expected a value model that says which samples are hopeless, got "
                "none. Pass one, or keep=1.0."
            )
        if keep < 1 and target is not None:
            raise ValueError(
                f"Expected keep=1.0 with a target, got keep={keep}: samples that are pruned are "
                "drawn together, so there is nothing to end early."
            )
        self.n = n
        self.keep = keep
        self.target = target

    def plan(self, search: Search) -> None:
        """Sample one wave after the other, or one set of samples that is pruned."""
        root = search.tree.root
        wanted = self.n
        if wanted is None and not search.is_capped:
            wanted = _N_WITHOUT_BUDGET
        if self.keep < 1:
            self._pruned(search, wanted)
            return
        while (wanted is None or root.samples < wanted) and not search.has_reached(self.target):
            most = _MOST_A_WAVE if self.target is None else min(max(1, root.samples), _MOST_A_WAVE)
            left = most if wanted is None else min(wanted - root.samples, most)
            drawn = root.samples
            search.expand([Expansion(root, left)])
            if wanted is None or root.samples == drawn:
                return

    def values(self) -> ValueModel | None:
        """The value model, where there is pruning."""
        return self.value_model if self.keep < 1 else None

    def _most_at_once(self, state: TextState, budget: Budget) -> int:
        """Samples that are not pruned have nothing in common but the prompt."""
        return MOST_AT_ONCE if self.keep == 1 else super()._most_at_once(state, budget)

    def _pruned(self, search: Search, wanted: int | None) -> None:
        root = search.tree.root
        if wanted is not None and root.samples >= wanted:
            return
        if search.is_capped:
            # More would be begun than can be finished.
            most = self._affordable(search)
            wanted = most if wanted is None else min(wanted, most)
        assert wanted is not None
        frontier = [root] * max(1, wanted)
        while frontier:
            counts = {node: frontier.count(node) for node in frontier}
            rows = search.expand(
                Expansion(node, count, self.chunk_tokens) for node, count in counts.items()
            )
            drawn = [node for row in rows for node in row]
            frontier = _best_share(search, drawn, self.keep)

    def _affordable(self, search: Search) -> int:
        """How many samples can be begun if a share of them goes on after each chunk."""
        root = search.tree.root
        full = search.width(root, self.chunk_tokens) or 0
        stages = math.ceil(search.room(root) / self.chunk_tokens)
        shares = sum(self.keep**stage for stage in range(stages))
        return int(full * stages / shares)


def _best_share(search: Search, drawn: Sequence[Node], share: float) -> list[Node]:
    """The unfinished nodes that go on, as often as they were drawn."""
    ranked = search.ranked(drawn)
    open_nodes = [node for node in drawn if not node.is_terminal]
    # 0.28 x 25 is a little above 7 in floating point.
    kept = math.ceil(share * len(open_nodes) - 1e-9)
    return [node for best in ranked for node in open_nodes if node is best][:kept]

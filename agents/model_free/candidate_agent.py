"""A trained choice among candidates as an agent: in comparisons, under budgets, in environments."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mbrl_text_env.agents.driver import ask
from mbrl_text_env.agents.planner import Planner
from mbrl_text_env.agents.search import Expansion, Search
from mbrl_text_env.agents.tree import Node
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.proposer import CandidateProposer, Known
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike
from mbrl_text_env.types import Prompt, Usage

if TYPE_CHECKING:
    # It needs torch; an agent that only looks it up by name does not.
    from mbrl_text_env.agents.model_free.candidate_policy import CandidatePolicy


class CandidateAgent(Planner):
    """Lets a trained policy choose among K proposed chunks, one after the other.

    Each round is an episode. All K chunks of a step are charged, and so is what the policy looks
    at. Without a budget there is one episode; under one, episodes go on with other candidates while
    they can be paid, and the answer is the best of all complete responses, like every planner's.

    Args:
        language_model: Proposes chunks.
        reward_model: Scores complete responses and, where the policy sees them, prefixes.
        policy: What `train_ppo` and `train_dqn` train. It says how many chunks of what length are
            drawn at which temperature.
        max_response_tokens: Token limit of a response; None for the policy's own.

    Raises:
        TuningError: The policy was trained with another language model or reward.

    Example:
        >>> agent = CandidateAgent(lm, reward, load_policy("ppo", lm, reward))  # doctest: +SKIP
        >>> [answer] = agent.generate([prompt], Budget(tokens=800))  # doctest: +SKIP
    """

    name = "candidates"

    def __init__(
        self,
        language_model: LanguageModel,
        reward_model: RewardLike,
        policy: CandidatePolicy,
        *,
        max_response_tokens: int | None = None,
    ) -> None:
        reward_model = as_reward_model(reward_model)
        policy.check_fits(language_model, reward_model)
        view = policy.view
        super().__init__(
            language_model,
            reward_model,
            max_response_tokens=max_response_tokens or view.max_response_tokens,
            chunk_tokens=view.chunk_tokens,
            params=view.params,
        )
        self.policy = policy
        self._shared_proposer: CandidateProposer | None = None
        resolved = view.resolved(policy.encoder)
        self.encoder = None if isinstance(resolved, str) else resolved

    async def plan(self, search: Search) -> None:
        """One episode."""
        node: Node | None = search.tree.root
        known: Known = {}
        while node is not None and not node.is_terminal:
            node = await self._chosen(search, node, known)

    async def _chosen(self, search: Search, node: Node, known: Known) -> Node | None:
        """The child that the policy chooses; None where the budget does not allow the choice."""
        count = self.policy.view.num_candidates
        [row] = await search.expand([Expansion(node, count, self.chunk_tokens, valued=False)])
        proposer = self._proposer(node.state.prompt)
        looking = proposer.features_bound(node.state) + Usage(value_flops=self.policy.flops)
        reserve = Usage() if search.tree.best() is not None else search.finish_usage(node)
        if len(row) < count or not search.ledger.affords(looking + reserve):
            return None
        chunks = [child.chunk for child in row if child.chunk is not None]
        features = await ask(
            proposer.features,
            states=[node.state],
            proposals=[chunks],
            ledgers=[search.ledger],
            known=[known],
        )
        search.ledger.charge(Usage(value_flops=self.policy.flops))
        scores = self.policy.scores(features)[0]
        best = int(np.argmax(scores))
        for child, score in zip(row, scores, strict=True):
            child.note = f"{self.policy.algorithm}: {score:.3g}"
        row[best].note += ", chosen"
        return row[best]

    def _proposer(self, prompt: Prompt) -> CandidateProposer:
        """One for all searches, so that its calls are merged."""
        if self._shared_proposer is None:
            view = replace(self.policy.view, max_response_tokens=self.max_response_tokens)
            by_model = view.encoder == "language_model"
            self._shared_proposer = view.proposer(
                self.language_model,
                self.reward_model,
                [prompt],
                "language_model" if by_model else self.encoder,
            )
        return self._shared_proposer

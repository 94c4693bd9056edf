"""Use a trained candidate policy: as an agent with budgets, and in whole episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mbrl_text_env.agents.driver import ask
from mbrl_text_env.agents.search import Expansion, Planner, Search
from mbrl_text_env.agents.tree import Node
from mbrl_text_env.language_models.base import LanguageModel, spawn_seed
from mbrl_text_env.mdp import initial, is_terminal, response_limit, transition
from mbrl_text_env.proposer import CandidateProposer, Known
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, RewardModel, score_responses
from mbrl_text_env.types import FloatArray, Ledger, Prompt, TextState, Usage

if TYPE_CHECKING:
    # Needs torch, which is not needed to list agents by name.
    from mbrl_text_env.agents.model_free.candidate_policy import CandidatePolicy

Choose = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.int64]]
"""Maps features float32[B, layout.size] to chosen candidates, int64[B]."""


class CandidateAgent(Planner):
    """An agent whose trained policy (PPO or DQN) chooses among K proposed chunks at each step.

    Each round is an episode with new candidates. All K chunks of a step are charged, and so are the
    policy's features.

    Args:
        policy: A policy from `train_ppo` or `train_dqn`. It sets the number, length and temperature
            of the chunks. A policy for another model or reward is a `TuningError`.
        max_response_tokens: Maximum number of tokens in a response; None uses the policy's limit.

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
        """Run one episode."""
        node: Node | None = search.tree.root
        known: Known = {}
        while node is not None and not node.is_terminal:
            node = await self._chosen(search, node, known)

    async def _chosen(self, search: Search, node: Node, known: Known) -> Node | None:
        """Return the child that the policy chooses; None if the budget does not allow a choice."""
        count = self.policy.view.num_candidates
        [row] = await search.expand([Expansion(node, count, self.chunk_tokens, valued=False)])
        proposer = self._proposer(node.state.prompt)
        looking = proposer.features_bound(node.state) + Usage(value_flops=self.policy.flops)
        reserve = Usage() if search.tree.best() is not None else search.finish_usage(node.state)
        if len(row) < count or not search.ledger.affords(looking + reserve):
            return None
        features = await ask(
            proposer.features,
            states=[node.state],
            proposals=[[child.chunk for child in row if child.chunk is not None]],
            ledgers=[search.ledger],
            known=[known],
        )
        search.ledger.charge(Usage(value_flops=self.policy.flops))
        scores = self.policy.scores(features)[0]
        for child, score in zip(row, scores, strict=True):
            child.note = f"{self.policy.algorithm}: {score:.3g}"
        chosen = row[int(np.argmax(scores))]
        chosen.note += ", chosen"
        return chosen

    def _proposer(self, prompt: Prompt) -> CandidateProposer:
        """One proposer for all searches, so that its calls are merged."""
        if self._shared_proposer is None:
            view = replace(self.policy.view, max_response_tokens=self.max_response_tokens)
            encoder = view.encoder if view.encoder == "language_model" else self.encoder
            self._shared_proposer = view.proposer(
                self.language_model, self.reward_model, [prompt], encoder
            )
        return self._shared_proposer


def play(
    proposer: CandidateProposer,
    choose: Choose,
    states: Sequence[TextState],
    seeds: Sequence[int],
    ledgers: Sequence[Ledger],
) -> list[TextState]:
    """Choose chunks until all B responses have ended; return the terminal states.

    Each state's candidates are derived from its seed, and its usage is charged to its ledger.
    """
    found = list(states)
    known: list[Known] = [{} for _ in states]
    task = proposer.task
    while going := [i for i, state in enumerate(found) if not is_terminal(state)]:
        now, paid = [found[i] for i in going], [ledgers[i] for i in going]
        proposals = proposer.propose(now, [seeds[i] for i in going], paid)
        features = proposer.features(now, proposals, paid, [known[i] for i in going])
        for i, row, k in zip(going, proposals, choose(features).tolist(), strict=True):
            limit = response_limit(found[i], task.tokenizer, task.max_response_tokens)
            found[i] = transition(found[i], row[k], limit)
    return found


def evaluate(
    policy: CandidatePolicy,
    language_model: LanguageModel,
    reward_model: RewardModel,
    prompts: Sequence[Prompt],
    *,
    episodes: int = 1,
    seed: int = 0,
    ledger: Ledger | None = None,
    choose: Callable[[Any], Any] | None = None,
) -> FloatArray:
    """Scores of E episodes for each of P prompts, float64[P, E].

    `choose` replaces the policy: it maps features to candidates, for example at random. Two
    policies with the same seed get the same first candidates.
    """
    policy.check_fits(language_model, reward_model)
    encoder = policy.view.resolved(policy.encoder)
    proposer = policy.view.proposer(language_model, reward_model, prompts, encoder)
    states = [initial(prompt, language_model) for prompt in prompts for _ in range(episodes)]
    seeds = [spawn_seed(seed, e) for _ in prompts for e in range(episodes)]
    ledgers = [ledger if ledger is not None else Ledger()] * len(states)
    ended = play(proposer, choose or policy.choose, states, seeds, ledgers)
    texts = [language_model.decode(state.response_ids) for state in ended]
    asked = [state.prompt for state in ended]
    scores = score_responses(reward_model, asked, texts, ledgers=ledgers).total
    return scores.reshape(len(prompts), episodes)

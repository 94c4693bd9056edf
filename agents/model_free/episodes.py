"""Episodes in which something chooses among candidates, all side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mbrl_text_env.agents.model_free.candidate_policy import CandidatePolicy
from mbrl_text_env.language_models.base import LanguageModel, spawn_seed
from mbrl_text_env.proposer import CandidateProposer, Known
from mbrl_text_env.rewards.base import RewardModel, score_responses
from mbrl_text_env.types import (
    FloatArray,
    Ledger,
    Prompt,
    TextState,
    initial,
    is_terminal,
    response_limit,
    transition,
)

Choose = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.int64]]
"""From features float32[B, layout.size] to the candidates chosen, int64[B]."""


def play(
    proposer: CandidateProposer,
    choose: Choose,
    states: Sequence[TextState],
    seeds: Sequence[int],
    ledgers: Sequence[Ledger],
) -> list[TextState]:
    """Choose chunk after chunk until all responses have ended; returns the B terminal states.

    Args:
        proposer: Proposes and describes the candidates.
        choose: The policy.
        states: B states, which are played side by side.
        seeds: One a state: its candidates follow from it.
        ledgers: One a state; charged for candidates and features.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> play(
        ...     proposer, lambda rows: rng.integers(4, size=len(rows)), states, seeds, ledgers
        ... )  # doctest: +SKIP
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
    """Scores of episodes in which the policy chooses, float64[P, E].

    Args:
        policy: Chooses, unless `choose` does; it says what is proposed and seen in any case.
        language_model: Proposes.
        reward_model: Scores.
        prompts: P prompts.
        episodes: E, of each prompt.
        seed: Of the candidates: two policies with one seed are offered the same at the start.
        ledger: Is charged.
        choose: Instead of the policy: from features to candidates, such as a random choice to
            compare with.

    Raises:
        TuningError: The policy was trained with other models.
        RewardError: The reward failed.

    Example:
        >>> chosen = evaluate(policy, lm, reward, test_prompts, episodes=4)  # doctest: +SKIP
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

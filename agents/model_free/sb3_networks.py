"""Policies of stable-baselines3 that score each candidate with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import nn

from mbrl_text_env.agents.model_free.candidate_policy import CandidateScorer, StateValue
from mbrl_text_env.proposer import FeatureLayout


class _ActorAndCritic(nn.Module):
    """Two networks with the methods of stable-baselines3's extractor."""

    def __init__(self, layout: FeatureLayout, hidden: Sequence[int]) -> None:
        super().__init__()
        self.scorer, self.value = CandidateScorer(layout, hidden), StateValue(layout, hidden)
        self.forward_actor, self.forward_critic = self.scorer.forward, self.value.forward

    def forward(self, features: torch.Tensor) -> Any:
        return self.scorer(features), self.value(features)


class _QValues(_ActorAndCritic):
    """The value of the state, and what each candidate adds to it."""

    def forward(self, features: torch.Tensor) -> Any:
        return self.value(features) + self.scorer(features)


class CandidateActorCritic(ActorCriticPolicy):
    """PPO's policy: a logit for each candidate, and the value of the state.

    Args:
        *args: See `ActorCriticPolicy`, as for the other keywords.
        layout: Of the observations.
        hidden: Sizes of the hidden layers of both networks; none for linear ones.

    Example:
        >>> layout = env.get_wrapper_attr("proposer").layout  # doctest: +SKIP
        >>> PPO(
        ...     CandidateActorCritic, env, policy_kwargs={"layout": layout, "hidden": (64,)}
        ... )  # doctest: +SKIP
    """

    def __init__(
        self, *args: Any, layout: FeatureLayout, hidden: Sequence[int] = (64,), **kwargs: Any
    ) -> None:
        self.layout, self.hidden = layout, tuple(hidden)
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.mlp_extractor: Any = _ActorAndCritic(self.layout, self.hidden)
        # The two networks give logits and values themselves.
        networks: Any = self
        networks.action_net, networks.value_net = nn.Identity(), nn.Identity()
        options: Any = self.optimizer_kwargs
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **options)  # type: ignore[call-arg, unused-ignore]


class CandidateDQNPolicy(DQNPolicy):
    """DQN's policy: a value for each candidate; the arguments are `CandidateActorCritic`'s."""

    def __init__(
        self, *args: Any, layout: FeatureLayout, hidden: Sequence[int] = (64,), **kwargs: Any
    ) -> None:
        self.layout, self.hidden = layout, tuple(hidden)
        super().__init__(*args, **kwargs)

    def make_q_net(self) -> QNetwork:
        """A network with weights of its own."""
        network = QNetwork(**self._update_features_extractor(self.net_args))
        network.q_net = _QValues(self.layout, self.hidden)  # type: ignore[assignment, unused-ignore]
        return network.to(self.device)


def scorer_of(policy: BasePolicy) -> CandidateScorer:
    """The part of a policy that chooses: the candidate with the highest score is the greedy one."""
    networks: Any = policy
    found = networks.q_net.q_net if isinstance(policy, DQNPolicy) else networks.mlp_extractor
    scorer: CandidateScorer = found.scorer
    return scorer

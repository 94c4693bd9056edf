"""PPO and DQN of stable-baselines3 learn to choose among the chunks that a language model proposes.

The language model stays as it is; what is learned is which of its K candidates to take. All
environments are stepped together, with one call of the language model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from mbrl_text_env.agents.model_free.choice_settings import (
    ChoiceReport,
    ChoiceSettings,
    DQNSettings,
    PPOSettings,
)
from mbrl_text_env.agents.model_free.sb3_networks import CandidateActorCritic, CandidateDQNPolicy
from mbrl_text_env.agents.model_free.sb3_training import Training
from mbrl_text_env.agents.model_free.vec_env import VectorEnvAdapter
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.prompts import as_prompts
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.types import Prompt

_PPO_DEFAULTS, _DQN_DEFAULTS = PPOSettings(), DQNSettings()


def train_ppo(
    language_model: LanguageModel,
    reward_model: Any,
    prompts: Sequence[Prompt],
    folder: str | Path,
    settings: PPOSettings = _PPO_DEFAULTS,
    *,
    validation: Sequence[Prompt] = (),
    encoder: Encoder | None = None,
    callbacks: Sequence[BaseCallback] = (),
    progress_bar: bool = False,
) -> ChoiceReport:
    """Train a choice among candidates with Proximal Policy Optimization.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, by
    stable-baselines3's `PPO`. Deviations: the actor scores each candidate with the same weights
    (`CandidateScorer`); a response that meets its token limit counts as ended, not as cut off.

    Checkpoints lie in `<folder>-checkpoints`, from which a call that was stopped goes on, if
    prompts, models and settings are the same; on a CPU it ends as if it had not been stopped. They
    are removed at the end. They and the policy's folder hold safetensors and JSON alone.

    Args:
        language_model: Proposes the candidates.
        reward_model: A reward model, or whatever `as_reward_model` accepts; of the order of 1.
        prompts: To train on, with different ids.
        folder: Where the policy is written, with `ledger.json` and `curve.json`; `load_policy`
            takes it.
        settings: See `PPOSettings`.
        validation: Prompts that the policy is measured on every `eval_steps`; none by default.
        encoder: One's own, with `encoder="own"` in the settings.
        callbacks: Further callbacks of stable-baselines3, such as its `EvalCallback`. What they
            keep is theirs to keep: a training that goes on starts them anew.
        progress_bar: Show one (tqdm).

    Raises:
        TuningError: There are no prompts, two have one id, the reward does not apply to one or
            gives all first episodes one score (there is nothing to learn), the checkpoints are of
            another training, or there is no space left.
        RewardError: The reward failed.
        KeyboardInterrupt: It was stopped; a checkpoint is saved and the same call goes on.

    Example:
        >>> report = train_ppo(embedded(), make("sentiment"), prompts, "ppo")  # doctest: +SKIP
        >>> policy = load_policy("ppo")  # doctest: +SKIP
        >>> agent = CandidateAgent(embedded(), make("sentiment"), policy)  # doctest: +SKIP
    """

    def make(env: VectorEnvAdapter) -> BaseAlgorithm:
        return PPO(
            CandidateActorCritic,
            env,
            n_steps=settings.rollout_steps // settings.num_envs,
            n_epochs=settings.epochs,
            gae_lambda=settings.gae_lambda,
            clip_range=settings.clip_range,
            ent_coef=settings.entropy,
            **_common(env, settings, settings.batch_size),
        )

    models = language_model, as_reward_model(reward_model), as_prompts(prompts)
    training = Training("ppo", *models, Path(folder), settings, as_prompts(validation), encoder)
    return training.run(make, callbacks, progress_bar)


def train_dqn(
    language_model: LanguageModel,
    reward_model: Any,
    prompts: Sequence[Prompt],
    folder: str | Path,
    settings: DQNSettings = _DQN_DEFAULTS,
    *,
    validation: Sequence[Prompt] = (),
    encoder: Encoder | None = None,
    callbacks: Sequence[BaseCallback] = (),
    progress_bar: bool = False,
) -> ChoiceReport:
    """Train a choice among candidates with Deep Q-Learning; arguments and errors: `train_ppo`.

    Source: Mnih et al., "Human-level control through deep reinforcement learning", Nature 2015, by
    stable-baselines3's `DQN`. Deviations: Q is the sum of a score for each candidate, by the same
    weights, and a value of the state, as in Wang et al., "Dueling Network Architectures for Deep
    Reinforcement Learning", 2016, without the subtraction of the mean; with several environments
    all of them explore in the same steps; a response that meets its token limit counts as ended.
    """

    def make(env: VectorEnvAdapter) -> BaseAlgorithm:
        return DQN(
            CandidateDQNPolicy,
            env,
            buffer_size=min(settings.buffer_size, settings.total_steps + settings.num_envs),
            learning_starts=settings.learning_starts,
            train_freq=1,
            gradient_steps=settings.updates,
            # `Training` updates the target network.
            target_update_interval=sys.maxsize,
            exploration_fraction=settings.exploration_fraction,
            exploration_final_eps=settings.exploration_final,
            **_common(env, settings, settings.batch_size),
        )

    models = language_model, as_reward_model(reward_model), as_prompts(prompts)
    training = Training("dqn", *models, Path(folder), settings, as_prompts(validation), encoder)
    return training.run(make, callbacks, progress_bar)


def _common(env: VectorEnvAdapter, settings: ChoiceSettings, batch_size: int) -> dict[str, Any]:
    layout = env.get_attr("proposer", [0])[0].layout
    return {
        "learning_rate": settings.learning_rate,
        "batch_size": batch_size,
        "gamma": settings.discount,
        "policy_kwargs": {"layout": layout, "hidden": settings.hidden},
        "seed": settings.seed,
        "device": "cpu",
    }

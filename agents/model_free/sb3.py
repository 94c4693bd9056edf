"""Train a choice among a language model's candidates with stable-baselines3's PPO and DQN."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from mbrl_text_env.agents.learning import training
from mbrl_text_env.agents.learning.training import CURVE, LEDGER, TuningError
from mbrl_text_env.agents.model_free import sb3_parts
from mbrl_text_env.agents.model_free.candidate_agent import evaluate
from mbrl_text_env.agents.model_free.candidate_policy import (
    POLICY,
    CandidatePolicy,
    ChoiceReport,
    ChoiceSettings,
    DQNSettings,
    Measured,
    PPOSettings,
)
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.files import restored
from mbrl_text_env.language_models.base import LanguageModel, spawn_seed
from mbrl_text_env.prompts import as_prompts
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import reward_name
from mbrl_text_env.runs import identity, own_randomness, prompt_digests
from mbrl_text_env.types import Ledger, Prompt, Usage
from mbrl_text_env.wrappers import CandidateChunksVector, make_candidate_chunks

_PPO_DEFAULTS, _DQN_DEFAULTS = PPOSettings(), DQNSettings()
_VALIDATION_STREAM = 1
# Cost of a forward and backward pass, in forward passes.
_PASSES = 3


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
    """Train a policy that chooses among candidates with Proximal Policy Optimization.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, by
    stable-baselines3's `PPO`. Deviations: the actor scores each candidate with the same weights; a
    response that reaches its token limit is terminated, not truncated.

    An interrupted run resumes from its checkpoints in `<folder>-checkpoints`; on a CPU the result
    is the same. The checkpoints and the policy's folder have only safetensors and JSON.

    Args:
        reward_model: Anything that `as_reward_model` accepts; its scores should be of order 1.
        prompts: Training prompts with distinct ids.
        folder: Output folder of the policy, with `ledger.json` and `curve.json`; load it with
            `load_policy`.
        validation: Prompts to evaluate the policy on every `eval_steps`; none by default.
        encoder: A custom encoder, with `encoder="own"` in the settings.
        callbacks: Further stable-baselines3 callbacks, such as `EvalCallback`. Checkpoints do not
            save their state, so they start again when a run resumes.

    Raises:
        TuningError: Prompts are missing, duplicated or unsuited to this reward, all first episodes
            have the same score, the checkpoints are from another training, or the disk is full.
        RewardError: The reward failed.
        KeyboardInterrupt: The run was stopped; a checkpoint is saved and the same call resumes it.

    Example:
        >>> report = train_ppo(embedded(), make("sentiment"), prompts, "ppo")  # doctest: +SKIP
        >>> policy = load_policy("ppo")  # doctest: +SKIP
    """
    given = (reward_model, prompts, folder, settings, validation, encoder)
    return Training("ppo", language_model, *given).run(callbacks, progress_bar)


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
    """Train a policy that chooses among candidates with Deep Q-Learning, like `train_ppo`.

    Source: Mnih et al., "Human-level control through deep reinforcement learning", Nature 2015, by
    stable-baselines3's `DQN`. Deviations: Q is the sum of a score of each candidate, with shared
    weights, and a state value, as in Wang et al., "Dueling Network Architectures for Deep
    Reinforcement Learning", 2016, but without subtracting the mean; parallel environments explore
    in the same steps; a response that reaches its token limit is terminated, not truncated.
    """
    given = (reward_model, prompts, folder, settings, validation, encoder)
    return Training("dqn", language_model, *given).run(callbacks, progress_bar)


@dataclass(eq=False)
class Training(BaseCallback):
    """A training run: it records episodes, and between rollouts evaluates, saves and stops."""

    algorithm: str
    language_model: LanguageModel
    reward_model: Any
    prompts: Sequence[Prompt]
    folder: Any
    settings: ChoiceSettings
    validation: Sequence[Prompt]
    encoder: Encoder | None
    curve: list[tuple[int, float]] = field(default_factory=list)
    validated: list[Measured] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    wall_seconds: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()
        self.reward_model, self.folder = as_reward_model(self.reward_model), Path(self.folder)
        self.prompts, self.validation = as_prompts(self.prompts), as_prompts(self.validation)
        self.checkpoints = training.checkpoints_of(self.folder)
        self.is_stopped = False
        # Number of checkpoints due so far; unknown before the first rollout of this call.
        self._saves: int | None = None

    def run(self, callbacks: Sequence[BaseCallback], progress_bar: bool) -> ChoiceReport:
        """Run or resume the training to the end and write the policy; see `train_ppo`."""
        POLICY.check_target(self.folder)
        models = self.reward_model, self.language_model
        training.check_prompts(self.prompts, *models)
        training.check_prompts(self.validation, *models, least=0, noun="validation")
        settings = self.settings
        resumed = training.claim(self.checkpoints, self._described())
        with own_randomness(settings.seed), training.stop_asked("this rollout") as self._asked:
            env = self._env = self._made_env()
            model = _made_model(sb3_parts.ResumableEnv(env), settings)
            if resumed is not None:
                self._recall(Path(resumed), model)
            # The cost of restoring a checkpoint is not part of the training.
            self._noted, self._since = env.ledger.usage, time.perf_counter()
            left = settings.total_steps - model.num_timesteps
            if left > 0:
                model.learn(
                    left,
                    CallbackList([self, *callbacks]),
                    reset_num_timesteps=resumed is None,
                    progress_bar=progress_bar,
                )
            if self.is_stopped:
                steps = f"after {model.num_timesteps} of {settings.total_steps} steps"
                raise training.stopped(steps, self.checkpoints)
            self._note()
            if self.validation and self.validated[-1].steps < model.num_timesteps:
                self._validate(model)
        report = ChoiceReport(
            algorithm=self.algorithm,
            steps=model.num_timesteps,
            curve=tuple(self.curve),
            validation=tuple(self.validated),
            usage=self.usage,
            training_flops=self._training_flops(model),
            wall_seconds=self.wall_seconds,
        )
        self._policy(model).save(self.folder, {LEDGER: report.ledger(), CURVE: self._curves()})
        shutil.rmtree(self.checkpoints)
        return report

    def _policy(self, model: BaseAlgorithm) -> CandidatePolicy:
        """The current policy."""
        networks: Any = model.policy
        settings, names = self.settings, (self.language_model.name, reward_name(self.reward_model))
        made = networks.scorer, settings.view, settings.hidden, self.algorithm
        return CandidatePolicy(*made, *names, self.encoder)

    def _validate(self, model: BaseAlgorithm) -> None:
        """Evaluate the policy on the validation prompts, on the same first candidates."""
        ledger = Ledger()
        seed = spawn_seed(self.settings.seed, _VALIDATION_STREAM)
        given = self._policy(model), self.language_model, self.reward_model, self.validation
        episodes = self.settings.eval_episodes
        scores = evaluate(*given, episodes=episodes, seed=seed, ledger=ledger)
        means, flops = tuple(scores.mean(axis=1).tolist()), self._training_flops(model)
        taken = self.usage, flops, self.wall_seconds, ledger.usage
        self.validated.append(Measured(model.num_timesteps, means, *taken))

    def _recall(self, checkpoint: Path, model: BaseAlgorithm) -> None:
        by_id = {prompt.id: prompt for prompt in self.prompts}
        notes = sb3_parts.read_checkpoint(checkpoint, model, self._env, by_id)
        self.curve = [(int(steps), float(score)) for steps, score in notes["episodes"]]
        self.validated = [restored(Measured, row) for row in notes["validation"]]
        self.usage, self.wall_seconds = Usage(**notes["usage"]), notes["wall_seconds"]

    def _curves(self) -> dict[str, Any]:
        return {"episodes": self.curve, "validation": [asdict(row) for row in self.validated]}

    def _made_env(self) -> CandidateChunksVector:
        settings = self.settings
        view = make_candidate_chunks(
            self.language_model,
            num_envs=settings.num_envs,
            prompts=self.prompts,
            reward_model=self.reward_model,
            reward=settings.reward,
            max_response_tokens=settings.max_response_tokens,
            max_chunk_tokens=settings.chunk_tokens,
            autoreset_mode="SameStep",
            num_candidates=settings.num_candidates,
            params=settings.params,
            encoder=settings.resolved(self.encoder),
            prefix_rewards=settings.prefix_rewards,
        )
        assert isinstance(view, CandidateChunksVector)
        base: Any = view.env
        base.task.ledger = view.ledger
        return view

    def _described(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        return {
            "algorithm": self.algorithm,
            "settings": asdict(self.settings),
            "language_model": identity(self.language_model),
            "reward": identity(self.reward_model),
            "prompts": [*prompt_digests(self.prompts).items()],
            "validation": [*prompt_digests(self.validation).items()],
        }

    def _training_flops(self, model: BaseAlgorithm) -> float:
        """FLOPs of the network: one choice per step, and the updates."""
        settings, steps = self.settings, model.num_timesteps
        learned = 0
        if isinstance(settings, PPOSettings):
            learned = settings.epochs * steps
        elif isinstance(settings, DQNSettings):
            calls = steps // settings.num_envs - settings.learning_starts // settings.num_envs
            learned = max(0, calls) * settings.updates * settings.batch_size
        weights = sum(p.numel() for p in model.policy.parameters())
        return 2.0 * weights * settings.num_candidates * (steps + _PASSES * learned)

    # Called by stable-baselines3.

    def _on_rollout_start(self) -> None:
        """Evaluate, save or stop between two rollouts, after the updates."""
        settings, steps = self.settings, self.num_timesteps
        if self.validation:
            seen = self.validated[-1].steps if self.validated else -settings.eval_steps
            if steps - seen >= settings.eval_steps:
                self._note()
                self._validate(self.model)
                self._since = time.perf_counter()
        saves = steps // settings.save_steps
        is_due = self._saves is not None and saves > self._saves
        self._saves = saves
        if is_due or self._asked:
            self._note()
            taken = {"usage": asdict(self.usage), "wall_seconds": self.wall_seconds}
            sb3_parts.write_checkpoint(
                self.checkpoints, self.model, self._env, self._curves() | taken
            )
            self.is_stopped = bool(self._asked)

    def _on_step(self) -> bool:
        if self.is_stopped:
            return False
        self._note_episodes()
        settings: Any = self.settings
        model: Any = self.model
        if isinstance(settings, DQNSettings):
            # By the steps of the whole training, which checkpoints keep; DQN counts its calls.
            every = max(settings.target_interval // settings.num_envs, 1)
            if self.num_timesteps // settings.num_envs % every == 0:
                model.q_net_target.load_state_dict(model.q_net.state_dict())
        return True

    def _note(self) -> None:
        """Add the usage and time since the last call."""
        usage, now = self._env.ledger.usage, time.perf_counter()
        self.usage += usage - self._noted
        self.wall_seconds += now - self._since
        self._noted, self._since = usage, now

    def _note_episodes(self) -> None:
        curve, before = self.curve, len(self.curve)
        for info in self.locals["infos"]:
            if "terminal_observation" in info:
                curve.append((self.num_timesteps, float(info["score"])))
        least = self.settings.flat_episodes
        if before < least <= len(curve) and len({score for _, score in curve}) == 1:
            raise TuningError(
                f"reward {reward_name(self.reward_model)!r}: expected scores that differ, got "
                f"{curve[0][1]:.4g} for all of the first {len(curve)} episodes: there is nothing "
                "to learn from. Check the reward, or use other prompts."
            )


def _made_model(env: sb3_parts.VectorEnvAdapter, settings: ChoiceSettings) -> BaseAlgorithm:
    layout = env.get_attr("proposer", [0])[0].layout
    common: dict[str, Any] = {
        "learning_rate": settings.learning_rate,
        "gamma": settings.discount,
        "policy_kwargs": {"layout": layout, "hidden": settings.hidden},
        "seed": settings.seed,
        "device": "cpu",
    }
    if isinstance(settings, PPOSettings):
        return PPO(
            sb3_parts.CandidateActorCritic,
            env,
            n_steps=settings.rollout_steps // settings.num_envs,
            batch_size=settings.batch_size,
            n_epochs=settings.epochs,
            gae_lambda=settings.gae_lambda,
            clip_range=settings.clip_range,
            ent_coef=settings.entropy,
            **common,
        )
    assert isinstance(settings, DQNSettings)
    return DQN(
        sb3_parts.CandidateDQNPolicy,
        env,
        buffer_size=min(settings.buffer_size, settings.total_steps + settings.num_envs),
        batch_size=settings.batch_size,
        learning_starts=settings.learning_starts,
        train_freq=1,
        gradient_steps=settings.updates,
        # `Training` updates the target network.
        target_update_interval=sys.maxsize,
        exploration_fraction=settings.exploration_fraction,
        exploration_final_eps=settings.exploration_final,
        **common,
    )

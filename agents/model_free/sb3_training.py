"""One training of PPO or DQN: its environment, its checkpoints, and what is known so far."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from mbrl_text_env.agents.learning.prompt_checks import check_prompts, prompts_digest
from mbrl_text_env.agents.learning.training import (
    CURVE,
    LEDGER,
    TuningError,
    checkpoints_of,
    claim,
    stop_asked,
    stopped,
)
from mbrl_text_env.agents.model_free.candidate_policy import CandidatePolicy, check_policy_target
from mbrl_text_env.agents.model_free.choice_settings import (
    ChoiceReport,
    ChoiceSettings,
    DQNSettings,
    Measured,
    PPOSettings,
)
from mbrl_text_env.agents.model_free.episodes import evaluate
from mbrl_text_env.agents.model_free.sb3_checkpoint import (
    ResumableEnv,
    read_checkpoint,
    write_checkpoint,
)
from mbrl_text_env.agents.model_free.sb3_networks import scorer_of
from mbrl_text_env.agents.model_free.vec_env import VectorEnvAdapter
from mbrl_text_env.candidates import CandidateChunksVector
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.identity import identity
from mbrl_text_env.language_models.base import LanguageModel, spawn_seed
from mbrl_text_env.ledger import Ledger, Usage
from mbrl_text_env.rewards.base import RewardModel, reward_name
from mbrl_text_env.training import own_randomness
from mbrl_text_env.types import Prompt
from mbrl_text_env.vector import TextGenerationVectorEnv

_VALIDATION_STREAM = 1
# Forward and backward pass of a small network, in forward passes.
_PASSES = 3


@dataclass(eq=False)
class Training:
    """One training: its environment, its checkpoints, and what is known of it so far."""

    algorithm: str
    language_model: LanguageModel
    reward_model: RewardModel
    prompts: Sequence[Prompt]
    folder: Path
    settings: ChoiceSettings
    validation: Sequence[Prompt]
    encoder: Encoder | None
    curve: list[tuple[int, float]] = field(default_factory=list)
    validated: list[Measured] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    wall_seconds: float = 0.0

    def run(
        self,
        make: Callable[[VectorEnvAdapter], BaseAlgorithm],
        callbacks: Sequence[BaseCallback],
        progress_bar: bool,
    ) -> ChoiceReport:
        """Train, or go on, to the end, and write the policy; see `train_ppo`."""
        check_policy_target(self.folder)
        for prompts, least in ((self.prompts, 1), (self.validation, 0)):
            check_prompts(prompts, self.reward_model, self.language_model, least)
        checkpoints = checkpoints_of(self.folder)
        resumed = claim(checkpoints, self._described())
        with own_randomness(self.settings.seed), stop_asked("this rollout") as asked:
            env = self._env()
            model = make(ResumableEnv(env))
            if resumed is not None:
                by_id = {prompt.id: prompt for prompt in self.prompts}
                self._recall(read_checkpoint(Path(resumed), model, env, by_id))
            watch = _Watch(self, env, checkpoints, asked)
            left = self.settings.total_steps - model.num_timesteps
            if left > 0:
                model.learn(
                    left,
                    CallbackList([watch, *callbacks]),
                    reset_num_timesteps=resumed is None,
                    progress_bar=progress_bar,
                )
            if watch.stopped:
                steps = f"after {model.num_timesteps} of {self.settings.total_steps} steps"
                raise stopped(steps, checkpoints)
            watch.note()
            if self.validation and self.validated[-1].steps < model.num_timesteps:
                self.validate(model)
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
        shutil.rmtree(checkpoints)
        return report

    def _policy(self, model: BaseAlgorithm) -> CandidatePolicy:
        """The policy as it is now."""
        return CandidatePolicy(
            scorer_of(model.policy),
            self.settings.view,
            self.settings.hidden,
            self.algorithm,
            self.language_model.name,
            reward_name(self.reward_model),
            self.encoder,
        )

    def validate(self, model: BaseAlgorithm) -> None:
        """Measure the policy on the validation prompts, on the same candidates each time."""
        ledger = Ledger()
        scores = evaluate(
            self._policy(model),
            self.language_model,
            self.reward_model,
            self.validation,
            episodes=self.settings.eval_episodes,
            seed=spawn_seed(self.settings.seed, _VALIDATION_STREAM),
            ledger=ledger,
        )
        self.validated.append(
            Measured(
                model.num_timesteps,
                tuple(scores.mean(axis=1).tolist()),
                self.usage,
                self._training_flops(model),
                self.wall_seconds,
                ledger.usage,
            )
        )

    def notes(self) -> dict[str, Any]:
        """What a checkpoint keeps of this, as JSON values."""
        return self._curves() | {"usage": asdict(self.usage), "wall_seconds": self.wall_seconds}

    def _recall(self, notes: dict[str, Any]) -> None:
        self.curve = [(int(steps), float(score)) for steps, score in notes["episodes"]]
        self.validated = [Measured.from_json(row) for row in notes["validation"]]
        self.usage, self.wall_seconds = Usage(**notes["usage"]), notes["wall_seconds"]

    def _curves(self) -> dict[str, Any]:
        return {"episodes": self.curve, "validation": [asdict(row) for row in self.validated]}

    def _env(self) -> CandidateChunksVector:
        settings = self.settings
        base = TextGenerationVectorEnv(
            settings.num_envs,
            self.prompts,
            self.language_model,
            self.reward_model,
            reward=settings.reward,
            max_response_tokens=settings.max_response_tokens,
            max_chunk_tokens=settings.chunk_tokens,
            on_reward_error="raise",
            autoreset_mode="SameStep",
        )
        view = CandidateChunksVector(
            base,
            self.language_model,
            num_candidates=settings.num_candidates,
            params=settings.params,
            encoder=settings.resolved(self.encoder),
            prefix_rewards=settings.prefix_rewards,
        )
        base.task.ledger = view.ledger
        return view

    def _described(self) -> dict[str, Any]:
        """Whatever the result depends on."""
        return {
            "algorithm": self.algorithm,
            "settings": asdict(self.settings),
            "language_model": identity(self.language_model),
            "reward": identity(self.reward_model),
            "prompts": prompts_digest(self.prompts),
            "validation": prompts_digest(self.validation),
        }

    def _training_flops(self, model: BaseAlgorithm) -> float:
        """Of the network: a choice a step, and the updates."""
        settings, steps = self.settings, model.num_timesteps
        learned = 0
        if isinstance(settings, PPOSettings):
            learned = settings.epochs * steps
        elif isinstance(settings, DQNSettings):
            calls = steps // settings.num_envs - settings.learning_starts // settings.num_envs
            learned = max(0, calls) * settings.updates * settings.batch_size
        weights = sum(p.numel() for p in model.policy.parameters())
        return 2.0 * weights * settings.num_candidates * (steps + _PASSES * learned)


class _Watch(BaseCallback):
    """Notes the episodes, and between two rollouts measures, saves and stops."""

    def __init__(
        self,
        training: Training,
        env: CandidateChunksVector,
        checkpoints: Path,
        asked: list[bool],
    ) -> None:
        super().__init__()
        self.training, self.env, self.checkpoints, self.asked = training, env, checkpoints, asked
        self.stopped = False
        # How often it was due; unknown before the first rollout of this call.
        self._saves: int | None = None
        # What going on from a checkpoint took is not part of the training.
        self._noted, self._since = env.ledger.usage, time.perf_counter()

    def note(self) -> None:
        """Take over what was spent since the last time."""
        usage, now = self.env.ledger.usage, time.perf_counter()
        self.training.usage += usage - self._noted
        self.training.wall_seconds += now - self._since
        self._noted, self._since = usage, now

    def _on_rollout_start(self) -> None:
        """Everything is between two rollouts: trained, and not yet begun again."""
        training, steps = self.training, self.num_timesteps
        settings = training.settings
        if training.validation:
            seen = training.validated[-1].steps if training.validated else -settings.eval_steps
            if steps - seen >= settings.eval_steps:
                self.note()
                training.validate(self.model)
                self._since = time.perf_counter()
        saves = steps // settings.save_steps
        is_due = self._saves is not None and saves > self._saves
        self._saves = saves
        if is_due or self.asked:
            self.note()
            write_checkpoint(self.checkpoints, self.model, self.env, training.notes())
            self.stopped = bool(self.asked)

    def _on_step(self) -> bool:
        if self.stopped:
            return False
        self._note_episodes()
        settings: Any = self.training.settings
        model: Any = self.model
        if isinstance(settings, DQNSettings):
            # By the steps of the whole training, which a checkpoint keeps: DQN counts its calls.
            every = max(settings.target_interval // settings.num_envs, 1)
            if self.num_timesteps // settings.num_envs % every == 0:
                model.q_net_target.load_state_dict(model.q_net.state_dict())
        return True

    def _note_episodes(self) -> None:
        curve = self.training.curve
        before = len(curve)
        for info in self.locals["infos"]:
            if "terminal_observation" in info:
                curve.append((self.num_timesteps, float(info["score"])))
        least = self.training.settings.flat_episodes
        if before < least <= len(curve) and len({score for _, score in curve}) == 1:
            raise TuningError(
                f"reward {reward_name(self.training.reward_model)!r}: expected scores that differ, "
                f"got {curve[0][1]:.4g} for all of the first {len(curve)} episodes: there is "
                "nothing to learn from. Check the reward, or take other prompts."
            )

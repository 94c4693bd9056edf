"""PPO and DQN of stable-baselines3 learn to choose among the chunks that a language model proposes.

The language model stays as it is; what is learned is which of its K candidates to take. All
environments are stepped together, with one call of the language model.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from mbrl_text_env.agents.learning.training import (
    CURVE,
    LEDGER,
    TuningError,
    check_prompts,
    checkpoints_of,
    claim,
    prompts_digest,
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
from mbrl_text_env.agents.model_free.sb3_networks import (
    CandidateActorCritic,
    CandidateDQNPolicy,
    scorer_of,
)
from mbrl_text_env.agents.model_free.vec_env import VectorEnvAdapter
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.env import TextGenerationVectorEnv
from mbrl_text_env.language_models.base import LanguageModel, spawn_seed
from mbrl_text_env.prompts import as_prompts
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardModel, reward_name
from mbrl_text_env.runs import identity, own_randomness
from mbrl_text_env.types import Ledger, Prompt, Usage
from mbrl_text_env.wrappers import CandidateChunksVector

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
        reward_model: A reward model, or anything that `as_reward_model` accepts; of the order of 1.
        prompts: To train on, with different ids.
        folder: Where the policy is written, with `ledger.json` and `curve.json`; `load_policy`
            takes it.
        settings: See `PPOSettings`.
        validation: Prompts that the policy is measured on every `eval_steps`; none by default.
        encoder: One's own, with `encoder="own"` in the settings.
        callbacks: Further callbacks of stable-baselines3, such as its `EvalCallback`. No checkpoint
            has their state: a training that goes on starts them new.
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


_VALIDATION_STREAM = 1
# Forward and backward pass of a small network, in forward passes.
_PASSES = 3


@dataclass(eq=False)
class Training(BaseCallback):
    """One training: it notes the episodes, and between two rollouts measures, saves and stops."""

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

    def __post_init__(self) -> None:
        super().__init__()
        self.is_stopped = False
        self.checkpoints = checkpoints_of(self.folder)
        # How often a checkpoint was due; unknown before the first rollout of this call.
        self._saves: int | None = None

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
        resumed = claim(self.checkpoints, self._described())
        with own_randomness(self.settings.seed), stop_asked("this rollout") as self._asked:
            env = self._env = self._made_env()
            model = make(ResumableEnv(env))
            if resumed is not None:
                by_id = {prompt.id: prompt for prompt in self.prompts}
                self._recall(read_checkpoint(Path(resumed), model, env, by_id))
            # What going on from a checkpoint took is not part of the training.
            self._noted, self._since = env.ledger.usage, time.perf_counter()
            left = self.settings.total_steps - model.num_timesteps
            if left > 0:
                model.learn(
                    left,
                    CallbackList([self, *callbacks]),
                    reset_num_timesteps=resumed is None,
                    progress_bar=progress_bar,
                )
            if self.is_stopped:
                steps = f"after {model.num_timesteps} of {self.settings.total_steps} steps"
                raise stopped(steps, self.checkpoints)
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

    def _validate(self, model: BaseAlgorithm) -> None:
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

    def _recall(self, notes: dict[str, Any]) -> None:
        self.curve = [(int(steps), float(score)) for steps, score in notes["episodes"]]
        self.validated = [Measured.from_json(row) for row in notes["validation"]]
        self.usage, self.wall_seconds = Usage(**notes["usage"]), notes["wall_seconds"]

    def _curves(self) -> dict[str, Any]:
        return {"episodes": self.curve, "validation": [asdict(row) for row in self.validated]}

    def _made_env(self) -> CandidateChunksVector:
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

    # What stable-baselines3 calls.

    def _on_rollout_start(self) -> None:
        """Everything is between two rollouts: trained, and not yet begun again."""
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
            write_checkpoint(self.checkpoints, self.model, self._env, self._curves() | taken)
            self.is_stopped = bool(self._asked)

    def _on_step(self) -> bool:
        if self.is_stopped:
            return False
        self._note_episodes()
        settings: Any = self.settings
        model: Any = self.model
        if isinstance(settings, DQNSettings):
            # By the steps of the whole training, which a checkpoint keeps: DQN counts its calls.
            every = max(settings.target_interval // settings.num_envs, 1)
            if self.num_timesteps // settings.num_envs % every == 0:
                model.q_net_target.load_state_dict(model.q_net.state_dict())
        return True

    def _note(self) -> None:
        """Take over what was spent since the last time."""
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
                "to learn from. Check the reward, or take other prompts."
            )

"""PPO and DQN of stable-baselines3 learn to choose among the chunks that a language model proposes.

The language model stays as it is; what is learned is which of its K candidates to take. All
environments are stepped together, with one call of the language model.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from agents.learning.loop_prompts import prompts_digest
from agents.learning.lora import TuningError, check_above_zero
from agents.learning.training import checkpoints_of, claim, stop_asked
from agents.model_free.candidate_policy import (
    CandidatePolicy,
    CandidateView,
    check_policy_target,
    play,
    score_states,
)
from agents.model_free.sb3_checkpoint import read_checkpoint, write_checkpoint
from agents.model_free.sb3_networks import CandidateActorCritic, CandidateDQNPolicy, scorer_of
from agents.model_free.train_prompts import check_prompts
from agents.model_free.vec_env import VectorEnvAdapter
from mbrl_text_env.candidates import CandidateChunksVector
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.language_models.base import LanguageModel, spawn_seed
from mbrl_text_env.ledger import Ledger, Usage
from mbrl_text_env.mdp import initial
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardModel, reward_name
from mbrl_text_env.training import own_randomness
from mbrl_text_env.types import FloatArray, Prompt
from mbrl_text_env.vector import TextGenerationVectorEnv

ChunkReward = Literal["terminal", "delta"]
"""When the score is paid: at the end, or chunk by chunk as it rises (the sum is the same)."""

LEDGER, CURVE = "ledger.json", "curve.json"
"""Files beside the policy: what training took, and the scores of its episodes."""

_VALIDATION_STREAM = 1
# Forward and backward pass of a small network, in forward passes.
_PASSES = 3


@dataclass(frozen=True)
class ChoiceSettings(CandidateView):
    """What PPO and DQN have in common.

    Args:
        num_candidates: See `CandidateView`, as are the next five.
        chunk_tokens: See `CandidateView`.
        max_response_tokens: See `CandidateView`.
        temperature: See `CandidateView`.
        encoder: See `CandidateView`.
        prefix_rewards: See `CandidateView`.
        total_steps: Environment steps, each of which draws K chunks. Whole rollouts are played, so
            it may be a few more.
        num_envs: Environments that are stepped together.
        reward: `"delta"` pays each chunk what it adds to the score of the prefix, which needs a
            score of every prefix; `"terminal"` pays the score at the end.
        hidden: Sizes of the network's hidden layers; none for a linear policy.
        learning_rate: Of Adam.
        discount: Of later rewards; episodes are short, so none by default.
        save_steps: Environment steps between checkpoints.
        eval_steps: Environment steps between two measurements on the validation prompts.
        eval_episodes: Episodes of each validation prompt.
        flat_episodes: If so many first episodes all have one score, that is an error.
        seed: Everything follows from it.

    Raises:
        TuningError: A number is out of its range, or a word unknown.
    """

    total_steps: int = 4096
    num_envs: int = 16
    reward: ChunkReward = "delta"
    hidden: tuple[int, ...] = (64,)
    learning_rate: float = 1e-3
    discount: float = 1.0
    save_steps: int = 1024
    eval_steps: int = 1024
    eval_episodes: int = 1
    flat_episodes: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(
            self, "total_steps", "num_envs", "learning_rate", "save_steps", "eval_steps",
            "eval_episodes", "flat_episodes",
        )  # fmt: skip
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if any(width < 1 for width in self.hidden):
            raise TuningError(f"hidden: expected sizes of at least 1, got {self.hidden!r}.")
        if not 0 < self.discount <= 1:
            raise TuningError(f"discount: expected above 0, at most 1, got {self.discount!r}.")
        if self.reward not in get_args(ChunkReward):
            raise TuningError(
                f"reward: expected one of {get_args(ChunkReward)}, got {self.reward!r}."
            )

    @property
    def view(self) -> CandidateView:
        """What the policy needs to know where it is used."""
        return CandidateView(**{f.name: getattr(self, f.name) for f in fields(CandidateView)})


@dataclass(frozen=True)
class PPOSettings(ChoiceSettings):
    """How PPO learns; see `ChoiceSettings` for the rest.

    Args:
        rollout_steps: Environment steps between two updates, over all environments.
        batch_size: Steps in a batch; at most `rollout_steps`.
        epochs: Passes over a rollout.
        gae_lambda: Of generalised advantage estimation.
        clip_range: Most that the ratio of probabilities may leave 1.
        entropy: Weight of the entropy bonus.

    Raises:
        TuningError: A number is out of its range, or `rollout_steps` is no multiple of `num_envs`.
    """

    rollout_steps: int = 512
    batch_size: int = 128
    epochs: int = 10
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    entropy: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(self, "rollout_steps", "batch_size", "epochs", "clip_range")
        if self.rollout_steps % self.num_envs or self.rollout_steps < self.batch_size:
            raise TuningError(
                f"rollout_steps: expected a multiple of num_envs ({self.num_envs}) and at least "
                f"batch_size ({self.batch_size}), got {self.rollout_steps}."
            )


@dataclass(frozen=True)
class DQNSettings(ChoiceSettings):
    """How DQN learns; see `ChoiceSettings` for the rest.

    Args:
        buffer_size: Transitions that are kept.
        learning_starts: Environment steps before the first update.
        batch_size: Transitions in an update.
        updates: Updates a step of all environments.
        target_interval: Environment steps between two updates of the target network.
        exploration_fraction: Share of the training over which exploration falls.
        exploration_final: Probability of a random choice from then on.

    Raises:
        TuningError: A number is out of its range.
    """

    buffer_size: int = 20_000
    learning_starts: int = 256
    batch_size: int = 128
    updates: int = 8
    target_interval: int = 256
    exploration_fraction: float = 0.4
    exploration_final: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(
            self, "buffer_size", "learning_starts", "batch_size", "updates", "target_interval"
        )
        for name in ("exploration_fraction", "exploration_final"):
            if not 0 <= getattr(self, name) <= 1:
                raise TuningError(f"{name}: expected 0 to 1, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Measured:
    """The policy's choices on the validation prompts, after so much training.

    Args:
        steps: Environment steps so far.
        scores: Mean score of each validation prompt.
        usage: What candidates, features and scores of the training took so far.
        training_flops: Floating-point operations of the network that chooses so far.
        wall_seconds: Of the training so far, measurements aside.
        own_usage: What this measurement took.
    """

    steps: int
    scores: tuple[float, ...]
    usage: Usage
    training_flops: float
    wall_seconds: float
    own_usage: Usage

    @property
    def mean(self) -> float:
        """Mean over the prompts."""
        return float(np.mean(self.scores))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Measured:
        """Read what `dataclasses.asdict` and JSON made of it."""
        usages = {name: Usage(**values[name]) for name in ("usage", "own_usage")}
        return cls(**{**values, "scores": tuple(values["scores"]), **usages})


@dataclass(frozen=True)
class ChoiceReport:
    """What training did and took.

    Args:
        algorithm: `"ppo"` or `"dqn"`.
        steps: Environment steps.
        curve: (steps, score) of each episode, in the order in which they ended.
        validation: The measurements on the validation prompts, of which the first is before any
            training.
        usage: What candidates, features and scores took.
        training_flops: Floating-point operations of the network that chooses, updates included.
        wall_seconds: Of the training, measurements aside.
    """

    algorithm: str
    steps: int
    curve: tuple[tuple[int, float], ...]
    validation: tuple[Measured, ...]
    usage: Usage
    training_flops: float
    wall_seconds: float

    def ledger(self) -> dict[str, Any]:
        """What training took, as JSON values."""
        return {
            "algorithm": self.algorithm,
            "steps": self.steps,
            **self.usage.as_dict(),
            "training_flops": self.training_flops,
            "total_flops": self.usage.flops + self.training_flops,
            "wall_seconds": self.wall_seconds,
        }


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
    training = _Training(
        "ppo", language_model, reward_model, prompts, Path(folder), settings, validation, encoder
    )
    return training.run(lambda env: _ppo(env, settings), callbacks, progress_bar)


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
    """Train a choice among candidates with Deep Q-Learning.

    Source: Mnih et al., "Human-level control through deep reinforcement learning", Nature 2015, by
    stable-baselines3's `DQN`. Deviations: Q is the sum of a score for each candidate, by the same
    weights, and a value of the state, as in Wang et al., "Dueling Network Architectures for Deep
    Reinforcement Learning", 2016, without the subtraction of the mean; with several environments
    all of them explore in the same steps; a response that meets its token limit counts as ended.

    Args:
        language_model: See `train_ppo`.
        reward_model: See `train_ppo`.
        prompts: See `train_ppo`.
        folder: See `train_ppo`.
        settings: See `DQNSettings`.
        validation: See `train_ppo`.
        encoder: See `train_ppo`.
        callbacks: See `train_ppo`.
        progress_bar: See `train_ppo`.

    Raises:
        TuningError: See `train_ppo`.
        RewardError: See `train_ppo`.
        KeyboardInterrupt: See `train_ppo`.
    """
    training = _Training(
        "dqn", language_model, reward_model, prompts, Path(folder), settings, validation, encoder
    )
    return training.run(lambda env: _dqn(env, settings), callbacks, progress_bar)


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
    """Scores of episodes in which the policy chooses.

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

    Returns:
        float64[P, E].

    Raises:
        TuningError: The policy was trained with other models.
        RewardError: The reward failed.

    Example:
        >>> chosen = evaluate(policy, lm, reward, test_prompts, episodes=4)  # doctest: +SKIP
        >>> rng = np.random.default_rng(0)  # doctest: +SKIP
        >>> random = evaluate(
        ...     policy, lm, reward, test_prompts, episodes=4,
        ...     choose=lambda rows: rng.integers(4, size=len(rows)),
        ... )  # doctest: +SKIP
    """
    policy.check_fits(language_model, reward_model)
    encoder = policy.view.resolved(policy.encoder)
    proposer = policy.view.proposer(language_model, reward_model, prompts, encoder)
    states = [initial(prompt, language_model) for prompt in prompts for _ in range(episodes)]
    seeds = [spawn_seed(seed, e) for _ in prompts for e in range(episodes)]
    ledgers = [ledger if ledger is not None else Ledger()] * len(states)
    ended = play(proposer, choose or policy.choose, states, seeds, ledgers)
    scores = score_states(reward_model, language_model, ended, ledgers)
    return scores.reshape(len(prompts), episodes)


def _ppo(env: VectorEnvAdapter, settings: PPOSettings) -> BaseAlgorithm:
    return PPO(
        CandidateActorCritic,
        env,
        learning_rate=settings.learning_rate,
        n_steps=settings.rollout_steps // settings.num_envs,
        batch_size=settings.batch_size,
        n_epochs=settings.epochs,
        gamma=settings.discount,
        gae_lambda=settings.gae_lambda,
        clip_range=settings.clip_range,
        ent_coef=settings.entropy,
        policy_kwargs=_network(env, settings),
        seed=settings.seed,
        device="cpu",
    )


def _dqn(env: VectorEnvAdapter, settings: DQNSettings) -> BaseAlgorithm:
    return DQN(
        CandidateDQNPolicy,
        env,
        learning_rate=settings.learning_rate,
        buffer_size=min(settings.buffer_size, settings.total_steps + settings.num_envs),
        learning_starts=settings.learning_starts,
        batch_size=settings.batch_size,
        gamma=settings.discount,
        train_freq=1,
        gradient_steps=settings.updates,
        target_update_interval=settings.target_interval,
        exploration_fraction=settings.exploration_fraction,
        exploration_final_eps=settings.exploration_final,
        policy_kwargs=_network(env, settings),
        seed=settings.seed,
        device="cpu",
    )


def _network(env: VectorEnvAdapter, settings: ChoiceSettings) -> dict[str, Any]:
    layout = env.get_attr("proposer", [0])[0].layout
    return {"layout": layout, "hidden": settings.hidden}


class _Training:
    """One training: its environment, its checkpoints, and what is known of it so far."""

    def __init__(
        self,
        algorithm: str,
        language_model: LanguageModel,
        reward: Any,
        prompts: Sequence[Prompt],
        folder: Path,
        settings: ChoiceSettings,
        validation: Sequence[Prompt],
        encoder: Encoder | None,
    ) -> None:
        self.algorithm = algorithm
        self.language_model = language_model
        self.reward_model = as_reward_model(reward)
        self.prompts, self.validation = prompts, validation
        self.folder = folder
        self.settings = settings
        self.encoder = encoder
        self.curve: list[tuple[int, float]] = []
        self.validated: list[Measured] = []
        self.usage, self.wall_seconds = Usage(), 0.0

    def run(
        self,
        make: Callable[[VectorEnvAdapter], BaseAlgorithm],
        callbacks: Sequence[BaseCallback],
        progress_bar: bool,
    ) -> ChoiceReport:
        check_policy_target(self.folder)
        for prompts in (self.prompts, self.validation):
            least = 1 if prompts is self.prompts else 0
            check_prompts(prompts, self.reward_model, self.language_model, least)
        checkpoints = checkpoints_of(self.folder)
        resumed = claim(checkpoints, self._described())
        with own_randomness(self.settings.seed), stop_asked("this rollout") as asked:
            env = self._env()
            model = make(VectorEnvAdapter(env))
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
                raise KeyboardInterrupt(
                    f"Stopped after {model.num_timesteps} of {self.settings.total_steps} steps. "
                    f"The same call goes on from the last checkpoint in {checkpoints}; remove that "
                    "folder to begin anew."
                )
            watch.note()
            if self.validation and self.validated[-1].steps < model.num_timesteps:
                self.validate(model)
        report = self._report(model)
        notes = {LEDGER: report.ledger(), CURVE: self._curves()}
        self.policy_of(model).save(self.folder, notes)
        shutil.rmtree(checkpoints)
        return report

    def policy_of(self, model: BaseAlgorithm) -> CandidatePolicy:
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
            self.policy_of(model),
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
        return {
            **self._curves(),
            "usage": asdict(self.usage),
            "wall_seconds": self.wall_seconds,
        }

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
            "settings": {**asdict(self.settings), "hidden": list(self.settings.hidden)},
            "language_model": self.language_model.name,
            "dtype": str(getattr(self.language_model, "dtype", None)),
            "reward": reward_name(self.reward_model),
            "prompts": prompts_digest(self.prompts),
            "validation": prompts_digest(self.validation),
        }

    def _report(self, model: BaseAlgorithm) -> ChoiceReport:
        return ChoiceReport(
            self.algorithm,
            model.num_timesteps,
            tuple(self.curve),
            tuple(self.validated),
            self.usage,
            self._training_flops(model),
            self.wall_seconds,
        )

    def _training_flops(self, model: BaseAlgorithm) -> float:
        """Of the network: a choice a step, and the updates."""
        settings: Any = self.settings
        weights = sum(p.numel() for p in model.policy.parameters())
        if self.algorithm == "ppo":
            learned = settings.epochs * model.num_timesteps
        else:
            learned = model._n_updates * settings.batch_size
        forward = 2.0 * weights * settings.num_candidates
        return forward * (model.num_timesteps + _PASSES * learned)


class _Watch(BaseCallback):
    """Notes the episodes, and between two rollouts measures, saves and stops."""

    def __init__(
        self,
        training: _Training,
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

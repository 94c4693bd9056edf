"""Settings of PPO and DQN on the candidate view, and what they report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from mbrl_text_env.agents.learning.notes import from_json
from mbrl_text_env.agents.learning.training import TrainingReport, TuningError, check_above_zero
from mbrl_text_env.agents.model_free.candidate_policy import CandidateView
from mbrl_text_env.types import Usage

ChunkReward = Literal["terminal", "delta"]
"""When the score is paid: at the end, or chunk by chunk as it rises (the sum is the same)."""


@dataclass(frozen=True)
class ChoiceSettings(CandidateView):
    """What PPO and DQN have in common; for the view's fields see `CandidateView`.

    Args:
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
        counts = ("total_steps", "num_envs", "save_steps", "eval_steps", "eval_episodes")
        check_above_zero(self, *counts, "learning_rate", "flat_episodes")
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
        counts = ("buffer_size", "learning_starts", "batch_size", "updates", "target_interval")
        check_above_zero(self, *counts)
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
        return from_json(cls, values)


@dataclass(frozen=True, kw_only=True)
class ChoiceReport(TrainingReport):
    """What training did and took; see `TrainingReport` for the rest.

    Args:
        steps: Environment steps.
        curve: (steps, score) of each episode, in the order in which they ended.
        validation: The measurements on the validation prompts, of which the first is before any
            training.
        wall_seconds: Of the training, measurements aside.
    """

    steps: int
    curve: tuple[tuple[int, float], ...]
    validation: tuple[Measured, ...]
    wall_seconds: float

    def ledger(self) -> dict[str, Any]:
        """What training took, as JSON values."""
        return super().ledger() | {"steps": self.steps, "wall_seconds": self.wall_seconds}

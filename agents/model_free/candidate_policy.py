"""Policies that choose among chunks proposed by a language model, and their settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mbrl_text_env.agents.learning.reports import write_json
from mbrl_text_env.agents.learning.training import (
    TrainingReport,
    TuningError,
    check_above_zero,
    expect,
)
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.fitting.folder import FolderKind
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams
from mbrl_text_env.proposer import CandidateProposer, FeatureLayout
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, RewardModel, reward_name
from mbrl_text_env.task import TextTask
from mbrl_text_env.types import FloatArray, Prompt, Usage

EncoderName = Literal["embedded", "language_model", "own"]
"""MiniLM, the language model's own features, or a custom encoder."""

ChunkReward = Literal["terminal", "delta"]
"""When the score is paid: at the end, or as its change after each chunk (the sum is the same)."""

POLICY = FolderKind(
    noun="policy",
    writer="train_ppo or train_dqn",
    config="policy.json",
    weights="policy.safetensors",
    version=1,
    error=TuningError,
)


@dataclass(frozen=True)
class CandidateView:
    """The observation of a candidate policy: K chunks and their features.

    `encoder` embeds the prefix with each candidate (None disables embeddings). With
    `prefix_rewards`, the reward model scores the prefix with each candidate.
    """

    num_candidates: int = 4
    chunk_tokens: int = 16
    max_response_tokens: int = 96
    temperature: float = 0.7
    encoder: EncoderName | None = "embedded"
    prefix_rewards: bool = True

    def __post_init__(self) -> None:
        names = (*get_args(EncoderName), None)
        expect(self, "num_candidates", self.num_candidates >= 2, "at least 2, to choose from")
        expect(self, "encoder", self.encoder in names, f"one of {names}")
        check_above_zero(self, "chunk_tokens", "max_response_tokens")
        expect(self, "temperature", 0 <= self.temperature < math.inf, "a finite number >= 0")

    @property
    def params(self) -> SamplingParams:
        """Sampling parameters of the candidates."""
        return SamplingParams(temperature=self.temperature)

    def resolved(self, encoder: Encoder | None) -> Encoder | str | None:
        """The encoder for `CandidateProposer`; a custom one must be passed for `"own"`."""
        if (self.encoder == "own") != (encoder is not None):
            wanted = "an object with encode(texts)" if encoder is None else "None"
            raise TuningError(
                f"encoder: expected {wanted}, because the view's encoder is {self.encoder!r}, got "
                f"{encoder!r}."
            )
        if self.encoder == "embedded":
            from mbrl_text_env.language_models import embedded_encoder

            return embedded_encoder()
        return encoder if self.encoder == "own" else self.encoder

    def proposer(
        self,
        language_model: LanguageModel,
        reward_model: RewardModel,
        prompts: Sequence[Prompt],
        encoder: Encoder | str | None,
    ) -> CandidateProposer:
        """Create the proposer of candidates and features, with an encoder from `resolved`."""
        limits: dict[str, Any] = {"max_response_tokens": self.max_response_tokens}
        limits["max_chunk_tokens"] = self.chunk_tokens
        task = TextTask(prompts, language_model, reward_model, **limits)
        drawn = self.num_candidates, self.chunk_tokens, self.params
        return CandidateProposer(language_model, task, *drawn, encoder, self.prefix_rewards)


@dataclass(frozen=True)
class ChoiceSettings(CandidateView):
    """Settings shared by PPO and DQN; for the view's fields see `CandidateView`.

    Args:
        total_steps: Environment steps, each sampling K chunks; rounded up to full rollouts.
        num_envs: Number of parallel environments.
        reward: `"delta"` rewards each chunk with its change of the score, so every prefix is
            scored; `"terminal"` rewards the last chunk with the score.
        hidden: Sizes of the network's hidden layers; empty for a linear policy.
        save_steps, eval_steps: Environment steps between checkpoints, and between evaluations of
            `eval_episodes` episodes per validation prompt.
        flat_episodes: An error is raised if this many first episodes all have the same score.
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
        expect(self, "hidden", min(self.hidden, default=1) >= 1, "sizes of at least 1")
        expect(self, "discount", 0 < self.discount <= 1, "above 0, at most 1")
        ways = get_args(ChunkReward)
        expect(self, "reward", self.reward in ways, f"one of {ways}")

    @property
    def view(self) -> CandidateView:
        """The part of the settings that is needed to use the policy."""
        return CandidateView(**{f.name: getattr(self, f.name) for f in fields(CandidateView)})


@dataclass(frozen=True)
class PPOSettings(ChoiceSettings):
    """PPO settings, in stable-baselines3's terms; see `ChoiceSettings` for the rest.

    `rollout_steps` is the number of environment steps between updates, over all environments: a
    multiple of `num_envs`, and at least `batch_size`. `entropy` is the weight of the bonus.
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
        expect(
            self,
            "rollout_steps",
            self.rollout_steps % self.num_envs == 0 and self.rollout_steps >= self.batch_size,
            f"a multiple of num_envs ({self.num_envs}), at least batch_size ({self.batch_size})",
        )


@dataclass(frozen=True)
class DQNSettings(ChoiceSettings):
    """DQN settings, in stable-baselines3's terms; see `ChoiceSettings` for the rest.

    `learning_starts` and `target_interval` are in environment steps. `updates` is the number after
    each step of all environments. The exploration rate decays to `exploration_final` over
    `exploration_fraction` of the training.
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
            expect(self, name, 0 <= getattr(self, name) <= 1, "0 to 1")


@dataclass(frozen=True)
class Measured:
    """Mean scores of the policy, one per validation prompt, after a number of steps.

    Usage, FLOPs and wall time are the training's so far; `own_usage` is the evaluation's.
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


@dataclass(frozen=True, kw_only=True)
class ChoiceReport(TrainingReport):
    """Results and cost of a training; see `TrainingReport` for the rest.

    The curve has the pair (steps, score) of each finished episode. The first evaluation is before
    any training. Wall time excludes the evaluations.
    """

    steps: int
    curve: tuple[tuple[int, float], ...]
    validation: tuple[Measured, ...]
    wall_seconds: float

    def ledger(self) -> dict[str, Any]:
        """The cost of training, as JSON values."""
        return super().ledger() | {"steps": self.steps, "wall_seconds": self.wall_seconds}


class _Network(nn.Module):
    """A network on one row of features: tanh layers, or linear without `hidden`."""

    def __init__(self, layout: FeatureLayout, hidden: Sequence[int]) -> None:
        super().__init__()
        self.layout = layout
        size = 1 + 3 + 3 * layout.prefix_rewards + layout.embedding_size
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(size, width), nn.Tanh()]
            size = width
        self.net = nn.Sequential(*layers, nn.Linear(size, 1))


class CandidateScorer(_Network):
    """Scores each candidate from its features, with shared weights."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float32[B, K] for float32[B, layout.size]."""
        parts = self.layout.split(features)
        k = self.layout.num_candidates
        rows = [parts.position[:, None].expand(-1, k, -1), parts.scalars]
        if self.layout.prefix_rewards:
            before = parts.prefix_reward[:, None].expand(-1, k, -1)
            rows += [before, parts.rewards, parts.rewards - before]
        if self.layout.embedding_size:
            rows.append(_scaled(parts.embeddings))
        scores: torch.Tensor = self.net(torch.cat(rows, dim=-1))[..., 0]
        return scores


class StateValue(_Network):
    """The value of a state; it does not depend on the order of the candidates."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float32[B, 1] for float32[B, layout.size]."""
        parts = self.layout.split(features)
        rows = [parts.position, parts.scalars.mean(dim=1)]
        if self.layout.prefix_rewards:
            rows += [parts.prefix_reward, parts.rewards.mean(dim=1), parts.rewards.amax(dim=1)]
        if self.layout.embedding_size:
            rows.append(_scaled(parts.prefix_embedding))
        value: torch.Tensor = self.net(torch.cat(rows, dim=-1))
        return value


def _scaled(vectors: torch.Tensor) -> torch.Tensor:
    """Scale vectors to a root mean square of 1; zero vectors are unchanged."""
    size = vectors.square().mean(dim=-1, keepdim=True).sqrt()
    return vectors / size.clamp_min(1e-6)


@dataclass(eq=False)
class CandidatePolicy:
    """A trained policy that chooses among candidates.

    It chooses the candidate with the highest `scorer` score, the first if tied. It was trained on
    the `view`, with the named language model and reward (None allows any). `encoder` is required if
    the view's encoder is `"own"`.
    """

    scorer: CandidateScorer
    view: CandidateView
    hidden: Sequence[int]
    algorithm: str
    language_model_name: str | None
    reward_name: str | None
    encoder: Encoder | None = None
    name: str = ""

    def __post_init__(self) -> None:
        self.scorer.eval()
        self.hidden = tuple(self.hidden)
        self.name = self.name or self.algorithm

    @property
    def flops(self) -> float:
        """FLOPs of one choice."""
        weights = sum(p.numel() for p in self.scorer.parameters())
        return 2.0 * weights * self.view.num_candidates

    def scores(self, features: npt.ArrayLike) -> FloatArray:
        """Candidate scores, float64[B, K], for the view's features, float32[B, layout.size]."""
        rows = np.asarray(features, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.scorer.layout.size:
            raise TuningError(
                f"features: expected [B, {self.scorer.layout.size}] for the view that the policy "
                f"was trained on ({self.view}), got {list(rows.shape)}."
            )
        with torch.inference_mode():
            return self.scorer(torch.from_numpy(rows)).numpy().astype(np.float64)

    def choose(self, features: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the highest-scoring candidate of each row, int64[B]."""
        return self.scores(features).argmax(axis=1)

    def check_fits(
        self, language_model: LanguageModel | None, reward_model: RewardModel | None
    ) -> None:
        """Raise a `TuningError` for models other than those it was trained with; skip None."""
        for what, own, given in (
            ("language model", self.language_model_name, language_model and language_model.name),
            ("reward", self.reward_name, reward_model and reward_name(reward_model)),
        ):
            if own is not None and given is not None and own != given:
                raise TuningError(
                    f"The policy was trained with the {what} {own!r}, got {given!r}. Train one for "
                    f"that, or set its {what.replace(' ', '_')}_name to None to use it anyway."
                )

    def save(self, folder: str | Path, notes: dict[str, Any] | None = None) -> None:
        """Save as safetensors and JSON with notes, atomically; `TuningError` if that fails."""
        from safetensors.torch import save_file

        config = {
            "algorithm": self.algorithm,
            "language_model": self.language_model_name,
            "reward": self.reward_name,
            "hidden": list(self.hidden),
            "embedding_size": self.scorer.layout.embedding_size,
            "view": asdict(self.view),
        }
        with POLICY.writing(folder) as scratch:
            POLICY.write_config(scratch, config)
            save_file(dict(self.scorer.state_dict()), scratch / POLICY.weights)
            for name, note in (notes or {}).items():
                write_json(scratch / name, note)


def load_policy(
    folder: str | Path,
    language_model: LanguageModel | None = None,
    reward_model: RewardLike | None = None,
    *,
    encoder: Encoder | None = None,
    name: str = "",
) -> CandidatePolicy:
    """Load a policy that `train_ppo` or `train_dqn` wrote; `TuningError` for other folders.

    It is also a `TuningError` if the language model or reward is not the one it was trained with;
    None is not checked. Pass `encoder` if the training used a custom one. `name` replaces the
    algorithm's name in reports.
    """
    with POLICY.reading(folder) as (config, arrays):
        view = CandidateView(**{f.name: config["view"][f.name] for f in fields(CandidateView)})
        layout = FeatureLayout(view.num_candidates, config["embedding_size"], view.prefix_rewards)
        scorer = CandidateScorer(layout, config["hidden"])
        weights = {name: torch.from_numpy(values) for name, values in arrays().items()}
        try:
            scorer.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        names = config["algorithm"], config["language_model"], config["reward"]
    policy = CandidatePolicy(scorer, view, config["hidden"], *names, encoder, name)
    reward = None if reward_model is None else as_reward_model(reward_model)
    policy.check_fits(language_model, reward)
    return policy

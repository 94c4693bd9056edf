"""GRPO on a learned head in place of most reward calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbrl_text_env.agents.learning.training import expect
from mbrl_text_env.agents.model_free.trl import (
    PolicyGradientReport,
    PolicyGradientSettings,
    StepReport,
    train_grpo,
)
from mbrl_text_env.types import Prompt

if TYPE_CHECKING:
    from mbrl_text_env.language_models import TransformersLM
    from mbrl_text_env.rewards.learning.features import Features


@dataclass(frozen=True)
class DynaSettings(PolicyGradientSettings):
    """How a policy is trained with few reward calls; for other fields see `PolicyGradientSettings`.

    Args:
        max_calls: Of the reward, in all.
        first_calls: Responses that are all scored by the reward, before there is a head.
        calls_per_step: Of the reward, once there is a head.
        audited: Of these, so many are of responses drawn at random, which measures the head; the
            others are of those it is least sure of.
        members: Heads of the ensemble.
    """

    max_calls: int = 240
    first_calls: int = 32
    calls_per_step: int = 3
    audited: int = 1
    members: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = {"audited": 0, "calls_per_step": self.audited, "first_calls": 2, "members": 2}
        for name, least in {**limits, "max_calls": self.first_calls}.items():
            expect(self, name, getattr(self, name) >= least, f"{least} or more")


def train_dyna(
    language_model: TransformersLM,
    reward_model: Any,
    prompts: Sequence[Prompt],
    folder: str | Path,
    settings: DynaSettings = DynaSettings(),
    *,
    start_from: str | Path | None = None,
    labels: str | Path | None = None,
    features: Features | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> PolicyGradientReport:
    """Train a LoRA adapter with GRPO on a `SurrogateReward`; see `train_grpo` for the rest.

    The reward is asked for a few responses of each step, and a head that is fitted on its scores
    says the others'. Labels are kept: what the head said before it saw them tells whether the
    policy has learned to please it alone. The curve of the report is of these scores, most of them
    the head's; its usage counts the calls of the reward alone.

    Source: Sutton, "Dyna, an Integrated Architecture for Learning, Planning, and Reacting", 1991.
    Deviation: what is learned is the reward; responses are the policy's own, for to sample them is
    cheap beside the update.

    Args:
        labels: Folder of the labels; `<folder>-labels` by default. With that of an earlier training
            on the same reward, its labels and calls count.
        features: See `SurrogateReward`; None for `TokenFeatures` of the language model.

    Example:
        >>> report = train_dyna(embedded(), make("sentiment"), prompts, "kind")  # doctest: +SKIP
        >>> report.usage.reward_calls  # doctest: +SKIP
        240
    """
    from mbrl_text_env.rewards.learning.features import TokenFeatures
    from mbrl_text_env.rewards.learning.surrogate import SurrogateReward

    names = ("max_calls", "first_calls", "audited", "members")
    reward = SurrogateReward(
        reward_model,
        labels_of(Path(folder)) if labels is None else labels,
        features=TokenFeatures(language_model) if features is None else features,
        calls_per_batch=settings.calls_per_step,
        **{name: getattr(settings, name) for name in names},
    )
    given = (language_model, reward, prompts, folder, settings)
    return train_grpo(*given, start_from=start_from, on_step=on_step)


def labels_of(folder: Path) -> Path:
    """Where the labels of a training lie: beside its policy."""
    return folder.with_name(f"{folder.name}-labels")

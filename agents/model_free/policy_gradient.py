"""Settings of GRPO and RLOO, and what they report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mbrl_text_env.agents.learning.lora import AdapterSettings
from mbrl_text_env.agents.learning.training import TrainingReport, TuningError, check_above_zero
from mbrl_text_env.ledger import Usage

USAGE, FLAT = "usage/", "flat_share"
"""What each step adds to the trainer's log, which checkpoints keep."""


@dataclass(frozen=True)
class PolicyGradientSettings(AdapterSettings):
    """How a policy is trained with GRPO or RLOO; for the adapter's fields see `AdapterSettings`.

    Args:
        steps: Steps of the optimizer.
        prompts_per_step: Prompts in a step, at most as many as there are.
        num_generations: Responses to each of them, whose scores are compared; at least 2.
        max_completion_length: Token limit of a response.
        temperature: At which responses are drawn; by default as agents draw them.
        learning_rate: Its highest value; it falls linearly to 0.
        beta: Weight of the KL divergence from the policy at the start; 0 saves its computation.
        batch_size: Responses in one forward pass; a divisor of `prompts_per_step *
            num_generations`.
        save_steps: Steps between checkpoints.
        flat_steps: So many first steps in which no group of responses has two different scores are
            an error.
        seed: Adapter, order of the prompts and responses follow from it.

    Raises:
        TuningError: A number is out of its range.
    """

    steps: int = 60
    prompts_per_step: int = 4
    num_generations: int = 8
    max_completion_length: int = 64
    temperature: float = 0.7
    learning_rate: float = 1e-3
    beta: float = 0.0
    batch_size: int = 16
    save_steps: int = 10
    flat_steps: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("steps", "prompts_per_step", "max_completion_length", "batch_size")
        check_above_zero(self, *counts, "temperature", "learning_rate", "save_steps", "flat_steps")
        if self.num_generations < 2:
            raise TuningError(
                "num_generations: expected at least 2, for responses are judged against each "
                f"other, got {self.num_generations!r}."
            )
        if self.beta < 0:
            raise TuningError(f"beta: expected 0 or more, got {self.beta!r}.")
        if self.responses_per_step % self.batch_size:
            raise TuningError(
                f"batch_size: expected a divisor of prompts_per_step * num_generations "
                f"({self.responses_per_step}), got {self.batch_size}."
            )

    @property
    def responses_per_step(self) -> int:
        """Responses that each step samples and learns from."""
        return self.prompts_per_step * self.num_generations


@dataclass(frozen=True)
class StepReport:
    """One step of training.

    Args:
        step: From 1.
        reward: Mean score of its responses.
        reward_std: Standard deviation of the scores.
        flat_share: Share of prompts whose responses all have one score, and teach nothing.
        mean_tokens: Mean length of the responses.
        kl: Divergence (nats a token) from the policy at the start; None where beta is 0.
    """

    step: int
    reward: float
    reward_std: float
    flat_share: float
    mean_tokens: float
    kl: float | None = None

    @classmethod
    def from_log(cls, entry: Mapping[str, Any]) -> StepReport:
        """What the trainer's log says of a step."""
        same = {name: entry[name] for name in ("step", "reward", "reward_std", FLAT)}
        return cls(**same, mean_tokens=entry["completions/mean_length"], kl=entry.get("kl"))


@dataclass(frozen=True, kw_only=True)
class PolicyGradientReport(TrainingReport):
    """What training did and took; see `TrainingReport` for the rest.

    The `seconds` of its usage are those of all steps, updates included. Steps that were lost to a
    kill and done again count once.

    Args:
        reward_name: The reward's name.
        language_model: The base's name.
        curve: One entry a step.
    """

    reward_name: str
    language_model: str
    curve: tuple[StepReport, ...]

    @classmethod
    def from_log(cls, log_history: Sequence[Mapping[str, Any]], **names: str) -> Any:
        """What the trainer's log says of all steps."""
        steps = [entry for entry in log_history if "reward" in entry]

        def total(name: str) -> float:
            return float(sum(entry[name] for entry in steps))

        # Numbers pass through the log as float32, which is exact for counts up to 2**24.
        amounts: dict[str, Any] = {
            f.name: round(total(USAGE + f.name)) if f.type == "int" else total(USAGE + f.name)
            for f in fields(Usage)
        }
        return cls(
            **names,
            curve=tuple(map(StepReport.from_log, steps)),
            usage=Usage(**{**amounts, "seconds": total("step_time")}),
            training_flops=total(USAGE + "training_flops"),
        )

    def ledger(self) -> dict[str, Any]:
        """What training took, as JSON values."""
        names = {"reward": self.reward_name, "language_model": self.language_model}
        return super().ledger() | names | {"steps": len(self.curve)}

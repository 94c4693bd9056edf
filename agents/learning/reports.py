"""What is known of each iteration of a loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbrl_text_env.agents.learning.answers import HINTED
from mbrl_text_env.agents.learning.filters import scores_described
from mbrl_text_env.agents.learning.monitoring import (
    Divergence,
    Diversity,
    GoldCheck,
    ValueCheck,
    diversity,
)
from mbrl_text_env.agents.learning.notes import to_json
from mbrl_text_env.records import Record


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers to the train prompts, their counts and mean score."""

    num_records: int
    num_prompts: int
    num_hinted: int
    mean: float

    @classmethod
    def of(cls, records: Sequence[Record], **more: Any) -> Any:
        """Sum up records; `more` are the fields of a subclass."""
        return cls(
            num_records=len(records),
            num_prompts=len({record.prompt_id for record in records}),
            num_hinted=sum(record.agent.endswith(HINTED) for record in records),
            mean=float(np.mean([record.score for record in records])),
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class Collected(Answers):
    """All answers of an iteration; `num_failed` prompts are left out, as they cannot be scored."""

    num_failed: int
    std: float


@dataclass(frozen=True, kw_only=True)
class Selected(Answers):
    """The answers that were tuned on; `lowest` is the lowest score."""

    lowest: float


@dataclass(frozen=True)
class Validation:
    """Plain sampling on the validation prompts.

    Args:
        mean: Mean score, over prompts.
        error: Its standard error over prompts; NaN for one prompt.
        tokens: Mean length of a response.
        diversity: Of the responses.
        divergence: From the base model, where it was asked for.
        gold: What a trusted reward says, where there is one.
    """

    mean: float
    error: float
    tokens: float
    diversity: Diversity
    divergence: Divergence | None = None
    gold: GoldCheck | None = None

    @classmethod
    def of(
        cls, records: Sequence[Record], divergence: Divergence | None, gold: GoldCheck | None
    ) -> Validation:
        """Sum up records."""
        by_prompt: dict[str, list[float]] = {}
        for record in records:
            by_prompt.setdefault(record.prompt_id, []).append(record.score)
        means = np.asarray([np.mean(scores) for scores in by_prompt.values()])
        error = float("nan")
        if len(means) > 1:
            error = float(means.std(ddof=1) / np.sqrt(len(means)))
        tokens = float(np.mean([len(record.response_ids) for record in records]))
        return cls(float(means.mean()), error, tokens, diversity(records), divergence, gold)


@dataclass(frozen=True)
class ValueReport:
    """The value model of an iteration.

    Args:
        fitted_at: The iteration whose policy it was fitted for.
        refitted: Whether that is this one.
        when_fitted: How well the old model predicted the validation responses of the policy that
            it was fitted for (the first model: this policy's).
        before: How well the old model predicts this policy's; None for the first.
        after: How well the model of this iteration does.
        error_ratio: Of `before` and `when_fitted`; None for the first.
    """

    fitted_at: int
    refitted: bool
    when_fitted: ValueCheck
    before: ValueCheck | None
    after: ValueCheck
    error_ratio: float | None


@dataclass(frozen=True)
class IterationReport:
    """An iteration's figures; what an iteration lacks is None.

    Args:
        iteration: 0 for the base model, before anything is learned.
        policy: Name of the policy at its end.
        validation: What that scores.
        collected: What the policy before answered.
        selected: What was tuned on.
        improvement: What the improver says.
        value: The value model for this policy.
        usage: What each stage took, of the last try where it was stopped: `Usage.as_dict()`, whose
            seconds are those of the models' calls, and `wall_seconds`.
        warnings: What to look at.
    """

    iteration: int
    policy: str
    validation: Validation
    collected: Collected | None
    selected: Selected | None
    improvement: Mapping[str, Any] | None
    value: ValueReport | None
    usage: Mapping[str, Mapping[str, float]]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the usage, which the ledger has."""
        values = to_json(self)
        values.pop("usage")
        return values

    def ledger(self) -> dict[str, Any]:
        """What each stage took, and the total."""
        rows = list(self.usage.values())
        return {**self.usage, "total": {name: sum(row[name] for row in rows) for name in rows[0]}}


@dataclass(frozen=True)
class LoopResult:
    """What a loop did.

    Args:
        iterations: A report for each, that of the base model first.
        best: The iteration with the highest mean on the validation prompts; 0 is the base model.
        stopped: Why it ended before its last iteration; None where it did not.
    """

    iterations: tuple[IterationReport, ...]
    best: int
    stopped: str | None = None


def doubts_about(first: Validation, last: Validation) -> list[str]:
    """What a rise of the reward since the base model may hide."""
    if first.gold is None or last.gold is None:
        return []
    if last.gold.proxy <= first.gold.proxy or last.gold.gold >= first.gold.gold:
        return []
    return [
        f"the reward rose from {first.gold.proxy:.4g} to {last.gold.proxy:.4g} since the base "
        f"model, while the gold reward fell from {first.gold.gold:.4g} to {last.gold.gold:.4g} on "
        "the same responses: the policy may be learning the reward model's mistakes."
    ]


def without_signal(
    answers: Sequence[Record], own: Sequence[Record], *, is_plain: bool
) -> str | None:
    """Why nothing can be learned from answers; None where something can.

    A planner whose answers all score the same still has something to teach, as long as plain
    samples of the same policy (`own`) do not; `is_plain` says that the answers are such samples.
    """
    scores = {record.score for record in answers}
    if len(scores) > 1 or (not is_plain and {record.score for record in own} != scores):
        return None
    return (
        "expected scores that differ, got the same for all answers: there is no signal to learn "
        f"from. {scores_described(answers)} If they are as high as they can be, nothing is left "
        f"to learn; otherwise check the reward {answers[0].reward_name!r}, take more answers to "
        "each prompt, or other prompts."
    )


def fallen(means: Sequence[float], patience: int | None) -> str | None:
    """Why a loop stops after the last of its validation means; None where it does not.

    Args:
        means: Of each iteration, the base model's first.
        patience: Iterations without a new best after which it stops; None for never.
    """
    best = max(range(len(means)), key=lambda i: means[i])
    since = len(means) - 1 - best
    if patience is None or since < patience:
        return None
    return (
        f"The validation mean has not risen above that of iteration {best} ({means[best]:.4g}) for "
        f"{since} iteration{'s' if since > 1 else ''}; it is {means[-1]:.4g} now."
    )

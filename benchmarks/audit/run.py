"""Run an audit: pool, scores, measurements, verdict, files.

An audit is a folder with `config.json`, the scores, the pool (unless it stands elsewhere),
`audit.json` and `audit.png`. Run again after a kill, it ends with the same `audit.json` but for its
date.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.benchmarks.audit.measures import (
    Association,
    Curves,
    Sensitivity,
    associate,
    best_of_n_curves,
    measure_sensitivity,
)
from mbrl_text_env.benchmarks.audit.pool import PoolScores, fill_pool, score_pool
from mbrl_text_env.benchmarks.audit.verdict import Verdict, decide, trivial
from mbrl_text_env.benchmarks.compare import choose_prompts
from mbrl_text_env.benchmarks.settings import AuditConfig, AuditError
from mbrl_text_env.files import write_text
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.base import RewardModel, applies_to
from mbrl_text_env.runs import claimed, identity, prompt_digests, writing
from mbrl_text_env.types import FloatArray, Prompt

_FORMAT = 2


@dataclass(frozen=True)
class Audit:
    """The parts of an audit, with the number of prompts to which one of the rewards does not apply.

    `language_model` writes the pool; `labels` is what else belongs into the config file.
    """

    config: AuditConfig
    prompts: Sequence[Prompt]
    language_model: LanguageModel
    proxy: RewardModel
    gold: RewardModel
    left_out: int = 0
    labels: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What `audit.json` says that was audited."""
        return {
            "format": _FORMAT,
            **asdict(self.config),
            "language_model": self.language_model.name,
            "prompts": [prompt.id for prompt in self.prompts],
            "left_out": self.left_out,
            **self.labels,
        }

    @property
    def trivial(self) -> bool:
        """Whether proxy and gold are the same reward."""
        return self.config.proxy == self.config.gold


@dataclass(frozen=True)
class AuditResult:
    """What an audit found: the content of `audit.json` after date, command and config."""

    config: AuditConfig
    prompts: int
    left_out: int
    curves: Curves
    association: Association | None
    sensitivity: Sensitivity
    verdict: Verdict


def choose_for_both(
    prompts: Sequence[Prompt], config: AuditConfig, proxy: RewardModel, gold: RewardModel
) -> tuple[list[Prompt], int]:
    """Choose prompts that both rewards apply to; returns them and how many prompts were left out.

    Raises:
        AuditError: There are fewer.
    """
    fitting = [p for p in prompts if applies_to(proxy, p) and applies_to(gold, p)]
    if len(fitting) < config.num_prompts:
        raise AuditError(
            f"num_prompts: expected at most {len(fitting)}, as many of {len(prompts)} prompts as "
            f"both {config.proxy!r} and {config.gold!r} apply to, got {config.num_prompts}. Lower "
            "--num-prompts, or give other --prompts or another --split."
        )
    chosen = choose_prompts(fitting, config.num_prompts, proxy, config.seed)
    return chosen, len(prompts) - len(fitting)


def run_audit(
    audit: Audit,
    out: str | Path,
    *,
    pool: str | Path | None = None,
    command: str = "",
    on_progress: Callable[[str, int], None] | None = None,
) -> AuditResult:
    """Run or resume an audit and write `audit.json` and `audit.png`.

    Args:
        audit: What to run.
        out: The audit's folder.
        pool: The pool's records folder; None for one in `out`. Missing prompts are added.
        command: How it was asked for, for `audit.json`.
        on_progress: Called with "pool", "proxy" or "gold" and a count.

    Raises:
        AuditError: The folder holds something else, the pool does not fit, or a reward gives all
            responses to each prompt the same score.
        RewardError: A reward failed.
    """
    from mbrl_text_env.benchmarks.audit.report import plot

    folder = Path(out)
    record = {
        **audit.record(),
        "prompts": prompt_digests(audit.prompts),
        "pool": None if pool is None else str(pool),
        "models": {
            name: identity(getattr(audit, name)) for name in ("language_model", "proxy", "gold")
        },
    }
    with claimed(folder, record, "audit", AuditError):
        responses, scores = _scored(
            audit,
            folder,
            folder / "pool" if pool is None else Path(pool),
            on_progress or (lambda stage, count: None),
        )
        result = measure(audit, responses, scores["proxy"], scores["gold"])
        written = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "config": audit.record(),
            **{key: value for key, value in asdict(result).items() if key != "config"},
        }
        with writing(folder, AuditError):
            write_text(folder / "audit.json", json.dumps(written, indent=2, allow_nan=False))
            plot(result, folder / "audit.png")
    return result


def _scored(
    audit: Audit, folder: Path, pool: Path, report: Callable[[str, int], None]
) -> tuple[list[list[str]], dict[str, PoolScores]]:
    """The pool's responses and their scores by proxy and gold."""
    config = audit.config
    records = fill_pool(
        pool,
        audit.language_model,
        audit.prompts,
        samples=config.samples,
        max_response_tokens=config.max_response_tokens,
        seed=config.seed,
        on_batch=lambda count: report("pool", count),
    )
    responses = [[record.response for record in row] for row in records]
    scores = {
        role: score_pool(
            folder / "scores" / role,
            getattr(audit, role),
            audit.prompts,
            responses,
            tried=min(config.sensitivity_samples, config.samples),
            on_batch=lambda count, role=role: report(role, count),  # type: ignore[misc]
        )
        for role in (("proxy",) if audit.trivial else ("proxy", "gold"))
    }
    return responses, {"gold": scores["proxy"], **scores}


def measure(
    audit: Audit, responses: Sequence[Sequence[str]], proxy: PoolScores, gold: PoolScores
) -> AuditResult:
    """Measure a scored pool with the same number of responses to each prompt.

    Raises:
        AuditError: A reward gives all responses to each prompt the same score.
    """
    config = audit.config
    for name, (scores, _) in ((config.proxy, proxy), (config.gold, gold)):
        _check_varies(name, scores)
    curves = best_of_n_curves(proxy[0], gold[0], seed=config.seed)
    association = associate(proxy[0], gold[0], seed=config.seed)
    sensitivity = measure_sensitivity(responses, proxy, gold, seed=config.seed)
    prompts = len(responses)
    verdict = (
        trivial(config.proxy, prompts, config.samples)
        if audit.trivial
        else decide((config.proxy, config.gold), prompts, curves, association, sensitivity)
    )
    return AuditResult(config, prompts, audit.left_out, curves, association, sensitivity, verdict)


def _check_varies(name: str, scores: FloatArray) -> None:
    # Rounding of equal scores is no difference.
    if np.ptp(scores, axis=1).max() <= 1e-12 * np.abs(scores).max():
        everywhere = " (and the same to all prompts)" if np.ptp(scores) == 0 else ""
        raise AuditError(
            f"Reward {name!r}: expected different scores among the responses to a prompt, got the "
            f"same for all {scores.shape[1]} responses to each of {len(scores)} prompts"
            f"{everywhere}. There is nothing to choose by; audit another reward, or raise "
            "--samples or --max-response-tokens."
        )

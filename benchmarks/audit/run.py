"""Run an audit: pool, scores, measurements, verdict, files.

A resumed run writes the same `audit.json`, except for its date.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.agents.collection import collect, collection_run, missing_samples
from mbrl_text_env.benchmarks.audit import measures
from mbrl_text_env.benchmarks.audit.view import audit_page, chosen_answers
from mbrl_text_env.benchmarks.options import AuditConfig, AuditError, choose_prompts
from mbrl_text_env.benchmarks.page import Page, provenance, read_json, reading, write_page
from mbrl_text_env.files import restored, write_text
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.records import Record, RecordWriter, run_of
from mbrl_text_env.rewards.base import RewardModel, applies_to, score_responses
from mbrl_text_env.runs import (
    claimed,
    identity,
    prompt_digest,
    prompt_digests,
    refuse_others,
    writing,
)
from mbrl_text_env.types import Prompt

_FORMAT = 2
# A killed audit loses the responses of one batch.
_BATCH_PROMPTS = 4
AUDIT, REPORT = "audit.json", "report.html"
# Contents of the report that are not in `audit.json`.
_ANSWERS, _ABOUT = "answers.json", "run.json"


@dataclass(frozen=True)
class Audit:
    """The parts of an audit; `language_model` generates the pool, `labels` go into `audit.json`."""

    config: AuditConfig
    prompts: Sequence[Prompt]
    language_model: LanguageModel
    proxy: RewardModel
    gold: RewardModel
    left_out: int = 0
    labels: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The config that `audit.json` records."""
        return {
            "format": _FORMAT,
            **asdict(self.config),
            "language_model": self.language_model.name,
            "prompts": [prompt.id for prompt in self.prompts],
            "left_out": self.left_out,
            **self.labels,
        }

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles to score; one if proxy and gold are the same reward."""
        return ("proxy",) if self.config.proxy == self.config.gold else ("proxy", "gold")


@dataclass(frozen=True)
class AuditResult:
    """The results of an audit: the content of `audit.json` after date, command and config."""

    config: AuditConfig
    prompts: int
    left_out: int
    curves: measures.Curves
    association: measures.Association | None
    sensitivity: measures.Sensitivity
    verdict: measures.Verdict


def choose_for_both(
    prompts: Sequence[Prompt], config: AuditConfig, proxy: RewardModel, gold: RewardModel
) -> tuple[list[Prompt], int]:
    """Choose prompts that both rewards apply to, and count the others; too few: `AuditError`."""
    fitting = [p for p in prompts if applies_to(proxy, p) and applies_to(gold, p)]
    if len(fitting) < config.num_prompts:
        raise AuditError(
            f"num_prompts: expected at most {len(fitting)} (of {len(prompts)} prompts, those that "
            f"both {config.proxy!r} and {config.gold!r} apply to), got {config.num_prompts}. Lower "
            "--num-prompts, or give other --prompts or another --split."
        )
    chosen = choose_prompts(fitting, config.num_prompts, proxy, config.seed)
    return chosen, len(prompts) - len(fitting)


def run_audit(
    audit: Audit,
    out: str | Path,
    *,
    pool: str | Path | None = None,
    on_progress: Callable[[str, int], None] | None = None,
) -> AuditResult:
    """Run or resume an audit in the folder `out`.

    `pool` is a records folder to read responses from and add to; default: one in `out`.
    `on_progress` is called with "pool", "proxy" or "gold" and counts.

    Raises:
        AuditError: The folder holds something else, the pool does not fit, or a reward gives all
            responses to each prompt the same score.
    """
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
        report = on_progress or (lambda stage, count: None)
        config = audit.config
        records = fill_pool(
            folder / "pool" if pool is None else Path(pool),
            audit.language_model,
            audit.prompts,
            samples=config.samples,
            max_response_tokens=config.max_response_tokens,
            seed=config.seed,
            on_batch=partial(report, "pool"),
        )
        responses = [[record.response for record in row] for row in records]
        scores = {
            role: score_pool(
                folder / "scores" / role,
                getattr(audit, role),
                audit.prompts,
                responses,
                tried=min(config.sensitivity_samples, config.samples),
                on_batch=partial(report, role),
            )
            for role in audit.roles
        }
        scores = {"gold": scores["proxy"], **scores}
        result = measure(audit, responses, scores["proxy"], scores["gold"])
        about = provenance()
        written = {
            "date": about["date"],
            "command": about["command"],
            "config": audit.record(),
            **{key: value for key, value in asdict(result).items() if key != "config"},
        }
        asked = [(prompt.id, prompt.text) for prompt in audit.prompts]
        answers = chosen_answers(asked, responses, scores["proxy"][0], scores["gold"][0])
        with writing(folder, AuditError):
            write_text(folder / _ANSWERS, json.dumps(answers))
            write_text(folder / _ABOUT, json.dumps(about, indent=2))
            write_text(folder / AUDIT, json.dumps(written, indent=2, allow_nan=False))
            write_page(folder / REPORT, recorded_page(folder))
    return result


def recorded_page(folder: Path) -> Page:
    """The page of a finished audit, from its files; a damaged file is a `CompareError`."""
    with reading(folder):
        written, about, answers = (read_json(folder / name) for name in (AUDIT, _ABOUT, _ANSWERS))
        settings = written["config"]
        config = AuditConfig(**{each.name: settings[each.name] for each in fields(AuditConfig)})
        parts = {k: v for k, v in written.items() if k not in ("date", "command", "config")}
        result = restored(AuditResult, {"config": config, **parts})
        about = {**about, "command": written["command"]}
        return audit_page(result, settings, about, answers)


def measure(
    audit: Audit,
    responses: Sequence[Sequence[str]],
    proxy: measures.PoolScores,
    gold: measures.PoolScores,
) -> AuditResult:
    """Measure a scored pool; raises `AuditError` if scores do not vary within any prompt."""
    config, seed = audit.config, audit.config.seed
    names = config.proxy, config.gold
    for name, (scores, _) in zip(names, (proxy, gold), strict=True):
        # Ignore differences due to rounding.
        if np.ptp(scores, axis=1).max() <= 1e-12 * np.abs(scores).max():
            everywhere = " (and the same to all prompts)" if np.ptp(scores) == 0 else ""
            raise AuditError(
                f"Reward {name!r}: expected different scores among the responses to a prompt, got "
                f"the same for all {scores.shape[1]} responses to each of {len(scores)} prompts"
                f"{everywhere}. Selection needs differences: audit another reward, or raise "
                "--samples or --max-response-tokens."
            )
    curves = measures.best_of_n_curves(proxy[0], gold[0], seed=seed)
    association = measures.associate(proxy[0], gold[0], seed=seed)
    sensitivity = measures.measure_sensitivity(responses, proxy, gold, seed=seed)
    prompts = len(responses)
    verdict = (
        measures.decide(names, prompts, curves, association, sensitivity)
        if "gold" in audit.roles
        else measures.trivial(config.proxy, prompts, config.samples)
    )
    return AuditResult(config, prompts, audit.left_out, curves, association, sensitivity, verdict)


class _Characters(RewardModel):
    """A free score for records, which need one; it favours no audited reward."""

    name = "characters"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [float(len(response)) for response in responses]


def fill_pool(
    folder: Path,
    language_model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    max_response_tokens: int,
    seed: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Record]]:
    """Read the first responses to each prompt, and generate missing ones (temperature 0.7).

    `folder` is a records folder of any reward; it can also hold responses to other prompts.
    `on_batch` is called with the number of responses.

    Raises:
        AuditError: The folder holds responses of another model, seed or token limit.
        RecordsError: The folder is not readable or writable, or has other prompts with these ids.
    """
    options: dict[str, Any] = {"max_response_tokens": max_response_tokens, "seed": seed}
    with RecordWriter(folder) as writer:
        existing = writer.existing()
        if existing:
            run = run_of(folder) or {}
            wanted = collection_run(language_model, _Characters(), **options)
            # The reward of the records does not matter here.
            run["reward"] = wanted["reward"] = ""
            refuse_others(folder, run, wanted, "pool", AuditError)
        missing = missing_samples(existing, prompts, samples)
        report = on_batch or (lambda count: None)
        report(len(prompts) * samples - sum(map(len, missing.values())))
        if any(missing.values()):
            collect(
                language_model,
                _Characters(),
                prompts,
                writer,
                samples_per_prompt=samples,
                batch_prompts=_BATCH_PROMPTS,
                on_batch=lambda records: report(len(records)),
                **options,
            )
            existing = writer.existing()
    place = {(record.prompt_id, record.sample): record for record in existing}
    return [[place[prompt.id, k] for k in range(samples)] for prompt in prompts]


def score_pool(
    folder: Path,
    reward_model: RewardModel,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    *,
    tried: int,
    on_batch: Callable[[int], None] | None = None,
) -> measures.PoolScores:
    """Score the pool, and the first `tried` responses to each prompt after each text change.

    Scores are kept in `folder`, one file per prompt. `on_batch` is called with 1 after each
    prompt.
    """
    rows = []
    reward = identity(reward_model)
    for prompt, texts in zip(prompts, responses, strict=True):
        changed = {
            name: [measures.intervene(name, t) for t in texts[:tried]]
            for name in measures.INTERVENTIONS
        }
        # The name is a digest of the inputs, so that scores of other texts are not reused.
        key = json.dumps([prompt.id, prompt_digest(prompt), texts, changed, reward]).encode()
        path = folder / f"{hashlib.sha256(key).hexdigest()[:32]}.json"
        row = _kept(path)
        if row is None:
            # Score each distinct text once.
            unique = list(dict.fromkeys([*texts, *chain.from_iterable(changed.values())]))
            totals = score_responses(reward_model, [prompt] * len(unique), unique).total
            score = dict(zip(unique, totals.tolist(), strict=True))
            row = {
                "pool": [score[text] for text in texts],
                "interventions": {name: [score[t] for t in new] for name, new in changed.items()},
            }
            with writing(folder, AuditError):
                write_text(path, json.dumps(row))
        rows.append(row)
        if on_batch is not None:
            on_batch(1)
    return np.array([row["pool"] for row in rows], dtype=np.float64), {
        name: np.array([row["interventions"][name] for row in rows], dtype=np.float64)
        for name in measures.INTERVENTIONS
    }


def _kept(path: Path) -> dict[str, Any] | None:
    """Read the scores of a file; None if it is missing or damaged."""
    try:
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return row if isinstance(row, dict) and {"pool", "interventions"} <= set(row) else None

"""The pool of an audit: n responses to each prompt, in a records folder that belongs to no reward.

Both rewards score the same responses. What was generated and what was scored is on the disk after
each batch, so an audit that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.agents.collection import collect, collection_run, missing_samples
from mbrl_text_env.benchmarks.audit.text_changes import INTERVENTIONS, intervene
from mbrl_text_env.benchmarks.settings import AuditError
from mbrl_text_env.files import write_text
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.records import Record, RecordWriter, run_of
from mbrl_text_env.rewards.base import RewardModel, score_responses
from mbrl_text_env.runs import identity, prompt_digest, refuse_others, writing
from mbrl_text_env.types import FloatArray, Prompt

PoolScores = tuple[FloatArray, dict[str, FloatArray]]
"""Of a pool, float64[prompts, samples], and by text change, float64[prompts, tried]."""

# Responses are lost by the batch when an audit is killed.
_BATCH_PROMPTS = 4


class _Characters(RewardModel):
    """Records need a score; this one costs nothing and favours no reward that is audited."""

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
    shared: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[Record]]:
    """Read the pool, generating what is missing of it as `collect` does (temperature 0.7).

    Args:
        folder: A records folder; one written by `mbrl-text collect` will do, whatever the reward.
        language_model: Writes the responses.
        prompts: The prompts.
        samples: Responses to each prompt; of more, the first are taken.
        max_response_tokens: As of `collect`.
        seed: As of `collect`.
        shared: Whether the folder may hold responses to other prompts alone.
        on_batch: Called with numbers of responses that are there.

    Raises:
        AuditError: The folder holds responses of another model, seed or token limit, or to other
            prompts alone.
        RecordsError: The folder cannot be read or written, holds responses to other prompts of the
            same ids, or lacks some and holds records that another reward has scored.
    """
    options: dict[str, Any] = {"max_response_tokens": max_response_tokens, "seed": seed}
    with RecordWriter(folder) as writer:
        existing = writer.existing()
        if existing:
            if not shared:
                _check_others(existing, prompts, folder)
            run = run_of(folder) or {}
            wanted = collection_run(language_model, _Characters(), **options)
            # What the responses were scored by does not matter here.
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
) -> PoolScores:
    """Score the pool, and the first `tried` responses to each prompt after each text change.

    The scores are kept in `folder`, one file a prompt, which belongs to this reward. `on_batch` is
    called with 1 after each prompt.

    Raises:
        RewardError: The reward model failed; the message names the prompt.
    """
    rows = []
    reward = identity(reward_model)
    for prompt, texts in zip(prompts, responses, strict=True):
        changed = {name: [intervene(name, t) for t in texts[:tried]] for name in INTERVENTIONS}
        # Named by what was scored: scores of other texts are never taken for these.
        key = json.dumps([prompt.id, prompt_digest(prompt), texts, changed, reward]).encode()
        path = folder / f"{hashlib.sha256(key).hexdigest()[:32]}.json"
        row = _kept(path)
        if row is None:
            row = _scores(reward_model, prompt, texts, changed)
            with writing(folder, AuditError):
                write_text(path, json.dumps(row))
        rows.append(row)
        if on_batch is not None:
            on_batch(1)
    plain = np.array([row["pool"] for row in rows], dtype=np.float64)
    return plain, {
        name: np.array([row["interventions"][name] for row in rows], dtype=np.float64)
        for name in INTERVENTIONS
    }


def _kept(path: Path) -> dict[str, Any] | None:
    """The scores of a file; None where there are none, or they are damaged."""
    try:
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return row if isinstance(row, dict) and {"pool", "interventions"} <= set(row) else None


def _scores(
    reward_model: RewardModel,
    prompt: Prompt,
    responses: Sequence[str],
    changed: dict[str, list[str]],
) -> dict[str, Any]:
    # Equal texts have equal scores: each is scored once.
    texts = list(dict.fromkeys([*responses, *chain.from_iterable(changed.values())]))
    totals = score_responses(reward_model, [prompt] * len(texts), texts).total
    score = dict(zip(texts, totals.tolist(), strict=True))
    return {
        "pool": [score[text] for text in responses],
        "interventions": {name: [score[t] for t in texts] for name, texts in changed.items()},
    }


def _check_others(records: Sequence[Record], prompts: Sequence[Prompt], folder: Path) -> None:
    wanted = {prompt.id for prompt in prompts}
    if not any(record.prompt_id in wanted for record in records):
        there = list(dict.fromkeys(record.prompt_id for record in records))
        raise AuditError(
            f"{folder} holds responses to other prompts ({', '.join(there[:3])}, ...; expected "
            f"{prompts[0].id}, ...). Give the --prompts, --split and --seed it was made with, or "
            "another --pool."
        )
